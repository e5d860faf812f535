"""Do commands end as they should whatever options, files, environment and streams they meet?

MITOFM_FUZZ_COMMANDS and MITOFM_FUZZ_SEED ask for more and for others, as `python tests/fuzz.py --commands 5000` does.
"""

from __future__ import annotations

import os
import random
import re
import signal
from dataclasses import replace
from typing import Any

import fuzz
import processes
import pytest
from typer.testing import CliRunner


def test_hostile_commands_end_with_one_message() -> None:
    """The faults that are found lie in front of the reader of a failure: each as a line that shows it again."""
    number, seed = (
        os.environ.get(f"MITOFM_FUZZ_{name}", default) for name, default in (("COMMANDS", "25"), ("SEED", "0"))
    )
    done = processes.run(fuzz.__file__, "--commands", number, "--seed", seed, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"status": 1, "err": "error: no.\n"}, ""),
        ({"status": 2, "err": "Usage: fm-store\n"}, ""),
        ({"status": 1}, "0 messages"),
        ({"status": 1, "err": "error: no.\nerror: no.\n"}, "2 messages"),
        ({"err": "error: no.\n"}, "an error, and status 0"),
        ({"status": 2}, "status 2 without usage"),
        ({"status": 1, "err": "Traceback (most recent call last):\n"}, "traceback"),
        ({"err": "Exception ignored in: <stdout>\n"}, "crash"),
        ({"status": 3}, "status 3"),
        ({"status": 141}, "status 141"),
        ({"status": -signal.SIGKILL}, "hang"),
        ({"status": -signal.SIGXCPU}, "hang"),
        ({"status": -signal.SIGSEGV}, "status -11"),
    ],
)
def test_an_end_that_is_none_is_seen(change: dict[str, Any], fault: str) -> None:
    fine = fuzz.Outcome(fuzz.Trial(("fm-store",)), 0, 1.0, "", "")
    assert replace(fine, **change).fault() == fault


def test_every_option_of_every_command_is_drawn() -> None:
    rng = random.Random(0)
    for name in fuzz.WORK:
        drawn = {words[0].partition("=")[0] for _ in range(30) for words in fuzz._mutations(rng, name)}
        shown = CliRunner().invoke(fuzz.APPS[name.split()[0]][0], [*name.split()[1:], "--help"], env={"COLUMNS": "200"})
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown.stdout)) - {"--help", "--compile", "--no-compile"}
        assert options <= drawn, name
