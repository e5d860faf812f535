"""What is lost when commands are killed, bits flip, disks fill up or files are hostile? Every figure here must be 0.

    python tests/torture.py [CAMPAIGN]... [--scale 1] [--seed 0]

Commands run in forks of one process that has imported everything: a trial starts in milliseconds. Nothing is read
from outside: patches are drawn. docs/reliability.md has the figures of a whole run; --scale 0.1 is a tenth of it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import html.parser
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import extract.cli
import extract.embed
import features.cli
import finetune.cli
import finetune.predict
import finetune.report
import probe.cli
import probe.probing
from extract import demo, images
from extract.datasets import load_dataset, load_patches
from features.console import UserError
from features.store import FeatureStore
from finetune import checkpoint
from finetune.options import FinetuneOptions
from probe.curve import read_curve
from probe.runs import check_weights, read_predictions, read_run, read_samples, read_weights

Figures = dict[str, Any]

MAINS = {
    "fm-extract": extract.cli.main,
    "fm-store": features.cli.main,
    "fm-probe": probe.cli.main,
    "fm-finetune": finetune.cli.main,
    "fm-predict": finetune.cli.predict_main,
    "fm-report": finetune.cli.report_main,
}
CRASHED = 70
SECONDS_EACH = 10  # for one hostile file
MEMORY = 1 << 30  # bytes that reading one hostile file may add

EXTRACT = ("fm-extract", "--dataset", "patches.csv", "--view", "full@32,center64@32", "--precision", "fp32")
PROBE = ("fm-probe", "--cv", "3", "--view", "full@32", "--fractions", "0.5,1")
FINETUNE = ("fm-finetune", "--train", "few.csv", "--test", "", "--view", "full@32", "--cv", "2", "--epochs", "3",
            "--batch-size", "8", "--precision", "fp32")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ commands


def spawn(arguments: tuple[str, ...], cwd: Path, log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start a command in a fork; its output goes to a file. Returns the process id."""
    child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        os.chdir(cwd)
        target = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        before()
        sys.argv = list(arguments)
        MAINS[arguments[0]]()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - a fork must not fall through into the parent's code
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


def ended(child: int) -> int:
    """Exit status of a process; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(arguments: tuple[str, ...], cwd: Path, before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """A command's exit status and everything it printed."""
    log = cwd.parent / f"{cwd.name}.log"
    log.unlink(missing_ok=True)
    code = ended(spawn(arguments, cwd, log, before))
    return code, log.read_text(errors="replace")


def must(arguments: tuple[str, ...], cwd: Path) -> None:
    code, said = run(arguments, cwd)
    if code:
        raise SystemExit(f"{' '.join(arguments)} ended with {code}:\n{said}")


def one_message(code: int, said: str) -> bool:
    """Whether a command failed as it should: status 1, one message, no traceback."""
    return code == 1 and said.count("error: ") == 1 and "Traceback" not in said


def in_fork(action: Callable[[], Figures]) -> Figures:
    """What an action finds, in a fork: zarr's own threads would not survive later forks."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(there, json.dumps(action()).encode())
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return dict(json.loads(found))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def result(folder: Path) -> dict[str, Any]:
    """A run folder without what differs between equal runs: its id, its dates, what it cost."""
    found: dict[str, Any] = tree(folder)
    record = json.loads(found.pop("run.json"))
    for name in ("id", "created", "cost", "store", "sources", "options", "versions"):
        record.pop(name, None)
    del record["sha256"]["run.json"]
    record["history"] = [
        [{k: v for k, v in e.items() if "seconds" not in k} for e in h] for h in record.get("history", [])
    ]
    return found | {"run.json": record}


def draw_patches(folder: Path, *, n: int = 400, few: int = 48) -> None:
    """The drawn patches as files, with a table of all and one of a few."""
    drawn = demo.draw()
    rows = ["path,label,group,split"]
    for row, (pixels, label, group) in enumerate(
        zip(drawn.pixels[:n], drawn.samples.label, drawn.samples.group, strict=False)
    ):
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{row}.png")
        rows.append(f"{row}.png,{'Atypical' if label else 'Normal'},{group},{'test' if row % 5 == 0 else 'train'}")
    (folder / "patches.csv").write_text("\n".join(rows) + "\n")
    mixed = [rows[0], *(f"{r},{'Atypical' if r % 2 else 'Normal'},slide {r // 4},{'test' if r > few - 9 else 'train'}"
             for r in range(few))]  # fmt: skip
    (folder / "few.csv").write_text("\n".join(line.replace(",", ".png,", 1) if k else line
                                              for k, line in enumerate(mixed)) + "\n")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- killing


def kill(folder: Path, scale: float, rng: np.random.Generator) -> Figures:
    """SIGKILL at random moments, again and again, then one undisturbed finish."""
    draw_patches(folder)
    return _kill_extraction(folder, max(3, round(200 * scale)), rng) | _kill_finetuning(
        folder, max(2, round(50 * scale)), rng
    )


def killed_at(child: int, moment: float) -> tuple[bool, float]:
    """Kill a process after so many seconds, unless it ends before; whether it was killed, and how long it ran."""
    started = time.monotonic()
    while (took := time.monotonic() - started) < moment:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(min(0.01, moment - took))
    os.kill(child, signal.SIGKILL)  # of one that has ended and was not waited for, nothing
    return ended(child) == -signal.SIGKILL, took


def _kill_extraction(folder: Path, n_kills: int, rng: np.random.Generator) -> Figures:
    started = time.monotonic()
    must((*EXTRACT, "--store", "undisturbed.zarr"), folder)
    seconds = time.monotonic() - started
    right = tree(folder / "undisturbed.zarr")
    blocks = [name for name in right if re.search(r"/c\.\d+\.0$", name)]
    found: Counter[str] = Counter()
    while found["kills"] < n_kills:
        store = folder / "killed.zarr"
        for _ in range(int(rng.integers(1, 9))):
            fresh = not store.exists()
            child = spawn((*EXTRACT, "--store", store.name), folder, folder.parent / "kill.log")
            killed, took = killed_at(child, rng.uniform(0, seconds))
            if not killed or found["kills"] == n_kills:
                seconds = took if fresh and not killed else seconds  # the machine is less busy than it was
                break
            found["kills"] += 1
            done = sum((store / name).exists() for name in blocks)
            found["kills with some blocks written"] += 0 < done < len(blocks)
        must((*EXTRACT, "--store", store.name), folder)
        left = tree(store)
        found["stores finished"] += 1
        found["stores that differ (must be 0)"] += left != right
        found["blocks lost or changed (must be 0)"] += sum(left.get(name) != right[name] for name in blocks)
        shutil.rmtree(store)
    return {f"extraction: {name}": int(count) for name, count in found.items()}


def _kill_finetuning(folder: Path, n_kills: int, rng: np.random.Generator) -> Figures:
    started = time.monotonic()
    must((*FINETUNE, "--runs", "undisturbed"), folder)
    seconds = time.monotonic() - started
    right = result(next((folder / "undisturbed").iterdir()))
    found: Counter[str] = Counter()

    def command(runs: Path) -> tuple[str, ...]:
        for path in runs.glob("*/"):
            if (path / "training.json").exists() or (path / "run.json").exists():
                return ("fm-finetune", "--resume", str(path))
            shutil.rmtree(path)  # killed before there was anything to resume
        return (*FINETUNE, "--runs", str(runs))

    while found["kills"] < n_kills:
        runs = folder / "killed"
        for _ in range(int(rng.integers(1, 7))):
            fresh = not runs.exists()
            child = spawn(command(runs), folder, folder.parent / "kill.log")
            killed, took = killed_at(child, rng.uniform(0, seconds))
            if not killed or found["kills"] == n_kills:
                seconds = took if fresh and not killed else seconds
                break
            found["kills"] += 1
            found["kills after the first epoch"] += any(runs.glob(f"*/{checkpoint.CHECKPOINT_FILE}"))
        must(command(runs), folder)
        found["runs finished"] += 1
        found["runs that differ (must be 0)"] += result(next(runs.iterdir())) != right
        shutil.rmtree(runs)
    return {f"fine-tuning: {name}": int(count) for name, count in found.items()}


# -------------------------------------------------------------------------------------------------------- flipped bits


def flip(folder: Path, scale: float, rng: np.random.Generator) -> Figures:
    """One flipped bit at a time in every kind of file of a store, of finished runs, and of an interrupted training."""
    draw_patches(folder, n=200)
    must((*EXTRACT, "--store", "s.zarr"), folder)
    must((*PROBE, "--store", "s.zarr", "--runs", "probed"), folder)
    must((*FINETUNE, "--runs", "tuned"), folder)
    runs = [next((folder / name).iterdir()) for name in ("probed", "tuned")]
    interrupted = folder / "interrupted"
    child = spawn((*FINETUNE, "--epochs", "50", "--runs", interrupted.name), folder, folder.parent / "flip.log")
    while not any(interrupted.glob(f"*/{checkpoint.CHECKPOINT_FILE}")):
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    ended(child)
    n, seed = max(20, round(1000 * scale)), int(rng.integers(1 << 31))
    found: Figures = {}
    for name, places, read, share in (
        ("store", [folder / "s.zarr"], _whole_store, 1.0),
        ("runs", runs, _whole_run, 1.0),
        ("interrupted training", list(interrupted.iterdir()), _whole_training, 0.2),
    ):
        found |= in_fork(lambda name=name, places=places, read=read, share=share: _flips(
            name, places, read, round(n * share), np.random.default_rng(seed)))  # fmt: skip
    return found


def _flips(name: str, places: list[Path], read: Callable[[Path], object], n: int, rng: np.random.Generator) -> Figures:
    right = {place: _comparable(read(place)) for place in places}
    kinds: dict[str, list[tuple[Path, Path]]] = {}  # files whose names differ in numbers alone are of one kind
    for place in places:
        for path in sorted(place.rglob("*")):
            if path.is_file() and path.stat().st_size:
                kinds.setdefault(re.sub(r"\d+", "#", path.relative_to(place).as_posix()), []).append((place, path))
    names = sorted(kinds)
    found: Counter[str] = Counter()
    silent: Counter[str] = Counter()
    for trial in range(n):
        kind = names[trial % len(names)]
        place, path = kinds[kind][int(rng.integers(len(kinds[kind])))]
        whole = path.read_bytes()
        bit = int(rng.integers(8 * len(whole)))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            outcome = "harmless" if _comparable(read(place)) == right[place] else "silent (must be 0)"
        except UserError as error:
            outcome = "detected" if says_what_is_damaged(str(error), place, path) else "said otherwise (must be 0)"
            if outcome != "detected":
                print(f"{kind}: {error}", file=sys.stderr, flush=True)
        except Exception:  # noqa: BLE001 - counted
            traceback.print_exc()
            outcome = "traceback (must be 0)"
        if outcome not in ("detected", "harmless"):
            silent[kind] += 1
        found[outcome] += 1
        path.write_bytes(whole)
    outcomes = ("detected", "harmless", "said otherwise (must be 0)", "silent (must be 0)", "traceback (must be 0)")
    counts = {key: found[key] for key in outcomes}
    where = {f"{name}: not detected in {kind}": count for kind, count in silent.items()}
    return {f"{name}: kinds of files": len(names), **{f"{name}: {key}": v for key, v in counts.items()}, **where}


# What a file in which a bit has flipped may be called; the last ones where the bit was in a header, a logit, a format.
DAMAGE = (
    " is damaged",
    " is not the file that the run wrote",
    ": found columns ",
    " is no number",
    " is a run of format",
    " is a Zarr group, but not a mitofm feature store",
    " was written in store format",
)


def says_what_is_damaged(said: str, place: Path, path: Path) -> bool:
    """Whether a message names the damaged file, or a folder of it below `place`, and says that it is damaged."""
    inside = path.relative_to(place).parts
    names = {"/".join(inside[:n]) for n in range(1, len(inside) + 1)} | {str(place)}
    return any(name in said for name in names) and any(word in said for word in DAMAGE)


def _comparable(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=lambda v: v.tolist() if isinstance(v, np.ndarray) else repr(v))


_KNOWN = {"name", "n_samples", "n_raters", "images_digest", "table_digest", "source", "label_names", "mpp"}


def _whole_store(path: Path) -> object:
    store = FeatureStore.open(path)
    if problems := store.verify():
        raise UserError(problems[0].what)
    return {
        "datasets": {
            # Attributes MAY be more: a flip in the name of their digest leaves one that nobody knows.
            name: ({k: v for k, v in store.dataset_attrs(name).items() if k in _KNOWN}, asdict(store.samples(name)))
            for name in store.datasets()
        },
        "entries": [asdict(entry) for entry in store.entries()],
        "values": [
            zlib.crc32(store.read(entry.dataset, model=entry.model, view=entry.view, pooling=pooling).tobytes())
            for entry in store.entries()
            for pooling in entry.poolings
        ],
    }


def _whole_run(path: Path) -> object:
    run = read_run(path)
    check_weights(path, run)
    predictions = read_predictions(path)
    tables = {name: asdict(table) for name, table in read_samples(path, predictions).items()}
    weights = {name: zlib.crc32(data) for name, data in tree(path).items() if name.startswith("fold-")}
    if run.kind == "probe":
        weights = {name: zlib.crc32(array.tobytes()) for name, array in read_weights(path).items()}
    return [run.as_json(), asdict(predictions), tables, [asdict(point) for point in read_curve(path)], weights]


def _whole_training(path: Path) -> object:
    import torch

    state = checkpoint.load_state(path, torch.device("cpu"))
    assert state is not None
    tensors = {name: zlib.crc32(getattr(state, name).numpy().tobytes()) for name in ("values", "best", "moments")}
    start = checkpoint.read_start(path)
    FinetuneOptions.from_record(start["identity"]["options"])
    return [tensors, state.members, state.n_steps, state.history, state.seconds, state.n_images, start]


# -------------------------------------------------------------------------------------------------- two writers at once


def race(folder: Path, scale: float, rng: np.random.Generator) -> Figures:
    """Two fm-extract on one store at once."""
    draw_patches(folder)
    must((*EXTRACT, "--store", "undisturbed.zarr"), folder)
    right = tree(folder / "undisturbed.zarr")
    found: Counter[str] = Counter()
    for trial in range(max(2, round(40 * scale))):
        store, logs = folder / "raced.zarr", [folder.parent / f"race-{trial}-{k}.log" for k in (0, 1)]
        children = []
        for log in logs:
            children.append(spawn((*EXTRACT, "--store", store.name), folder, log))
            time.sleep(float(rng.choice([0, rng.uniform(0, 0.05), rng.uniform(0, 1)])))
        codes = [ended(child) for child in children]
        found["races"] += 1
        found["both succeeded"] += codes == [0, 0]
        for code, log in zip(codes, logs, strict=True):
            if code:
                said = log.read_text(errors="replace")
                found[
                    "one refused, saying why" if one_message(code, said) else "failed without a message (must be 0)"
                ] += 1
                print(said[-2000:], file=sys.stderr)
        if any(codes):
            must((*EXTRACT, "--store", store.name), folder)
        found["stores that differ (must be 0)"] += tree(store) != right
        shutil.rmtree(store)
    return {f"two at once: {name}": int(count) for name, count in found.items()}


# ------------------------------------------------------------------------------------------------------------ full disk


def full(folder: Path, scale: float, rng: np.random.Generator) -> Figures:
    """A disk that fills up at several points of every command, and the same command once there is space again."""
    draw_patches(folder, n=200)
    must((*EXTRACT, "--store", "s.zarr"), folder)
    must((*PROBE, "--store", "s.zarr", "--runs", "probed"), folder)
    run_folder = next((folder / "probed").iterdir())
    place = folder / "disk"
    report = re.compile(rb"20\d\d-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?")
    stages: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
        "extract": ((*EXTRACT, "--store", "disk/s.zarr"), lambda: tree(place / "s.zarr")),
        "probe": ((*PROBE, "--store", "s.zarr", "--runs", "disk/runs"), lambda: _only_run(place / "runs")),
        "finetune": ((*FINETUNE, "--runs", "disk/runs"), lambda: _only_run(place / "runs")),
        "report": (("fm-report", "--runs", "probed", "--replicates", "200", "--out", "disk/out"),
                   lambda: report.sub(b"", (place / "out").read_bytes())),
        "predict": (("fm-predict", str(run_folder), "patches.csv", "--out", "disk/out"),
                    lambda: (place / "out").read_bytes()),
        "export": (("fm-store", "export", "--dataset", "patches", "--model", "efficientnet-lite0", "--view", "full@32",
                    "--store", "s.zarr", "--format", "npz", "--out", "disk/out"),
                   lambda: [np.load(place / "out")[name].tolist() for name in ("features", "ids", "labels")]),
    }  # fmt: skip
    found: Counter[str] = Counter()
    shares = [share for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97) if scale >= 0.1 or share in (0.1, 0.7)]
    for name, (arguments, outcome) in stages.items():
        with _disk(place, 1 << 30):
            must(arguments, folder)
            right = outcome()
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        for share in shares:
            with _disk(place, max(16384, round(size * share))) as resize:
                old = arguments[-1] == "disk/out" and not share
                if old:
                    (place / "out").write_bytes(b"old")
                code, said = run(arguments, folder)
                found["disks filled"] += code != 0
                found["other than one message (must be 0)"] += bool(code) and not one_message(code, said)
                if code and not one_message(code, said):
                    print(name, share, code, said[-2000:], file=sys.stderr)
                if old:
                    found["older results lost (must be 0)"] += (place / "out").read_bytes() != b"old"
                resize(1 << 30)
                unfinished = [path.parent for path in place.glob("runs/*/training.json")]
                must(("fm-finetune", "--resume", str(unfinished[0])) if unfinished else arguments, folder)
                found["other results after space was freed (must be 0)"] += outcome() != right
        found["stages"] += 1
    return {f"full disk: {name}": int(count) for name, count in found.items()}


def _only_run(runs: Path) -> dict[str, Any]:
    (one,) = (path for path in runs.iterdir() if (path / "run.json").exists())
    return result(one)


@contextlib.contextmanager
def _disk(place: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many bytes in memory; yields what resizes it."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True, capture_output=True)
    try:
        yield lambda n: subprocess.run(["mount", "-o", f"remount,size={n}", place], check=True) and None
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()


def can_mount() -> bool:
    """Whether this process may mount a file system: root in most places."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _disk(Path(folder) / "disk", 1 << 20):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


# ------------------------------------------------------------------------------------------------------- mutated files


def mutate(folder: Path, scale: float, rng: np.random.Generator) -> Figures:
    """Mutated images and tables, each in limited time and memory, and decompression bombs."""
    n, seed = max(40, round(10_000 * scale)), int(rng.integers(1 << 31))
    pngs = draw_csv_patches(folder)
    seeds = image_seeds()
    tables = csv_seeds(pngs)
    kinds = [*seeds, "csv"]

    def trial(index: int) -> str:
        own = np.random.default_rng((seed, index))
        kind = kinds[index % len(kinds)]
        if kind == "csv":
            path = folder / "mutated.csv"
            path.write_bytes(mutated_csv(tables[int(own.integers(len(tables)))], own))
            return f"csv {_outcome(lambda: (load_dataset(str(path)), load_patches(path)))}"
        data = mutated(seeds[kind][int(own.integers(len(seeds[kind])))], own)
        return f"{kind} {_outcome(lambda: _read_image(data))}"

    found = Counter(_limited(trial, n, folder))
    bombs = list(image_bombs())
    for outcome in _limited(lambda k: _outcome(lambda: _read_image(bombs[k][1])), len(bombs), folder):
        found["bombs refused" if outcome == "refused" else f"bombs {outcome} (must be 0)"] += 1
    usage = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return {f"mutated: {name}": count for name, count in sorted(found.items())} | {
        "mutated: largest process, MB": usage
    }


def _read_image(data: bytes) -> None:
    if reason := images.flaw(data):
        raise UserError(reason)
    pixels = images.decode(data, "patch")
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert 0 < pixels.size <= 3 * images.MAX_PIXELS


def _outcome(action: Callable[[], object]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), warnings.catch_warnings(record=True) as warned:
        try:
            action()
            outcome = "read"
        except UserError:
            outcome = "refused"
        except Exception as error:  # noqa: BLE001 - counted
            outcome = f"{type(error).__name__} (must be 0)"
            traceback.print_exc(file=sys.__stderr__)
    if warned:
        outcome += ", with a warning of Python's (must be 0)"
    if not all(c.isprintable() or c == "\n" for c in said.getvalue()):
        outcome += ", unprintable (must be 0)"
    return outcome


def _limited(trial: Callable[[int], str], n: int, folder: Path) -> list[str]:
    """The outcome of every trial, in forks that a crash, a hang or too much memory ends; the next goes on after it."""
    outcomes: list[str] = []
    while len(outcomes) < n:
        log = folder.parent / "trials.log"
        log.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY,) * 2)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills, also in the middle of a decoder
                with log.open("w") as file:
                    for index in range(len(outcomes), n):
                        signal.alarm(SECONDS_EACH)
                        file.write(trial(index) + "\n")
                        file.flush()
                os._exit(0)
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
                os._exit(CRASHED)
        code = ended(child)
        outcomes += log.read_text().splitlines() if log.exists() else []
        if code:
            outcomes.append(f"{'hang' if code == -signal.SIGALRM else f'crash {code}'} (must be 0)")
    return outcomes


def image_seeds() -> dict[str, list[bytes]]:
    """Small whole images in several flavours of each format."""
    pixels = Image.fromarray(demo.draw().pixels[0]).resize((48, 48))
    text = b"note\0" + b"x" * 50
    flavours: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "png": [("RGB", {}), ("L", {}), ("P", {}), ("RGBA", {}), ("1", {}), ("LA", {}), ("RGB", {"compress_level": 0})],
        "jpeg": [("RGB", {}), ("L", {}), ("RGB", {"progressive": True}), ("RGB", {"quality": 5}),
                 ("RGB", {"exif": b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0\0\0\0\0"}), ("CMYK", {})],
        "tiff": [("RGB", {}), ("L", {}), ("P", {}), ("1", {"compression": "group4"}), ("RGBA", {}),
                 *(("RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"))],
    }  # fmt: skip
    seeds: dict[str, list[bytes]] = {}
    for kind, made in flavours.items():
        for mode, options in made:
            file = io.BytesIO()
            pixels.convert(mode).save(file, kind, **options)
            seeds.setdefault(kind, []).append(file.getvalue())
    whole = seeds["png"][0]
    for name in (b"tEXt", b"zTXt", b"iCCP", b"eXIf", b"gAMA", b"tRNS", b"acTL"):
        seeds["png"].append(whole[:33] + _chunk(name, text) + whole[33:])
    return seeds


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_chunks(data: bytes) -> list[bytes]:
    chunks, at = [], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        chunks.append(data[at:end])
        at = end
    return chunks


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Some of: bits flipped, bytes overwritten, cut, repeated, swapped, size fields blown up, checksums mended."""
    for _ in range(int(rng.integers(1, 4))):
        how, n = int(rng.integers(9)), len(data)
        at, other = (int(value) for value in np.sort(rng.integers(0, max(n, 1), 2)))
        if how == 0:
            changed = bytearray(data)
            for bit in rng.integers(0, 8 * n, int(rng.integers(1, 9))) if n else ():
                changed[bit // 8] ^= 1 << bit % 8
            data = bytes(changed)
        elif how == 1:
            data = data[:at]
        elif how == 2:
            data = data[:at] + data[other:]
        elif how == 3:
            data = data[:other] + data[at:]
        elif how == 4:
            data = data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[other:]
        elif how == 5:  # a number that says how large something is; most stand early
            width = int(rng.choice([1, 2, 4]))
            at = int(rng.integers(0, max(1, min(n, 200))))
            value = int(rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF]))
            field = (value % 256**width).to_bytes(width, "little" if rng.random() < 0.5 else "big")
            data = data[:at] + field + data[at + width :]
        elif how == 6 and data[:4] == b"\x89PNG":  # chunks in another order
            chunks = _png_chunks(data)
            data = data[:8] + b"".join(chunks[k] for k in rng.permutation(len(chunks)))
        elif how == 7 and data[:4] == b"\x89PNG":  # checksums mended, so that damage reaches the decoder
            data = data[:8] + b"".join(_chunk(c[4:8], c[8:-4]) for c in _png_chunks(data))
        elif how == 8 and data[:4] == b"\x89PNG" and n > 33:  # other dimensions and types, with a right checksum
            size = rng.choice([0, 1, 47, 49, 4096, 65535, 2**31 - 1], 2)
            header = struct.pack(">II", *map(int, size)) + bytes(rng.choice([0, 1, 2, 3, 4, 6, 8, 16], 5).tolist())
            data = data[:8] + _chunk(b"IHDR", header) + data[33:]
    return data


def image_bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that say, or truly hold, far more than a patch."""
    signature, end = b"\x89PNG\r\n\x1a\n", _chunk(b"IEND", b"")
    zeros = zlib.compress(bytes(100_000_000), 9)
    for width, height in ((5000, 5000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (16_777_217, 1)):
        header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        yield f"png {width} x {height}", signature + header + _chunk(b"IDAT", zeros) + end
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    for kind in (b"zTXt", b"iCCP"):
        bomb = _chunk(kind, b"a\0\0" + zeros)
        yield kind.decode(), signature + header + bomb + _chunk(b"IDAT", zlib.compress(bytes(10))) + end
    yield "iTXt", signature + header + _chunk(b"iTXt", b"a\0\1\0\0\0" + zeros) + _chunk(b"IDAT", b"") + end
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "jpeg")
    data = small.getvalue()
    at = data.index(b"\xff\xc0") + 5
    yield "jpeg 65500 x 65500", data[:at] + struct.pack(">HH", 65500, 65500) + data[at + 4 :]
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "tiff")
    data = small.getvalue()
    for tag in (256, 257):
        at = data.index(struct.pack("<HH", tag, 4 if struct.pack("<HH", tag, 4) in data else 3)) + 2
        data = data[:at] + struct.pack("<HII", 4, 1, 100_000) + data[at + 10 :]
    yield "tiff 100000 x 100000", data
    for mode in ("RGB", "1"):
        small = io.BytesIO()
        Image.new(mode, (8_000, 8_000)).save(small, "tiff", compression="tiff_adobe_deflate")
        yield f"tiff {mode} 8000 x 8000", small.getvalue()


def draw_csv_patches(folder: Path) -> list[str]:
    """Eight tiny patches for tables to name."""
    for row in range(8):
        Image.fromarray(np.full((8, 8, 3), 20 * row, np.uint8)).save(folder / f"{row}.png")
    return [f"{row}.png" for row in range(8)]


def csv_seeds(names: list[str]) -> list[bytes]:
    """Whole tables of those patches."""
    plain = ["path,label", *(f"{name},{'ab'[k % 2]}" for k, name in enumerate(names))]
    wide = ["id,path,label,group,split,domain"]
    wide += [
        f"p{k},{name},{'ab'[k % 2]},slide {k // 2},{'train' if k < 6 else 'test'},lung" for k, name in enumerate(names)
    ]
    return ["\n".join(plain).encode(), "\r\n".join(wide).encode() + b"\r\n", b"\xef\xbb\xbf" + "\n".join(wide).encode()]


_CELLS = (b"", b"\0", b'"', b'""', b"a\nb", b"\r", b"=1+1", b"=cmd|'/C calc'!A0", b"@SUM(1)", b"../0.png",
          b"/etc/passwd",
          b"/dev/zero", b".", b"0.png\0", b"\xff\xfe", b"\xef\xbb\xbf", "é".encode(), "e\u0301".encode(), b"\x1b[2J",
          "\u202egnp".encode(), b"x" * 300, b"x" * 131_073, b"a/" * 3000, b" ", b"\t", b";", b"NaN", b"1e999", b"-1",
          "\U0001f9eb".encode(), b"\x85", "\u2028".encode(), b'"a,b"', b'"a""b"', b"\\", b"%s%n",
          b"{0.__class__}")  # fmt: skip


def mutated_csv(data: bytes, rng: np.random.Generator) -> bytes:
    """Cells replaced, columns and lines dropped, doubled or swapped, line ends mixed, bytes changed."""
    for _ in range(int(rng.integers(1, 4))):
        how = int(rng.integers(8))
        lines = data.split(b"\n")
        line = int(rng.integers(len(lines)))
        cells = lines[line].split(b",")
        cell = int(rng.integers(len(cells)))
        if how <= 2:
            huge = b"x" * 10_000_000 if rng.random() < 0.02 else None
            cells[cell] = huge or _CELLS[int(rng.integers(len(_CELLS)))]
            lines[line] = b",".join(cells)
            data = b"\n".join(lines)
        elif how == 3:
            ends = (b"\n", b"\r\n", b"\r", b"\n\n")
            data = b"".join(each + ends[int(rng.integers(4))] for each in lines)
        elif how == 4:
            data = b"\n".join(lines[k] for k in rng.integers(0, len(lines), len(lines)))
        elif how == 5:
            lines[line] = (
                b",".join(cells[:cell] + cells[cell + 1 :]) if rng.random() < 0.5 else b",".join([*cells, b"x"])
            )
            data = b"\n".join(lines)
        elif how == 6:
            data = (b"\xef\xbb\xbf", data.decode(errors="replace").encode("utf-16"), b"")[int(rng.integers(3))] + data
        else:
            data = mutated(data, rng)
    return data


# ------------------------------------------------------------------------------------------------------- hostile names

MARKER = "\x1b]0;owned\x07"
_HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "</script><b>", "{{ 7*7 }}",
    MARKER, "\x1b[2J\x1b[31m", "\u202egnp.exe", "\x9b31m", "a\rb", "tab\tb", "[red]x[/red]", "[/x]", "=1+1", "%n%s",
    unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"), "..", "-rf", "~", "$(id)", "`id`", "\u2066x",
    "\ud7ff\ue000", "漢字", "🧫", "a" * 251, "&lt;", "\\", "'", "a;b", "\u200b", "CON", " ", "\x7f",
)  # fmt: skip
_RAW = (MARKER.encode(), b"\x1b[2J\x1b[31m", "\u202e".encode(), "\x9b".encode(), "\u2066".encode(), b"owned\x07")


def names(folder: Path, scale: float, rng: np.random.Generator) -> Figures:
    """Names that mean something to a shell, a terminal, a page or a path, through every command on a terminal."""
    work = folder / "work"
    work.mkdir()
    files = []
    for k in range(80):
        name = _HOSTILE[k % len(_HOSTILE)].replace("/", "_").strip() or "blank"
        name = f"{name}.png" if k < len(_HOSTILE) and len(name.encode()) > 250 else f"{k}{name[:200]}.png"
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(work / name, "png")
        files.append(name)
    with (work / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "path", "label", "group", "split", "domain"))
        for k, name in enumerate(files):
            odd = _HOSTILE[k // 4 % len(_HOSTILE)]
            label = "Atypical" if k % 2 else f"<img src=x onerror=alert(1)>{MARKER}"
            rows.writerow((f"../{odd}{k}", name, label, f"{odd}{k // 4}", "test" if k > 59 else "train", odd))
    shutil.copy(work / "table.csv", work / f"[red]{MARKER}.csv")
    long = "r" * 250 + ".html"
    found: Counter[str] = Counter()
    commands: list[tuple[str, ...]] = [
        ("fm-extract", "--dataset", "table.csv", "--view", "full@32", "--precision", "fp32"),
        ("fm-extract", "--dataset", f"[red]{MARKER}.csv", "--view", "full@32", "--precision", "fp32", "--json"),
        ("fm-extract", "--dataset", MARKER),
        ("fm-extract", "--dataset", "x" * 300),
        ("fm-store", "info"),
        ("fm-store", "info", "--json"),
        ("fm-store", "verify"),
        ("fm-store", "export", "--dataset", "table", "--model", "efficientnet-lite0", "--view", "full@32",
         "--out", "o.npz"),
        ("fm-store", "verify", "--dataset", MARKER),
        ("fm-probe", "--cv", "3", "--train", "table"),
        ("fm-probe", "--cv", "3", "--train", "table", "--json"),
        ("fm-probe", "--cv", "3", "--train", f"../{MARKER}"),
        ("fm-finetune", "--train", "table.csv", "--view", "full@32", "--cv", "3", "--epochs", "1",
         "--precision", "fp32"),
        ("fm-report", "--replicates", "200", "--out", long),
        ("fm-report", "--replicates", "200", "--json"),
        ("fm-report", "--replicates", "200", "--format", "markdown"),
        ("fm-report", "--replicates", "200", "--format", "latex"),
        ("fm-report", MARKER),
        ("fm-predict", "RUN", "table.csv", "--json"),
        ("fm-predict", "RUN", MARKER),
    ]  # fmt: skip
    before = {path for path in folder.iterdir() if path.name != "work"}
    for command in commands:
        if "RUN" in command:
            command = tuple(str(next((work / "runs").glob("probe-*"))) if a == "RUN" else a for a in command)
        code, said = on_terminal(command, work)
        found["commands"] += 1
        found["commands that failed with one message"] += code == 1
        odd = code not in (0, 1) or b"Traceback" in said
        found["tracebacks (must be 0)"] += odd
        raw = [mark for mark in _RAW if mark in said]
        found["escape sequences on the terminal (must be 0)"] += bool(raw)
        if odd or raw or os.environ.get("TORTURE_VERBOSE"):
            print(command, code, raw, said[-1500:].decode(errors="replace").replace("\x1b", "ESC"), file=sys.stderr)
    found["files outside their folder (must be 0)"] = len({p for p in folder.iterdir() if p.name != "work"} - before)
    page = (work / long).read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(page)
    found["hostile tags or handlers in the page (must be 0)"] = tags.hostile
    found["control characters in the page (must be 0)"] = len(
        re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    )
    return {f"names: {name}": int(count) for name, count in found.items()}


class _Tags(html.parser.HTMLParser):
    hostile = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hostile += any(name.startswith("on") for name, _ in attrs) or dict(attrs).get("src") == "x"


def on_terminal(arguments: tuple[str, ...], cwd: Path) -> tuple[int, bytes]:
    """A command's exit status and what it sends to its terminal."""
    master, slave = os.openpty()
    os.set_blocking(master, False)

    def attach() -> None:
        os.dup2(slave, 1)
        os.dup2(slave, 2)

    child = spawn(arguments, cwd, Path(os.devnull), attach)
    os.close(slave)
    said = b""
    code: int | None = None
    while code is None or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.05)[0]:
            try:
                said += os.read(master, 1 << 16)
            except OSError:
                break  # the other end is closed
        if code is None:
            found, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if found else None
    os.close(master)
    return (ended(child) if code is None else code), said


CAMPAIGNS: dict[str, Callable[[Path, float, np.random.Generator], Figures]] = {
    "kill": kill, "flip": flip, "race": race, "full": full, "mutate": mutate, "names": names,
}  # fmt: skip


def torture(campaign: str, folder: Path, *, scale: float, seed: int) -> Figures:
    """A campaign's figures; those whose name says so must be 0."""
    place = folder / campaign
    place.mkdir()
    return CAMPAIGNS[campaign](place, scale, np.random.default_rng(seed))


def failed(figures: Figures) -> list[str]:
    """The figures that must be 0 and are not."""
    return [f"{name}: {count}" for name, count in figures.items() if "(must be 0)" in name and count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", choices=[*CAMPAIGNS, []], help="default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the trials")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong = []
    for campaign in options.campaigns or CAMPAIGNS:
        if campaign == "full" and not can_mount():
            print("full: left out, because this user may not mount a file system")
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            figures = torture(campaign, Path(folder), scale=options.scale, seed=options.seed)
        for name, count in figures.items():
            print(f"{name}: {count:,}", flush=True)
        print(f"{campaign}: {time.monotonic() - started:.0f} s\n", flush=True)
        wrong += failed(figures)
    sys.exit("not 0:\n" + "\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
