"""Patches to embeddings: datasets, backbones, and the overlapped extraction loop."""
