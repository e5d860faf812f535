"""How do Ray actors share the work?

Each actor holds the networks and one GPU where there are any. The driver feeds them row ranges, never pixels: an actor
reads the patches itself and writes to the store itself. What an actor had in hand when it died goes back to the head of
the queue and a new actor takes its place; blocks it had finished are in the store and not computed again.

Plain Ray actors, not Ray Data: embeddings go to files, so there is no data set to stream, and an actor that dies is an
exception in one loop here. (Ray Data also hangs where actors use every logical processor.)
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from extract.backbones import find_backbone
from extract.datasets import load_dataset, local_data
from extract.embed import ExtractOptions, Prepared, Summary, embed_rows, prepare, summaries, units
from extract.shard import Shard
from features.console import UserError, progress, say
from features.store import FeatureStore

_UNITS_PER_CALL = 4  # within a call the next unit is decoded while the network works on this one
_DEATHS_PER_ACTOR = 3  # more in a row, and something kills them all
_PATIENCE = 60  # seconds without news
_SPARE_CPUS = 2  # logical ones, so that no actor ever waits for the driver's own
_OBJECT_STORE = 100 * 2**20  # bytes: nothing but row numbers travels


@dataclass(frozen=True)
class Work:
    """What an actor is told: names and options. Paths are as the user gave them, from `folder`."""

    folder: Path
    dataset: str
    models: tuple[str, ...]
    store: str
    data: Path | None
    positive: str | None
    weights: Path | None
    options: ExtractOptions

    @classmethod
    def here(
        cls,
        dataset: str,
        models: Sequence[str],
        store: str,
        data: Path | None,
        positive: str | None,
        weights: Path | None,
        options: ExtractOptions,
    ) -> Work:
        """Work from this folder; the actors' machines need not have this one's environment."""
        return cls(Path.cwd(), dataset, tuple(models), store, local_data(data), positive, weights, options)


class Embedder:
    """The actor."""

    # Not in __init__: an actor that fails to begin is dead, and the driver would not learn why.
    def prepare(self, work: Work) -> tuple[list[range], list[Summary]]:
        """Load patches and networks and claim places in the store.

        Returns:
            All that is there to do, and a summary per (backbone, view) as if nothing were.

        Raises:
            UserError: as `extract_dataset`, or if this machine does not see the folder of the work.
        """
        if not work.folder.is_dir():
            raise UserError(
                f"the Ray worker on {os.uname().nodename} does not see {work.folder}: every machine of the cluster "
                "needs patches and store under the same path as here."
            )
        os.chdir(work.folder)
        self.prepared: Prepared = prepare(
            load_dataset(work.dataset, data=work.data, positive=work.positive),
            [find_backbone(name) for name in work.models],
            store=FeatureStore.open_or_create(work.store),
            options=work.options,
            weights=work.weights,
            share=Shard(shared=True),
        )
        return units(self.prepared), summaries(self.prepared, {}, seconds=1)

    def embed(self, rows: Sequence[range]) -> dict[tuple[str, str], int]:
        """Embed these units; returns how many rows of what were new."""
        return embed_rows(self.prepared, rows)


def embed_by_ray(work: Work, *, n_actors: int | None = None) -> list[Summary]:
    """`extract_dataset` by a pool of Ray actors: on the cluster of RAY_ADDRESS, else on this machine alone.

    Args:
        work: what is to be done.
        n_actors: None for one per GPU, or without any, one per four processors.

    Returns:
        One summary per (backbone, view). Seconds run from when the first actor is ready.

    Raises:
        UserError: if Ray is not installed or its cluster does not answer; if actors keep dying; as `extract_dataset`.
    """
    ray = find_ray()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        pool = _connected_pool(ray, work, n_actors)
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in its place
        return pool.run()
    finally:
        ray.shutdown()  # actors end with their driver


class _Pool:
    """Actors, and what each has in hand."""

    def __init__(self, ray: Any, work: Work, n_actors: int, resources: dict[str, int]) -> None:
        self._ray, self._work, self._n_actors = ray, work, n_actors
        self._actor_class = ray.remote(**resources, max_restarts=0)(Embedder)
        self._calls: dict[Any, tuple[Any, list[range]]] = {}  # call -> actor, units; none while it prepares
        self._idle: list[Any] = []
        self._todo: deque[range] = deque()
        self._blank: list[Summary] | None = None  # None until the first actor has said what there is
        self._new_rows: Counter[tuple[str, str]] = Counter()
        self._n_deaths = 0  # since a call last ended well

    def run(self) -> list[Summary]:
        for _ in range(self._n_actors):
            self._hire()
        while self._blank is None:
            self._wait()
        started = time.perf_counter()
        with progress(self._work.dataset, sum(map(len, self._todo))) as advance:
            while self._todo or any(rows for _, rows in self._calls.values()):
                advance(self._wait())
        seconds = time.perf_counter() - started
        store = FeatureStore.open(self._work.store)
        n_missing = {(entry.dataset, entry.model, entry.view): len(entry.missing_blocks()) for entry in store.entries()}
        return [
            replace(
                blank,
                n_new=self._new_rows[blank.model, blank.view],
                seconds=seconds,
                images_per_second=self._new_rows[blank.model, blank.view] / seconds,
                n_missing=n_missing[blank.dataset, blank.model, blank.view],
            )
            for blank in self._blank
        ]

    def _hire(self) -> None:
        actor = self._actor_class.remote()
        self._calls[actor.prepare.remote(self._work)] = actor, []

    def _feed(self, actor: Any) -> None:
        n = min(_UNITS_PER_CALL, max(1, len(self._todo) // (2 * self._n_actors)))
        rows = [self._todo.popleft() for _ in range(min(n, len(self._todo)))]
        if rows:
            self._calls[actor.embed.remote(rows)] = actor, rows
        else:
            self._idle.append(actor)

    def _wait(self) -> int:
        """Wait for the next call to end, well or not; returns the rows that are done with it."""
        done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_PATIENCE)
        if not done:
            if self._blank is None:
                say("no Ray actor is ready yet: they load networks, or wait for GPUs or processors (see `ray status`).")
            return 0
        actor, rows = self._calls.pop(done[0])
        try:
            answer = self._ray.get(done[0])
        except self._ray.exceptions.RayActorError as error:
            self._bury(rows, error)
            return 0
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        if rows:
            self._n_deaths = 0
            self._new_rows.update(answer)
        elif self._blank is None:
            todo, self._blank = answer
            self._todo.extend(todo)
        self._feed(actor)
        return sum(map(len, rows))

    def _bury(self, rows: list[range], error: Exception) -> None:
        self._n_deaths += 1
        if self._n_deaths > _DEATHS_PER_ACTOR * self._n_actors:
            what = f" at rows {rows[0].start}–{rows[-1].stop - 1}" if rows else ""
            raise UserError(
                f"{self._n_deaths} Ray actors died one after the other, the last{what}; finished blocks are kept. Look "
                f"for out of memory or a broken driver in Ray's logs, then run the same command again. {error}"
            )
        self._todo.extendleft(reversed(rows))
        if self._idle:
            self._feed(self._idle.pop())
        self._hire()


def find_ray() -> Any:
    """The module, or a UserError."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError(
            f"--engine ray needs Ray, which is not installed ({error}): pip install 'mitofm[ray]'. Without it, "
            "torchrun, SLURM arrays and --shard share the work too."
        ) from None


def _connected_pool(ray: Any, work: Work, n_actors: int | None) -> _Pool:
    with_gpus = work.options.device != "cpu"
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
        found = ray.cluster_resources()
        n_gpus, n_cpus = int(found.get("GPU", 0)), int(found.get("CPU", 1))
    else:
        n_gpus, n_cpus = torch.cuda.device_count(), os.cpu_count() or 1
    per_actor = {"num_cpus": 1, "num_gpus": 1} if with_gpus and n_gpus else {"num_cpus": 1, "num_gpus": 0}
    n_actors = n_actors or (n_gpus if with_gpus else 0) or max(1, n_cpus // 4)
    if not per_actor["num_gpus"]:
        per_actor["num_cpus"] = min(4, max(1, n_cpus // n_actors))
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        n_logical = max(n_cpus, n_actors * per_actor["num_cpus"]) + _SPARE_CPUS
        ray.init(
            address="local", num_cpus=n_logical, include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet
        )
    return _Pool(ray, work, n_actors, per_actor)
