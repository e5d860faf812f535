"""How are the adapters of all folds trained at once over one frozen backbone?

LoRA (Hu et al. 2021, arXiv:2106.09685) adds a product of two thin matrices to a frozen layer: y = W x + s B A x with
s = alpha / rank. Here every fold has its own A and B, stacked along a leading fold axis. One batch holds the images of
all active folds, fold after fold: the frozen product sees them together, and one batched product applies each fold's
adapter to that fold's images. B starts at zero, so at step 0 the model computes exactly what the frozen one does.
A training with several seeds has an adapter per seed and fold; each of them is what is called a fold here.

Dropout masks are drawn again in the backward pass instead of being kept (`finetune.dropout`), and so is the output of
an MLP's activation. The thin products are computed by `finetune.products`, or on NVIDIA's GPUs by `finetune.kernels`.
Why the layer is one autograd function, and what that saves, is measured in docs/decisions/lora.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.mlp import GluMlp, Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Attention, Block  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from features.console import UserError
from features.folds import FoldModel
from finetune import kernels
from finetune import products as plain
from finetune.dropout import WHOLE_BATCH, BatchRows, drop_threshold, seed_of
from finetune.targets import find_targets, of_torch

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
MOST_RANK, MOST_ALPHA = 1_024, 1e6  # far beyond any use: a width in thousands would be no adapter


@dataclass(frozen=True)
class LoraOptions:
    """The options of LoRA adapters.

    >>> LoraOptions(rank=16, alpha=32)
    LoraOptions(rank=16, alpha=32, dropout=0.3, targets=None)

    Attributes:
        rank: inner width r.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability of dropping an input of the adapter while training, rounded to 1/256.
        targets: regular expression that the whole name of a module must match; None for the backbone family's default.

    Raises:
        UserError: a value outside its range, or targets that are not a regular expression.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.3
    targets: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA rank {self.rank}: expected 1 or more (8 is the default).")
        if self.rank > MOST_RANK:
            raise UserError(f"LoRA rank {self.rank}: expected at most {MOST_RANK:,} (8 is the default).")
        if not 0 < self.alpha <= MOST_ALPHA:
            raise UserError(
                f"LoRA alpha {self.alpha}: expected a number above 0 and at most {MOST_ALPHA:,.0f} (twice the rank is "
                "usual)."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA dropout {self.dropout}: expected 0 or more and less than 1 (0.3 is the default).")
        try:
            re.compile(self.targets or "")
        except re.error as error:
            raise UserError(
                f"LoRA targets '{self.targets}' are not a regular expression: {error}. Example: {TARGETS}"
            ) from None


# -------------------------------------------------------------------------------------------------- adapting a backbone


def add_adapters(model: nn.Module, options: LoraOptions, *, fold_models: Sequence[FoldModel]) -> tuple[str, ...]:
    """Freeze a backbone and replace each target layer, in place, by one with an adapter per fold.

    The model is put in eval mode and should stay there, as batch norms in training mode would mix the folds' images;
    `select_folds` switches dropout on and off. A fold's initial values depend on its seed and fold alone.

    Args:
        model: any timm model; its targets are `nn.Linear` or 1x1 `nn.Conv2d`.
        options: see `LoraOptions`.
        fold_models: seed and fold of each adapter of a target, which decide its initial values (Kaiming-uniform A, zero
            B: those of `peft`) and its dropout masks.

    Returns:
        Names of the adapted modules, in the order of the network.

    Raises:
        UserError: targets that match nothing, or something that is no linear layer.
    """
    targets = options.targets or default_targets(model)
    options, names = replace(options, targets=targets), _find_targets(model, targets)
    model.requires_grad_(False)
    generators = [torch.Generator().manual_seed(seed_of(*model)) for model in fold_models]
    selection = Selection(tuple(fold_models), slice(0, len(fold_models)), len(fold_models))
    for layer, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        adapted = StackedLora(base, options, generators=generators, layer=layer, selection=selection)
        setattr(model.get_submodule(parent), child, adapted)
    _keep_less(model)
    model.eval()
    return names


def default_targets(model: nn.Module) -> str:
    """Find the pattern in `FAMILY_TARGETS` that matches most of the model's module names, or as `find_targets`."""
    return find_targets(model, FAMILY_TARGETS.values(), _is_linear)


def _find_targets(model: nn.Module, targets: str) -> tuple[str, ...]:
    """Find the names of the modules to adapt; each has to be an `nn.Linear` or a 1x1 `nn.Conv2d`."""
    modules = dict(model.named_modules())
    names = tuple(name for name in modules if re.fullmatch(targets, name))
    if not names:
        # One example of all names that differ in their numbers only.
        linear = [name for name in modules if _is_linear(modules[name]) and not of_torch(modules, name)]
        examples = {re.sub(r"\d+", "0", name): name for name in linear}
        remedy = (
            f"Say by `lora_targets` which to adapt: they must match a whole name, such as "
            f"{', '.join(list(examples.values())[-8:])}."
            if examples
            else "It has no nn.Linear and no 1x1 nn.Conv2d of one group and stride 1, and nothing else can be adapted: "
            "train all of it by `method='full'`, or a classifier alone by `method='head'`."
        )
        raise UserError(
            f"LoRA targets '{targets}' match no module of this {type(getattr(model, 'network', model)).__name__}. "
            f"{remedy}"
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


def select_folds(
    model: nn.Module, folds: Sequence[int], *, step: int | Tensor | None = None, rows: BatchRows = WHOLE_BATCH
) -> None:
    """Set which folds the next batches hold; this stays so until it is called again.

    Args:
        model: with adapters.
        folds: the active folds; a batch holds the same number of images of each, fold after fold in this order.
        step: any number that identifies a training step, or its (f,) `dropout_keys` on the device: dropout masks follow
            from it. None switches dropout off.
        rows: which images of each fold's batch this process holds, where several processes share it.
    """
    layer = next(layer for _, layer in adapters(model))
    device, first, selection = layer.A.device, folds[0], layer.selection
    selection.folds, selection.n = slice(first, first + len(folds)), len(folds)
    if list(folds) != list(range(first, first + len(folds))):
        selection.folds = torch.tensor(list(folds), device=device)
    if isinstance(step, int):
        chosen = [selection.fold_models[fold] for fold in folds]
        step = torch.tensor(dropout_keys(chosen, step), device=device)
    selection.keys, selection.rows = step, rows


def dropout_keys(fold_models: Sequence[FoldModel], step: int) -> list[int]:
    """List one seed per fold model, from which the masks of all layers in a training step follow."""
    return [seed_of(*model, step) for model in fold_models]


def adapters(model: nn.Module) -> Iterator[tuple[str, StackedLora]]:
    """Yield (name, module) of every adapted layer, in the order of the network."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StackedLora))


def trainable(model: nn.Module) -> list[Parameter]:
    """List the stacked factors: for each layer A (n_folds, rank, in) and B (n_folds, out, rank).

    A fold that is not in the batch gets zero gradients.
    """
    return [parameter for _, module in adapters(model) for parameter in (module.A, module.B)]


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the frozen weights of adapted layers in the type that autocast multiplies them in.

    The products have the same bits as before, without a cast in every pass and with half the memory. The weights are
    rounded by this, so adapters have to be merged before.
    """
    for _, module in adapters(model):
        for parameter in module.base.parameters():
            parameter.data = parameter.data.to(dtype)


class Dropout(NamedTuple):
    """Which mask: of which folds, of which layer, how many it drops, of which images; keys None keep everything."""

    keys: Tensor | None
    layer: Tensor
    threshold: int
    rows: BatchRows


@dataclass(eq=False)
class Selection:
    """Which folds the next batches hold, and what their dropout masks follow from. All layers of a network share one.

    Attributes:
        fold_models: of all adapters; their masks follow from them.
        folds: one after the other, or (n,) on the device.
        n: how many folds.
        keys: (n,) `dropout_keys` of this step; None for no dropout.
        rows: which images of each fold's batch this process holds.
    """

    fold_models: tuple[FoldModel, ...]
    folds: slice | Tensor
    n: int
    keys: Tensor | None = None
    rows: BatchRows = WHOLE_BATCH


class StackedLora(nn.Module):
    """A frozen linear layer with one adapter per fold, perhaps behind a norm or an activation.

    Attributes:
        base: the frozen `nn.Linear` or 1x1 `nn.Conv2d`.
        A: (n_folds, rank, in) float32, or the base's float64.
        B: (n_folds, out, rank).
        output_gain: (out,) of a batch norm that has been folded into the base: it scales the adapter's output too.
        copies: A and B in the type of the products, kept up to date by the network; None where that is their own type.
        before: what is done to the input first; the backward pass does it again instead of keeping the result.
        norm: the norm, where that is a norm.
        triton: whether products and masks are computed by `finetune.kernels`, not by `finetune.products`.
    """

    def __init__(
        self,
        base: nn.Module,
        options: LoraOptions,
        *,
        generators: Sequence[torch.Generator],
        layer: int,
        selection: Selection,
    ) -> None:
        super().__init__()
        weight: Tensor = base.weight  # type: ignore[assignment]
        n_out, n_in = weight.shape[:2]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A = torch.empty(len(generators), options.rank, n_in, dtype=dtype)
        for fold_A, generator in zip(A, generators, strict=True):
            nn.init.kaiming_uniform_(fold_A, a=math.sqrt(5), generator=generator)
        self.base = base
        self.A = Parameter(A.to(weight.device))
        self.B = Parameter(torch.zeros(len(generators), n_out, options.rank, dtype=dtype, device=weight.device))
        self.output_gain: Tensor | None
        self.register_buffer("output_gain", None, persistent=False)
        self.copies: tuple[Tensor, Tensor] | None = None
        self.before: Before | None = None
        self.norm: DeferredNorm | None = None
        self.triton = False
        self.options, self.selection = options, selection
        # A tensor, so that torch.compile translates layers of one shape once and not once per number.
        self.layer = torch.tensor(layer, device=weight.device)

    @property
    def weight(self) -> Tensor:
        """Refused: a network that reads the weight multiplies by it directly, so the adapter would have no effect."""
        raise UserError(
            "this network reads the weights of an adapted layer instead of calling it, so an adapter there would "
            "never act (timm's BEiT, EVA and Swin V2 do so with attn.qkv). Leave that layer out of the LoRA targets."
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, ..., in) to (n, ..., out), or (n, in, h, w) to (n, out, h, w); n = chosen folds x images per fold."""
        now = self.selection
        if len(x) % now.n:
            raise ValueError(f"a batch of {len(x)} images cannot hold equally many of {now.n} folds")
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        if self.before != "layer_norm":
            # Cast here, so that the function below keeps the bf16 copy for its backward pass, not the float32 one.
            x = x.to(dtype)
        A, B = self._take(self.A), self._take(self.B)
        copies: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.copies is not None and self.copies[0].dtype == dtype:
            copies = self._take(self.copies[0]), None if self.output_gain is not None else self._take(self.copies[1])
        if self.output_gain is not None:
            B = B * self.output_gain[:, None]
        threshold = 0 if now.keys is None else drop_threshold(self.options.dropout)
        scale = self.options.alpha / self.options.rank / (1 - threshold / 256)
        dropout = Dropout(now.keys if threshold else None, self.layer, threshold, now.rows)
        norm = (None, None, 0.0) if self.norm is None else (self.norm.weight, self.norm.bias, self.norm.eps)
        y: Tensor = _AdaptedLinear.apply(
            x, self.base.weight, self.base.bias, A, B, *copies, scale, *dropout, dtype, self.before, *norm, self.triton
        )
        return y

    def _take(self, factors: Tensor) -> Tensor:
        """Take the chosen folds' part of (n_folds, ...); a copy only where they do not lie one after the other."""
        folds = self.selection.folds
        if isinstance(folds, Tensor):
            return factors.index_select(0, folds)
        return factors if self.selection.n == len(factors) else factors[folds]


class _AdaptedLinear(torch.autograd.Function):
    """y = W a + b + scale B A (m * a) for a 0/1 mask m; a is the input x, or what a norm or an activation makes of it.

    For the backward pass it keeps the input x and the projection A (m * a), of `rank` columns: no mask, no masked or
    scaled copy, no a, no cast of the frozen weights. Everything behind the norm is computed in `dtype`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (n, ..., in), or (n, in, h, w)
        weight: Tensor,  # (out, in) or (out, in, 1, 1)
        bias: Tensor | None,  # (out,)
        A: Tensor,  # (f, rank, in)
        B: Tensor,  # (f, out, rank)
        A_copy: Tensor | None,  # the same numbers in `dtype`, where they are at hand
        B_copy: Tensor | None,
        scale: float,
        keys: Tensor | None,  # (f,)
        layer: Tensor,  # ()
        threshold: int,
        rows: BatchRows,
        dtype: torch.dtype,
        before: Before | None,
        gain: Tensor | None,  # (in,) of a norm
        offset: Tensor | None,
        eps: float,
        triton: bool,
    ) -> Tensor:
        n_folds, channels = len(A), _channels(weight)
        ctx.dtypes = A.dtype, B.dtype
        products = kernels if triton else plain
        with torch.autocast(x.device.type, enabled=False):
            a = x
            if before == "layer_norm":
                a = torch.native_layer_norm(x, x.shape[-1:], gain, offset, eps)[0].to(dtype)
            elif before is not None:
                a = ACTIVATIONS[before].forward(x)
            bias = None if bias is None else bias.to(dtype)
            if weight.ndim == 4:
                y = F.conv2d(a, weight.to(dtype), bias).contiguous(memory_format=torch.channels_last)
            else:
                y = F.linear(a, weight.to(dtype), bias).contiguous()
            A = A.to(dtype) if A_copy is None else A_copy
            B = B.to(dtype) if B_copy is None else B_copy
            projected = products.project(
                _by_fold(a, n_folds, channels), A, keys, layer, threshold, rows
            )  # (f, t, rank)
            _by_fold(y, n_folds, channels).baddbmm_(projected, B.mT, alpha=scale)  # a view of y
        ctx.save_for_backward(x, projected, weight, A, B, keys, layer, gain, offset)
        ctx.scale, ctx.threshold, ctx.rows, ctx.triton = scale, threshold, rows, triton
        ctx.dtype, ctx.before, ctx.eps = dtype, before, eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, weight, A, B, keys, layer, gain, offset = ctx.saved_tensors
        n_folds, channels, dtype = len(A), _channels(weight), ctx.dtype
        products = kernels if ctx.triton else plain
        with torch.autocast(x.device.type, enabled=False):
            a = x
            if ctx.before == "layer_norm":
                a, mean, scale = torch.native_layer_norm(x, x.shape[-1:], gain, offset, ctx.eps)
                a = a.to(dtype)
            elif ctx.before is not None:
                a = ACTIVATIONS[ctx.before].forward(x)
            grad = _by_fold(grad, n_folds, channels)
            grad_projected, grad_B = products.backward_B(grad, B, projected)
            grad_a = None
            if ctx.needs_input_grad[0]:
                grad_a = (grad.flatten(0, 1) @ weight.flatten(1).to(dtype)).view(n_folds, -1, weight.shape[1])
            grad_A = products.backward_A_(
                _by_fold(a, n_folds, channels),
                grad_projected,
                A,
                grad_a,
                keys,
                layer,
                ctx.threshold,
                ctx.rows,
                ctx.scale,
            )
            grad_x = None if grad_a is None else grad_a.view(a.movedim(channels, -1).shape).movedim(-1, channels)
            if grad_x is not None and ctx.before == "layer_norm":
                grad_x = _aten.native_layer_norm_backward(
                    grad_x.to(x.dtype), x, x.shape[-1:], mean, scale, gain, offset, [True, False, False]
                )[0]
            elif grad_x is not None and ctx.before is not None:
                grad_x = ACTIVATIONS[ctx.before].backward(grad_x, x)
        grad_A, grad_B = grad_A.to(ctx.dtypes[0]) * ctx.scale, grad_B.to(ctx.dtypes[1]) * ctx.scale
        return grad_x, None, None, grad_A, grad_B, *(None,) * 13


def _channels(weight: Tensor) -> int:
    """Find the axis of channels in the input and output of a linear layer, or of a convolution."""
    return 1 if weight.ndim == 4 else -1


def _by_fold(x: Tensor, n_folds: int, channels: int) -> Tensor:
    """Reshape to contiguous (f, t, d): all tokens or pixels of a fold's images below each other.

    A view of x where its channels lie last in memory.
    """
    return x.movedim(channels, -1).reshape(n_folds, -1, x.shape[channels]).contiguous()


# -------------------------------------------------------------------------- norms and activations, computed twice


class _Elementwise(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # of the gradient of the output, and the input


def _gated_silu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _gated_silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return torch.cat([_aten.silu_backward(grad * value, gate), grad * F.silu(gate)], dim=-1)


_aten: Any = torch.ops.aten
Activation = Literal["gelu", "gelu_tanh", "silu", "gated_silu"]
Before = Activation | Literal["layer_norm"]
ACTIVATIONS: dict[str, _Elementwise] = {
    "gelu": _Elementwise(F.gelu, _aten.gelu_backward),
    "gelu_tanh": _Elementwise(partial(F.gelu, approximate="tanh"), partial(_aten.gelu_backward, approximate="tanh")),
    "silu": _Elementwise(F.silu, _aten.silu_backward),
    "gated_silu": _Elementwise(_gated_silu, _gated_silu_backward),
}


class AdaptedMlp(nn.Module):
    """The two layers of timm's `Mlp` or `GluMlp` under their names; the second applies the activation."""

    def __init__(self, mlp: Any, activation: Activation) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2
        self.fc2.before = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, ..., d) to (n, ..., d)."""
        y: Tensor = self.fc2(self.fc1(x))
        return y


class DeferredNorm(nn.Module):
    """A layer norm, under its name, that leaves the work to the adapted layer that it is followed by."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


def _keep_less(model: nn.Module) -> None:
    """Let adapted layers apply the norms and activations before them, whose results need not be kept then.

    Done where timm's code is known to use a result for nothing else.
    """
    for name, module in list(model.named_modules()):
        activation = _activation_of(module)
        if activation is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, AdaptedMlp(module, activation))
    for block in model.modules():
        if type(block) is Block:
            _defer_norm(block, "norm1", getattr(block.attn, "qkv", None) if type(block.attn) is Attention else None)
            _defer_norm(block, "norm2", getattr(block.mlp, "fc1", None) if isinstance(block.mlp, AdaptedMlp) else None)


def _activation_of(mlp: nn.Module) -> Activation | None:
    """Find what an MLP of timm does between its layers; None if it is not known, or more than an activation."""
    if type(mlp) not in (Mlp, GluMlp) or not isinstance(mlp.fc2, StackedLora) or isinstance(mlp.fc2.base, nn.Conv2d):
        return None
    if not isinstance(mlp.norm, nn.Identity):
        return None
    if isinstance(mlp, GluMlp):
        return "gated_silu" if isinstance(mlp.act, nn.SiLU) and not mlp.gate_last else None
    if isinstance(mlp.act, nn.GELU):
        return "gelu" if mlp.act.approximate == "none" else "gelu_tanh"
    return "silu" if isinstance(mlp.act, nn.SiLU) else None


def _defer_norm(block: nn.Module, name: str, layer: nn.Module | None) -> None:
    norm = getattr(block, name)
    plain_norm = type(norm) in (nn.LayerNorm, LayerNorm) and not getattr(norm, "_fast_norm", False)
    if isinstance(layer, StackedLora) and plain_norm and getattr(block.attn, "gate", None) is None:
        deferred = DeferredNorm(norm)
        setattr(block, name, deferred)
        # Not as a submodule: its weights keep the name that they have in the block.
        object.__setattr__(layer, "norm", deferred)
        layer.before = "layer_norm"
