"""Which pixels of a patch does the network see, and at what size?

A view (`features.views`) is the input policy and part of every fingerprint. Extraction and fine-tuning use the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from extract.alterations import alter
from extract.backbones import Backbone
from extract.registry import HALF, IMAGENET_MEAN, IMAGENET_STD, RGB
from extract.resize import resize_as_pillow
from features.console import UserError
from features.device import constant, copy_stream
from features.views import View as View
from features.views import parse_view as parse_view

# Mean and standard deviation of each channel, by the modifier that asks for them instead of the card's.
STATISTICS: dict[str, tuple[RGB, RGB]] = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": (HALF, HALF)}
N_ORIENTATIONS = 8  # of a square


def orientations(images: Tensor) -> Iterator[Tensor]:
    """Yield square images (b, c, s, s) in all eight orientations: as they are, mirrored, and both in quarter turns."""
    for turns in range(4):
        turned = torch.rot90(images, turns, (2, 3))
        yield turned
        yield turned.flip(3)


@dataclass(frozen=True)
class Transform:
    """Turn patches into network input: crop, resize, crop to the input size, normalise.

    The resize is antialiased and rounded to whole grey levels, as Pillow does it, with which the models were trained.
    On a CPU it is torch's uint8 kernel, whose coarser weights are off by a level in a few pixels; on other devices
    every pixel is Pillow's (`extract.resize`).

    Attributes:
        crop: edge of the central square of source pixels; None for the whole patch.
        resize: to how many pixels the shorter edge is resized.
        input_size: edge of the central square that is then kept.
        interpolation: "bicubic" or "bilinear".
        mean, std: of each channel, for RGB in 0 to 1.
        flips: whether the network is shown every image in all eight orientations.
        alteration: what is done to the cropped pixels, before they are resized: a key of `ALTERATIONS`.
    """

    crop: int | None
    resize: int
    input_size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool = False
    alteration: str | None = None

    def __call__(self, patches: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
        """Turn patches, each (h, w, 3) uint8, into a normalised float32 batch (b, 3, input_size, input_size).

        Raises:
            UserError: if a patch is smaller than the view's crop.
        """
        return self.normalise(self.resized(patches, device))

    def resized(self, patches: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
        """Crop and resize patches, each (h, w, 3) uint8, to (b, 3, input_size, input_size) in whole grey levels.

        Raises:
            UserError: if a patch is smaller than the view's crop.
        """
        if len({patch.shape for patch in patches}) == 1:
            return self._resized(patches, device)
        return torch.cat([self._resized([patch], device) for patch in patches])

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise pixels (b, 3, h, w) in 0..255, of any dtype, to float32 network input, laid out alike."""
        scale, offset = self.scale_and_offset(pixels.device)
        if pixels.device.type != "cpu" or not pixels.is_contiguous(memory_format=torch.channels_last):
            return pixels.mul(scale).sub_(offset)
        # The same numbers in a third of the time: a processor is slow where factors change with every element.
        width = pixels.shape[3]
        rows = pixels.permute(0, 2, 3, 1).flatten(2).to(torch.float32, copy=True)  # (b, h, w * 3)
        rows.mul_(scale.flatten().repeat(width)).sub_(offset.flatten().repeat(width))
        return rows.view(*rows.shape[:2], width, 3).permute(0, 3, 1, 2)

    @property
    def n_shown(self) -> int:
        """How many images the network is shown of each patch."""
        return N_ORIENTATIONS if self.flips else 1

    def shown(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the batches (b, 3, s, s) that the network sees of normalised images, over which outputs are averaged.

        That is the batch itself, or with `flips` eight, which are channels last in memory where the images are.
        """
        if not self.flips:
            yield images
            return
        channels_last = images.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for turned in orientations(images):
            yield turned.contiguous(memory_format=layout)

    def scale_and_offset(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give what normalises pixels in 0..255: a factor, and what is subtracted from the product, each (3, 1, 1)."""
        # x/255 normalised by mean and std, as one multiplication and one addition.
        std = constant(self.std, device).view(3, 1, 1)
        return 1 / (255 * std), constant(self.mean, device).view(3, 1, 1) / std

    def _resized(self, patches: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
        """Crop and resize patches of one shape."""
        height, width, _ = patches[0].shape
        if self.crop is not None:
            if min(height, width) < self.crop:
                raise UserError(
                    f"a patch of {width} x {height} pixels has no central {self.crop} pixels. "
                    f"Use `view='center{min(height, width)}'` or `view='full'`."
                )
            top, left = (height - self.crop) // 2, (width - self.crop) // 2
            patches = [patch[top : top + self.crop, left : left + self.crop] for patch in patches]
        pixels = _on_device(patches, device).permute(0, 3, 1, 2)  # (b, 3, h, w), channels last in memory
        if self.alteration is not None:
            pixels = alter(pixels, self.alteration).contiguous(memory_format=torch.channels_last)
        height, width = pixels.shape[2:]
        scale = self.resize / min(height, width)
        size = (round(height * scale), round(width * scale))
        if size != (height, width):
            if device.type == "cpu":
                pixels = F.interpolate(pixels, size=size, mode=self.interpolation, antialias=True, align_corners=False)
            else:
                pixels = resize_as_pillow(pixels, size, interpolation=self.interpolation)
        top, left = (size[0] - self.input_size) // 2, (size[1] - self.input_size) // 2
        return pixels[:, :, top : top + self.input_size, left : left + self.input_size]

    def record(self) -> dict[str, Any]:
        """Describe the transform as the fingerprint keeps it."""
        return {
            "crop": self.crop,
            "resize": self.resize,
            "input_size": self.input_size,
            "interpolation": self.interpolation,
            "antialias": True,
            "rounding": "uint8",
            "mean": list(self.mean),
            "std": list(self.std),
            **({"flips": True} if self.flips else {}),
            **({"alteration": self.alteration} if self.alteration else {}),
        }


def _on_device(patches: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """Copy patches of one shape to a device: (b, h, w, 3) uint8."""
    pinned = device.type == "cuda"  # such memory is kept by torch, and used again once it is copied
    held = torch.empty((len(patches), *patches[0].shape), dtype=torch.uint8, pin_memory=pinned)
    np.stack(patches, out=held.numpy())
    return _beside_its_work(held, device) if pinned else held.to(device)


def _beside_its_work(pinned: Tensor, device: torch.device) -> Tensor:
    """Let an NVIDIA GPU fetch a tensor while it and this process go on with what they do."""
    work, copies = torch.cuda.current_stream(device), copy_stream(device)
    with torch.cuda.stream(copies):
        copied = pinned.to(device, non_blocking=True)
    work.wait_stream(copies)
    copied.record_stream(work)  # or its memory would be taken for the next copy while it is still read
    return copied


def make_transform(backbone: Backbone, view: View) -> Transform:
    """Make the transform of a view: for `full` the card's; other views are resized to the input size itself.

    So the other views lose no pixels to the crop that the card makes after resizing. All are normalised as the card
    says, unless the view says otherwise.
    """
    size = view.input_size or backbone.input_size
    as_card = view.crop is None and view.input_size is None
    mean, std = (backbone.mean, backbone.std) if view.statistics is None else STATISTICS[view.statistics]
    return Transform(
        crop=view.crop,
        resize=backbone.resize if as_card else size,
        input_size=size,
        interpolation=backbone.interpolation,
        mean=tuple(mean),
        std=tuple(std),
        flips=view.flips,
        alteration=view.alteration,
    )
