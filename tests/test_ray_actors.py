"""Does a pool of Ray actors write the store that one process would, even if an actor is killed?"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from patch_folders import content
from test_extract import patches, weights  # noqa: F401 - fixtures
from test_extract import run as run_alone

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
KILLED_RANK = Path(__file__).with_name("killed_shard.py")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folder = str(KILLED_RANK.parent)  # actors import the module that kills them
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder, **environment},
    )


def options(patches: Path, weights: Path, store: Path) -> list[str]:  # noqa: F811
    return [
        *("--model", "timm/test_vit", "--weights", str(weights), "--dataset", str(patches), "--store", str(store)),
        *("--view", "full,center16", "--precision", "fp32", "--engine", "ray", "--workers", "2", "--json"),
    ]


@needs_ray
def test_a_killed_actor_is_replaced_and_the_store_is_that_of_one_process(patches, weights, tmp_path):  # noqa: F811
    alone = content(run_alone(patches, weights, tmp_path / "a.zarr").path)
    marker = tmp_path / "marker"
    done = run(str(KILLED_RANK), str(marker), "actor", "1", *options(patches, weights, tmp_path / "s.zarr"))
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    assert content(tmp_path / "s.zarr") == alone


@needs_ray
def test_a_mistake_in_an_actor_is_one_message(patches, weights, tmp_path):  # noqa: F811
    arguments = [*options(patches, weights, tmp_path / "s.zarr"), "--overwrite"]
    done = run("-m", "extract.cli", *arguments)
    assert done.returncode == 1
    assert "--overwrite is for one process" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_ray_there_is_one_message(patches, weights, tmp_path):  # noqa: F811
    hidden = "import sys; sys.modules['ray'] = None; from extract.cli import main; main()"
    done = processes.run("-c", hidden, *options(patches, weights, tmp_path / "s.zarr"))
    assert done.returncode == 1
    assert "pip install 'mitofm[ray]'" in done.stderr
    assert done.stderr.count("error:") == 1


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_one_gpu_for_all_actors_is_refused_before_anything_is_loaded(patches, weights, tmp_path, device):  # noqa: F811
    arguments = [*options(patches, weights, tmp_path / "s.zarr"), "--device", device]
    hidden = "import sys; sys.modules['ray'] = None; from extract.cli import main; main()"
    done = processes.run("-c", hidden, *arguments)
    assert done.returncode == 1
    assert f"--engine ray gives each actor a GPU of its own, and --device {device} names one for all" in done.stderr
    assert not (tmp_path / "s.zarr").exists()


@needs_ray
def test_ray_deals_out_by_itself(patches, weights, tmp_path):  # noqa: F811
    arguments = [*options(patches, weights, tmp_path / "s.zarr"), "--shard", "0/2"]
    done = run("-m", "extract.cli", *arguments)
    assert done.returncode == 1
    assert "start it once" in done.stderr
