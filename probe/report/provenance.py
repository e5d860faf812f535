"""Where does a run come from, and which commands would make it again?"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from probe.records import RunRecord


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Gather what is known of a run's origin, a name and a value each: ids, digests, versions, cost."""
    parts = record.each_part
    weights = [
        ("weights", f"{of}{part.revision or 'local'}, SHA-256 {part.weights_sha256}")
        for part in parts
        if part.weights_sha256 is not None
        for of in [f"{part.model}: " if record.parts else ""]
    ]
    costs = {name: value for name, value in asdict(record.cost).items() if value is not None}
    return [
        ("run", record.id),
        ("written", record.created),
        ("view, pooling", f"{record.view}, {record.pooling}"),
        *((f"{record.combined} of", str(part)) for part in record.parts or ()),
        *dict.fromkeys(weights),
        ("folds", f"{record.folds.n}: {record.folds.source}{_named(record)}, digest {record.folds.digest}"),
        *((f"embedding of {name}", digest) for part in parts for name, digest in part.fingerprints.items()),
        *((f"table of {name}", str(digest)) for name, digest in record.table_digests.items()),
        *((name, str(digest)) for name, digest in record.sha256.items() if "/" not in name),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("cost", ", ".join(f"{name} {value}" for name, value in costs.items())),
    ]


def commands(record: RunRecord) -> list[str]:
    """List the command lines that would make a run again; the user's datasets are named by their path."""
    options = dict(record.options)
    if record.kind != "ensemble":
        options.setdefault("fold_seed", record.folds.seed)  # early versions drew the folds by `seed`
    names = dict.fromkeys([record.train, *record.test])
    paths = {name: record.sources.get(name, "") for name in names}
    sets = ",".join(paths[name] if PurePath(paths[name]).is_absolute() else name for name in names)
    if record.kind == "ensemble":
        steps = [["fm-report", "--ensemble", ",".join(part.model for part in record.parts or ()), *_flags(options)]]
    elif record.kind == "probe":
        views: dict[str, dict[str, None]] = {}
        for part in record.each_part:
            views.setdefault(part.model, {})[part.view] = None
        tried = dict.fromkeys(candidate.model for candidate in record.candidates or () if candidate.model)
        # A model of the user's own is known by its file; `extract.custom` records it as the revision.
        files = {part.model: part.revision for part in record.each_part if ".py:" in part.revision}
        models = [model for model in tried if " + " not in model] or list(views)
        steps = [
            *(
                [
                    "fm-extract",
                    "--model",
                    files.get(model, model),
                    "--dataset",
                    sets,
                    "--view",
                    ",".join(of_model),
                    *_classes(record),
                ]
                for model, of_model in views.items()
            ),
            ["fm-probe", "--model", ",".join(models), *_flags(options)],
        ]
    else:
        lora = options.pop("lora", None) or {}
        nested = lora if record.method == "lora" else {}
        steps = [["fm-finetune", *_flags({f"lora_{name}": value for name, value in nested.items()}), *_flags(options)]]
    return [shlex.join(map(str, step)) for step in steps]


def _named(record: RunRecord) -> str:
    return f" ({', '.join(record.folds.names)})" if record.folds.names else ""


def _classes(record: RunRecord) -> list[str]:
    """Give the order of more than two classes of one's own; that of others follows from their names."""
    if record.n_classes == 2 or not PurePath(record.sources.get(record.train, "")).is_absolute():
        return []
    return ["--classes", ",".join(record.label_names), *(["--ordinal"] if record.ordinal else [])]


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        if value is None or (value in ([], ()) and name != "test"):  # an empty --test asks for no other dataset
            continue
        if isinstance(value, bool):
            flags += [f"--{name.replace('_', '-')}"] if value else []
            continue
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        flags += [f"--{name.replace('_', '-')}", text]
    return flags
