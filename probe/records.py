"""What does a run say of itself: what was asked, what was chosen and how, and what came out?

These are the keys of run.json, and the one place that knows them. `probe.runs` writes and reads the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from features.display import html_table
from features.folds import SEED, FoldModel, fold_models
from probe.metrics import COMPARED, RunMetrics

RUN_FORMAT, SEEDS_FORMAT, CLASSES_FORMAT = 1, 2, 3  # of one seed, of several, and of more than two classes
Combined = Literal["mean", "concatenation"]  # of the probabilities of probes; of embeddings, under one probe
COMBINED: tuple[Combined, ...] = get_args(Combined)


@dataclass(frozen=True, kw_only=True)
class FoldsRecord:
    """The fold assignment of a run: how many folds, where they come from, their digest, and the seed asked for.

    `names` are those of the domains, where each fold is one.
    """

    n: int
    source: str = ""
    digest: str
    seed: int | None = None
    names: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run cost. None where it was not measured: a probe trains on no images, a CPU has no device memory.

    Attributes:
        device: "cpu", "cuda", ...; `device_name` is the GPU's own name.
        training_seconds, training_images, images_per_second: of fine-tuning, over all epochs and folds.
        folds_at_once: folds per forward pass.
        processes: that trained together.
        fast_paths: which ways to train faster than plain PyTorch were in use.
        unrepeatable: operations that the GPU could not repeat bit by bit.
        seconds: from reading the data to writing the run.
        peak_memory_mb, peak_device_memory_mb: MiB of main memory and of the GPU's.
    """

    device: str | None = None
    training_seconds: float | None = None
    training_images: int | None = None
    images_per_second: float | None = None
    folds_at_once: int | None = None
    processes: int | None = None
    fast_paths: tuple[str, ...] | None = None
    unrepeatable: tuple[str, ...] | None = None
    device_name: str | None = None
    peak_device_memory_mb: int | None = None
    seconds: float | None = None
    peak_memory_mb: int | None = None


@dataclass(frozen=True, kw_only=True)
class FitRecord:
    """How the probes of one candidate were fitted; None where the recipe has no such thing.

    Attributes:
        strengths: (S,) values of C to choose from; `chosen_strength` is the choice of each fold.
        at_edge: whether a fold chose the first or the last of them.
        inner_loss: (F, S) balanced log loss within each fold's training rows, on which the choice was made.
            Of a strength that was given up, the loss at that point.
        n_fits, n_given_up: how many fits there are, and how many were left unfinished, because their strength could no
            longer turn out best (`probe.stream` alone does that).
        max_gradient, n_not_converged: of the other fits.
        n_dropped: features without a weight, because they vary by no more than rounding in training: the most of a fit.
        recipe, best_epoch, n_epochs: of the paper's recipe; epochs per fold model.
    """

    strengths: tuple[float, ...] | None = None
    chosen_strength: tuple[float, ...] | None = None
    at_edge: bool | None = None
    inner_loss: tuple[tuple[float, ...], ...] | None = None
    max_gradient: float | None = None
    n_not_converged: int | None = None
    n_fits: int | None = None
    n_given_up: int | None = None
    n_dropped: int | None = None
    recipe: Mapping[str, Any] | None = None
    best_epoch: tuple[int, ...] | None = None
    n_epochs: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate(FitRecord):
    """A view and pooling that a probe could choose: mean validation figures over folds, and how it was fitted.

    Of a combination, `combined` says how its parts are joined, and `model`, `view` and `pooling` name them (`joined`).
    """

    view: str
    pooling: str
    validation_auroc: float
    validation_balanced_accuracy: float
    model: str | None = None
    combined: Combined | None = None


@dataclass(frozen=True, kw_only=True)
class CurveFits:
    """How the fits of a learning curve converged, those of the run itself aside."""

    draws: int
    n_fits: int
    n_not_converged: int
    max_gradient: float


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of one fold: mean training loss, validation figures, and the learning rate in the middle of it."""

    loss: float
    balanced_accuracy: float
    auroc: float
    learning_rate: float


class _Embedded:
    """What decides an embedding's numbers, in words."""

    embedding: Mapping[str, Any]

    @property
    def weights_sha256(self) -> str | None:
        """Digest of the backbone's weights; None for embeddings that were made elsewhere and imported."""
        digest = self.embedding.get("weights_sha256")
        return None if digest is None else str(digest)

    @property
    def precision(self) -> str:
        """The precision that the backbone computed in; empty for imported embeddings."""
        return str(self.embedding.get("precision", ""))

    @property
    def device(self) -> str:
        """The kind of device that the backbone ran on; empty for imported embeddings."""
        return str(self.embedding.get("device", ""))

    @property
    def revision(self) -> str:
        """The commit or package version of the backbone's weights; empty where it is not known."""
        return str(self.embedding.get("revision") or "")


@dataclass(frozen=True, kw_only=True)
class Part(_Embedded):
    """One of the embeddings of a run, described as in `RunRecord`; in a report's ensemble of runs, one of these.

    `weight` is its share in the mean; None for equal shares.
    """

    model: str
    view: str
    pooling: str
    card_pooling: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    embedding: Mapping[str, Any] = field(default_factory=dict)
    weight: float | None = None

    def __str__(self) -> str:
        weight = "" if self.weight is None else f"{self.weight:.3f} x "
        return f"{weight}{self.model} ({self.view}, {self.pooling})"


def joined(names: Sequence[str]) -> str:
    """Name the parts of a combination: once where all have the same name, else one after the other.

    >>> joined(["full", "full"]), joined(["full", "center64"])
    ('full', 'full + center64')
    """
    return names[0] if len(set(names)) == 1 else " + ".join(names)


@dataclass(frozen=True, kw_only=True)
class RunRecord(_Embedded):
    """A run: everything that run.json and metrics.json say.

    Attributes:
        id, created: name and UTC time; empty until the run is written.
        kind: "probe" or "finetune"; in a report also "ensemble", of several runs.
        model, method: the backbone, and "probe", "lora", "full" or "head"; of a combination see `joined`, and how.
        options: what the user chose, verbatim.
        train, test: the dataset trained on, and the others scored.
        view, pooling: of the embedding that was judged.
        combined, parts: how several embeddings were joined, and which, the best first; None for one.
        card_pooling: what the pooling "card" means for this backbone.
        label_names: of class 0, class 1, ...
        ordinal: whether the classes are ordered.
        sources: dataset to where its patches came from.
        slides: dataset to the folder of its slides, and how patches were cut from them; None where there are none.
        fingerprints: dataset to the fingerprint of its embeddings.
        embedding: everything that decides the embeddings' numbers, whose digest the fingerprint is.
        folds: the assignment that all fold models share.
        seeds: of the trainings, each of which has a model per fold; early versions trained once, by `options["seed"]`.
        table_digests: dataset to the digest of its patch table.
        similar: dataset to the ids of test patches that look like training patches, to the backbone or pixel by pixel.
        store, candidates, learning_curve: of a probe; a store that is a folder by its whole path.
        test_classes: of a probe, test set to the names of its classes, where they are others than `label_names`.
        compute: of a fine-tuned run, the options of its computation that were no defaults; early runs do not know them.
        recipe, adapted_modules, n_trained, best_epoch, history: of a fine-tuned run; `n_trained` parameters per fold
            model, `best_epoch` and `history` per fold model.
        cost: seconds, images per second, memory.
        versions: of the packages that decide a number.
        sha256: file to digest.
        metrics: the figures; None until the run is written.
        folder: where the run was read from or written to.
    """

    id: str = ""
    created: str = ""
    kind: Literal["probe", "finetune", "ensemble"]
    model: str
    method: str
    options: Mapping[str, Any]
    compute: Mapping[str, Any] | None = None
    store: str | None = None
    recipe: Mapping[str, Any] | None = None
    train: str
    test: tuple[str, ...] = ()
    view: str
    pooling: str
    combined: Combined | None = None
    parts: tuple[Part, ...] | None = None
    card_pooling: str = ""
    label_names: Annotated[tuple[str, ...], msgspec.Meta(min_length=2)] = ("0", "1")
    ordinal: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)
    slides: Mapping[str, Mapping[str, Any]] | None = None
    adapted_modules: tuple[str, ...] | None = None
    n_trained: int | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    embedding: Mapping[str, Any] = field(default_factory=dict)
    folds: FoldsRecord
    seeds: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)] = (SEED,)
    table_digests: Mapping[str, str] = field(default_factory=dict)
    similar: Mapping[str, tuple[str, ...]] | None = None
    test_classes: Mapping[str, tuple[str, ...]] | None = None
    candidates: tuple[Candidate, ...] | None = None
    learning_curve: CurveFits | None = None
    best_epoch: tuple[int, ...] | None = None
    history: tuple[tuple[EpochRecord, ...], ...] | None = None
    cost: Cost = field(default_factory=Cost)
    versions: Mapping[str, str] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    metrics: RunMetrics | None = field(default=None, repr=False)
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"RunRecord({self.id or 'not written yet'}: {self.model} {self.method}, {self.view}, {self.pooling})"

    def _repr_html_(self) -> str:
        if self.metrics is None:
            return f"<p>{escape(repr(self))}</p>"
        rows = [
            (
                name,
                f"{sum(one.counts):,}",
                *(f"{one.folds[figure].mean:.3f} ± {one.folds[figure].std:.3f}" for figure in COMPARED),
            )
            for name, one in self.metrics.sets.items()
        ]
        caption = f"{self!r}; mean ± std over {len(self.fold_models)} fold models"
        return html_table(("set", "patches", "balanced accuracy", "AUROC"), rows, caption=caption)

    @property
    def n_classes(self) -> int:
        """How many classes the run tells apart."""
        return len(self.label_names)

    @property
    def fold_models(self) -> tuple[FoldModel, ...]:
        """The models of the run, in the order of all lists over them."""
        return fold_models(self.seeds, self.folds.n)

    @property
    def figures(self) -> RunMetrics:
        """The metrics of a run that has been written.

        Raises:
            ValueError: if it has not.
        """
        if self.metrics is None:
            raise ValueError(f"{self!r} has no metrics yet")
        return self.metrics

    @property
    def is_random(self) -> bool:
        """Whether another training, with another seed, would give another run; exactly solved probes are all equal."""
        return self.kind == "finetune" or self.options.get("recipe", "exact") != "exact"

    @property
    def chosen_out_of_fold(self) -> str:
        """Say what the run chose on its out-of-fold predictions, which are optimistic by that; empty if nothing."""
        chosen = []
        if len(self.candidates or ()) > 1:
            chosen.append("its parts" if self.combined else "its view and pooling")
        if self.is_random and (self.history is None or any(len(epochs) > 1 for epochs in self.history)):
            chosen.append("its epoch")
        return " and ".join(chosen)

    @property
    def each_part(self) -> tuple[Part, ...]:
        """The embeddings that the run judges: its own, or those that it combines."""
        own = Part(
            model=self.model,
            view=self.view,
            pooling=self.pooling,
            card_pooling=self.card_pooling,
            fingerprints=self.fingerprints,
            embedding=self.embedding,
        )
        return self.parts or (own,)

    @property
    def groups(self) -> list[list[int]]:
        """The numbers of the parts that each probe of the run sees side by side; the probes' mean is the run's."""
        every = list(range(len(self.each_part)))
        return [[k] for k in every] if self.combined == "mean" else [every]

    @property
    def statistics(self) -> str:
        """Which mean and standard deviation normalised the images: "card" or "imagenet"."""
        return str((self.recipe or {}).get("statistics", "card"))

    def as_json(self) -> dict[str, Any]:
        """Make the object of run.json, with that of metrics.json under `metrics` once there is one."""
        described = replace(self, metrics=None, folder=None)
        record: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(described))
        nested = (record["cost"], record["folds"], *(record["candidates"] or ()), *(record["parts"] or ()))
        for part in (record, *nested):  # of options and the like, None is a value
            for name in [name for name, value in part.items() if value is None]:
                del part[name]
        if not self.ordinal:
            del record["ordinal"]
        format = RUN_FORMAT if len(self.seeds) == 1 else SEEDS_FORMAT
        if self.n_classes > 2:
            format = CLASSES_FORMAT
        return {"format": format} | record | ({} if self.metrics is None else {"metrics": self.metrics.as_dict()})

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> RunRecord:
        """Make a record of the object of run.json. Runs of early versions lack some keys.

        Raises:
            ValueError: if the object describes no run.
        """
        options = raw.get("options")
        early = {"seeds": [options.get("seed", SEED) if isinstance(options, dict) else SEED]}
        return msgspec.convert(early | {name: value for name, value in raw.items() if name != "metrics"}, cls)
