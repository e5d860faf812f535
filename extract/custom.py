"""How does a network of the user's own become a backbone like any other?

The user writes a Python file with a function that returns `Backbone.custom(network, name=..., ...)`, and names the file
as the model. `CustomNetwork` holds the network and answers as timm's networks do, so nothing behind `build_model` knows
that it is none of timm's. The file is run because the user names it, and never because a run or a store does.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import operator
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from extract.pooling import output_poolings
from extract.registry import BACKBONES, Backbone
from features.console import UserError, nearest
from features.device import out_of_memory

Poolings = Callable[[nn.Module, Tensor], Any] | Sequence[str] | str | None
DEFAULT_FUNCTION = "backbone"
_FILE = re.compile(r"(?P<file>.+\.py)(:(?P<function>\w+))?")
_MODULE = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_EXPECTED = "a function backbone(), without arguments, that returns Backbone.custom(network, name=..., size=...)"
# How the paths of files begin that are not the user's: the libraries, Python's own, and mitofm's.
_NOT_THEIRS = (
    f"{Path(torch.__file__).parent.parent}/",
    f"{Path(importlib.__file__).parent.parent}/",
    f"{Path(__file__).parent}/",
    "<",
)


class NetworkError(UserError, RuntimeError):
    """What the forward of a user's own network raised. Where networks are tried, it is caught as what torch raises."""


class CustomNetwork(nn.Module):
    """A network of the user's own that answers as timm's do.

    Attributes:
        network: the user's module, under whose names its tensors are stored, after `network.`.
        poolings, n_prefix_tokens: what its output means, see `custom_backbone`.
        card_pooling: the pooling that is its embedding.
        widths: name -> width of every pooling, in the order of the output.
    """

    def __init__(self, network: nn.Module, poolings: Poolings, n_prefix_tokens: int) -> None:
        super().__init__()
        self.network = network
        self.poolings, self.n_prefix_tokens = poolings, n_prefix_tokens
        self.card_pooling, self.widths = "", dict[str, int]()

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Compute every pooling, name -> (b, d), of normalised images (b, 3, h, w).

        Raises:
            NetworkError: an exception in the user's code, or an output that is not as described.
        """
        try:
            return self._named(images)
        except Exception as error:
            if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory(error)):
                raise
            raise NetworkError(
                f"{_kind(self.network)} cannot embed images of the shape {tuple(images.shape)}, {images.dtype} on "
                f"{images.device.type} ({raised(error)}). It was tried on two images, float32 on cpu, and has to take "
                "any number of them, on a GPU and under autocast too. Mend its file, and run the command again."
            ) from error

    def _named(self, images: Tensor) -> dict[str, Tensor]:
        if callable(self.poolings):
            return output_poolings(self.poolings(self.network, images), n_prefix_tokens=self.n_prefix_tokens)
        output, names = self.network(images), self.poolings
        if names is None:
            return output_poolings(output, n_prefix_tokens=self.n_prefix_tokens)
        names = (names,) if isinstance(names, str) else tuple(names)
        outputs = [output] if isinstance(output, Tensor) else list(output)
        if isinstance(output, Mapping):
            outputs = [output[name] for name in names]
        if len(outputs) != len(names):
            raise ValueError(f"forward returns {len(outputs)} outputs, and poolings has {len(names)} names")
        return output_poolings(dict(zip(names, outputs, strict=True)))

    def forward_head(self, features: Mapping[str, Tensor], *, pre_logits: bool = True) -> Tensor:
        """Choose the embedding (b, d) from the poolings."""
        return torch.cat([features[name] for name in self.card_pooling.split("+")], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the embedding (b, d) of normalised images (b, 3, h, w)."""
        return self.forward_head(self.forward_features(images))


def custom_backbone(
    network: nn.Module,
    *,
    name: str,
    size: int,
    resize: int | None,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    mpp: float | Sequence[float] | None,
    poolings: Poolings,
    n_prefix_tokens: int,
    card_pooling: str | None,
    weights: Path | str | None,
) -> Backbone:
    """Make the record of a network of the user's own; `Backbone.custom` describes the arguments."""
    if not isinstance(network, nn.Module):
        raise UserError(f"Backbone.custom takes a torch.nn.Module, and got {_kind(network)}. Give the network itself.")
    require_allowed(name)
    try:
        size, n_prefix_tokens = operator.index(size), operator.index(n_prefix_tokens)
        resize = size if resize is None else operator.index(resize)
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        known = None if mpp is None else tuple(map(float, mpp if isinstance(mpp, Sequence) else [mpp]))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name}: size {size!r}, resize {resize!r}, n_prefix_tokens {n_prefix_tokens!r}, mean {mean!r}, "
            f"std {std!r}, mpp {mpp!r}: one is no number ({error}). Expected whole numbers of pixels "
            "and tokens, three numbers each for mean and std, and one or more for mpp."
        ) from None
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise UserError(
            f"{name}: mean {mean} and std {std}: expected three numbers each, for RGB in 0..1, std above 0."
        )
    if interpolation not in ("bicubic", "bilinear"):
        raise UserError(f"{name}: interpolation {interpolation!r}: expected bicubic or bilinear.")
    if not 1 <= size <= min(resize, 2_048) or n_prefix_tokens < 0:
        raise UserError(
            f"{name}: size {size}, resize {resize}, n_prefix_tokens {n_prefix_tokens}: expected 1 to 2,048 pixels, no "
            "less for resize, and no tokens or more."
        )
    if card_pooling is not None and not isinstance(card_pooling, str):
        raise UserError(f"{name}: card_pooling {card_pooling!r}: expected a name, or several joined by '+'.")
    if next(network.parameters(), None) is None:
        raise UserError(f"{name}: this {_kind(network)} has no parameters: there is no network to run.")
    own = CustomNetwork(_copied(network, name).float(), poolings, n_prefix_tokens).cpu().eval()
    widths = _tried(own, name, size)
    own.widths = widths
    card = card_pooling or next(iter(widths))
    if unknown := [part for part in card.split("+") if part not in widths]:
        raise UserError(f"{name}: card_pooling {card!r}: its output has {', '.join(widths)}, and no {unknown[0]}.")
    own.card_pooling = card
    return Backbone(
        name=name,
        title=name,
        network=own.requires_grad_(False),
        revision="local",
        weight_file="" if weights is None else str(weights),
        sha256=state_digest(network) if weights is None else None,
        arch=type(network).__qualname__,
        kwargs={"n_prefix_tokens": n_prefix_tokens},
        input_size=size,
        resize=resize,
        mean=mean,
        std=std,
        interpolation=interpolation,  # type: ignore[arg-type]
        mpp=known,
        card_pooling=card,  # type: ignore[arg-type]
        n_parameters=sum(parameter.numel() for parameter in network.parameters()),
        embedding_dim=sum(widths[part] for part in card.split("+")),
        gflops=None,
        licence="the user's own",
    )


def state_digest(network: nn.Module) -> str:
    """Compute the SHA-256 over a network's tensors, in order: name, type, shape and bytes of each."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, Tensor):  # modules may add what they like
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_allowed(name: str) -> None:
    """Raise UserError if a model of the user's own cannot be called so."""
    if isinstance(name, str) and name in BACKBONES:
        raise UserError(f"{name!r} is a model that mitofm knows: call your own otherwise, such as 'my-{name}'.")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name or name == "samples" or is_code(name):
        raise UserError(
            f"{name!r} cannot name a model of your own in a feature store: expected at most 100 letters, digits, '.', "
            "'_' and '-', not 'samples', and not the name of a file."
        )


def require_distinct(backbones: Sequence[Backbone]) -> None:
    """Raise UserError if two backbones have one name: their embeddings would be one entry of a store."""
    counts = Counter(backbone.name for backbone in backbones)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"two models are called {twice[0]!r}. Name each once, and give those of your own other names.")


# -------------------------------------------------------------------------------------------------------------- trying


def _copied(network: nn.Module, name: str) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as error:
        _, held = _uncopied(network)
        raise UserError(
            f"{name}: this {_kind(network)} cannot be copied, as training of several folds needs{held} "
            f"({raised(error)}). Remove what its attributes hold besides modules, tensors and numbers."
        ) from error


def _require_nothing_kept(network: nn.Module, name: str) -> None:
    """Raise UserError if a network cannot be copied any more, now that it has been run: its forward keeps something."""
    try:
        copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    except Exception as error:
        module, held = _uncopied(network)
        raise UserError(
            f"{name}: {_forward_of(module, held)}forward of {_kind(module)} keeps what cannot be copied{held} "
            f"({type(error).__name__}). Let it keep nothing in the module between calls: several threads call it, and "
            "training copies it."
        ) from error


def _uncopied(network: nn.Module) -> tuple[nn.Module, str]:
    """Find the module, and say in which attribute, that holds what cannot be copied; the network where none does."""
    for path, module in network.named_modules():
        for attribute, value in vars(module).items():
            try:
                copy.deepcopy(None if attribute == "_modules" else value)
            except Exception:  # noqa: BLE001 - whatever it is, a copy fails of it
                return module, f": self.{attribute} of {path or 'the network'}"
    return network, ""


def _forward_of(module: nn.Module, held: str) -> str:
    """Say which line of a module's forward mentions an attribute, where its source is at hand."""
    try:
        lines, first = inspect.getsourcelines(type(module).forward)
        file = inspect.getsourcefile(type(module).forward)
    except (OSError, TypeError):
        return ""
    attribute = held.removeprefix(": self.").partition(" ")[0]
    line = next((k for k, text in enumerate(lines) if re.search(rf"\.{attribute}\b", text)), 0)
    return f"{file}, line {first + line}: "


def _tried(own: CustomNetwork, name: str, size: int) -> dict[str, int]:
    """Embed two images in eval mode, check what comes out, and give the widths of the poolings.

    Raises:
        UserError: an exception, an output that cannot be pooled, is not finite, does not follow from the parameters, or
            is another one when the same images come again.
    """
    line = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
    images = torch.cat([line, -line])
    try:
        # With gradients, of which only it is asked whether there are any: what a backward pass needs is not kept.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda kept: kept):
            own.requires_grad_(True)
            found = own.forward_features(images)
    except NetworkError as error:
        raise UserError(
            f"{name}: {_kind(own.network)} cannot embed an image of {size} px ({raised(error)}). If it takes another "
            "size, say so in Backbone.custom(..., size=...); if forward gives something else than (b, d), "
            "(b, tokens, d), (b, c, h, w) or a dictionary of (b, d), say what in Backbone.custom(..., poolings=...)."
        ) from error
    for pooling, values in found.items():
        if not re.fullmatch(r"\w+", pooling, re.ASCII) or pooling in ("card", "samples"):
            raise UserError(f"{name}: {pooling!r} cannot name a pooling: expected letters, digits and '_', not 'card'.")
        if values.ndim != 2 or len(values) != 2 or values.shape[1] < 1 or not values.is_floating_point():
            raise UserError(
                f"{name}: of two images, {pooling} is {values.dtype} of the shape {tuple(values.shape)}; expected "
                "floats of the shape (2, d), a row for each image."
            )
        if not bool(values.isfinite().all()):
            raise UserError(
                f"{name}: {pooling} holds NaN or infinity for images in the range -1 to 1. Are all weights loaded?"
            )
        if bool((values[0] == values[1]).all()):
            raise UserError(
                f"{name}: {pooling} is the same for two images that have nothing in common. Are all weights loaded?"
            )
        if not values.requires_grad:
            raise UserError(
                f"{name}: {pooling} does not follow from the parameters of the network that is given, so it could not "
                "be fine-tuned. Leave torch.no_grad and detach out of forward; a function given as poolings computes "
                "with the network that is passed to it, and with no other."
            )
    _require_nothing_kept(own.network, name)
    with torch.no_grad():
        again = own.forward_features(images)
    for pooling, values in found.items():
        largest = float(values.detach().abs().max())
        if not torch.allclose(again[pooling], values, rtol=1e-3, atol=1e-4 * largest):
            raise UserError(
                f"{name}: {pooling} is another one when the same images come again. Leave out of forward what is "
                "random, such as F.dropout without training=self.training, and what it keeps from call to call."
            )
    return {pooling: int(values.shape[1]) for pooling, values in found.items()}


def _kind(value: object) -> str:
    return type(value).__qualname__


def raised(error: BaseException) -> str:
    """Say what was raised, and in which line of the user's own code."""
    error = error.__cause__ or error if isinstance(error, NetworkError) else error
    text = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THEIRS)
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}, `{frames[-1].line}`: {text}" if frames else text


# -------------------------------------------------------------------------------------------------------------- loading


def is_code(name: str) -> bool:
    """Whether a model's name is that of Python code, which would be run.

    >>> [is_code(name) for name in ("nets/net.py", "net.py:build", "nets.ctranspath:backbone", "uni", "hf-hub:a/b")]
    [True, True, True, False, False]
    """
    return bool(_FILE.fullmatch(name) or _MODULE.fullmatch(name))


def named_again(where: object, recorded: str, given: str | None) -> str:
    """Return the code that the user names now, for a run whose record names `recorded`.

    Raises:
        UserError: none is named.
    """
    if given is None or not is_code(given):
        raise UserError(
            f"{where} was begun with a model of a user's own, {recorded}. Code is run only if you name it, not because "
            "a run does: give its file again by `model=PATH`."
        )
    return given


def run_code(name: str) -> Backbone:
    """Run the Python file or module that the user names, and give the record that its function returns.

    Args:
        name: `path/to/model.py`, `path/to/model.py:function`, or `module:function` as it is imported in the working
            directory. The function is called without arguments.

    Raises:
        UserError: no such file or function, an exception in it, or no record; and as `Backbone.custom`.
    """
    path = _FILE.fullmatch(name)
    match = path or _MODULE.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} names no code")
    function = match["function"] or DEFAULT_FUNCTION
    with _importable(Path(path["file"]).resolve().parent if path else Path.cwd()):
        try:
            file, module = _run_file(Path(path["file"])) if path else _import(match["module"])
            made = _call(module, function, file)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"{name}: {raised(error)}. Mend the file, and run the command again.") from error
    if not isinstance(made, Backbone):
        raise UserError(
            f"{file}: {function}() returned {_kind(made)}, expected a Backbone: let it return "
            "Backbone.custom(network, name=..., size=...)."
        )
    require_allowed(made.name)
    if made.network is None:
        return made  # a record of a network that timm builds, as those of the registry
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return replace(made, revision=f"{file.name}:{function}", kwargs={**made.kwargs, "file_sha256": digest})


def _run_file(path: Path) -> tuple[Path, ModuleType]:
    if not path.is_file():
        raise UserError(f"{path}: no such file. A model of your own is a Python file with {_EXPECTED}.")
    file = path.resolve()
    name = f"mitofm_model_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # its name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and copies look for its classes
    spec.loader.exec_module(module)
    return file, module


def _import(name: str) -> tuple[Path, ModuleType]:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(
            f"{name}: no such Python module in {Path.cwd()} or installed. A file is named as path/to/it.py."
        )
    return Path(spec.origin), importlib.import_module(name)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's file import those beside it, as when Python runs it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _call(module: ModuleType, name: str, file: Path) -> object:
    function = getattr(module, name, None)
    if not callable(function):
        functions = inspect.getmembers(module, inspect.isfunction)
        own = [key for key, value in functions if value.__module__ == module.__name__]
        listed = f" (it has {', '.join(own)})" if own else ""
        raise UserError(
            f"{file} has no function {name!r}{listed}.{nearest(name, own)} "
            f"Expected {_EXPECTED}; one of another name is named as {file.name}:function."
        )
    return function()
