"""Does a training step wait for nothing, keep its shapes, and go on in plain PyTorch where a fast way fails?"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from bench_lora import kept_bytes
from test_network import VIT, images, stirred, tiny_network
from test_train import DROPPING, PLATEAU, RECIPE, TIGHT, TRANSFORM, double, nothing, patches, trained
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from extract.backbones import build_model
from features.console import UserError
from features.device import constant
from features.folds import fold_models
from finetune import fast, kernels
from finetune import run as finetuning
from finetune import train as training
from finetune.compute import Compute, allow_unrepeatable
from finetune.fast import try_compiled_blocks, try_graph, try_kernels
from finetune.lora import TARGETS, LoraOptions, adapters
from finetune.network import Network
from finetune.optimizer import IDLE, Scalars, adam_, scalars, schedule_of
from finetune.options import ComputeOptions, FinetuneOptions
from finetune.setup import Setup
from finetune.step import Batches, Step, TrainingSet
from finetune.train import new_state, train, validation_logits

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------- no waiting


class Operations(TorchDispatchMode):
    """Counts operations, and those of which a GPU would make the host wait."""

    WAITING = ("aten._local_scalar_dense", "aten.lift_fresh", "aten.nonzero", "aten.equal", "aten.masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all[str(function).rpartition(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def waiting(self) -> dict[str, int]:
        return {name: n for name, n in self.all.items() if name.startswith(self.WAITING)}


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operations]:
    """Counts operations on tensors, and calls that bring one to the host: no operation where it lies there already."""
    with monkeypatch.context() as patched, Operations() as operations:
        for name in ("cpu", "numpy", "tolist", "item"):
            method = getattr(Tensor, name)

            def counting(tensor: Tensor, *given: Any, name: str = name, method: Any = method) -> Any:
                operations.all[f"aten.nonzero {name}"] += 1
                return method(tensor, *given)

            patched.setattr(Tensor, name, counting)
        yield operations


def fake_step(recipe: Any = RECIPE, n_soft: int = 0) -> tuple[Step, Network]:
    """A step on tensors without storage, whose adapters are computed by kernels; on a CPU masks come from the host.

    With `n_soft`, targets are distributions over so many classes.
    """
    constant.cache_clear()  # constants of other tests have storage
    network = Network(
        build_model(VIT, None).to_empty(device="cpu"),
        VIT,
        method="lora",
        lora=LoraOptions(rank=2),
        fold_models=fold_models([0], 3),
        n_classes=n_soft or 2,
    )
    for _, layer in adapters(network.model):
        layer.triton = True
    network.compute_in("bf16")
    network.shard_batches(Compute(CPU, "fp32", 3).process_group, 4)
    whole = patches()
    data = TrainingSet(
        torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64), whole.folds, TRANSFORM
    )
    compute = Compute(CPU, "fp32", 3, same_shapes=True)
    step = Step(network, data, recipe, moments=torch.zeros(3, 2, network.n_trained), compute=compute)
    rows = torch.zeros(2, 3, 4, dtype=torch.int64)
    target = torch.rand(2, 3, 4, n_soft) if n_soft else rows.clone()
    step.begin(Batches(rows, target, torch.rand(2, 3, 4, 11), rows[..., 0].clone(), torch.rand(2, 3, 4)))
    return step, network


@pytest.fixture
def fake() -> Iterator[None]:
    with torch.device("meta"):
        model = build_model(VIT, None)
    patch = pytest.MonkeyPatch()
    patch.setattr("test_step.build_model", lambda *_: model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    patch.undo()
    constant.cache_clear()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("n_soft", [0, 5], ids=["labels", "distributions over five classes"])
def test_a_step_makes_the_host_wait_for_nothing(monkeypatch: pytest.MonkeyPatch, n_soft: int) -> None:
    step, _ = fake_step(n_soft=n_soft)
    step(0, [0, 1, 2])  # constants are copied in the first step
    with counted(monkeypatch) as operations:
        step(1, [0, 1, 2])
    assert operations.waiting == {}
    assert sum(operations.all.values()) > 500


@pytest.mark.usefixtures("fake")
def test_waiting_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step, network = fake_step()
    step(0, [0, 1, 2])

    def wait(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
        result.cpu()
        return result + torch.tensor([1.0])

    network.model.norm.register_forward_hook(wait)
    with counted(monkeypatch) as operations:
        step(1, [0, 1, 2])
    assert operations.waiting == {"aten.nonzero cpu": 1, "aten.lift_fresh": 1}


@pytest.mark.usefixtures("fake")
def test_kernels_do_an_adapted_layers_work_in_a_dozen_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    step, network = fake_step(replace(RECIPE, augment=None))
    step(0, [0, 1, 2])
    with counted(monkeypatch) as operations:
        step(1, [0, 1, 2])
    n = len(list(adapters(network.model)))
    first = 1  # nothing trains the input of the first layer
    assert operations.all["mitofm.project"] == operations.all["mitofm.backward_B"] == n
    assert operations.all["mitofm.backward_A_"] == n - first
    assert operations.all["mitofm.keep_mask"] == operations.all["mitofm.masked"] == 0


# ----------------------------------------------------------------------------------------------- passes of one shape


def stopping(network: Network, **options: Any) -> tuple[Any, list[int]]:
    """Train folds that stop one after the other; returns the state, and how many images each training pass held."""
    recipe = replace(PLATEAU, epochs=6, patience=1)
    state, seen = new_state(network), []
    scores = {0: [0.9, 0.5], 1: [0.5, 0.9, 0.5], 2: [0.5, 0.6, 0.9, 0.5]}
    handle = network.register_forward_pre_hook(
        lambda _, given, named: seen.append(len(given[0])) if named else None, with_kwargs=True
    )
    judged = iter([scores[fold][epoch] for epoch in range(4) for fold in range(3) if epoch < len(scores[fold])])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "judge_logits", lambda *_: (next(judged), 0.5))
        compute = Compute(CPU, "fp32", 3, evaluation_batch=5, **options)
        data = patches(network.values.dtype)
        train(network, data, recipe, state=state, compute=compute, save=nothing, advance=nothing)
    handle.remove()
    assert [len(state.history[fold]) for fold in range(3)] == [2, 3, 4]
    return state, seen


@pytest.mark.usefixtures("exact")
def test_folds_that_stay_in_the_passes_after_they_have_stopped_change_nothing() -> None:
    expected, seen = stopping(double(lora=DROPPING))
    assert set(seen) == {4, 8, 12}  # one, two or three folds of four
    found, seen = stopping(double(lora=DROPPING), same_shapes=True)
    assert set(seen) == {12}
    torch.testing.assert_close(found.values, expected.values, **TIGHT)
    torch.testing.assert_close(found.moments, expected.moments, **TIGHT)
    assert (found.n_steps, found.n_images) == (expected.n_steps, expected.n_images)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "finetune.network.forward_poolings", lambda model, _, x: {"cls": model.forward_features(x)[:, 0]}
    )


def compile_by(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have modules compiled by another backend than torch's own, whose options it does not know."""
    torch.compiler.reset()
    compile = nn.Module.compile

    def by_backend(module: nn.Module, *, options: object = None, **others: Any) -> None:
        compile(module, backend=backend, **others)

    monkeypatch.setattr(nn.Module, "compile", by_backend)


@pytest.mark.parametrize("method", ["lora", "head"])
def test_blocks_are_compiled_once_for_training_and_once_for_evaluation(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    torch.compiler.reset()
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, options=None, **more: compile(module, backend=count, **more)
    )
    network = tiny_network(method, lora=DROPPING)
    assert network.compile_blocks()
    compiled, _ = stopping(network, same_shapes=True)
    assert graphs == 2 if method == "lora" else graphs <= 2
    plain, _ = stopping(tiny_network(method, lora=DROPPING), same_shapes=True)
    torch.testing.assert_close(compiled.values, plain.values, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_evaluation_in_passes_of_one_shape_gives_the_same_logits() -> None:
    network = stirred(tiny_network())
    expected = validation_logits(network, patches(torch.uint8), [0, 2], compute=Compute(CPU, "fp32", 3))
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    compute = Compute(CPU, "fp32", 3, same_shapes=True, evaluation_batch=5)
    found = validation_logits(network, patches(torch.uint8), [0, 2], compute=compute)
    assert set(seen) == {15}
    for fold in (0, 2):
        torch.testing.assert_close(torch.from_numpy(found[fold]), torch.from_numpy(expected[fold]))


# ------------------------------------------------------------------------------------------------------------- Adam


@pytest.mark.parametrize(("optimizer", "decay"), [("adam", 0.0), ("adam", 0.01), ("adamw", 0.1)])
def test_all_rows_are_stepped_as_torchs_optimisers_step_each_alone(optimizer: Any, decay: float) -> None:
    recipe = replace(RECIPE, optimizer=optimizer, weight_decay=decay)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    moments = torch.zeros(3, 2, 7, dtype=torch.float64)
    rows = [row.clone().requires_grad_() for row in values]
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam
    theirs = [kind([row], lr=1.0, weight_decay=decay) for row in rows]
    n_steps = [0, 0, 0]
    for batch in range(12):
        gradients = torch.randn(3, 7, dtype=torch.float64, generator=generator)
        plan: list[Scalars] = []
        for row in range(3):
            if (row == 1 and batch % 3 == 0) or (row == 2 and batch > 6):
                plan.append(IDLE)
                continue
            n_steps[row] += 1
            rate = 0.1 / (batch + row + 1)
            plan.append(scalars(recipe, rate=rate, step=n_steps[row]))
            theirs[row].param_groups[0]["lr"] = rate
            rows[row].grad = gradients[row].clone()
            theirs[row].step()
        untouched = [row for row in range(3) if plan[row] == IDLE]
        before = values[untouched], moments[untouched]
        adam_(values, gradients, moments, schedule_of([plan], values)[0], recipe)
        assert torch.equal(values[untouched], before[0])
        assert torch.equal(moments[untouched], before[1])
    torch.testing.assert_close(values, torch.stack([row.detach() for row in rows]), rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------- memory, per image


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_keeps_at_most_half_of_what_peft_keeps(precision: str) -> None:
    wide = replace(VIT, kwargs={**VIT.kwargs, "embed_dim": 192, "num_heads": 3, "depth": 6})
    network = Network(build_model(wide, None), wide, method="lora", lora=LoraOptions(), fold_models=fold_models([0], 2))
    network.compute_in(precision)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3, target_modules=TARGETS)
    theirs = peft.get_peft_model(build_model(wide, None), config)
    batch = torch.randn(64, 3, 32, 32)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def our_step() -> None:
        with autocast():
            network(batch, range(2), step=0)

    def their_step() -> None:
        with autocast():
            theirs(batch)

    own = [network.values, *network.parameters(), *([] if network.copies is None else [network.copies])]
    ours = kept_bytes(our_step, own)
    assert ours <= 0.5 * kept_bytes(their_step, list(theirs.parameters()))


# --------------------------------------------------------------------------------------- fast ways, tried and left out


def on_gpu(**options: Any) -> Compute:
    return Compute(torch.device("cuda"), "fp32", 3, evaluation_batch=2, **options)


@pytest.mark.parametrize("agree", [True, False])
def test_kernels_are_used_where_they_agree(agree: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network, compute = tiny_network(lora=LoraOptions(rank=2)), on_gpu()
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "verify", lambda *_, rank: agree and rank == 2)
    try_kernels(network, compute)
    assert {layer.triton for _, layer in adapters(network.model)} == {agree}
    assert compute.fast_paths == ({"kernels"} if agree else set())


def spoiled(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    return lambda *given: [result * 1.5 if result.is_floating_point() else result for result in graph(*given)]


def failing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    raise RuntimeError("no compiler here")


@pytest.mark.parametrize(
    ("backend", "said"), [("eager", ""), (spoiled, "differs here from plain PyTorch"), (failing, "cannot be used here")]
)
def test_compiled_blocks_that_differ_or_fail_are_left_out_with_a_sentence(
    backend: Any, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.compiler.reset()
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, options=None, **more: compile(module, backend=backend, **more)
    )
    network = tiny_network()
    expected = network(images(), network.members, step=1)
    before = network.values.clone()
    compute = Compute(CPU, "fp32", 3, evaluation_batch=2)
    try_compiled_blocks(network, compute, batch_size=2, image_size=32)
    assert network.is_compiled == (not said)
    assert compute.fast_paths == (set() if said else {"compiled blocks"})
    assert said in capsys.readouterr().err
    assert torch.equal(network.values, before)
    torch.testing.assert_close(network(images(), network.members, step=1), expected)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("asked", "on_gpu", "gflops", "expected"),
    [
        (None, True, 1e9, True),
        (None, True, 1e-9, False),  # less work than compiling
        (None, True, None, False),
        (None, False, 1e9, False),
        (True, False, None, True),
        (False, True, 1e9, False),
    ],
)
def test_blocks_are_compiled_where_it_pays_or_as_asked(
    asked: bool | None, on_gpu: bool, gflops: float | None, expected: bool
) -> None:
    setup = SimpleNamespace(
        compute_options=ComputeOptions(compile=asked),
        compute=Compute(CPU, "fp32", 3, fast=on_gpu),
        recipe=RECIPE,
        options=FinetuneOptions(),
        experiment=SimpleNamespace(folds=patches().folds),
        backbone=replace(VIT, gflops=gflops),
    )
    assert Setup.compiles.fget(setup) == expected  # type: ignore[attr-defined]


def test_a_network_without_equal_blocks_is_not_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    network = tiny_network()
    del network.model.blocks[1:]
    compute = Compute(CPU, "fp32", 3, evaluation_batch=2)
    try_compiled_blocks(network, compute, batch_size=2, image_size=32)
    assert not network.is_compiled
    assert compute.fast_paths == set()
    assert capsys.readouterr().err == ""


class FakeGraph:
    """Runs again what was run while it was captured."""

    recorded: Any = None

    def replay(self) -> None:
        FakeGraph.recorded()


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's streams and graphs, as far as a capture uses them."""

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)


@pytest.mark.usefixtures("fake_graphs")
def test_a_captured_step_leaves_state_as_it_was_and_is_compared_with_a_plain_one() -> None:
    state, outcome = torch.zeros(1), torch.zeros(1)

    def step() -> None:
        state.add_(1)
        outcome.copy_(state * 3)

    FakeGraph.recorded = step
    assert try_graph(step, [state], [outcome], precision="fp32") is not None
    assert state == 0
    FakeGraph.recorded = lambda: outcome.fill_(4)
    assert try_graph(step, [state], [outcome], precision="fp32") is None
    assert state == 0


@pytest.mark.usefixtures("fake_graphs")
def test_a_step_that_cannot_be_captured_leaves_state_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    state, calls = torch.zeros(1), []

    def step() -> None:
        state.add_(1)
        calls.append(1)
        if len(calls) == 5:  # after the plain one and three to warm up
            raise RuntimeError("operation not permitted when stream is capturing")

    assert try_graph(step, [state], [state], precision="fp32") is None
    assert state == 0
    assert "operation not permitted when stream is capturing" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ repeatability


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_is_held_to_operations_that_repeat_themselves(device: str, deterministic: None) -> None:
    torch.use_deterministic_algorithms(False)
    setup: Any = SimpleNamespace(compute=SimpleNamespace(device=torch.device(device)))
    finetuning._compute_reproducibly(setup)
    # With a warning alone, attention would take its other backward pass.
    assert torch.are_deterministic_algorithms_enabled() == (device == "cuda")
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.usefixtures("deterministic")
def test_an_operation_that_cannot_be_repeated_is_named_once_and_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = trained(tiny_network())
    refused = iter([True])
    forward = Network.forward

    def refusing(network: Network, *given: Any, **options: Any) -> Tensor:
        if options.get("step") is not None and next(refused, False):
            raise RuntimeError("max_pool_backward does not have a deterministic implementation, but you set ...")
        return forward(network, *given, **options)

    monkeypatch.setattr(Network, "forward", refusing)
    network, compute = tiny_network(), Compute(CPU, "fp32", 3)
    state = new_state(network)
    train(network, patches(torch.uint8), RECIPE, state=state, compute=compute, save=nothing, advance=nothing)
    assert compute.unrepeatable == {"max_pool_backward"}
    assert capsys.readouterr().err.count("cannot repeat max_pool_backward bit by bit") == 1
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.testing.assert_close(state.values, trained(tiny_network(), data=patches(torch.uint8), seed=7).values)
    assert expected.n_images == state.n_images


def test_a_training_that_goes_on_in_another_way_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    network, said = tiny_network(), []
    state = replace(new_state(network), fast_paths=("CUDA graph", "kernels"))
    compute = Compute(CPU, "fp32", 3)
    recipe = replace(RECIPE, epochs=2)
    train(network, patches(torch.uint8), recipe, state=state, compute=compute, save=said.append, advance=nothing)
    assert state.fast_paths == ()
    assert capsys.readouterr().err.count("with plain PyTorch instead of CUDA graph, kernels") == 1


def test_other_errors_are_not_about_repeatability() -> None:
    assert not allow_unrepeatable(Compute(CPU, "fp32", 1), RuntimeError("shapes differ"))


def test_memory_that_runs_out_while_blocks_are_tried_halves_the_folds_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, compute = tiny_network(), Compute(CPU, "fp32", 3, evaluation_batch=2)
    monkeypatch.setattr(network, "compile_blocks", lambda: False)
    outcome = fast._step_outcome

    def short(network: Network, compute: Compute, *given: int) -> list[Tensor]:
        if compute.folds_at_once > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return outcome(network, compute, *given)

    monkeypatch.setattr(fast, "_step_outcome", short)
    try_compiled_blocks(network, compute, batch_size=2, image_size=32)
    assert compute.folds_at_once == 1


def test_memory_that_holds_no_fold_ends_with_a_remedy_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    network, compute = tiny_network(), Compute(CPU, "fp32", 1, evaluation_batch=2)

    def short(*_: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(fast, "_step_outcome", short)
    with pytest.raises(UserError, match="do not fit in the memory"):
        try_compiled_blocks(network, compute, batch_size=2, image_size=32)


def test_memory_that_runs_out_in_an_evaluation_while_blocks_are_tried_halves_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, compute = tiny_network(), Compute(CPU, "fp32", 3, evaluation_batch=8)
    monkeypatch.setattr(network, "compile_blocks", lambda: False)
    forward = Network.forward

    def short(network: Network, images: Tensor, *given: Any, **options: Any) -> Tensor:
        if options.get("step") is None and len(images) > 3 * 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(network, images, *given, **options)

    monkeypatch.setattr(Network, "forward", short)
    try_compiled_blocks(network, compute, batch_size=2, image_size=32)
    assert (compute.evaluation_batch, compute.folds_at_once) == (2, 3)


@pytest.mark.usefixtures("deterministic")
def test_an_operation_that_cannot_be_repeated_is_let_go_on_while_blocks_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, compute = tiny_network(), Compute(CPU, "fp32", 3, evaluation_batch=2)
    monkeypatch.setattr(network, "compile_blocks", lambda: False)
    outcome, refused = fast._step_outcome, iter([True])

    def refusing(*given: Any) -> list[Tensor]:
        if next(refused, False):
            raise RuntimeError("upsample_backward does not have a deterministic implementation, but you set ...")
        return outcome(*given)

    monkeypatch.setattr(fast, "_step_outcome", refusing)
    try_compiled_blocks(network, compute, batch_size=2, image_size=32)
    assert compute.unrepeatable == {"upsample_backward"}


def test_compiled_blocks_of_a_classifier_alone_are_not_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by("eager", monkeypatch)
    network = tiny_network("head")
    assert network.compile_blocks()
    seen: list[bool] = []
    network.model.norm.register_forward_hook(lambda *given: seen.append(given[-1].requires_grad))
    network(images(), network.members, step=0)
    assert seen == [False]
    torch.compiler.reset()


# --------------------------------------------------------------------------------------------------- the whole network


def test_layers_that_draw_while_training_draw_the_same_again_whatever_else_draws() -> None:
    random_vit = replace(VIT, kwargs={**VIT.kwargs, "drop_path_rate": 0.5})
    recipe = replace(RECIPE, epochs=2)

    def values(seed: int) -> Tensor:
        network = tiny_network("full", random_vit, folds=[1])
        assert network.has_random_layers
        torch.manual_seed(seed)
        return trained(network, recipe, data=patches(torch.uint8)).values.clone()

    first = values(0)
    assert torch.equal(values(1), first)
    plain = trained(tiny_network("full", VIT, folds=[1]), recipe, data=patches(torch.uint8)).values
    assert not torch.allclose(plain, first)
    assert not tiny_network("full", VIT, folds=[1]).has_random_layers
    assert not tiny_network("lora", random_vit).has_random_layers  # a frozen backbone is in eval mode


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_a_network_that_is_released_holds_no_memory(method: Any) -> None:
    network = tiny_network(method)
    network.compute_in("bf16")
    network(images(2 * len(network.members)), network.members, step=0).sum().backward()
    n_trained = network.n_trained
    network.release()
    tensors = [network.values, network.gradients, *network.parameters(), *network.buffers()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network.n_trained == n_trained > 0
