"""Does the page of fm-report work in a browser, offline: nothing asked for, nothing broken, everything in reach?

Debian's chromium, driven by playwright. Where either is missing, every test here is skipped and says what to install.
Screenshots and a PDF are kept in `test-artefacts/` (or `$MITOFM_ARTEFACTS`), for whoever wants to look.
"""

from __future__ import annotations

import colorsys
import csv
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image
from test_runs import edit_record, unscored

from extract.datasets import load_dataset
from features.folds import grouped_folds
from features.samples import Samples, make_samples
from features.store import FeatureStore
from finetune.report import make_report, write_report
from probe.predictions import concatenate, predictions_of, threshold_of
from probe.probing import ProbeOptions, probe_store
from probe.records import Cost, FoldsRecord, RunRecord
from probe.report.collect import collect
from probe.report.gallery import EmbeddingMap, make_thumbnails, select_patches
from probe.report.page import html, with_thumbnails
from probe.report.read import read_runs
from probe.resample import Resampling
from probe.runs import read_predictions, read_run, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ARTEFACTS = Path(os.environ.get("MITOFM_ARTEFACTS", REPOSITORY / "test-artefacts"))
# No sandbox: root has none, and the page is our own. The rest keeps chromium itself off the network.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW = {"width": 1366, "height": 900}, {"width": 400, "height": 800}
PER_CLICK = 48  # tiles that "Show more" adds
SIDE = 32  # pixels of a patch, and of its thumbnail: nothing is resampled
MAP_WIDTH, MAP_HEIGHT, MAP_MARGIN = 760, 520, 14
DOMAINS = ("lab A", '<b>lab</b> "B" & </script>')  # a name may hold anything
HOSTILE = "<img src=x onerror=alert(1)> & 'y'.png"
SHARP, DULL = "vit_large_patch14_reg4.sharp", "vit_large_patch14_reg4.dull"  # as long as real names
QUICK = Resampling(replicates=100)
TEXT = 4.5  # WCAG 2, AA: contrast of text
GRAPHICS = 3.0  # and of what must be seen to read a graphic

OPEN_ALL = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
TILES = """[...document.querySelectorAll('.tile')].map((tile) =>
    [tile.querySelector('figcaption').lastChild.textContent, tile.title.split('\\n')[0]])"""
# By way of another canvas: chromium warns of reading the same one again and again.
MIDDLE_OF = """(canvas) => {
    const pixel = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    pixel.drawImage(canvas, -canvas.width / 2, -canvas.height / 2);
    return [...pixel.getImageData(0, 0, 1, 1).data];
}"""
PAINTED = f"(where) => [...document.querySelectorAll(where)].every((canvas) => ({MIDDLE_OF})(canvas)[3] === 255)"
DRAWN = "document.getElementById('canvas').toDataURL()"
COLOURS = """(names) => Object.fromEntries(names.map((name) =>
    [name, getComputedStyle(document.documentElement).getPropertyValue(name).trim()]))"""


# ------------------------------------------------------------------------------------------------------------- the page


@dataclass(frozen=True, eq=False)
class Made:
    """A page and what it was made from.

    Attributes:
        page: the file.
        runs: the run folders, by date.
        tables: dataset to its patch table, votes included.
        colour: dataset to the (n, 3) colours of its patches.
    """

    page: Path
    runs: tuple[Path, ...]
    tables: dict[str, Samples]
    colour: dict[str, np.ndarray]


def draw(folder: Path, dataset: str, n: int, *, split: bool) -> np.ndarray:
    """Write n patches, each of a colour of its own, and a CSV that lists them; returns the (n, 3) colours."""
    colours = [colorsys.hsv_to_rgb(row / n, 0.35 + 0.15 * (row % 3), 0.9 - 0.1 * (row % 4)) for row in range(n)]
    colour = np.rint(255 * np.array(colours)).astype(np.uint8)
    (folder / dataset).mkdir()
    with (folder / f"{dataset}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "split", "domain"])
        for row in range(n):
            path = f"{dataset}/{HOSTILE if split and row == 0 else f'{row:03}.png'}"
            Image.new("RGB", (SIDE, SIDE), tuple(colour[row].tolist())).save(folder / path)
            slide = row // 3
            part = ("test" if slide % 4 == 0 else "train") if split else ""
            label = "Atypical" if (row * 7) % 10 < 4 else "Normal"
            writer.writerow([path, label, f"{dataset} slide {slide}", part, DOMAINS[slide % 2]])
    return colour


def embed(store: FeatureStore, dataset: str, model: str, samples: Samples, *, signal: float) -> None:
    """Embeddings that tell the classes apart, as far as the signal goes."""
    rng = np.random.default_rng(len(samples))
    X = rng.standard_normal((len(samples), 8)) + signal * samples.label[:, None]
    writer = store.begin(
        dataset, model=model, view="full", poolings={"pooled": 8}, card_pooling="pooled", parts={"model": model}
    )
    for rows in writer.missing():
        writer.write(rows, {"pooled": X[rows.start : rows.stop].astype(np.float32)})


def logit(p: float | np.ndarray) -> np.ndarray:
    return np.log(np.asarray(p) / (1 - np.asarray(p)))


def adapted(runs: Path, like: Path, samples: Samples) -> Path:
    """Write a run as fine-tuning does: votes, no predictions of the second dataset, and a threshold between two scores
    that four digits do not tell apart."""
    rng = np.random.default_rng(1)
    rows = samples.training_rows
    training, test = samples.select(rows), samples.select(np.flatnonzero(samples.split == "test"))
    folds = grouped_folds(training, 3, seed=42)
    p = np.where(training.label == 1, rng.uniform(0.6, 0.9, len(rows)), rng.uniform(0.1, 0.4, len(rows)))
    positive, negative = np.flatnonzero(training.label == 1), np.flatnonzero(training.label == 0)
    p[positive[0]], p[negative[0]] = 0.50003, 0.50001
    p[positive[1:3]], p[negative[1:3]] = (0.03, 0.08), (0.97, 0.91)  # mistakes, and sure of them
    judged = logit(rng.uniform(0.05, 0.95, (len(test), 3)) * 0.5 + 0.25 * test.label[:, None])
    predictions = concatenate(
        [
            predictions_of(
                "patches", training, split="validation", fold=folds.fold[:, None], logit=logit(p)[:, None, None]
            ),
            predictions_of("patches", test, split="test", fold=np.arange(3), logit=judged[..., None]),
        ]
    )
    record = replace(
        read_run(like),
        kind="finetune",
        method="lora",
        test=(),
        options={"cv": 3, "lora": {"rank": 8}, "epochs": 2},
        n_trained=1234,
        cost=Cost(images_per_second=70.0),
        learning_curve=None,
    )
    with unscored():
        written = write_run(
            runs,
            record,
            predictions=predictions,
            tables={"patches": samples},
            weights={},
            seconds=12.0,
        )
    assert written.folder is not None
    return written.folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """Three runs on drawn patches: two probes, one of them with a learning curve, and an adapted backbone."""
    folder = tmp_path_factory.mktemp("report")
    colour = {"patches": draw(folder, "patches", 120, split=True), "others": draw(folder, "others", 36, split=False)}
    store = FeatureStore.open_or_create(folder / "store.zarr")
    tables = {}
    for name in colour:
        dataset = load_dataset(str(folder / f"{name}.csv"))
        tables[name] = dataset.samples
        store.put_samples(
            name, dataset.samples, attrs={"source": dataset.source, "label_names": list(dataset.label_names)}
        )
        for model, signal in ((SHARP, 1.0), (DULL, 0.3)):
            embed(store, name, model, dataset.samples, signal=signal)
    runs = folder / "runs"
    probes = [
        probe_store(store, [model], options=ProbeOptions(cv=3, train="patches", fractions=fractions), runs=runs)[
            0
        ].folder
        for model, fractions in ((SHARP, (0.5, 1.0)), (DULL, ()))
    ]
    votes = np.tile(tables["patches"].label[:, None], 3)
    votes[::3, 1] ^= 1  # every third patch is disputed
    votes[::10, 2] = -1  # and some lack a vote
    tables["patches"] = replace(tables["patches"], votes=votes)
    folders = (*probes, adapted(runs, probes[0], tables["patches"]))
    for day, run in enumerate(folders, start=1):  # runs stand by date, and these are all of one second
        edit_record(run, created=f"2025-01-0{day}T00:00:00Z")
    text, _, _ = make_report(runs, resampling=QUICK)
    page = folder / "report.html"
    write_report(text, page)
    return Made(page, folders, tables, colour)


# ---------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("playwright is not installed: pip install -e '.[test]'")
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, INSTALLED)), own if Path(own).exists() else None)
        if path is None:
            pytest.skip("chromium is not installed: sudo apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


Open = Callable[..., AbstractContextManager["Page"]]


@contextmanager
def opened(browser: Browser, file: Path, *, folded: bool = False, **options: Any) -> Iterator[Page]:
    """The page in a fresh, offline context, all of it open unless `folded`.

    At the end, nothing may have been asked for and nothing have gone wrong.
    """
    context = browser.new_context(offline=True, **{"viewport": WIDE, **options})
    page = context.new_page()
    said = listen(page)
    page.goto(file.as_uri(), wait_until="load")
    if not folded and options.get("java_script_enabled", True):
        page.evaluate(OPEN_ALL)
    yield page
    page.wait_for_timeout(1)  # events on their way arrive
    context.close()
    assert said == [("request", file.as_uri())]


def listen(page: Page) -> list[tuple[str, str]]:
    """Fills with every request and every complaint of the page."""
    said: list[tuple[str, str]] = []

    def tell(kind: str, what: str) -> None:
        if urlsplit(what).scheme not in ("data", "blob"):  # the page itself, and what it saves
            said.append((kind, what))

    page.on("request", lambda request: tell("request", request.url))
    page.on("console", lambda message: tell(message.type, message.text))
    page.on("pageerror", lambda error: tell("error", str(error)))
    page.expose_function("violated", lambda what: tell("violation", what))
    page.add_init_script("addEventListener('securitypolicyviolation', (event) => violated(event.violatedDirective))")
    return said


@pytest.fixture
def open_page(browser, made) -> Open:
    return lambda **options: opened(browser, made.page, **options)


def keep(name: str) -> Path:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    return ARTEFACTS / name


# -------------------------------------------------------------------------------------------------------------- offline


def test_the_page_asks_for_nothing_and_nothing_goes_wrong(open_page):
    with open_page() as page:
        page.mouse.wheel(0, 20_000)
        page.wait_for_function(PAINTED, arg=".tile canvas")
        assert page.locator("main section").count() == 14  # all but the trainings: none of the runs has two
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=keep("report-light.png"), full_page=True)


def test_what_the_page_must_not_do_would_be_noticed(browser, made):
    context = browser.new_context(offline=True)
    page = context.new_page()
    said = listen(page)
    page.goto(made.page.as_uri())
    page.evaluate("fetch('https://example.org/').catch(() => {})")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), { textContent: 'alert(1)' }))")
    page.wait_for_timeout(50)
    context.close()
    assert {what for kind, what in said if kind == "violation"} == {"connect-src", "script-src-elem"}
    assert "error" in {kind for kind, _ in said}


def test_names_of_files_and_domains_are_text(open_page, made):
    assert any(HOSTILE in id for id in made.tables["patches"].id.tolist())
    with open_page() as page:
        page.fill("#filters [name=search]", "onerror")
        page.select_option("#filters [name=outcome]", "")
        assert [id for _, id in page.evaluate(TILES)] == [f"patches/{HOSTILE}"]
        assert page.locator("#filters [name=domain] option").all_inner_texts() == ["all", *sorted(DOMAINS)]
        assert page.locator("main img, main b").count() == 0


# -------------------------------------------------------------------------------------------------------------- gallery


@dataclass(frozen=True)
class Patch:
    """What is known of a patch in one set, from the run folders: scores by run, thresholds, votes."""

    set: str
    id: str
    label: int
    group: str
    domain: str
    votes: tuple[int, ...]
    probability: dict[int, float]
    threshold: dict[int, float]

    def outcome(self, run: int) -> str:
        if run not in self.probability:
            return "none"
        said = self.probability[run] >= self.threshold[run]
        return "right" if said == (self.label == 1) else "alarm" if said else "missed"

    @property
    def dissent(self) -> float:
        given = [vote for vote in self.votes if vote >= 0]
        return min(given.count(1), given.count(0)) / len(given) if len(given) > 1 else 0.0

    @property
    def spread(self) -> float:
        return max(self.probability.values()) - min(self.probability.values())

    def wrongness(self, run: int) -> float:
        """How far beyond the threshold a mistake lies, as a share of the way there; below zero for what is right."""
        if run not in self.probability:
            return -2.0
        p, t = self.probability[run], self.threshold[run]
        beyond = (p - t) / (1 - t) if p >= t else (t - p) / t
        return -beyond if self.outcome(run) == "right" else beyond


@pytest.fixture(scope="module")
def patches(made) -> list[Patch]:
    probability: dict[tuple[str, str], dict[int, float]] = {}
    threshold = {}
    for run, folder in enumerate(made.runs):
        predictions = read_predictions(folder)
        threshold[run] = threshold_of(predictions)
        scores: dict[tuple[str, str], list[float]] = {}
        columns = (predictions.dataset, predictions.split, predictions.id, predictions.probability[:, 1])
        for dataset, split, id, p in zip(*(column.tolist() for column in columns), strict=True):
            scores.setdefault((f"{dataset}, {'out of fold' if split == 'validation' else split}", id), []).append(p)
        for key, values in scores.items():
            probability.setdefault(key, {})[run] = float(np.mean(values))
    found = []
    for (title, id), of in probability.items():
        table = made.tables[title.partition(",")[0]]
        row = table.id.tolist().index(id)
        found.append(
            Patch(
                title,
                id,
                int(table.label[row]),
                str(table.group[row]),
                str(table.domain[row]),
                tuple(table.votes[row].tolist()),
                of,
                threshold,
            )
        )
    return found


def all_tiles(page: Page) -> list[tuple[str, str]]:
    while page.locator("#more").is_visible():
        page.click("#more")
    return [(title, id) for title, id in page.evaluate(TILES)]


def held_out(patch: Patch) -> bool:
    return not patch.set.endswith("out of fold")


FILTERS: dict[str, tuple[dict[str, str], Callable[[Patch], bool]]] = {
    "at first": ({}, lambda patch: held_out(patch) and patch.outcome(0) in ("missed", "alarm")),
    "run": ({"run": "1"}, lambda patch: held_out(patch) and patch.outcome(1) in ("missed", "alarm")),
    "all outcomes": ({"outcome": ""}, held_out),
    "a set": ({"set": "others, test", "outcome": ""}, lambda patch: patch.set == "others, test"),
    "out of fold": ({"set": "patches, out of fold", "outcome": ""}, lambda patch: not held_out(patch)),
    "label": ({"label": "1", "outcome": ""}, lambda patch: held_out(patch) and patch.label == 1),
    "the other label": ({"label": "0", "outcome": ""}, lambda patch: held_out(patch) and patch.label == 0),
    "missed": ({"outcome": "missed"}, lambda patch: held_out(patch) and patch.outcome(0) == "missed"),
    "false": ({"outcome": "alarm"}, lambda patch: held_out(patch) and patch.outcome(0) == "alarm"),
    "right": ({"outcome": "right"}, lambda patch: held_out(patch) and patch.outcome(0) == "right"),
    "disputed": ({"agreement": "disputed", "outcome": ""}, lambda patch: held_out(patch) and patch.dissent > 0),
    "unanimous": (
        {"agreement": "unanimous", "outcome": ""},
        lambda patch: held_out(patch) and patch.dissent == 0 and len(patch.votes) > 1,
    ),
    "domain": ({"domain": DOMAINS[1], "outcome": ""}, lambda patch: held_out(patch) and patch.domain == DOMAINS[1]),
    "slide": ({"search": " SLIDE 4 ", "outcome": ""}, lambda patch: held_out(patch) and "slide 4" in patch.group),
    "file": ({"search": "/01", "outcome": ""}, lambda patch: held_out(patch) and "/01" in patch.id),
    "several": (
        {"run": "2", "set": "patches, out of fold", "label": "1", "outcome": "missed", "agreement": "unanimous"},
        lambda patch: not held_out(patch) and patch.label == 1 and patch.outcome(2) == "missed" and patch.dissent == 0,
    ),
    "nothing": ({"search": "no such patch"}, lambda patch: False),
}


def choose(page: Page, wanted: dict[str, str], form: str = "#filters") -> None:
    for name, value in wanted.items():
        if name == "search":
            page.fill(f"{form} [name=search]", value)
            page.press(f"{form} [name=search]", "Enter")  # sends the form nowhere
        elif name in ("set", "domain") and value:
            page.select_option(f"{form} [name={name}]", label=value)
        else:
            page.select_option(f"{form} [name={name}]", value)


def test_every_filter_shows_the_patches_that_it_names(open_page, patches):
    with open_page() as page:
        start = page.evaluate("Object.fromEntries(new FormData(document.getElementById('filters')))")
        texts = {
            name: page.locator(f"#filters [name={name}] option:checked").inner_text() for name in ("set", "domain")
        }
        for name, (wanted, accept) in FILTERS.items():
            choose(page, wanted)
            expected = {(patch.set, patch.id) for patch in patches if accept(patch)}
            n = len(expected)
            assert page.inner_text("#count") == f"{min(n, PER_CLICK)} of {n} patches", name
            found = all_tiles(page)
            assert len(found) == n, name
            assert set(found) == expected, name
            choose(page, {key: texts[key] if key in texts else start[key] for key in wanted})
        assert any(len(wanted) > 1 for wanted, _ in FILTERS.values())


def test_the_gallery_counts_the_mistakes_that_the_tables_count(open_page, patches):
    with open_page() as page:
        figures = json.loads(page.inner_text("#figures") or page.text_content("#figures") or "")
        labels = page.locator("#filters [name=run] option").all_inner_texts()
        for on in figures["sets"]:
            title = f"{on['dataset']}, {'out of fold' if on['split'] == 'validation' else on['split']}"
            for run, label in enumerate(labels):
                if label not in on["confusion"]:
                    continue
                for outcome, (row, column) in (("missed", (1, 0)), ("alarm", (0, 1))):
                    choose(page, {"run": str(run), "set": title, "outcome": outcome})
                    n = int(page.inner_text("#count").split(" of ")[1].split()[0])
                    assert n == on["confusion"][label][row][column], (title, label, outcome)


ORDERS: dict[str, Callable[[Patch], float]] = {
    "wrong": lambda patch: patch.wrongness(0),
    "disputed": lambda patch: patch.dissent,
    "differ": lambda patch: patch.spread,
    "high": lambda patch: patch.probability[0],
    "low": lambda patch: -patch.probability[0],
}


def test_every_order_is_that_of_its_figure(open_page, patches):
    of = {(patch.set, patch.id): patch for patch in patches}
    seen = []
    with open_page() as page:
        choose(page, {"outcome": ""})
        for name, key in ORDERS.items():
            choose(page, {"order": name})
            found = all_tiles(page)
            values = np.array([key(of[one]) for one in found])
            assert (np.diff(values) < 1e-3).all(), name  # scores travel with four digits
            seen.append(found)
    assert len({tuple(found) for found in seen}) == len(ORDERS)


def test_show_more_adds_tiles_and_goes_away_at_the_end(open_page, patches):
    n = sum(map(held_out, patches))
    assert PER_CLICK < n < 2 * PER_CLICK
    with open_page() as page:
        choose(page, {"outcome": ""})
        first = page.evaluate(TILES)
        assert len(first) == PER_CLICK
        assert page.inner_text("#more") == f"Show {n - PER_CLICK} more"
        page.click("#more")
        assert page.evaluate(TILES)[:PER_CLICK] == first
        assert page.inner_text("#count") == f"{n} of {n} patches"
        assert not page.locator("#more").is_visible()


def test_a_tile_shows_its_patch_and_what_is_known_of_it(open_page, made, patches):
    of = {(patch.set, patch.id): patch for patch in patches}
    with open_page() as page:
        choose(page, {"outcome": "", "order": "differ"})
        tiles = page.locator(".tile")
        page.wait_for_function(PAINTED, arg=".tile canvas")
        keys = [(title, id) for title, id in page.evaluate(TILES)]
        colours = tiles.locator("canvas").evaluate_all(f"(all) => all.map({MIDDLE_OF})")
        for key, colour in zip(keys, colours, strict=True):
            dataset = key[0].partition(",")[0]
            expected = made.colour[dataset][made.tables[dataset].id.tolist().index(key[1])].astype(int)
            assert np.abs(np.array(colour[:3]) - expected).max() < 16, key  # WebP is lossy
        patch = of[keys[0]]
        said = tiles.nth(0).inner_text()
        right = {"right": "✓ correct", "missed": "✗ missed Atypical", "alarm": "✗ false Atypical"}[patch.outcome(0)]
        assert f"{right} {patch.probability[0]:.3f}" in said
        assert f"label {'Atypical' if patch.label else 'Normal'}" in said
        assert f"{patch.group}, {patch.domain}" in said
        choose(page, {"set": "others, test", "run": "2"})
        assert {text.split("\n")[0] for text in tiles.all_inner_texts()} == {"not scored"}
        choose(page, {"set": "patches, test", "run": "0", "agreement": "disputed"})
        assert "votes 1/3" in (said := " ".join(tiles.all_inner_texts()))
        assert "votes 3/3" not in said
        page.locator("#gallery").screenshot(path=keep("gallery-filtered.png"))


# ------------------------------------------------------------------------------------------------------------------ map


def places(page: Page) -> dict[str, tuple[float, float]]:
    """Patch id to where the map draws it, in pixels of the drawing; ids are of both datasets."""
    data = json.loads(page.text_content("#data") or "")
    x, y = data["maps"][0]["components"][:2]
    across, up = MAP_WIDTH - 2 * MAP_MARGIN, MAP_HEIGHT - 2 * MAP_MARGIN
    return {
        id: (MAP_MARGIN + a / 1000 * across, MAP_HEIGHT - MAP_MARGIN - b / 1000 * up)
        for id, a, b in zip(data["id"], x, y, strict=True)
    }


def lonely(at: dict[str, tuple[float, float]]) -> list[str]:
    """Ids by the distance to their nearest neighbour, the farthest first."""
    ids, xy = list(at), np.array(list(at.values()))
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + 1e6 * np.eye(len(xy))
    return [ids[row] for row in np.argsort(-distance.min(axis=1))]


def hover(page: Page, x: float, y: float) -> None:
    canvas = page.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + x / MAP_WIDTH * box["width"], box["y"] + y / MAP_HEIGHT * box["height"])


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_pointer_on_the_map_shows_the_patch_below_it(open_page, made, viewport):
    with open_page(viewport=viewport) as page:
        at = places(page)
        for id in lonely(at)[:3]:
            hover(page, *at[id])
            assert page.inner_text("#point").startswith(id)
            dataset = id.partition("/")[0]
            expected = made.colour[dataset][made.tables[dataset].id.tolist().index(id)].astype(int)
            page.wait_for_function(PAINTED, arg="#point canvas")
            found = page.locator("#point canvas").evaluate(MIDDLE_OF)
            assert np.abs(np.array(found[:3]) - expected).max() < 16
        if viewport == WIDE:
            page.locator("#map").screenshot(path=keep("map-hovered.png"))


def test_a_finger_on_the_map_shows_the_patch_below_it(open_page):
    with open_page(viewport=NARROW, has_touch=True, is_mobile=True) as page:
        at = places(page)
        id = lonely(at)[0]
        canvas = page.locator("#canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        x, y = at[id]
        page.touchscreen.tap(box["x"] + x / MAP_WIDTH * box["width"], box["y"] + y / MAP_HEIGHT * box["height"])
        assert page.inner_text("#point").startswith(id)
        assert page.locator("#canvas").evaluate("(canvas) => getComputedStyle(canvas).touchAction") != "none"


def test_every_choice_draws_the_map_anew(open_page):
    with open_page() as page:
        seen = {page.evaluate(DRAWN)}
        for name, value in (
            ("colour", "outcome"),
            ("run", "1"),
            ("colour", "probability"),
            ("colour", "set"),
            ("x", "2"),
            ("y", "0"),
            ("set", "0"),
            ("map", "1"),
        ):
            page.select_option(f"#map-controls [name={name}]", value)
            drawn = page.evaluate(DRAWN)
            assert drawn not in seen, (name, value)
            seen.add(drawn)
            assert page.locator("#map-legend li").count() >= 2
        page.select_option("#map-controls [name=colour]", "set")
        assert page.locator("#map-legend li").all_inner_texts() == [
            "patches, test",
            "others, test",
            "patches, out of fold",
        ]


def test_arrow_keys_move_from_patch_to_patch(open_page):
    with open_page() as page:
        at = places(page)
        page.focus("#canvas")
        page.keyboard.press("ArrowRight")

        def here() -> tuple[float, float]:
            return at[page.inner_text("#point").split("\n")[0]]

        before = here()
        for key, axis, sign in (("ArrowRight", 0, 1), ("ArrowLeft", 0, -1), ("ArrowUp", 1, -1), ("ArrowDown", 1, 1)):
            page.keyboard.press(key)
            after = here()
            assert sign * (after[axis] - before[axis]) > 0, key
            before = after


# ---------------------------------------------------------------------------------------------------------------- theme


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2)."""
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    channels = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_measured_as_wcag_does():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_starts_in_the_readers_theme_and_the_button_switches_it(open_page, scheme):
    other = "dark" if scheme == "light" else "light"
    with open_page(color_scheme=scheme) as page:
        button = page.locator("#theme")
        assert button.get_attribute("aria-label") == f"Switch to the {other} theme"
        first, drawn = background(page), page.evaluate(DRAWN)
        assert (first == "rgb(255, 255, 255)") == (scheme == "light")
        if scheme == "dark":
            page.screenshot(path=keep("report-dark.png"), full_page=True)
        button.click()
        assert background(page) != first
        assert page.evaluate(DRAWN) != drawn
        assert button.get_attribute("aria-label") == f"Switch to the {scheme} theme"
        button.press("Enter")
        assert (background(page), page.evaluate(DRAWN)) == (first, drawn)


@pytest.mark.parametrize("media", ["screen", "print"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_what_they_stand_on(open_page, scheme, media):
    words, lines = ["--ink", "--soft", "--link", "--good", "--bad"], [f"--s{k}" for k in range(8)]
    with open_page(color_scheme=scheme) as page:
        page.emulate_media(media=media)
        colour = page.evaluate(COLOURS, [*words, *lines, "--page", "--shade"])
    for behind in ("--page", "--shade"):
        for name in words:
            assert contrast(colour[name], colour[behind]) >= TEXT, (name, behind)
    for name in lines:
        assert contrast(colour[name], colour["--page"]) >= GRAPHICS, name


# ------------------------------------------------------------------------------------------------------- sorting, reach


def test_a_heading_sorts_its_table_by_mouse_and_by_keyboard(open_page):
    with open_page() as page:
        table = page.locator("table.board").first
        heading = table.locator("thead tr").last.locator("th")
        names = heading.all_inner_texts()

        def column(name: str, last: bool = False) -> list[float | None]:
            at = len(names) - 1 - names[::-1].index(name) if last else names.index(name)
            cells = table.locator("tbody tr").evaluate_all(
                f"(rows) => rows.map((row) => row.cells[{at}].dataset.value)"
            )
            return [float(cell) if cell else None for cell in cells]

        def sorts() -> list[str | None]:
            return [one.get_attribute("aria-sort") for one in heading.all()]

        by = heading.nth(names.index("AUROC"))
        values = sorted(v for v in column("AUROC") if v is not None)
        assert len(set(values)) == 3
        assert sorts() == [None] * len(names)
        by.click()
        assert column("AUROC") == values[::-1]
        assert sorts() == ["descending" if one == names.index("AUROC") else None for one in range(len(names))]
        by.click()
        assert column("AUROC") == values
        page.keyboard.press("Tab")  # to the next heading
        page.keyboard.press("Enter")
        following = names.index("AUROC") + 1
        assert sorts() == ["descending" if one == following else None for one in range(len(names))]
        page.keyboard.press("Space")
        assert sorts()[following] == "ascending"
        table = page.get_by_role("region", name="Cost").locator("table")
        heading = table.locator("thead th")
        names = heading.all_inner_texts()
        rate = heading.nth(names.index("Images/s"))
        for _ in range(2):  # what is missing stands last in either order
            rate.click()
            assert column("Images/s") == [70.0, None, None]


def test_everything_is_in_reach_of_the_keyboard_and_shows_its_focus(open_page):
    with open_page() as page:
        n = page.evaluate("""() => {
            const all = [...document.querySelectorAll('a[href], button, input, select, summary, [tabindex="0"]')];
            const within = all.filter((one) => one.checkVisibility() && !one.disabled);
            within.forEach((one, k) => { one.dataset.reach = k; });
            return within.length;
        }""")
        assert n > 40
        reached = []
        for _ in range(n):
            page.keyboard.press("Tab")
            at, style, width = page.evaluate("""() => {
                const style = getComputedStyle(document.activeElement);
                return [document.activeElement.dataset.reach, style.outlineStyle, parseFloat(style.outlineWidth)];
            }""")
            assert at is not None
            assert style != "none", at
            assert width >= 1, at
            reached.append(int(at))
        assert reached == list(range(n))  # in the order of the page
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        page.focus("a.skip")
        box = page.locator("a.skip").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == "#leaderboard"


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_heading_is_not_hidden_below_the_links(open_page, viewport):
    with open_page(viewport=viewport) as page:
        hidden = page.evaluate("""async () => {
            const hidden = [];
            for (const link of document.querySelectorAll('nav a')) {
                link.click();
                await new Promise(requestAnimationFrame);
                const heading = document.querySelector(`${link.getAttribute('href')} h2`).getBoundingClientRect();
                const bar = document.querySelector('nav').getBoundingClientRect();
                if (heading.top < bar.bottom - 1 || heading.top >= innerHeight) hidden.push(link.textContent);
            }
            return hidden;
        }""")
        assert hidden == []


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_tables_scroll_and_the_page_does_not(open_page, viewport):
    with open_page(viewport=viewport) as page:
        choose(page, {"outcome": ""})
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        spilled = page.evaluate("""[...document.querySelectorAll('.card')].filter((card) =>
            [...card.querySelectorAll('table, svg')].some((one) =>
                one.getBoundingClientRect().right > card.getBoundingClientRect().right)).length""")
        assert spilled == 0


def test_runs_can_be_told_apart_in_the_choices(open_page):
    with open_page() as page:
        cut = page.evaluate("""[...document.querySelectorAll('select')].filter((select) => {
            const copy = select.cloneNode(true);
            copy.style.maxWidth = 'none';
            select.after(copy);
            const needed = copy.getBoundingClientRect().width;
            copy.remove();
            return needed > 320 ? false : needed > select.getBoundingClientRect().width + 1;
        }).map((select) => select.name)""")
        assert cut == []


def test_axe_finds_nothing(open_page):
    """axe-core's rules for assistive technology; the engine comes with the package and asks for nothing either."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    # Contrast is measured above, in both themes and in a tenth of the time.
    rules = {"resultTypes": ["violations"], "rules": {"color-contrast": {"enabled": False}}}
    with open_page() as page:
        found = axe.Axe().run(page, options=rules).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"][:120]) for one in found] == []


def test_at_first_the_summary_the_leaderboard_and_a_sentence_per_section_are_open(open_page):
    with open_page(folded=True) as page:
        assert page.locator("#summary p").count() >= 2
        assert page.locator("#summary p").first.is_visible()
        assert page.locator("table.board").first.is_visible()
        headlines = page.locator(".headline")
        assert headlines.count() >= 6
        for headline in headlines.all():
            assert headline.is_visible()
        assert not page.locator("table.matrix").first.is_visible()
        assert not page.locator(".tile").first.is_visible()
        assert page.evaluate("document.documentElement.scrollHeight") < 6_000


def test_a_link_opens_its_section_and_a_button_all_of_them(open_page):
    with open_page(folded=True) as page:
        page.click("nav a[href='#differences']")
        assert page.locator("table.matrix").first.is_visible()
        assert not page.locator("#filters").is_visible()
        button = page.locator("#fold")
        for text, is_open in (("Open all", True), ("Fold all", False)):
            assert button.inner_text() == text
            button.press("Enter")
            assert page.locator("#filters").is_visible() == is_open
            assert page.locator("details[open]").count() == (page.locator("details").count() if is_open else 0)


# ------------------------------------------------------------------------------------------------- no script, and paper


def test_tables_and_figures_are_there_without_the_script(open_page):
    with open_page(java_script_enabled=False) as page:
        assert page.locator("table.board").first.is_visible()
        assert page.locator("table.board").first.locator("tbody tr").count() == 3
        assert page.locator("figure svg").first.is_visible()
        assert page.locator("noscript p").all_text_contents() == [
            "The map needs the page's script.",
            "The gallery needs the page's script.",
        ]
        page.locator("#map summary").first.click()
        assert page.locator("noscript p").first.is_visible()
        for dead in page.locator("button, select, input, canvas").all():
            assert not dead.is_visible()
        page.locator("#differences summary").first.click()  # works without it
        assert page.locator("table.matrix").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_prints_on_white_without_controls_and_with_the_tables_that_belong_on_paper(open_page, scheme):
    with open_page(color_scheme=scheme, folded=True) as page:
        page.locator("#leaderboard details").last.locator("summary").click()  # what a reader opened is printed too
        page.emulate_media(media="print")
        assert background(page) == "rgb(255, 255, 255)"
        for control in page.locator("nav, form, button, .skip").all():
            assert not control.is_visible() or control.locator("xpath=ancestor::th").count()
        assert page.get_by_role("region", name="Cost").is_visible()
        for name in ("table.matrix", "#raters table", "#domains table", "#decisions table.stacked"):
            assert page.locator(name).first.is_visible(), name
        for name in ("#decisions .card", "#provenance table", "#filters", "#canvas"):
            assert not page.locator(name).first.is_visible(), name
        page.emulate_media(media="screen")
        before = page.evaluate(DRAWN)
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        on_paper = page.evaluate(DRAWN)
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate(DRAWN) == before
        assert (on_paper == before) == (scheme == "light")
        if scheme == "dark":  # the harder of the two
            page.pdf(path=keep("report.pdf"), format="A4")
            assert keep("report.pdf").read_bytes().startswith(b"%PDF")
        assert background(page) == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 22, 26)")


# ----------------------------------------------------------------------------------------------------------------- size

MANY = 8_000


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A page of as many patches as a page may hold."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    samples = make_samples(
        [f"{row:05}.png" for row in range(MANY)],
        (np.arange(MANY) % 5 == 0).astype(int).tolist(),
        sha256=[str(row) for row in range(MANY)],
        group=[f"slide {row // 40}" for row in range(MANY)],
        domain=[f"lab {row % 6}" for row in range(MANY)],
    )
    folds = grouped_folds(samples, 5, seed=42)
    record = RunRecord(
        kind="probe",
        model="one",
        method="probe",
        train="many",
        view="full",
        pooling="card",
        card_pooling="card",
        options={},
        label_names=("Normal", "Atypical"),
        folds=FoldsRecord(n=5, digest=folds.digest),
    )
    for model in ("one", "two"):
        scores = rng.standard_normal(MANY) + samples.label
        predictions = predictions_of(
            "many", samples, split="validation", fold=folds.fold[:, None], logit=scores[:, None, None]
        )
        with unscored():
            write_run(
                folder / "runs",
                replace(record, model=model),
                predictions=predictions,
                tables={"many": samples},
                weights={},
                seconds=1,
            )
    runs, notes = read_runs(folder / "runs")
    report = collect(runs, notes, resampling=QUICK)
    of = select_patches(report, runs)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)

    def pixels(id: str) -> np.ndarray:
        top, left = divmod(int(id[:5]), 200)  # every patch another part of the noise
        return np.ascontiguousarray(noise[top : top + SIDE, left : left + SIDE])

    places_of = EmbeddingMap("one, full, card", (0.3, 0.2), rng.standard_normal((MANY, 2)))
    page = html(report, runs, patches=of, maps=[places_of], sizes={}, has_pictures=True)
    thumbnails = make_thumbnails(of, report, {"many": pixels}, budget=7_500_000)
    write_report(with_thumbnails(page, thumbnails), folder / "report.html")
    return folder / "report.html"


def test_thousands_of_patches_stay_smooth(browser, large):
    """Limits are three times and more what it takes, in units of work that the browser does there and then."""
    openings = []
    for _ in range(2):
        with opened(browser, large) as page:
            page.wait_for_function(PAINTED, arg=".tile canvas")
            took = page.evaluate("performance.now()")
            unit = min(page.evaluate(SORTED) for _ in range(3))
            openings.append(took / unit)
    assert min(openings) < 7, openings
    with opened(browser, large) as page:
        page.wait_for_function(PAINTED, arg=".tile canvas")
        assert page.inner_text("#count").startswith(f"{PER_CLICK} of ")
        for name, value in (("outcome", ""), ("order", "differ"), ("run", "1"), ("label", "1")):
            assert page.evaluate(CHANGED, [name, value]) < unit, (name, value)
        at = lonely(dict(list(places(page).items())[:500]))
        started = time.perf_counter()
        hover(page, *places(page)[at[0]])
        assert page.inner_text("#point").count("\n") >= 3
        assert 1000 * (time.perf_counter() - started) < 3 * unit


# Milliseconds that the browser takes to sort a million numbers.
SORTED = """() => {
    const started = performance.now();
    Array.from({ length: 1e6 }, (_, k) => (k * 7919) % 1000003).sort((a, b) => a - b);
    return performance.now() - started;
}"""

# Milliseconds from a change to the frame after it, by when the browser has drawn.
CHANGED = """([name, value]) => new Promise((done) => {
    const element = document.getElementById('filters').elements[name];
    const started = performance.now();
    element.value = value;
    element.dispatchEvent(new Event('input', { bubbles: true }));
    requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - started)));
})"""


# ------------------------------------------------------------------------------------------------ more than two classes

MANY_CLASSES = tuple(f"class {k}" for k in range(62))
# What is left of a mark without its colour: which pixels of a sign it covers.
MARKS = """() => [...document.querySelectorAll('#map-legend canvas')].map((sign) => {
    const { data } = sign.getContext('2d').getImageData(0, 0, sign.width, sign.height);
    return [...data].filter((_, k) => k % 4 === 3).map((alpha) => Number(alpha > 96)).join('');
})"""
# How eyes see linear RGB: all cones, and without those for red, green, blue (Machado, Oliveira and Fernandes 2009).
SEEN = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)
# From linear RGB to the cones of OKLab, and from their cube roots to OKLab (Ottosson 2020).
CONES = np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]])
LAB = np.array([[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]])


def page_of_classes(folder: Path, classes: tuple[str, ...], n: int, *, n_slides: int = 0) -> Path:
    """A page with a map and thumbnails of two runs, written to a file; patches may lie on slides."""
    from report_pages import patches_of_classes, runs_of_classes

    table = patches_of_classes("cells", n, len(classes), votes=3)
    runs_of_classes(folder / "runs", table, n=2, classes=classes)
    runs, notes = read_runs(folder / "runs")
    report = collect(runs, notes, resampling=QUICK)
    of = select_patches(report, runs)
    rng = np.random.default_rng(0)
    at = 2 * of.label[:, None] * [0.1, 0] + rng.standard_normal((len(of.label), 2))
    shade = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    places_of = EmbeddingMap("model-0, full, card", (0.3, 0.2), at)
    lie = {id: (f"a/{k % n_slides}.svs", k + 0.5, 2.0 * k) for k, id in enumerate(table.id.tolist()) if n_slides}
    places = {"cells": lie} if lie else {}
    page = html(report, runs, patches=of, maps=[places_of], sizes={}, has_pictures=True, places=places)
    thumbnails = make_thumbnails(of, report, {"cells": lambda id: shade}, budget=1_000_000)
    write_report(with_thumbnails(page, thumbnails), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def phases(tmp_path_factory) -> Path:
    from report_pages import PHASES

    return page_of_classes(tmp_path_factory.mktemp("phases"), PHASES, 240)


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory) -> Path:
    return page_of_classes(tmp_path_factory.mktemp("many"), MANY_CLASSES, 900)


def test_the_gallery_filters_by_true_and_by_said_class(browser, phases):
    with opened(browser, phases) as page:
        figures = json.loads(page.text_content("#figures") or "")
        data = json.loads(page.text_content("#data") or "")
        on = figures["sets"][0]
        for run, label in enumerate(data["runs"]):
            choose(page, {"run": str(run), "set": "cells, test", "outcome": ""})
            for true, row in enumerate(on["confusion"][label]):
                for said, n in enumerate(row):
                    choose(page, {"label": str(true), "predicted": str(said)})
                    assert page.inner_text("#count") == f"{n} of {n} patches", (label, true, said)
                    if not n:
                        continue
                    text = page.locator(".tile").first.inner_text().split("\n")
                    mark = "✓" if true == said else "✗"
                    assert text[0].startswith(f"{mark} said {data['names'][said]} 0.")
                    assert text[1].startswith(f"label {data['names'][true]}")
            choose(page, {"label": "", "predicted": "", "outcome": "wrong"})
            wrong = on["n"] if "n" in on else sum(on["counts"])
            wrong -= sum(on["confusion"][label][k][k] for k in range(5))
            assert page.inner_text("#count") == f"{min(wrong, PER_CLICK)} of {wrong} patches"
        assert page.locator("main b").count() == 0  # a class is named with a tag
        page.locator("#gallery").screenshot(path=keep("classes-gallery.png"))


def test_mistakes_on_a_slide_are_saved_for_qupath(browser, tmp_path):
    from report_pages import PHASES
    from test_predict_points import SCHEMA

    with opened(browser, page_of_classes(tmp_path, PHASES, 240, n_slides=3)) as page:
        data = json.loads(page.text_content("#data") or "")
        for run, outcome in (("0", "wrong"), ("1", "")):
            choose(page, {"run": run, "set": "cells, test", "outcome": outcome})
            found = [id for _, id in all_tiles(page)]
            slides = page.locator("#save option")
            counts = {one.get_attribute("value"): int(one.inner_text().split("(")[1][:-1]) for one in slides.all()}
            assert sum(counts.values()) == len(found) > 3
            slide = list(counts)[-1]
            page.select_option("#save select", slide)
            with page.expect_download() as download:
                page.click("#save button")
            name = data["slides"][int(slide)]
            assert download.value.suggested_filename == f"{name.replace('/', '-')}.geojson"
            download.value.save_as(tmp_path / "saved.geojson")
            saved = json.loads((tmp_path / "saved.geojson").read_text())
            SCHEMA.validate(saved)
            row_of = {id: row for row, id in enumerate(data["id"])}
            lie = [id for id in found if data["place"][row_of[id]][0] == int(slide)]
            assert [one["id"] for one in saved["features"]] == lie
            assert len(lie) == counts[slide]
            for one in saved["features"]:
                row, known = row_of[one["id"]], one["properties"]
                said, label = data["predicted"][int(run)][row], data["label"][row]
                assert one["geometry"] == {"type": "Point", "coordinates": data["place"][row][1:]}
                assert known["classification"] == {"name": data["names"][said], "color": data["colors"][said]}
                assert known["metadata"]["annotated class"] == data["names"][label]
                assert known["metadata"]["slide"] == name
                assert (said != label) or not outcome


def test_nothing_is_saved_of_patches_that_lie_nowhere(browser, phases):
    with opened(browser, phases) as page:
        assert page.locator("#save").count() == 0


def test_the_surest_mistakes_come_first(browser, phases):
    with opened(browser, phases) as page:
        data = json.loads(page.text_content("#data") or "")
        choose(page, {"set": "cells, test"})
        at = {id: row for row, id in enumerate(data["id"])}
        rows = [at[id] for _, id in all_tiles(page)]
        sure = [data["probability"][0][row] - data["probability_of_label"][0][row] for row in rows]
        assert sure == sorted(sure, reverse=True)
        assert min(sure) > 0


def test_a_class_chosen_in_the_legend_stands_out_on_the_map(browser, phases):
    with opened(browser, phases) as page:
        before = page.evaluate(DRAWN)
        entries = page.locator("#map-legend button")
        assert entries.count() == 5
        entries.nth(2).click()
        assert [one.get_attribute("aria-pressed") for one in entries.all()] == ["false"] * 2 + ["true"] + ["false"] * 2
        chosen = page.evaluate(DRAWN)
        assert chosen != before
        assert page.evaluate("document.activeElement.dataset.entry") == "2"
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        assert entries.nth(1).get_attribute("aria-pressed") == "true"
        assert page.evaluate(DRAWN) not in (before, chosen)
        page.locator("#map").screenshot(path=keep("classes-map.png"))
        page.keyboard.press("Enter")
        assert page.evaluate(DRAWN) == before
        for colour, n in (("predicted", 5), ("outcome", 0), ("set", 0)):
            page.select_option("#map-controls [name=colour]", colour)
            assert entries.count() == n, colour
            assert page.evaluate(DRAWN) != before


def test_every_class_has_a_mark_of_its_own_without_colour(browser, phases, many_classes):
    for file, n in ((phases, 5), (many_classes, 62)):
        with opened(browser, file) as page:
            marks = page.evaluate(MARKS)
            alike = [(a, b) for a in range(n) for b in range(a) if marks[a] == marks[b]]
            assert (len(marks), alike) == (n, [])
            assert all(8 <= mark.count("1") <= 120 for mark in marks)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_first_ten_classes_differ_for_colour_blind_eyes(open_page, scheme):
    names = [f"--c{k}" for k in range(10)]
    with open_page(color_scheme=scheme) as page:
        colour = page.evaluate(COLOURS, [*names, "--page"])
        page.emulate_media(media="print")
        on_paper = page.evaluate(COLOURS, [*names, "--page"])
    for one in (colour, on_paper):
        assert all(contrast(one[name], one["--page"]) >= GRAPHICS for name in names)
    coded = np.array([[int(colour[name][at : at + 2], 16) / 255 for at in (1, 3, 5)] for name in names])
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    for eye in SEEN:
        lab = np.cbrt(np.clip(linear @ eye.T, 0, 1) @ CONES.T) @ LAB.T
        apart = np.linalg.norm(lab[:, None] - lab, axis=-1) + np.eye(10)
        assert apart.min() > 0.12  # of OKLab, in which black and white are 1 apart


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_matrix_of_classes_reads_on_a_small_screen(browser, phases, many_classes, scheme):
    cells = """() => [...document.querySelectorAll('.matrix-of-classes td')].slice(0, 60).map((cell) => {
        const { color, backgroundColor } = getComputedStyle(cell);
        const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
        return [color, backgroundColor].map((one) => {
            canvas.fillStyle = getComputedStyle(document.body).backgroundColor;
            canvas.fillRect(0, 0, 1, 1);
            canvas.fillStyle = one;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
            return '#' + [r, g, b].map((part) => part.toString(16).padStart(2, '0')).join('');
        });
    })"""
    for file in (phases, many_classes):
        with opened(browser, file, viewport=NARROW, color_scheme=scheme) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
            assert all(contrast(ink, behind) >= TEXT for ink, behind in page.evaluate(cells))
            box = page.locator("[aria-label='Confusion of model-0 probe on cells, test']")
            inner, outer = box.evaluate("(one) => [one.scrollWidth, one.clientWidth]")
            assert outer <= NARROW["width"]
            if file == many_classes:
                assert inner > 5 * outer  # it scrolls within itself
                box.evaluate("(one) => { one.scrollLeft = 900; }")
            row = box.locator("tbody th").first.bounding_box()
            assert row is not None
            assert row["x"] >= 0  # the true class stays in view
            box.screenshot(path=keep(f"classes-{'many' if file == many_classes else 'five'}-{scheme}.png"))


def test_the_matrix_of_few_classes_is_printed(browser, phases):
    with opened(browser, phases, folded=True) as page:
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator(".matrix-of-classes").first.is_visible()
        box = page.locator(".matrix-of-classes").first.bounding_box()
        assert box is not None
        assert box["width"] < 700  # pixels of an A4 page
        page.pdf(path=keep("classes.pdf"), format="A4")
