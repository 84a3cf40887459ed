"""Measuring instruments: parameters and MACs, interleaved timing, peak memory, the host. Independent of any model."""
