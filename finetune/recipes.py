"""What does a recipe fix? Everything about training except the data, the backbone and the method.

`paper` is the text of Banerjee et al. 2025, section 4. `authors` is what the authors' scripts do, which differs from
the text, and from model to model. `default` is ours, chosen by cross-validation on AMi-Br's training split alone.
docs/protocol.md has the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from features.console import UserError
from features.options import MOST_EPOCHS
from finetune.augment import AugmentOptions
from probe.schedule import PAPER, best_epoch, plateau_rate


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a fold is trained.

    Attributes:
        view: input policy, where the user names none; None for the backbone's own (`finetune_view`).
        epochs: at most; an epoch draws as many patches as the fold trains on.
        batch_size: patches per fold and step.
        learning_rate: at the start (plateau) or at its peak (cosine).
        weight_decay: of Adam (added to the gradient) or AdamW.
        optimizer: "adam" or "adamw".
        schedule: "plateau" multiplies the rate by `plateau_factor` after more than `plateau_patience` epochs without a
            better validation balanced accuracy; "cosine" lets it fall to zero over all epochs.
        warmup: epochs, or a fraction of one, over which the cosine schedule rises to its peak.
        plateau_factor, plateau_patience, plateau_threshold, min_learning_rate: of the plateau schedule, see
            `probe.schedule.plateau_rate`.
        patience: epochs without a better validation balanced accuracy after which a fold stops.
        statistics: "card", as views say how images are normalised; "imagenet" in runs from before they did.
        augment: how patches change from epoch to epoch; None for not at all.
        keep: "best" keeps a fold's epoch with the highest validation balanced accuracy, "last" that at which it
            stopped.
        tta: test-time augmentation: whether logits are means over the eight flips and quarter turns of a patch, out of
            fold, on tests and in predictions. Epochs are compared by patches as they are.
    """

    view: str | None
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    optimizer: Literal["adam", "adamw"]
    schedule: Literal["plateau", "cosine"]
    warmup: float = 0.0
    plateau_factor: float = PAPER.plateau_factor
    plateau_patience: int = PAPER.plateau_patience
    plateau_threshold: float = PAPER.plateau_threshold
    min_learning_rate: float = PAPER.min_learning_rate
    patience: int = PAPER.patience
    statistics: Literal["card", "imagenet"] = "card"
    augment: AugmentOptions | None = field(default_factory=AugmentOptions)
    keep: Literal["best", "last"] = "best"
    tta: bool = False

    def kept_epoch(self, scores: Sequence[float]) -> int:
        """Return the epoch, counted from 0, that a fold keeps after epochs with these validation scores."""
        return len(scores) - 1 if self.keep == "last" else best_epoch(scores)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Recipe:
        """Read the recipe of a run or of an interrupted training from its JSON values."""
        before: dict[str, Any] = {"plateau_threshold": 0.0}  # in records that do not say
        augment = record["augment"]
        if augment is not None:
            pairs = {name: tuple(augment[name]) for name in ("scale", "ratio")}
            augment = AugmentOptions(**{**augment, **pairs})
        return cls(**{**before, **record, "augment": augment})


RECIPES = {
    # The text names four augmentations for all models, without their strengths. The authors' end-to-end scripts make
    # these four, with one set of strengths for three networks, which is taken here.
    "paper": Recipe(
        view="full@224+imagenet",
        epochs=PAPER.max_epochs,
        batch_size=PAPER.batch_size,
        learning_rate=PAPER.learning_rate,
        weight_decay=PAPER.weight_decay,
        optimizer="adam",
        schedule="plateau",
        augment=AugmentOptions(flip_vertical=0.0, rotation=10.0, hue=0.1),
    ),
    "default": Recipe(
        view=None,
        epochs=8,
        batch_size=16,
        learning_rate=1e-3,
        weight_decay=0.01,
        optimizer="adamw",
        schedule="cosine",
        warmup=0.5,
        patience=MOST_EPOCHS,  # a cosine is trained to its end
        augment=AugmentOptions(rotation=180.0),
        keep="last",
        tta=True,
    ),
}

# The authors' scripts (AMi-Br_Benchmark, commit 3acf4dad), by method and model.
_END_TO_END = replace(RECIPES["paper"], learning_rate=5e-5)
_LORA = replace(
    _END_TO_END,
    patience=10,
    augment=AugmentOptions(flip_vertical=0.0, rotation=15.0, scale=(0.08, 1.0), saturation=0.0, hue=0.0),
)
_LORA_VIRCHOW = replace(
    _LORA, view="full@224+half", augment=AugmentOptions(flip_vertical=0.0, rotation=0.0, scale=(0.8, 1.0), hue=0.1)
)
_LORA_UNCROPPED = AugmentOptions(flip_vertical=0.0, rotation=15.0, scale=(1.0, 1.0), saturation=0.0, hue=0.0)
AUTHORS: Mapping[tuple[str, str], Recipe] = {
    ("full", "efficientnetv2-m"): _END_TO_END,
    ("full", "vit-l"): _END_TO_END,
    ("full", "swin-b"): _END_TO_END,
    ("lora", "uni"): _LORA,
    ("lora", "uni2-h"): replace(_LORA, view="full", augment=None),
    ("lora", "virchow"): _LORA_VIRCHOW,
    ("lora", "virchow2"): _LORA_VIRCHOW,
    ("lora", "prov-gigapath"): _LORA,
    ("lora", "h-optimus-0"): replace(_LORA, view="full@224"),
    ("lora", "h-optimus-1"): replace(_LORA, view="full@224", augment=_LORA_UNCROPPED),
}
RECIPE_NAMES = ("default", "paper", "authors")

# Learning rates of our own recipe, by method and whether the backbone is convolutional. 1e-3 for adapters of
# convolutions was chosen by cross-validation on the bundled network (3e-3 diverges). Transformers stay at the paper's
# 1e-4: no higher rate has been tried on one here.
RATES = {
    ("lora", True): 1e-3,
    ("lora", False): 1e-4,
    ("head", True): 1e-3,
    ("head", False): 1e-3,
    ("full", True): 1e-4,
    ("full", False): 3e-5,
}


def recipe_for(name: str, *, method: str, convolutional: bool, model: str = "") -> Recipe:
    """Find the recipe of a name for a method and a model: ours gets its learning rate from `RATES`.

    >>> recipe_for("default", method="full", convolutional=True).learning_rate
    0.0001

    Raises:
        UserError: the recipe "authors" for a method and model of which they published no script.
    """
    if name == "default":
        return replace(RECIPES[name], learning_rate=RATES[method, convolutional])
    if name == "paper":
        return RECIPES[name]
    if (method, model) not in AUTHORS:
        known = {way: [of for by, of in AUTHORS if by == way] for way, _ in AUTHORS}
        raise UserError(
            f"`recipe='authors'`: the authors published no script for {model} by `method='{method}'`; there are "
            f"{'; '.join(f'{way}: ' + ', '.join(models) for way, models in known.items())}. "
            "Use `recipe='paper'`, which is the same for every model."
        )
    return AUTHORS[method, model]


def learning_rate(scores: Sequence[float], recipe: Recipe, *, batch: int, n_batches: int) -> float:
    """Compute the learning rate of one batch of a fold's next epoch.

    >>> learning_rate([0.7, 0.6, 0.6, 0.6, 0.6], RECIPES["paper"], batch=0, n_batches=100)
    5e-05

    Args:
        scores: the fold's validation balanced accuracy after each epoch so far.
        recipe: with the schedule.
        batch, n_batches: which batch of the epoch, from 0, of how many.
    """
    if recipe.schedule == "plateau":
        return plateau_rate(
            scores,
            start=recipe.learning_rate,
            factor=recipe.plateau_factor,
            patience=recipe.plateau_patience,
            minimum=recipe.min_learning_rate,
            threshold=recipe.plateau_threshold,
        )
    at = len(scores) + (batch + 0.5) / n_batches  # in epochs
    if at < recipe.warmup:
        return recipe.learning_rate * at / recipe.warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (at - recipe.warmup) / (recipe.epochs - recipe.warmup)))
