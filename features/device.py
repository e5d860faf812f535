"""Which device computes?"""

from __future__ import annotations

import torch

from features.console import UserError


def find_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """The torch device of an option: "auto" takes the first GPU, else the CPU.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        local_rank: which of this machine's processes asks: "auto" and "cuda" deal the GPUs out by it. A process that
            was given one GPU of its own sees no other, whatever its number.

    Raises:
        UserError: if the device does not exist here.
    """
    if name in ("auto", "cuda") and local_rank is not None and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N.") from error
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise UserError(f"device {name!r} was asked for, but torch sees {n_gpus} GPUs here. Use --device cpu or auto.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N.")
    return device
