"""Does the report say what the runs' predictions say, whole, escaped and without a request, and refuse the rest?"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    recall_score,
    roc_auc_score,
)
from test_runs import N_FOLDS, TABLES, edit_record, edit_row, made_run, patches, predicted

from extract.datasets import load_dataset
from features.console import UserError
from features.samples import Samples, make_samples
from features.store import FeatureStore
from finetune.cli import report_main
from finetune.report import make_report
from probe.curve import CurvePoint, curve_csv
from probe.evidence import COMPARED, compare, ensemble_of
from probe.metrics import as_dict
from probe.predictions import VALIDATION, Predictions, concatenate, predictions_of
from probe.report import gallery
from probe.report.collect import collect
from probe.report.gallery import (
    PAGE_BYTES,
    GalleryPatches,
    embedding_maps,
    make_thumbnails,
    open_store,
    select_patches,
)
from probe.report.provenance import commands
from probe.report.read import labels_of, read_runs
from probe.resample import Resampling
from probe.runs import FoldsRecord, RunRecord, read_predictions, read_run

QUICK = Resampling(replicates=200)
OTHER_FOLDS = "beef" * 16
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7*7 }}",
    "../..",
    "<!--<script>",
    "' onfocus='alert(1)",
    "&lt;b&gt;",
)


@pytest.fixture(autouse=True)
def no_patches_at_hand(tmp_path_factory, monkeypatch):
    """The known datasets are not here, whatever this machine has."""
    monkeypatch.setenv("MITOFM_DATA", str(tmp_path_factory.mktemp("nothing")))


def two_runs(runs: Path, **record: Any) -> tuple[Path, Path]:
    return made_run(runs, "uni", signal=0.6, **record), made_run(runs, "virchow", signal=0.3, seed=1, **record)


def collected(runs: Path, **options: Any):
    read, notes = read_runs(runs, **options)
    return collect(read, notes, resampling=QUICK), read


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none does not exist\. Expected the folder of all runs; make one with fm-"):
        read_runs(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no finished run\. Make one with fm-probe or fm-finetune"):
        read_runs(tmp_path)
    (tmp_path / ".probe-x.partial").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("no run")
    with pytest.raises(UserError, match="holds no finished run"):
        read_runs(tmp_path)
    for named in (tmp_path / "notes", tmp_path / "notes.txt", tmp_path / "none"):
        with pytest.raises(UserError, match=r"is not a finished run: run\.json is missing"):
            read_runs(tmp_path, named=[named])


def test_an_unfinished_training_is_named_with_its_remedy(tmp_path):
    training = tmp_path / "finetune-uni-1"
    training.mkdir()
    (training / "training.json").write_text("{}")
    with pytest.raises(UserError, match=rf"no finished run\. finetune-uni-1 has not finished .* --resume {training}"):
        read_runs(tmp_path)
    made_run(tmp_path)
    read, notes = read_runs(tmp_path)
    assert len(read) == 1
    assert notes == [f"finetune-uni-1 has not finished and is left out: fm-finetune --resume {training}"]


@pytest.mark.parametrize("key", ["id", "created", "kind", "model", "method", "train", "view", "options", "folds"])
def test_a_record_without_what_is_needed_is_refused(key, tmp_path):
    folder = made_run(tmp_path)
    edit_record(folder, **{key: None})
    with pytest.raises(
        UserError, match=rf"{folder.name}/run\.json is damaged \(.*\b{key}\b.*\)\. Run the command again"
    ):
        read_runs(tmp_path)


@pytest.mark.parametrize("folds", [{"n": 5}, {"digest": "x"}, {}, "abc", []])
def test_a_record_without_folds_is_refused(folds, tmp_path):
    edit_record(made_run(tmp_path), folds=folds)
    with pytest.raises(UserError, match=r"run\.json is damaged \(.*(field `(n|digest)`|object).*folds"):
        read_runs(tmp_path)


def test_runs_of_different_folds_are_never_tabulated_together(tmp_path):
    first, second = two_runs(tmp_path)
    third = made_run(tmp_path, "conch", digest=OTHER_FOLDS)
    with pytest.raises(UserError) as refusal:
        read_runs(tmp_path)
    message = str(refusal.value)
    assert "2 different fold assignments" in message
    assert "f01df01d: ami-br, 3 folds, 2 runs" in message
    assert "beefbeef: ami-br, 3 folds, 1 run (" in message
    assert all(folder.name in message for folder in (first, second, third))
    assert re.search(r"fm-report --folds (f01df01d|beefbeef)$", message)

    read, notes = read_runs(tmp_path, folds="f01d")
    assert {run.folder for run in read} == {first, second}
    assert notes == ["1 run on other folds left out: different folds are never tabulated together."]
    read, notes = read_runs(tmp_path, folds=OTHER_FOLDS)
    assert [run.folder for run in read] == [third]
    assert notes == ["2 runs on other folds left out: different folds are never tabulated together."]
    with pytest.raises(
        UserError, match=r"no run has folds beefbeer\. Did you mean beefbeef\? The runs have .*f01df01d"
    ):
        read_runs(tmp_path, folds="beefbeer")
    with pytest.raises(UserError, match="different fold assignments"):
        read_runs(tmp_path, named=[first, third])


def test_named_runs_alone_are_read(tmp_path):
    first, second = two_runs(tmp_path)
    read, notes = read_runs(tmp_path / "elsewhere", named=[second])
    assert ([run.folder for run in read], notes) == ([second], [])
    assert len(read_runs(tmp_path, named=[first, first])[0]) == 1


def test_runs_stand_by_date(tmp_path):
    first, second = two_runs(tmp_path)
    edit_record(first, created="2026-02-01T00:00:00Z")
    edit_record(second, created="2026-01-01T00:00:00Z")
    assert [run.folder for run in read_runs(tmp_path)[0]] == [second, first]


def test_a_run_and_its_copy_are_one_run(tmp_path):
    first, _ = two_runs(tmp_path)
    shutil.copytree(first, tmp_path / "copy")
    read, notes = read_runs(tmp_path)
    assert [run.label for run in read] == ["uni probe", "virchow probe"]
    (note,) = notes
    assert "copy" in note
    assert first.name in note


def test_a_run_without_predictions_of_its_own_test_set_is_refused(tmp_path):
    folder = made_run(tmp_path, test=["atnorm-br", "mine"])
    with pytest.raises(UserError, match=r"scored on mine, but its predictions\.csv has only ami-br, atnorm-br") as said:
        read_runs(tmp_path)
    assert str(folder) in str(said.value)


def test_a_changed_file_of_a_run_is_refused_by_name(tmp_path):
    folder = made_run(tmp_path)
    edit_row(folder / "samples.csv", 2, "group", "slide 9")
    with pytest.raises(UserError, match=rf"{folder.name}/samples\.csv is not the file that the run wrote"):
        read_runs(tmp_path)


def test_a_set_that_one_run_lacks_is_a_note(tmp_path):
    made_run(tmp_path, "uni")
    made_run(tmp_path, "virchow", tables={name: TABLES[name] for name in ("ami-br", "atnorm-md")}, seed=1)
    report, _ = collected(tmp_path)
    assert {on.name: on.missing for on in report.sets} == {
        "ami-br/test": (),
        "atnorm-br/test": ("virchow probe",),
        "atnorm-md/test": (),
        "ami-br/validation": (),
    }
    assert report.notes == ("virchow probe was not scored on atnorm-br: run it again with --test atnorm-br.",)
    on = report.sets[1]
    assert set(on.folds) == set(on.confusion) == set(on.curves) == {"uni probe"}


# --- names ------------------------------------------------------------------------------------------------------------


def record(model: str = "uni", method: str = "probe", *, view: str = "full", pooling: str = "card", **options: Any):
    number = next(_numbers)
    return RunRecord(
        id=f"{method}-{model}-20260101-000000-{number:04x}",
        kind="probe",
        model=model,
        method=method,
        train="ami-br",
        view=view,
        pooling=pooling,
        card_pooling="cls",
        folds=FoldsRecord(n=N_FOLDS, digest=""),
        options={"seed": 42, "recipe": "exact", "view": None, "test": None} | options,
    )


_numbers = itertools.count()


def test_model_and_method_name_a_run():
    assert labels_of([record(), record("virchow"), record(method="lora")]) == [
        "uni probe",
        "virchow probe",
        "uni lora",
    ]


def test_namesakes_are_told_apart_by_what_differs():
    def lora(rank: int) -> dict[str, Any]:
        return record(method="lora", lora={"rank": rank, "alpha": 16, "targets": None})

    assert labels_of([lora(8), lora(16)]) == ["uni lora rank=8", "uni lora rank=16"]
    assert labels_of([record(recipe="exact"), record(recipe="paper")]) == ["uni probe exact", "uni probe paper"]
    assert labels_of([record(view="full"), record(view="center64")]) == ["uni probe full", "uni probe center64"]
    assert labels_of([record(pooling="cls"), record(pooling="mean")]) == ["uni probe cls", "uni probe mean"]
    assert labels_of([record(epochs=None), record(epochs=5)]) == ["uni probe epochs=default", "uni probe epochs=5"]
    assert labels_of([record(seed=1), record(seed=2), record("conch", seed=3)])[2] == "conch probe"
    assert labels_of([record(seed=1), record(seed=1), record(seed=2)])[2] == "uni probe seed=2"


def test_an_option_that_only_one_of_them_has_tells_too():
    assert labels_of([record(), record(batch_size=8)])[1] == "uni probe batch_size=8"
    assert labels_of([record(batch_size=8), record()])[0] == "uni probe batch_size=8"


def test_which_sets_were_scored_tells_nothing():
    first, second = record(test=["a"]), record(test=None, fractions=[0.5])
    assert all(re.fullmatch(r"uni probe #[0-9a-f]{4}", label) for label in labels_of([first, second]))


def test_identical_runs_are_told_apart_by_their_ids():
    runs = [record() for _ in range(3)]
    assert labels_of(runs) == [f"uni probe #{run.id[-4:]}" for run in runs]
    runs[1] = replace(runs[1], id="x" + runs[0].id)  # the same last digits, on another day
    assert len(set(labels_of(runs))) == 3


def test_no_two_runs_share_a_name():
    kinds = list(itertools.product(("uni", "uni probe"), ("probe", "lora"), ("full", "center64"), (1, 2)))
    rng = np.random.default_rng(0)
    for _ in range(200):
        chosen = [kinds[k] for k in rng.integers(0, len(kinds), size=rng.integers(1, 9))]
        records = [record(model, method, view=view, seed=seed) for model, method, view, seed in chosen]
        labels = labels_of(records)
        assert len(set(labels)) == len(labels)
        for label, one in zip(labels, records, strict=True):
            assert label.startswith(f"{one.model} {one.method}")


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_are_scikit_learn_s(tmp_path):
    two_runs(tmp_path)
    report, runs = collected(tmp_path)
    assert [on.name for on in report.sets] == ["ami-br/test", "atnorm-br/test", "atnorm-md/test", "ami-br/validation"]
    for on, run in itertools.product(report.sets, runs):
        judged = ensemble_of(run.predictions, on.dataset, on.split)
        y, p, said = judged.label, judged.probability, judged.probability >= judged.threshold
        found = {name: one.value for name, one in on.comparison.judgements[run.label].figures.items()}
        assert found == pytest.approx(
            {
                "balanced_accuracy": balanced_accuracy_score(y, said),
                "auroc": roc_auc_score(y, p),
                "average_precision": average_precision_score(y, p),
                "sensitivity": recall_score(y, said),
                "specificity": recall_score(1 - y, ~said),
                "f1": f1_score(y, said),
                "mcc": matthews_corrcoef(y, said),
                "brier": brier_score_loss(y, p),
                "ece": found["ece"],
            }
        )
        (tn, fp), (fn, tp) = confusion_matrix(y, said)
        counts = on.confusion[run.label]
        assert (counts.tp, counts.fn, counts.fp, counts.tn) == (tp, fn, fp, tn)
        assert counts.tp + counts.fn + counts.fp + counts.tn == on.n == len(y)
        assert counts.tp + counts.fn == on.n_positive
        part = run.predictions.select((run.predictions.dataset == on.dataset) & (run.predictions.split == on.split))
        each = [
            roc_auc_score(part.label[part.fold == fold], part.probability[part.fold == fold]) for fold in range(N_FOLDS)
        ]
        folds = on.folds[run.label]["auroc"]
        assert folds.each == pytest.approx(each)
        assert (folds.mean, folds.std) == pytest.approx((np.mean(each), np.std(each)))


def curves_of(logit: np.ndarray, label: np.ndarray, runs: Path):
    """One run whose single fold model says these logits of a test set."""
    table = make_samples(
        [f"{k}" for k in range(len(label))], label.tolist(), sha256=[""] * len(label), split=["test"] * len(label)
    )
    tables = {"mine": patches("mine", 36, test_from=36), "t": table}
    parts = predicted({"mine": tables["mine"]}, "mine")
    test = predictions_of("t", table, split="test", fold=np.array([0]), logit=logit[:, None])
    made_run(runs, tables=tables, train="mine", predictions=concatenate([parts, test]))
    report, (run,) = collected(runs)
    return report.sets[0].curves[run.label], ensemble_of(run.predictions, "t", "test")


def test_the_area_under_the_drawn_curve_is_the_auroc_ties_included(tmp_path):
    rng = np.random.default_rng(0)
    label = (np.arange(120) % 3 == 0).astype(np.int8)
    cases = {
        "ties": np.round(label + rng.standard_normal(120)).astype("f4"),
        "distinct": (label + rng.standard_normal(120)).astype("f4"),
        "all equal": np.zeros(120, dtype="f4"),
    }
    for name, logit in cases.items():
        curves, judged = curves_of(logit, label, tmp_path / name)
        x, y = np.array(curves.roc).T
        assert curves.roc[0] == (0, 0)
        assert curves.roc[-1] == (1, 1)
        assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(label, judged.probability), abs=1e-12), name
        recall, precision = np.array(curves.precision_recall).T
        area = (np.diff(recall, prepend=0) * precision).sum()
        assert area == pytest.approx(average_precision_score(label, judged.probability), abs=1e-12), name
        assert sum(count for *_, count in curves.calibration) == 120
        rate = sum(observed * count for _, observed, count in curves.calibration) / 120
        assert rate == pytest.approx(label.mean())


def test_a_long_curve_is_drawn_with_fewer_points_and_the_same_area(tmp_path):
    rng = np.random.default_rng(0)
    label = (np.arange(3000) % 3 == 0).astype(np.int8)
    curves, judged = curves_of((label + rng.standard_normal(3000)).astype("f4"), label, tmp_path)
    assert len(curves.roc) <= 401
    x, y = np.array(curves.roc).T
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(label, judged.probability), abs=2e-3)


def test_the_fullest_patch_table_serves_all_runs(tmp_path):
    first, _ = two_runs(tmp_path)
    whole, _ = collected(tmp_path)
    (first / "samples.csv").unlink()
    edit_record(first, sha256=None)
    report, runs = collected(tmp_path)
    for on, before in zip(report.sets, whole.sets, strict=True):
        assert as_dict(on.raters) == as_dict(before.raters)
        assert as_dict(on.domains) == as_dict(before.domains)
    assert set(report.sets[0].raters) == set(report.sets[2].domains) == {"uni probe", "virchow probe"}
    assert (report.sets[1].raters, report.sets[1].domains) == ({}, {})
    patches_shown = select_patches(report, runs)
    assert set(patches_shown.votes) >= {"111", "000"}
    assert set(patches_shown.domain.tolist()) == {"", "domain 0", "domain 1", "domain 2"}


def test_domains_without_votes_are_shown_whichever_run_knows_them(tmp_path):
    table = patches("mine", 48, domains=3, test_from=24)
    first, _ = two_runs(tmp_path, tables={"mine": table}, train="mine")
    (first / "samples.csv").unlink()
    report, runs = collected(tmp_path)
    assert report.sets[0].domains
    found = select_patches(report, runs)
    domain = dict(zip(table.id.tolist(), table.domain.tolist(), strict=True))
    assert found.domain.tolist() == [domain[id] for id in found.id.tolist()]


def flat(value: Any, name: str = "") -> dict[str, float]:
    """The numbers of nested results, by where they stand."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: number for k, one in pairs for key, number in flat(one, f"{name}/{k}").items()}
    return {name: value} if isinstance(value, int | float) else {}


def test_patches_may_come_in_any_order(tmp_path):
    two_runs(tmp_path / "a")
    before, _ = collected(tmp_path / "a")
    made_run(tmp_path / "b", "uni", signal=0.6)
    shuffled = predicted(TABLES, "ami-br", signal=0.3, seed=1)
    shuffled = shuffled.select(np.random.default_rng(0).permutation(len(shuffled.id)))
    made_run(tmp_path / "b", "virchow", predictions=shuffled)
    report, runs = collected(tmp_path / "b")
    by_name = {on.name: on for on in report.sets}
    for on in before.sets:
        again = by_name[on.name]
        for part in ("raters", "domains", "comparison"):
            assert flat(as_dict(getattr(again, part))) == pytest.approx(flat(as_dict(getattr(on, part))), abs=1e-12)
    found = select_patches(report, runs)
    for run, probability in zip(runs, found.probability, strict=True):
        for k, on in enumerate(report.sets):
            judged = ensemble_of(run.predictions, on.dataset, on.split)
            of = dict(zip(judged.id.tolist(), judged.probability.tolist(), strict=True))
            rows = np.flatnonzero(found.set_index == k)
            assert probability[rows].tolist() == [of[id] for id in found.id[rows].tolist()]


def test_identical_patches_are_noted(tmp_path):
    table = replace(TABLES["atnorm-br"], sha256=np.array([f"{k // 2}" for k in range(24)]))
    two_runs(tmp_path, tables=TABLES | {"atnorm-br": table})
    report, _ = collected(tmp_path)
    assert report.notes == ("atnorm-br, test holds 12 sets of byte-identical patches; they count as separate patches.",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("patches", "judged on different patches of atnorm-br"),
        ("label", "have different labels for 1 patches of atnorm-br"),
        ("group", "have different slides for 1 patches of atnorm-br"),
    ],
)
def test_runs_of_different_patches_are_refused(change, said, tmp_path):
    made_run(tmp_path, "uni")
    other = TABLES["atnorm-br"]
    if change == "patches":
        other = other.select(np.arange(len(other)) > 0)
    else:
        column = getattr(other, change).copy()
        column = column.astype("<U9") if change == "group" else column
        column[0] = "slide 9" if change == "group" else 1 - column[0]
        other = replace(other, **{change: column})
    made_run(tmp_path, "virchow", tables=TABLES | {"atnorm-br": other}, seed=1)
    with pytest.raises(UserError, match=said):
        collected(tmp_path)


# --- the page ---------------------------------------------------------------------------------------------------------

VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})
CONTROLS = frozenset({"select", "input", "textarea"})


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None
    children: list[Element | str] = field(default_factory=list)

    def all(self, *tags: str) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                if not tags or child.tag in tags:
                    yield child
                yield from child.all(*tags)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def ancestors(self) -> list[str]:
        return [] if self.parent is None else [self.parent.tag, *self.parent.ancestors]


class Tree(HTMLParser):
    """A page as elements; every tag must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = self.at = Element("", {}, None)
        self.feed(text)
        self.close()
        assert self.at is self.root, f"<{self.at.tag}> is never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        element = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            assert "svg" in self.at.ancestors  # elsewhere a browser takes it for an open tag
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.at.tag, f"</{tag}> closes <{self.at.tag}>"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def page_of(runs: Path, **options: Any) -> str:
    return make_report(runs, resampling=QUICK, **options)[0]


def embedded(page: str, name: str) -> Any:
    """A JSON element of the page."""
    (text,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page)
    return json.loads(text)


def check_page(page: str) -> Element:
    """What must hold of every page."""
    assert page.startswith("<!doctype html>\n")
    root = Tree(page).root
    everything = list(root.all())
    ids = [one.attributes["id"] for one in everything if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    assert len(list(root.all("h1"))) == len(list(root.all("main"))) == 1
    assert [one.attributes["lang"] for one in root.all("html")] == ["en"]
    for one in everything:
        names = one.attributes
        assert "style" not in names, one
        assert not any(name.startswith("on") for name in names), one
        for address in (names.get("href"), names.get("src"), names.get("xlink:href"), names.get("action")):
            if address is None:
                continue
            assert address.startswith(("#", "data:")), address
            assert not address.startswith("#") or address[1:] in ids, address
        for reference in ("aria-labelledby", "aria-describedby"):
            assert names.get(reference, ids[0]) in ids
        for name, value in names.items():
            assert name == "data-value" or not re.search(r"\bnan\b|\binf\b|\bNone\b", value), (one.tag, name, value)
        if one.tag == "table":
            first = next(child for child in one.children if isinstance(child, Element))
            assert first.tag == "caption"
            assert first.text.strip()
        if one.tag in CONTROLS:
            assert "label" in one.ancestors or names.get("aria-label")
        if one.tag in ("button", "a", "summary", "option", "h2", "h3") and one.parent.attributes.get("name") != "set":
            assert one.text.strip(), one
        if one.tag == "svg":
            assert names.get("aria-label") or names.get("aria-hidden") == "true"
        if one.tag in ("img", "iframe", "object", "embed", "base"):
            raise AssertionError(one.tag)
    for table in root.all("table"):
        rows = list(table.all("tr"))
        if not any("rowspan" in cell.attributes for cell in table.all("th", "td")):
            widths = {sum(int(cell.attributes.get("colspan", 1)) for cell in row.all("td", "th")) for row in rows}
            assert len(widths) == 1
    for one in everything:
        if one.tag not in ("script", "style"):
            words = {word for child in one.children if isinstance(child, str) for word in re.findall(r"\w+", child)}
            assert words.isdisjoint({"nan", "inf", "None"}), one.text

    (policy,) = (
        one.attributes["content"]
        for one in root.all("meta")
        if one.attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    (style,) = root.all("style")
    scripts = list(root.all("script"))
    code = [one for one in scripts if one.attributes.get("type") != "application/json"]
    assert (len(scripts), len(code)) == (4, 1)
    for rule, element in (("style-src", style), ("script-src", code[0])):
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert not re.search(r"url\(|@import|expression", style.text)
    for one in scripts:
        if one is not code[0]:
            assert "<" not in one.text
            json.loads(one.text)
    return root


def table_of(root: Element, caption: str) -> list[list[Element]]:
    """The body of the table with that caption."""
    (table,) = (one for one in root.all("table") if next(one.all("caption")).text == caption)
    (body,) = table.all("tbody")
    return [list(row.all("td", "th")) for row in body.all("tr")]


def test_the_page_is_whole(tmp_path):
    two_runs(tmp_path)
    root = check_page(page_of(tmp_path))
    text = next(root.all("main")).text
    for on in ("ami-br, test", "atnorm-br, test", "atnorm-md, test", "ami-br, out of fold"):
        assert on in text
    assert "No map:" in text
    assert "The patches themselves are not at hand" in text
    assert {one.attributes["href"] for one in next(root.all("nav")).all("a")} >= {"#raters", "#domains", "#gallery"}


def test_the_page_of_one_run_is_whole(tmp_path):
    made_run(tmp_path, tables={"mine": patches("mine", 36, test_from=36)}, train="mine")
    root = check_page(page_of(tmp_path))
    assert "One run has nothing to be compared with" in root.text
    assert {one.attributes["href"] for one in next(root.all("nav")).all("a")}.isdisjoint({"#raters", "#domains"})


def test_the_page_of_many_runs_is_whole(tmp_path):
    tables = {"mine": patches("mine", 48, test_from=24)}
    for k in range(9):
        made_run(tmp_path, f"model-{k}", tables=tables, train="mine", seed=k, method="probe" if k % 2 else "lora")
    root = check_page(page_of(tmp_path))
    assert len(table_of(root, "Leaderboard of mine, test")) == 9
    assert "ROC, lora" in root.text


def test_figures_that_do_not_exist_leave_the_page_whole(tmp_path):
    """A set without positives, domains of two patches, two runs that never differ, slides and their lack."""
    alone = patches("alone", 24, raters=3)
    tiny = patches("tiny", 48, slides=False)
    label = (np.arange(48) % 2).astype(np.int8)
    tables = {
        "mine": patches("mine", 36, test_from=36),
        "alone": alone.select(alone.label == 0),
        "tiny": replace(tiny, label=label, domain=np.array([f"d{k // 2:02}" for k in range(48)])),
        "few": patches("few", 4, slides=False),
    }
    points = [
        CurvePoint(0.5, 0, 0, 3, 12, 4, 1.0, name, split, 0.5, float("nan") if name == "alone" else 0.6)
        for name, split in (("mine", VALIDATION), ("alone", "test"), ("tiny", "test"))
    ]
    for _ in range(2):
        made_run(tmp_path, tables=tables, train="mine", files={"learning_curve.csv": curve_csv(points)})
    page = page_of(tmp_path)
    root = check_page(page)
    assert "Learning curves" in root.text
    assert "−0.000" not in root.text  # of runs that are equal
    curves = [
        svg for svg in root.all("svg") if svg.attributes.get("aria-label", "").startswith("ROC curves, alone, test")
    ]
    assert not [line for svg in curves for line in svg.all("polyline")]


def test_the_figures_are_those_of_the_predictions(tmp_path):
    folders = two_runs(tmp_path)
    page = page_of(tmp_path)
    figures, root = embedded(page, "figures"), Tree(page).root
    labels = {folder: f"{json.loads((folder / 'run.json').read_text())['model']} probe" for folder in folders}
    assert figures["labels"] == [labels[folder] for folder in folders]
    for on in figures["sets"]:
        judged = {labels[f]: ensemble_of(read_predictions(f), on["dataset"], on["split"]) for f in folders}
        expected = compare(judged, resampling=QUICK)
        assert on["comparison"] == json.loads(json.dumps(as_dict(expected)))
        title = f"{on['dataset']}, {'out of fold' if on['split'] == VALIDATION else on['split']}"
        ranks = []
        for cells in table_of(root, f"Leaderboard of {title}"):
            (label,) = (label for label in judged if label in cells[1].text)
            found = expected.judgements[label].figures
            folds = on["folds"][label]
            values = [float(cells[k].attributes["data-value"]) for k in (0, 2, 3, 4, 5)]
            ranks.append(values[0])
            assert values == [
                expected.ranks["auroc"][label].value,
                *(found[name].value for name in COMPARED),
                *(folds[name]["mean"] for name in COMPARED),
            ]
            interval = found["auroc"]
            assert cells[3].text == f"{interval.value:.3f} {interval.low:.3f}–{interval.high:.3f}"
        assert ranks == sorted(ranks)
        for cells in table_of(root, f"All figures of {title}"):
            (label,) = (label for label in judged if label in cells[0].text)
            values = [float(cell.attributes["data-value"]) for cell in cells[1:]]
            found = expected.judgements[label]
            assert values == [found.threshold, *(one.value for one in found.figures.values())]


def test_the_gallery_calls_wrong_what_the_confusion_calls_wrong(tmp_path):
    """Also where a probability lies so close to the threshold that four digits do not tell."""
    tables = {"mine": patches("mine", 12, test_from=12), "t": patches("t", 9)}
    trained = predictions_of(
        "mine",
        tables["mine"],
        split=VALIDATION,
        fold=np.arange(12) // 4,
        logit=np.where(tables["mine"].label == 1, 1.6e-4, 4e-5),  # probabilities of .50004 and .50001
    )
    tested = predictions_of(
        "t", tables["t"], split="test", fold=np.arange(N_FOLDS), logit=np.full((9, N_FOLDS), 1.2e-4)
    )
    made_run(tmp_path / "close", tables=tables, train="mine", predictions=concatenate([trained, tested]))
    two_runs(tmp_path / "far")
    for runs in (tmp_path / "close", tmp_path / "far"):
        page = page_of(runs)
        data, figures = embedded(page, "data"), embedded(page, "figures")
        for (k, run), (s, on) in itertools.product(enumerate(data["runs"]), enumerate(figures["sets"])):
            said = [
                (data["label"][row], data["probability"][k][row] >= data["thresholds"][k][s])
                for row, of in enumerate(data["set"])
                if of == s
            ]
            counts = on["confusion"][run]
            assert said.count((1, True)) == counts["tp"], (run, on["dataset"])
            assert said.count((1, False)) == counts["fn"]
            assert said.count((0, True)) == counts["fp"]
            assert said.count((0, False)) == counts["tn"]


CONTROL = "\x1b[31m\u202egnp.exe\x07\n"
RAW = re.compile("[\u202a-\u202e\u2066-\u2069\x00-\x09\x0b-\x1f]")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stand_in_the_page_as_text(name, tmp_path):
    n, strange = 24, name + CONTROL
    table = make_samples(
        [f"{HOSTILE[k % len(HOSTILE)]}{CONTROL}{k}" for k in range(n)],
        [int(k % 3 == 0) for k in range(n)],
        sha256=[f"{k // 2}" for k in range(n)],
        group=[f"{HOSTILE[k // 4]}" for k in range(n)],
        split=["train"] * 12 + ["test"] * 12,
        votes=np.array([[k % 3 == 0, k % 2, 1] for k in range(n)], dtype=np.int8),
        domain=[HOSTILE[k // 4 % 3] + CONTROL for k in range(n)],
    )
    tables = {strange: table, "other" + strange: table}
    point = CurvePoint(0.5, 0, 0, 3, 12, 4, 1.0, strange, "test", 0.5, 0.6)
    for method in ("probe", strange, strange):
        folder = made_run(tmp_path, tables=tables, train=strange, files={"learning_curve.csv": curve_csv([point])})
        edit_record(
            folder,
            model=strange,
            method=method,
            label_names=[strange, "b" + strange],
            options={strange: strange, "x": {strange: strange}},
            view=strange,
            pooling=strange,
            recipe={strange: strange},
            sources=dict.fromkeys(tables, strange),
            fingerprints={strange: strange},
            versions={strange: strange},
            embedding={"weights_sha256": strange, "revision": strange},
            folds={"n": N_FOLDS, "digest": strange, "source": strange},
            cost={"device": strange},
        )
    page = page_of(tmp_path)
    root = check_page(page)
    for section in ("leaderboard", "differences", "curves", "decisions", "raters", "domains", "learning", "provenance"):
        (found,) = (one for one in root.all("section") if one.attributes["id"] == section)
        assert name in found.text, section
    data = embedded(page, "data")
    assert data["groups"] == list(dict.fromkeys(table.group[12:].tolist() + table.group[:12].tolist()))
    assert set(data["id"]) == set(table.id.tolist())
    outside = re.sub(r"(?s)<script.*?</script>|<style.*?</style>", "", page)
    assert not RAW.search(outside), RAW.search(outside)


def test_damaged_weights_are_no_reason_to_have_no_report(tmp_path):
    folder = made_run(tmp_path, tables={"ami-br": TABLES["ami-br"]})

    def trained() -> str:
        root = check_page(page_of(tmp_path))
        (table,) = (one for one in root.all("table") if next(one.all("caption")).text == "Leaderboard of ami-br, test")
        heads = [one.text for one in list(table.all("tr"))[1].all("th")]
        return table_of(root, "Leaderboard of ami-br, test")[0][heads.index("Trained")].text

    assert trained() == "9"  # eight features and the intercept
    (folder / "weights.safetensors").write_bytes(b"damaged")
    assert trained() == "–"
    (folder / "weights.safetensors").unlink()
    assert trained() == "–"


# --- what was published -----------------------------------------------------------------------------------------------


def test_what_was_published_stands_beside_our_own(tmp_path):
    made_run(tmp_path, "uni", signal=0.6)
    page = page_of(tmp_path)
    root = check_page(page)
    on = embedded(page, "figures")["sets"][0]
    folds = {name: on["folds"]["uni probe"][name]["mean"] for name in COMPARED}
    (row,) = table_of(root, "Leaderboard of ami-br, test")

    def delta(value: float) -> str:
        return f"{value:+.3f}".replace("-", "−")

    assert row[6].text == f"0.648 ± 0.011 {delta(folds['balanced_accuracy'] - 0.6477)}"
    assert row[7].text == f"0.717 ± 0.008 {delta(folds['auroc'] - 0.7171)}"
    assert row[8].text == f"0.634 {delta(folds['balanced_accuracy'] - 0.6339)}"
    assert row[9].text == f"0.695 {delta(folds['auroc'] - 0.6949)}"
    rows = table_of(root, "Published figures on ami-br")
    (uni,) = (row for row in rows if [cell.text for cell in row[:2]] == ["uni", "probe"])
    assert [cell.text for cell in uni[2:]] == [
        *("0.6477 ± 0.0108", delta(folds["balanced_accuracy"] - 0.6477)),
        *("0.7171 ± 0.0080", delta(folds["auroc"] - 0.7171)),
        *("0.6339", delta(folds["balanced_accuracy"] - 0.6339)),
        *("0.6949", delta(folds["auroc"] - 0.6949)),
    ]


@pytest.mark.parametrize("train", ["mine", "atnorm-br"])
def test_nothing_published_stands_beside_runs_trained_on_other_data(train, tmp_path):
    tables = {train: patches(train, 60, test_from=36), "ami-br": patches("ami-br", 24)}
    made_run(tmp_path, "uni", tables=tables, train=train)
    root = check_page(page_of(tmp_path))
    for word in ("Table 3", "re-run", "Published figures"):
        assert word not in root.text
    assert not [one for one in root.all("path") if one.attributes.get("class") == "published"]


# --- the gallery ------------------------------------------------------------------------------------------------------


def test_all_patches_are_shown_where_they_are_few(tmp_path):
    two_runs(tmp_path)
    report, runs = collected(tmp_path)
    found = select_patches(report, runs)
    assert found.n_left_out == (0, 0, 0, 0)
    assert np.bincount(found.set_index).tolist() == [on.n for on in report.sets] == [24, 24, 48, 36]
    for k, on in enumerate(report.sets):
        rows = found.set_index == k
        part = TABLES[on.dataset].select(np.isin(TABLES[on.dataset].id, found.id[rows]))
        place = {id: row for row, id in enumerate(part.id.tolist())}
        of = part.select(np.array([place[id] for id in found.id[rows].tolist()]))
        assert of.label.tolist() == found.label[rows].tolist()
        assert of.group.tolist() == found.group[rows].tolist()
        votes = ["".join("01-"[vote] for vote in row) for row in of.votes.tolist()]
        assert votes == [found.votes[row] for row in np.flatnonzero(rows)]


def test_of_many_patches_the_worst_and_some_others_are_shown(tmp_path, monkeypatch):
    two_runs(tmp_path)
    report, runs = collected(tmp_path)
    whole = select_patches(report, runs)
    monkeypatch.setattr(gallery, "MOST", 40)
    found = select_patches(report, runs)
    kept = [40 * on.n // 132 for on in report.sets]
    assert np.bincount(found.set_index).tolist() == kept == [7, 7, 14, 10]
    assert found.n_left_out == tuple(on.n - n for on, n in zip(report.sets, kept, strict=True))
    random = 0
    for k, n in enumerate(kept):
        rows, all_rows = found.set_index == k, whole.set_index == k
        wrong = np.abs(whole.probability[:, all_rows] - whole.label[all_rows]).max(axis=0)
        order = whole.id[all_rows][np.argsort(-wrong, kind="stable")].tolist()
        mine = set(found.id[rows].tolist())
        assert set(order[: n // 2]) <= mine
        random += mine != set(order[:n])
    assert random  # the others are not the next worst
    again = select_patches(report, runs)
    assert again.id.tolist() == found.id.tolist()
    place = {
        (on, id): row for row, (on, id) in enumerate(zip(whole.set_index.tolist(), whole.id.tolist(), strict=True))
    }
    at = [place[key] for key in zip(found.set_index.tolist(), found.id.tolist(), strict=True)]
    assert found.probability.tolist() == whole.probability[:, at].tolist()
    assert found.votes == tuple(whole.votes[row] for row in at)
    text = check_page(page_of(tmp_path)).text
    assert "94 of 132 patches are left out of map and gallery" in text


def test_a_patch_that_a_run_was_not_scored_on_has_no_probability(tmp_path):
    made_run(tmp_path, "uni")
    made_run(tmp_path, "virchow", tables={"ami-br": TABLES["ami-br"]}, seed=1)
    report, runs = collected(tmp_path)
    found = select_patches(report, runs)
    missing = np.array([runs[1].label in on.missing for on in report.sets])[found.set_index]
    assert np.isnan(found.probability[1]).tolist() == missing.tolist()
    assert not np.isnan(found.probability[0]).any()
    page = page_of(tmp_path)
    check_page(page)
    data = embedded(page, "data")
    assert [p is None for p in data["probability"][1]] == missing.tolist()
    assert [t is None for t in data["thresholds"][1]] == [False, True, True, False]


def of_patches(n: int, *datasets: str) -> tuple[GalleryPatches, Any]:
    """n patches of every dataset, as the gallery shows them."""
    on = np.repeat(np.arange(len(datasets)), n)
    empty = np.full(len(on), "")
    ids = np.array([f"{k}" for k in range(len(on))])
    found = GalleryPatches(
        on, ids, empty, empty, np.zeros(len(on), "i1"), ("",) * len(on), np.zeros((1, len(on))), (0,)
    )
    return found, SimpleNamespace(sets=[SimpleNamespace(dataset=name) for name in datasets])


def colour_of(id: str) -> tuple[int, int, int]:
    k = int(id)
    return (40 + k * 37 % 180, 40 + k * 59 % 180, 40 + k * 83 % 180)


def drawn(thumbnails: gallery.Thumbnails, row: int) -> np.ndarray:
    """The thumbnail of a row, cut from its sheet."""
    size, at = thumbnails.size, int(thumbnails.picture[row])
    left, top = at % 256 % 16 * size, at % 256 // 16 * size
    return decoded(thumbnails.sheets[at // 256])[top : top + size, left : left + size]


@cache
def decoded(sheet: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(sheet))
    assert picture.format == "WEBP"
    return np.asarray(picture.convert("RGB")).astype(float)


def test_every_thumbnail_is_of_its_own_patch():
    found, report = of_patches(150, "a", "away", "b")

    def flat(id: str) -> np.ndarray:
        return np.full((32, 32, 3), colour_of(id), dtype=np.uint8)

    thumbnails = make_thumbnails(found, report, {"a": flat, "b": flat}, budget=PAGE_BYTES)
    assert thumbnails.size == 32
    assert len(thumbnails.sheets) == 2
    assert (thumbnails.picture < 0).tolist() == (found.set_index == 1).tolist()
    assert sorted(thumbnails.picture[thumbnails.picture >= 0].tolist()) == list(range(300))
    for row in np.flatnonzero(thumbnails.picture >= 0):
        mean = drawn(thumbnails, row)[8:-8, 8:-8].mean(axis=(0, 1))
        assert np.abs(mean - colour_of(str(found.id[row]))).max() < 8, row


def test_thumbnails_shrink_to_the_budget():
    found, report = of_patches(16, "a")

    def noise(id: str) -> np.ndarray:
        return np.random.default_rng(int(id)).integers(0, 256, (128, 128, 3), dtype=np.uint8)

    sizes = []
    for budget in (10_000_000, 75_000, 25_000):
        thumbnails = make_thumbnails(found, report, {"a": noise}, budget=budget)
        assert sum(len(base64.b64encode(sheet)) for sheet in thumbnails.sheets) <= 1.1 * budget
        sizes.append(thumbnails.size)
    assert sizes[0] == 128
    assert sizes[0] > sizes[1] > sizes[2] >= 32
    assert make_thumbnails(found, report, {"a": noise}, budget=1).size == 32


@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
def test_the_middle_of_a_patch_that_is_not_square_is_shown(shape):
    found, report = of_patches(4, "a")

    def framed(id: str) -> np.ndarray:
        height, width = shape
        pixels = np.full((*shape, 3), (20, 20, 220), dtype=np.uint8)
        top, left = (height - 64) // 2, (width - 64) // 2
        pixels[top : top + 64, left : left + 64] = (200, 30, 30)
        return pixels

    thumbnails = make_thumbnails(found, report, {"a": framed}, budget=PAGE_BYTES)
    assert thumbnails.size == 64
    for row in range(4):
        assert np.abs(drawn(thumbnails, row)[8:-8, 8:-8] - (200, 30, 30)).max() < 25


def test_no_patches_at_hand_are_no_thumbnails():
    found, report = of_patches(3, "a")
    thumbnails = make_thumbnails(found, report, {}, budget=PAGE_BYTES)
    assert (thumbnails.sheets, thumbnails.picture.tolist()) == ((), [-1, -1, -1])


@pytest.fixture
def own_patches(tmp_path) -> Path:
    """A CSV of 36 patches, each of its own colour, a third of them for testing."""
    folder = tmp_path / "own"
    folder.mkdir()
    lines = ["path,label,group,split,domain"]
    for k in range(36):
        Image.new("RGB", (32, 32), colour_of(str(k))).save(folder / f"{k}.png")
        label = "Atypical" if k % 3 == 0 else "Normal"
        lines.append(f"{k}.png,{label},slide {k // 4},{'test' if k > 23 else 'train'},")
    (folder / "own.csv").write_text("\n".join(lines))
    return folder / "own.csv"


def run_on(table: Path, runs: Path, **record: Any) -> Path:
    dataset = load_dataset(str(table))
    return made_run(
        runs,
        tables={dataset.name: dataset.samples},
        train=dataset.name,
        sources={dataset.name: dataset.source},
        **record,
    )


def test_the_patches_that_the_runs_saw_are_shown(own_patches, tmp_path, capsys):
    run_on(own_patches, tmp_path / "runs")
    page = page_of(tmp_path / "runs")
    check_page(page)
    assert "No pictures" not in capsys.readouterr().err
    data = embedded(page, "data")
    pictures = embedded(page, "thumbnails")
    sheets = tuple(base64.b64decode(sheet) for sheet in pictures["sheets"])
    thumbnails = gallery.Thumbnails(pictures["size"], sheets, np.array(pictures["picture"]))
    assert pictures["side"] == 16
    for row, id in enumerate(data["id"]):
        mean = drawn(thumbnails, row)[8:-8, 8:-8].mean(axis=(0, 1))
        assert np.abs(mean - colour_of(id.removesuffix(".png"))).max() < 8


@pytest.mark.parametrize("change", ["a patch", "gone", "a label", "unknown"])
def test_other_patches_than_the_runs_saw_are_not_shown(change, own_patches, tmp_path, capsys):
    folder = run_on(own_patches, tmp_path / "runs")
    if change == "a patch":
        Image.new("RGB", (32, 32), (9, 9, 9)).save(own_patches.parent / "7.png")
    elif change == "gone":
        shutil.rmtree(own_patches.parent)
    elif change == "a label":
        own_patches.write_text(own_patches.read_text().replace("0.png,Atypical", "0.png,Normal", 1))
    else:
        edit_record(folder, sources=None, label_names=None)
    page = page_of(tmp_path / "runs")
    root = check_page(page)
    assert capsys.readouterr().err.count("No pictures of own: ") == 1
    assert embedded(page, "thumbnails")["sheets"] == []
    assert set(embedded(page, "thumbnails")["picture"]) == {-1}
    assert "The patches themselves are not at hand" in root.text


def test_patches_without_named_classes_are_no_reason_to_have_no_report(own_patches, tmp_path):
    edit_record(run_on(own_patches, tmp_path / "runs"), label_names=None)
    check_page(page_of(tmp_path / "runs"))


# --- the map ----------------------------------------------------------------------------------------------------------

WIDTH = 12


def embed(store: FeatureStore, dataset: str, *, constant: bool = False, **parts: Any) -> str:
    """Embeddings of a dataset by uni; gives their fingerprint."""
    table = TABLES[dataset]
    store.put_samples(dataset, table, attrs={})
    X = np.random.default_rng(len(table)).standard_normal((len(table), WIDTH)) * np.arange(WIDTH, 0, -1) ** 2
    X = np.ones_like(X) if constant else X
    writer = store.begin(
        dataset,
        model="uni",
        view="full",
        poolings={"cls": WIDTH},
        card_pooling="cls",
        parts={"dataset": dataset} | parts,
    )
    for rows in writer.missing():
        writer.write(rows, {"cls": X[rows.start : rows.stop]})
    return store.entries(dataset, "uni")[0].fingerprint


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return FeatureStore.open_or_create(tmp_path / "store.zarr")


def test_a_map_is_the_principal_components_of_the_embeddings(store, tmp_path):
    fingerprints = {name: embed(store, name) for name in ("ami-br", "atnorm-br")}
    made_run(tmp_path / "runs", store=str(store.path), fingerprints=fingerprints)
    report, runs = collected(tmp_path / "runs")
    found = select_patches(report, runs)
    (one,) = embedding_maps(found, report, runs, store)
    assert one.title == "uni, full, card"
    rows, X = [], []
    for row, (on, id) in enumerate(zip(found.set_index.tolist(), found.id.tolist(), strict=True)):
        name = report.sets[on].dataset
        if name in fingerprints:
            rows.append(row)
            at = TABLES[name].id.tolist().index(id)
            X.append(store.read(name, model="uni", view="full", pooling="cls", rows=np.array([at]))[0])
    reference = PCA(4, svd_solver="full").fit(np.array(X, dtype=np.float64))
    expected = reference.transform(np.array(X, dtype=np.float64))
    mine = one.coordinates[rows]
    sign = np.sign((mine * expected).sum(axis=0))
    np.testing.assert_allclose(mine * sign, expected, atol=1e-3 * np.abs(expected).max())
    assert one.explained == pytest.approx(reference.explained_variance_ratio_, abs=1e-4)
    unknown = np.setdiff1d(np.arange(len(found.id)), rows)
    assert {report.sets[on].dataset for on in found.set_index[unknown]} == {"atnorm-md"}
    assert np.isnan(one.coordinates[unknown]).all()

    page = page_of(tmp_path / "runs")
    root = check_page(page)
    (drawn_map,) = embedded(page, "data")["maps"]
    for column in drawn_map["components"]:
        assert [k for k, value in enumerate(column) if value is None] == unknown.tolist()
        known = [value for value in column if value is not None]
        assert (min(known), max(known)) == (0, 1000)
    assert "uni, full, card" in root.text


def test_embeddings_of_another_fingerprint_are_not_mapped(store, tmp_path):
    embed(store, "ami-br")
    made_run(tmp_path / "runs", store=str(store.path), fingerprints={"ami-br": "another"})
    report, runs = collected(tmp_path / "runs")
    assert embedding_maps(select_patches(report, runs), report, runs, store) == []
    assert "No map:" in check_page(page_of(tmp_path / "runs")).text


def test_every_run_of_a_backbone_brings_its_sets_to_the_map(store, tmp_path):
    fingerprints = {name: embed(store, name) for name in ("ami-br", "atnorm-br")}
    made_run(tmp_path, "uni", store=str(store.path), fingerprints=fingerprints)
    last = made_run(
        tmp_path, "uni", tables={"ami-br": TABLES["ami-br"]}, fingerprints={"ami-br": fingerprints["ami-br"]}, seed=1
    )
    edit_record(last, created="2099-01-01T00:00:00Z")
    report, runs = collected(tmp_path)
    found = select_patches(report, runs)
    (one,) = embedding_maps(found, report, runs, store)
    on = [report.sets[k].dataset for k in found.set_index[np.isfinite(one.coordinates[:, 0])]]
    assert set(on) == {"ami-br", "atnorm-br"}


def test_embeddings_that_are_all_equal_leave_the_page_whole(store, tmp_path):
    fingerprint = embed(store, "ami-br", constant=True)
    made_run(tmp_path / "runs", store=str(store.path), fingerprints={"ami-br": fingerprint})
    check_page(page_of(tmp_path / "runs"))


def test_the_store_that_was_probed_is_found_or_a_given_one_refused(store, tmp_path):
    made_run(tmp_path / "runs", store=str(store.path))
    runs, _ = read_runs(tmp_path / "runs")
    assert open_store(runs, None).path == store.path
    shutil.rmtree(store.path)
    assert open_store(runs, None) is None
    with pytest.raises(UserError, match=r"store\.zarr"):
        open_store(runs, store.path)


# --- provenance -------------------------------------------------------------------------------------------------------


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


def test_patches_of_one_s_own_are_extracted_from_where_they_lie(own_patches, tmp_path):
    folder = run_on(own_patches, tmp_path)
    extract, _ = commands(read_run(folder))
    assert options_of(extract)["dataset"] == str(own_patches.resolve())


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def fm_report(tmp_path, monkeypatch, capsys):
    """fm-report in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["fm-report", "--replicates", "200", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            report_main()
        stdout, stderr = capsys.readouterr()
        assert "Traceback" not in stderr
        return Done(ended.value.code or 0, stdout, stderr)

    return call


def refused(done: Done) -> str:
    """The one message of a command that failed."""
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.count("error: ") == 1
    return done.stderr


def test_the_bare_command_writes_a_page_and_nothing_on_stdout(fm_report, tmp_path):
    two_runs(tmp_path / "runs")
    done = fm_report()
    assert (done.status, done.stdout) == (0, "")
    assert re.search(r"report\.html: 2 runs on 4 sets, [0-9.]+ MB\n$", done.stderr)
    check_page((tmp_path / "report.html").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "runs"]


def test_one_run_is_one_run(fm_report, tmp_path):
    made_run(tmp_path / "runs", tables={"mine": patches("mine", 36, test_from=36)}, train="mine")
    assert "report.html: 1 run on 1 set, " in fm_report().stderr


@pytest.mark.parametrize("format", ["markdown", "latex"])
def test_tables_go_to_stdout_alone(format, fm_report, tmp_path):
    two_runs(tmp_path / "runs")
    done = fm_report("--format", format)
    assert (done.status, done.stderr) == (0, "")
    assert ("| uni probe |" if format == "markdown" else "\nuni probe & ") in done.stdout
    assert not (tmp_path / "report.html").exists()
    written = fm_report("--format", format, "--out", "deep/er/table.txt")
    assert written.stdout == ""
    assert (tmp_path / "deep/er/table.txt").read_text() == done.stdout


def test_json_is_one_object_alone_on_stdout(fm_report, tmp_path):
    two_runs(tmp_path / "runs")
    for arguments in ([], ["--format", "markdown"]):
        found = json.loads(fm_report("--json", *arguments).stdout)
        assert found["labels"] == ["uni probe", "virchow probe"]
        assert [on["dataset"] for on in found["sets"]] == ["ami-br", "atnorm-br", "atnorm-md", "ami-br"]
        assert found["how"] == {"replicates": 200, "level": 0.95, "seed": 42}


def test_runs_may_be_named(fm_report, tmp_path):
    first, _ = two_runs(tmp_path / "elsewhere")
    found = json.loads(fm_report(first, "--json").stdout)
    assert found["labels"] == ["uni probe"]


def test_a_page_is_replaced_whole_and_kept_when_the_command_fails(fm_report, tmp_path):
    first, second = two_runs(tmp_path / "runs")
    page = tmp_path / "report.html"
    page.write_text("the page before" * 1_000_000)
    shutil.move(second, tmp_path / "aside")
    assert fm_report().status == 0
    check_page(page.read_text())
    before = page.read_bytes()
    edit_row(first / "predictions.csv", 2, "group", "slide 9")
    assert "predictions.csv is not the file that the run wrote" in refused(fm_report())
    assert page.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", "report.html", "runs"]


def test_what_cannot_be_done_is_one_message(fm_report, tmp_path):
    made_run(tmp_path / "runs")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert "unknown format 'pdf': use html, markdown or latex" in refused(fm_report("--format", "pdf"))
    assert "5 replicates: an interval needs at least 100" in refused(fm_report("--replicates", "5"))
    assert "no run has folds abcd" in refused(fm_report("--folds", "abcd"))
    assert "none does not exist" in refused(fm_report("--runs", "none"))
    assert "file is not a folder" in refused(fm_report("--runs", "file"))
    assert "file is not a finished run" in refused(fm_report("file"))
    assert "none.zarr" in refused(fm_report("--store", "none.zarr"))
    for out in ("folder", "file/report.html", "folder/.."):
        assert "cannot write" in refused(fm_report("--out", out)), out
    assert (tmp_path / "file").read_text() == ""
    assert not list((tmp_path / "folder").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "runs"]


def test_hostile_names_do_not_drive_the_terminal(fm_report, tmp_path):
    name = "a" + CONTROL
    folder = made_run(tmp_path / "runs", tables={name: patches("x", 48, test_from=24)}, train=name)
    edit_record(folder, model=name, sources={name: name})
    for format in ("markdown", "latex", "html"):
        done = fm_report("--format", format)
        assert done.status == 0
        assert all(letter.isprintable() or letter == "\n" for letter in done.stdout + done.stderr)


def test_a_page_without_pictures_stays_small(tmp_path):
    tables = {"ami-br": patches("ami-br", 200, raters=3, test_from=140), "atnorm-br": patches("atnorm-br", 100)}
    two_runs(tmp_path, tables=tables)
    assert len(make_report(tmp_path)[0]) < 300_000


def test_predictions_of_a_patch_twice_are_refused_by_run(tmp_path):
    written = predicted(TABLES, "ami-br")
    twice = concatenate([written, written.select(np.arange(len(written.id)) == len(written.id) - 1)])
    assert isinstance(twice, Predictions)
    folder = made_run(tmp_path, predictions=twice)
    with pytest.raises(UserError, match=r"a patch occurs twice for one fold") as said:
        collected(tmp_path)
    assert str(folder) in str(said.value)


# --- every figure that is printed -------------------------------------------------------------------------------------


def on_other_slides(table: Samples) -> Samples:
    """No slide is in train and test."""
    other = np.char.add(table.group, np.where(table.split == "test", "", " of training"))
    return replace(table, group=other)


LARGER = {
    "ami-br": on_other_slides(patches("ami-br", 147, raters=3, test_from=75)),
    "atnorm-br": patches("atnorm-br", 53, slides=False),
    "atnorm-md": patches("atnorm-md", 119, raters=5, domains=3),
}
COSTS = (
    {"seconds": 1234.4, "images_per_second": 87.6, "peak_memory_mb": 4321},
    {"seconds": 5.6, "images_per_second": None, "peak_memory_mb": 99},
    {"seconds": 70, "images_per_second": 6.5, "peak_device_memory_mb": 23456, "peak_memory_mb": 1},
)


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[Element, Any, list[Any]]:
    """The page of three runs that are alike in nothing, the record of their comparison, and the runs."""
    folder = tmp_path_factory.mktemp("printed")
    rng = np.random.default_rng(5)
    for k, (model, strength) in enumerate((("uni", 0.5), ("virchow", 0.15), ("conch", 1.1))):
        points = [
            CurvePoint(fraction, draw, fold, 9 * k + 3 + 2 * fold, 1000 * k + 31 + fold, 4, 1.0, name, split, *scored)
            for fraction in (0.25, 0.7)
            for draw in range(2)
            for fold in range(N_FOLDS)
            for name, split in (("atnorm-br", "test"), ("ami-br", VALIDATION))
            for scored in [rng.uniform(0.3, 0.9, 2).tolist()]
        ]
        made = made_run(
            folder, model, tables=LARGER, signal=strength, seed=21 + k, files={"learning_curve.csv": curve_csv(points)}
        )
        edit_record(made, cost=COSTS[k], created=f"2026-01-0{k + 1}T00:00:00Z", view=f"center{60 + k}", pooling="cls")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MITOFM_DATA", str(folder / "nothing"))
        page = page_of(folder)
        report, runs = collected(folder)
    return Tree(page).root, report, runs


def cells_of(root: Element, label: str, *, header: bool = False) -> list[list[str]]:
    """The text of the rows of the one table in the region of that name."""
    (region,) = (one for one in root.all("div") if one.attributes.get("aria-label") == label)
    (part,) = region.all("thead" if header else "tbody")
    return [[" ".join(cell.text.split()) for cell in row.all("td", "th")] for row in part.all("tr")]


def three(value: float, digits: int = 3) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def with_sign(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def with_ends(one: Any) -> str:
    ends = "no interval" if np.isnan(one.low) else f"{three(one.low)}–{three(one.high)}"
    return f"{three(one.value)} {ends}"


def p_text(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}"


def run_named(runs: list[Any], cell: str) -> Any:
    (found,) = (run for run in runs if run.label in cell)
    return found


def test_the_printed_example_has_no_two_figures_alike(printed):
    """Where two of them agreed, a cell could print the one for the other."""
    _, report, runs = printed
    for on in report.sets:
        counts = [vars(on.confusion[run.label]) for run in runs]
        assert all(len(set(of.values())) == 4 for of in counts), (on.name, counts)
        for run in runs:
            found = on.comparison.judgements[run.label].figures
            assert len({with_ends(one) for one in found.values()}) == len(found) == 9
            assert all(len({three(one.value), three(one.low), three(one.high)}) == 3 for one in found.values())
        assert len({three(pair.differences[name].p_holm) for pair in on.comparison.pairs for name in COMPARED}) > 2
    assert any(rank.low < rank.high for on in report.sets for rank in on.comparison.ranks["auroc"].values())
    assert any(pair.delong for on in report.sets for pair in on.comparison.pairs)


def test_every_figure_of_the_leaderboard_is_that_of_the_record(printed):
    root, report, runs = printed
    sections = {one.attributes.get("id"): one for one in root.all("section")}
    titles = [" ".join(one.text.split()) for one in sections["leaderboard"].all("h3")]
    for on, title in zip(report.sets, titles, strict=True):
        any_run = on.comparison.judgements[runs[0].label]
        alone = f" ({any_run.n_alone} patches of unknown slide count as one each)" * bool(any_run.n_alone)
        size = f"{on.n:,} patches, {on.n_positive} Atypical"
        assert title == f"{on.title} {size}, {any_run.n_clusters:,} {any_run.unit}s{alone}"
        rows = cells_of(root, f"Leaderboard of {on.title}")
        assert len(rows) == len(runs)
        for rank, name, *figures in rows:
            run = run_named(runs, name)
            judged, folds = on.comparison.judgements[run.label], on.folds[run.label]
            place = on.comparison.ranks["auroc"][run.label]
            assert rank == f"{place.value}" + f" {place.low}–{place.high}" * (place.low != place.high)
            number = report.labels.index(run.label) + 1
            assert name == f"{number} {run.label}{run.record.view}, {run.record.pooling}"
            expected = [with_ends(judged.figures[figure]) for figure in COMPARED]
            expected += [f"{three(folds[figure].mean)} ± {three(folds[figure].std)}" for figure in COMPARED]
            assert figures[:4] == expected
            cost = run.record.cost
            memory = cost.peak_memory_mb if cost.peak_device_memory_mb is None else cost.peak_device_memory_mb
            said = [cost.seconds, cost.images_per_second, memory, 9]  # eight features and the intercept
            assert figures[-5:-1] == ["–" if value is None else f"{value:,.0f}" for value in said]
        for name, threshold, *figures in cells_of(root, f"All figures of {on.title}"):
            judged = on.comparison.judgements[run_named(runs, name).label]
            assert threshold == three(judged.threshold)
            assert figures == [with_ends(one) for one in judged.figures.values()]
        header = cells_of(root, f"All figures of {on.title}", header=True)[0]
        titles_of = ("Balanced accuracy", "AUROC", "Average precision", "Sensitivity", "Specificity")
        order = ("balanced_accuracy", "auroc", "average_precision", "sensitivity", "specificity")
        found = on.comparison.judgements[runs[0].label].figures
        assert [header[2 + list(found).index(name)] for name in order] == list(titles_of)


def test_every_difference_is_that_of_the_record_with_its_sign(printed):
    root, report, runs = printed
    numbers = {str(number): label for number, label in enumerate(report.labels, start=1)}
    marks = set()
    for on, (name, title) in itertools.product(report.sets, zip(COMPARED, ("Balanced accuracy", "AUROC"), strict=True)):
        label = f"Differences in {title} on {on.title}"
        ((_, *columns),) = cells_of(root, label, header=True)
        of = {(pair.first, pair.second): pair.differences[name] for pair in on.comparison.pairs}
        for row, *cells in cells_of(root, label):
            first = run_named(runs, row).label
            for column, cell in zip(columns, cells, strict=True):
                second = numbers[column]
                if first == second:
                    assert cell == "·"
                    continue
                one = of.get((first, second)) or of[second, first]
                sign = 1 if (first, second) in of else -1
                value, *ends = (sign * one.value, *sorted((sign * one.low, sign * one.high)))
                mark = ("▲ " if value > 0 else "▼ ") if one.p_holm < 0.05 else ""
                marks.add(mark)
                assert (
                    cell
                    == f"{mark}{with_sign(value)}{with_sign(ends[0])} to {with_sign(ends[1])}p {p_text(one.p_holm)}"
                )
    assert marks == {"", "▲ ", "▼ "}


def test_every_figure_of_delongs_test_is_that_of_the_record(printed):
    root, report, _ = printed
    tested = [on for on in report.sets if on.comparison.pairs[0].delong]
    assert [on.dataset for on in tested] == ["atnorm-br"]
    for on in tested:
        rows = cells_of(root, f"DeLong's test on {on.title}")
        assert rows == [
            [
                pair.first,
                pair.second,
                f"{three(pair.delong.first)}, {three(pair.delong.second)}",
                with_sign(pair.delong.value),
                three(pair.delong.standard_error),
                three(pair.delong.z, 2),
                p_text(pair.delong.p),
                p_text(pair.delong.p_holm),
            ]
            for pair in on.comparison.pairs
        ]


def test_every_count_of_a_confusion_matrix_stands_in_its_own_cell(printed):
    root, report, runs = printed
    (section,) = (one for one in root.all("section") if one.attributes.get("id") == "decisions")
    articles = list(section.all("article"))
    for on, article in zip(report.sets, articles, strict=True):
        cards = [one for one in article.all("div") if one.attributes.get("class") == "card"]
        assert len(cards) == len(runs)
        for card in cards:
            run = run_named(runs, next(card.all("h4")).text)
            judged = ensemble_of(run.predictions, on.dataset, on.split)
            said = judged.probability >= judged.threshold
            (tn, fp), (fn, tp) = confusion_matrix(judged.label, said).tolist()
            table = next(card.all("table"))
            assert next(table.all("caption")).text == f"Threshold {three(judged.threshold)}"
            assert [[cell.text for cell in row.all("td", "th")] for row in table.all("tr")] == [
                ["", "said Atypical", "said Normal"],
                ["Atypical", str(tp), str(fn)],
                ["Normal", str(fp), str(tn)],
            ]
            figures = on.comparison.judgements[run.label].figures
            names = ("sensitivity", "specificity", "brier", "ece")
            titles = ("Sensitivity", "Specificity", "Brier", "ECE")
            below = "".join(f"{title} {with_ends(figures[name])}" for name, title in zip(names, titles, strict=True))
            assert next(card.all("p")).text == below
        legends = [f"Legend of {on.title}"]
        for name, area, precision in cells_of(root, legends[0]):
            figures = on.comparison.judgements[run_named(runs, name).label].figures
            assert [area, precision] == [three(figures["auroc"].value), three(figures["average_precision"].value)]


def test_every_figure_beside_the_raters_is_that_of_the_record(printed):
    root, report, runs = printed
    rated = [on for on in report.sets if on.raters]
    assert [on.dataset for on in rated] == ["ami-br", "atnorm-md", "ami-br"]
    for on in rated:
        for name, *cells in cells_of(root, f"Agreement on {on.title}"):
            view = on.raters[run_named(runs, name).label]
            expected = [
                text
                for part in (view.unanimous, view.disputed)
                for text in (f"{part.n:,} ({part.n_positive})", *(with_ends(part.figures[name]) for name in COMPARED))
            ]
            assert cells == expected
        rows = [cells[-6:] for cells in cells_of(root, f"Raters on {on.title}")]
        expected = []
        for label in on.raters:
            for number, rater in enumerate(on.raters[label].raters, start=1):
                texts = [
                    f"{with_ends(who['balanced_accuracy'])} "
                    f"({three(who['sensitivity'].value)} / {three(who['specificity'].value)})"
                    for who in (rater.rater, rater.run)
                ]
                one = rater.difference
                ends = f"{with_sign(one.low)} to {with_sign(one.high)}" if not np.isnan(one.low) else "– to –"
                expected.append(
                    [
                        str(number),
                        f"{rater.n:,} ({rater.n_positive})",
                        *texts,
                        f"{with_sign(one.value)}{ends}",
                        p_text(one.p_holm) if not np.isnan(one.p_holm) else "–",
                    ]
                )
        assert rows == expected


def test_every_figure_by_domain_is_that_of_the_record(printed):
    root, report, runs = printed
    (on,) = (on for on in report.sets if on.domains)
    for name, title in zip(COMPARED, ("Balanced accuracy", "AUROC"), strict=True):
        label = f"{title} by domain on {on.title}"
        first = on.domains[runs[0].label].domains
        assert cells_of(root, label, header=True)[0] == [
            "Run",
            *(f"{k}{of.n:,} ({of.n_positive}), {of.n_clusters} {of.unit}s" for k, of in first.items()),
            "Mean of domains",
            "Worst",
        ]
        for run, *cells in cells_of(root, label):
            view = on.domains[run_named(runs, run).label]
            worst = view.worst[name]
            assert cells == [
                *(with_ends(of.figures[name]) for of in view.domains.values()),
                with_ends(view.macro[name]),
                f"{worst.domain} {three(worst.value)} {worst.share:.0%}",
            ]


def test_every_figure_of_a_learning_curve_is_the_mean_of_its_models(printed):
    root, report, runs = printed
    for on in report.sets:
        points = {
            run.label: [one for one in run.curve if (one.dataset, one.split) == (on.dataset, on.split)] for run in runs
        }
        if not any(points.values()):
            continue
        found = [cells[-6:] for cells in cells_of(root, f"Learning curves on {on.title}")]
        expected = []
        for run, fraction in itertools.product(runs, (0.25, 0.7)):
            of = [one for one in points[run.label] if one.fraction == fraction]
            means = [np.mean([getattr(one, name) for one in of]) for name in ("n_slides", "n_patches")]
            scores_of = [[getattr(one, name) for one in of] for name in COMPARED]
            expected.append(
                [
                    f"{fraction:g}",
                    f"{means[0]:.0f}",
                    f"{means[1]:,.0f}",
                    "6",
                    *(f"{np.mean(of_one):.3f} ± {np.std(of_one):.3f}" for of_one in scores_of),
                ]
            )
        assert found == expected
