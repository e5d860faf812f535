"""Patches to embeddings: datasets, backbones, views, and the loop that embeds.

    >>> from extract import extract_dataset, find_backbone, load_dataset  # doctest: +SKIP
    >>> patches = load_dataset("patches.csv")  # doctest: +SKIP
    >>> extract_dataset(patches, [find_backbone("uni")], store=store)  # doctest: +SKIP

Names are imported when they are first used; the type stub beside this file lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
