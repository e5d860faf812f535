"""Small patches, small weights, and the digests of a store's files, for tests of extraction."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

MODEL = "timm/test_vit"  # timm's smallest transformer


def write_patches(folder: Path, n: int, *, size: int) -> Path:
    """Fill a folder with n patches in two classes, every third one atypical."""
    rng = np.random.default_rng(0)
    for row in range(n):
        path = folder / ("Atypical" if row % 3 == 0 else "Normal") / f"{row:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)
    return folder


def write_weights(path: Path, *, seed: int = 0) -> Path:
    """Write random weights of `MODEL` as a local checkpoint."""
    torch.manual_seed(seed)
    save_file(timm.create_model(MODEL.removeprefix("timm/"), num_classes=0).state_dict(), path)
    return path


def content(path: Path) -> dict[str, str]:
    """Digest of every file of a store, by its name."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
