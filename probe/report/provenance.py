"""Where does a run come from, and which commands would make it again?"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from probe.runs import RunRecord


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Gather what is known of a run's origin, a name and a value each: ids, digests, versions, cost."""
    weights = []
    if record.weights_sha256 is not None:
        weights = [("weights", f"{record.revision or 'local'}, SHA-256 {record.weights_sha256}")]
    costs = {name: value for name, value in asdict(record.cost).items() if value is not None}
    return [
        ("run", record.id),
        ("written", record.created),
        ("view, pooling", f"{record.view}, {record.pooling}"),
        *weights,
        ("folds", f"{record.folds.n}: {record.folds.source}{_named(record)}, digest {record.folds.digest}"),
        *((f"embedding of {name}", str(digest)) for name, digest in record.fingerprints.items()),
        *((f"table of {name}", str(digest)) for name, digest in record.table_digests.items()),
        *((name, str(digest)) for name, digest in record.sha256.items() if "/" not in name),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("cost", ", ".join(f"{name} {value}" for name, value in costs.items())),
    ]


def commands(record: RunRecord) -> list[str]:
    """List the command lines that would make a run again; the user's datasets are named by their path."""
    options = dict(record.options)
    options.setdefault("fold_seed", record.folds.seed)  # early versions drew the folds by `seed`
    names = dict.fromkeys([record.train, *record.test])
    paths = {name: record.sources.get(name, "") for name in names}
    sets = ",".join(paths[name] if PurePath(paths[name]).is_absolute() else name for name in names)
    if record.kind == "probe":
        steps = [
            ["fm-extract", "--model", record.model, "--dataset", sets, "--view", record.view, *_classes(record)],
            ["fm-probe", "--model", record.model, *_flags(options)],
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
