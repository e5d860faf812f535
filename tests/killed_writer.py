"""What is left of a feature store when its writer is killed just before its k-th file operation, for many k?

Run by test_store.py as a process of its own, because it forks: each writer is a fork that an audit hook kills; another
fork judges what is left, goes on where it ended, and the finished store must equal an undisturbed one bit for bit.

    python killed_writer.py FOLDER STEP      (STEP 1 tries every moment: minutes)
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from features.console import UserError
from features.samples import Samples, make_samples
from features.store import FeatureStore

N, WIDTH = 130, 4
VALUES = np.arange(N * WIDTH, dtype=np.float32).reshape(N, WIDTH)
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def table(label: int) -> Samples:
    return make_samples([f"{i}.png" for i in range(N)], [label] * N, sha256=[str(i) for i in range(N)])


def write(path: Path, scale: int = 1, label: int = 0) -> None:
    """All that fm-extract asks of a store."""
    store = FeatureStore.open_or_create(path)
    store.put_samples("data", table(label), attrs={})
    options = {"poolings": {"cls": WIDTH, "mean": WIDTH}, "card_pooling": "cls", "parts": {"scale": scale}}
    there = any(entry.parts != {"scale": scale} for entry in store.entries())
    writer = store.begin("data", model="model", view="full", **options, overwrite=there)
    if writer.entry.batch_size is None:
        writer.set_batch_size(8)
    for rows in writer.missing():
        part = scale * VALUES[rows.start : rows.stop]
        writer.write(rows, {"cls": part, "mean": -part})


def judge(path: Path) -> None:
    """Whatever can be read must be right; what cannot must say so in one message."""
    try:
        store = FeatureStore.open(path)
        for name in store.datasets():
            assert len(store.samples(name)) == N
        for entry in store.entries():
            np.testing.assert_array_equal(store.read("data", model="model", view="full"), entry.parts["scale"] * VALUES)
    except UserError:
        pass


def rewrite(path: Path) -> None:
    """Other labels and another fingerprint in the place of what is there."""
    write(path, scale=2, label=1)


def killed(action: Callable[[Path], None], path: Path, k: int) -> bool:
    """Run in a fork, killed before the k-th operation on a file below `path`; False if it finished before."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal count
            if event in OPERATIONS and str(args[0]).startswith(str(path)):
                count += 1
                if count == k:
                    os.kill(os.getpid(), signal.SIGKILL)

        if k:
            sys.addaudithook(hook)
        try:
            action(path)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a fork must not fall through into the parent's code
            print(f"{action.__name__}, k={k}: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        sys.exit(1)
    return status == -signal.SIGKILL


def tree(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def main(folder: Path, step: int) -> None:
    first, second = folder / "first", folder / "second"
    killed(write, first, 0)
    shutil.copytree(first, second)
    killed(rewrite, second, 0)
    for action, undisturbed in ((write, first), (rewrite, second)):
        k = 1
        while True:
            path = folder / "killed"
            if action is rewrite:
                shutil.copytree(first, path)
            was_killed = killed(action, path, k)
            killed(judge, path, 0)
            killed(action, path, 0)
            left, right = tree(path), tree(undisturbed)
            if left != right:
                changed = sorted(name for name in left | right if left.get(name) != right.get(name))
                sys.exit(f"{action.__name__}, k={k}: {changed} differ")
            shutil.rmtree(path)
            if not was_killed:
                break
            k += step
        print(f"{action.__name__}: killed at {k // step} moments, stores identical")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
