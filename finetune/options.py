"""What may the user choose about a fine-tuning, and what does a choice left open mean for a backbone?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from extract.backbones import Backbone
from extract.slides import Slides
from extract.views import View, parse_view
from features.console import UserError
from features.device import has_bf16
from features.folds import SEED, FoldModel, fold_models, require_seeds
from finetune.lora import LoraOptions
from finetune.network import METHODS, Method
from finetune.recipes import RECIPE_NAMES, Recipe, recipe_for
from probe.experiment import require_known

_MOST_FOLDS = 100
_MOST_MODELS = 500
# Options that early versions do not know.
_LATER = ("classes", "ordinal", "soft_labels", "folds_by", "tta", "size", "size_um", "mpp")
_FOLDERS = ("data", "weights", "slides")  # options of the computation that are paths


@dataclass(frozen=True)
class FinetuneOptions:
    """What the user may choose about the result. None takes the recipe's value.

    Attributes:
        model, train: a model and a dataset, by name or path.
        test: datasets to score besides the training set's own test split; None for the other published ones.
        method: "lora", "full" or "head"; see `finetune.network`.
        recipe: "default", "paper" or "authors".
        lora: rank, alpha, dropout and targets.
        view, epochs, batch_size, learning_rate, tta: instead of the recipe's.
        cv: number of folds.
        seed: of initial values, sampling, augmentation and dropout.
        seeds: how many trainings share the folds and the backbone, with `seed`, `seed + 1`, ...
        fold_seed: of the folds.
        precision: "auto", "fp32" or "bf16".
        positive, labels, skip_unlabelled: for datasets of your own, see `extract.datasets.load_dataset`; `labels` as
            "old=new,old=new".
        classes: names of the training set's classes, in the order of their labels; None for the order that the names
            suggest, see `features.labels.class_labels`.
        ordinal: whether that order means something, as that of grades does.
        soft_labels: "votes" to train towards each class's share of the votes for a patch; None for its label.
        folds_by: "domain" to hold each domain out in turn instead of `cv` folds; a run's options then say so many.
        size, size_um, mpp: of points on slides, see `extract.slides.Slides`.

    Raises:
        UserError: a value outside its range.
    """

    model: str = "efficientnet-lite0"
    train: str = "demo"
    test: tuple[str, ...] | None = None
    method: Method = "lora"
    recipe: str = "default"
    lora: LoraOptions = field(default_factory=LoraOptions)
    view: str | None = None
    cv: int = 5
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int = SEED
    seeds: int = 1
    fold_seed: int = SEED
    precision: str = "auto"
    positive: str | None = None
    labels: str | None = None
    skip_unlabelled: bool = False
    classes: tuple[str, ...] | None = None
    ordinal: bool = False
    soft_labels: str | None = None
    folds_by: str | None = None
    tta: bool | None = None
    size: int | None = None
    size_um: float | None = None
    mpp: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}: use {', '.join(METHODS)}.")
        if self.recipe not in RECIPE_NAMES:
            raise UserError(f"unknown recipe {self.recipe!r}: use {', '.join(RECIPE_NAMES)}.")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"precision {self.precision!r}: training computes in fp32 or bf16 (or auto).")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise UserError(f"learning rate {self.learning_rate}: expected a number above 0, such as 1e-4.")
        require_known(soft_labels=self.soft_labels, folds_by=self.folds_by)
        require_seeds(self.seed, self.seeds)
        require_seeds(self.fold_seed, 1)
        if self.cv < 2:
            raise UserError(f"cross-validation needs at least 2 folds, got {self.cv}.")
        if self.cv > _MOST_FOLDS:
            raise UserError(
                f"{self.cv} folds: at most {_MOST_FOLDS} are fine-tuned; every fold has weights of its own."
            )
        if self.cv * self.seeds > _MOST_MODELS:
            raise UserError(
                f"{self.cv} folds with {self.seeds} seeds: at most {_MOST_MODELS} models are fine-tuned in one run, as "
                "each has weights of its own. Use fewer `seeds`, and another run with a later `seed`."
            )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FinetuneOptions:
        """Read the options of a run or of an interrupted training from its JSON values.

        Early versions drew the folds by `seed`, and knew of two classes only.
        """
        names = {name: record.get(name) for name in ("test", "classes")}
        nested: dict[str, Any] = {name: None if value is None else tuple(value) for name, value in names.items()}
        nested["lora"] = LoraOptions(**record["lora"])
        return cls(**{"fold_seed": record["seed"], **record, **nested})

    def as_record(self) -> dict[str, Any]:
        """Give the options as JSON values.

        Those that early versions did not know are there only where they say something: without them, those versions
        read the record.
        """
        early = {one.name: one.default for one in fields(self) if one.name in _LATER}
        return {name: value for name, value in asdict(self).items() if name not in early or value != early[name]}

    def by_name(self) -> dict[str, Any]:
        """List all options by name, the adapters' as "lora.rank" and so on."""
        named = asdict(self)
        adapter = named.pop("lora")
        return named | {f"lora.{name}": value for name, value in adapter.items()}

    def slides_in(self, folder: Path | None) -> Slides | None:
        """Say how patches are cut from the slides of a folder; None without one.

        Raises:
            UserError: a size without a folder, or one outside its range.
        """
        return Slides.asked(folder, size=self.size, size_um=self.size_um, mpp=self.mpp)

    def resolved_recipe(self, backbone: Backbone) -> Recipe:
        """Find the recipe for this method and backbone, changed where the user chose something else."""
        convolutional = is_convolutional(backbone)
        recipe = recipe_for(self.recipe, method=self.method, convolutional=convolutional, model=backbone.name)
        chosen = {name: getattr(self, name) for name in ("epochs", "batch_size", "learning_rate", "tta")}
        return replace(recipe, **{name: value for name, value in chosen.items() if value is not None})

    def resolved_view(self, backbone: Backbone, recipe: Recipe | None = None) -> View:
        """Choose the view: the user's, else the recipe's (None for `resolved_recipe`), else the backbone's."""
        recipe = recipe or self.resolved_recipe(backbone)
        view = parse_view(self.view or recipe.view or backbone.finetune_view)
        if view.flips:
            raise UserError(
                f"view {view.name!r}: `+flips` is for frozen backbones. Training draws its own flips, and `tta=True` "
                "scores patches in eight orientations. Name the view without it."
            )
        return view

    @property
    def training_seeds(self) -> tuple[int, ...]:
        """The seeds of all trainings."""
        return tuple(range(self.seed, self.seed + self.seeds))

    def fold_models(self, n_folds: int) -> tuple[FoldModel, ...]:
        """List the models that are trained; their numbers are those of the members of `finetune.network`."""
        return fold_models(self.training_seeds, n_folds)

    def network_members(self, n_folds: int) -> list[tuple[int, ...]]:
        """List the members that each network holds: one network for all, or one per member for "full"."""
        members = range(self.seeds * n_folds)
        return [(member,) for member in members] if self.method == "full" else [tuple(members)]


@dataclass(frozen=True)
class ComputeOptions:
    """What the user may choose about the computation. It may change when a training is resumed.

    Attributes:
        data: folder of the known datasets.
        weights: a local checkpoint of the backbone instead of the hub's.
        device: "auto", "cpu", "cuda" or "cuda:N".
        folds_at_once: folds (of all seeds together) per forward pass; None for all on a GPU and one on a CPU.
        compile: compile the backbone's blocks with torch.compile; None for where it pays, if `fast`, on an NVIDIA GPU.
        fast: fold norms on a CPU, try what is faster on an NVIDIA GPU (`finetune.fast`); plain PyTorch without it.
        grad_checkpointing: compute activations twice instead of keeping them.
        merge: write each LoRA fold's merged network too.
        slides: folder of the slides of points.
    """

    data: Path | None = None
    weights: Path | None = None
    device: str = "auto"
    folds_at_once: int | None = None
    compile: bool | None = None
    fast: bool = True
    grad_checkpointing: bool = False
    merge: bool = False
    slides: Path | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ComputeOptions:
        """Read the options that `as_record` gave."""
        given = {name: record.get(name) for name in _FOLDERS}  # early versions do not know them all
        paths = {name: None if path is None else Path(path) for name, path in given.items()}
        return cls(**{**record, **paths})

    def as_record(self, *, defaults: bool = True) -> dict[str, Any]:
        """Give the options as JSON values; paths are absolute, so that a run can be resumed from any folder.

        Args:
            defaults: also those that were left as they are.
        """
        paths: dict[str, Path | None] = {name: getattr(self, name) for name in _FOLDERS}
        record = asdict(self) | {name: None if path is None else str(path.resolve()) for name, path in paths.items()}
        return {one.name: record[one.name] for one in fields(self) if defaults or record[one.name] != one.default}

    def resolved_folds_at_once(self, device: torch.device, n_members: int) -> int:
        """Choose the members per forward pass: at most `n_members`, and by default all on a GPU and one on a CPU.

        A CPU is faster with one: the activations of several would not fit into its caches.
        """
        return min(self.folds_at_once or (n_members if device.type == "cuda" else 1), n_members)


def training_precision(asked: str, backbone: Backbone, device: torch.device) -> str:
    """Choose the precision to train in, "fp32" or "bf16".

    "auto" is bf16 where the processor has it, on a CPU for transformers only: convolutions are no faster in it there.
    """
    if asked != "auto":
        return asked
    return "bf16" if has_bf16(device) and not (is_convolutional(backbone) and device.type == "cpu") else "fp32"


def is_convolutional(backbone: Backbone) -> bool:
    """Whether a backbone is a convolutional network."""
    return backbone.convolutional
