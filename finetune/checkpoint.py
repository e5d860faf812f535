"""How does a training survive being killed at any moment?

An unfinished training is a folder with two files:

- `training.json` is written once, at the start: the options, and digests of everything that must not change.
- `checkpoint.safetensors` is replaced whole after every epoch. It holds everything that decides the rest of the
  training: the values that training changes, the optimisers' moments, the best values so far, and all histories.

Nothing else is state: the learning rate and early stopping follow from the history, and the random numbers of an epoch
from (seed, fold, epoch).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from features.console import UserError, nearest
from features.files import sweep, write_file, writing
from features.fingerprint import fingerprint
from probe.records import EpochRecord

CHECKPOINT_FILE = "checkpoint.safetensors"
START_FILE = "training.json"
FORMAT = 1
RESUME = "go on with fm-finetune --resume"


@dataclass(eq=False)
class State:
    """Where a training stands after some epochs.

    Attributes:
        members: numbers of the members (`finetune.network`) that train at present, one per row.
        values: (n_rows, p) as in `Network`.
        best: (n_rows, p) rows of the epoch that each member keeps.
        moments: (n_rows, 2, p_trained) Adam's running means of gradients and of their squares.
        n_steps: optimiser steps of each row.
        history: member to one record per finished epoch; members that have finished training stay.
        seconds: of training, in all calls together.
        n_images: images passed forward and backward, likewise.
        fast_paths: which fast ways (`finetune.fast`) the last epoch took; None before the first.
    """

    members: tuple[int, ...]
    values: Tensor
    best: Tensor
    moments: Tensor
    n_steps: list[int]
    history: dict[int, list[EpochRecord]] = field(default_factory=dict)
    seconds: float = 0.0
    n_images: int = 0
    fast_paths: tuple[str, ...] | None = None

    def scores(self, member: int) -> list[float]:
        """List a member's validation balanced accuracy after each epoch so far."""
        return [epoch.balanced_accuracy for epoch in self.history[member]]


def save_state(folder: Path, state: State) -> None:
    """Replace the checkpoint.

    Raises:
        UserError: the disk cannot be written; the older checkpoint stays.
    """
    tensors = {name: getattr(state, name).detach().cpu() for name in ("values", "best", "moments")}
    described = {
        "format": FORMAT,
        "folds": state.members,  # by the name that they had before there were seeds
        "n_steps": state.n_steps,
        "history": {str(member): [asdict(epoch) for epoch in history] for member, history in state.history.items()},
        "seconds": state.seconds,
        "n_images": state.n_images,
        "fast_paths": state.fast_paths,
    }
    described["sha256"] = _digest(described, tensors)
    with writing(folder, remedy=RESUME):
        write_file(folder / CHECKPOINT_FILE, [safetensors.torch.save(tensors, {"state": json.dumps(described)})])


def load_state(folder: Path, device: torch.device) -> State | None:
    """Read the last checkpoint; None before the first.

    Raises:
        UserError: a damaged file.
    """
    path = folder / CHECKPOINT_FILE
    try:
        with safetensors.safe_open(path, "pt", device=str(device)) as file:
            described = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in ("values", "best", "moments")}
        if described.pop("sha256", None) not in (None, _digest(described, tensors)):
            raise ValueError("its digest does not match")
        histories = described["history"].items()
        return State(
            **tensors,
            members=tuple(described["folds"]),
            n_steps=described["n_steps"],
            history={int(member): [EpochRecord(**epoch) for epoch in history] for member, history in histories},
            seconds=described["seconds"],
            n_images=described["n_images"],
            fast_paths=None if described.get("fast_paths") is None else tuple(described["fast_paths"]),
        )
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it: `resume` then trains from the start.") from error


def epochs_done(folder: Path) -> int:
    """Sum the epochs that all members have had, without reading their weights; 0 before the first checkpoint.

    Raises:
        UserError: a damaged file.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return 0
    try:
        with safetensors.safe_open(path, "pt") as file:
            return sum(map(len, json.loads(file.metadata()["state"])["history"].values()))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}).") from error


def _digest(described: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Compute SHA-256 over all of a checkpoint: without it, training would go on from a flipped bit unnoticed."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ the start


def write_start(folder: Path, record: Mapping[str, Any]) -> None:
    """Make a training's folder with its `training.json`.

    Args:
        folder: must not exist.
        record: "identity" (what must not change until the training ends), "compute", "versions", and perhaps "launch".

    Raises:
        UserError: the disk cannot be written.
    """
    whole: dict[str, Any] = {"format": FORMAT, **record}
    whole["sha256"] = fingerprint(whole)
    with writing(folder.parent):
        folder.mkdir(parents=True)
        write_file(folder / START_FILE, [json.dumps(whole, indent=2).encode()])


def read_start(folder: Path) -> dict[str, Any]:
    """Read the record that `write_start` was given.

    Raises:
        UserError: no training, a damaged file, or one of another format.
    """
    path = folder / START_FILE
    try:
        record = json.loads(path.read_bytes())
        format = record["format"]
        if format == FORMAT and not record.keys() >= {"identity", "compute", "versions"}:
            raise KeyError("identity")
        if record.pop("sha256", None) not in (None, fingerprint(record)) and format == FORMAT:
            raise ValueError("its digest does not match")
    except (FileNotFoundError, NotADirectoryError):
        trainings = [path.parent.name for path in folder.parent.glob(f"*/{START_FILE}")]
        raise UserError(
            f"{folder} is no interrupted training: it has no {START_FILE}. Expected a folder that fm-finetune made "
            f"in its `runs` folder.{nearest(folder.name, trainings)}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Start a new run.") from None
    if format != FORMAT:
        raise UserError(
            f"{folder} is a training of format {format}; this version resumes format {FORMAT}. Resume it with the "
            "version it was started with, or start a new run."
        )
    return dict(record)


def clear_up(folder: Path) -> None:
    """Remove what only an unfinished training needs, and what killed writers have left behind."""
    for name in (CHECKPOINT_FILE, START_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in (folder, *folder.glob("fold-*"), *folder.glob("seed-*/fold-*")):
        sweep(path)
