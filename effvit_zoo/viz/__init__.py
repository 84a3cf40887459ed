"""Figures, each from plain numbers to one file: training curves, confusion matrix, annotated predictions, cost over tokens."""
