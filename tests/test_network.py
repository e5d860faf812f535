"""Is a backbone with one classifier per fold what its methods promise, in memory and on disk?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from patch_folders import MODEL, write_weights
from torch import Tensor, nn

from extract import openvino
from extract.backbones import Backbone, build_model, fetch_weights, find_backbone
from extract.pooling import forward_poolings
from extract.views import parse_view
from features.console import UserError
from features.folds import fold_models
from finetune.dropout import seed_of
from finetune.lora import LoraOptions, adapters
from finetune.network import HEAD_FILE, METHODS, MODEL_FILE, Method, Network
from finetune.options import FinetuneOptions
from finetune.setup import build_network

VIT = Backbone(
    name="tiny-vit",
    title="tiny ViT",
    hub_id="",
    arch="vit_tiny_patch16_224",
    kwargs={"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2},
    input_size=32,
    resize=32,
    n_parameters=18_992,
    embedding_dim=16,
    gflops=None,
    licence="none",
)
# The smallest network of timm with batch norms.
CNN = replace(
    VIT,
    name="tiny-cnn",
    title="tiny CNN",
    arch="test_efficientnet",
    kwargs={},
    card_pooling="pooled",
    n_parameters=99_196,
    embedding_dim=256,
)
LORA = LoraOptions(rank=2, alpha=4, dropout=0.3)
N_FOLDS = 3
N = 2  # images per fold


def backbone_model(backbone: Backbone = VIT, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network of random weights, always the same, in the layout it is trained in."""
    torch.manual_seed(0)
    return build_model(backbone, None).to(dtype).to(memory_format=torch.channels_last)


def tiny_network(
    method: Method = "lora",
    backbone: Backbone = VIT,
    *,
    folds: Sequence[int] | None = None,
    lora: LoraOptions = LORA,
    dtype: torch.dtype = torch.float32,
    seed: int = 7,
    n_classes: int = 2,
) -> Network:
    """Of one seed, whose members are numbered as the folds are."""
    chosen = folds if folds is not None else [0] if method == "full" else range(N_FOLDS)
    models = fold_models([seed], N_FOLDS)
    return Network(
        backbone_model(backbone, dtype),
        backbone,
        method=method,
        lora=lora,
        fold_models=models,
        members=chosen,
        n_classes=n_classes,
    )


def stirred(network: Network) -> Network:
    """Give every fold values of its own; without it adapters do nothing."""
    for fold, row in zip(network.members, network.values, strict=True):
        noise = torch.randn(row.shape, generator=torch.Generator().manual_seed(fold)).to(row)
        # Variances among the running statistics have to stay positive.
        row[: network.n_trained] += 0.05 * noise[: network.n_trained]
        row[network.n_trained :] *= 1 + 0.1 * noise[network.n_trained :].abs()
    return network


def images(n: int = N_FOLDS * N, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return drawn.to(dtype, memory_format=torch.channels_last)


def logits(network: Network, batch: Tensor | None = None) -> Tensor:
    batch = images(len(network.members) * N) if batch is None else batch
    with torch.no_grad():
        found: Tensor = network(batch, network.members)
    return found


# ------------------------------------------------------------------------------------------------------------ in memory


@pytest.mark.parametrize("backbone", [VIT, CNN], ids=lambda backbone: backbone.name)
@pytest.mark.parametrize("method", METHODS)
def test_before_the_first_step_the_classifiers_read_the_frozen_features(method: Method, backbone: Backbone) -> None:
    with torch.no_grad():
        features = forward_poolings(backbone_model(backbone), backbone, images())[backbone.card_pooling]
    network = tiny_network(method, backbone)
    n_rows = len(network.members)
    batch = images()[: n_rows * N]
    each = features[: n_rows * N].view(n_rows, N, -1)
    expected = torch.baddbmm(network.bias[:, None], each, network.weight.mT)
    if method == "full":  # its convolutions lie in a row, so in another memory layout
        torch.testing.assert_close(logits(network, batch), expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(logits(network, batch), expected)
        # A dropped input of an adapter that adds nothing changes nothing.
        assert torch.equal(network(batch, network.members, step=3), expected)


def test_a_full_networks_batch_norms_learn_while_training_only() -> None:
    network = tiny_network("full", CNN)
    before = network.values.clone()
    network(images(N), [0])
    assert torch.equal(network.values, before)
    network(images(N), [0], step=0)
    assert torch.equal(network.values[:, : network.n_trained], before[:, : network.n_trained])
    assert not torch.equal(network.values[:, network.n_trained :], before[:, network.n_trained :])


@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_frozen_backbones_batch_norms_never_learn(method: Method) -> None:
    network = tiny_network(method, CNN)
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    network(images(), network.members, step=0).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())


def test_a_fold_changes_with_its_own_row_alone() -> None:
    for method in ("lora", "head"):
        network = stirred(tiny_network(method))
        before = logits(network)
        network.values[1] += 0.1
        changed = [not torch.equal(left, right) for left, right in zip(logits(network), before, strict=True)]
        assert changed == [False, True, False], method


def test_everything_a_full_network_computes_with_lies_in_its_row() -> None:
    network = stirred(tiny_network("full", CNN))
    expected, row = logits(network), network.values.clone()
    other = tiny_network("full", CNN, folds=[1], seed=8)
    assert not torch.allclose(logits(other), expected)
    other.values.copy_(row)
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize(("method", "backbone"), [("lora", VIT), ("head", VIT), ("full", VIT), ("full", CNN)])
def test_trained_parameters_are_views_of_the_rows_and_counted(method: Method, backbone: Backbone) -> None:
    network = tiny_network(method, backbone)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in learning) == len(network.members) * network.n_trained
    storage = network.values.untyped_storage().data_ptr()
    assert {parameter.untyped_storage().data_ptr() for parameter in learning} == {storage}
    frozen = sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)
    assert frozen == (0 if method == "full" else sum(p.numel() for p in backbone_model(backbone).parameters()))


def test_initial_values_depend_on_seed_and_fold_alone() -> None:
    three, two = tiny_network(), tiny_network(folds=range(2))
    assert torch.equal(three.values[:2], two.values)
    assert not torch.equal(three.values[0], three.values[1])
    assert not torch.equal(tiny_network(seed=8).values, three.values)
    heads = tiny_network("head")
    full = tiny_network("full", folds=[2])
    assert torch.equal(full.weight[0], heads.weight[2])
    assert torch.equal(three.weight, heads.weight)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_classifiers_of_any_number_of_classes_are_drawn_alike(n_classes: int) -> None:
    network = tiny_network("head", n_classes=n_classes)
    assert (network.weight.shape, network.bias.shape) == ((N_FOLDS, n_classes, 16), (N_FOLDS, n_classes))
    bound = 1 / math.sqrt(16)
    for fold in range(N_FOLDS):  # of two classes as they have been drawn ever since
        generator = torch.Generator().manual_seed(seed_of(7, fold, 1))
        drawn = torch.rand(17 * n_classes, generator=generator) * 2 * bound - bound
        torch.testing.assert_close(torch.cat([network.weight[fold].flatten(), network.bias[fold]]), drawn)


@pytest.mark.parametrize("folds", [[1, 0], [0, 2], [1, 2], [2]])
def test_folds_that_the_rows_cannot_be_are_refused(folds: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot hold the members"):
        tiny_network("lora", folds=folds)


def test_a_full_network_of_two_folds_is_refused() -> None:
    with pytest.raises(ValueError, match="one member at a time"):
        tiny_network("full", folds=[0, 1])


@pytest.mark.parametrize(("method", "backbone"), [("lora", VIT), ("lora", CNN), ("head", VIT), ("full", CNN)])
def test_gathered_gradients_are_autograds(method: Method, backbone: Backbone) -> None:
    network = stirred(tiny_network(method, backbone, dtype=torch.float64))
    batch = images(len(network.members) * N, torch.float64)
    weights = torch.linspace(-1, 2, len(network.members) * N * 2, dtype=torch.float64).view(-1, N, 2)
    network.clear_gradients()
    (network(batch, network.members, step=5) * weights).sum().backward()
    network.gather_gradients()
    learning = [p for p in network.parameters() if p.requires_grad]
    expected = torch.autograd.grad((network(batch, network.members, step=5) * weights).sum(), learning)
    together = torch.zeros_like(network.values)
    for parameter, gradient in zip(learning, expected, strict=True):
        start = parameter.storage_offset()
        flat = gradient.reshape(len(network.members), -1)
        if parameter.shape[0] == len(network.members) and method != "full":
            together[:, start : start + flat.shape[1]] = flat
        else:
            together.view(-1)[start : start + flat.numel()] = gradient.flatten()
    torch.testing.assert_close(network.gradients, together[:, : network.n_trained])


def test_passes_of_some_folds_at_a_time_gather_the_same_gradients() -> None:
    network = stirred(tiny_network(dtype=torch.float64))
    batch = images(dtype=torch.float64)
    network.clear_gradients()
    network(batch, network.members, step=5).square().sum().backward()
    network.gather_gradients()
    together = network.gradients.clone()
    network.clear_gradients()
    for folds in ([0, 1], [2]):
        part = batch.view(N_FOLDS, N, 3, 32, 32)[folds].flatten(0, 1)
        network(part, folds, step=5).square().sum().backward()
    network.gather_gradients()
    torch.testing.assert_close(network.gradients, together)


def test_a_fold_outside_the_batch_has_no_gradient() -> None:
    network = stirred(tiny_network())
    network.clear_gradients()
    network(images(2 * N), [0, 2], step=0).square().sum().backward()
    network.gather_gradients()
    assert network.gradients[[0, 2]].abs().amax(dim=1).min() > 0
    assert not network.gradients[1].any()


def test_a_network_that_joins_two_poolings_is_classified_by_its_class_token() -> None:
    joined = replace(VIT, card_pooling="cls+mean")
    assert tiny_network(backbone=joined).pooling == "cls"
    assert torch.equal(logits(tiny_network(backbone=joined)), logits(tiny_network()))


# --------------------------------------------------------------------------------------------------------- folded norms


# Whose activations are modules of their own.
RESNET = replace(CNN, name="tiny-resnet", arch="resnet50", kwargs={"layers": (1, 1, 1, 1)}, embedding_dim=2048)


def with_uneven_norms(method: Method, backbone: Backbone, dtype: torch.dtype = torch.float64) -> Network:
    """A network whose batch norms change what they are given, as those of new networks do not."""
    network = stirred(tiny_network(method, backbone, dtype=dtype))
    generator = torch.Generator().manual_seed(2)
    for norm in network.model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(-2, 2, generator=generator)  # of either sign
            norm.bias.data.uniform_(-1, 1, generator=generator)
            norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return network


def n_norms(network: Network) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.model.modules())


def outcome(network: Network, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits and gradients of a training step."""
    network.clear_gradients()
    found = network(images(dtype=dtype), network.members, step=5)
    (found * torch.linspace(-1, 2, found.numel(), dtype=dtype).view(found.shape)).sum().backward()
    network.gather_gradients()
    return found.detach(), network.gradients.clone()


@pytest.mark.parametrize("backbone", [CNN, RESNET], ids=lambda backbone: backbone.name)
@pytest.mark.parametrize("method", ["lora", "head"])
def test_folded_norms_change_neither_logits_nor_gradients_nor_files(
    method: Method, backbone: Backbone, tmp_path: Path
) -> None:
    network = with_uneven_norms(method, backbone)
    network.save_member(tmp_path / "before", 1)
    expected, in_evaluation = outcome(network), logits(network, images(dtype=torch.float64))
    assert not network.compute_in("fp32", fold_norms=False)
    assert n_norms(network) > 0
    assert network.compute_in("fp32")
    assert n_norms(network) == 0
    for one in network.replicas(2):  # the second has modules of its own
        torch.testing.assert_close(outcome(one), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits(network, images(dtype=torch.float64)), in_evaluation, rtol=1e-9, atol=1e-9)
    network.save_member(tmp_path / "after", 1)
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / path.name).read_bytes() == path.read_bytes()


def test_folded_norms_are_the_same_function_in_half_precision() -> None:
    def gradients(*, fold_norms: bool) -> list[Tensor]:
        network = with_uneven_norms("lora", CNN, torch.float32)
        network.compute_in("bf16", fold_norms=fold_norms)
        with torch.autocast("cpu", torch.bfloat16):
            outcome(network, torch.float32)
        return [factor.grad for _, layer in adapters(network.model) for factor in (layer.A, layer.B)]

    for found, expected in zip(gradients(fold_norms=True), gradients(fold_norms=False), strict=True):
        # bfloat16 rounds by 2^-9 in each of some 30 layers; without gains, which have either sign, they are unrelated.
        assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98


def test_norms_of_a_trained_backbone_and_networks_without_norms_stay() -> None:
    network = tiny_network("full", CNN)
    assert not network.compute_in("fp32")
    assert n_norms(network) > 0
    assert not tiny_network("lora", VIT).compute_in("fp32")


# -------------------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("backbone", [VIT, CNN], ids=lambda backbone: backbone.name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_classes", [2, 5])
def test_a_fold_comes_back_as_it_was_saved(n_classes: int, method: Method, backbone: Backbone, tmp_path: Path) -> None:
    network = stirred(tiny_network(method, backbone, n_classes=n_classes))
    for fold in network.members:
        network.save_member(tmp_path / str(fold), fold)
    other = tiny_network(method, backbone, seed=8, n_classes=n_classes)
    assert not torch.equal(other.values, network.values)
    for fold in other.members:
        other.load_member(tmp_path / str(fold), fold)
    assert torch.equal(other.values, network.values)
    assert torch.equal(logits(other), logits(network))


@pytest.mark.parametrize("backbone", [VIT, CNN], ids=lambda backbone: backbone.name)
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_plain_timm_loads_the_merged_file_and_agrees(
    n_classes: int, method: Method, backbone: Backbone, tmp_path: Path
) -> None:
    network = stirred(tiny_network(method, backbone, n_classes=n_classes))
    fold = network.members[-1]
    network.save_merged(tmp_path, fold)
    with safetensors.safe_open(tmp_path / MODEL_FILE, "pt") as file:
        described = json.loads(file.metadata()["timm"])
    assert described["num_classes"] == n_classes
    kwargs = described["kwargs"] | {"num_classes": described["num_classes"]}
    model = timm.create_model(described["architecture"], **kwargs).eval()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / MODEL_FILE), strict=True)
    batch = images(N)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), network(batch, [fold])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", [VIT, CNN], ids=lambda backbone: backbone.name)
def test_peft_loads_a_member_of_five_classes_and_computes_the_same(backbone: Backbone, tmp_path: Path) -> None:
    network = stirred(tiny_network("lora", backbone, n_classes=5))
    network.save_member(tmp_path, 1)
    plain = timm.create_model(backbone.arch, num_classes=5, **backbone.kwargs)
    plain.load_state_dict(backbone_model(backbone).state_dict(), strict=False)  # all but the classifier
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        found, expected = theirs(images(N)), network(images(N), [1])[0]
    assert expected.shape == (N, 5)
    assert expected.std(dim=1).min() > 0.01, "classes must differ in this example"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_merged_file_is_what_full_training_writes(tmp_path: Path) -> None:
    adapted, full = stirred(tiny_network("lora")), tiny_network("full", folds=[1])
    adapted.save_merged(tmp_path, 1)
    full.load_member(tmp_path, 1)
    batch = images(N)
    with torch.no_grad():
        torch.testing.assert_close(full(batch, [1]), adapted(batch, [1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_values_are_saved_as_the_same_bytes(method: Method, tmp_path: Path) -> None:
    network = stirred(tiny_network(method))
    network.save_member(tmp_path / "0", 0)
    for time in range(1, 8):
        network.save_member(tmp_path / str(time), 0)
        for path in (tmp_path / "0").iterdir():
            assert (tmp_path / str(time) / path.name).read_bytes() == path.read_bytes()


FILES = {"lora": "adapter_model.safetensors", "head": HEAD_FILE, "full": MODEL_FILE}


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_or_truncated_file_is_named(method: Method, tmp_path: Path) -> None:
    network = tiny_network(method)
    fold = network.members[0]
    network.save_member(tmp_path, fold)
    path = tmp_path / FILES[method]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=rf"{FILES[method]}: not a whole safetensors file.*[Cc]opy"):
        network.load_member(tmp_path, fold)
    path.unlink()
    with pytest.raises(UserError, match=rf"{FILES[method]}: no such file"):
        network.load_member(tmp_path, fold)


@pytest.mark.parametrize("method", METHODS)
def test_another_networks_file_is_named_and_changes_nothing(method: Method, tmp_path: Path) -> None:
    wider = replace(VIT, kwargs={**VIT.kwargs, "embed_dim": 32})
    tiny_network(method, wider).save_member(tmp_path, 0)
    network = tiny_network(method)
    before = network.values.clone()
    with pytest.raises(UserError, match=FILES[method]):
        network.load_member(tmp_path, 0)
    assert torch.equal(network.values, before)


@pytest.mark.parametrize("method", METHODS)
def test_the_file_of_another_number_of_classes_is_named_and_changes_nothing(method: Method, tmp_path: Path) -> None:
    tiny_network(method).save_member(tmp_path, 0)
    network = tiny_network(method, n_classes=5)
    before = network.values.clone()
    with pytest.raises(UserError, match=r"first: weight, found \(2, 16\), expected \(5, 16\)\).*number of classes"):
        network.load_member(tmp_path, 0)
    assert method == "full" or torch.equal(network.values, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_without_classifier_is_named(method: Method, tmp_path: Path) -> None:
    network = tiny_network(method)
    network.save_member(tmp_path, 0)
    path = tmp_path / FILES[method]
    tensors = safetensors.torch.load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("weight", "bias") and "head." not in name}
    safetensors.torch.save_file(kept, path)
    with pytest.raises(UserError, match=rf"{tmp_path}.*2 tensors are missing.*first: weight"):
        network.load_member(tmp_path, 0)


def test_a_file_with_more_than_a_classifier_is_named(tmp_path: Path) -> None:
    network = tiny_network("head")
    network.save_member(tmp_path, 0)
    more = safetensors.torch.load_file(tmp_path / HEAD_FILE) | {"scale": torch.ones(1)}
    safetensors.torch.save_file(more, tmp_path / HEAD_FILE)
    with pytest.raises(UserError, match=rf"{HEAD_FILE}: 1 tensors.*first: scale"):
        network.load_member(tmp_path, 0)


def test_logits_of_a_single_fold_are_a_linear_layers() -> None:
    network = tiny_network("head")
    with torch.no_grad():
        features = forward_poolings(network.model, VIT, images(N))["cls"]
        expected = F.linear(features, network.weight[2], network.bias[2])
        torch.testing.assert_close(network(images(N), [2])[0], expected)


def test_initial_classifiers_are_uniform_as_a_linear_layers() -> None:
    heads = [tiny_network("head", seed=seed) for seed in range(15)]
    bound = VIT.embedding_dim**-0.5
    for drawn in (
        torch.cat([head.weight.flatten() for head in heads]),
        torch.cat([head.bias.flatten() for head in heads]),
    ):
        n = len(drawn)
        assert drawn.abs().max() <= bound
        # Of uniform numbers: variance bound^2 / 3, with a standard error of bound^2 sqrt((1/5 - 1/9) / n).
        assert abs(drawn.mean().item()) < 5 * bound * (1 / 3 / n) ** 0.5
        assert abs(drawn.var().item() - bound**2 / 3) < 5 * bound**2 * ((1 / 5 - 1 / 9) / n) ** 0.5


def test_classifiers_and_adapters_draw_different_numbers() -> None:
    """Of one seed and fold: both are uniform, so a shared generator would show as a fixed ratio."""
    network = tiny_network("lora")
    adapter = next(module for _, module in adapters(network.model)).A[1].flatten()
    head = network.weight[1].flatten()
    n = min(len(adapter), len(head))
    ratio = adapter[:n] / head[:n]
    assert ratio.std() > 0.1 * ratio.abs().mean()


def test_a_network_that_embeds_otherwise_than_its_record_says_is_refused_before_patches_are_decoded(
    tmp_path: Path,
) -> None:
    weights = fetch_weights(VIT, weights=write_weights(tmp_path / "weights.safetensors"))
    record = replace(find_backbone(MODEL), card_pooling="mean")
    with pytest.raises(UserError, match=r"in another way than by mean pooling"):
        build_network(
            record,
            weights,
            FinetuneOptions(model=MODEL),
            parse_view("full"),
            fold_models=fold_models([42], 1),
            members=[0],
            n_classes=2,
            device=torch.device("cpu"),
        )


@pytest.mark.skipif(openvino.version() is None, reason=f"OpenVINO is not installed: {openvino.INSTALL}")
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_network_gives_each_member_the_logits_of_its_own_weights(method: Method) -> None:
    network = stirred(tiny_network(method, CNN))
    before = logits(network)
    assert not network.freeze(size=32, n_images=100, precision="fp32")  # too few
    assert not network.freeze(size=32, n_images=10_000, precision="bf16")
    assert network.freeze(size=32, n_images=10_000, precision="fp32")
    tolerance = {"rtol": 1e-3, "atol": 1e-3 * float(before.abs().max())}
    torch.testing.assert_close(logits(network), before, **tolerance)
    last = network.members[-1]
    with torch.no_grad():
        alone = network(images(len(network.members) * N)[-N:], [last])
    torch.testing.assert_close(alone, before[-1:], **tolerance)
    if method == "lora":  # or one network would do for all
        assert len({id(frozen) for frozen in network.frozen.values()}) == N_FOLDS
    network(images(len(network.members) * N), network.members, step=0).sum().backward()  # training is not concerned
    assert network.weight.grad is not None


@pytest.mark.skipif(openvino.version() is None, reason=f"OpenVINO is not installed: {openvino.INSTALL}")
def test_transformers_are_not_frozen() -> None:
    assert not tiny_network("lora", VIT).freeze(size=32, n_images=10**9, precision="fp32")
