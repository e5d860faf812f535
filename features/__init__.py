"""What a row is, and where its numbers live: patch tables, folds, and the Zarr feature store.

    >>> from features import FeatureStore, grouped_folds  # doctest: +SKIP
    >>> store = FeatureStore.open("embeddings.zarr")  # doctest: +SKIP
    >>> samples = store.samples("ami-br")  # doctest: +SKIP

Names are imported when they are first used; the type stub beside this file lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
