"""Do runs that an earlier version wrote still open, stand in a report, and predict as they did?

tests/data/archived-runs.zip holds a probe run (with a learning curve) and a LoRA run, both written by version 0.1.0 on
the drawn patches, and what its fm-predict said of the first twelve patches.
"""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extract import demo
from finetune.predict import predict_paths
from finetune.report import make_report
from probe.curve import read_curve
from probe.runs import check_weights, read_predictions, read_run, read_samples

ARCHIVE = Path(__file__).parent / "data" / "archived-runs.zip"
KINDS = ("probe", "finetune")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive unpacked, and the patches that were predicted."""
    folder = tmp_path_factory.mktemp("archive")
    with zipfile.ZipFile(ARCHIVE) as file:
        file.extractall(folder)
    (folder / "patches").mkdir()
    for row, pixels in enumerate(demo.draw().pixels[:12]):
        Image.fromarray(pixels).save(folder / "patches" / f"{row:02}.png")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_archived_run_opens_whole(archive: Path, kind: str) -> None:
    run = read_run(archive / kind)
    check_weights(archive / kind, run)
    assert (run.kind, run.model, run.train, run.folds.n, run.label_names) == (
        kind,
        "efficientnet-lite0",
        "demo",
        3,
        ("Normal", "Atypical"),
    )
    assert list(run.figures.sets) == ["demo/validation", "demo/test"]
    assert run.seeds == (42,)
    predictions = read_predictions(archive / kind, seed=run.seeds[0])
    assert set(predictions.seed.tolist()) == {42}
    assert predictions.sets() == [("demo", "validation"), ("demo", "test")]
    assert set(read_samples(archive / kind, predictions)) == {"demo"}
    if kind == "probe":
        assert run.candidates is not None
        assert [candidate.pooling for candidate in run.candidates] == ["card", "center"]
        assert {point.fraction for point in read_curve(archive / kind)} == {0.5, 1.0}
    else:
        assert run.history is not None
        assert run.best_epoch is not None
        assert [len(fold) for fold in run.history] == [2, 2, 2]
        best = [fold[epoch].balanced_accuracy for fold, epoch in zip(run.history, run.best_epoch, strict=True)]
        assert best == pytest.approx(run.figures.sets["demo/validation"].folds["balanced_accuracy"].each)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_again_is_what_was_read(archive: Path, kind: str) -> None:
    import json

    written = json.loads((archive / kind / "run.json").read_text())
    metrics = json.loads((archive / kind / "metrics.json").read_text())
    seeds = {"seeds": [written["options"]["seed"]]}  # which early versions did not write
    assert read_run(archive / kind).as_json() == written | seeds | {"metrics": metrics}


def test_archived_runs_stand_in_one_report(archive: Path) -> None:
    text, report, _ = make_report(
        archive, named=[archive / kind for kind in KINDS], format="markdown", data=archive / "none"
    )
    assert len(report.labels) == 2
    assert "efficientnet-lite0 lora" in text
    assert "efficientnet-lite0 probe" in text


@pytest.mark.parametrize("kind", KINDS)
def test_an_archived_run_predicts_as_it_did(archive: Path, kind: str, tmp_path: Path) -> None:
    predict_paths(archive / kind, [archive / "patches"], out=tmp_path / "out.csv", device="cpu")
    old, new = (
        list(csv.DictReader(path.read_text().splitlines()))
        for path in (archive / f"{kind}-predictions.csv", tmp_path / "out.csv")
    )
    assert [row["id"] for row in new] == [row["id"] for row in old]
    # Another processor, or another form of a convolution, moves a float32 logit by some 1e-4 of its size.
    for column in ("probability", "fold_0", "fold_1", "fold_2"):
        expected, actual = ([float(row[column]) for row in rows] for rows in (old, new))
        np.testing.assert_allclose(actual, expected, atol=2e-3)
    assert np.ptp([float(row["probability"]) for row in old]) > 0.1
