"""What is measured with: parameters and MACs, interleaved timing, peak memory, the host. Knows no model."""
