"""Which tensors of a checkpoint file are the network's?

Training code wraps a network in dictionaries (`state_dict`, `teacher`, …) and puts prefixes before its tensors' names
(`module.`, `backbone.`, …). No list of wrappers is kept here: every dictionary of the file with every prefix in it is a
candidate, and the one whose names and shapes fit the network is taken. Of several that fit, a teacher or a moving
average (EMA) is taken first and a student last, as DINO and timm do. It is said what was taken, what was left out, and
what else is there.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from extract.keymaps import KeyMapError, StateDict
from features.console import UserError, say

# Training scripts keep their options and figures beside the weights. These classes only hold values: unpickling a
# Namespace fills its attributes, and a numpy scalar or array is made of a dtype and bytes. None of it calls code that
# the file names; every other class stays refused.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *{type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"},
    *(
        (value.__reduce__()[0], f"{package}.multiarray.{name}")
        for name, value in (("scalar", np.float64()), ("_reconstruct", np.empty(0)))
        for package in ("numpy.core", "numpy._core")  # numpy 1 and 2
    ),
]
_MAX_DEPTH = 6  # of dictionaries in dictionaries; an object of pickle may hold itself
# What a file of another kind begins with, what it is, and what to do.
_OTHER_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer, a line of text in place of the weights", "Run `git lfs pull`"),
    (b"<", "a web page", "Download the file itself; the page may say that you have to log in first"),
    (b"{", "JSON, such as a configuration or the index of a model in several files", "Give a file of tensors"),
    (b"\x89HDF", "HDF5, as Keras writes it", "Convert it to a PyTorch checkpoint"),
    (b"\x08", "a protobuf file, such as an ONNX or TensorFlow graph", "Give the PyTorch checkpoint it was made from"),
    (b"\x93NUMPY", "a numpy array", "Give the PyTorch checkpoint"),
    (b"GGUF", "GGUF", "Give the PyTorch checkpoint it was made from"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it, and give the checkpoint that is in it"),
)


def read_checkpoint(path: Path) -> dict[str, StateDict]:
    """Read the tensors of a safetensors or PyTorch file, whatever its suffix. No code is run.

    Returns:
        For every dictionary in the file that holds tensors: its place ("" for the outermost, "teacher",
        "model/state_dict", …) -> name -> tensor.

    Raises:
        UserError: damaged, of another kind, holding objects other than tensors, or no tensors.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise UserError(f"{path}: the file is empty. Get a whole copy of it.")
    content: Any
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < 1 << 28:
        try:
            content = safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
    elif start.startswith((b"PK", b"\x80")):
        content = _read_pytorch(path)
    else:
        raise UserError(f"{path}: {_other_format(start)}. Expected a safetensors or PyTorch file.")
    found: dict[str, StateDict] = {}
    _collect(content, (), found)
    if not found:
        raise UserError(f"{path}: holds no tensors, so no weights.")
    return found


def _collect(value: Any, place: tuple[str, ...], found: dict[str, StateDict]) -> None:
    if not isinstance(value, dict) or len(place) > _MAX_DEPTH:
        return
    tensors = {str(name): item for name, item in value.items() if isinstance(item, Tensor)}
    if tensors:
        found["/".join(place)] = tensors
    for name, item in value.items():
        _collect(item, (*place, str(name)), found)


def _read_pytorch(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _refuse_other_archives(path, archive.namelist())
        # Opened here: given a path, torch reads any file named .safetensors as safetensors. It warns of newer pickles.
        with path.open("rb") as file, torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if match := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: holds more than tensors, namely {match[1]}. Reading that would run code, which mitofm does "
                "not do for a file of weights. Where this class is installed, and if you trust the file, save its "
                "tensors alone, and pass that file as `weights`:\n"
                f"  model = torch.load({path.name!r}, map_location='cpu', weights_only=False)  # or a part of it\n"
                "  safetensors.torch.save_model(model, 'weights.safetensors')  # of a state dict: save_file"
            ) from None
        raise _damaged(path, error) from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise _damaged(path, error) from None


def _refuse_other_archives(path: Path, names: Iterable[str]) -> None:
    """Refuse the formats that are zip files too, as PyTorch's is."""
    names = list(names)
    if any("/code/" in name for name in names):
        raise UserError(
            f"{path}: a TorchScript archive, which is code and weights in one. mitofm runs no code from a file: save "
            "`torch.jit.load(path).state_dict()` by torch.save, and pass that file as `weights`."
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise UserError(
            f"{path}: a zip archive, but none that PyTorch wrote (it holds {names[0] if names else 'nothing'}). If the "
            "checkpoint is in it, unpack it; a Keras or numpy archive has to be converted."
        )


def _other_format(start: bytes) -> str:
    if start[257:262] == b"ustar":
        return "a tar archive, not weights. Unpack it, and give the checkpoint that is in it"
    for beginning, kind, remedy in _OTHER_FORMATS:
        if start.lstrip().startswith(beginning):
            return f"{kind}, not weights. {remedy}"
    return f"not weights: it begins with {start[:24]!r}"


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: not a readable weights file ({type(error).__name__}): damaged, cut off at its "
        f"{path.stat().st_size:,} bytes, or no checkpoint. Get a whole copy of it; its size must be the original's."
    )


# --------------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class _Candidate:
    """Tensors that may be the network's.

    Attributes:
        place: of their dictionary in the file.
        prefix: what all their names began with.
        state: the tensors, by their names without the prefix.
        left_out: the names in the same dictionary that do not begin with the prefix.
    """

    place: str
    prefix: str
    state: StateDict
    left_out: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The order in which candidates that fit alike are taken."""
        words = set(re.split(r"[./_]", f"{self.place}/{self.prefix}"))
        return 0 if words & {"teacher", "ema"} else 2 if "student" in words else 1

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, f"{self.prefix}*" if self.prefix else "") if part) or "top level"

    def contains(self, other: _Candidate) -> bool:
        return self.place == other.place and other.prefix.startswith(self.prefix)


def network_tensors(
    path: Path,
    content: Mapping[str, StateDict],
    model: nn.Module,
    convert: Callable[[StateDict], StateDict],
) -> StateDict:
    """Choose the tensors of a file that are a network's, say which, and give them as float32.

    Args:
        path: the file, for messages.
        content: of `read_checkpoint`.
        model: the network to load them into.
        convert: the key map of the file's layout; candidates are compared after it.

    Raises:
        UserError: if several networks fit, hold different numbers, and none of them is a teacher or an average.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    candidates = [
        candidate
        for place, tensors in content.items()
        for candidate in _split(place, tensors)
        if 4 * len(candidate.state) >= len(expected)  # the parts of a network are no networks
    ] or [_Candidate(place, "", tensors, ()) for place, tensors in content.items()]
    fits = {id(candidate): _fit(candidate.state, expected, convert) for candidate in candidates}
    candidates.sort(key=lambda candidate: (-fits[id(candidate)], candidate.rank, len(candidate.prefix)))
    chosen = candidates[0]
    others: list[_Candidate] = []
    for other in candidates[1:]:
        nested = any(one.contains(other) or other.contains(one) for one in [chosen, *others])
        if not nested and 2 * fits[id(other)] > fits[id(chosen)]:
            others.append(other)
    rivals = [
        other
        for other in others
        if (fits[id(other)], other.rank) == (fits[id(chosen)], chosen.rank) and not _same(chosen.state, other.state)
    ]
    if rivals and fits[id(chosen)] == 2 * len(expected):
        raise UserError(
            f"{path}: holds several networks of this kind: {', '.join(map(str, [chosen, *rivals]))}. Save the tensors "
            "of the one you mean alone, and pass that file as `weights`."
        )
    if fits[id(chosen)] and (chosen.place or chosen.prefix):
        say(_account(path, chosen, others))
    return {name: _single(tensor) for name, tensor in chosen.state.items()}


def _split(place: str, tensors: StateDict) -> list[_Candidate]:
    """List the tensors as they are, and below each of their prefixes."""
    prefixes = {""} | {name[: dot.end()] for name in tensors for dot in re.finditer(r"\.", name)}
    return [
        _Candidate(
            place,
            prefix,
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)},
            tuple(name for name in tensors if not name.startswith(prefix)),
        )
        for prefix in sorted(prefixes)
    ]


def _fit(state: StateDict, expected: Mapping[str, torch.Size], convert: Callable[[StateDict], StateDict]) -> int:
    """Count the names of the network that are there after the key map, and once more those of the right shape."""
    try:
        converted = convert({name: _single(tensor.to("meta")) for name, tensor in state.items()})  # shapes, no numbers
    except KeyMapError:
        return 0
    return sum(1 + (tensor.shape == expected[name]) for name, tensor in converted.items() if name in expected)


def _same(one: StateDict, other: StateDict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _account(path: Path, chosen: _Candidate, others: Iterable[_Candidate]) -> str:
    sentences = [f"{path}: took {len(chosen.state)} tensors from {chosen}"]
    if chosen.left_out:
        sentences.append(f"left out {len(chosen.left_out)} beside them ({first_names(chosen.left_out)})")
    if other := ", ".join(map(str, others)):
        sentences.append(f"also there, and not taken: {other}")
    return "; ".join(sentences) + "."


def first_names(names: Iterable[str]) -> str:
    """Summarise tensors by the first part of their names, the most frequent first: "head (4), norm (2)"."""
    counts = Counter(name.partition(".")[0] for name in names).most_common()
    return ", ".join(f"{name} ({n})" for name, n in counts[:4]) + (", …" if len(counts) > 4 else "")


def common_prefix(names: Iterable[str]) -> str:
    """Find what all names begin with, up to a dot: "foo.bar." of "foo.bar.a" and "foo.bar.b.c"."""
    first, *others = names
    parts = first.split(".")[:-1]
    shared = ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts) + 1)]
    return max((start for start in shared if all(name.startswith(start) for name in others)), key=len)
