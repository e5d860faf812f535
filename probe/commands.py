"""Which commands make a run again, or make what a probe lacks?

They are to work wherever they are typed: datasets of one's own are named NAME=PATH, and a store by where it lies.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from features.labels import NUMBERS, Classes
from features.options import DEFAULT_STORE
from features.store import FeatureStore
from probe.records import Part, RunRecord

_OPEN = frozenset({"tta", "compile", "fast"})  # options of which False is a choice: --no-tta


@dataclass(frozen=True)
class Source:
    """A dataset as a command reads it: its name, where it comes from, what its labels mean, and its slides."""

    name: str
    path: str
    classes: Classes = NUMBERS
    ordinal: bool = False
    slides: Mapping[str, Any] | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is read from a path: known datasets and imported ones are not."""
        return PurePath(self.path).is_absolute()

    @property
    def argument(self) -> str:
        """What names it on a command line."""
        return f"{self.name}={self.path}" if self.is_own else self.name

    @property
    def flags(self) -> tuple[str, ...]:
        """The options that give its labels their meaning, which is fixed in known datasets, and name its slides."""
        slides = dict(self.slides or {})
        cut = ["--slides", slides.pop("folder"), *_flags(slides)] if slides else []
        if not self.is_own or self.classes == NUMBERS:
            return tuple(cut)
        if len(self.classes) == 2:
            return ("--positive", self.classes[1], *cut)
        return ("--classes", ",".join(self.classes), *(["--ordinal"] if self.ordinal else []), *cut)


def commands(record: RunRecord, *, members: Sequence[Path] = ()) -> list[str]:
    """List the command lines that would make a run again; where something is not known, a comment says what.

    Args:
        record: of the run.
        members: folders of the runs that an ensemble is of.
    """
    options = dict(record.options)
    if record.kind == "ensemble":
        return [shlex.join(["fm-report", *map(str, members), "--ensemble", "all", *_flags(options)])]
    options.setdefault("fold_seed", record.folds.seed)  # early versions drew the folds by `seed`
    sources = {name: _source(record, name) for name in dict.fromkeys([record.train, *record.test])}
    if record.kind == "probe":
        # What is in the store decides what is left open; so nothing is.
        options |= {"train": record.train, "test": list(record.test)}
        views = _views(record)
        store = [] if record.store is None else ["--store", record.store]
        probed = ["fm-probe", "--model", ",".join(views), *_flags(options), *store]
        return [*_extractions(record, views, list(sources.values()), store), shlex.join(probed)]
    if record.train in record.sources:  # early runs do not know where their patches came from
        options["train"] = sources[record.train].argument
    if options.get("test") is not None and record.test:
        options["test"] = [sources[name].argument for name in record.test]
    lora = options.pop("lora", None) or {}
    nested = {f"lora_{name}": value for name, value in lora.items()} if record.method == "lora" else {}
    computed = dict(record.compute or {})
    for cut in (record.slides or {}).values():
        computed.setdefault("slides", cut["folder"])
        options |= {name: value for name, value in cut.items() if name != "folder"}
    lines = [] if "weights" in computed else list(_weights_line([record.each_part[0]]))
    return [*lines, shlex.join(["fm-finetune", *_flags(nested), *_flags(options), *_flags(computed)])]


def missing_embeddings(store: FeatureStore, model: str | None, datasets: Iterable[str], view: str | None = None) -> str:
    """Say the command that embeds datasets by a model (None for the default) in a view, into this store."""
    known = store.datasets()
    sources = []
    for name in datasets:
        attrs = store.dataset_attrs(name) if name in known else {}
        classes = tuple(map(str, attrs.get("label_names", NUMBERS)))
        ordinal, slides = bool(attrs.get("ordinal")), attrs.get("slides")
        sources.append(Source(name, str(attrs.get("source", "")), classes, ordinal, slides))
    models = [] if model is None else ["--model", model]
    views = [] if view is None else ["--view", view]
    return " && ".join(map(shlex.join, _of_each_meaning(sources, models, [*views, *_where(store)])))


def missing_import(store: FeatureStore, model: str, dataset: str, view: str) -> str:
    """Say the command that imports embeddings of a dataset from a file, into this store."""
    what = ["--dataset", dataset, "--model", model, "--view", view]
    return shlex.join(["fm-store", "import", "FILE", *what, *_where(store)])


def _where(store: FeatureStore) -> list[str]:
    return [] if str(store.path) == DEFAULT_STORE else ["--store", str(store.path)]


def _of_each_meaning(sources: Sequence[Source], before: Sequence[str], after: Sequence[str]) -> list[list[str]]:
    """Extract datasets together as far as the same options give their labels a meaning."""
    together: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for source in sources:
        together[source.flags].append(source.argument)
    return [["fm-extract", *before, "--dataset", ",".join(sets), *after, *flags] for flags, sets in together.items()]


def _source(record: RunRecord, name: str) -> Source:
    classes = (record.test_classes or {}).get(name, record.label_names)
    return Source(name, record.sources.get(name, ""), classes, record.ordinal, (record.slides or {}).get(name))


def _views(record: RunRecord) -> dict[str, list[str]]:
    """List the views of every model that a probe chose from; of early runs, those of the run."""
    views: dict[str, dict[str, None]] = defaultdict(dict)
    alone = [(one.model or record.model, one.view) for one in record.candidates or () if one.combined is None]
    for model, view in alone or [(part.model, part.view) for part in record.each_part]:
        views[model][view] = None
    return {model: list(of_model) for model, of_model in views.items()}


def _extractions(
    record: RunRecord, views: Mapping[str, Sequence[str]], sources: Sequence[Source], store: Sequence[str]
) -> list[str]:
    """List the commands that embed a probe's datasets: models that share views and precision in one of them."""
    parts = {part.model: part for part in record.each_part}
    imported = [parts[model] for model in views if model in parts and "source_sha256" in parts[model].embedding]
    lines = [
        f"# {part.model}, view {part.view}: embeddings made elsewhere, in a file with SHA-256 "
        f"{part.embedding['source_sha256']}; see fm-store import"
        for part in imported
    ]
    lines += _weights_line(parts.values())
    together: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for model, of_model in views.items():
        if model not in {part.model for part in imported}:
            together["--view", ",".join(of_model), *_as_computed(parts.get(model))].append(model)
    for flags, models in together.items():
        # A model of the user's own is known by its file; `extract.custom` records it as the revision.
        files = {model: parts[model].revision for model in models if model in parts and ".py:" in parts[model].revision}
        named = ",".join(files.get(model, model) for model in models)
        steps = _of_each_meaning(sources, ["--model", named], [*flags, *store])
        lines += map(shlex.join, steps)
    return lines


def _as_computed(part: Part | None) -> list[str]:
    """Ask for the precision, the kind of device and the compiled or plain network that a part's embeddings had."""
    if part is None or not part.embedding:
        return []
    precision = ["--precision", part.precision] if part.precision else []
    device = ["--device", part.device] if part.device else []
    return [*precision, *device, *([] if part.embedding.get("numerics") else ["--no-fast"])]


def _weights_line(parts: Iterable[Part]) -> list[str]:
    return [
        f"# {part.model}: its weights were a file of your own with SHA-256 {part.weights_sha256}; add --weights FILE"
        for part in parts
        if part.revision == "local"
    ]


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is None or (value in ([], ()) and name != "test"):  # an empty --test asks for no other dataset
            continue
        if isinstance(value, bool):
            flags += [f"--{flag}"] if value else [f"--no-{flag}"] if name in _OPEN else []
            continue
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        flags += [f"--{flag}", text]
    return flags
