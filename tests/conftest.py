"""What do all tests share? The real data where there is any, a hub client that reaches no real hub, seeds, no GPU."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GPU = os.environ.get("MITOFM_TEST_GPU") == "1"
# A GPU would be taken by whatever asks for "auto". torch reads this when it first looks for one, and so do the
# processes of pytest-xdist and those that tests start, which inherit it.
if not GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of GPUs, or all others: what they expect of "auto" holds without a GPU."""
    for item in items:
        marked = item.get_closest_marker("gpu") is not None
        if marked and not GPU:
            item.add_marker(pytest.mark.skip(reason="a test of GPUs: MITOFM_TEST_GPU=1 runs them"))
        elif marked and not _sees_a_gpu():
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
        elif GPU and not marked:
            item.add_marker(pytest.mark.skip(reason="MITOFM_TEST_GPU=1 runs the tests of GPUs alone"))


def _sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Whatever draws without a seed of its own draws the same, in a test or a fixture, alone or after others."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real patches, laid out like a clone of AMi-Br_Benchmark; skips where there is none."""
    folder = Path(os.environ.get("MITOFM_DATA", REPOSITORY.parent / "shared" / "datasets"))
    if not (folder / "AMi-Br").is_dir():
        pytest.skip(f"no real patches at {folder} (set MITOFM_DATA)")
    return folder


@pytest.fixture
def no_patches_at_hand(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known datasets are not here, whatever this machine has."""
    monkeypatch.setenv("MITOFM_DATA", str(tmp_path_factory.mktemp("nothing")))


@pytest.fixture
def point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Points huggingface_hub at an endpoint, with an empty cache and without a token."""
    import huggingface_hub.utils
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)

    def to(url: str) -> None:
        huggingface_hub.utils.close_session()
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    yield to
    huggingface_hub.utils.close_session()
