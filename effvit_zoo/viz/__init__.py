"""Figures, each from plain numbers to one file: training curves, confusion matrix, annotated images, token selection, cost over tokens."""
