"""Where does a run come from?"""

from __future__ import annotations

from dataclasses import asdict

from probe.records import RunRecord


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Gather what is known of a run's origin, a name and a value each: ids, digests, versions, cost.

    Of an ensemble of runs these are its members with their weights: versions and cost are theirs.
    """
    if record.kind == "ensemble":
        members = record.each_part
        return [
            ("written", record.created),
            *(
                (
                    f"member {number}",
                    f"{one.view}, weight {1 / len(members) if one.weight is None else one.weight:.3f}: {one.model}",
                )
                for number, one in enumerate(members, start=1)
            ),
            ("folds", f"{record.folds.n}: {record.folds.source}{_named(record)}, digest {record.folds.digest}"),
        ]
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


def _named(record: RunRecord) -> str:
    return f" ({', '.join(record.folds.names)})" if record.folds.names else ""
