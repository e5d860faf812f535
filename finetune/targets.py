"""Which layers of a network get adapters, where the user names none?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import nn

# Beside a network's blocks: they make it another size, weigh its channels, or classify.
_NO_BLOCK = re.compile(r"downsample|shortcut|squeeze|\bse\b|head|classifier|embed")


def find_targets(model: nn.Module, families: Iterable[str], is_linear: Callable[[nn.Module], bool]) -> str:
    """Find the regular expression of the whole names of the modules to adapt.

    It is the first of: the family's pattern that matches most names; of a user's own network, the pattern that matches
    most names behind some prefix, if all that it matches can be adapted; the linear layers and 1x1 convolutions that
    stand in numbered blocks, such as `encoder.layer.3.mlp.0`. Left out are the parts of torch's own modules, such as
    `nn.MultiheadAttention`, which read their weights without calling them.

    Args:
        model: the network.
        families: patterns of known families.
        is_linear: whether a module can be adapted.
    """
    modules = dict(model.named_modules())

    def matched(pattern: str) -> list[str]:
        return [name for name in modules if re.fullmatch(pattern, name)]

    plain = max(families, key=lambda pattern: len(matched(pattern)))
    if matched(plain) or not any(name == "network" for name, _ in model.named_children()):
        return plain
    prefixed = [rf"(?:.+\.)?{pattern}" for pattern in families]
    best = max(prefixed, key=lambda pattern: len(matched(pattern)))
    if matched(best) and all(is_linear(modules[name]) for name in matched(best)):
        return best
    numbered = [
        name
        for name, module in modules.items()
        if is_linear(module) and re.search(r"\d", name.rpartition(".")[0]) and not _NO_BLOCK.search(name)
    ]
    names = [name for name in numbered if not of_torch(modules, name)]
    return "|".join(map(re.escape, names)) or plain


def of_torch(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module is a part of one of torch's own, which may read its weights without calling it.

    Args:
        modules: name -> module of the network.
        name: of the module.
    """
    parent = modules[name.rpartition(".")[0]]
    lists = nn.Sequential | nn.ModuleList | nn.ModuleDict
    return type(parent).__module__.startswith("torch.nn") and not isinstance(parent, lists)
