"""Training: one loop, objectives that say what is minimised, sources that say where batches come from."""
