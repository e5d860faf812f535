"""How are the adapters of all folds trained at once over one frozen backbone, and shared with others?

LoRA (Hu et al. 2021, arXiv:2106.09685) adds a product of two thin matrices to a frozen layer: y = W x + s B A x with
s = alpha / rank. Here every fold has its own A and B, stacked along a leading fold axis, and one batch holds the images
of all active folds, fold after fold: the frozen product sees them together, the adapters act fold by fold in one
batched product. B starts at zero, so at step 0 the model is the frozen one, to the bit.

Dropout costs no memory: a fold's mask depends on (seed, fold, layer, step) alone and is drawn again in the backward
pass. So no fold's training depends on which others run beside it, nor on how many processes share its batch.

On disk an adapter is what `peft` writes and reads: `adapter_config.json` beside `adapter_model.safetensors`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from features.console import UserError
from features.files import write_file, writing

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."

# Full matches of module names. A list of suffixes would catch `patch_embed.proj` too.
TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
FAMILY_TARGETS = {
    "ViT": TARGETS,
    "ViT with an unpacked gated MLP (DINOv3 H+)": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc(1_g|1_x|2))",
    "Swin": r"layers\.\d+\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
    "ConvNeXt": r"stages\.\d+\.blocks\.\d+\.mlp\.fc[12]",
    # The first two stages hold 3 % of the factors and take 40 % of a training step, for the same validation figures.
    "EfficientNet: the 1x1 convolutions from the third stage on": r"blocks\.[2-9]\..*\.conv_(pw|pwl)",
    "ResNet with bottlenecks: the 1x1 convolutions": r"layer\d+\.\d+\.conv[13]",
}


@dataclass(frozen=True)
class LoraOptions:
    """What decides an adapter.

    Attributes:
        rank: inner width r.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability of dropping an input of the adapter while training, honoured to 1/256.
        targets: regular expression that the whole name of a module must match; None takes the family's default.

    Raises:
        UserError: a value outside its range, or no regular expression.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.3
    targets: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA rank {self.rank}: expected 1 or more (8 is the default).")
        if not self.alpha > 0:
            raise UserError(f"LoRA alpha {self.alpha}: expected a number above 0 (twice the rank is usual).")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA dropout {self.dropout}: expected 0 or more and less than 1 (0.3 is the default).")
        try:
            re.compile(self.targets or "")
        except re.error as error:
            raise UserError(
                f"LoRA targets '{self.targets}' are not a regular expression: {error}. Example: {TARGETS}"
            ) from None


# ---------------------------------------------------------------------------------------------------------- swapping in


def add_adapters(model: nn.Module, options: LoraOptions, *, n_folds: int, seed: int) -> tuple[str, ...]:
    """Freeze a backbone and put an adapter per fold beside each target, in place.

    The whole model goes to eval mode and should stay there: batch norms would mix the folds' images. Dropout is
    switched by `select_folds`. A fold's initial values depend on (seed, fold), not on the number of folds.

    Args:
        model: any timm model; its targets are `nn.Linear` or 1x1 `nn.Conv2d`.
        options: see `LoraOptions`.
        n_folds: adapters per target.
        seed: of the initial values (Kaiming-uniform A, zero B: those of `peft`) and of the dropout masks.

    Returns:
        Names of the adapted modules, in the order of the network.

    Raises:
        UserError: targets that match nothing, or something that is no linear layer.
    """
    options = replace(options, targets=options.targets or default_targets(model))
    names = find_targets(model, options)
    model.requires_grad_(False)
    generators = [torch.Generator().manual_seed(seed_of(seed, fold)) for fold in range(n_folds)]
    for layer, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        adapted = StackedLora(base, options, generators=generators, seed=seed, layer=layer)
        setattr(model.get_submodule(parent), child, adapted)
    model.eval()
    return names


def default_targets(model: nn.Module) -> str:
    """The pattern of the family that the module names tell: the one that matches most of them."""
    names = [name for name, _ in model.named_modules()]
    return max(FAMILY_TARGETS.values(), key=lambda targets: sum(bool(re.fullmatch(targets, name)) for name in names))


def find_targets(model: nn.Module, options: LoraOptions) -> tuple[str, ...]:
    """Names of the modules to adapt.

    Raises:
        UserError: there are none, or one is neither `nn.Linear` nor a 1x1 `nn.Conv2d`.
    """
    targets = options.targets or default_targets(model)
    modules = dict(model.named_modules())
    names = tuple(name for name in modules if re.fullmatch(targets, name))
    if not names:
        # One name stands for all that differ in their numbers only.
        linear = {re.sub(r"\d+", "0", name): name for name, module in modules.items() if _is_linear(module)}
        raise UserError(
            f"LoRA targets '{targets}' match no module of this {type(model).__name__}. They must match a whole name, "
            f"such as {', '.join(list(linear.values())[-8:])}."
        )
    for name in names:
        if not _is_linear(modules[name]):
            raise UserError(
                f"LoRA targets '{targets}' match {name}, which is a {_describe(modules[name])}. Only nn.Linear and "
                "1x1 nn.Conv2d of one group and stride 1 can be adapted: narrow the pattern."
            )
    return names


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return (
            module.kernel_size == (1, 1)
            and module.stride == (1, 1)
            and module.padding in ((0, 0), "same", "valid")
            and module.groups == 1
        )
    return isinstance(module, nn.Linear)


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        size = "x".join(map(str, module.kernel_size))
        return f"{size} {type(module).__name__} of stride {module.stride[0]} and {module.groups} group(s)"
    return type(module).__name__


# ------------------------------------------------------------------------------------------------------------ training


WHOLE = (0, 1, 1)  # first, held, total: which of a fold's batch this process holds


def select_folds(
    model: nn.Module, folds: Sequence[int], *, step: int | None = None, part: tuple[int, int, int] = WHOLE
) -> None:
    """Say which folds the next batches hold, until said again.

    Args:
        model: with adapters.
        folds: the active folds; a batch holds the same number of images of each, fold after fold in this order.
        step: any number that names a training step: dropout masks follow from it. None switches dropout off.
        part: the next batches hold `held` images of each fold, from the `first` on, of `total` whose masks are drawn.
    """
    adapted = [module for _, module in adapters(model)]
    index = torch.tensor(list(folds), device=adapted[0].A.device)
    keys = None if step is None else torch.tensor([seed_of(adapted[0].seed, fold, step) for fold in folds])
    for module in adapted:
        module.folds, module.index, module.keys, module.part = tuple(folds), index, keys, part


def adapters(model: nn.Module) -> Iterator[tuple[str, StackedLora]]:
    """(name, module) of every adapted layer, in the order of the network."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StackedLora))


def trainable(model: nn.Module) -> list[Parameter]:
    """The stacked factors: for each layer A (n_folds, rank, in) and B (n_folds, out, rank).

    A fold outside the batch has zero gradients; a fold's share of the parameters is 1 / n_folds.
    """
    return [parameter for _, module in adapters(model) for parameter in (module.A, module.B)]


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen weights beside the adapters in the type that autocast multiplies them in.

    The products are the same to the bit, without a cast in every pass and with half the memory. What is merged
    afterwards is rounded: merge before.
    """
    for _, module in adapters(model):
        for parameter in module.base.parameters():
            parameter.data = parameter.data.to(dtype)


class StackedLora(nn.Module):
    """A frozen linear layer with one adapter per fold.

    Attributes:
        base: the frozen `nn.Linear` or 1x1 `nn.Conv2d`.
        A: (n_folds, rank, in) float32, or the base's float64.
        B: (n_folds, out, rank).
    """

    def __init__(
        self, base: nn.Module, options: LoraOptions, *, generators: Sequence[torch.Generator], seed: int, layer: int
    ) -> None:
        super().__init__()
        weight: Tensor = base.weight  # type: ignore[assignment]
        n_out, n_in = weight.shape[:2]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A = torch.empty(len(generators), options.rank, n_in, dtype=dtype)
        for own, generator in zip(A, generators, strict=True):
            nn.init.kaiming_uniform_(own, a=math.sqrt(5), generator=generator)
        self.base = base
        self.A = Parameter(A.to(weight.device))
        self.B = Parameter(torch.zeros(len(generators), n_out, options.rank, dtype=dtype, device=weight.device))
        self.options, self.seed, self.layer = options, seed, layer
        self.folds = tuple(range(len(generators)))
        self.index = torch.arange(len(generators), device=weight.device)
        self.keys: Tensor | None = None  # (n_active,) seeds of this step's masks; None: no dropout
        self.part = WHOLE

    @property
    def weight(self) -> Tensor:
        """Not to be had: a network that reads it multiplies by itself, and the adapter would never act."""
        raise UserError(
            "this network reads the weights of an adapted layer instead of calling it, so an adapter there would "
            "never act (timm's BEiT, EVA and Swin V2 do so with attn.qkv). Leave that layer out of the LoRA targets."
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, ..., in) -> (n, ..., out), or (n, in, h, w) -> (n, out, h, w); n = active folds x images per fold."""
        if len(x) % len(self.folds):
            raise ValueError(f"a batch of {len(x)} images cannot hold equally many of {len(self.folds)} folds")
        if torch.is_autocast_enabled(x.device.type):
            # Cast before the function, which then keeps the narrow copy, not the wide one.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        A: Tensor = self.A
        B: Tensor = self.B
        if len(self.folds) < len(A) or self.folds != tuple(range(len(A))):
            A, B = A.index_select(0, self.index), B.index_select(0, self.index)
        threshold = 0 if self.keys is None else drop_threshold(self.options.dropout)
        scale = self.options.alpha / self.options.rank / (1 - threshold / 256)
        images = isinstance(self.base, nn.Conv2d)
        if images:
            x = x.permute(0, 2, 3, 1)  # of channels_last images a contiguous view
        y: Tensor = _AdaptedLinear.apply(
            x, self.base.weight, self.base.bias, A, B, scale, self.keys, self.layer, threshold, self.part
        )
        return y.permute(0, 3, 1, 2) if images else y


class _AdaptedLinear(torch.autograd.Function):
    """y = W x + b + scale B A (m * x) for a 0/1 mask m.

    For the backward pass it keeps the input and its rank-wide projection: no mask, no masked or scaled copy, no cast of
    the frozen weights. Everything is computed in the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (n, ..., in)
        weight: Tensor,  # (out, in) or (out, in, 1, 1)
        bias: Tensor | None,  # (out,)
        A: Tensor,  # (f, rank, in)
        B: Tensor,  # (f, out, rank)
        scale: float,
        keys: Tensor | None,  # (f,)
        layer: int,
        threshold: int,
        part: tuple[int, int, int],
    ) -> Tensor:
        n_folds, dtype = len(A), x.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            if weight.ndim == 4:
                y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(dtype), bias).permute(0, 2, 3, 1)
            else:
                y = F.linear(x, weight.to(dtype), bias)
            kept = _rows(x, n_folds)
            if threshold and keys is not None:
                kept = kept * _mask(kept, keys, layer, threshold, part)
            projected = torch.bmm(kept, A.to(dtype).mT)  # (f, t, rank)
            y = _rows(y, n_folds).baddbmm_(projected, B.to(dtype).mT, alpha=scale).view(y.shape)
        ctx.save_for_backward(x, projected, weight, A, B, keys)
        ctx.scale, ctx.layer, ctx.threshold, ctx.part = scale, layer, threshold, part
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, weight, A, B, keys = ctx.saved_tensors
        n_folds, dtype = len(A), x.dtype
        with torch.autocast(x.device.type, enabled=False):
            grad, kept = _rows(grad, n_folds), _rows(x, n_folds)
            grad_projected = torch.bmm(grad, B.to(dtype))  # (f, t, rank)
            grad_rows = mask = None
            if ctx.needs_input_grad[0]:
                grad_rows = (grad.flatten(0, 1) @ weight.flatten(1).to(dtype)).view(kept.shape)
            if ctx.threshold and keys is not None:
                # Shaped after the gradient: torch.compile would take a mask shaped after the input for the forward
                # pass's own, and keep that one.
                like = kept if grad_rows is None else grad_rows
                mask = _mask(like, keys, ctx.layer, ctx.threshold, ctx.part)
                kept = kept * mask
            grad_A = torch.bmm(grad_projected.mT, kept).to(A.dtype) * ctx.scale
            grad_B = torch.bmm(grad.mT, projected).to(B.dtype) * ctx.scale
            if grad_rows is not None:
                if mask is None:
                    grad_rows.baddbmm_(grad_projected, A.to(dtype), alpha=ctx.scale)
                else:
                    grad_rows.addcmul_(torch.bmm(grad_projected, A.to(dtype)), mask, value=ctx.scale)
            grad_x = None if grad_rows is None else grad_rows.view(x.shape)
        return grad_x, None, None, grad_A, grad_B, None, None, None, None, None


def _rows(x: Tensor, n_folds: int) -> Tensor:
    """(n, ..., d) -> (f, t, d): all tokens or pixels of a fold's images below each other."""
    return x.reshape(n_folds, -1, x.shape[-1])


# ------------------------------------------------------------------------------------------------------------- dropout


def drop_threshold(dropout: float) -> int:
    """Random bytes below it drop their element: the probability in 256ths, rounded, never all of them."""
    return min(round(256 * dropout), 255)


# An operator of its own, so that torch.compile calls it instead of tracing into numpy.
@torch.library.custom_op("mitofm::keep_mask", mutates_args=())
def keep_mask(
    like: Tensor, keys: Tensor, *, layer: int, threshold: int, first: int = 0, held: int = 1, total: int = 1
) -> Tensor:
    """The dropout mask of one layer in one step: 1 keeps, with probability 1 - threshold / 256, and 0 drops.

    One random byte per element is compared with the threshold: on a CPU twenty times as fast as drawing numbers.

    Args:
        like: (f, t, in); the mask has its shape, dtype and device.
        keys: (f,) seed of each fold's step; the mask of a fold follows from its key and the layer alone.
        layer: position of the layer in the network.
        threshold: from `drop_threshold`.
        first, held, total: the t rows are of `held` images of a fold, the `first` and those after it of `total`. The
            mask of all is drawn, and theirs returned.
    """
    mask = torch.empty_like(like, memory_format=torch.contiguous_format)
    for key, own in zip(keys.tolist(), mask.flatten(1), strict=True):
        each = len(own) // held
        drawn = _random_bytes(seed_of(key, layer), each * total, like.device)[each * first : each * (first + held)]
        # Compared straight into the wanted dtype: a mask of booleans would have to be cast, several times slower.
        torch.ge(drawn, threshold, out=own)
    return mask


@keep_mask.register_fake
def _(
    like: Tensor, keys: Tensor, *, layer: int, threshold: int, first: int = 0, held: int = 1, total: int = 1
) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _mask(like: Tensor, keys: Tensor, layer: int, threshold: int, part: tuple[int, int, int]) -> Tensor:
    first, held, total = part
    mask: Tensor = keep_mask(like, keys, layer=layer, threshold=threshold, first=first, held=held, total=total)
    return mask


def _random_bytes(seed: int, n: int, device: torch.device) -> Tensor:
    words = -(-n // 8)
    if device.type == "cpu":
        drawn = torch.from_numpy(np.random.SFC64(seed).random_raw(words))  # twice as fast as torch's generator
    else:
        generator = _generator(device).manual_seed(seed)
        drawn = torch.empty(words, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return drawn.view(torch.uint8)[:n]


@cache
def _generator(device: torch.device) -> torch.Generator:
    """Seeded anew for every mask: making one takes longer than drawing from it."""
    return torch.Generator(device)


def seed_of(*key: int) -> int:
    """One well-mixed seed of 63 bits for a tuple of numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ------------------------------------------------------------------------------------------------- saving and merging


def merge(model: nn.Module, fold: int) -> dict[str, Tensor]:
    """The backbone's state dict under its own names, with a fold's adapters added to the weights they adapt.

    The sum is formed in float64. Plain timm loads it; tensors that no adapter touches are the model's own, not copies.
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
        pixel = module.base.weight.shape[2:]  # type: ignore[index]
        for factor, tensor in (("A", module.A[fold]), ("B", module.B[fold])):
            tensors[f"{_PEFT_PREFIX}{name}.lora_{factor}.weight"] = tensor.reshape(*tensor.shape, *pixel)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
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
    with writing(folder, remedy="save again"):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / WEIGHTS_FILE, [safetensors.torch.save(tensors, {"format": "pt"})])
        write_file(folder / CONFIG_FILE, [json.dumps(config, indent=2).encode()])


def classifier_name(model: nn.Module) -> str:
    """timm's name of the classifier: "head" of ViTs, "head.fc" of Swin, "classifier" of EfficientNets."""
    described: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    return str(described.get("classifier") or "head")


# Settings of peft's LoraConfig under which the same tensors mean another function, or other tensors are needed.
_OTHER_MATHEMATICS = (
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


def read_options(folder: Path) -> LoraOptions:
    """The options an adapter was trained with, by mitofm or by `peft`.

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
    changed = {key: config[key] for key in _OTHER_MATHEMATICS if config.get(key) not in (None, False, {}, [], "none")}
    if kind != "LORA" or changed:
        found = ", ".join(f"{key} = {value}" for key, value in {"peft_type": kind, **changed}.items())
        raise UserError(
            f"{path}: found {found}. Expected peft_type = LORA and nothing else: train the adapter without."
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
    expected: dict[str, Tensor] = {}
    for name, module in adapters(model):
        if (options.rank, options.alpha) != (module.options.rank, module.options.alpha):
            raise UserError(
                f"{folder / CONFIG_FILE}: found rank {options.rank} and alpha {options.alpha}, expected rank "
                f"{module.options.rank} and alpha {module.options.alpha}. Build the model "
                "with the adapter's own options."
            )
        expected[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = module.A.data[fold]
        expected[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = module.B.data[fold]
    head_prefix = f"{_PEFT_PREFIX}{classifier_name(model)}."
    head = {key.removeprefix(head_prefix): tensors.pop(key) for key in list(tensors) if key.startswith(head_prefix)}
    if tensors.keys() != expected.keys():
        strange = sorted(tensors.keys() - expected.keys())
        raise UserError(
            f"{path}: {len(expected.keys() - tensors.keys())} tensors of this model's {len(expected)} are missing"
            + (f" and {len(strange)} belong to none of its layers ({strange[0]})" if strange else "")
            + ". Load it into the backbone and targets it was trained with."
        )
    for key, own in expected.items():
        if tensors[key].flatten(1).shape != own.shape:
            raise UserError(
                f"{path}: {key} is {tuple(tensors[key].shape)}, expected {tuple(own.shape)}. Load it into the backbone "
                "and with the rank it was trained with."
            )
    for key, own in expected.items():
        own.copy_(tensors[key].flatten(1))
    return head


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file of a fold.

    Raises:
        UserError: a missing or truncated file.
    """
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        found = "no such file"
    except (SafetensorError, OSError) as error:
        found = f"not a whole safetensors file ({error})"
    raise UserError(
        f"{path}: {found}. Expected the weights of one fold, as fm-finetune or peft writes them. Copy the folder "
        "again, or train again."
    )
