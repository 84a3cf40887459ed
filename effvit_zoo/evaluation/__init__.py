"""Measuring models: the evaluator's loop over batches, comparison of models, prediction on image files."""
