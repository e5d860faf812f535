"""How does a network's output become embeddings: its own, of the central cells, of middle stages?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from extract.keymaps import TIMM_RAISES
from extract.registry import Backbone, Pooling
from features.console import UserError


def center_window(grid: int) -> slice:
    """Find the central cells along one axis: 30 % is left out on either side, and at least one cell is kept.

    >>> center_window(16), center_window(7)
    (slice(5, 11, None), slice(2, 5, None))
    """
    margin = min(round(0.3 * grid), (grid - 1) // 2)
    return slice(margin, grid - margin)


# The feature maps of the pass that a thread makes, behind each of the middle stages; None between passes.
_middle: ContextVar[list[Tensor] | None] = ContextVar("middle", default=None)


def middle_stages(model: nn.Module) -> list[str]:
    """Name the stages behind which `mid` is taken: those at 5/7 and 6/7 of a network that makes feature maps.

    They are EfficientNet's fifth and sixth of seven, and the third of four of ResNet, ConvNeXt and Swin. Empty for
    transformers with tokens, for networks whose stages stand in no row of at least four that timm names as usual, and
    for a user's own that names its poolings.
    """
    prefix, named = "", _own_widths(model)
    if named is not None:
        if getattr(model, "poolings", None) is not None or not set(named) <= {"pooled", "center"}:
            return []
        prefix, model = "network.", model.get_submodule("network")
    if _has_tokens(model):
        return []
    rows = [
        [f"{name}.{child}" for child, _ in row.named_children()]
        for name in ("blocks", "stages", "layers")
        if isinstance(row := getattr(model, name, None), nn.Sequential | nn.ModuleList)
    ]
    rows.append([name for name, _ in model.named_children() if re.fullmatch(r"(layer|s)\d", name)])
    names = next((row for row in rows if len(row) >= 4), [])
    depths = dict.fromkeys(round(len(names) * share / 7) for share in (5, 6))
    return [prefix + names[depth - 1] for depth in depths if 0 < depth < len(names)]


def keep_middle(model: nn.Module, backbone: Backbone) -> None:
    """Have the middle stages hand their feature maps to `forward_poolings`; note their widths in `model.middle`."""
    names = middle_stages(model)
    hooks = [model.get_submodule(name).register_forward_hook(_hand_over) for name in names]
    kept: list[Tensor] = []
    if names:
        size = backbone.input_size
        token = _middle.set(kept)
        try:
            with torch.inference_mode():
                model.forward_features(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))  # type: ignore[operator]
        except TIMM_RAISES:
            kept.clear()  # `check_forward` says what is wrong
        finally:
            _middle.reset(token)
    maps = [features for features in kept if isinstance(features, Tensor) and features.ndim == 4]
    if len(maps) != len(names):
        for hook in hooks:
            hook.remove()
    channels = [_as_cells(model, features).shape[3] for features in maps]
    model.middle = sum(channels) if len(maps) == len(names) else 0  # type: ignore[assignment]


def _hand_over(stage: nn.Module, inputs: Any, features: Any) -> None:
    if (kept := _middle.get()) is not None:
        kept.append(features)


def pooling_widths(model: nn.Module, backbone: Backbone) -> dict[str, int]:
    """Give the width of every pooling that `forward_poolings` returns, in its order, which a store writes them in."""
    own = _own_widths(model)
    if own is not None:
        return own | ({"mid": pooling_width(model, "mid")} if getattr(model, "middle", 0) else {})
    return {pooling: pooling_width(model, pooling) for pooling in _poolings(model, backbone)}


def _own_widths(model: nn.Module) -> dict[str, int] | None:
    """Give the widths of the poolings of a `CustomNetwork`; None for networks of timm."""
    widths: dict[str, int] | None = getattr(model, "widths", None)
    return widths


def forward_poolings(model: nn.Module, backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Run one forward pass and give every pooling of it.

    Args:
        model: from `build_model`, on the images' device.
        backbone: its record.
        images: (b, 3, h, h) normalised.

    Returns:
        name -> (b, d) float32, in the order of `pooling_widths`. `cls`, `mean` and `center` are taken after the final
        norm; `center` averages the central cells of the patch grid (`center_window`); `pooled` is the model's own.
        `mid` averages the central cells of the feature maps behind the `middle_stages`, side by side. A network of the
        user's own may have others.

    Raises:
        UserError: a model whose output is neither a square patch grid nor a feature map.
    """
    middle: list[Tensor] = []
    token = _middle.set(middle)
    try:
        features = model.forward_features(images)  # type: ignore[operator]
    finally:
        _middle.reset(token)
    if isinstance(features, Mapping):  # a `CustomNetwork` pools by itself
        own = {pooling: embedding.float() for pooling, embedding in features.items()}
        return own | ({"mid": _middle_cells(model, middle).float()} if getattr(model, "middle", 0) else {})
    return _pool(model, backbone, features, middle)


def output_poolings(output: Any, *, n_prefix_tokens: int = 0) -> dict[str, Tensor]:
    """Make poolings of what a network returns that is none of timm's.

    Args:
        output: embeddings (b, d), tokens (b, t, d), feature maps (b, c, h, w), or a dictionary of embeddings.
        n_prefix_tokens: class and register tokens before those of the patches.

    Returns:
        name -> (b, d), of the dictionary as they are; see `Backbone.custom`.

    Raises:
        ValueError: none of these.
    """
    if isinstance(output, Mapping):
        if not output or not all(isinstance(values, Tensor) for values in output.values()):
            raise ValueError(f"its output has {', '.join(map(str, output)) or 'nothing'}: not tensors alone")
        return dict(output)
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        raise ValueError(f"its output is {shape}")
    if output.ndim == 2:
        return {"pooled": output}
    if output.ndim == 4:
        cells = output.permute(0, 2, 3, 1)
        return {"pooled": _mean(cells), "center": _central(cells)}
    grid = _square_grid(output[:, n_prefix_tokens:])
    if grid is None:
        n = output.shape[1]
        fits = f"; n_prefix_tokens={n - math.isqrt(n) ** 2} would leave {math.isqrt(n)} x {math.isqrt(n)}" if n else ""
        raise ValueError(f"its output is {shape}: without {n_prefix_tokens} prefix tokens it is no square grid{fits}")
    first = {"cls": output[:, 0]} if n_prefix_tokens else {}
    return first | {"mean": _mean(grid), "center": _central(grid)}


def _square_grid(tokens: Tensor) -> Tensor | None:
    """Lay tokens (b, n, d) out as cells (b, rows, columns, d); None where they are no square."""
    edge = math.isqrt(tokens.shape[1])
    if not edge or edge * edge != tokens.shape[1]:
        return None
    return tokens.reshape(len(tokens), edge, edge, -1)


def _pool(model: nn.Module, backbone: Backbone, features: Any, middle: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    cells = _cells(model, backbone, features)  # (b, rows, columns, d)
    pooled: dict[str, Tensor] = {}
    for pooling in _poolings(model, backbone):
        if pooling == "pooled":
            pooled[pooling] = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        elif pooling == "cls":
            pooled[pooling] = _head_norm(model, features[:, 0])
        elif pooling == "mid":
            pooled[pooling] = _middle_cells(model, middle)
        else:
            pooled[pooling] = _head_norm(model, _central(cells) if pooling == "center" else _mean(cells))
    return {pooling: embedding.float() for pooling, embedding in pooled.items()}


def _central(cells: Tensor) -> Tensor:
    window = center_window(int(cells.shape[1]))
    return _mean(cells[:, window, window])


def _mean(cells: Tensor) -> Tensor:
    return cells.mean(dim=(1, 2), dtype=torch.float32)  # in float32: under autocast the cells are half precision


def _channels_last(model: Any) -> bool:
    return getattr(model, "output_fmt", "NCHW") == "NHWC"


def _as_cells(model: Any, features: Tensor) -> Tensor:
    last = _channels_last(model)
    if _own_widths(model) is not None:  # which does not say; maps are square
        last = features.shape[1] == features.shape[2] != features.shape[3]
    return features if last else features.permute(0, 2, 3, 1)


def _middle_cells(model: nn.Module, middle: Sequence[Tensor]) -> Tensor:
    return torch.cat([_central(_as_cells(model, one)) for one in middle], dim=1)


def _cells(model: Any, backbone: Backbone, features: Any) -> Tensor:
    if not isinstance(features, Tensor):
        raise UserError(
            f"{backbone.name}: {backbone.arch} returns features as a {type(features).__name__} of several, not as one "
            "grid of patch tokens or feature map. Take another model."
        )
    if features.ndim == 4:
        return _as_cells(model, features)
    if features.ndim == 3 and _has_tokens(model):
        grid = _square_grid(features[:, model.num_prefix_tokens :])  # class and register tokens come first
        if grid is not None:
            return grid
    raise UserError(
        f"{backbone.name}: {backbone.arch} returns features of shape {tuple(features.shape)}, which are neither a "
        "square grid of patch tokens nor a feature map. Take another model."
    )


def _poolings(model: Any, backbone: Backbone) -> tuple[str, ...]:
    pooled = ("pooled",) if backbone.card_pooling == "pooled" else ()
    if not _has_tokens(model):
        return (*pooled, "center", *["mid"] * bool(getattr(model, "middle", 0)))
    return (*pooled, *(("cls",) if _has_class_token(model) else ()), "mean", "center")


def default_pooling(model: Any) -> Pooling:
    """Find how the model itself turns features into an embedding, for models outside the registry."""
    if not _has_tokens(model) or getattr(model, "dist_token", None) is not None:  # two tokens, averaged
        return "pooled"
    pool = getattr(model, "global_pool", "")
    if pool in ("token", "") and _has_class_token(model):
        return "cls"
    return "mean" if pool in ("avg", "") else "pooled"


def pooling_width(model: Any, pooling: str) -> int:
    if pooling == "mid":
        return int(model.middle)
    width = getattr(model, "head_hidden_size", model.num_features) if pooling == "pooled" else model.num_features
    return int(width)


def _has_tokens(model: Any) -> bool:
    return hasattr(model, "num_prefix_tokens")


def _has_class_token(model: Any) -> bool:
    return getattr(model, "cls_token", None) is not None


def _head_norm(model: Any, embedding: Tensor) -> Tensor:
    """Apply the norm that models trained on the patch mean have after the pooling (`fc_norm`); others have none."""
    norm = getattr(model, "fc_norm", None)
    normed: Tensor = embedding if norm is None else norm(embedding)
    return normed
