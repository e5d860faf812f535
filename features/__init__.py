"""What a row is, and where its numbers live: the patch table, the folds, and the Zarr feature store."""
