"""Do several processes end with what a single one would have trained, whichever of them dies on the way?"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from process_group_worker import CASES, exact_embed
from process_group_worker import outcome as trained_alone
from safetensors import safe_open
from test_checkpoint import CPU, assert_same_outcome, outcome
from test_finetune_command import SMALL, write_patches, write_weights
from test_network import CNN, LORA, VIT, backbone_model, images, tiny_network
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.distributed import HashStore, PrefixStore

from features import console
from features.console import UserError
from finetune import run as finetuning
from finetune.checkpoint import CHECKPOINT_FILE, START_FILE, load_state
from finetune.options import ComputeOptions, FinetuneOptions
from finetune.process_group import (
    SINGLE_PROCESS,
    ProcessGroup,
    ProcessLostError,
    SynchronizedBatchNorm,
    _generation,
    join_process_group,
    synchronize_batch_norms,
)
from finetune.run import finetune, resume

WORKER = Path(__file__).with_name("process_group_worker.py")
OPTIONS = (*SMALL, "--model", "timm/test_vit", "--weights", "vit.safetensors", "--train", "patches.csv")
FILES = {
    "run.json",
    "predictions.csv",
    "metrics.json",
    "samples.csv",
    *(f"fold-{fold}/{name}" for fold in range(2) for name in ("adapter_config.json", "adapter_model.safetensors")),
}
# Differences of the order in which float64 sums are formed: 1e-15 of a gradient. A step of Adam is at most
# lr / eps = 2e-2 / 1e-8 = 2e6 times as much, and there are some eight of them. A wrong gradient moves a value by 2e-2.
EXACT = {"rtol": 1e-6, "atol": 1e-6}


def torchrun(n: int, cwd: Path, *arguments: object, restarts: int = 0) -> CompletedProcess[str]:
    """Some processes on this machine, connected by gloo."""
    return processes.torchrun(n, *arguments, cwd=cwd, restarts=restarts, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")


def own_words(done: CompletedProcess[str]) -> list[str]:
    """Lines on stderr that are not torchrun's."""
    return [line for line in done.stderr.splitlines() if line.startswith(("error:", "runs/", "run written"))]


# --------------------------------------------------------------------------------------------------- the same training


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("finetune.network.forward_poolings", exact_embed)
        return {name: trained_alone(case) for name, case in CASES.items()}


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])  # of batches of four images
def test_processes_train_what_a_single_one_does(tmp_path: Path, alone: dict[str, Any], n: int) -> None:
    done = torchrun(n, tmp_path, WORKER, "train", tmp_path)
    assert done.returncode == 0, done.stderr
    for name, case in CASES.items():
        expected = alone[name]
        label = partial("{}, {}: {}".format, name)
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            found = {kind: file.get_tensor(kind) for kind in ("values", "best", "moments")}
            described = json.loads(file.metadata()["state"])
        assert described["n_steps"] == expected.n_steps, name
        assert described["n_images"] == expected.n_images, name
        if case.dtype == torch.float32 and case.backbone is CNN:
            # Both round what float64 computes. Several processes may do so no worse than one, but for chance.
            exact = alone[name.replace("float32", "float64")].values
            one, several = ((each - exact).norm() / exact.norm() for each in (expected.values, found["values"]))
            assert one < 1e-4, name
            assert several < 4 * one, name
            continue
        # Steps in proportion to float32 gradients hand on the 1e-7 of their sums, over eleven steps some hundredfold.
        close = EXACT if case.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        for kind, tensor in found.items():
            torch.testing.assert_close(tensor, getattr(expected, kind), **close, msg=partial(label, kind))
        for fold, history in expected.history.items():
            for epoch, other in zip(history, described["history"][str(fold)], strict=True):
                assert other == pytest.approx(asdict(epoch), rel=1e-4), name


def test_shares_are_all_rows_in_order_and_differ_by_one_at_most() -> None:
    for size in (1, 2, 3, 7):
        for n in (0, 1, 6, 7, 20):
            shares = [list(range(n))[ProcessGroup(rank, size).shard_rows(n)] for rank in range(size)]
            assert list(chain.from_iterable(shares)) == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("gpus", [["a", "b", "c"], ["a", "b", "a"]])
def test_two_processes_on_one_gpu_are_refused_before_they_connect(gpus: list[str]) -> None:
    """One GPU, or one part of a GPU (MIG), however each process numbers it."""
    store = HashStore()
    groups = [ProcessGroup(rank, len(gpus), store=store) for rank in range(len(gpus))]

    def attempt(group: ProcessGroup) -> str:
        try:
            group._require_own_gpus(gpus[group.rank])
        except UserError as error:
            group.fails_first()
            return str(error)
        return ""

    with ThreadPoolExecutor(len(gpus)) as pool:
        messages = list(pool.map(attempt, groups))
    if len(set(gpus)) == len(gpus):
        assert messages == ["", "", ""]
    else:
        assert "processes 0 and 2 of this training have the same GPU (a)" in messages[2]
        assert {"has ended" in message for message in messages[:2]} == {True}


def test_processes_compare_their_gpus_before_they_connect_through_them(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = {torch.device("cuda", 0): "GPU-1", torch.device("cuda", 1): "GPU-2"}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: pytest.fail("connected"))
    store = HashStore()
    store.set("gpu 0", f"{socket.gethostname()}, GPU-2")
    store.add("about to connect", 1)
    with pytest.raises(UserError, match=r"processes 0 and 1 .* the same GPU \(.*, GPU-2\)"):
        ProcessGroup(1, 2, store=store).connect(torch.device("cuda", 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d])
def test_a_shared_norm_of_one_process_is_the_norm(kind: type[nn.BatchNorm2d], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = (6, 3) if kind is nn.BatchNorm1d else (6, 3, 4, 5)
    norms = [kind(3).to(torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(norms[1])
    assert synchronize_batch_norms(model, SINGLE_PROCESS) == 1
    assert list(model.state_dict()) == [f"0.{name}" for name in norms[0].state_dict()]
    x = torch.randn(*shape).add(3).to(dtype)
    weights = torch.randn(*shape).to(dtype)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else close
    for _ in range(2):
        results = []
        for norm in (norms[0], model):
            given = x.clone().requires_grad_()
            y = norm(given)
            assert y.dtype == dtype
            (y * weights).sum().backward()
            results.append((y.detach(), given.grad))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, **close)
    for (name, expected), found in zip(norms[0].named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, **close, msg=name)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model[0], name), getattr(norms[0], name), **close)
    torch.testing.assert_close(model.eval()(x), norms[0].eval()(x), **close)


def test_a_shared_norm_in_float32_is_the_exact_one_of_values_far_from_zero() -> None:
    """A variance as the mean square less the squared mean would be off by 1000**2 * 2**-24, some hundredths of it."""
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000
    model = nn.Sequential(nn.BatchNorm2d(3))
    synchronize_batch_norms(model, SINGLE_PROCESS)
    exact = nn.BatchNorm2d(3).double()
    torch.testing.assert_close(model(x).double(), exact(x.double()), rtol=0, atol=4 * 1000 * 2**-24)
    torch.testing.assert_close(model[0].running_var.double(), exact.running_var, rtol=1e-4, atol=0)


def test_a_norm_of_another_kind_is_refused() -> None:
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match=r"norm of its own kind \(1, Own\).*`method='lora'`"):
        synchronize_batch_norms(nn.Sequential(nn.Identity(), Own(3)), ProcessGroup(0, 2))


def test_only_norms_that_learn_are_shared() -> None:
    for method, backbone, n in (("lora", CNN, 0), ("head", CNN, 0), ("full", VIT, 0), ("full", CNN, None)):
        network = tiny_network(method, backbone, lora=LORA)  # type: ignore[arg-type]
        before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
        network.shard_batches(ProcessGroup(0, 2), 4)
        found = sum(isinstance(module, SynchronizedBatchNorm) for module in network.modules())
        expected = sum(isinstance(module, nn.BatchNorm2d) for module in backbone_model(backbone).modules())
        assert found == network.n_synchronized_norms == (expected if n is None else n)
        assert list(network.model.state_dict()) == list(before)
        with torch.no_grad():
            assert torch.isfinite(network(images(len(network.members)), network.members)).all()


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    write_patches(folder)
    write_weights(folder / "vit.safetensors", "test_vit")
    return folder


@pytest.fixture(scope="module")
def undisturbed(material: Path) -> tuple[Path, CompletedProcess[str]]:
    """The folder of a run of two processes, and what they said."""
    done = torchrun(2, material, "-m", "finetune.cli", *OPTIONS, "--runs", "runs/undisturbed", "--json")
    assert done.returncode == 0, done.stderr
    (folder,) = (material / "runs" / "undisturbed").iterdir()
    return folder, done


@pytest.fixture(scope="module")
def interrupted(material: Path) -> tuple[Path, CompletedProcess[str]]:
    """The folder of a run whose second process was killed in the second epoch, and what was said."""
    done = torchrun(2, material, WORKER, "finetune", 1, 4, *OPTIONS, "--runs", "runs/interrupted")
    assert done.returncode != 0
    (folder,) = (material / "runs" / "interrupted").iterdir()
    return folder, done


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same run, but for rounding."""
    assert found.keys() == expected.keys()
    assert (found["best_epoch"], found["n_images"]) == (expected["best_epoch"], expected["n_images"])
    for own, other in zip(found["history"], expected["history"], strict=True):
        for epoch, same in zip(own, other, strict=True):
            assert epoch == pytest.approx(same, rel=1e-3)
    for name in (name for name in expected if name.endswith(".safetensors")):
        (_, left), (_, right) = found[name], expected[name]
        ours, theirs = (
            {key: torch.frombuffer(bytearray(each[key]), dtype=torch.float32) for key in right}
            for each in (left, right)
        )
        # Adam turns the last digit of a gradient near zero into a step of either sign. So few values may differ by as
        # much as they have moved, and all in the mean by little of it; B has moved by all it holds.
        moved = torch.cat([tensor for key, tensor in theirs.items() if "lora_B" in key]).abs().mean()
        apart = torch.cat([ours[key] - tensor for key, tensor in theirs.items()]).abs().mean()
        assert moved > 0
        assert apart < 0.02 * moved, name


def test_the_first_process_alone_writes_and_speaks(undisturbed: tuple[Path, Any], material: Path) -> None:
    folder, done = undisturbed
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == FILES
    found = json.loads(done.stdout)
    assert found["results"][0]["cost"]["processes"] == 2
    assert [words.split(":")[0] for words in own_words(done)] == [found["runs"][0]]
    assert "\r" not in done.stderr


def test_a_run_of_two_processes_is_the_run_of_one(undisturbed: tuple[Path, Any], material: Path) -> None:
    runs = material / "runs" / "alone"
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(material)
        run = finetune(small_options(), compute_options=small_compute(), runs=runs)
    assert run is not None
    assert run.folder is not None
    assert_alike(outcome(undisturbed[0]), outcome(run.folder))


def test_a_killed_process_ends_the_others_with_one_message(interrupted: tuple[Path, Any]) -> None:
    folder, done = interrupted
    start, message = own_words(done)
    assert "training" in start
    # Whichever comes first: the connection that breaks, or torchrun's signal.
    assert message.startswith(("error: another process of this training has ended", "error: interrupted"))
    assert message.endswith(f"--resume runs/interrupted/{folder.name}")
    assert f'File "{Path(finetuning.__file__).parent}' not in done.stderr, "no traceback of ours"
    assert {path.name for path in folder.iterdir()} == {CHECKPOINT_FILE, START_FILE}
    state = load_state(folder, CPU)
    assert state is not None
    assert [len(history) for history in state.history.values()] == [1, 1]


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits_and_one_up_to_rounding(
    interrupted: tuple[Path, Any], undisturbed: tuple[Path, Any], material: Path
) -> None:
    expected = outcome(undisturbed[0])
    for place in ("by-one", "by-two"):
        shutil.copytree(interrupted[0], material / "runs" / place / interrupted[0].name)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(material)
        alone = Path("runs/by-one") / interrupted[0].name
        resume(alone)
        assert_alike(outcome(alone.absolute()), expected)
    by_two = Path("runs/by-two") / interrupted[0].name
    done = torchrun(2, material, "-m", "finetune.cli", "--resume", by_two)
    assert done.returncode == 0, done.stderr
    assert_same_outcome(outcome(material / by_two), expected)


@pytest.mark.slow
def test_two_processes_resume_what_one_has_begun(material: Path, undisturbed: tuple[Path, Any]) -> None:
    save = finetuning.save_state

    def save_and_die(*given: Any) -> None:
        save(*given)
        raise UserError("killed")

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(material)
        patched.setattr(finetuning, "save_state", save_and_die)
        with pytest.raises(UserError, match="killed"):
            finetune(small_options(), compute_options=small_compute(), runs=Path("runs/begun"))
    (folder,) = (material / "runs" / "begun").iterdir()
    done = torchrun(2, material, "-m", "finetune.cli", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert_alike(outcome(folder), outcome(undisturbed[0]))


@pytest.mark.slow
def test_torchrun_starts_a_training_again_that_goes_on(undisturbed: tuple[Path, Any], material: Path) -> None:
    done = torchrun(2, material, WORKER, "finetune", 0, 4, *OPTIONS, "--runs", "runs/restarted", restarts=1)
    assert done.returncode == 0, done.stderr
    (folder,) = (material / "runs" / "restarted").iterdir()  # one
    assert_same_outcome(outcome(folder), outcome(undisturbed[0]))
    assert [words.split(" ")[0] for words in own_words(done)] == [
        f"runs/restarted/{folder.name}:",
        "error:",
        f"runs/restarted/{folder.name}:",
        "run",
    ]


def small_options() -> FinetuneOptions:
    return FinetuneOptions(
        model="timm/test_vit",
        train="patches.csv",
        test=(),
        view="full@32",
        cv=2,
        epochs=2,
        batch_size=4,
        precision="fp32",
    )


def small_compute() -> ComputeOptions:
    return ComputeOptions(weights=Path("vit.safetensors"))


# ----------------------------------------------------------------------------------------------------- who and on what


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with join_process_group() as process_group:
        assert (process_group.rank, process_group.world_size, process_group.launch, process_group.restarted) == (
            0,
            1,
            None,
            False,
        )
        assert process_group.broadcast("name", lambda: "made") == "made"
        process_group.assert_same("what", {})
        process_group.barrier("here")
        one = torch.ones(3)
        process_group.all_reduce_(one)
        assert one.tolist() == [1, 1, 1]


def test_a_single_process_of_torchrun_is_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    given |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with join_process_group() as process_group:
        assert process_group.world_size == 1
        assert process_group.restarted
        assert str(process_group.launch).endswith(f":{os.getppid()}")


def test_processes_that_cannot_find_each_other_are_told_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "many"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=r"cannot find each other by RANK=0.*MASTER_PORT=many.*torchrun"),
        join_process_group(),
    ):
        pass


def side_by_side(store: HashStore, work: Callable[[ProcessGroup], Any], *, size: int = 3) -> list[Any]:
    """What each of some processes, here threads, returns or raises."""

    def one(rank: int) -> Any:
        try:
            generation = _generation(store, rank, size)
            return work(ProcessGroup(rank, size, rank, PrefixStore(generation, store)))
        except UserError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_all_hear_the_first_and_none_hears_those_before_a_restart() -> None:
    store = HashStore()
    for word in ("one", "two"):
        found = side_by_side(
            store,
            lambda process_group, word=word: process_group.broadcast("word", lambda: f"{word} {process_group.rank}"),
        )
        assert found == [f"{word} 0"] * 3


def test_a_process_that_differs_is_named_and_ends_all_with_one_message() -> None:
    def work(process_group: ProcessGroup) -> Any:
        try:
            process_group.assert_same(
                "setup", {"backbone": {"precision": "fp32" if process_group.rank == 2 else "bf16"}, "seed": 1}
            )
        except UserError as error:
            return process_group.fails_first(), type(error), str(error)
        return None

    found = side_by_side(HashStore(), work)
    assert [spoke for spoke, *_ in found] == [False, False, True]
    assert [kind for _, kind, _ in found] == [ProcessLostError, ProcessLostError, UserError]
    assert 'process 2 of 3 differs from process 0: backbone.precision is "fp32" instead of "bf16"' in found[2][2]


def test_a_batch_smaller_than_the_processes_is_refused(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(material)
    with pytest.raises(UserError, match="4 patches per fold and step cannot be shared by 5 processes"):
        finetune(
            small_options(), compute_options=small_compute(), runs=Path("runs/none"), process_group=ProcessGroup(0, 5)
        )
    assert not Path("runs/none").exists()


def test_a_quiet_process_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console.quieten(True)
    try:
        console.say("words")
        console.show()
        console.print_json({"a": math.pi})
    finally:
        console.quieten(False)
    assert capsys.readouterr() == ("", "")
    console.say("words")
    assert capsys.readouterr().err == "words\n"
