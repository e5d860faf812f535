"""Patches to adapted backbones: LoRA of all folds at once, end-to-end training, and predictions for new patches.

    >>> from pathlib import Path  # doctest: +SKIP
    >>> from finetune import FinetuneOptions, finetune, predict_paths  # doctest: +SKIP
    >>> run = finetune(FinetuneOptions(model="uni", train="ami-br"), runs=Path("runs"))  # doctest: +SKIP
    >>> predict_paths(run.folder, [Path("new-patches")], out=Path("predictions.csv"))  # doctest: +SKIP

Names are imported when they are first used; the type stub beside this file lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
