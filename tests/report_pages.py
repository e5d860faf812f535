"""How do tests make reports, and read the pages?"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from test_runs import N_FOLDS, made_run

from extract.datasets import load_dataset
from features.samples import Samples, make_samples
from finetune.report import make_report
from probe.predictions import VALIDATION, concatenate, predictions_of
from probe.records import FoldsRecord, RunRecord
from probe.report.collect import collect
from probe.report.read import read_runs
from probe.resample import Resampling

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
CONTROL = "\x1b[31m\u202egnp.exe\x07\n"


def two_runs(runs: Path, **record: Any) -> tuple[Path, Path]:
    return made_run(runs, "uni", signal=0.6, **record), made_run(runs, "virchow", signal=0.3, seed=1, **record)


def collected(runs: Path, **options: Any):
    read, notes = read_runs(runs, **options)
    return collect(read, notes, resampling=QUICK), read


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


# --- more than two classes --------------------------------------------------------------------------------------------

PHASES = ("prophase", "metaphase", "anaphase", "telophase", "none of <b>these</b>")


def patches_of_classes(name: str, n: int, n_classes: int, *, lacking: Collection[int] = (), votes: int = 0) -> Samples:
    """A patch table: six patches a slide, two thirds of the slides for training; lower classes are more frequent."""
    rng = np.random.default_rng(n)
    label = np.minimum(rng.integers(0, n_classes, n), rng.integers(0, n_classes, n))
    label[:n_classes] = label[-n_classes:] = np.arange(n_classes)
    is_test = np.arange(n) // 6 % 3 == 2
    for k in lacking:
        label[is_test & (label == k)] = (k + 1) % n_classes
    given = np.repeat(label[:, None], votes, axis=1)
    if votes:
        given[::3, 0] = (label[::3] + 1) % n_classes
    return make_samples(
        [f"{name}/{k:04}.png" for k in range(n)],
        label.tolist(),
        group=[f"{name} slide {k // 6}" for k in range(n)],
        split=["test" if of else "train" for of in is_test],
        votes=given.astype(np.int8),
        domain=[f"lab {k // 6 % 2}" for k in range(n)],
        sha256=[f"{name} {k}" for k in range(n)],
    )


def run_of_classes(
    runs: Path,
    table: Samples,
    classes: Sequence[str] = PHASES,
    model: str = "uni",
    *,
    signal: float = 1.0,
    seed: int = 0,
    train: str = "cells",
    **record: Any,
) -> Path:
    """A run that tells classes apart, and takes each for the next one rather than for others."""
    rng = np.random.default_rng(seed)
    c = len(classes)
    likeness = np.eye(c) + 0.5 * np.eye(c, k=1)

    def logit(samples: Samples, n_models: int) -> np.ndarray:
        scores = 3 * signal * likeness[samples.label] + rng.standard_normal((len(samples), c))
        each = scores[:, None] + 0.3 * rng.standard_normal((len(samples), n_models, c))
        return (each[..., 1:] - each[..., :1]).astype(np.float32)

    trained, tested = (table.select(table.split == split) for split in ("train", "test"))
    fold = np.arange(len(trained))[:, None] // 6 % N_FOLDS
    parts = [predictions_of(train, trained, split=VALIDATION, fold=fold, logit=logit(trained, 1))]
    if len(tested):
        parts.append(predictions_of(train, tested, split="test", fold=np.arange(N_FOLDS), logit=logit(tested, N_FOLDS)))
    return made_run(
        runs,
        model,
        tables={train: table},
        train=train,
        predictions=concatenate(parts),
        label_names=list(classes),
        **record,
    )


def runs_of_classes(
    runs: Path, table: Samples | None = None, *, classes: Sequence[str] = PHASES, n: int = 4, **options: Any
) -> list[Path]:
    """Runs of these classes, each less good than the one before."""
    table = patches_of_classes("cells", 240, len(PHASES), votes=3) if table is None else table
    return [run_of_classes(runs, table, classes, f"model-{k}", signal=1 - 0.2 * k, seed=k, **options) for k in range(n)]


# --- pages of their own patches ---------------------------------------------------------------------------------------


def colour_of(id: str) -> tuple[int, int, int]:
    k = int(id)
    return (40 + k * 37 % 180, 40 + k * 59 % 180, 40 + k * 83 % 180)


def draw_own_patches(within: Path) -> Path:
    """A CSV of 36 patches, each of its own colour, a third of them for testing."""
    folder = within / "own"
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


def table_of(root: Element, label: str, *, header: bool = False) -> list[list[Element]]:
    """The cells of the one table in the region of that name, row by row."""
    (region,) = (one for one in root.all("div") if one.attributes.get("aria-label") == label)
    (part,) = region.all("thead" if header else "tbody")
    return [list(row.all("td", "th")) for row in part.all("tr")]


def cells_of(root: Element, label: str, *, header: bool = False) -> list[list[str]]:
    """The same as text."""
    return [[" ".join(cell.text.split()) for cell in row] for row in table_of(root, label, header=header)]
