"""Do the commands on the page mean what the run did?"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import typer
from report_pages import draw_own_patches, patches_of_classes, record, run_on

from features.store import FeatureStore
from probe.commands import commands, missing_embeddings
from probe.records import Candidate, Part
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
            "tta": False,
        }
        computed = {"fast": False, "compile": True, "weights": "/w/uni.bin", "device": "cpu"}
        tuned = replace(record(method=method), kind="finetune", train="patches", options=options, compute=computed)
        (line,) = commands(tuned)
        again = options_of(line)
        for name, value in (options | computed).items():
            if name == "weights":
                assert str(again[name]) == value
            elif name != "lora":
                assert again[name] == value, name
        if method == "lora":
            assert [again[f"lora_{name}"] for name in ("rank", "alpha", "dropout", "targets")] == [4, 8.0, 0.1, None]


def test_patches_of_one_s_own_are_extracted_from_where_they_lie(tmp_path):
    own_patches = draw_own_patches(tmp_path)
    folder = run_on(own_patches, tmp_path)
    extract, again = map(options_of, commands(read_run(folder)))
    assert extract["dataset"] == f"own={own_patches.resolve()}"
    assert extract["positive"] == "Atypical"
    assert (again["train"], again["test"]) == ("own", "")


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
    assert (extract["classes"], extract["positive"]) == (None, "b")
    options = {"train": "cells", "classes": ["low", "middle", "high"], "ordinal": True, "skip_unlabelled": False}
    (line,) = commands(replace(record(method="head"), kind="finetune", **own, options=options))
    again = options_of(line)
    assert (again["classes"], again["ordinal"], again["skip_unlabelled"]) == ("low,middle,high", True, False)


def test_every_view_that_a_probe_chose_from_is_embedded_again_into_its_store():
    def candidate(view: str, model: str | None = None, **combined: Any) -> Candidate:
        figures = {"validation_auroc": 0.9, "validation_balanced_accuracy": 0.8}
        return Candidate(view=view, pooling="card", model=model, **figures, **combined)

    embedding = {"precision": "bf16", "device": "cuda", "revision": "abc", "weights_sha256": "12"}
    chosen = replace(
        record(view="center64"),
        train="ami-br",
        store="/far/e.zarr",
        candidates=(candidate("full"), candidate("center64"), candidate("center64")),
        embedding=embedding,
    )
    extract, again = map(options_of, commands(chosen))
    assert (extract["view"], extract["store"], again["store"]) == ("full,center64", "/far/e.zarr", "/far/e.zarr")
    assert (extract["precision"], extract["device"], extract["fast"]) == ("bf16", "cuda", False)
    compiled = replace(chosen, embedding=embedding | {"numerics": {"compiled": "openvino"}})
    assert options_of(commands(compiled)[0])["fast"]

    both = ("a", "b")
    combined = replace(
        chosen,
        model="a + b",
        combined="mean",
        parts=tuple(Part(model=model, view="full", pooling="card") for model in both),
        candidates=(*(candidate("full", model) for model in (*both, "c")), candidate("full", "a + b", combined="mean")),
        options=chosen.options | {"combine": True, "folds_by": "domain", "cv": 3},
    )
    extract, again = map(options_of, commands(combined))
    assert extract["model"] == again["model"] == "a,b,c"
    assert (again["combine"], again["folds_by"], again["cv"]) == (True, "domain", 3)

    mine = replace(chosen, embedding=embedding | {"revision": "local"})
    said, _, _ = commands(mine)
    assert said.startswith("# uni: its weights were a file of your own with SHA-256 12")
    elsewhere = replace(chosen, embedding={"source_sha256": "ab12"})
    said, again = commands(elsewhere)
    assert "ab12" in said
    assert "fm-store import" in said
    assert options_of(again)["model"] == "uni"


def test_datasets_are_named_by_path_and_those_of_other_labels_are_embedded_apart():
    sources = {"site": "/data/site.csv", "far": "/data/far", "ami-br": "TUPAC16"}
    options = {"test": ["far", "ami-br"], "train": "site=site.csv"}
    own = replace(record(), train="site", test=("far", "ami-br"), sources=sources, label_names=("benign", "cancer"))
    own = replace(own, options=options, test_classes={"far": ("0", "malignant")})
    *extracts, again = map(options_of, commands(own))
    assert {(one["dataset"], one["positive"]) for one in extracts} == {
        ("site=/data/site.csv", "cancer"),
        ("far=/data/far", "malignant"),
        ("ami-br", None),
    }
    assert (again["train"], again["test"]) == ("site", "far,ami-br")
    (line,) = commands(replace(own, kind="finetune", method="head"))
    again = options_of(line)
    assert (again["train"], again["test"]) == ("site=/data/site.csv", "far=/data/far,ami-br")


def test_what_a_store_lacks_is_said_as_a_command_that_works(tmp_path, monkeypatch):
    store = FeatureStore.open_or_create(tmp_path / "e.zarr")
    attrs = {"source": "/data/my cells.csv", "label_names": ["low", "middle", "high"], "ordinal": True}
    store.put_samples("cells", patches_of_classes("cells", 36, 3), attrs=attrs)
    asked = options_of(missing_embeddings(store, "uni", ["cells"], "center64"))
    assert (asked["dataset"], asked["model"], asked["view"]) == ("cells=/data/my cells.csv", "uni", "center64")
    assert (asked["classes"], asked["ordinal"], asked["store"]) == ("low,middle,high", True, str(tmp_path / "e.zarr"))
    monkeypatch.chdir(tmp_path)
    FeatureStore.open_or_create("embeddings.zarr")
    assert missing_embeddings(FeatureStore.open("embeddings.zarr"), None, ["demo"]) == "fm-extract --dataset demo"
