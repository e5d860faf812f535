"""Do the commands on the page mean what the run did?"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import typer
from report_pages import (
    draw_own_patches,
    record,
    run_on,
)

from probe.report.provenance import commands
from probe.runs import read_run


def options_of(line: str) -> dict[str, Any]:
    """What a command line means to the command."""
    from extract.cli import app as extract_app
    from finetune.cli import finetune_app
    from probe.cli import app as probe_app

    name, *arguments = shlex.split(line)
    command = typer.main.get_command(
        {"fm-extract": extract_app, "fm-probe": probe_app, "fm-finetune": finetune_app}[name]
    )
    return command.make_context(name, arguments).params


def test_the_commands_shown_mean_the_options_that_the_run_had():
    options = {
        "cv": 3,
        "train": "ami-br",
        "test": ["atnorm-br"],
        "view": None,
        "pooling": "cls+mean",
        "recipe": "exact",
        "seed": 7,
        "fractions": [0.5, 1.0],
    }
    probe = replace(record("timm/a model"), train="ami-br", test=("atnorm-br",), view="center64", options=options)
    extract, again = map(options_of, commands(probe))
    assert extract["model"] == again["model"] == "timm/a model"
    assert (extract["dataset"], extract["view"]) == ("ami-br,atnorm-br", "center64")
    assert (again["cv"], again["train"], again["test"], again["view"]) == (3, "ami-br", "atnorm-br", None)
    assert (again["pooling"], again["seed"], again["fractions"]) == ("cls+mean", 7, "0.5,1.0")
    alone = options_of(commands(replace(probe, test=(), options={**probe.options, "test": []}))[1])
    assert alone["test"] == ""  # without it, every dataset of the store would be scored

    for method in ("lora", "full", "head"):
        options = {
            "model": "uni",
            "train": "/data/my patches.csv",
            "test": None,
            "method": method,
            "recipe": "default",
            "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": None},
            "view": "center64@128",
            "epochs": None,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "cv": 3,
            "seed": 1,
            "precision": "fp32",
            "positive": "Atypical",
        }
        tuned = replace(record(method=method), kind="finetune", train="patches", options=options)
        (line,) = commands(tuned)
        again = options_of(line)
        for name, value in options.items():
            if name not in ("lora",):
                assert again[name] == value, name
        if method == "lora":
            assert [again[f"lora_{name}"] for name in ("rank", "alpha", "dropout", "targets")] == [4, 8.0, 0.1, None]


def test_patches_of_one_s_own_are_extracted_from_where_they_lie(tmp_path):
    own_patches = draw_own_patches(tmp_path)
    folder = run_on(own_patches, tmp_path)
    extract, _ = commands(read_run(folder))
    assert options_of(extract)["dataset"] == str(own_patches.resolve())


def test_the_order_of_classes_of_one_s_own_is_said_where_they_are_read(tmp_path):
    own = {"train": "cells", "label_names": ("low", "middle", "high"), "ordinal": True}
    at = {"sources": {"cells": str(tmp_path / "cells.csv")}}
    extract, _ = map(options_of, commands(replace(record(), **own, **at)))
    assert (extract["classes"], extract["ordinal"]) == ("low,middle,high", True)
    extract, _ = map(options_of, commands(replace(record(), **own, sources={"cells": "Zenodo"})))
    assert (extract["classes"], extract["ordinal"]) == (None, False)
    extract, _ = map(
        options_of, commands(replace(record(), **own | {"label_names": ("a", "b"), "ordinal": False}, **at))
    )
    assert extract["classes"] is None
    options = {"train": "cells", "classes": ["low", "middle", "high"], "ordinal": True, "skip_unlabelled": False}
    (line,) = commands(replace(record(method="head"), kind="finetune", **own, options=options))
    again = options_of(line)
    assert (again["classes"], again["ordinal"], again["skip_unlabelled"]) == ("low,middle,high", True, False)
