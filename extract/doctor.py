"""Can this machine do what is asked of it, and what helps where it cannot?

Nothing is downloaded and nothing is written. A question to the hub that is not answered within seconds counts as
unanswered, so the result also comes without a network, behind a proxy and on a cluster's compute node.
"""

from __future__ import annotations

import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeVar

import torch
from huggingface_hub import constants, get_token

from extract import download, hub, openvino
from extract.backbones import BACKBONES, Backbone, fetch_weights, find_backbone, weight_files
from extract.benchmark import (
    AMI_BR_CSV,
    AMI_BR_CSV_SHA256,
    DATA_VARIABLE,
    DATASETS,
    TABLE_SHA256,
    check_known_files,
    difference_to_published,
    known_files,
)
from extract.custom import is_code
from extract.datasets import local_data
from features.console import ProgressCallback, UserError, progress
from features.device import find_device, has_bf16
from features.options import DEFAULT_STORE
from features.store import FeatureStore

Status = Literal["ok", "note", "fail"]
Access = Literal["granted", "not granted", "not asked", "not needed"]
Answer = TypeVar("Answer")

_HUB_SECONDS = 8.0  # for the first question; a resolver or proxy may take longer than any timeout of a request
_MODELS_SECONDS = 15.0  # for the questions about all models together
_OWN_SECONDS = 600.0  # for the user's own models, which load their weights
_AT_ONCE = 8  # questions
_FEW_BYTES = 1_000_000_000  # less free space than this is noted
_DIFFERS = "It is used as it is; restore the published files to compare with published figures."
_SHOWN = 5  # how many of many damaged blocks are named


@dataclass(frozen=True)
class DoctorOptions:
    """What is asked for. An attribute that is None was not asked for, so its absence is no failure.

    Attributes:
        models: names as `--model` of fm-extract takes them; empty for every registered one.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        data: folder laid out like AMi-Br_Benchmark.
        store: feature store, a folder or `s3://bucket/prefix`.
        runs: folder of runs.
        verify: read every byte of patches and store.
    """

    models: tuple[str, ...] = ()
    device: str = "auto"
    data: Path | None = None
    store: Path | str | None = None
    runs: Path = Path("runs")
    verify: bool = False


@dataclass(frozen=True)
class Check:
    """One line. Status "fail": what was asked for cannot work; "note": a lack that nothing asked for needs."""

    group: Literal["machine", "disk", "data", "store", "hub", "self-check"]
    name: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class ModelCheck:
    """Whether the weights of one model are here or can be downloaded.

    Attributes:
        name: as it was asked for.
        status: "ok" if it is here or can be downloaded; otherwise "fail" if it was asked for by name, else "note".
        repository: "organisation/name"; empty for the bundled one.
        cached: the commit of the weights in the cache (a package's version for the bundled one), or None.
        gated: whether access has to be requested.
        access: whether the hub would let it be downloaded.
        remedy: what helps.
    """

    name: str
    status: Status
    repository: str
    cached: str | None
    gated: bool
    access: Access
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The result of all checks."""

    checks: list[Check]
    models: list[ModelCheck]

    @property
    def failed(self) -> list[Check | ModelCheck]:
        """What was asked for and cannot work."""
        lines: list[Check | ModelCheck] = [*self.checks, *self.models]
        return [line for line in lines if line.status == "fail"]


def diagnose(options: DoctorOptions) -> Diagnosis:
    """Look at the machine, the disk, data, store, hub and models."""
    hub_checks, reachable = _hub()
    checks = [*_machine(options.device), *_disk(options), *_data(options), *_store(options), *hub_checks]
    return Diagnosis(checks, _models(options.models, reachable=reachable))


# --- the machine ------------------------------------------------------------------------------------------------------


def _machine(device: str) -> list[Check]:
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bf16 = "in hardware" if has_bf16(torch.device("cpu")) else "not there"
    facts = {
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.prefix})",
        "torch": f"{torch.__version__}, built {build}",
        "packages": ", ".join(f"{name} {metadata.version(name)}" for name in ("timm", "huggingface_hub", "zarr")),
        "processor": f"{n_cores} cores, bf16 {bf16}",
        "memory": _memory(),
    }
    return [*(Check("machine", name, "ok", found) for name, found in facts.items()), _openvino(), *_gpus(device)]


def _openvino() -> Check:
    found = openvino.version()
    if found is None:
        remedy = f"`{openvino.INSTALL}`: convolutional networks then embed about twice as fast on processors."
        return Check("machine", "OpenVINO", "note", "not installed: torch computes all networks", remedy)
    return Check("machine", "OpenVINO", "ok", f"{found}, for convolutional networks in fp32 on processors")


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    free = f"{_gigabytes(int(available[1]) * 1024)} free of " if available else ""
    return f"{free}{_gigabytes(total)}{_memory_limit(total)}"


def _memory_limit(total: int) -> str:
    """Say how much of the memory a container or a cluster's job may use, where that is less than all."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return f"; at most {_gigabytes(int(text))} here" if text.isdigit() and int(text) < total else ""


def _gpus(device: str) -> list[Check]:
    if_missing: Status = "fail" if device.startswith("cuda") else "note"
    installed = installed_gpus()
    with warnings.catch_warnings(record=True) as caught:  # torch says in a warning why it cannot use a GPU
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        checks = [_gpu(index, installed) for index in range(torch.cuda.device_count())]
    else:
        reason = str(caught[0].message).split("(Triggered")[0].strip() if caught else ""
        remedy = ""
        if installed and torch.version.cuda is None:
            remedy = (
                f"nvidia-smi lists {installed[0]}, but this torch is built for CPUs only: install one built for CUDA "
                "(pytorch.org has the command), or work with `device='cpu'`."
            )
        elif installed or if_missing == "fail":
            remedy = reason or (
                f"nvidia-smi lists {installed[0]}, but torch sees no GPU: look at CUDA_VISIBLE_DEVICES, or update the "
                "driver."
                if installed
                else "This machine has no NVIDIA GPU and driver: run on one that has, or with `device='cpu'`."
            )
        checks = [Check("machine", "GPU", if_missing, "none that torch can use", remedy)]
    try:
        find_device(device)
    except UserError as error:
        if if_missing == "note" or available:
            checks.append(Check("machine", "device", "fail", f"{device!r} is not here", str(error)))
    return checks


def _gpu(index: int, installed: list[str]) -> Check:
    name = f"GPU {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if has_bf16(torch.device("cuda", index)) else "no bf16"
    except RuntimeError as error:
        remedy = "Another process may hold it, or its driver may need a restart: look at nvidia-smi."
        return Check("machine", name, "fail", f"cannot be used: {str(error).splitlines()[0]}", remedy)
    driver = installed[0].rpartition(", ")[2] if installed else "unknown"
    memory = f"{_gigabytes(free)} free of {_gigabytes(total)}"
    return Check("machine", name, "ok", f"{torch.cuda.get_device_name(index)}, {memory}, {bf16}, driver {driver}")


def installed_gpus() -> list[str]:
    """List name and driver version of every installed GPU, whether torch can use it or not."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


# --- disk, data, store ------------------------------------------------------------------------------------------------


def _disk(options: DoctorOptions) -> list[Check]:
    store = str(options.store or DEFAULT_STORE)
    return [
        *(() if "://" in store else (_folder("store", Path(store), "`store`"),)),  # a bucket is on no disk
        _folder("runs", options.runs, "`runs`"),
        _folder("weights", Path(constants.HF_HUB_CACHE), "HF_HOME"),
        _folder("downloads", download.cache_folder(), "MITOFM_CACHE"),
    ]


def _folder(name: str, path: Path, choose: str) -> Check:
    parent, n_bytes = _nearest_folder(path), _free_bytes(path)
    found = f"{path}: {_gigabytes(n_bytes)} free"
    if not os.access(parent, os.W_OK | os.X_OK):
        remedy = f"Permit writing to {parent}, or choose another folder with {choose}."
        if path.exists() and name != "runs":
            return Check("disk", name, "note", f"{found}, read-only: its files can be used, none can be added", remedy)
        return Check("disk", name, "fail", f"{found}, not writable", remedy)
    if n_bytes < _FEW_BYTES:
        return Check("disk", name, "note", found, f"Make room in {parent}, or choose another folder with {choose}.")
    return Check("disk", name, "ok", found)


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(_nearest_folder(path)).free


def _data(options: DoctorOptions) -> list[Check]:
    folder = local_data(options.data)
    if folder is None:
        found = f"none here: public datasets are downloaded (215 MB) when first used, unless {DATA_VARIABLE} names them"
        return [Check("data", "folder", "note", found)]
    checks = [*_tables(folder), *_datasets(folder, whole=options.verify)]
    if not any(check.name in DATASETS for check in checks):
        found = "no dataset in it" if folder.is_dir() else "there is no such folder"
        remedy = (
            "Expected a clone of AMi-Br_Benchmark (folders AMi-Br, AtNorM-Br, AtNorM-MD and two CSV files). Give its "
            f"path with `data` or {DATA_VARIABLE}, or leave both out to download it."
        )
        return [Check("data", "folder", "fail", f"{folder}: {found}", remedy)]
    return [Check("data", "folder", "ok", str(folder)), *checks]


def _tables(folder: Path) -> Iterator[Check]:
    for name, published in (TABLE_SHA256 | {AMI_BR_CSV: AMI_BR_CSV_SHA256}).items():
        if not (folder / name).is_file():
            continue
        if hub.sha256_of(folder / name) == published:
            yield Check("data", name, "ok", "as published")
        else:
            yield Check("data", name, "note", "another SHA-256 than published", _DIFFERS)


def _datasets(folder: Path, *, whole: bool) -> Iterator[Check]:
    """Compare the datasets that are there with the published ones: by every byte, or by number and size of patches."""
    for name, record in DATASETS.items():
        if not record.folder or not (folder / record.folder).is_dir():
            continue
        try:
            files = known_files(name, folder)
            sha256, n_bytes = None, sum(file.path.stat().st_size for file in files)
            if whole:
                sha256, n_bytes = check_known_files(name, files)
            difference = difference_to_published(name, files, sha256, n_bytes)
        except UserError as error:
            yield Check("data", name, "fail", "cannot be used", str(error))
            continue
        if difference:
            yield Check("data", name, "note", f"{len(files):,} patches, {difference}", _DIFFERS)
        else:
            checked = "every byte" if whole and record.digest else "number and size"
            yield Check("data", name, "ok", f"{len(files):,} patches, as published ({checked})")


def _store(options: DoctorOptions) -> list[Check]:
    path = options.store or DEFAULT_STORE
    if options.store is None and not Path(path).exists():
        return [Check("store", str(path), "note", "none yet: fm-extract makes it")]
    try:
        store = FeatureStore.open(path)
        names = store.datasets()
        for name in names:
            store.samples(name)
        entries = store.entries()
        problems = [problem.what for problem in store.verify()] if options.verify else []
    except UserError as error:
        return [Check("store", str(path), "fail", "cannot be used", str(error))]
    n_unfinished = sum(not entry.complete for entry in entries)
    found = f"{_count(len(names), 'dataset')}, {_count(len(entries), 'set')} of embeddings"
    if problems:
        remedy = "\n".join(problems[:_SHOWN]) + f"\n… and {len(problems) - _SHOWN} more" * (len(problems) > _SHOWN)
        return [Check("store", str(path), "fail", f"{found}, {len(problems)} of its parts damaged", remedy)]
    if n_unfinished:
        remedy = "The same fm-extract command finishes what was interrupted."
        return [Check("store", str(path), "note", f"{found}, {n_unfinished} unfinished", remedy)]
    return [Check("store", str(path), "ok", f"{found}, {'every byte sound' if options.verify else 'complete'}")]


# --- the hub and its models -------------------------------------------------------------------------------------------


def _hub() -> tuple[list[Check], bool]:
    """Check the hub and the token; return the checks, and whether the hub can be asked about models."""
    where = hub.endpoint()
    token = Check("hub", "token", "ok", "present")
    if get_token() is None:
        token = Check("hub", "token", "note", "none: gated models need one, in HF_TOKEN or by `hf auth login`")
    if constants.HF_HUB_OFFLINE:
        found = f"{where} not asked: HF_HUB_OFFLINE is set, only the cache is used"
        return [Check("hub", "hub", "note", found), token], False
    try:
        hub.refuse_malformed_token()
    except UserError as error:
        return [Check("hub", "token", "fail", "present, but cannot be sent", str(error))], False
    started = time.perf_counter()
    answer = _answers({"hub": hub.check_hub}, within=_HUB_SECONDS)["hub"]
    seconds = f"{time.perf_counter() - started:.1f} s"
    if isinstance(answer, Exception):
        return [Check("hub", "hub", "note", f"{where} did not answer ({seconds})", str(answer)), token], False
    if answer is False:
        token = Check("hub", "token", "fail", "present, but rejected by the hub", hub.TOKEN_REJECTED)
    elif answer:
        token = Check("hub", "token", "ok", "present, accepted by the hub")
    return [Check("hub", "hub", "ok", f"{where} answers ({seconds})"), token], True


def _models(names: tuple[str, ...], *, reachable: bool) -> list[ModelCheck]:
    # A hf-hub: name is read from its repository's config.json; every other is known without the hub.
    records: dict[str, Callable[[], Backbone]] = {
        name: partial(find_backbone, name, run_file=True) for name in names or BACKBONES
    }
    answers = _answers(records, within=_OWN_SECONDS if any(map(is_code, names)) else _HUB_SECONDS)
    backbones = {name: record for name, record in answers.items() if isinstance(record, Backbone)}
    questions = {name: partial(_ask_for, record) for name, record in backbones.items() if record.hub_id and reachable}
    with progress("asking the hub", len(questions), unit="models") as advance:
        access = _answers(questions, within=_MODELS_SECONDS, advance=advance)
    failed: Status = "fail" if names else "note"
    return [
        _model(name, record, access, failed)
        if isinstance(record, Backbone)
        else ModelCheck(name, "fail", "", None, False, "not granted", str(record))
        for name, record in answers.items()
    ]


def _model(name: str, backbone: Backbone, access: Mapping[str, Exception | None], failed: Status) -> ModelCheck:
    if not backbone.hub_id:
        try:
            fetch_weights(backbone)
        except UserError as error:
            return ModelCheck(name, failed, "", None, False, "not needed", str(error))
        return ModelCheck(name, "ok", "", backbone.revision, False, "not needed")
    cached = hub.cached_commit(backbone.hub_id, weight_files(backbone)[0], revision=backbone.revision)
    refusal = access.get(name)
    granted: Access = "not asked" if name not in access else "granted" if refusal is None else "not granted"
    needed, free = 4 * backbone.n_parameters, _free_bytes(Path(constants.HF_HUB_CACHE))
    remedy = ""
    if cached:
        pass
    elif granted == "not asked":
        remedy = (
            f"{backbone.hub_id} is not in the cache {constants.HF_HUB_CACHE}, and the hub was not asked for it. "
            f"Connect (see the hub's line), or {hub.LOCAL_FILE}."
        )
    elif refusal is not None:
        remedy = str(refusal)
    elif needed > free:
        remedy = (
            f"Its weights take about {_gigabytes(needed)}, and {constants.HF_HUB_CACHE} has {_gigabytes(free)} free. "
            "Make room, or point HF_HOME at another disk."
        )
    return ModelCheck(name, failed if remedy else "ok", backbone.hub_id, cached, backbone.gated, granted, remedy)


def _ask_for(backbone: Backbone) -> None:
    *others, last = weight_files(backbone)
    ask = partial(hub.check_access, backbone.hub_id, revision=backbone.revision, licence=backbone.licence)
    for file in others:
        with suppress(hub.MissingFile):
            return ask(file)
    return ask(last)


def _answers(
    questions: Mapping[str, Callable[[], Answer]],
    *,
    within: float,
    advance: ProgressCallback = lambda n, note=None: None,
) -> dict[str, Answer | UserError]:
    """Ask all questions at once; the answer is a UserError where one was raised, or where none came in time."""
    slots = threading.Semaphore(_AT_ONCE)
    finished = queue.SimpleQueue[tuple[str, Answer | UserError]]()

    def ask(name: str) -> None:
        with slots:
            try:
                finished.put((name, questions[name]()))
            except UserError as error:
                finished.put((name, error))

    # Daemon threads: one that waits for a name server cannot be stopped, and must not delay the exit.
    for name in questions:
        threading.Thread(target=ask, args=(name,), daemon=True).start()
    answers: dict[str, Answer | UserError] = {}
    deadline = time.monotonic() + within
    with suppress(queue.Empty):
        while len(answers) < len(questions):
            name, answer = finished.get(timeout=max(0.0, deadline - time.monotonic()))
            answers[name] = answer
            advance(1)
    no_answer = UserError(
        f"{hub.endpoint()} gave no answer in {within:.0f} seconds. Check the connection, name resolution, HF_ENDPOINT "
        "and any proxy; what is in the cache works without the hub, at once with HF_HUB_OFFLINE=1."
    )
    return {name: answers.get(name, no_answer) for name in questions}


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"
