"""Is a checkpoint that was saved elsewhere read right, and every other file refused in one sentence?"""

import argparse
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm.layers
import torch
from test_backbones import SMALL, TINY, images, saved, tiny
from torch import Tensor, nn

from extract.backbones import BACKBONES, Backbone, build_model, fetch_weights
from extract.checkpoints import read_checkpoint
from features.console import UserError

Reads = Callable[[Any], str]
SCALE = {"init_values": 1e-5}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def network(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(build_model(tiny(**changes), None).state_dict())


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def head(prefix: str, n: int = 2) -> dict[str, Tensor]:
    return {f"{prefix}.{i}.weight": torch.ones(1) for i in range(n)}


@pytest.fixture
def reads(file: Path, capsys: pytest.CaptureFixture[str]) -> Reads:
    """Saves, loads into `TINY`, requires the weights of `network()`, and gives what was said."""

    def check(content: Any, record: Backbone = TINY) -> str:
        loaded = build_model(record, saved(content, file)).state_dict()
        expected = network(layout=record.layout)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        said = capsys.readouterr().err
        assert said.startswith(f"{file}: ") or not said
        return said

    return check


# -------------------------------------------------------------------------------------------------- training wrappers


@pytest.mark.parametrize(
    ("place", "prefix"),
    [
        *((place, "module.") for place in ("state_dict", "model", "model_state_dict", "net", "network", "teacher",
          "student", "model_ema", "ema", "ema_state_dict", "model/state_dict", "state_dict/teacher/model", "foo")),
        *(("model", prefix) for prefix in ("", "module.", "_orig_mod.", "model.", "encoder.", "backbone.", "teacher.",
          "student.", "net.", "visual.trunk.", "module.backbone.", "_orig_mod.module.", "0.", "foo.bar.")),
    ],
)  # fmt: skip
def test_wrappers_and_prefixes_come_off_in_any_combination(reads: Reads, place: str, prefix: str) -> None:
    content: dict[str, Any] = below(prefix, network())
    for name in reversed(place.split("/")):
        content = {name: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}}}
    said = reads(content)
    assert f"took {len(network())} tensors from {place}{f': {prefix}*' if prefix else ''}." in said


def test_nothing_is_said_of_a_file_without_wrappers(reads: Reads) -> None:
    assert reads(network()) == ""
    assert reads(network() | {"head.weight": torch.ones(7, 32), "head.bias": torch.ones(7)}) == ""


@pytest.mark.parametrize("layout", ["timm", "timm-hub"])
@pytest.mark.parametrize("others", [head("head"), head("dino_head.mlp"), {"n_averaged": torch.tensor(3)}])
def test_what_lies_beside_the_backbone_is_left_out_and_named(
    reads: Reads, others: dict[str, Tensor], layout: str
) -> None:
    said = reads(below("backbone.", network()) | others, replace(TINY, layout=layout))
    name = next(iter(others)).partition(".")[0]
    assert f"from backbone.*; left out {len(others)} beside them ({name} ({len(others)}))" in said


@pytest.mark.parametrize(
    ("better", "worse"),
    [("teacher", "student"), ("teacher", "model"), ("model_ema", "model"), ("state_dict_ema", "state_dict"),
     ("ema_state_dict", "net"), ("model", "student")],
)  # fmt: skip
@pytest.mark.parametrize("flat", [False, True])
def test_a_teacher_or_an_average_is_taken_first_and_a_student_last(
    reads: Reads, better: str, worse: str, flat: bool
) -> None:
    if flat:
        content: dict[str, Any] = below(f"{worse}.", network(1)) | below(f"{better}.", network())
        assert f"from {better}.*" in (said := reads(content))
        assert f"also there, and not taken: {worse}.*" in said
    else:
        said = reads({worse: network(1), better: below("module.", network())})
        assert f"from {better}: module.*; also there, and not taken: {worse}." in said


def test_an_average_of_some_tensors_is_named_and_not_taken(reads: Reads) -> None:
    average = {name: tensor for name, tensor in network(1).items() if "norm" not in name}
    assert "from state_dict; also there, and not taken: model_ema." in reads(
        {"state_dict": network(), "model_ema": average}
    )


def test_a_teacher_of_another_architecture_is_not_taken(reads: Reads) -> None:
    said = reads({"teacher": network(kwargs={"embed_dim": 64}), "student": network()})
    assert f"took {len(network())} tensors from student." in said


def test_two_networks_that_fit_alike_are_refused_unless_they_are_the_same(reads: Reads, file: Path) -> None:
    with pytest.raises(UserError, match=r"holds several networks of this kind: model, best\. Save the tensors"):
        build_model(TINY, saved({"model": network(), "best": network(1)}, file))
    with pytest.raises(UserError, match=r"several networks of this kind: encoder_k\.\*, encoder_q\.\*"):
        build_model(TINY, saved(below("encoder_q.", network()) | below("encoder_k.", network(1)), file))
    reads({"model": network(), "best": network()})


def test_a_prefix_that_the_networks_own_names_have_stays(file: Path) -> None:
    """A wrapper's prefix is one of the network's own: only what fits better without it loses it."""
    record = replace(TINY, arch="mobilenetv3_small_050", kwargs={}, card_pooling="pooled")
    state = dict(build_model(record, None).state_dict())
    assert any(name.startswith("blocks.") for name in state)
    for prefix in ("", "blocks.", "blocks.0."):
        loaded = build_model(record, saved(below(prefix, state), file)).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_numbered_classifiers_and_what_pretraining_uses_are_left_out(reads: Reads) -> None:
    classifiers = {f"{name}.{end}": torch.ones(2) for name in ("head.0", "fc.3", "classifier.1")
                   for end in ("weight", "bias")}  # fmt: skip
    assert reads(network() | classifiers) == ""
    pretraining = {"mask_token": torch.zeros(1, 32), **head("dino_head.mlp"), "decoder_pos_embed": torch.ones(1),
                   "decoder_blocks.0.norm1.weight": torch.ones(2)}  # fmt: skip
    assert "left out what only pretraining uses: dino_head (2), mask_token (1)" in reads(network() | pretraining)


def test_what_does_not_fit_is_told_by_its_names(file: Path) -> None:
    with pytest.raises(UserError, match=r"tiny .*All its names begin with 'foo\.bar\.'"):
        build_model(TINY, saved(below("foo.bar.", {"conv1.weight": torch.ones(3), "bn1.bias": torch.ones(3)}), file))
    lora = {f"blocks.{i}.attn.qkv.lora_A.weight": torch.ones(2, 2) for i in range(2)}
    with pytest.raises(UserError, match=r"holds LoRA adapters beside the weights: merge them"):
        build_model(TINY, saved(below("base_model.model.", network() | lora), file))


def test_half_precision_becomes_single_and_whole_numbers_stay(file: Path) -> None:
    record = replace(TINY, arch="resnet10t", kwargs={}, card_pooling="pooled")
    state = build_model(record, None).state_dict()
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    loaded = build_model(record, saved(below("net.", half), file)).state_dict()
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: torch.float32 if tensor.is_floating_point() else torch.int64 for name, tensor in state.items()
    }


# ------------------------------------------------------------------------------------------------------- kinds of files


def test_the_format_is_told_by_the_first_bytes_and_not_by_the_suffix(tmp_path: Path) -> None:
    state = network()
    safetensors.torch.save_file(state, tmp_path / "pytorch_model.bin")
    torch.save(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "older.ckpt", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        assert read_checkpoint(path)[""].keys() == state.keys()


def test_options_and_figures_beside_the_weights_are_read(reads: Reads) -> None:
    figures = {"lr": np.float32(1), "best": np.float64(2), "flag": np.bool_(True), "curve": np.ones(3)}
    reads({"model": network(), "args": argparse.Namespace(lr=1, figures=figures), **figures})


class Trainer:
    """A class of a training script."""


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"state_dict": Path("/")}, r"pathlib\.\S*PosixPath"),
        ({"trainer": Trainer()}, r"test_checkpoints\.Trainer"),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_by_their_class(file: Path, content: Any, named: str, zipped: bool) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"weights\.pth: holds more than tensors, namely {named}\.") as caught:
        read_checkpoint(file)
    assert "torch.load('weights.pth'" in str(caught.value)
    assert "`weights`" in str(caught.value)


class Runs:
    """An object whose unpickling runs code: what must never happen."""

    def __reduce__(self) -> Any:
        return Path("/nonexistent").touch, ()


def test_no_pickle_runs_code(file: Path) -> None:
    for content in (Runs(), {"a": Runs(), "b": torch.ones(2)}, argparse.Namespace(a=Runs())):
        torch.save(content, file)
        with pytest.raises(UserError, match="holds more than tensors"):
            read_checkpoint(file)


def zipped(names: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", r"Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "a web page, not weights"),
        (json.dumps({"weight_map": {}}).encode(), "JSON, such as"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 90, "HDF5, as Keras writes it"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0", "a protobuf file, such as an ONNX"),
        (b"\x93NUMPY\x01\0v\0{'descr'", "a numpy array"),
        (b"\x1f\x8b\x08\0rest", "a gzip archive"),
        (b"weights/model.pth".ljust(257, b"\0") + b"ustar\0", "a tar archive"),
        (b"404 not found\n", r"not weights: it begins with b'404 not found\\n'"),
        (zipped({"metadata.json": b"{}", "model.weights.h5": b""}), "a zip archive, but none that PyTorch wrote"),
        (pickle.dumps({"a": 1}), "not a readable weights file"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "not a readable weights file"),
    ],
)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_other_files_are_told_what_they_are(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "elete it" not in str(caught.value)  # it is the user's own


def test_a_torchscript_archive_is_told_apart(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("model/data.pkl", "model/constants.pkl", "model/code/__torch__.py", "model/version"):
            archive.writestr(name, b"")
    with pytest.raises(UserError, match=r"a TorchScript archive.*state_dict\(\)"):
        read_checkpoint(file)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
@pytest.mark.parametrize("part", [0.3, 0.99])
def test_cut_files_say_so(file: Path, kind: str, part: float) -> None:
    if kind == "safetensors":
        safetensors.torch.save_file(network(), file)
    else:
        torch.save(network(), file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    file.write_bytes(whole[: math.floor(part * len(whole))])
    with pytest.raises(UserError, match=r"cut off at its [\d,]+ bytes.*Get a whole copy"):
        read_checkpoint(file)


def test_files_without_tensors(file: Path) -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    for content in ({"epoch": 3}, [torch.zeros(2)], torch.zeros(2), "text", {}, None, endless):
        torch.save(content, file)
        with pytest.raises(UserError, match="holds no tensors"):
            read_checkpoint(file)


def test_a_folder_is_no_weights_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a folder\. `weights` takes one file of it, .* it holds none"):
        fetch_weights(BACKBONES["uni"], weights=tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"takes one file of it: model\.safetensors\."):
        fetch_weights(BACKBONES["uni"], weights=tmp_path)


# ---------------------------------------------------------------------------------------------- renamed and resized


def openai_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of a ViT as OpenAI's CLIP has them, below "visual."."""
    back = (("patch_embed.proj", "conv1"), ("blocks.", "transformer.resblocks."), ("norm1", "ln_1"), ("norm2", "ln_2"))
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in back:
            name = name.replace(ours, theirs)
        if name == "pos_embed":
            name, tensor = "positional_embedding", tensor[0]
        if name == "cls_token":
            name, tensor = "class_embedding", tensor[0, 0]
        renamed[f"visual.{name}"] = tensor
    return renamed


FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # family: architecture, arguments, those of a network of another size
    "patch size": ("vit_tiny_patch16_224", SMALL, {"patch_size": 16, "img_size": 64}),
    "image size": ("vit_tiny_patch16_224", SMALL, {"img_size": 48}),
    "eva": ("eva02_tiny_patch14_224", SMALL, {"img_size": 48}),
    "beit": ("beit_base_patch16_224", SMALL, {"img_size": 48}),
    "swin window": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)},
        {"window_size": 4, "img_size": 64},
    ),
    "relative positions": ("vit_relpos_small_patch16_224", SMALL | {"rel_pos_type": "bias"}, {"img_size": 48}),
    "nest": ("nest_tiny", {}, {"img_size": 448}),
    "mvitv2": ("mvitv2_tiny", {"img_size": 128}, {"img_size": 256}),
    "tiny_vit": ("tiny_vit_5m_224", {"depths": (1, 1, 1, 1)}, {"window_sizes": (7, 7, 10, 7)}),
    "tnt": ("tnt_s_legacy_patch16_224", {"img_size": 64, "depth": 1}, {"img_size": 96}),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_another_size_are_never_resized_unseen(file: Path, family: str, prefix: str) -> None:
    arch, kwargs, other = FAMILIES[family]
    record = replace(TINY, arch=arch, kwargs=kwargs, layout="timm-hub")
    same = build_model(record, None)
    saved_ = build_model(replace(record, kwargs=kwargs | other), None)
    loaded = build_model(record, saved(below(prefix, dict(same.state_dict())), file))
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(UserError, match=r"do not fit tiny .*(another shape|resized a tensor of another shape)"):
        build_model(record, saved(below(prefix, dict(saved_.state_dict())), file))


def test_a_table_that_has_its_shape_is_not_resized_either(file: Path) -> None:
    """A window of 1 x 13 cells has 25 relative positions, which timm's converter takes for 5 x 5."""
    window = {"img_size": (8, 104), "window_size": (1, 13)}
    record = replace(
        TINY, arch="swin_tiny_patch4_window7_224", kwargs=FAMILIES["swin window"][1] | window, layout="timm-hub"
    )
    state = build_model(record, None).state_dict()
    loaded = build_model(record, saved(dict(state), file)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_renamed_checkpoint_of_another_size_is_refused(file: Path) -> None:
    kwargs = {"pre_norm": True}
    record = tiny(layout="timm-hub", kwargs=kwargs)
    torch.manual_seed(0)
    model = build_model(record, None)
    loaded = build_model(record, saved(openai_clip(dict(model.state_dict())), file))
    torch.testing.assert_close(loaded(images()), model(images()))
    for other in ({"img_size": 48}, {"patch_size": 16, "img_size": 64}):
        state = openai_clip(dict(build_model(tiny(kwargs=kwargs | other), None).state_dict()))
        with pytest.raises(UserError, match=r"resized a tensor of another shape to .*another image, patch or window"):
            build_model(record, saved(state, file))


# --------------------------------------------------------------------------------------------- timm's converters


@pytest.mark.parametrize(
    "arch",
    ["convnext_atto", "swin_tiny_patch4_window7_224", "poolformer_s12", "mvitv2_tiny", "tiny_vit_5m_224",
     "vit_relpos_small_patch16_224", "tnt_s_legacy_patch16_224", "csatv2", "xcit_nano_12_p16_224"],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(2))
def test_a_foreign_layout_is_one_message(file: Path, arch: str, seed: int) -> None:
    """Names that timm's converters look for, in layouts that they were not written for."""
    generator = np.random.default_rng(seed)
    parts = ["blocks", "0", "7", "attn", "relative_position_bias_table", "attention_biases", "rel_pos_h", "pos_embed",
             "patch_embed.proj.weight", "stages", "downsample.reduction.weight", "model", "network", "weight",
             "patch_pos", "cls_attn_blocks.0.attn.qkv.weight"]  # fmt: skip
    state = {
        ".".join(generator.choice(parts, generator.integers(1, 4))): torch.ones(tuple(generator.integers(1, 5, n)))
        for n in generator.integers(0, 5, 40)
    }
    record = replace(TINY, arch=arch, kwargs={}, layout="timm-hub")
    with pytest.raises(UserError, match=rf"weights\.pth: these weights do not fit tiny \({arch}\)"):
        build_model(record, saved(state, file))


def test_a_failing_converter_is_explained(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = replace(TINY, arch="poolformer_s12", kwargs={}, layout="timm-hub")
    with pytest.raises(
        UserError, match=r"timm's converter for MetaFormer does not know this layout \(KeyError.*conv1 \(1\)"
    ):
        build_model(record, saved({"conv1.weight": torch.ones(2, 2)}, file))
    assert capsys.readouterr() == ("", "")


def test_a_converter_prints_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """timm's DINOv3 converter prints an exception for each block; `--json` promises one object on stdout."""
    record = replace(TINY, arch="vit_small_patch16_dinov3", kwargs={"depth": 1}, layout="timm-hub")
    state = {"storage_tokens": torch.ones(1, 4, 384), "blocks.0.attn.qkv.bias": torch.zeros(1152)}
    with pytest.raises(UserError, match="do not fit"):
        build_model(record, saved(state, file))
    assert capsys.readouterr().out == ""


def test_biases_that_count_are_never_dropped(file: Path) -> None:
    record = replace(TINY, arch="vit_small_patch16_dinov3", kwargs={"depth": 1}, layout="timm-hub")
    state = dict(build_model(record, None).state_dict())
    state["storage_tokens"] = state.pop("reg_token")
    zero = {"blocks.0.attn.qkv.bias": torch.zeros(3 * 384)}
    build_model(record, saved(state | zero, file))
    zero["blocks.0.attn.qkv.bias"][7] = 0.1
    with pytest.raises(UserError, match=r"drops blocks\.0\.attn\.qkv\.bias, which is not zero; architectures .* _qkvb"):
        build_model(record, saved(state | zero, file))


def test_timm_resizes_without_a_word_so_the_check_is_needed() -> None:
    larger = torch.randn(1, 37, 32)
    assert timm.layers.resample_abs_pos_embed(larger, new_size=[4, 4], num_prefix_tokens=1).shape == (1, 17, 32)
