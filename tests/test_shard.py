"""Do many processes write the store that one would, whoever starts when, on whatever machine, or dies?"""

import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from patch_folders import MODEL, content, write_patches, write_weights
from processes import Started, start, torchrun

from extract import compute, embed, prepare
from extract.backbones import find_backbone
from extract.datasets import load_dataset
from extract.embed import extract_dataset
from extract.prepare import ExtractOptions
from extract.shard import Shard, find_shard
from features.console import UserError
from features.device import find_device
from features.store import FeatureStore

N = 330  # patches: six blocks, the last one short
VIEWS = ("full@32", "center16@32")
KILLED_RANK = Path(__file__).with_name("killed_shard.py")


@pytest.fixture(scope="module")
def patches(tmp_path_factory) -> Path:
    return write_patches(tmp_path_factory.mktemp("patches"), N, size=16)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def run(patches: Path, weights: Path, path: Path, shard: Shard = Shard(), **options):
    """What one rank does, in this process; returns its summaries."""
    return extract_dataset(
        load_dataset(str(patches)),
        [find_backbone(MODEL)],
        store=FeatureStore.open_or_create(path),
        options=ExtractOptions(**({"views": VIEWS, "precision": "fp32", "batch_size": 8} | options)),
        weights=weights,
        shard=shard,
    )


@pytest.fixture(scope="module")
def alone(patches, weights, tmp_path_factory) -> dict[str, str]:
    """The store of one process, file by file."""
    path = tmp_path_factory.mktemp("alone") / "s.zarr"
    run(patches, weights, path)
    return content(path)


def shard_of(n_ranks: int, rank: int) -> Shard:
    return Shard(rank, n_ranks, shared=n_ranks > 1)


# ------------------------------------------------------------------------------------------------------- the deal


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8, 13])
def test_every_unit_has_one_owner_and_every_rank_its_share(n_ranks):
    owners = [[rank for rank in range(n_ranks) if Shard(rank, n_ranks).includes(unit)] for unit in range(130)]
    assert all(len(found) == 1 for found in owners)
    counts = Counter(found[0] for found in owners)
    assert max(counts.values()) - min(counts[rank] for rank in range(n_ranks)) <= 1


def test_what_one_of_eight_left_is_spread_over_fewer():
    left = [unit for unit in range(128) if Shard(3, 8).includes(unit)]
    for n_ranks in (2, 4):
        counts = Counter(rank for unit in left for rank in range(n_ranks) if Shard(rank, n_ranks).includes(unit))
        assert len(counts) == n_ranks
        assert max(counts.values()) <= 0.75 * len(left)


ARRAY = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, Shard()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Shard(3, 8, 1, True)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Shard()),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, Shard(5, 8, 1, True)),
        # The script of `sbatch --ntasks 8` is not the first of eight; what srun starts in it is.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Shard()),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Shard(0, 8, 0, True)),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "1"}, Shard(0, 4, 0, True)),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "4"}, Shard(3, 4, 0, True)),
        (
            {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_STEP": "5"}
            | {"SLURM_ARRAY_TASK_ID": "10"},
            Shard(2, 3, 0, True),
        ),
        # One element submitted again is alone, but others may still be at work.
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"}, Shard(0, 1, 0, True)),
        # An element that runs several ranks deals its own share out.
        (
            ARRAY | {"SLURM_ARRAY_TASK_ID": "2", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            Shard(3, 8, 1, True),
        ),
    ],
)
def test_the_environment_tells_the_share(environment, shard):
    assert find_shard(None, environment) == shard


def test_shard_overrules_the_environment():
    environment = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    assert find_shard("1/2", environment) == Shard(1, 2, 3, True)
    assert find_shard("0/1", environment) == Shard(0, 1, 3, False)


@pytest.mark.parametrize(
    ("shard", "environment", "message"),
    [
        ("2/2", {}, "I from 0 to N-1"),
        ("half", {}, "I/N"),
        ("1/" + "9" * 5000, {}, "I/N"),
        (None, {"RANK": "two", "WORLD_SIZE": "2"}, "RANK is 'two'"),
        (None, {"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        (None, {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}, "has gaps"),
    ],
)
def test_no_share_is_one_message(shard, environment, message):
    with pytest.raises(UserError, match=message):
        find_shard(shard, environment)


def test_the_local_rank_chooses_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_device("auto", local_rank=3) == torch.device("cuda:3")
    with pytest.raises(UserError, match=r"process 5 of this machine .* sees 4 GPUs"):
        find_device("cuda", local_rank=5)
    assert find_device("cuda:2", local_rank=0) == torch.device("cuda:2")
    assert find_device("cpu", local_rank=3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each task sees its own GPU alone
    assert find_device("auto", local_rank=3) == torch.device("cuda:0")


# ----------------------------------------------------------------------------------- one after another, hours apart


@pytest.mark.parametrize("n_ranks", [2, 3, 9])
def test_any_number_of_ranks_in_any_order_writes_the_store_of_one(patches, weights, alone, tmp_path, n_ranks):
    path = tmp_path / "s.zarr"
    summaries = []
    for rank in reversed(range(n_ranks)):
        summaries += run(patches, weights, path, shard_of(n_ranks, rank))
    assert content(path) == alone
    assert sum(summary.n_new for summary in summaries) == 2 * N
    assert all(summary.n_missing for summary in summaries[:2])
    assert summaries[-1].n_missing == 0
    assert "left to other ranks" in summaries[0].line()
    assert f"rank {n_ranks - 1} of {n_ranks}" in summaries[0].line()


def test_other_ranks_finish_what_some_left(patches, weights, alone, tmp_path):
    path = tmp_path / "s.zarr"
    run(patches, weights, path, shard_of(5, 1))
    for rank in range(3):
        run(patches, weights, path, shard_of(3, rank))
    assert content(path) == alone
    again = run(patches, weights, path, shard_of(4, 2))
    assert [summary.n_new for summary in again] == [0, 0]


def test_the_number_of_threads_makes_no_difference(patches, weights, alone, tmp_path):
    """torchrun allows each of its ranks one thread."""
    n_threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            run(patches, weights, tmp_path / f"{n}.zarr")
            assert torch.get_num_threads() == n
            assert content(tmp_path / f"{n}.zarr") == alone
    finally:
        torch.set_num_threads(n_threads)


def test_batches_of_several_blocks_stay_whole(patches, weights, tmp_path):
    run(patches, weights, tmp_path / "a.zarr", batch_size=200)  # 192
    for rank in (1, 0):
        run(patches, weights, tmp_path / "b.zarr", shard_of(2, rank), batch_size=200 if rank else None)
    assert content(tmp_path / "a.zarr") == content(tmp_path / "b.zarr")


def test_entries_begun_with_other_batch_sizes_share_a_decode(patches, weights, tmp_path):
    for path, shards in ((tmp_path / "a.zarr", [Shard()]), (tmp_path / "b.zarr", [shard_of(2, 0), shard_of(2, 1)])):
        for view, batch_size in zip(VIEWS, (192, 128), strict=True):
            run(patches, weights, path, shard_of(9, 8), views=(view,), batch_size=batch_size)
        for shard in shards:
            run(patches, weights, path, shard, batch_size=None)
    assert content(tmp_path / "a.zarr") == content(tmp_path / "b.zarr")


def test_a_rank_whose_share_is_there_builds_no_network(patches, weights, tmp_path, monkeypatch):
    run(patches, weights, tmp_path / "s.zarr", shard_of(2, 0))
    monkeypatch.setattr(prepare, "build_model", lambda *a, **k: pytest.fail("a network was built for nothing"))
    summaries = run(patches, weights, tmp_path / "s.zarr", shard_of(2, 0), batch_size=None)
    assert "nothing left to do in this share" in summaries[0].line()


# -------------------------------------------------------------------------------------------- what all must agree on


def test_the_first_rank_decides_precision_and_batch_size_for_other_machines(patches, weights, tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    monkeypatch.setattr(compute, "has_bf16", lambda device: True)
    monkeypatch.setattr(compute, "MIN_COSINE", 0)
    first = run(patches, weights, path, shard_of(2, 0), precision="auto", batch_size=None)
    monkeypatch.setattr(compute, "has_bf16", lambda device: False)
    monkeypatch.setattr(prepare, "_CPU_BATCH", 16)
    second = run(patches, weights, path, shard_of(2, 1), precision="auto", batch_size=None)
    assert [(s.precision, s.batch_size) for s in first + second] == [("bf16", 8)] * 4
    assert second[0].n_missing == 0


def test_whoever_comes_second_in_the_same_moment_follows_the_first(patches, weights, tmp_path, monkeypatch):
    """Both found nothing in the store; between one's look and its entry the other, on another machine, made its own."""
    path = tmp_path / "s.zarr"
    begin = FeatureStore.begin
    monkeypatch.setattr(compute, "MIN_COSINE", 0)
    monkeypatch.setattr(compute, "has_bf16", lambda device: False)

    def overtaken(*arguments, **options):
        monkeypatch.setattr(FeatureStore, "begin", begin)
        monkeypatch.setattr(compute, "has_bf16", lambda device: True)
        run(patches, weights, path, shard_of(2, 0), views=("full",), precision="auto", batch_size=16)
        monkeypatch.setattr(compute, "has_bf16", lambda device: False)
        return begin(*arguments, **options)

    monkeypatch.setattr(FeatureStore, "begin", overtaken)
    (summaries,) = run(patches, weights, path, shard_of(2, 1), views=("full",), precision="auto", batch_size=None)
    assert (summaries.precision, summaries.batch_size, summaries.n_missing) == ("bf16", 16, 0)


def test_another_batch_size_or_overwriting_is_refused_among_ranks(patches, weights, tmp_path):
    path = tmp_path / "s.zarr"
    run(patches, weights, path, shard_of(2, 0))
    before = content(path)
    with pytest.raises(UserError, match="begun with batches of 8, now `batch_size` says 16"):
        run(patches, weights, path, shard_of(2, 1), batch_size=16)
    with pytest.raises(UserError, match=r"`overwrite=True` is for one process"):
        run(patches, weights, path, shard_of(2, 1), overwrite=True)
    assert content(path) == before


def test_a_rank_out_of_memory_says_so_instead_of_batching_otherwise(patches, weights, tmp_path, monkeypatch):
    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(embed, "embed_shown", no_memory)
    with pytest.raises(UserError, match=r"batches of 8, which all ranks share"):
        run(patches, weights, tmp_path / "s.zarr", shard_of(2, 1))


# ------------------------------------------------------------------------------------------------- at the same moment

WITHOUT_LOCKS = """
import fcntl, sys
def flock(*_): raise OSError(38, "Function not implemented")
fcntl.flock = flock
from extract.cli import main
main()
"""


def command(patches: Path, weights: Path, store: Path) -> list[str]:
    return [
        *("--model", MODEL, "--weights", str(weights), "--dataset", str(patches), "--store", str(store)),
        *("--view", ",".join(VIEWS), "--precision", "fp32", "--batch-size", "8"),
    ]


def finish(process: Started) -> str:
    done = process.wait()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.slow
def test_an_array_on_a_file_system_without_locks(patches, weights, alone, tmp_path):
    options = command(patches, weights, tmp_path / "s.zarr")
    elements = [
        start(
            *("-c", WITHOUT_LOCKS, *options),
            SLURM_ARRAY_TASK_ID=str(number),
            SLURM_ARRAY_TASK_COUNT="2",
            SLURM_ARRAY_TASK_MIN="1",
        )
        for number in (1, 2)
    ]
    said = "".join(map(finish, elements))
    assert "rank 0 of 2: " in said
    assert "rank 1 of 2: " in said
    assert content(tmp_path / "s.zarr") == alone


def test_an_array_element_killed_midway_and_started_again(patches, weights, alone, tmp_path):
    options = command(patches, weights, tmp_path / "s.zarr")
    element = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}
    killed = start(KILLED_RANK, tmp_path / "marker", 1, 1, *options, **element)
    assert killed.wait().returncode == -signal.SIGKILL
    assert "left to other ranks" in finish(start("fm-extract", *options, **element | {"SLURM_ARRAY_TASK_ID": "0"}))
    finish(start("fm-extract", *options, **element))
    assert content(tmp_path / "s.zarr") == alone


def test_two_ranks_of_torchrun_one_of_them_killed_midway(patches, weights, alone, tmp_path):
    options = command(patches, weights, tmp_path / "s.zarr")
    done = torchrun(2, KILLED_RANK, tmp_path / "marker", 1, 1, *options, restarts=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "marker").exists()
    assert "complete" in done.stderr
    assert content(tmp_path / "s.zarr") == alone
