"""How do the trained weights of a fold lie on disk, so that timm and `peft` read them too?

- An adapter is what `peft` writes and reads: `adapter_config.json` beside `adapter_model.safetensors`.
- A whole network is one safetensors file under timm's own tensor names.

Nothing is pickled, and every file appears whole or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from features.console import UserError
from features.files import write_file, writing
from finetune.lora import LoraOptions, adapters

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
# Settings of peft's LoraConfig under which the same tensors mean another function, or other tensors are needed.
_UNSUPPORTED_SETTINGS = (
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; its folder is made if missing.

    Args:
        path: of the file; an older one is replaced.
        tensors: name to tensor, on any device.
        metadata: at most one entry: safetensors writes several in random order.

    Raises:
        UserError: the disk cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with writing(path.parent, remedy="save again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, [safetensors.torch.save(whole, dict(metadata or {"format": "pt"}))])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file of a fold.

    Raises:
        UserError: a missing or truncated file.
    """
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        problem = "no such file"
    except (SafetensorError, OSError) as error:
        problem = f"not a whole safetensors file ({error})"
    raise UserError(
        f"{path}: {problem}. Expected the weights of one fold, as fm-finetune or peft writes them. Copy the folder "
        "again, or train again."
    )


def copy_tensors(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into those of the same names; all or none are changed.

    Raises:
        UserError: names or shapes differ; the message names the file `path`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in into.items()}
    wrong = [name for name in expected | shapes if shapes.get(name) != expected.get(name)]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path}: {len(wrong)} tensors are missing, unknown or of another shape (first: {name}, found "
            f"{shapes.get(name, 'none')}, expected {expected.get(name, 'none')}). Load it into the model, targets, "
            "rank and number of classes that it was trained with, restore the file, or train again."
        )
    for name, tensor in into.items():
        tensor.copy_(tensors[name])


# ------------------------------------------------------------------------------------------------------------- adapters


def save_adapter(model: nn.Module, folder: Path, *, fold: int, head: Mapping[str, Tensor], base_model: str) -> None:
    """Write one fold's adapter and head as `peft` writes them.

    `peft` loads the folder onto the same timm model built with as many classes as the head has.

    Args:
        model: with adapters.
        folder: made if missing. Each file appears whole, the configuration last; an older adapter is replaced.
        fold: which one.
        head: the classifier's "weight" (n_classes, d) and "bias" (n_classes,).
        base_model: name of the backbone, recorded.

    Raises:
        UserError: the disk cannot be written.
    """
    classifier = classifier_name(model)
    tensors = {f"{_PEFT_PREFIX}{classifier}.{leaf}": tensor for leaf, tensor in head.items()}
    for name, module in adapters(model):
        kernel = module.base.weight.shape[2:]  # type: ignore[index]  # (1, 1) of a convolution
        for factor, tensor in (("A", module.A[fold]), ("B", module.B[fold])):
            tensors[f"{_PEFT_PREFIX}{name}.lora_{factor}.weight"] = tensor.reshape(*tensor.shape, *kernel)
    options = next(adapters(model))[1].options
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": options.targets,
        "modules_to_save": [classifier],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_tensors(folder / WEIGHTS_FILE, tensors)
    with writing(folder, remedy="save again"):
        write_file(folder / CONFIG_FILE, [json.dumps(config, indent=2).encode()])


def classifier_name(model: nn.Module) -> str:
    """Find timm's name of the classifier: "head" of ViTs, "head.fc" of Swin, "classifier" of EfficientNets."""
    described: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    return str(described.get("classifier") or "head")


def read_options(folder: Path) -> LoraOptions:
    """Read the options that an adapter was trained with, by mitofm or by `peft`.

    Raises:
        UserError: no such file, not LoRA, or a kind of LoRA that computes something else.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
        targets = config["target_modules"]
        if not isinstance(targets, str):  # peft matches a list against the whole last parts of names
            targets = rf"(.*\.)?({'|'.join(map(re.escape, sorted(targets)))})"
        options = LoraOptions(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), targets)
        kind = config["peft_type"]
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file. An adapter is a folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the configuration of a LoRA adapter ({type(error).__name__}: {error}). Expected the JSON "
            "object that peft or fm-finetune writes: copy or train the adapter again."
        ) from None
    unused: tuple[object, ...] = (None, False, {}, [], "none")
    settings = {key: config[key] for key in _UNSUPPORTED_SETTINGS if config.get(key) not in unused}
    if kind != "LORA" or settings:
        described = ", ".join(f"{key} = {value}" for key, value in {"peft_type": kind, **settings}.items())
        raise UserError(
            f"{path}: found {described}. Expected peft_type = LORA and nothing else: train the adapter without."
        )
    return options


def load_adapter(model: nn.Module, folder: Path, *, fold: int) -> dict[str, Tensor]:
    """Read an adapter, written here or by `peft`, into one fold of a model with adapters of the same options.

    Returns:
        The head: "weight" (n_classes, d) and "bias" (n_classes,), or nothing if none was saved.

    Raises:
        UserError: a missing, truncated or foreign file, or another rank, scale, shape or set of modules.
    """
    options = read_options(folder)
    path = folder / WEIGHTS_FILE
    tensors = read_tensors(path)
    factors: dict[str, Tensor] = {}
    for name, module in adapters(model):
        if (options.rank, options.alpha) != (module.options.rank, module.options.alpha):
            raise UserError(
                f"{folder / CONFIG_FILE}: found rank {options.rank} and alpha {options.alpha}, expected rank "
                f"{module.options.rank} and alpha {module.options.alpha}. Build the model "
                "with the adapter's own options."
            )
        factors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = module.A.data[fold]
        factors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = module.B.data[fold]
    head_prefix = f"{_PEFT_PREFIX}{classifier_name(model)}."
    head = {key.removeprefix(head_prefix): tensors.pop(key) for key in list(tensors) if key.startswith(head_prefix)}
    flat = {key: tensor.flatten(1) if tensor.ndim > 1 else tensor for key, tensor in tensors.items()}
    copy_tensors(flat, factors, path)
    return head


def merge(model: nn.Module, fold: int) -> dict[str, Tensor]:
    """Make the backbone's state dict under timm's names, with a fold's adapters added to the weights they adapt.

    The sum is formed in float64. Tensors that no adapter touches are the model's own, not copies.
    """
    adapted = dict(adapters(model))
    merged: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if owner in adapted:
            continue  # its A and B
        name = owner.removesuffix(".base")
        if name != owner and name in adapted:
            key = f"{name}.{leaf}"
            if leaf == "weight":
                module = adapted[name]
                scale = module.options.alpha / module.options.rank
                delta = scale * module.B[fold].detach().double() @ module.A[fold].detach().double()
                tensor = (tensor.double() + delta.view(tensor.shape)).to(tensor.dtype)
        merged[key] = tensor
    return merged
