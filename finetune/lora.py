"""How are the adapters of all folds trained at once over one frozen backbone?

LoRA (Hu et al. 2021, arXiv:2106.09685) adds a product of two thin matrices to a frozen layer: y = W x + s B A x with
s = alpha / rank. Here every fold has its own A and B, stacked along a leading fold axis. One batch holds the images of
all active folds, fold after fold: the frozen product sees them together, and one batched product applies each fold's
adapter to that fold's images. B starts at zero, so at step 0 the model computes exactly what the frozen one does.

Dropout masks are drawn again in the backward pass instead of being kept (`finetune.dropout`); why the layer is one
autograd function, and what that saves, is measured in docs/decisions/lora.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from features.console import UserError
from finetune.dropout import WHOLE_BATCH, BatchRows, drop_threshold, keep_mask, seed_of

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


def add_adapters(model: nn.Module, options: LoraOptions, *, n_folds: int, seed: int) -> tuple[str, ...]:
    """Freeze a backbone and replace each target layer, in place, by one with an adapter per fold.

    The model is put in eval mode and should stay there, as batch norms in training mode would mix the folds' images;
    `select_folds` switches dropout on and off. A fold's initial values depend on (seed, fold), not on the number of
    folds.

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
    targets = options.targets or default_targets(model)
    options, names = replace(options, targets=targets), _find_targets(model, targets)
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
    """Find the pattern in `FAMILY_TARGETS` that matches most of the model's module names."""
    names = [name for name, _ in model.named_modules()]
    return max(FAMILY_TARGETS.values(), key=lambda targets: sum(bool(re.fullmatch(targets, name)) for name in names))


def _find_targets(model: nn.Module, targets: str) -> tuple[str, ...]:
    """Find the names of the modules to adapt; each has to be an `nn.Linear` or a 1x1 `nn.Conv2d`."""
    modules = dict(model.named_modules())
    names = tuple(name for name in modules if re.fullmatch(targets, name))
    if not names:
        # One example of all names that differ in their numbers only.
        examples = {re.sub(r"\d+", "0", name): name for name, module in modules.items() if _is_linear(module)}
        raise UserError(
            f"LoRA targets '{targets}' match no module of this {type(model).__name__}. They must match a whole name, "
            f"such as {', '.join(list(examples.values())[-8:])}."
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
    model: nn.Module, folds: Sequence[int], *, step: int | None = None, rows: BatchRows = WHOLE_BATCH
) -> None:
    """Set which folds the next batches hold; this stays so until it is called again.

    Args:
        model: with adapters.
        folds: the active folds; a batch holds the same number of images of each, fold after fold in this order.
        step: any number that identifies a training step: dropout masks follow from it. None switches dropout off.
        rows: which images of each fold's batch this process holds, where several processes share it.
    """
    adapted = [module for _, module in adapters(model)]
    index = torch.tensor(list(folds), device=adapted[0].A.device)
    keys = None if step is None else torch.tensor([seed_of(adapted[0].seed, fold, step) for fold in folds])
    for module in adapted:
        module.folds, module.index, module.keys, module.rows = tuple(folds), index, keys, rows


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
        for fold_A, generator in zip(A, generators, strict=True):
            nn.init.kaiming_uniform_(fold_A, a=math.sqrt(5), generator=generator)
        self.base = base
        self.A = Parameter(A.to(weight.device))
        self.B = Parameter(torch.zeros(len(generators), n_out, options.rank, dtype=dtype, device=weight.device))
        self.options, self.seed, self.layer = options, seed, layer
        self.folds = tuple(range(len(generators)))
        self.index = torch.arange(len(generators), device=weight.device)
        self.keys: Tensor | None = None  # (n_active,) seeds of this step's masks; None: no dropout
        self.rows = WHOLE_BATCH

    @property
    def weight(self) -> Tensor:
        """Refused: a network that reads the weight multiplies by it directly, so the adapter would have no effect."""
        raise UserError(
            "this network reads the weights of an adapted layer instead of calling it, so an adapter there would "
            "never act (timm's BEiT, EVA and Swin V2 do so with attn.qkv). Leave that layer out of the LoRA targets."
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, ..., in) to (n, ..., out), or (n, in, h, w) to (n, out, h, w); n = active folds x images per fold."""
        if len(x) % len(self.folds):
            raise ValueError(f"a batch of {len(x)} images cannot hold equally many of {len(self.folds)} folds")
        if torch.is_autocast_enabled(x.device.type):
            # Cast here, so that the function below keeps the bf16 copy for its backward pass, not the float32 one.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        A: Tensor = self.A
        B: Tensor = self.B
        if len(self.folds) < len(A) or self.folds != tuple(range(len(A))):
            A, B = A.index_select(0, self.index), B.index_select(0, self.index)
        threshold = 0 if self.keys is None else drop_threshold(self.options.dropout)
        scale = self.options.alpha / self.options.rank / (1 - threshold / 256)
        is_convolution = isinstance(self.base, nn.Conv2d)
        if is_convolution:
            x = x.permute(0, 2, 3, 1)  # contiguous where the images are channels_last
        y: Tensor = _AdaptedLinear.apply(
            x, self.base.weight, self.base.bias, A, B, scale, self.keys, self.layer, threshold, self.rows
        )
        return y.permute(0, 3, 1, 2) if is_convolution else y


class _AdaptedLinear(torch.autograd.Function):
    """y = W x + b + scale B A (m * x) for a 0/1 mask m.

    For the backward pass it keeps the input x and the projection A (m * x), of `rank` columns: no mask, no masked or
    scaled copy, no cast of the frozen weights. Everything is computed in the dtype of x.
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
        rows: BatchRows,
    ) -> Tensor:
        n_folds, dtype = len(A), x.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            if weight.ndim == 4:
                y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(dtype), bias).permute(0, 2, 3, 1)
            else:
                y = F.linear(x, weight.to(dtype), bias)
            kept = _by_fold(x, n_folds)
            if threshold and keys is not None:
                kept = kept * _mask(kept, keys, layer, threshold, rows)
            projected = torch.bmm(kept, A.to(dtype).mT)  # (f, t, rank)
            y = _by_fold(y, n_folds).baddbmm_(projected, B.to(dtype).mT, alpha=scale).view(y.shape)
        ctx.save_for_backward(x, projected, weight, A, B, keys)
        ctx.scale, ctx.layer, ctx.threshold, ctx.rows = scale, layer, threshold, rows
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, weight, A, B, keys = ctx.saved_tensors
        n_folds, dtype = len(A), x.dtype
        with torch.autocast(x.device.type, enabled=False):
            grad, kept = _by_fold(grad, n_folds), _by_fold(x, n_folds)
            grad_projected = torch.bmm(grad, B.to(dtype))  # (f, t, rank)
            grad_rows = mask = None
            if ctx.needs_input_grad[0]:
                grad_rows = (grad.flatten(0, 1) @ weight.flatten(1).to(dtype)).view(kept.shape)
            if ctx.threshold and keys is not None:
                # Drawn in the shape of the gradient: asked for a mask in the shape of the input again, torch.compile
                # would draw it once, in the forward pass, and keep it.
                like = kept if grad_rows is None else grad_rows
                mask = _mask(like, keys, ctx.layer, ctx.threshold, ctx.rows)
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


def _by_fold(x: Tensor, n_folds: int) -> Tensor:
    """Reshape (n, ..., d) to (f, t, d): all tokens or pixels of a fold's images below each other."""
    return x.reshape(n_folds, -1, x.shape[-1])


def _mask(like: Tensor, keys: Tensor, layer: int, threshold: int, rows: BatchRows) -> Tensor:
    mask: Tensor = keep_mask(like, keys, layer=layer, threshold=threshold, **rows._asdict())
    return mask
