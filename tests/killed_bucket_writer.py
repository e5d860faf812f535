"""What is left of a store in a bucket when its writer is killed just before its k-th change, for many k?

Run by test_storage.py as a process of its own, because it forks, as killed_writer.py does for folders.

    python killed_bucket_writer.py URL STEP
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import obstore
from killed_writer import judge, rewrite, write

from features import storage_bucket

storage_bucket._LEASE = 0.2


def killed(action: Callable[[Any], None], url: str, k: int) -> bool:
    """Run in a fork, killed before the k-th object is put or deleted; False if it finished before."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def changed(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == k:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **options)

            return changed

        obstore.put, obstore.delete = counted(obstore.put), counted(obstore.delete)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the waiting for a killed writer's lock is said there
        try:
            action(url)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a fork must not fall through into the parent's code
            print(f"{action.__name__}, k={k}: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        sys.exit(1)
    return status == -signal.SIGKILL


def save(url: str) -> None:
    """All objects, to the file that the parent reads: it must not talk to the bucket itself, because it forks."""
    store = storage_bucket.connect(url)
    for item in sorted(obstore.list(store).collect(), key=lambda item: item["path"]):
        print(item["path"], bytes(obstore.get(store, item["path"]).bytes()).hex(), file=SAVED)
    SAVED.flush()


def tree(url: str) -> str:
    SAVED.seek(0)
    SAVED.truncate()
    killed(save, url, 0)
    SAVED.seek(0)
    return SAVED.read()


def main(url: str, step: int) -> None:
    killed(write, f"{url}/first", 0)
    killed(write, f"{url}/second", 0)
    killed(rewrite, f"{url}/second", 0)
    for action, undisturbed in ((write, tree(f"{url}/first")), (rewrite, tree(f"{url}/second"))):
        k = 1
        while True:
            where = f"{url}/{action.__name__}-{k}"
            if action is rewrite:
                killed(write, where, 0)
            was_killed = killed(action, where, k)
            killed(judge, where, 0)
            killed(action, where, 0)
            if tree(where) != undisturbed:
                sys.exit(f"{action.__name__}, k={k}: the stores differ")
            if not was_killed:
                break
            k += step
        print(f"{action.__name__}: killed at {k // step} moments, stores identical")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryFile("w+") as SAVED:
        main(sys.argv[1], int(sys.argv[2]))
