"""What is left of a feature store when its writer is killed just before its k-th change of a file, for many k?

Run by test_store.py as a process of its own, because it forks: each writer is a fork that an audit hook kills; another
fork judges what is left, goes on where it ended, and the finished store must equal an undisturbed one bit for bit.
It is killed before the first change of every kind (what is done to which file, whatever its number or column), and
before every STEP-th.

    python killed_writer.py FOLDER STEP      (STEP 1 tries every moment: minutes)
"""

from __future__ import annotations

import os
import re
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
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
# All that a store whose writer was killed may say, and no damage but that of a table whose replacement was cut short.
SAID = (
    r" (does not exist|is not a feature store \(it has no zarr\.json\))\. Run fm-extract first",
    r"/data/samples is damaged: the patch table does not match its digest\.",
    r"/data/samples is damaged: zarr\.json cannot be read \(No such file or directory\)\.",
    r"^data/model/full is not complete: [123] of 3 blocks are missing\.",
)


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
    """Whatever can be read must be right; what cannot must say so in one message of those expected."""
    try:
        store = FeatureStore.open(path)
        for entry in store.entries():
            assert entry.name == "data/model/full"
            if entry.complete:
                np.testing.assert_array_equal(
                    store.read("data", model="model", view="full"), entry.parts["scale"] * VALUES
                )
        assert store.datasets() in ([], ["data"])
        for name in store.datasets():
            samples = store.samples(name)
            assert samples.table_digest in (table(0).table_digest, table(1).table_digest)
        for entry in store.entries():
            store.read(entry.dataset, model=entry.model, view=entry.view)
    except UserError as error:
        if not any(re.search(said, str(error)) for said in SAID):
            raise


def rewrite(path: Path) -> None:
    """Other labels and another fingerprint in the place of what is there."""
    write(path, scale=2, label=1)


def changes(event: str, args: tuple[object, ...], path: Path) -> bool:
    """Whether what an audit hook hears of is a change below a folder."""
    if event == "open":
        _, mode, flags = args
        written = set(str(mode or "")) & set("wxa+") or int(str(flags or 0)) & (os.O_WRONLY | os.O_RDWR)
        return bool(written) and str(args[0]).startswith(str(path))
    # A tree is removed name by name, each below an open folder.
    of_a_tree = event in ("os.remove", "os.rmdir") and not Path(str(args[0])).is_absolute()
    return event in CHANGES and (of_a_tree or any(str(arg).startswith(str(path)) for arg in args[:2]))


def kind(event: str, args: tuple[object, ...], path: Path) -> str:
    """What is done to which file, whatever the number of its block, and wherever in an unfinished folder it lies."""
    names = [str(arg).removeprefix(str(path)) for arg in args[:2] if str(arg).startswith(str(path))]
    names = [re.sub(r"\.[0-9a-f]{32}\.partial/.*", ".partial/", name) for name in names]
    return " ".join([event, *(re.sub(r"\.[0-9a-f]{32}|\d", "", name) for name in names)])


def killed(action: Callable[[Path], None], path: Path, k: int, notes: Path | None = None) -> bool:
    """Run in a fork, killed before the k-th change below `path`; False if it finished before. Kinds go to `notes`."""
    child = os.fork()
    if child == 0:
        count = 0
        file = None if notes is None else notes.open("w")

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal count
            if changes(event, args, path):
                count += 1
                if file is not None:
                    print(kind(event, args, path), file=file, flush=True)
                if count == k:
                    os.kill(os.getpid(), signal.SIGKILL)

        if k or file is not None:
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
    first, second, path = folder / "first", folder / "second", folder / "killed"
    killed(write, first, 0)
    shutil.copytree(first, second)
    killed(rewrite, second, 0)
    for action, undisturbed in ((write, first), (rewrite, second)):

        def begin(action: Callable[[Path], None] = action) -> None:
            shutil.rmtree(path, ignore_errors=True)
            if action is rewrite:
                shutil.copytree(first, path)

        begin()
        killed(action, path, 0, folder / "notes")
        kinds = (folder / "notes").read_text().splitlines()
        moments = {kinds.index(one) + 1 for one in kinds} | set(range(1, len(kinds) + 1, step))
        for k in sorted(moments):
            begin()
            if not killed(action, path, k):
                sys.exit(f"{action.__name__}, k={k}: not killed")
            killed(judge, path, 0)
            killed(action, path, 0)
            left, right = tree(path), tree(undisturbed)
            if left != right:
                changed = sorted(name for name in left | right if left.get(name) != right.get(name))
                sys.exit(f"{action.__name__}, k={k} ({kinds[k - 1]}): {changed} differ")
        print(f"{action.__name__}: killed at {len(moments)} moments of {len(kinds)}, stores identical")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
