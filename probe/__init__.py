"""Embeddings to judged linear probes: the batched solver, metrics, run folders, and tables."""
