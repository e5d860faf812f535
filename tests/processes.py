"""How do tests start commands in processes of their own, without importing torch in each again?

A new Python takes 6 to 10 seconds to import what the commands use, and some forty tests start one or several. Here one
process imports it once and becomes a fork for each (multiprocessing's forkserver): a process with its own number,
arguments, folder, environment, streams and end, which can be killed. What is read while torch is loaded (which of the
processor's instructions to use) is that of the tests. tests/test_cli.py starts the installed scripts themselves.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess

SCRIPTS = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]["scripts"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "timm", "zarr", "scipy.special", "torch.distributed.run"])


class Started:
    """A process that has been started, and what it says."""

    def __init__(self, process: ForkServerProcess, streams: Path) -> None:
        self._process = process
        self._streams = streams

    def ended(self) -> bool:
        """Whether it has ended."""
        return not self._process.is_alive()

    def send_signal(self, number: int) -> None:
        """Send a signal; none to one that has ended."""
        if not self.ended():
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    def wait(self, timeout: float = 600) -> CompletedProcess[str]:
        """Wait for its end; -N is the exit status after signal N. One that takes longer is killed, and that is said."""
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            self._process.kill()
            self._process.join()
        out, err = ((self._streams / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self._streams)
        assert code is not None, f"still running after {timeout} s: {out}{err}"
        return CompletedProcess((), code, out, err)


def start(*arguments: object, cwd: Path | None = None, **environment: str) -> Started:
    """Start a command, as `fm-probe --cv 5`, or what Python takes: -m MODULE, -c CODE or a script, each with arguments.

    environment: variables that are set anew. huggingface_hub is loaded already, and has read its own.
    """
    return _start(1, 0, list(map(str, arguments)), cwd, environment)


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> CompletedProcess[str]:
    """Start a process as `start` does, and wait for its end."""
    return start(*arguments, cwd=cwd, **environment).wait()


def torchrun(
    n: int, *arguments: object, restarts: int = 0, cwd: Path | None = None, **environment: str
) -> CompletedProcess[str]:
    """Run `torchrun --standalone --nproc-per-node N --max-restarts RESTARTS ARGUMENTS`."""
    return _start(n, restarts, list(map(str, arguments)), cwd, environment).wait()


def _start(n: int, restarts: int, arguments: list[str], cwd: Path | None, environment: dict[str, str]) -> Started:
    streams = Path(tempfile.mkdtemp(prefix="streams-"))
    for name in ("out", "err"):
        (streams / name).touch()
    everything = dict(os.environ) | environment
    given = (n, restarts, arguments, str(cwd or Path.cwd()), everything, streams, list(sys.path))
    process = _CONTEXT.Process(target=_become, args=given)
    process.start()
    return Started(process, streams)


def _become(
    n: int,
    restarts: int,
    arguments: Sequence[str],
    cwd: str,
    environment: dict[str, str],
    streams: Path,
    path: list[str],
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:] = path
    if "OMP_NUM_THREADS" in environment:  # was read when torch was loaded
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if n == 1:
        _python(arguments)
    else:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            1, 1, n, run_id="tests", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts,
            monitor_interval=0.1, start_method="fork",
        )  # fmt: skip
        elastic_launch(config, _python)(arguments)


def _python(arguments: Sequence[str]) -> None:
    """Be the command, or what Python takes."""
    first, *others = arguments
    if first == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first in SCRIPTS:
        sys.argv = [first, *others]
        module, _, function = SCRIPTS[first].partition(":")
        getattr(importlib.import_module(module), function)()
    else:
        sys.argv = [first, *others]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
