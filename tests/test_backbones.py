"""Is every record the model its card describes, and does a checkpoint load exactly or not at all?"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm.layers
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from extract import hub
from extract.backbones import (
    BACKBONES,
    Backbone,
    Weights,
    build_model,
    check_forward,
    check_input_size,
    fetch_weights,
    find_backbone,
    list_models,
)
from extract.checkpoints import read_checkpoint
from extract.keymaps import KEYMAPS
from extract.pooling import center_window, forward_poolings, middle_stages, pooling_widths
from features.console import UserError

FACTS = json.loads((Path(__file__).parent / "data" / "foundation_models.json").read_text())
DOC = Path(__file__).resolve().parent.parent / "docs" / "models.md"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_SWIN = {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
TINY = Backbone(
    name="tiny",
    title="a stand-in",
    hub_id="org/tiny",
    arch="vit_tiny_patch16_224",
    kwargs=SMALL,
    input_size=32,
    resize=32,
    n_parameters=0,
    embedding_dim=32,
    gflops=None,
    licence="",
)


def tiny(**changes: Any) -> Backbone:
    kwargs = {**SMALL, **changes.pop("kwargs", {})}
    return replace(TINY, kwargs=kwargs, **changes)


def saved(content: Any, path: Path) -> Weights:
    if isinstance(content, nn.Module):
        content = {name: tensor.contiguous() for name, tensor in content.state_dict().items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return Weights(path, "", "local", "file")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------- the records


@pytest.mark.parametrize("name", BACKBONES)
def test_record_is_the_model_of_its_card(name: str) -> None:
    record = BACKBONES[name]
    with torch.device("meta"):
        model = build_model(record, None)
        features = model.forward_features(torch.empty(1, 3, record.input_size, record.input_size))
    widths = pooling_widths(model, record)
    assert set(widths) <= set(record.possible_poolings)
    measured = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "embedding": sum(widths[pooling] for pooling in record.card_pooling.split("+")),
        "features": list(features.shape),
        "gflops": record.gflops,
    }
    assert (record.n_parameters, record.embedding_dim) == (measured["parameters"], measured["embedding"])
    if not record.package:
        assert measured == FACTS[name]


def test_the_mandatory_models_and_the_baselines_are_registered() -> None:
    names = "uni uni2-h virchow virchow2 prov-gigapath h-optimus-0 h-optimus-1 h0-mini"
    assert set(f"{names} efficientnetv2-m vit-l swin-b efficientnet-lite0".split()) <= BACKBONES.keys()
    assert {name for name, record in BACKBONES.items() if record.hub_id} == FACTS.keys()
    assert all(len(BACKBONES[name].revision) == 40 and BACKBONES[name].sha256 for name in names.split())


def test_records_are_json_so_that_a_fingerprint_can_hold_them() -> None:
    for record in BACKBONES.values():
        assert json.loads(json.dumps(record.kwargs)) == record.kwargs
        assert record.layout in KEYMAPS


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean virchow2 or virchow"):
        find_backbone("virchov2")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        *((name, "Did you mean uni?") for name in ("UNI", "MahmoodLab/UNI", "mahmoodlab/uni", "Uni")),
        *((f"{page}/MahmoodLab/UNI{end}", "Did you mean uni?") for page in ("https://huggingface.co", "http://hf.mirror")
          for end in ("", "/", "/tree/main", "/blob/main/pytorch_model.bin")),
        *((name, "Did you mean h-optimus-1?") for name in ("H-optimus-1", "bioptimus/H-optimus-1", "h_optimus_1")),
        *((name, "Did you mean uni2-h?") for name in ("uni2h", "UNI2-h", "UNI2_h")),
        ("Virchow2", "Did you mean virchow2?"),
        ("hf_hub:paige-ai/Virchow2", "Did you mean virchow2?"),
        ("ResNet50", "Did you mean resnet50?"),
        ("resnet50d", "Did you mean timm/resnet50d?"),
        ("vit_base_patch16_224", "Did you mean timm/vit_base_patch16_224?"),
        ("vit_base_patch16_224.augreg_in1k", "Did you mean timm/vit_base_patch16_224.augreg_in1k?"),
        ("EfficientNet-B0", "Did you mean timm/efficientnet_b0?"),
        ("org/repo", "For a repository of the hub write hf-hub:org/repo."),
        ("https://huggingface.co/org/repo", "For a repository of the hub write hf-hub:org/repo."),
        ("weights/mine.pth", "A file of weights is passed as `weights`"),
    ],
)  # fmt: skip
def test_what_people_write_for_a_model_is_understood(name: str, suggestion: str) -> None:
    with pytest.raises(UserError) as caught:
        find_backbone(name)
    assert f"unknown model '{name}'. {suggestion}" in str(caught.value)


# ---------------------------------------------------------------------------------------------------- any other model


def test_a_timm_name_takes_its_preprocessing_from_timm() -> None:
    record = find_backbone("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert record.hub_id == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert (record.mean, record.input_size, record.resize, record.card_pooling) == ((0.5, 0.5, 0.5), 224, 248, "cls")
    assert (record.embedding_dim, record.revision, record.kwargs) == (192, "main", {"img_size": 224})
    assert find_backbone("timm/mobilenetv3_small_050").embedding_dim == 1024  # pooled by a head wider than its map


def test_unknown_timm_names_and_tags() -> None:
    with pytest.raises(UserError, match="has no model 'vit_tiny_patch16_225'"):
        find_backbone("timm/vit_tiny_patch16_225")
    with pytest.raises(UserError, match=r"There are timm/resnet50\.\w+"):
        find_backbone("timm/resnet50.nonesuch")


def serve(monkeypatch: pytest.MonkeyPatch, path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config))
    monkeypatch.setattr(hub, "fetch_file", lambda *args, **kwargs: hub.HubFile(path, "c" * 40))


def test_a_hub_repository_is_built_from_its_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "model_args": {**SMALL, "num_classes": 7, "global_pool": "avg"},
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "crop_pct": 0.5, "license": "mit"},
    }
    serve(monkeypatch, tmp_path / "config.json", config)
    record = find_backbone("hf-hub:org/repo")
    assert (record.mean, record.resize, record.revision, record.licence) == ((0.1, 0.2, 0.3), 64, "c" * 40, "mit")
    assert (record.embedding_dim, record.card_pooling) == (32, "mean")


def test_a_registered_repository_keeps_its_record() -> None:
    record = find_backbone("hf-hub:paige-ai/Virchow2")
    assert replace(record, name="virchow2") == BACKBONES["virchow2"]
    moved = find_backbone("hf-hub:paige-ai/Virchow2@main")
    assert (moved.revision, moved.sha256, moved.kwargs) == ("main", None, record.kwargs)


@pytest.mark.parametrize("config", [{"architectures": ["BertModel"]}, {"architecture": "made_up"}])
def test_a_repository_that_is_no_timm_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, Any]
) -> None:
    serve(monkeypatch, tmp_path / "config.json", config)
    with pytest.raises(UserError, match=r"org/repo (is not a timm model|asks for the architecture 'made_up')"):
        find_backbone("hf-hub:org/repo")
    with pytest.raises(UserError, match="not of the form"):
        find_backbone("hf-hub:repo")


# ----------------------------------------------------------------------------------------------------- strict loading


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth"])
@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_weights_survive_saving_and_loading(tmp_path: Path, suffix: str, arch: str) -> None:
    record = tiny(arch=arch)
    model = build_model(record, None)
    loaded = build_model(record, saved(model, tmp_path / f"weights{suffix}"))
    torch.testing.assert_close(loaded.forward_features(images()), model.forward_features(images()), rtol=0, atol=0)
    assert not loaded.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())


def test_layer_scale_in_the_file_is_never_dropped(file: Path) -> None:
    weights = saved(build_model(tiny(kwargs={"init_values": 1e-5}), None), file)
    with pytest.raises(UserError, match=r"4 are unknown to it \(first: blocks.0.ls1.gamma\).*init_values"):
        build_model(TINY, weights)
    with pytest.raises(UserError, match=r"missing \(first: blocks.0.ls1.gamma\).*must not set init_values"):
        build_model(tiny(kwargs={"init_values": 1e-5}), saved(build_model(TINY, None), file))


def test_a_gated_mlp_without_silu_is_refused(file: Path) -> None:
    swiglu = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": 5.0}
    weights = saved(build_model(tiny(kwargs=swiglu), None), file)
    build_model(tiny(kwargs=swiglu), weights)
    with pytest.raises(UserError, match="GELU instead of SiLU"):
        build_model(tiny(kwargs={"mlp_layer": "SwiGLUPacked", "mlp_ratio": 5.0}), weights)
    with pytest.raises(UserError, match=r"another shape.*gated MLP"):
        build_model(tiny(kwargs={"mlp_ratio": 5.0}), weights)


def test_average_pooling_does_not_move_the_norm_unseen(file: Path) -> None:
    with pytest.raises(UserError, match=r"fc_norm.*global_pool='token'"):
        build_model(tiny(kwargs={"global_pool": "avg"}), saved(build_model(TINY, None), file))


@pytest.mark.parametrize("layout", ["timm", "timm-hub"])
def test_positions_of_another_size_are_resampled_only_on_record(file: Path, layout: str) -> None:
    larger = build_model(tiny(kwargs={"img_size": 48}), None)
    weights = saved(larger, file)
    with pytest.raises(UserError, match=r"pos_embed, \(1, 37, 32\) in the file, \(1, 17, 32\).*resample_pos_embed"):
        build_model(tiny(layout=layout), weights)
    loaded = build_model(tiny(layout=layout, resample_pos_embed=True), weights)
    expected = timm.layers.resample_abs_pos_embed(larger.pos_embed, new_size=[4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(loaded.pos_embed, expected)


def test_a_classifier_is_dropped_by_its_exact_name_only(file: Path) -> None:
    state = build_model(TINY, None).state_dict()
    head = {"head.weight": torch.zeros(7, 32), "head.bias": torch.zeros(7)}
    build_model(TINY, saved(state | head, file))
    with pytest.raises(UserError, match=r"1 are unknown to it \(first: head.norm.weight\)"):
        build_model(TINY, saved(state | head | {"head.norm.weight": torch.zeros(32)}, file))


def test_weights_of_another_model_say_so(file: Path) -> None:
    with pytest.raises(UserError, match=r"weights\.safetensors: .* do not fit tiny .*Likely a file of another model"):
        build_model(TINY, saved({"conv1.weight": torch.zeros(3)}, file))


def test_older_swin_names_load(file: Path) -> None:
    record = replace(TINY, arch="swin_tiny_patch4_window7_224", kwargs=SMALL_SWIN, layout="timm-hub")
    model = build_model(record, None)
    older = {name.replace("layers.1.downsample", "layers.0.downsample"): t for name, t in model.state_dict().items()}
    assert older.keys() != model.state_dict().keys()
    loaded = build_model(record, saved({**older, "head.weight": torch.zeros(7, 24), "head.bias": torch.zeros(7)}, file))
    torch.testing.assert_close(loaded(images(size=56)), model(images(size=56)), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- other input sizes


def test_dynamic_models_take_other_sizes_and_leave_their_own_unchanged(file: Path) -> None:
    model = build_model(TINY, None)
    dynamic = build_model(TINY, saved(model, file), dynamic=True)
    torch.testing.assert_close(dynamic.forward_features(images()), model.forward_features(images()), rtol=0, atol=0)
    assert forward_poolings(dynamic, TINY, images(size=48))["center"].shape == (2, 32)
    with pytest.raises(UserError, match=r"44 px is not a multiple of its 8 px patches\. Use 40 or 48"):
        check_input_size(dynamic, TINY, 44)
    check_input_size(dynamic, TINY, 48)


@pytest.mark.parametrize("name", ["dinov3-s", "swin-b", "resnet50", "h-optimus-0", "efficientnet-lite0"])
def test_registered_families_have_a_dynamic_form(name: str) -> None:
    record, size = BACKBONES[name], 154 if name == "h-optimus-0" else 160
    with torch.device("meta"):
        model = build_model(record, None, dynamic=True)
        check_input_size(model, record, size)
        embedding = forward_poolings(model, record, torch.empty(1, 3, size, size))
    assert {pooling: tensor.shape[1] for pooling, tensor in embedding.items()} == pooling_widths(model, record)


def test_an_architecture_of_one_size_refuses_others() -> None:
    record = replace(TINY, arch="beit_base_patch16_224", kwargs={"depth": 1}, input_size=224)
    with torch.device("meta"), pytest.raises(UserError, match="takes 224 px images only"):
        build_model(record, None, dynamic=True)


# ---------------------------------------------------------------------------------------------------------- poolings


def test_center_window_leaves_out_thirty_percent_on_either_side() -> None:
    assert [center_window(grid) for grid in (16, 14, 7)] == [slice(5, 11), slice(4, 10), slice(2, 5)]
    assert all(len(range(grid)[center_window(grid)]) > 0 for grid in range(1, 65))


@pytest.mark.parametrize(("registers", "prefix"), [(0, 1), (4, 5), (8, 9)])
def test_vit_poolings_leave_class_and_register_tokens_out(registers: int, prefix: int) -> None:
    record = tiny(kwargs={"reg_tokens": registers, "img_size": 56})
    model = build_model(record, None)
    tokens = model.forward_features(images(size=56))
    grid = [[tokens[:, prefix + 7 * row + column] for column in range(7)] for row in range(7)]
    pooled = forward_poolings(model, record, images(size=56))
    assert list(pooled) == list(pooling_widths(model, record)) == ["cls", "mean", "center"]
    torch.testing.assert_close(pooled["cls"], tokens[:, 0])
    torch.testing.assert_close(pooled["mean"], torch.stack([cell for row in grid for cell in row]).mean(0))
    torch.testing.assert_close(
        pooled["center"], torch.stack([grid[r][c] for r in (2, 3, 4) for c in (2, 3, 4)]).mean(0)
    )


def test_average_pooled_vits_have_their_norm_behind_the_pooling() -> None:
    record = tiny(kwargs={"global_pool": "avg"}, card_pooling="mean")
    model = build_model(record, None)
    nn.init.normal_(model.fc_norm.weight)
    torch.testing.assert_close(forward_poolings(model, record, images())["mean"], model(images()))


@pytest.mark.parametrize(
    ("arch", "kwargs", "channels_last"),
    [
        ("swin_tiny_patch4_window7_224", SMALL_SWIN, True),
        ("resnet10t", {}, False),
        ("mobilenetv3_small_050", {}, False),
    ],
)
def test_map_poolings(arch: str, kwargs: dict[str, Any], channels_last: bool) -> None:
    record = replace(TINY, arch=arch, kwargs=kwargs, card_pooling="pooled")
    model = build_model(record, None)
    patches = images(size=56 if channels_last else 96)
    maps = model.forward_features(patches)
    maps = maps if channels_last else maps.permute(0, 2, 3, 1)
    pooled = forward_poolings(model, record, patches)
    assert {name: value.shape[1] for name, value in pooled.items()} == pooling_widths(model, record)
    torch.testing.assert_close(pooled["pooled"], model(patches))
    central = maps[:, 2:5, 2:5] if channels_last else maps[:, 1:2, 1:2]  # of 7 x 7, of 3 x 3
    torch.testing.assert_close(pooled["center"], central.mean((1, 2)))


def test_embeddings_are_single_precision_under_autocast() -> None:
    model = build_model(TINY, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {value.dtype for value in forward_poolings(model, TINY, images()).values()} == {torch.float32}


def test_a_distilled_transformer_is_pooled_as_timm_does() -> None:
    record = find_backbone("timm/deit_tiny_distilled_patch16_224.fb_in1k")
    assert record.card_pooling == "pooled"
    model = build_model(replace(record, kwargs=SMALL), None)
    pooled = forward_poolings(model, record, images())
    torch.testing.assert_close(pooled["pooled"], model.forward_features(images())[:, :2].mean(1))
    assert list(pooled) == ["pooled", "cls", "mean", "center"]


def test_a_network_that_cannot_be_pooled_is_refused_by_its_name() -> None:
    for name, found in (("coat_tiny.in1k", "a list of several"), ("crossvit_tiny_240.in1k", "a list of several"),
                        ("levit_128.fb_dist_in1k", "neither a square grid")):  # fmt: skip
        with pytest.raises(UserError, match=rf"timm/{name}: \w+ returns features .*{found}.*Take another model"):
            find_backbone(f"timm/{name}")


def test_a_patch_size_may_be_one_number() -> None:
    assert find_backbone("timm/efficientvit_m0.r224_in1k").card_pooling == "pooled"


def test_one_image_is_enough_for_a_network_with_batch_norms_of_single_cells() -> None:
    assert find_backbone("timm/resnest14d.gluon_in1k").embedding_dim == 2048


def test_an_image_goes_through_before_patches_are_read() -> None:
    model = build_model(TINY, None)
    check_forward(model, TINY, 32)
    with pytest.raises(
        UserError, match=r"tiny: .*cannot embed an image of 40 px \(AssertionError.*its own 32 px, or take"
    ):
        check_forward(model, TINY, 40)
    with pytest.raises(UserError, match=r"40 px is not a multiple|44 px is not a multiple"):
        check_forward(model, TINY, 44)
    with pytest.raises(UserError, match=r"\(1, 32\), in another way than by mean pooling"):
        check_forward(model, replace(TINY, card_pooling="mean"), 32)
    check_forward(model, replace(TINY, card_pooling="mean", hub_id="MahmoodLab/UNI"), 32)  # a card may differ from timm
    model.forward_features = None
    with pytest.raises(UserError, match=r"cannot embed an image of 32 px \(TypeError.*\)\. Take another model"):
        check_forward(model, TINY, 32)


def test_a_model_of_unknown_output_is_refused() -> None:
    record = replace(TINY, arch="mixer_s32_224", kwargs={}, input_size=224)
    with torch.device("meta"), pytest.raises(UserError, match="neither a square grid"):
        forward_poolings(build_model(record, None), record, torch.empty(1, 3, 224, 224))


# -------------------------------------------------------------------------------------------------- the key maps


def as_hub_files(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Today's names of transformers, back to those of the files on the hub."""
    older = {}
    for name, tensor in state.items():
        for part, projection in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            name = name.replace(f".attention.{projection}.", f".attention.attention.{part}.")
        name = name.replace(".attention.o_proj.", ".attention.output.dense.")
        if name.startswith("layers."):  # ViTModel
            name = f"encoder.layer{name.removeprefix('layers')}"
            name = name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        older[name.replace(".mlp.down_proj.", ".mlp.weights_out.")] = tensor
    for name in [name for name in older if ".mlp.gate_proj." in name]:
        joined = torch.cat([older.pop(name), older.pop(name.replace("gate_proj", "up_proj"))])
        older[name.replace("gate_proj", "weights_in")] = joined
    return older


@pytest.mark.parametrize("names", ["new", "older", "prefixed"])
@pytest.mark.parametrize(
    ("kind", "swiglu"),
    [("ViT", False), *((kind, gated) for kind in ("Dinov2", "Dinov2WithRegisters") for gated in (False, True))],
)
def test_hugging_face_layouts_compute_the_same(file: Path, kind: str, swiglu: bool, names: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference for the key maps")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    extra = {"intermediate_size": 128, "layer_norm_eps": 1e-6} if kind == "ViT" else {"use_swiglu_ffn": swiglu}
    config = getattr(transformers, f"{kind}Config")(**shape, **extra)
    reference = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    if names != "new":
        state = as_hub_files(state)
    if names == "prefixed":
        prefix = {"ViT": "vit.", "Dinov2": "dinov2.", "Dinov2WithRegisters": "dinov2_with_registers."}[kind]
        state = {prefix + name: tensor for name, tensor in state.items()}

    kwargs: dict[str, Any] = {} if kind == "ViT" else {"init_values": 1e-5}
    if swiglu:
        hidden = next(
            value.shape[1] for name, value in state.items() if "down_proj.w" in name or "weights_out.w" in name
        )
        kwargs |= {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": 2 * hidden / 32}
    if kind == "Dinov2WithRegisters":
        kwargs |= {"reg_tokens": 4, "no_embed_class": True}
    layout = {"ViT": "hf-vit", "Dinov2": "hf-dinov2", "Dinov2WithRegisters": "hf-dinov2-reg"}[kind]
    model = build_model(tiny(kwargs=kwargs, layout=layout), saved(state, file))
    with torch.inference_mode():
        expected = reference(images()).last_hidden_state
    assert (model.forward_features(images()) - expected).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------- the embedded network


EMBEDDED = ["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_network_sees_what_is_in_a_photograph(name: str) -> None:
    record = BACKBONES[name]
    weights = fetch_weights(record)
    assert weights.source == "package"
    model = build_model(record, weights)
    state = KEYMAPS[record.layout](read_checkpoint(weights.path)[""], model)
    assert len(state) == (296 if name == "efficientnet-lite0" else 386)
    size = (record.input_size, record.input_size)
    photograph = ImageOps.fit(Image.fromarray(load_sample_image("china.jpg")), size, Image.Resampling.BICUBIC)
    pooled = forward_poolings(model, record, ((pil_to_tensor(photograph) / 255 - 0.5) / 0.5)[None])
    logits = pooled["pooled"] @ state["classifier.weight"].T + state["classifier.bias"]
    assert logits.argmax() == 698  # ImageNet's palace
    assert pooled["center"].shape == (1, 1280)


def test_a_reordered_embedded_checkpoint_is_refused(tmp_path: Path) -> None:
    record = BACKBONES["efficientnet-lite0"]
    state = read_checkpoint(fetch_weights(record).path)[""]
    reordered = saved(dict(sorted(state.items())), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="do not fit efficientnet-lite0"):
        build_model(record, reordered)


# ----------------------------------------------------------------------------------------------------- docs/models.md


def table_of_models() -> str:
    """The table of docs/models.md, from the records."""
    lines = [
        "| name | model | parameters | embedding | GFLOPs | µm/px | input | weights' licence | gated |",
        "|---|---|--:|--:|--:|---|---|---|---|",
    ]
    for row in list_models():
        record = BACKBONES[row["name"]]
        mpp = "varied" if record.mpp is None else ", ".join(f"{value:g}" for value in record.mpp) or "photographs"
        crop = f"{record.resize} → {record.input_size}" if record.resize != record.input_size else record.input_size
        lines.append(
            f"| `{record.name}` | [{record.title}]({record.url}) | {record.n_parameters / 1e6:,.1f} M | "
            f"{record.embedding_dim:,} ({record.card_pooling}) | {record.gflops} | {mpp} | {crop}, "
            f"{record.interpolation} | {record.licence} | {'yes' if record.gated else 'no'} |"
        )
    return "\n".join(lines)


def test_resolutions_are_those_of_the_papers() -> None:
    """Of models trained on several, or on each slide's own."""
    several = (2.0, 1.0, 0.5, 0.25)
    expected = {"virchow2": several, "midnight-12k": several, "gpfm": None}
    expected |= {"lunit-s8": (0.5, 0.25), "lunit-s16": (0.5, 0.25)}
    assert {name: record.mpp for name, record in BACKBONES.items() if record.mpp not in ((0.5,), ())} == expected


def test_the_documented_table_is_the_registry() -> None:
    assert table_of_models() in DOC.read_text(), "paste the output of `python tests/test_backbones.py` into the table"


def test_timm_still_passes_gelu_on_so_the_check_is_needed() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "mlp_layer": timm.layers.SwiGLUPacked})
    assert not isinstance(model.blocks[0].mlp.act, nn.SiLU)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize(
    ("pool", "pooling", "behind"),
    [("token", "cls", True), ("token", "cls", False), ("avg", "mean", True), ("avg", "mean", False)],
)
def test_the_norm_behind_the_pooling_is_applied_to_class_token_and_means_alike(
    pool: str, pooling: str, behind: bool, registers: int
) -> None:
    kwargs = {"global_pool": pool, "fc_norm": behind, "reg_tokens": registers, "img_size": 56}
    record = tiny(kwargs=kwargs, card_pooling=pooling)
    torch.manual_seed(0)
    model = build_model(record, None)
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.normal_(norm.weight, mean=1)
        nn.init.normal_(norm.bias)
    pooled = forward_poolings(model, record, images(size=56))
    expected = model(images(size=56))  # timm's own pooling, its norm behind it, no classifier
    torch.testing.assert_close(pooled[pooling], expected)
    tokens = model.forward_features(images(size=56))
    normed = model.fc_norm(torch.stack([tokens[:, 0], tokens[:, 1 + registers :].mean(1)]))
    torch.testing.assert_close(torch.stack([pooled["cls"], pooled["mean"]]), normed)


@pytest.mark.parametrize(
    ("arch", "stages"),
    [("tf_efficientnet_lite0", ["blocks.4", "blocks.5"]), ("test_resnet", ["layer3"]), ("test_convnext", ["stages.2"])],
)
def test_mid_holds_the_central_cells_behind_the_middle_stages(arch: str, stages: list[str]) -> None:
    record = replace(TINY, arch=arch, card_pooling="pooled", kwargs={}, input_size=96)
    torch.manual_seed(0)
    model = build_model(record, None)
    seen = []
    for stage in stages:
        model.get_submodule(stage).register_forward_hook(lambda module, inputs, output: seen.append(output))
    pooled = forward_poolings(model, record, images(size=96))
    expected = []
    for features in seen:
        edge = features.shape[2]
        margin = min(round(0.3 * edge), (edge - 1) // 2)
        expected.append(features[:, :, margin : edge - margin, margin : edge - margin].mean((2, 3)))
    torch.testing.assert_close(pooled["mid"], torch.cat(expected, dim=1))
    assert pooling_widths(model, record)["mid"] == pooled["mid"].shape[1]


def test_passes_of_several_threads_keep_their_feature_maps_apart() -> None:
    record = replace(TINY, arch="test_resnet", card_pooling="pooled", kwargs={}, input_size=96)
    model = build_model(record, None)
    batches = [images(size=96) + shift for shift in range(8)]
    alone = [forward_poolings(model, record, batch)["mid"] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: forward_poolings(model, record, batch)["mid"], batches))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(alone[0], alone[1])


def test_transformers_with_tokens_and_networks_without_a_row_of_stages_have_no_mid() -> None:
    for arch in ("test_vit", "densenet121"):
        with torch.device("meta"):
            assert middle_stages(timm.create_model(arch)) == []


def test_only_a_classifier_is_left_out_by_name(file: Path) -> None:
    model = build_model(TINY, None)
    state = dict(model.state_dict()) | {"head.weight": torch.ones(3, 32), "head.bias": torch.ones(3)}
    loaded = build_model(TINY, saved(state, file))
    torch.testing.assert_close(loaded(images()), model(images()))
    for name in ("head.norm.weight", "heads.weight", "my.head.weight"):
        with pytest.raises(UserError, match=rf"1 are unknown to it \(first: {name}\)"):
            build_model(TINY, saved(dict(model.state_dict()) | {name: torch.ones(32)}, file))


if __name__ == "__main__":
    print(table_of_models())
