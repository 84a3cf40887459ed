"""Training and evaluation: data, tasks, one engine, optimisers, checkpoints and reports."""
