"""How does training survive being killed at any moment?

Everything that decides the rest of a training is in one file, replaced whole after every epoch: the rows that training
changes, the optimisers' moments, the best rows so far, and each fold's history. Nothing else is state: the learning
rate and early stopping follow from the history, and the random numbers of an epoch from (seed, fold, epoch).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from features.console import UserError
from features.files import write_file, writing

CHECKPOINT_FILE = "checkpoint.safetensors"
START_FILE = "training.json"
FORMAT = 1
GO_ON = "go on with fm-finetune --resume"


@dataclass(eq=False)
class State:
    """Where a training stands after some epochs.

    Attributes:
        folds: the folds that train at present, one per row.
        values: (n_rows, p) as in `Network`.
        best: (n_rows, p) rows of each fold's best epoch.
        moments: (n_rows, 2, p_trained) Adam's running means of gradients and their squares.
        n_steps: optimiser steps of each row.
        history: fold to one record per finished epoch; folds that have finished training stay.
        seconds: of training, over all processes.
        n_images: forward and backward passes, likewise.
    """

    folds: tuple[int, ...]
    values: Tensor
    best: Tensor
    moments: Tensor
    n_steps: list[int]
    history: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: float = 0.0
    n_images: int = 0


def save_state(folder: Path, state: State) -> None:
    """Replace the checkpoint.

    Raises:
        UserError: the disk cannot be written; the older checkpoint stays.
    """
    tensors = {name: getattr(state, name).detach().cpu() for name in ("values", "best", "moments")}
    described = {
        "format": FORMAT,
        "folds": state.folds,
        "n_steps": state.n_steps,
        "history": {str(fold): history for fold, history in state.history.items()},
        "seconds": state.seconds,
        "n_images": state.n_images,
    }
    described["sha256"] = _digest(described, tensors)
    with writing(folder, remedy=GO_ON):
        write_file(folder / CHECKPOINT_FILE, [safetensors.torch.save(tensors, {"state": json.dumps(described)})])


def load_state(folder: Path, device: torch.device) -> State | None:
    """The last checkpoint, or None before the first.

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
        return State(
            **tensors,
            folds=tuple(described["folds"]),
            n_steps=described["n_steps"],
            history={int(fold): history for fold, history in described["history"].items()},
            seconds=described["seconds"],
            n_images=described["n_images"],
        )
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it to train from the start, with --resume.") from error


def _digest(described: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over all that a checkpoint says; a flipped bit would otherwise train on unseen."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
