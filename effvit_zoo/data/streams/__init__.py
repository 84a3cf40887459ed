"""Sharded data sets that are read as sequences."""
