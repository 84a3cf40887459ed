"""Measurements that can be repeated: speed and memory of backbones against timm's own, and of attention mechanisms alone."""
