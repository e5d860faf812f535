"""Is there an option value, a file, an environment or a stream that makes a command end otherwise than it should?

    python tests/fuzz.py [--commands 1000] [--seed 0] [--only fm-probe] [--show]

A command may end with status 0, with 1 and one message, or with 2 and its usage; never with a traceback, and within
seconds. Each runs in a fork of one process that has imported everything, in a folder of its own, with values that are
drawn for the options that it really has. Nothing outside these folders is written, and no network is asked.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import extract.cli
import extract.doctor
import extract.embed
import features.cli
import features.exchange
import finetune.cli
import finetune.predict
import finetune.report
import finetune.run
import probe.cli
import probe.probing
import probe.report.terminal

SECONDS, PROCESSOR_SECONDS = 60, 20  # for one command, on a busy machine
CRASHED = 70
READER_LEFT = 141
N = 36  # patches

APPS: dict[str, tuple[Any, Callable[[], None]]] = {
    "fm-extract": (extract.cli.app, extract.cli.main),
    "fm-probe": (probe.cli.app, probe.cli.main),
    "fm-finetune": (finetune.cli.finetune_app, finetune.cli.main),
    "fm-predict": (finetune.cli.predict_app, finetune.cli.predict_main),
    "fm-report": (finetune.cli.report_app, finetune.cli.report_main),
    "fm-store": (features.cli.app, features.cli.main),
    "fm-doctor": (finetune.cli.doctor_app, finetune.cli.doctor_main),
}
# Commands that work, quickly. Options are added to them and replace those that they have.
PROBED, TUNED = "runs/probed", "runs/tuned"
WORK = {
    "fm-extract": ["--dataset patches.csv --view full@32 --precision fp32", "--list-models", "--list-datasets"],
    "fm-probe": ["--cv 3", "--cv 2 --recipe paper"],
    "fm-finetune": [
        "--method head --train patches.csv --test= --view full@32 --cv 2 --epochs 1 --precision fp32",
        "--lora-rank 2 --train patches.csv --test= --view full@32 --cv 2 --epochs 1 --precision fp32 --dry-run",
    ],
    "fm-predict": [f"{PROBED} 0.png", f"{TUNED} 0.png"],
    "fm-report": [f"{PROBED} --replicates 100", f"{PROBED} --replicates 100 --format markdown"],
    "fm-store info": [""],
    "fm-store verify": [""],
    "fm-store export": ["--dataset patches --model efficientnet-lite0 --view full@32 --out out.h5"],
    "fm-store import": [
        "good.npz --dataset patches --model other",
        "good.npy --ids ids.txt --table table.csv --dataset new --model other",
    ],
    "fm-doctor": [""],
}
NUMBERS = (
    "0", "1", "-1", "2", "3", "50", "0.5", "-0.0", "1e-320", "1e400", "nan", "-inf", "inf", "1e30", str(10**30),
    str(2**31), str(2**63), "9" * 5000, "0x10", "1_000", "٣", "", " ", "abc", "1,5", "½", "1e-4", "True", "None",
)  # fmt: skip
TEXTS = (
    "", " ", ",", ",,", "-", "--", ".", "..", "/", "\\", "é", "漢字", "a/b", "../x", "\udcff\udcfe", "\x1b[31m", "a\nb",
    "a" * 300, "a" * 5000, "%s", "{}", "*", "(", "[", "full", "full@32", "center8", "center0", "full@0", "center999999",
    "full@99999999999", "center8@32", "card", "cls", "mean", "pooled", "center+pooled", "pooled+pooled", "+", "lora",
    "head", "full,full", "auto", "cpu", "cuda", "cuda:0", "cuda:99", "cpu:7", "meta", "mps", "fp16", "bf16", "exact",
    "paper", "default", "html", "latex", "markdown", "anndata", "npz", "hdf5", "ray", "local", "0/1", "1/1", "0/0",
    "0/99", "1/0", "-1/2", "a/b", "99999999999999999999/999999999999999999999", "efficientnet-lite0", "uni", "patches",
    "demo", "ami-br", "timm/test_vit", "timm/nothing", "hf-hub:", "hf-hub:a", "hf-hub:a/b@c", "hf-hub:a/b/c", "0.1,0.5",
    "0", "1", "nan", "0.5,nan", "1e-9", "2", "-1", "Atypical", "Normal", "s3://", "s3://bucket/x", "file:///tmp",
    "http://127.0.0.1:1/x",
)  # fmt: skip
PATHS = (
    "", ".", "..", "/", "-", "none", "none/none", "/dev/null", "/dev/full", "/dev/stdout", "/proc/self/mem", "/proc/x",
    "0.png", "0.png/x", "patches.csv", "table.csv", "ids.txt", "good.npz", "good.npy", "embeddings.zarr", "runs",
    PROBED, TUNED, f"{PROBED}/run.json", f"{TUNED}/fold_0", "hostile", "~",
    "a" * 300, "a/" * 3000, "\udcff", "é", "new\nline",
    "out/new/file", "x.csv", "x.html", "x.h5", "embeddings.zarr/zarr.json",
)  # fmt: skip
ENVIRONMENT = {
    "HOME": (None, "", "/nonexistent", "/dev/null", "0.png"),
    "TMPDIR": ("", "/nonexistent", "0.png"),
    "MITOFM_DATA": ("", "0.png", "/nonexistent", ".", "hostile"),
    "MITOFM_CACHE": ("", "0.png", "/nonexistent/x", "/proc/x"),
    "XDG_CACHE_HOME": ("", "0.png", "/nonexistent/x"),
    "COLUMNS": ("", "0", "-1", "abc", "1", "7", "99999"),
    "LINES": ("0", "-1", "abc"),
    "TERM": ("", "dumb", "junk", "xterm-256color"),
    "NO_COLOR": ("", "1"),
    "FORCE_COLOR": ("1",),
    "RANK": ("", "x", "-1", "0", "7"),
    "WORLD_SIZE": ("", "x", "-1", "0", "1", "1.5"),
    "LOCAL_RANK": ("", "x", "-1", "0"),
    "MASTER_ADDR": ("", "x"),
    "MASTER_PORT": ("", "x", "-1", "99999999"),
    "TORCHELASTIC_RESTART_COUNT": ("x", ""),
    "SLURM_PROCID": ("", "x", "-1", "3"),
    "SLURM_NTASKS": ("", "x", "0", "-1"),
    "SLURM_LOCALID": ("", "x", "-1"),
    "SLURM_ARRAY_TASK_ID": ("", "x", "-1", "5"),
    "SLURM_ARRAY_TASK_COUNT": ("", "x", "0", "-3"),
    "SLURM_ARRAY_TASK_STEP": ("", "x", "0"),
    "RAY_ADDRESS": ("", "x"),
    "AWS_ENDPOINT_URL": ("", "x", "http://127.0.0.1:1"),
    "TERMINAL_WIDTH": ("", "x", "-1"),
    "TZ": ("", "junk"),
}
ENCODINGS = ("utf-8", "utf-8", "latin-1", "ascii", "utf-16", "cp1252", "koi8-r")
STREAMS = ("file", "file", "file", "file", "left", "closed", "full")


@dataclass(frozen=True)
class Trial:
    """One command: arguments, changes of the environment, and how its stdout and stderr lie."""

    arguments: tuple[str, ...]
    environment: dict[str, str | None] = field(default_factory=dict)
    encoding: str = "utf-8"
    out: str = "file"
    err: str = "file"
    damage: tuple[str, str] | None = None  # a file, and what has happened to it

    def __str__(self) -> str:
        changes = [f"-u {name}" if value is None else f"{name}={value!r}" for name, value in self.environment.items()]
        streams = [f"PYTHONIOENCODING={self.encoding}"] * (self.encoding != "utf-8")
        streams += [f"{name}:{how}" for name, how in (("stdout", self.out), ("stderr", self.err)) if how != "file"]
        changes += [f"[{self.damage[0]}: {self.damage[1]}]"] if self.damage else []
        return ascii(" ".join([*changes, *streams, shlex.join(self.arguments)]))[1:-1][:600]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    trial: Trial
    status: int
    seconds: float
    out: str
    err: str

    def fault(self) -> str:
        """What is wrong with it; empty if nothing is."""
        said = self.out + self.err
        if self.status in (-signal.SIGKILL, -signal.SIGXCPU):
            return "hang"
        if "Traceback" in said or self.status == CRASHED:
            return "traceback"
        if re.search("Exception ignored|Fatal Python|terminate called|Aborted", said):
            return "crash"
        n_errors = len(re.findall(r"^error: ", self.err, re.MULTILINE))
        heard = self.trial.err == "file"
        if self.status == 0:
            return "an error, and status 0" * (n_errors > 0)
        if self.status == 1:
            lost = self.trial.out == "closed"
            as_json = "--json" in self.trial.arguments and (lost or re.search(r'"(ok|sound)": false', said))
            return "" if n_errors == 1 or as_json or not heard else f"{n_errors} messages"
        if self.status == 2:
            said_so = "Usage" in said or "COLUMNS" in self.trial.environment  # too narrow for a word
            return "" if n_errors == 0 and (not heard or said_so) else "status 2 without usage"
        if self.status == READER_LEFT and self.trial.out == "left":
            return ""
        return f"status {self.status}"


# ----------------------------------------------------------------------------------------------------------- drawing


def draw(rng: random.Random, only: str | None) -> Trial:
    """Draw a command."""
    name = rng.choice([name for name in WORK if only is None or name.startswith(only)])
    arguments = [*name.split(), *shlex.split(rng.choice(WORK[name]))]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        arguments += rng.choice(list(_mutations(rng, name)))
    environment: dict[str, str | None] = {}
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        variable = rng.choice(list(ENVIRONMENT))
        environment[variable] = rng.choice(ENVIRONMENT[variable])
    out, err = rng.choice(STREAMS), "file" if rng.random() < 0.9 else rng.choice(("closed", "full", "left"))
    damage = (rng.choice(DAMAGED), rng.choice(list(DAMAGES))) if DAMAGED and rng.random() < 0.3 else None
    return Trial(tuple(arguments), environment, rng.choice(ENCODINGS), out, err, damage)


def _mutations(rng: random.Random, name: str) -> Iterator[list[str]]:
    """Yield what may be added to a command: an option with a hostile value for every option that it has, and more."""
    command, *verb = name.split()
    found = get_command(APPS[command][0])
    found = found.commands[verb[0]] if verb else found
    for option in found.params:
        if option.param_type_name != "option" or option.name in ("help", "compile"):
            continue  # compiling takes minutes
        flag = option.opts[0]
        if getattr(option, "is_flag", False):
            yield [rng.choice([flag, *option.secondary_opts])]
            continue
        described = getattr(option, "type_descriptor", None)  # of newer typers
        kind = str(described.annotation if described else option.type).lower()
        pool = NUMBERS if re.search("int|float", kind) else PATHS if "path" in kind else TEXTS
        # A text may be a path, a path anything.
        pool = rng.choice((pool, pool, pool, TEXTS, PATHS, HOSTILE or PATHS)) if pool is not NUMBERS else pool
        value = rng.choice(pool)
        yield [f"{flag}={value}"] if rng.random() < 0.8 else [flag, value]
    yield [rng.choice(rng.choice((PATHS, HOSTILE or PATHS, TEXTS)))]
    yield ["--" + rng.choice(TEXTS)]


# --------------------------------------------------------------------------------------------------------- the folder

HOSTILE: list[str] = []
DAMAGED: list[str] = []  # files of stores, runs and tables that may be


def _replace(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": _replace(lambda content: b""),
    "cut": _replace(lambda content: content[: len(content) // 2]),
    "longer": _replace(lambda content: content * 2),
    "junk": _replace(lambda content: bytes(range(256))),
    "flipped": _replace(lambda content: content[:9] + bytes([content[9] ^ 1]) + content[10:] if content[9:] else b"x"),
    "null": _replace(lambda content: b"null"),
    "list": _replace(lambda content: b"[]"),
    "object": _replace(lambda content: b"{}"),
    "numbers": _replace(lambda content: re.sub(rb"[0-9]", b"9", content)),
    "words": _replace(lambda content: re.sub(rb'": [^,\n{\[]+', b'": "x"', content)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


def prepare(place: Path) -> None:
    """Make patches, a store, a probe run, a fine-tuned run and hostile files, from which every command starts."""
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = ["path,label,group,split"]
    for row in range(N):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"{row}.png")
        label = "Atypical" if row % 3 == 0 else "Normal"
        rows.append(f"{row}.png,{label},slide {row // 3},{'test' if row > 26 else 'train'}")
    (place / "patches.csv").write_text("\n".join(rows) + "\n")
    ids = [f"{row}.png" for row in range(N)]
    (place / "ids.txt").write_text("\n".join(ids) + "\n")
    (place / "table.csv").write_text("id,label\n" + "".join(f"{id},{row % 2}\n" for row, id in enumerate(ids)))
    values = rng.normal(size=(N, 5)).astype(np.float32)
    np.save(place / "good.npy", values)
    np.savez(place / "good.npz", features=values, ids=ids)
    for line in (WORK["fm-extract"][0], WORK["fm-probe"][0], WORK["fm-finetune"][0]):
        name = next(name for name, lines in WORK.items() if line in lines)
        outcome = run(Trial((name, *shlex.split(line))), place, seconds=300)
        if outcome.status:
            raise SystemExit(f"{outcome.trial} ended with {outcome.status}:\n{outcome.out}{outcome.err}")
    for kind, target in (("probe", PROBED), ("finetune", TUNED)):
        (found,) = (place / "runs").glob(f"{kind}-*")
        found.rename(place / target)
    _hostile_files(place / "hostile", values, ids)
    for folder in ("embeddings.zarr", "runs"):
        files = [path for path in (place / folder).rglob("*") if path.is_file()]
        DAMAGED.extend(sorted(str(path.relative_to(place)) for path in files))
    DAMAGED.extend(["patches.csv", "table.csv", "ids.txt", "good.npz", "good.npy", "0.png"])
    HOSTILE.extend(sorted(str(path.relative_to(place)) for path in (place / "hostile").iterdir()))


def _hostile_files(folder: Path, values: np.ndarray, ids: list[str]) -> None:
    folder.mkdir()
    for suffix in ("npz", "npy", "h5", "h5ad", "csv", "txt", "png", "json", "pt", "safetensors", "zarr", "html", ""):
        (folder / f"empty.{suffix}").write_bytes(b"")
        (folder / f"junk.{suffix}").write_bytes(bytes(range(256)) * 20)
        (folder / f"folder.{suffix}").mkdir()
    for name, text in {
        "bom.csv": "\ufeffpath,label\n", "zero.csv": "path,label\n\x000.png,1\n", "ragged.csv": "id,label\na,1,2\nb\n",
        "label.csv": "id,label\na,NA\nb,2\n", "twice.csv": "id,id,label\na,b,1\n",
        "long.csv": "id,label\n" + "a" * 200_000,
        "up.csv": "path,label\n../../../etc/passwd,1\nhttp://x/y.png,0\n", "list.json": "[]", "deep.json": "[" * 5000,
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    (folder / "latin.csv").write_bytes("path,label\né.png,1\n".encode("latin-1"))
    (folder / "cut.png").write_bytes((folder.parent / "0.png").read_bytes()[:100])
    (folder / "cut.npz").write_bytes((folder.parent / "good.npz").read_bytes()[:300])
    (folder / "cut.npy").write_bytes((folder.parent / "good.npy").read_bytes()[:200])
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    arrays: dict[str, dict[str, Any]] = {
        "transposed": {"features": values.T, "ids": ids}, "one": {"features": values[None], "ids": ids},
        "bytes": {"features": values, "ids": np.array(ids, "S")}, "zeros": {"features": values * 0, "ids": ids},
        "objects": {"features": values, "ids": np.array(ids, object)}, "none": {}, "no ids": {"features": values},
        "numbers": {"features": values, "ids": np.arange(N)}, "integers": {"features": values.astype(int), "ids": ids},
        "complex": {"features": values.astype(complex), "ids": ids}, "tiny": {"features": values * 1e-9, "ids": ids},
        "nan": {"features": values * np.nan, "ids": ids}, "flat": {"features": values.ravel(), "ids": ids},
        "huge": {"features": values.astype(float) * 1e300, "ids": ids}, "scalar": {"features": 3.0, "ids": "a"},
        "few": {"features": values[:3], "ids": ids[:3]}, "bool": {"features": values > 0, "ids": ids},
        "no rows": {"features": values[:0], "ids": np.array([], "U1")}, "text": {"features": ids, "ids": ids},
        "no columns": {"features": values[:, :0], "ids": ids}, "record": {"features": np.zeros(N, "f4,f4"), "ids": ids},
        "dates": {"features": values, "ids": np.array(["2020-01-01"] * N, "M8[D]")},
    }  # fmt: skip
    for name, columns in arrays.items():
        np.savez(folder / f"{name}.npz", **columns)
        with contextlib.suppress(TypeError), h5py.File(folder / f"{name}.h5", "w") as file:
            for key, column in columns.items():
                text = np.asarray(column).dtype.kind in "UO"
                file.create_dataset(key, data=np.asarray(column, object) if text else column)
    with h5py.File(folder / "groups.h5", "w") as file:
        file.create_group("features")
        file.create_group("ids")


# -------------------------------------------------------------------------------------------------------- running


def run(trial: Trial, cwd: Path, *, seconds: float = SECONDS) -> Outcome:
    """Run a command in a fork. One that takes longer than `seconds` is killed."""
    logs = cwd.parent / "out.log", cwd.parent / "err.log"
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _be(trial, cwd, *logs)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - start > seconds:
            os.kill(child, signal.SIGKILL)
            seconds = float("inf")
        time.sleep(0.003)
    texts = [log.read_bytes().decode(trial.encoding, "replace") if log.exists() else "" for log in logs]
    return Outcome(trial, os.waitstatus_to_exitcode(status), time.monotonic() - start, *texts)


def _be(trial: Trial, cwd: Path, out: Path, err: Path) -> None:
    """Become a command, and never return."""
    status = CRASHED
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 1))
        os.chdir(cwd)
        for name, value in trial.environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.stdout = _stream(1, trial.out, out, trial.encoding)
        sys.stderr = _stream(2, trial.err, err, trial.encoding)
        sys.argv = list(trial.arguments)
        APPS[trial.arguments[0]][1]()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - a fork must not fall through into the parent's code
        with err.open("ab") as file:
            file.write(traceback.format_exc().encode(trial.encoding, "replace"))
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()  # as the interpreter does at its end
            sys.stderr.flush()
        os._exit(status)


def _stream(descriptor: int, how: str, log: Path, encoding: str) -> Any:
    """Lay stdout or stderr as asked, and open it as Python would."""
    log.unlink(missing_ok=True)
    if how == "closed":
        os.close(descriptor)
        return None
    if how == "left":
        here, there = os.pipe()
        os.close(here)
    else:
        there = os.open("/dev/full" if how == "full" else log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(there, descriptor)
    os.close(there)
    buffer = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
    return io.TextIOWrapper(buffer, encoding, "strict" if descriptor == 1 else "backslashreplace")


def warm() -> None:
    """Import what commands import when they first parse, print and read, so that forks need not."""
    for app, _ in APPS.values():
        CliRunner().invoke(app, ["--help"])
        CliRunner().invoke(app, ["--no-such-option"])
    CliRunner().invoke(features.cli.app, ["info", "--store", "/nonexistent"])
    Image.init()
    gc.collect()
    gc.freeze()


def campaign(n: int, *, seed: int, only: str | None = None, show: bool = False) -> tuple[Counter[str], list[Outcome]]:
    """Run `n` commands. Returns how many ended how, and those that ended as they should not."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as temporary:
        material = Path(temporary) / "material" / "place"
        warm()
        prepare(material)
        for _ in range(n):
            trial = draw(rng, only)
            cwd = Path(temporary) / "trial" / "place"
            shutil.copytree(material, cwd, symlinks=True)
            if trial.damage:
                DAMAGES[trial.damage[1]](cwd / trial.damage[0])
            outcome = run(trial, cwd)
            shutil.rmtree(cwd.parent)
            counts[f"status {outcome.status}"] += 1
            if fault := outcome.fault():
                counts[fault] += 1
                faults.append(outcome)
            if show or fault:
                print(f"{outcome.seconds:5.1f} s  {outcome.status:3}  {fault or 'ok':10}  {trial}", file=sys.stderr)
            if fault:
                print("    " + "\n    ".join((outcome.out[-300:] + outcome.err[-1500:]).splitlines()), file=sys.stderr)
    return counts, faults


def main() -> None:
    """Run commands and print a JSON object; exit status 1 if any ended otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="this command alone")
    parser.add_argument("--show", action="store_true", help="show every command")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    counts, faults = campaign(options.commands, seed=options.seed, only=options.only, show=options.show)
    seconds = round(time.monotonic() - start, 1)
    faulty = [{"fault": outcome.fault(), "command": str(outcome.trial)} for outcome in faults]
    print(json.dumps({"commands": options.commands, "seconds": seconds, **counts, "faults": faulty}, indent=1))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
