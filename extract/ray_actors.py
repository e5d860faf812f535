"""How do Ray actors share the work?

Each actor holds the networks, and one GPU where there are any. The driver sends it row ranges, never pixels: an actor
reads the patches itself and writes to the store itself. When an actor dies, its row ranges go back to the head of the
queue and a new actor takes its place; blocks that it had finished are in the store and are not computed again.

These are plain Ray actors and not Ray Data: embeddings go to files, so there is no data set to stream, and the death of
an actor is an exception in one loop here. (Ray Data also hangs where actors use every logical processor.)
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from extract.backbones import find_backbone
from extract.datasets import load_dataset
from extract.embed import Summary, embed_rows, summaries
from extract.prepare import Extraction, ExtractOptions, Prepared, prepare
from extract.shard import Shard
from features.console import UserError, progress, say
from features.store import FeatureStore

_UNITS_PER_TASK = 4  # within a task the next unit is decoded while the network works on this one
_FAILURES_PER_ACTOR = 3  # more in a row mean that no actor can live
_TIMEOUT = 60  # seconds without news
_SPARE_CPUS = 2  # logical ones, so that no actor ever waits for the driver's processor
_OBJECT_STORE = 100 * 2**20  # bytes: only row numbers travel


@dataclass(frozen=True)
class ExtractionSpec:
    """What an actor needs to know: names and options. Paths are as the user gave them, relative to `folder`."""

    dataset: str
    models: tuple[str, ...]
    store: str
    # Arguments of load_dataset; `data` among them, because an actor's machine need not have this one's environment.
    reading: Mapping[str, Any]
    weights: Path | None
    options: ExtractOptions
    folder: Path = field(default_factory=Path.cwd)


class EmbeddingActor:
    """An actor: it loads the networks once, then embeds the row ranges that the driver sends it."""

    # Not in __init__: an actor whose __init__ fails is dead, and the driver would not learn why.
    def prepare(self, spec: ExtractionSpec) -> tuple[list[range], list[Summary]]:
        """Load patches and networks and open the entries of the store.

        Returns:
            All units of rows that are missing, and a summary per (backbone, view) as if nothing were embedded.

        Raises:
            UserError: as `extract_dataset`, or if this machine does not see the folder of `spec`.
        """
        if not spec.folder.is_dir():
            raise UserError(
                f"the Ray worker on {os.uname().nodename} does not see {spec.folder}: every machine of the cluster "
                "needs patches and store under the same path as here."
            )
        os.chdir(spec.folder)
        extraction = Extraction(
            load_dataset(spec.dataset, **spec.reading),
            tuple(find_backbone(name, run_file=True) for name in spec.models),
            FeatureStore.open_or_create(spec.store),
            spec.options,
            spec.weights,
            Shard(shared=True),
        )
        self.prepared: Prepared = prepare(extraction)
        return self.prepared.units(), summaries(self.prepared, {}, seconds=1)

    def embed(self, units: Sequence[range]) -> Counter[tuple[str, str]]:
        """Embed these units; returns how many rows were new, per (model, view)."""
        return embed_rows(self.prepared, units)


def embed_by_ray(spec: ExtractionSpec, *, n_actors: int | None = None) -> list[Summary]:
    """Extract a dataset by a pool of Ray actors: on the cluster of RAY_ADDRESS, else on this machine alone.

    Args:
        spec: what to extract.
        n_actors: None for one per GPU, or without any, one per four processors.

    Returns:
        One summary per (backbone, view). Seconds run from when the first actor is ready.

    Raises:
        UserError: if Ray is not installed or its cluster does not answer; if actors keep dying; as `extract_dataset`.
    """
    require_no_gpu_named(spec.options)
    ray = find_ray()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        pool = _connect(ray, spec, n_actors)
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init has replaced it
        return pool.run()
    finally:
        ray.shutdown()  # actors end with their driver


class _ActorPool:
    """Actors, and the task that each is working on."""

    def __init__(self, ray: Any, spec: ExtractionSpec, n_actors: int, resources: dict[str, int]) -> None:
        self._ray, self._spec, self._n_actors = ray, spec, n_actors
        self._actor_class = ray.remote(**resources, max_restarts=0)(EmbeddingActor)
        self._tasks: dict[Any, tuple[Any, list[range]]] = {}  # task -> actor, units; no units while it prepares
        self._idle: list[Any] = []
        self._queue: deque[range] = deque()
        self._summaries: list[Summary] | None = None  # None until the first actor is prepared
        self._n_new: Counter[tuple[str, str]] = Counter()
        self._n_failures = 0  # since a task last succeeded

    def run(self) -> list[Summary]:
        for _ in range(self._n_actors):
            self._start_actor()
        while self._summaries is None:
            self._wait()
        started = time.perf_counter()
        with progress(self._spec.dataset, sum(map(len, self._queue))) as advance:
            while self._queue or any(units for _, units in self._tasks.values()):
                advance(self._wait())
        seconds = time.perf_counter() - started
        store = FeatureStore.open(self._spec.store)
        n_missing = {(entry.dataset, entry.model, entry.view): len(entry.missing_blocks()) for entry in store.entries()}
        return [
            replace(
                summary,
                n_new=self._n_new[summary.model, summary.view],
                seconds=seconds,
                images_per_second=self._n_new[summary.model, summary.view] / seconds,
                n_missing=n_missing[summary.dataset, summary.model, summary.view],
            )
            for summary in self._summaries
        ]

    def _start_actor(self) -> None:
        actor = self._actor_class.remote()
        self._tasks[actor.prepare.remote(self._spec)] = actor, []

    def _submit(self, actor: Any) -> None:
        """Give an actor the next units; fewer towards the end, so that all finish at about the same time."""
        n = min(_UNITS_PER_TASK, max(1, len(self._queue) // (2 * self._n_actors)))
        units = [self._queue.popleft() for _ in range(min(n, len(self._queue)))]
        if units:
            self._tasks[actor.embed.remote(units)] = actor, units
        else:
            self._idle.append(actor)

    def _wait(self) -> int:
        """Wait until the next task has succeeded or failed; returns how many rows it embedded."""
        done, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=_TIMEOUT)
        if not done:
            if self._summaries is None:
                say("no Ray actor is ready yet: they load networks, or wait for GPUs or processors (see `ray status`).")
            return 0
        actor, units = self._tasks.pop(done[0])
        try:
            result = self._ray.get(done[0])
        except self._ray.exceptions.RayActorError as error:
            self._replace_actor(units, error)
            return 0
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        if units:
            self._n_failures = 0
            self._n_new.update(result)
        elif self._summaries is None:
            missing, self._summaries = result
            self._queue.extend(missing)
        self._submit(actor)
        return sum(map(len, units))

    def _replace_actor(self, units: list[range], error: Exception) -> None:
        """Put the units of a dead actor back into the queue, and start another one."""
        self._n_failures += 1
        if self._n_failures > _FAILURES_PER_ACTOR * self._n_actors:
            where = f" at rows {units[0].start}–{units[-1].stop - 1}" if units else ""
            raise UserError(
                f"{self._n_failures} Ray actors died one after the other, the last{where}; finished blocks are kept. "
                "Look for out of memory or a broken driver in Ray's logs, then run the same command again. "
                f"{error}"
            )
        self._queue.extendleft(reversed(units))
        if self._idle:
            self._submit(self._idle.pop())
        self._start_actor()


def require_no_gpu_named(options: ExtractOptions) -> None:
    """Refuse one GPU for all: Ray shows each actor a GPU of its own, so that none but the first would be found.

    Raises:
        UserError: that says what to use.
    """
    if options.device.startswith("cuda:"):
        raise UserError(
            f"`engine='ray'` gives each actor a GPU of its own, and `device={options.device!r}` names one for all. Use "
            "`device='cuda'`, with CUDA_VISIBLE_DEVICES to leave GPUs out, or `engine='local'`."
        )


def find_ray() -> Any:
    """Import Ray; a UserError says how to install it."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError(
            f"`engine='ray'` needs Ray, which is not installed ({error}): pip install 'mitofm[ray]'. Without it, "
            "torchrun, SLURM arrays and `shard` divide the work too."
        ) from None


def _connect(ray: Any, spec: ExtractionSpec, n_actors: int | None) -> _ActorPool:
    """Connect to a cluster, or start Ray on this machine, and decide how many actors there are and what each takes."""
    use_gpus = spec.options.device != "cpu"
    address = os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "WARNING"}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start one (ray start --head), correct the "
                "address, or unset RAY_ADDRESS to use this machine alone."
            ) from None
        available = ray.cluster_resources()
        n_gpus, n_cpus = int(available.get("GPU", 0)), int(available.get("CPU", 1))
    else:
        n_gpus, n_cpus = torch.cuda.device_count(), os.cpu_count() or 1
    n_gpus = n_gpus if use_gpus else 0
    n_actors = n_actors or n_gpus or max(1, n_cpus // 4)
    n_cpus_each = 1 if n_gpus else min(4, max(1, n_cpus // n_actors))
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        n_logical = max(n_cpus, n_actors * n_cpus_each) + _SPARE_CPUS
        ray.init(
            address="local", num_cpus=n_logical, include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet
        )
    return _ActorPool(ray, spec, n_actors, {"num_cpus": n_cpus_each, "num_gpus": min(1, n_gpus)})
