"""Experiments, judged: probes of stored embeddings, runs, intervals, tests, and the report.

    >>> from probe import compare, ensemble_of, probe_store  # doctest: +SKIP
    >>> (run,) = probe_store(store, ["uni"], runs=Path("runs"))  # doctest: +SKIP

Names are imported when they are first used; the type stub beside this file lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
