"""Measuring models on data sets, in training and afterwards."""
