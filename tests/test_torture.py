"""Does a small share of every kind of torture leave nothing lost, silent or unexplained?"""

from __future__ import annotations

import sys
from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).with_name("torture.py")


@pytest.mark.skipif(sys.platform != "linux", reason="forks and limits of Linux")
def test_a_few_flips_and_hostile_files_lose_nothing_and_say_why() -> None:
    one_thread = {"OMP_NUM_THREADS": "1"}  # a fork must find no others
    done = processes.run(SCRIPT, "flip", "mutate", "--scale", "0.01", **one_thread)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("store: detected", "runs: detected", "mutated: bombs refused"):
        assert name in done.stdout
