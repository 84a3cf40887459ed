"""From files to batches: roots, sources, splits, the order of samples, loaders."""
