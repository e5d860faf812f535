"""Can this file be trusted as a patch, and what are its pixels?

Only 8-bit images without transparency are patches. What the decoder would change without a word (16-bit samples cut
to 8, CMYK inverted, a transparent pixel turned black) is refused instead.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin

from features.console import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})
ACCEPTED = "8-bit RGB, grey or palette images without transparency (PNG, JPEG, TIFF, BMP or WebP)"
MAX_PIXELS = 4096 * 4096  # a patch of 1 mm at 0.25 um/px; beyond it, this is a slide or a decompression bomb
MAX_BYTES = 1 << 28  # of a file: four times what that many pixels take uncompressed, with transparency

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_OPAQUE_MODES = {"RGB", "L", "P", "1"}
_ALPHA_MODES = {"RGBA", "LA", "PA"}
_TIFF_BITS_PER_SAMPLE = 258
# What Pillow and its codecs raise on damaged bytes, besides OSError.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
# What it only warns of is read or refused here, in our own words.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class _Flaw(Exception):
    """Why an image is refused."""


def flaw(data: bytes) -> str | None:
    """Why the bytes of a file cannot serve as a patch, or None when they can.

    Cheap for PNG and JPEG, whose header and end mark tell; other formats and images with an alpha channel are decoded.
    """
    try:
        with _open(data) as image:
            if not (_has_end_mark(data, image) and not _has_alpha(image)):
                _pixels(image)
    except _Flaw as reason:
        return str(reason)
    return None


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """The pixels of one image file, (height, width, 3) RGB.

    Args:
        data: the bytes of the file.
        name: what to call it in an error.

    Raises:
        UserError: when the bytes are damaged or not an accepted image.
    """
    try:
        with _open(data) as image:
            return _pixels(image)
    except _Flaw as reason:
        raise UserError(
            f"{name} cannot be used: {reason}. Expected {ACCEPTED}. Repair, convert or remove it, then run again."
        ) from None


def _open(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise _Flaw("the file is empty")
    try:
        image = Image.open(BytesIO(data), formats=_FORMATS)
        n_frames, bits = getattr(image, "n_frames", 1), _bits(data, image)
    except _BOMB:
        raise _Flaw(f"more than {MAX_PIXELS:,} pixels") from None
    except _DAMAGE:
        raise _Flaw("not an image, or its header is damaged") from None
    assert isinstance(image, ImageFile.ImageFile)
    if image.width * image.height > MAX_PIXELS:
        raise _Flaw(f"{image.width} x {image.height} is more than {MAX_PIXELS:,} pixels")
    if n_frames > 1:
        raise _Flaw(f"it holds {n_frames} images")
    if bits > 8:
        raise _Flaw(f"{bits} bits per sample")
    if image.mode not in _OPAQUE_MODES | _ALPHA_MODES:
        raise _Flaw(f"a {image.mode} image")
    if image.format == "PNG" and not _has_end_mark(data, image):
        raise _Flaw("the file is truncated (a PNG ends with an IEND chunk)")
    return image


def _bits(data: bytes, image: Image.Image) -> int:
    """Bits per sample as stored: Pillow opens 16-bit RGB as 8-bit RGB and keeps the upper byte."""
    if image.format == "PNG":
        return data[24]  # IHDR: signature 8, length 4, type 4, width 4, height 4, depth
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(map(int, image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,))))
    return 8


def _has_end_mark(data: bytes, image: ImageFile.ImageFile) -> bool:
    if image.format == "PNG":
        return b"IEND\xaeB`\x82" in data[-4096:]  # some writers append a trailer of their own
    return image.format == "JPEG" and data.endswith(b"\xff\xd9")


def _has_alpha(image: ImageFile.ImageFile) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _pixels(image: ImageFile.ImageFile) -> NDArray[np.uint8]:
    try:
        if not _has_alpha(image):
            return np.array(image.convert("RGB"))  # a copy: torch wants writable memory
        rgba = np.asarray(image.convert("RGBA"))
    except _DAMAGE:
        raise _Flaw("its pixel data is damaged or truncated") from None
    if rgba[..., 3].min() < 255:
        raise _Flaw("it has transparent pixels")
    return rgba[..., :3].copy()
