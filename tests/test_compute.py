"""Does a network give the same embeddings in the form that runs fastest, and does nobody wait for a GPU needlessly?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from extract import compute, prepare, views
from extract.backbones import build_model, find_backbone
from extract.compute import (
    compile_blocks,
    compiled,
    embed_batch,
    fastest,
    fetch,
    hold_weights,
    mark,
    padded,
    settled,
    side_by_side,
    takes_openvino,
)
from extract.openvino import OpenvinoNetwork, is_convolutional, load, version
from extract.prepare import ExtractOptions
from extract.resize import _weights, resize_as_pillow
from extract.views import make_transform, parse_view
from features.console import UserError
from features.device import compute_exactly, constant

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VIT = find_backbone("timm/test_vit.r160_in1k")
CNN = find_backbone("timm/test_efficientnet.r160_in1k")


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 160, 160, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("backbone", [VIT, CNN], ids=["transformer", "convolutions"])
def test_weights_held_in_half_precision_give_the_bits_that_autocast_gives(backbone):
    torch.manual_seed(0)
    model = build_model(backbone, None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = hold_weights(model, "bf16")
    halves = [name for name, tensor in held.state_dict().items() if tensor.dtype == torch.bfloat16]
    assert {type(held.get_submodule(name.rpartition(".")[0])) for name in halves} <= {nn.Linear, nn.Conv2d}
    assert len(halves) > 5
    expected = embed_batch(model, backbone, images(), precision="bf16")
    found = embed_batch(held, backbone, images(), precision="bf16")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # still float32


def test_what_is_not_rounded_is_shared_and_not_copied():
    model = build_model(VIT, None)
    held = hold_weights(model, "bf16")
    assert held.norm.weight is model.norm.weight
    assert held.pos_embed is model.pos_embed
    assert hold_weights(model, "fp32") is model


def test_a_network_whose_numbers_the_type_of_its_weights_decides_is_left_as_it_is():
    torch.manual_seed(0)
    model = build_model(VIT, None)
    assert settled(model, VIT, images(), precision="fp32") is model
    held = settled(model, VIT, images(), precision="bf16")
    assert held.patch_embed.proj.weight.dtype == torch.bfloat16

    def positions(module: nn.Module, given: Any, tokens: Tensor) -> Tensor:
        return tokens + torch.linspace(0, 1, tokens.shape[-1], dtype=module.proj.weight.dtype).float()

    model.patch_embed.register_forward_hook(positions)
    assert settled(model, VIT, images(), precision="bf16") is model


def test_a_layer_that_computes_with_its_weights_first_keeps_them():
    model = nn.Sequential(StdConv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    held = hold_weights(model, "bf16")
    assert [layer.weight.dtype for layer in held] == [torch.float32, torch.bfloat16]


# ------------------------------------------------------------------------------------------------------- compiling


@pytest.fixture
def compilations(monkeypatch) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The modules that were compiled, and how; they are not."""
    seen: list[tuple[nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: seen.append((module, options)))
    return seen


def network(arch: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(arch, num_classes=0)


@pytest.mark.parametrize(
    ("arch", "n", "kind"),
    [
        ("vit_small_patch14_reg4_dinov2", 12, "Block"),
        ("eva02_tiny_patch14_224", 12, "EvaBlock"),
        ("swin_tiny_patch4_window7_224", 12, "SwinTransformerBlock"),
        ("tf_efficientnet_lite0", 0, ""),  # hardly two blocks are alike
        ("resnet50", 0, ""),
        ("resnet18", 0, ""),
    ],
)
def test_every_block_is_compiled_where_blocks_are_alike(compilations, arch, n, kind):
    assert compile_blocks(network(arch)) == (n > 0)
    assert [type(block).__name__ for block, _ in compilations] == [kind] * n
    for _, options in compilations:
        assert (options["dynamic"], options["fullgraph"]) == (False, True)
        assert options["options"] in ({"deterministic": True}, {"shape_padding": False})


def test_a_compiled_form_is_taken_only_where_it_embeds_alike(monkeypatch, capsys):
    model = build_model(VIT, None)

    def compiling_to(change: Callable[[Tensor], Tensor]) -> nn.Module | None:
        def compile_last(network: nn.Module) -> bool:
            network.norm.register_forward_hook(lambda module, given, result: change(result))
            return True

        monkeypatch.setattr(compute, "compile_blocks", compile_last)
        return compiled(model, VIT, images(), precision="bf16")

    def fail(values: Tensor) -> Tensor:
        raise RuntimeError("no compiler here")

    same = compiling_to(lambda values: values)
    assert same is not None
    assert same is not model
    assert same.norm.weight is model.norm.weight
    assert capsys.readouterr().err == ""
    assert compiling_to(lambda values: 1.1 * values) is None
    assert "differs here from plain PyTorch" in capsys.readouterr().err
    assert compiling_to(fail) is None
    assert "cannot be used here (no compiler here); going on without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "options", "recorded", "usable", "expected"),
    [
        ("cuda", {}, None, True, True),
        ("cuda", {"patches": 99}, None, True, False),  # too few
        ("cuda", {"patches": 99}, {"numerics": {"compiled": True}}, True, True),
        ("cuda", {}, {"numerics": {"compiled": False}}, True, False),  # go on as begun
        ("cuda", {"fast": False}, None, True, False),
        ("cuda", {}, None, False, False),
        ("cpu", {}, None, True, False),  # a transformer
        ("cpu", {"of": CNN, "patches": 1}, None, True, True),
        ("cpu", {"of": CNN}, {}, True, False),  # go on as begun by torch
        ("cpu", {"of": CNN, "installed": False}, None, True, False),
        ("cpu", {"of": CNN, "installed": False}, {"numerics": {"compiled": "openvino"}}, True, True),  # it will say so
        ("cpu", {"of": CNN, "fast": False}, {"numerics": {"compiled": "openvino"}}, True, False),
        ("cpu", {"of": CNN, "precision": "bf16"}, None, True, False),
        ("cpu", {"of": CNN}, None, False, False),
    ],
)
def test_networks_are_compiled_where_it_pays_unless_begun_or_asked_otherwise(
    monkeypatch, device, options, recorded, usable, expected
):
    """With batches of the very shape of all to come, because on a GPU each shape is compiled anew."""
    fast, shapes = nn.Identity(), []

    def compiling(model: nn.Module, backbone: Any, batch: Tensor, *, precision: str, earlier: Any) -> nn.Module | None:
        shapes.append(len(batch))
        return fast if usable else None

    options = dict(options)
    n, backbone = options.pop("patches", 100), options.pop("of", VIT)
    version = "1" if options.pop("installed", True) else None
    plain = build_model(backbone, None)
    monkeypatch.setattr(compute, "_WORTH_COMPILING", 100e9)
    monkeypatch.setattr(prepare, "version", lambda: version)
    monkeypatch.setattr(prepare, "compiled", compiling)
    monkeypatch.setattr(prepare, "settled", lambda model, *_, precision: model)
    monkeypatch.setattr(prepare, "padded", lambda batch, n: batch[:1].expand(n, -1, -1, -1))
    monkeypatch.setattr(prepare, "make_transform", lambda backbone, view: lambda examples, device: images())
    extraction = SimpleNamespace(
        options=ExtractOptions(**({"precision": "fp32", "batch_size": 16, "overwrite": True} | options)),
        device=torch.device(device),
        dataset=SimpleNamespace(samples=range(n)),
        examples=[],
    )
    recorded = recorded and {"precision": "fp32"} | recorded
    chosen = prepare._choose(extraction, replace(backbone, gflops=1.0), {"fp32": plain}, parse_view("full"), recorded)
    assert chosen.compiled == expected
    assert chosen.network is (fast if expected else plain)
    assert set(shapes) <= {16}


# -------------------------------------------------------------------------------------------------------- OpenVINO

needs_openvino = pytest.mark.skipif(version() is None, reason="OpenVINO is not installed")


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("tf_efficientnet_lite0", True),
        ("test_resnet", True),
        ("test_convnext", False),  # linear layers
        ("test_vit", False),
    ],
)
def test_a_network_of_convolutions_and_batch_norms_alone_is_convolutional(arch, expected):
    assert is_convolutional(network(arch)) == expected
    assert takes_openvino(network(arch), CPU, precision="fp32") == expected
    assert not takes_openvino(network(arch), CPU, precision="bf16")
    assert not takes_openvino(network(arch), CUDA, precision="fp32")


@needs_openvino
def test_openvino_embeds_as_torch_does_with_the_same_bits_for_any_batch_and_any_number_of_threads(
    monkeypatch, tmp_path
):
    """In float32 whatever the processor offers, and without the telemetry that OpenVINO else has from its import on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    openvino = load()
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
    asked, compile_model = [], openvino.Core.compile_model
    monkeypatch.setattr(openvino.Core, "compile_model", lambda *a: asked.append(a[-1]) or compile_model(*a))
    torch.manual_seed(0)
    model, batch = build_model(CNN, None), images(5).contiguous(memory_format=torch.channels_last)
    expected = embed_batch(model, CNN, batch, precision="fp32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = fastest(model, CNN, CPU, size=160, n_images=1_000, precision="fp32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    beside = fastest(model, CNN, CPU, size=160, n_images=1_000, precision="fp32")
    whole = embed_batch(alone, CNN, batch, precision="fp32")
    with side_by_side(CPU, 3) as map_batches:
        parts = list(map_batches(lambda part: embed_batch(beside, CNN, part, precision="fp32"), batch.split([2, 2, 1])))
    assert list(whole) == list(expected)
    for name, values in expected.items():
        assert float((whole[name] - values).abs().max()) <= 2**-14 * float(values.abs().max())
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    assert [options["INFERENCE_PRECISION_HINT"] for options in asked] == ["f32", "f32"]
    assert [options["INFERENCE_NUM_THREADS"] for options in asked] == [1, 3]
    assert list(tmp_path.iterdir()) == []


@needs_openvino
def test_a_network_is_converted_once_for_each_size_of_its_input(monkeypatch):
    model = build_model(CNN, None)
    converted, convert = [], OpenvinoNetwork._compile
    monkeypatch.setattr(
        OpenvinoNetwork, "_compile", lambda self, one: converted.append(one.shape) or convert(self, one)
    )
    first = compiled(model, CNN, images(2), precision="fp32")
    assert isinstance(first, OpenvinoNetwork)
    assert compiled(model, CNN, images(3), precision="fp32", earlier=first) is first
    assert compiled(model, CNN, images()[..., :96, :96], precision="fp32", earlier=first) is first
    assert converted == [(1, 3, 160, 160), (1, 3, 96, 96)]


def test_a_network_that_openvino_embeds_otherwise_or_cannot_convert_is_left_to_torch(monkeypatch, capsys):
    model = build_model(CNN, None)

    def otherwise(self: Any, given: Tensor) -> dict[str, Tensor]:
        return {name: 1.1 * values for name, values in compute.forward_poolings(*self._plain, given).items()}

    with monkeypatch.context() as patched:
        patched.setattr(OpenvinoNetwork, "forward", otherwise)
        assert compiled(model, CNN, images(), precision="fp32") is None
        assert "differs here from plain PyTorch" in capsys.readouterr().err
    monkeypatch.setattr("extract.openvino.find_spec", lambda name: None)
    assert compiled(model, CNN, images(), precision="fp32") is None
    assert "OpenVINO is not installed: pip install 'mitofm[cpu]'" in capsys.readouterr().err
    assert not isinstance(fastest(model, CNN, CPU, size=160, n_images=1_000, precision="fp32"), OpenvinoNetwork)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------- no waiting


def test_the_last_batch_is_padded_on_a_gpu_and_not_on_a_processor():
    few = torch.arange(6.0).view(2, 3, 1, 1)
    assert padded(few, 4) is few
    with torch.device("meta"):
        assert padded(torch.empty(2, 3, 5, 5), 4).shape == (4, 3, 5, 5)
        assert padded(torch.empty(4, 3, 5, 5), 4).shape == (4, 3, 5, 5)


class Events:
    """torch.cuda's events and streams, which note which thread does what."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []

    def note(self, what: str) -> None:
        self.log.append((what, threading.current_thread().name))

    def event(self, *, blocking: bool) -> Any:
        assert blocking  # a thread that spins would take a core from decoding
        return SimpleNamespace(record=lambda stream: self.note("record"), synchronize=lambda: self.note("wait"))

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.note("copy")
        yield


def test_a_writer_waits_for_its_own_batch_and_copies_beside_the_next(monkeypatch):
    events = Events()
    monkeypatch.setattr(torch.cuda, "Event", events.event)
    monkeypatch.setattr(torch.cuda, "stream", events.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(compute, "copy_stream", lambda device: None)
    done = mark(CUDA)
    found: list[Any] = []
    writer = threading.Thread(target=lambda: found.append(fetch({"cls": torch.ones(2, 3)}, done)), name="writer")
    writer.start()
    writer.join()
    assert found[0]["cls"].tolist() == [[1, 1, 1], [1, 1, 1]]
    main = threading.current_thread().name
    assert events.log == [("record", main), ("wait", "writer"), ("copy", "writer")]


def test_patches_are_copied_beside_the_work_which_waits_for_them(monkeypatch):
    log: list[Any] = []

    @contextmanager
    def stream(which: str) -> Iterator[None]:
        log.append(f"on {which}")
        yield
        log.append(f"off {which}")

    def to(device: torch.device, *, non_blocking: bool) -> Any:
        log.append(f"copy {device.type}" if non_blocking else "wait for the copy")
        return copied

    work = SimpleNamespace(wait_stream=lambda other: log.append(f"work waits for {other}"))
    copied = SimpleNamespace(record_stream=lambda user: log.append("memory kept") if user is work else None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(views, "copy_stream", lambda device: "copies")
    assert views._beside_its_work(SimpleNamespace(to=to), CUDA) is copied
    assert log == ["on copies", "copy cuda", "off copies", "work waits for copies", "memory kept"]


def test_on_a_processor_there_is_nothing_to_wait_for():
    assert mark(CPU) is None
    assert fetch({"cls": torch.ones(1, 2)}, None)["cls"].tolist() == [[1, 1]]


class Waits(TorchDispatchMode):
    """Notes every operation for which the host waits for the device, or copies something of its own there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        kinds = {tensor.device.type for tensor in (*args, result) if isinstance(tensor, Tensor)}
        if name in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "equal") or (
            name in ("_to_copy", "copy_") and len(kinds) > 1
        ):
            self.seen.append(name)
        return result


def test_the_counter_of_waits_counts():
    with FakeTensorMode(), Waits() as waits:
        torch.tensor([0.5]).to("cuda")
        torch.zeros(3, device="cuda").cpu()
    assert waits.seen == ["lift_fresh", "_to_copy", "_to_copy"]


@pytest.fixture
def fake_gpu(monkeypatch) -> Iterator[None]:
    """Autocast as on a GPU; nothing of the fakes stays in a cache."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    yield
    _weights.cache_clear()
    constant.cache_clear()


@pytest.mark.parametrize("backbone", [VIT, CNN], ids=["transformer", "convolutions"])
def test_from_pixels_to_embeddings_nothing_waits_for_the_gpu(fake_gpu, backbone):
    """But in the first batch, which makes the constants."""
    with torch.device("meta"):
        model = build_model(backbone, None)
    transform = make_transform(backbone, parse_view("full"))
    waited = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        held = hold_weights(model.to_empty(device="cuda"), "fp16")
        for _ in range(2):
            pixels = torch.empty((3, 128, 128, 3), dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
            with Waits() as waits:
                pixels = resize_as_pillow(pixels, (160, 160), interpolation=transform.interpolation)
                batch = padded(transform.normalise(pixels), 4)
                embeddings = embed_batch(held, backbone, batch, precision="fp16")
            waited.append(waits.seen)
        assert {(len(values), values.dtype, values.device.type) for values in embeddings.values()} == {
            (4, torch.float32, "cuda")
        }
    assert waited[0]
    assert waited[1] == []


@pytest.mark.gpu
@pytest.mark.parametrize("backbone", [VIT, CNN], ids=["transformer", "convolutions"])
def test_no_batch_waits_for_a_real_gpu(backbone):
    """From patches in main memory to embeddings on the device: torch raises where the host would wait."""
    compute_exactly(CUDA)
    held = hold_weights(build_model(backbone, None).to(CUDA), "fp16")
    transform = make_transform(backbone, parse_view("full"))
    patches = [np.full((128, 128, 3), value, dtype=np.uint8) for value in (0, 90, 255)]
    for mode in ("default", "error"):  # the first batch makes constants and handles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            embed_batch(held, backbone, padded(transform(patches, CUDA), 4), precision="fp16")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_transformer_can_be_compiled_on_a_real_gpu(precision, capsys):
    compute_exactly(CUDA)
    held = hold_weights(build_model(VIT, None).to(CUDA), precision)
    assert compiled(held, VIT, images(4).to(CUDA), precision=precision) is not None, capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- Apple's GPUs


@pytest.mark.parametrize("wrong", [lambda values: values.flip(1), lambda values: values * float("nan")])
def test_a_gpu_that_embeds_otherwise_than_the_processor_is_refused(monkeypatch, wrong):
    model = build_model(VIT, None)
    compute.require_as_on_cpu(model, VIT, images(1))

    def on_gpu(network: nn.Module, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        found = embed_batch(network, *arguments, **options)
        return {name: wrong(values) for name, values in found.items()} if network is model else found

    monkeypatch.setattr(compute, "embed_batch", on_gpu)
    with pytest.raises(UserError, match=r"this machine's GPU embeds otherwise .* Use `device='cpu'`"):
        compute.require_as_on_cpu(model, VIT, images(1))
