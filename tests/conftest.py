"""What do all tests share? The real data where there is any, and a hub client that reaches no real hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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
