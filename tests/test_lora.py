"""Do the adapters of all folds train at once as if each fold trained alone, and can others use them?"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from features.console import UserError
from features.folds import fold_models
from finetune.dropout import keep_mask
from finetune.lora import (
    FAMILY_TARGETS,
    TARGETS,
    LoraOptions,
    adapters,
    add_adapters,
    default_targets,
    select_folds,
    trainable,
)
from finetune.weight_files import load_adapter, merge, read_options, save_adapter

N_FOLDS = 3
N = 2  # images per fold
N_CLASSES = 2
OPTIONS = LoraOptions(rank=3, alpha=6, dropout=0.3)

_TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}),
    "register-swiglu": (
        "vit_giant_patch14_reg4_dinov2",
        {"img_size": 28, "depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 4.0, "act_layer": "silu"},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)},
    ),
    "cnn": ("tf_efficientnet_lite0", {}),
}


def tiny(family: str = "vit", *, num_classes: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random network of the family, always with the same backbone."""
    torch.manual_seed(0)
    name, kwargs = _TINY[family]
    model: nn.Module = timm.create_model(name, num_classes=0, **kwargs)
    if num_classes:
        backbone = model.state_dict()
        model = timm.create_model(name, num_classes=num_classes, **kwargs)
        model.load_state_dict(backbone, strict=False)
    return model.to(dtype).eval()


def images(family: str = "vit", *, n: int = N_FOLDS * N, dtype: torch.dtype = torch.float32) -> Tensor:
    size = _TINY[family][1].get("img_size", 32)
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def stir(model: nn.Module) -> None:
    """Give every fold a B of its own, for at zero an adapter does nothing."""
    for layer, (_, module) in enumerate(adapters(model)):
        for fold, own in enumerate(module.B.data):
            own.normal_(std=0.2, generator=torch.Generator().manual_seed(100 * fold + layer))


def with_adapters(
    family: str = "vit", options: LoraOptions = OPTIONS, *, n_folds: int = N_FOLDS, dtype: torch.dtype = torch.float32
) -> nn.Module:
    model = tiny(family, dtype=dtype)
    add_adapters(model, options, fold_models=fold_models([7], n_folds))
    return model


def gradients(model: nn.Module, batch: Tensor, folds: Sequence[int], *, step: int | None) -> list[Tensor]:
    select_folds(model, folds, step=step)
    model.zero_grad()
    outputs = model(batch)
    (outputs * torch.linspace(-1, 1, outputs.shape[1], dtype=batch.dtype)).sum().backward()
    return [parameter.grad.clone() for parameter in trainable(model) if parameter.grad is not None]


# -------------------------------------------------------------------------------------------------------- swapping in


@pytest.mark.parametrize("family", _TINY)
@pytest.mark.parametrize("autocast", [False, True])
def test_step_zero_is_the_frozen_model_to_the_bit(family: str, autocast: bool) -> None:
    model, batch = tiny(family), images(family).to(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        frozen = model(batch)
        add_adapters(model, OPTIONS, fold_models=fold_models([7], N_FOLDS))
        for step in (None, 0):
            select_folds(model, range(N_FOLDS), step=step)
            assert torch.equal(model(batch), frozen)


def test_only_adapters_train_and_the_backbone_is_in_eval_mode() -> None:
    model = with_adapters()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{name}.{factor}" for name, _ in adapters(model) for factor in "AB"}
    assert sum(p.numel() for p in trainable(model)) == N_FOLDS * 2 * 3 * ((32 + 96) + (32 + 32) + 2 * (32 + 128))
    assert not any(module.training for module in model.modules())


def test_initial_values_of_a_fold_do_not_depend_on_how_many_there_are() -> None:
    few, many = with_adapters(n_folds=2), with_adapters(n_folds=5)
    for (_, a), (_, b) in zip(adapters(few), adapters(many), strict=True):
        assert torch.equal(a.A, b.A[:2])
        assert not torch.equal(b.A[0], b.A[1])
        assert a.A.abs().max() <= a.A.shape[2] ** -0.5  # the bound of peft's Kaiming-uniform values
        assert not a.B.any()


@pytest.mark.parametrize(
    ("name", "family", "adapted"),
    [
        ("vit_tiny_patch16_224", "ViT", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
        ("vit_giant_patch14_reg4_dinov2", "ViT", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
        (
            "vit_huge_plus_patch16_dinov3",
            "ViT with an unpacked gated MLP (DINOv3 H+)",
            {"attn.qkv", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"},
        ),
        ("swin_tiny_patch4_window7_224", "Swin", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
        ("convnext_tiny", "ConvNeXt", {"mlp.fc1", "mlp.fc2"}),
        (
            "tf_efficientnet_lite0",
            "EfficientNet: the 1x1 convolutions from the third stage on",
            {"conv_pw", "conv_pwl"},
        ),
        ("tf_efficientnetv2_m", "EfficientNet: the 1x1 convolutions from the third stage on", {"conv_pw", "conv_pwl"}),
        ("resnet50", "ResNet with bottlenecks: the 1x1 convolutions", {"conv1", "conv3"}),
    ],
)
def test_each_family_has_default_targets(name: str, family: str, adapted: set[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    names = add_adapters(model, LoraOptions(), fold_models=fold_models([0], 2))
    assert default_targets(model) == FAMILY_TARGETS[family]
    assert {name for name in adapted if not any(found.endswith(name) for found in names)} == set()
    assert all(found.endswith(tuple(adapted)) for found in names)
    assert not any("patch_embed" in found for found in names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank 0: expected 1 or more"),
        ({"rank": 10**9}, "rank 1000000000: expected at most 1,024"),
        ({"alpha": float("inf")}, "alpha inf: expected a number above 0 and at most 1,000,000"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"dropout": float("nan")}, "dropout nan"),
        ({"alpha": 0}, "alpha 0: expected a number above 0"),
        ({"dropout": 1.0}, "dropout 1.0: expected 0 or more and less than 1"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"targets": "blocks.(qkv"}, "not a regular expression"),
        ({"targets": "qkv"}, r"match no module of this VisionTransformer.*`lora_targets`.*blocks\.1\.attn\.qkv"),
        ({"targets": r"patch_embed\.proj"}, "match patch_embed.proj, which is a 16x16 Conv2d of stride 16"),
        ({"targets": r"blocks\.0"}, "match blocks.0, which is a Block"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_message(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        add_adapters(tiny(), LoraOptions(**options), fold_models=fold_models([0], 2))


def test_a_depthwise_convolution_is_refused() -> None:
    with pytest.raises(UserError, match=r"3x3 Conv2d of stride 1 and 32 group\(s\)"):
        add_adapters(tiny("cnn"), LoraOptions(targets=r"blocks\..*conv_dw"), fold_models=fold_models([0], 2))


def test_a_network_that_reads_the_weights_of_an_adapted_layer_is_refused() -> None:
    model = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=2, num_classes=0)
    add_adapters(model, LoraOptions(), fold_models=fold_models([0], 1))
    with pytest.raises(UserError, match="would never act"):
        model(images(n=1))


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", _TINY)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_of_all_folds_at_once_are_those_of_each_alone(
    family: str, dropout: float, dtype: torch.dtype, tolerance: float
) -> None:
    model = with_adapters(family, LoraOptions(rank=3, alpha=6, dropout=dropout), dtype=dtype)
    stir(model)
    batch = images(family, dtype=dtype)
    together = gradients(model, batch, range(N_FOLDS), step=5)
    for fold in range(N_FOLDS):
        alone = gradients(model, batch[fold * N : (fold + 1) * N], [fold], step=5)
        for ours, own in zip(together, alone, strict=True):
            scale = own[fold].abs().max()
            torch.testing.assert_close(ours[fold] / scale, own[fold] / scale, rtol=0, atol=tolerance)
            assert not own[[other for other in range(N_FOLDS) if other != fold]].any()


def test_a_fold_that_leaves_the_batch_changes_nothing_for_the_others() -> None:
    model = with_adapters(dtype=torch.float64)
    stir(model)
    batch = images(dtype=torch.float64)
    everyone = gradients(model, batch, [0, 1, 2], step=9)
    remaining = gradients(model, torch.cat([batch[4:], batch[:2]]), [2, 0], step=9)
    for before, after in zip(everyone, remaining, strict=True):
        torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=1e-12, atol=1e-12)
        assert not after[1].any()


@pytest.mark.parametrize("family", ["vit", "cnn"])
def test_trajectories_of_all_folds_at_once_are_those_of_each_alone(family: str) -> None:
    def train(folds: Sequence[int]) -> nn.Module:
        model = with_adapters(family, LoraOptions(rank=3, alpha=6, dropout=0.0), dtype=torch.float64)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-3, momentum=0.9)
        batch = images(family, dtype=torch.float64).view(N_FOLDS, N, 3, 32, 32)[list(folds)].flatten(0, 1)
        for step in range(5):
            select_folds(model, folds, step=step)
            optimizer.zero_grad()
            (model(batch) - 1).square().mean(dim=1).sum().backward()
            optimizer.step()
        return model

    together = train(range(N_FOLDS))
    for fold in range(N_FOLDS):
        for (name, ours), (_, own) in zip(adapters(together), adapters(train([fold])), strict=True):
            assert own.B[fold].any(), name
            torch.testing.assert_close(ours.A[fold], own.A[fold], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(ours.B[fold], own.B[fold], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("step", [None, 4])
def test_the_fused_function_has_the_right_gradients(kind: str, step: int | None) -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 4) if kind == "linear" else nn.Conv2d(5, 4, 1)
    model = nn.Sequential(base).double()
    add_adapters(model, LoraOptions(rank=2, dropout=0.4, targets="0"), fold_models=fold_models([0], 2))
    stir(model)
    select_folds(model, [0, 1], step=step)
    x = torch.randn(4, 3, 5) if kind == "linear" else torch.randn(4, 5, 2, 2)

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(("0.A", "0.B"), factors, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x.double().requires_grad_(), *trainable(model)))


def test_bf16_autocast_agrees_with_float32_and_gradients_stay_float32() -> None:
    model = with_adapters()
    stir(model)
    exact = gradients(model, images(), range(N_FOLDS), step=1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(model, images(), range(N_FOLDS), step=1)
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_checkpointed_blocks_draw_the_same_masks_again() -> None:
    model = with_adapters()
    stir(model)
    plain = gradients(model, images(), range(N_FOLDS), step=3)
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    for a, b in zip(plain, gradients(model, images(), range(N_FOLDS), step=3), strict=True):
        assert torch.equal(a, b)


def test_torch_compile_takes_it_whole_and_once_for_all_steps() -> None:
    model = with_adapters()
    stir(model)
    plain = [gradients(model, images(), range(N_FOLDS), step=step) for step in (0, 1, 2)]
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    model.compile(backend=count, fullgraph=True)
    for step in (0, 1, 2):
        for a, b in zip(plain[step], gradients(model, images(), range(N_FOLDS), step=step), strict=True):
            torch.testing.assert_close(a, b)
    assert graphs == 1


def test_the_backward_pass_keeps_one_copy_of_the_input_and_no_mask() -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    add_adapters(model, LoraOptions(rank=2, targets="0"), fold_models=fold_models([0], 2))
    select_folds(model, [0, 1], step=0)
    x = torch.zeros(8, 10, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for place, size in kept.items() if place not in parameters)
    # The input, its rank-wide projection, two seeds, and the number of the layer.
    assert activations <= x.nbytes + 8 * 10 * 2 * 4 + 2 * 8 + 8


def test_a_batch_that_the_folds_cannot_share_is_refused() -> None:
    model = with_adapters()
    with pytest.raises(ValueError, match="7 images cannot hold equally many of 3 folds"):
        model(images(n=7))


# ------------------------------------------------------------------------------------------------------------ dropout


def test_a_mask_follows_from_fold_layer_and_step_alone() -> None:
    def masks(like: Tensor, keys: list[int], layer: int) -> Tensor:
        return keep_mask(like, torch.tensor(keys), layer=layer, threshold=77)

    both = masks(torch.empty(2, 30, 20), [3, 4], 1)
    assert torch.equal(masks(torch.empty(1, 30, 20), [4], 1)[0], both[1])
    assert torch.equal(masks(torch.empty(2, 30, 20, dtype=torch.bfloat16), [3, 4], 1).float(), both)
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(masks(torch.empty(2, 30, 20), [3, 4], 2), both)
    model = with_adapters()
    seen = set()
    for step in (0, 1, 0):
        select_folds(model, [0, 2], step=step)
        seen.add(tuple(next(adapters(model))[1].selection.keys.tolist()))
    assert len(seen) == 2


def test_dropout_acts_in_training_only() -> None:
    model = with_adapters()
    stir(model)
    outputs = []
    for step in (None, None, 0, 1):
        select_folds(model, range(N_FOLDS), step=step)
        outputs.append(model(images()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[2], outputs[3])


# --------------------------------------------------------------------------------------------------- saving, merging


@pytest.mark.parametrize("family", _TINY)
def test_merged_weights_compute_what_the_adapters_do(family: str) -> None:
    model = with_adapters(family, dtype=torch.float64)
    stir(model)
    batch = images(family, n=N, dtype=torch.float64)
    for fold in range(N_FOLDS):
        select_folds(model, [fold])
        plain = tiny(family, dtype=torch.float64)
        plain.load_state_dict(merge(model, fold))
        torch.testing.assert_close(plain(batch), model(batch), rtol=1e-10, atol=1e-10)


def head_of(n_features: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "weight": torch.randn(N_CLASSES, n_features, generator=generator),
        "bias": torch.randn(N_CLASSES, generator=generator),
    }


@pytest.fixture(scope="module")
def peft() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what peft imports
        return pytest.importorskip("peft", reason="peft, the reference for adapter files, is not installed")


@pytest.mark.parametrize("family", _TINY)
def test_peft_loads_a_saved_adapter_and_computes_the_same(family: str, peft: ModuleType, tmp_path: Path) -> None:
    model = with_adapters(family)
    stir(model)
    head = head_of(model.num_features)
    save_adapter(model, tmp_path / "fold-1", fold=1, head=head, base_model="tiny")
    select_folds(model, [1])
    theirs = peft.PeftModel.from_pretrained(tiny(family, num_classes=N_CLASSES), str(tmp_path / "fold-1")).eval()
    batch = images(family, n=N)
    with torch.no_grad():
        ours = model(batch) @ head["weight"].T + head["bias"]
        # Fifty random convolutions amplify the last bit.
        assert (theirs(batch) - ours).abs().max() < (1e-5 * ours.abs().max() if family == "cnn" else 1e-6)


@pytest.mark.parametrize("family", _TINY)
@pytest.mark.parametrize("as_list", [False, True])
def test_an_adapter_trained_by_peft_loads_here(family: str, as_list: bool, peft: ModuleType, tmp_path: Path) -> None:
    plain = tiny(family, num_classes=N_CLASSES)
    targets: Any = default_targets(plain)
    if as_list:
        targets = ["conv_pwl"] if family == "cnn" else ["qkv", "fc2"]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, modules_to_save=[plain.pretrained_cfg["classifier"]]
    )
    theirs = peft.get_peft_model(plain, config)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    batch = images(family, n=N)
    for _ in range(2):
        optimizer.zero_grad()
        theirs(batch).square().sum().backward()
        optimizer.step()
    theirs.save_pretrained(str(tmp_path))
    model = tiny(family)
    add_adapters(model, read_options(tmp_path), fold_models=fold_models([0], 2))
    head = load_adapter(model, tmp_path, fold=1)
    select_folds(model, [1])
    with torch.no_grad():
        ours = model(batch) @ head["weight"].T + head["bias"]
        expected = theirs.eval()(batch)
    assert (expected - ours).abs().max() < 1e-5 * max(1, ours.abs().max())


def saved(folder: Path, *, options: LoraOptions = OPTIONS) -> nn.Module:
    model = with_adapters(options=options)
    stir(model)
    save_adapter(model, folder, fold=2, head=head_of(32), base_model="tiny")
    return model


def test_a_saved_adapter_is_in_pefts_own_format(tmp_path: Path) -> None:
    saved(tmp_path)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert shapes["base_model.model.blocks.1.attn.qkv.lora_A.weight"] == [3, 32]
    assert shapes["base_model.model.blocks.1.attn.qkv.lora_B.weight"] == [96, 3]
    assert shapes["base_model.model.head.weight"] == [2, 32]
    assert shapes["base_model.model.head.bias"] == [2]
    assert len(shapes) == 2 * 4 * 2 + 2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == TARGETS
    assert config["modules_to_save"] == ["head"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "ordinary").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "ordinary").stat().st_mode}


def test_an_adapter_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    model, fresh = saved(tmp_path), with_adapters()
    head = load_adapter(fresh, tmp_path, fold=0)
    assert read_options(tmp_path) == LoraOptions(rank=3, alpha=6, dropout=0.3, targets=TARGETS)
    assert all(torch.equal(tensor, head_of(32)[name]) for name, tensor in head.items())
    for (_, a), (_, b) in zip(adapters(model), adapters(fresh), strict=True):
        assert torch.equal(a.A[2], b.A[0])
        assert torch.equal(a.B[2], b.B[0])
        assert not b.B[1:].any()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _without(path: Path, key: str) -> None:
    tensors = safetensors.torch.load_file(path)
    del tensors[key]
    safetensors.torch.save_file(tensors, path)


def _set(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json: no such file"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors: no such file"),
        (lambda f: _truncate(f / "adapter_model.safetensors"), "not a whole safetensors file"),
        (lambda f: _truncate(f / "adapter_config.json"), "not the configuration of a LoRA adapter"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "not the configuration of a LoRA adapter"),
        (lambda f: _set(f / "adapter_config.json", r="three"), "not the configuration of a LoRA adapter"),
        (lambda f: _set(f / "adapter_config.json", use_dora=True), "found peft_type = LORA, use_dora = True. Expected"),
        (lambda f: _set(f / "adapter_config.json", peft_type="IA3"), "found peft_type = IA3"),
        (lambda f: _set(f / "adapter_config.json", r=4), "found rank 4 and alpha 6, expected rank 3 and alpha 6"),
        (lambda f: _set(f / "adapter_config.json", lora_alpha=3), "found rank 3 and alpha 3"),
        (
            lambda f: _without(f / "adapter_model.safetensors", "base_model.model.blocks.0.attn.qkv.lora_A.weight"),
            r"1 tensors are missing.*blocks\.0\.attn\.qkv\.lora_A\.weight, found none, expected \(3, 32\)",
        ),
    ],
)
def test_a_damaged_or_foreign_adapter_is_refused_in_one_message(spoil: Any, said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=said) as refusal:
        load_adapter(with_adapters(), tmp_path, fold=0)
    assert str(tmp_path) in str(refusal.value)


def test_an_adapter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    wider = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=64, num_heads=2, num_classes=0)
    add_adapters(wider, OPTIONS, fold_models=fold_models([0], 1))
    with pytest.raises(UserError, match=r"lora_A\.weight, found \(3, 32\), expected \(3, 64\)"):
        load_adapter(wider, tmp_path, fold=0)
    swin = with_adapters("swin")
    with pytest.raises(UserError, match=r"are missing, unknown or of another shape \(first: .*layers\.0"):
        load_adapter(swin, tmp_path, fold=0)


# ------------------------------------------------------------------------------------------ written out, on average

# Neither the usual scale of 2 nor a dropout that is a whole number of 256ths.
UNUSUAL = LoraOptions(rank=4, alpha=5, dropout=0.4, targets="0")


def one_layer(options: LoraOptions = UNUSUAL, *, n_folds: int = 2, seed: int = 7) -> nn.Module:
    """A single linear layer with adapters whose factors are drawn; float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 6)).double()
    add_adapters(model, options, fold_models=fold_models([seed], n_folds))
    stir(model)
    return model


def test_an_adapter_adds_alpha_over_rank_times_its_product() -> None:
    model = one_layer()
    x = torch.randn(2 * N, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    select_folds(model, [0, 1])
    weights = model.state_dict()
    for fold, (own, found) in enumerate(zip(x.chunk(2), model(x).chunk(2), strict=True)):
        frozen = own @ weights["0.base.weight"].T + weights["0.base.bias"]
        expected = frozen + 5 / 4 * own @ weights["0.A"][fold].T @ weights["0.B"][fold].T
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_dropout_changes_neither_the_mean_output_nor_the_mean_gradient() -> None:
    model = one_layer()
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(2 * N, 24, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(2 * N, 6, generator=generator, dtype=torch.float64)

    def pass_of(step: int | None) -> dict[str, Tensor]:
        select_folds(model, [0, 1], step=step)
        output = model(given)
        wanted = (given, *trainable(model))
        found = torch.autograd.grad((output * weights).sum(), wanted)
        return dict(zip(("output", "x", "A", "B"), (output.detach(), *found), strict=True))

    expected = pass_of(None)
    steps = [pass_of(step) for step in range(400)]
    for name, exact in expected.items():
        each = torch.stack([step[name] for step in steps])
        error = each.std(dim=0) / len(steps) ** 0.5
        assert error.min() > 0, f"{name} is not random"
        # All of some 300 numbers lie within five standard errors with a probability of 0.9998; without the factor
        # 1 / (1 - p) many would be ten and more away.
        assert ((each.mean(dim=0) - exact).abs() < 5 * error).all(), name


def test_what_is_dropped_follows_from_fold_and_seed() -> None:
    model, other = one_layer(), one_layer(seed=8)
    same = torch.randn(N, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64).repeat(2, 1)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter[1] = parameter[0]
        for ours, theirs in zip(trainable(model), trainable(other), strict=True):
            theirs.copy_(ours)
        outputs = {}
        for step in (None, 3):
            for name, each in (("seed 7", model), ("seed 8", other)):
                select_folds(each, [0, 1], step=step)
                outputs[step, name] = each(same).chunk(2)
    for name in ("seed 7", "seed 8"):
        torch.testing.assert_close(*outputs[None, name])
        assert not torch.allclose(*outputs[3, name]), "two folds have dropped the same"
    for one, two in zip(outputs[3, "seed 7"], outputs[3, "seed 8"], strict=True):
        assert not torch.allclose(one, two), "two seeds have dropped the same"


@pytest.mark.parametrize("dropout", [0.1, 0.4, 0.75])
def test_a_layer_drops_the_share_of_its_inputs_that_was_asked_for(dropout: float) -> None:
    model = nn.Sequential(nn.Linear(40, 40, bias=False)).double()
    add_adapters(model, LoraOptions(rank=40, alpha=40, dropout=dropout, targets="0"), fold_models=fold_models([7], 2))
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(torch.eye(40).expand_as(parameter))
        model[0].base.weight.zero_()  # then an output is its input: dropped, or enlarged
        select_folds(model, [0, 1], step=3)
        found = model(torch.ones(200, 40, dtype=torch.float64))
    n = found.numel()
    deviation = (dropout * (1 - dropout) / n) ** 0.5
    assert abs((found == 0).double().mean().item() - dropout) < 5 * deviation + 1 / 512  # honoured to 1/256
    kept = found[found != 0]
    torch.testing.assert_close(kept, kept[:1].expand_as(kept))
    assert kept[0].item() == pytest.approx(1 / (1 - dropout), rel=0.01)


def test_two_layers_drop_different_inputs() -> None:
    torch.manual_seed(0)
    first = nn.Linear(24, 6)
    model = nn.Sequential(first, copy.deepcopy(first)).double()
    add_adapters(model, LoraOptions(rank=4, alpha=5, dropout=0.4, targets=r"\d"), fold_models=fold_models([7], 1))
    stir(model)
    x = torch.randn(N, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(trainable(model)[:2], trainable(model)[2:], strict=True):
            theirs.copy_(ours)
        select_folds(model, [0])
        torch.testing.assert_close(model[0](x), model[1](x))
        select_folds(model, [0], step=3)
        assert not torch.allclose(model[0](x), model[1](x))


def test_dropping_nearly_everything_leaves_numbers_finite() -> None:
    model = one_layer(LoraOptions(rank=2, alpha=5, dropout=0.999, targets="0"))
    select_folds(model, [0, 1], step=0)
    assert torch.isfinite(model(torch.ones(2, 24, dtype=torch.float64))).all()


def test_initial_factors_are_uniform_as_those_of_a_linear_layer_and_differ_between_layers() -> None:
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400))
    add_adapters(model, LoraOptions(rank=16, targets=r"\d"), fold_models=fold_models([0], 2))
    first, second = (module.A for _, module in adapters(model))
    for drawn in (*first, *second):
        bound = 400**-0.5  # variance bound^2 / 3, with a standard error of bound^2 sqrt((1/5 - 1/9) / n)
        assert abs(drawn.var().item() - bound**2 / 3) < 5 * bound**2 * ((1 / 5 - 1 / 9) / drawn.numel()) ** 0.5
        assert abs(drawn.mean().item()) < 5 * bound * (1 / 3 / drawn.numel()) ** 0.5
    assert not torch.isclose(first, second).all(dim=2).any()


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 8, 1, stride=2),
        nn.Conv2d(4, 8, 1, stride=(1, 2)),
        nn.Conv2d(4, 8, 1, groups=2),
        nn.Conv2d(4, 8, 1, padding=1),
        nn.Conv2d(4, 8, (1, 3), padding="same"),
    ],
    ids=["stride", "one stride", "groups", "padding", "kernel"],
)
def test_convolutions_that_are_no_linear_layer_are_refused(convolution: nn.Conv2d) -> None:
    with pytest.raises(UserError, match=r"match 0, which is a"):
        add_adapters(nn.Sequential(convolution), LoraOptions(targets="0"), fold_models=fold_models([0], 1))


@pytest.mark.parametrize("options", [LoraOptions(4, 5, 0.1), LoraOptions(3, 3, 0.25), LoraOptions(2, 64, 0.0)])
def test_the_merged_weights_follow_from_the_files_of_an_adapter(options: LoraOptions, tmp_path: Path) -> None:
    model, plain = with_adapters(options=options), tiny()
    stir(model)
    save_adapter(model, tmp_path, fold=1, head=head_of(32), base_model="tiny")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (options.rank, options.alpha, options.dropout)
    assert config["base_model_name_or_path"] == "tiny"
    assert (config["peft_type"], config["bias"], config["fan_in_fan_out"]) == ("LORA", "none", False)
    factors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    merged = merge(model, 1)
    assert merged.keys() == plain.state_dict().keys()
    n_changed = 0
    for name, tensor in plain.state_dict().items():
        A, B = (factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{each}.weight") for each in "AB")
        if A is None or B is None:
            assert torch.equal(merged[name], tensor), name
            continue
        n_changed += 1
        expected = tensor.double() + config["lora_alpha"] / config["r"] * B.double() @ A.double()
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert n_changed == 8


@pytest.mark.parametrize("options", [LoraOptions(4, 5, 0.1), LoraOptions(3, 3, 0.25)])
def test_peft_scales_an_adapter_as_it_was_trained(options: LoraOptions, peft: ModuleType, tmp_path: Path) -> None:
    model = with_adapters(options=options)
    stir(model)
    head = head_of(model.num_features)
    save_adapter(model, tmp_path, fold=2, head=head, base_model="tiny")
    select_folds(model, [2])
    theirs = peft.PeftModel.from_pretrained(tiny(num_classes=N_CLASSES), str(tmp_path)).eval()
    with torch.no_grad():
        ours = model(images(n=N)) @ head["weight"].T + head["bias"]
        torch.testing.assert_close(theirs(images(n=N)), ours, rtol=1e-4, atol=1e-5)


def test_a_list_of_targets_means_last_parts_of_names_as_in_peft(tmp_path: Path) -> None:
    saved(tmp_path)
    _set(tmp_path / "adapter_config.json", target_modules=["qkv", "attn.proj"])
    model = tiny()
    model.blocks[0].attn.own_qkv = nn.Linear(3, 3)  # ends in qkv, but its last part is another
    names = add_adapters(model, read_options(tmp_path), fold_models=fold_models([0], 1))
    assert set(names) == {f"blocks.{block}.attn.{name}" for block in (0, 1) for name in ("qkv", "proj")}
