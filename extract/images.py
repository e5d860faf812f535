"""Can image files serve as patches, what are their digests, and what are their pixels?

Only 8-bit images without transparency are accepted. Decoders change some others without a warning (16-bit samples are
cut to 8 bits, CMYK is inverted, a transparent pixel turns black); those are refused.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from features.console import UserError, progress

Decode = Callable[[int], NDArray[np.uint8]]  # row -> its patch, (height, width, 3) RGB

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})
ACCEPTED = "8-bit RGB, grey or palette images without transparency (PNG, JPEG, TIFF, BMP or WebP)"
MAX_PIXELS = 4096 * 4096  # a patch of 1 mm at 0.25 um/px; beyond it, this is a slide or a decompression bomb
MAX_BYTES = 1 << 28  # of a file: four times what that many pixels take uncompressed, with transparency
# What Pillow, tifffile and their codecs raise on damaged bytes.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)

_BLOCK = 64  # files checked by one thread at a time
_PNG_END = b"IEND\xaeB`\x82"
_PLAIN_CHUNKS = frozenset({b"IHDR", b"pHYs", b"gAMA", b"sRGB", b"cHRM", b"tIME", b"bKGD", b"IDAT"})
_SHOWN = 5  # how many of many bad files an error names
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_OPAQUE_MODES = {"RGB", "L", "P", "1"}
_ALPHA_MODES = {"RGBA", "LA", "PA"}
_TIFF_BITS_PER_SAMPLE = 258
# What Pillow only warns of is either read or refused with a message of ours.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class _Flaw(Exception):
    """Why an image is refused."""


def check_files(paths: Sequence[Path], title: str) -> tuple[list[str], int]:
    """Read and hash every image file, and check that each can serve as a patch, before any long computation begins.

    Args:
        paths: the files.
        title: what to call them all in progress and errors.

    Returns:
        The hex SHA-256 of each file, and the size of all files together in bytes.

    Raises:
        UserError: naming the files that cannot be used, and why.
    """
    checked: list[tuple[str, int, str | None]] = []
    blocks = [paths[start : start + _BLOCK] for start in range(0, len(paths), _BLOCK)]
    with progress(f"check {title}", len(paths)) as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        for results in pool.map(lambda block: list(map(_check_file, block)), blocks):
            checked += results
            advance(len(results))
    flaws = [f"{path}: {flaw}" for path, (_, _, flaw) in zip(paths, checked, strict=True) if flaw is not None]
    if flaws:
        raise UserError(
            f"{len(flaws)} of {len(paths)} patches of {title} cannot be used:\n  "
            + "\n  ".join(flaws[:_SHOWN])
            + (f"\n  ... and {len(flaws) - _SHOWN} more" if len(flaws) > _SHOWN else "")
            + f"\nExpected {ACCEPTED}. Repair, convert or remove them, then run again."
        )
    return [sha256 for sha256, _, _ in checked], sum(size for _, size, _ in checked)


def _check_file(path: Path) -> tuple[str, int, str | None]:
    """Check one file: return its SHA-256, its size, and why it cannot be used (None when it can)."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
            return "", 0, "not a regular file"
        if status.st_size > MAX_BYTES:
            return "", 0, f"{status.st_size:,} bytes are too many for a patch"
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
    except OSError as error:
        return "", 0, str(error.strerror)
    return hashlib.sha256(data).hexdigest(), len(data), flaw(data)


def file_decoder(paths: Sequence[Path]) -> Decode:
    """Make a thread-safe function that reads and decodes the file of a row."""

    def decode_row(row: int) -> NDArray[np.uint8]:
        try:
            data = paths[row].read_bytes()
        except OSError as error:
            raise UserError(f"{paths[row]} cannot be read ({error.strerror}). Restore it, then run again.") from None
        return decode(data, str(paths[row]))

    return decode_row


def flaw(data: bytes) -> str | None:
    """Say why the bytes of a file cannot serve as a patch; None when they can.

    For PNG and JPEG only the header and the end mark are read, which is fast. Other formats, and images with an alpha
    channel, are decoded.
    """
    if _is_plain_png(data):
        return None
    try:
        with _open(data) as image:
            if not (_has_end_mark(data, image) and not _has_alpha(image)):
                _pixels(image)
    except _Flaw as reason:
        return str(reason)
    return None


def _is_plain_png(data: bytes) -> bool:
    """Whether these are header and end of an 8-bit RGB or grey PNG without transparency or anything unusual.

    Most patches are. Pillow, which judges all others, takes five times as long.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or _PNG_END not in data[-4096:]:
        return False
    position, kind = 8, b""
    while kind != b"IDAT" and position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind not in _PLAIN_CHUNKS:
            return False
        if kind != b"IDAT":
            end = position + 8 + length
            if zlib.crc32(data[position + 4 : end]).to_bytes(4, "big") != data[end : end + 4]:
                return False
        if position == 8:
            width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
            plain = kind == b"IHDR" and depth == 8 and colour in (0, 2) and 0 < width * height <= MAX_PIXELS
            if not plain:
                return False
        position += 12 + length
    return kind == b"IDAT"


def decode(data: bytes, name: str, *, most_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode one image file to its pixels, (height, width, 3) RGB.

    Args:
        data: the bytes of the file.
        name: what to call it in an error.
        most_pixels: more than these are refused.

    Raises:
        UserError: when the bytes are damaged or not an accepted image.
    """
    try:
        with _open(data, most_pixels) as image:
            return _pixels(image)
    except _Flaw as reason:
        raise UserError(
            f"{name} cannot be used: {reason}. Expected {ACCEPTED}. Repair, convert or remove it, then run again."
        ) from None


def _open(data: bytes, most_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    if not data:
        raise _Flaw("the file is empty")
    try:
        image = Image.open(BytesIO(data), formats=_FORMATS)
        n_frames, bits = getattr(image, "n_frames", 1), _bits(data, image)
    except _BOMB:
        raise _Flaw(f"more than {most_pixels:,} pixels") from None
    except DAMAGE:
        raise _Flaw("not an image, or its header is damaged") from None
    assert isinstance(image, ImageFile.ImageFile)
    if image.width * image.height > most_pixels:
        raise _Flaw(f"{image.width} x {image.height} is more than {most_pixels:,} pixels")
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
    """Find the bits per sample as stored: Pillow opens 16-bit RGB as 8-bit RGB and keeps the upper byte."""
    if image.format == "PNG":
        return data[24]  # IHDR: signature 8, length 4, type 4, width 4, height 4, depth
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(map(int, image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,))))
    return 8


def _has_end_mark(data: bytes, image: ImageFile.ImageFile) -> bool:
    if image.format == "PNG":
        return _PNG_END in data[-4096:]  # some writers append more bytes
    return image.format == "JPEG" and data.endswith(b"\xff\xd9")


def _has_alpha(image: ImageFile.ImageFile) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _pixels(image: ImageFile.ImageFile) -> NDArray[np.uint8]:
    try:
        ImageOps.exif_transpose(image, in_place=True)  # cameras and some exporters store a turned image
        if not _has_alpha(image):
            return np.array(image.convert("RGB"))  # a copy: torch wants writable memory
        rgba = np.asarray(image.convert("RGBA"))
    except DAMAGE:
        raise _Flaw("its pixel data is damaged or truncated") from None
    if rgba[..., 3].min() < 255:
        raise _Flaw("it has transparent pixels")
    return rgba[..., :3].copy()
