"""What do all tests share? The real data where there is any, and small patch tables."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real patches, laid out like a clone of AMi-Br_Benchmark; skips where there is none."""
    folder = Path(os.environ.get("MITOFM_DATA", REPOSITORY.parent / "shared" / "datasets"))
    if not (folder / "AMi-Br").is_dir():
        pytest.skip(f"no real patches at {folder} (set MITOFM_DATA)")
    return folder
