"""How are the patches of the demo dataset drawn: H&E-like mitotic figures, the same bytes on every machine?

They need no download and exercise everything (slides, scanners, votes, train and test). They say nothing about real
tissue: no score on them may stand beside a published one.

Only additions, products, quotients, square roots and maxima of IEEE doubles are used, and only `random()` of PCG64,
because each of these is exactly defined. `exp` or a matrix product differ in the last bit from machine to machine.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.console import progress
from features.samples import TEST, TRAIN, Samples, make_samples

SIZE = 128  # pixels
MPP = 0.25  # micrometres per pixel that the drawn sizes imply: a metaphase plate is 8 um long
N_SLIDES = 30
N_PATCHES = 400
N_RATERS = 3
SEED = 2025

Map = NDArray[np.float64]  # (SIZE, SIZE), or a part of it
Clumps = tuple[Map, Map, Map]  # positions u, v and radii in pixels, each (clumps,)
Figure = Callable[[np.random.Generator], Clumps]

_Y: Map
_X: Map
_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float64)
_HAEMATOXYLIN = (0.65, 0.70, 0.29)  # optical density per unit of stain in R, G, B (after Ruifrok and Johnston 2001)
_EOSIN = (0.18, 0.90, 0.36)
_ERROR_RATE = 0.07  # of one rater on one figure


class Demo(NamedTuple):
    """The drawn patches: their table, that of the kinds that were drawn, and pixels (n, SIZE, SIZE, 3) uint8."""

    samples: Samples
    phases: Samples
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class _Slide:
    name: str
    scanner: str
    grade: float  # 0 to 1: how far nuclei are enlarged and dark, and how often figures are atypical
    haematoxylin: tuple[float, ...]
    eosin: tuple[float, ...]
    white: tuple[float, ...]
    n_blurs: int
    noise: float


@functools.cache
def draw() -> Demo:
    """Draw the demo dataset: 400 patches of 30 slides with three votes each, in a second or two.

    Slides differ in stain, scanner and grade. The label is the majority of the votes; in the table of the phases it is
    the kind that was drawn, a number of `KINDS`, whatever the raters say.
    """
    rng = np.random.Generator(np.random.PCG64(SEED))
    slides = [_slide(rng, number) for number in range(N_SLIDES)]
    # Squares make a few large slides and many small ones, as in real cohorts.
    slide_numbers = np.concatenate(
        [np.arange(N_SLIDES), (rng.random(N_PATCHES - N_SLIDES) ** 2 * N_SLIDES).astype(int)]
    )
    slide_numbers.sort()
    pixels = np.empty((N_PATCHES, SIZE, SIZE, 3), dtype=np.uint8)
    votes = np.empty((N_PATCHES, N_RATERS), dtype=np.int8)
    kinds = []
    with progress("draw demo", N_PATCHES) as advance:
        for row, number in enumerate(slide_numbers):
            slide = slides[number]
            atypical = rng.random() < 0.05 + 0.42 * slide.grade
            votes[row] = (rng.random(N_RATERS) < _ERROR_RATE) != atypical
            figures = _ATYPICAL if atypical else _NORMAL
            figure = figures[int(len(figures) * rng.random())]
            kinds.append(list(_FIGURES.values()).index(figure))
            pixels[row] = _patch(rng, slide, figure)
            advance(1)
    pixels.setflags(write=False)
    label = (votes.sum(axis=1) * 2 > N_RATERS).astype(int).tolist()
    samples = make_samples(
        [f"{('Normal', 'Atypical')[y]}/{row:03d}" for row, y in enumerate(label)],
        label,
        sha256=[hashlib.sha256(patch.tobytes()).hexdigest() for patch in pixels],
        group=[slides[number].name for number in slide_numbers],
        # Every fourth slide is a test slide: large and small ones, from both scanners.
        split=[TEST if number % 4 == 1 else TRAIN for number in slide_numbers],
        votes=votes,
        domain=[slides[number].scanner for number in slide_numbers],
    )
    phases = make_samples(
        [f"{KINDS[kind]}/{row:03d}" for row, kind in enumerate(kinds)],
        kinds,
        sha256=samples.sha256.tolist(),
        group=samples.group.tolist(),
        split=samples.split.tolist(),
        domain=samples.domain.tolist(),
    )
    return Demo(samples, phases, pixels)


def _slide(rng: np.random.Generator, number: int) -> _Slide:
    scanner = ("scanner A", "scanner B")[number // 4 % 2]
    strength_h, strength_e = 0.85 + 0.5 * rng.random(), 0.55 + 0.6 * rng.random()
    warm = 8.0 if scanner == "scanner B" else 0.0
    return _Slide(
        name=f"slide-{number:02d}",
        scanner=scanner,
        grade=rng.random(),
        haematoxylin=tuple(strength_h * (od + 0.10 * (rng.random() - 0.5)) for od in _HAEMATOXYLIN),
        eosin=tuple(strength_e * (od + 0.14 * (rng.random() - 0.5)) for od in _EOSIN),
        white=(246.0, 243.0 - warm / 2, 246.0 - warm),
        n_blurs=2 if scanner == "scanner B" else 1,
        noise=(6.0 if scanner == "scanner B" else 10.0) * (1 + rng.random()),
    )


def _patch(rng: np.random.Generator, slide: _Slide, figure: Figure) -> NDArray[np.uint8]:
    """Draw one patch, (SIZE, SIZE, 3): stain amounts, then Beer and Lambert's law, then the scanner."""
    haematoxylin, eosin = _tissue(rng, slide.grade)
    chromatin = _chromatin(rng, figure)
    cell = _ellipse(
        SIZE / 2 + 4 * _signed(rng), SIZE / 2 + 4 * _signed(rng), 27 + 7 * rng.random(), _direction(rng), 0.85
    )
    cytoplasm = _soft(cell * 4)
    plasm = 0.22 + 0.2 * _noise(rng, 30)  # paler than its surroundings, inside a thin membrane
    eosin = eosin * (1 - cytoplasm) + plasm * cytoplasm + 0.15 * _soft(1 - 9 * np.abs(cell))
    haematoxylin = haematoxylin * (1 - cytoplasm) + 0.08 * cytoplasm
    haematoxylin = np.maximum(haematoxylin, chromatin * (1.25 + 0.3 * rng.random()))

    channels = []
    for h, e, white in zip(slide.haematoxylin, slide.eosin, slide.white, strict=True):
        transmitted = 1 + (h * haematoxylin + e * eosin) / 8  # (1 + x/8)^-8 for exp(-x): the same law, exact everywhere
        light = transmitted * transmitted
        light = light * light
        light = white / (light * light)
        for _ in range(slide.n_blurs):
            light = _blur(light)
        grain = rng.random((SIZE, SIZE)) - 0.5
        channels.append(np.minimum(np.maximum(light + slide.noise * grain, 0), 255))
    return np.stack([np.floor(channel + 0.5) for channel in channels], axis=-1).astype(np.uint8)


def _tissue(rng: np.random.Generator, grade: float) -> tuple[Map, Map]:
    """Draw haematoxylin and eosin of the tissue around the figure: stroma with cracks, and resting nuclei."""
    coarse, medium, fine = _noise(rng, 4), _noise(rng, 13), _noise(rng, 47)
    eosin = 0.20 + 0.25 * coarse + 0.30 * medium + 0.25 * fine
    cracks = _soft((0.6 * _noise(rng, 5) + 0.35 * medium + 0.05 * fine - 0.66) * 8)
    eosin = eosin * (1 - 0.8 * cracks)
    haematoxylin = (0.06 + 0.10 * coarse + 0.08 * fine) * (1 - 0.8 * cracks)
    texture = 0.5 * _noise(rng, 21) + 0.5 * fine
    for _ in range(4 + int(6 * rng.random())):
        along, aside = SIZE * 1.1 * _signed(rng) / 2, SIZE * 1.1 * _signed(rng) / 2
        radius, axis, aspect = 10 + 5 * rng.random() + 5 * grade, _direction(rng), 0.55 + 0.4 * rng.random()
        density = 0.25 + 0.25 * rng.random() + 0.25 * grade
        if along * along + aside * aside < 50 * 50:
            continue  # the figure's own cell lies here
        x, y = SIZE / 2 + along, SIZE / 2 + aside
        box = tuple(slice(max(0, int(at - radius) - 2), int(at + radius) + 3) for at in (y, x))
        nucleus = _ellipse(x, y, radius, axis, aspect, box=box)
        inside = _soft(nucleus * 7)
        rim = _soft(1 - 8 * np.abs(nucleus - 0.10))
        nucleolus = _soft(4 * nucleus - 2.9) * texture[box]
        stain = density * (inside * (0.35 + 0.8 * texture[box]) + 0.5 * rim + 0.7 * nucleolus)
        haematoxylin[box] = haematoxylin[box] * (1 - inside) + stain
        eosin[box] *= 1 - 0.25 * inside
    return haematoxylin, eosin


def _chromatin(rng: np.random.Generator, figure: Figure) -> Map:
    """Draw the condensed chromosomes of one figure, 0 to 1: a union of small clumps with ragged edges."""
    # In the figure's own axes: u along the plate, v from pole to pole.
    u, v, radius = (1.2 * column for column in figure(rng))
    if rng.random() < 0.35:  # a dark speck beside the figure: debris, which must not give the class away
        u, v, radius = np.append(u, 24 * _signed(rng)), np.append(v, 28 + 6 * rng.random()), np.append(radius, 2.0)
    c, s = _direction(rng)
    x = SIZE / 2 + 3 * _signed(rng) + c * u - s * v
    y = SIZE / 2 + 3 * _signed(rng) + s * u + c * v
    dx, dy = np.arange(SIZE) - x[:, None], np.arange(SIZE) - y[:, None]  # (clumps, SIZE)
    dx, dy = dx * dx / (radius * radius)[:, None], dy * dy / (radius * radius)[:, None]
    height = 1 - functools.reduce(np.minimum, (row + column[:, None] for row, column in zip(dx, dy, strict=True)))
    ragged = 0.9 * (_noise(rng, 24) - 0.5) + 0.9 * (_noise(rng, 50) - 0.5)
    return _soft(1.6 * (height + ragged + 0.25)) * (0.85 + 0.15 * _noise(rng, 30))


def _bar(rng: np.random.Generator, half_length: float, radius: float, *, at: float = 0.0, bend: float = 0.0) -> Clumps:
    n = 5 + int(half_length)
    u = half_length * (2 * np.arange(n) / (n - 1) - 1)
    v = at + bend * (u * u) / (half_length * half_length) + 1.6 * (rng.random(n) - 0.5)
    return u, v, radius * (0.75 + 0.5 * rng.random(n))


def _together(*parts: Clumps) -> Clumps:
    u, v, radius = (np.concatenate(column) for column in zip(*parts, strict=True))
    return u, v, radius


def _plate(rng: np.random.Generator) -> Clumps:
    return _bar(rng, 12 + 5 * rng.random(), 3.4 + 1.4 * rng.random(), bend=3 * _signed(rng))


def _ring(rng: np.random.Generator) -> Clumps:
    directions = [_direction(rng) for _ in range(22)]
    u, v = (np.array(axis) for axis in zip(*directions, strict=True))
    radius = 8 + 3 * rng.random()
    return radius * u, radius * v, 2.8 + 1.2 * rng.random(len(u))


def _prometaphase(rng: np.random.Generator) -> Clumps:
    u, v = 20 * (rng.random(26) - 0.5), 16 * (rng.random(26) - 0.5)
    return u, v, 2.4 + 1.6 * rng.random(26)


def _anaphase(rng: np.random.Generator, second: float = 1.0) -> Clumps:
    """Draw two plates that move apart; `second` scales the size of the second one."""
    half, length, radius = 6 + 6 * rng.random(), 9 + 4 * rng.random(), 2.9 + 1.1 * rng.random()
    bend = 1 + 2 * rng.random()
    return _together(
        _bar(rng, length, radius, at=half, bend=-bend),
        _bar(rng, length * second, radius * (0.5 + 0.5 * second), at=-half, bend=bend),
    )


def _tripolar(rng: np.random.Generator) -> Clumps:
    arms = []
    for c, s in ((1.0, 0.0), (-0.5, 0.8660254037844386), (-0.5, -0.8660254037844386)):
        u, v, radius = _bar(rng, 6 + 2.5 * rng.random(), 3.0 + 1.0 * rng.random())
        u = u + 6.5
        arms.append((c * u - s * v, s * u + c * v, radius))
    return _together(*arms)


def _lagging(rng: np.random.Generator) -> Clumps:
    n = 2 + int(5 * rng.random())
    left_behind = (18 * (rng.random(n) - 0.5), 6 * (rng.random(n) - 0.5), 1.9 + 1.0 * rng.random(n))
    return _together(_anaphase(rng), left_behind)


def _bridge(rng: np.random.Generator) -> Clumps:
    v, u, radius = _bar(rng, 9, 1.8, bend=2 * _signed(rng))  # a thin strand from pole to pole
    return _together(_anaphase(rng), (u + 8 * _signed(rng), v, radius))


def _asymmetric(rng: np.random.Generator) -> Clumps:
    return _anaphase(rng, 0.3 + 0.25 * rng.random())


def _fragments(rng: np.random.Generator) -> Clumps:
    n = 2 + int(5 * rng.random())
    side = np.where(rng.random(n) < 0.5, -1.0, 1.0)
    lost = (18 * (rng.random(n) - 0.5), side * (9 + 6 * rng.random(n)), 2.0 + 1.0 * rng.random(n))
    return _together(_plate(rng), lost)


# By what they look like: they are no phases of a real mitosis, and share no name with those of real datasets.
_FIGURES: dict[str, Figure] = {
    "scattered": _prometaphase,
    "plate": _plate,
    "ring": _ring,
    "two plates": _anaphase,
    "tripolar": _tripolar,
    "lagging": _lagging,
    "bridge": _bridge,
    "asymmetric": _asymmetric,
    "fragments": _fragments,
}
KINDS = tuple(_FIGURES)  # the classes of the drawn phases: four normal ones, five atypical ones
_NORMAL: tuple[Figure, ...] = (_plate, _plate, _ring, _anaphase, _prometaphase)
_ATYPICAL: tuple[Figure, ...] = (_tripolar, _lagging, _bridge, _asymmetric, _fragments)


def _ellipse(
    x: float, y: float, radius: float, axis: tuple[float, float], aspect: float, *, box: tuple[slice, ...] = ()
) -> Map:
    """Draw an ellipse: 1 at the centre, 0 on the outline, negative outside; over `box`, by default the whole patch."""
    c, s = axis
    dx, dy = _X[box] - x, _Y[box] - y
    u, v = c * dx + s * dy, (c * dy - s * dx) / aspect
    return 1 - (u * u + v * v) / (radius * radius)


def _soft(values: Map) -> Map:
    """Apply a smooth step from 0 at 0 to 1 at 1."""
    t: Map = np.minimum(np.maximum(values, 0), 1)
    return t * t * (3 - 2 * t)


def _noise(rng: np.random.Generator, cells: int) -> Map:
    """Draw smooth noise in 0 to 1: random values on a lattice of `cells` x `cells`, interpolated."""
    lattice = rng.random((cells + 1, cells + 1))
    position = (np.arange(SIZE) + 0.5) * cells / SIZE
    low = position.astype(int)
    weight = _soft(position - low)
    rows: Map = lattice[low] * (1 - weight)[:, None] + lattice[low + 1] * weight[:, None]
    return rows[:, low] * (1 - weight) + rows[:, low + 1] * weight


def _blur(image: Map) -> Map:
    padded = np.pad(image, 1, mode="edge")
    rows: Map = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16


def _signed(rng: np.random.Generator) -> float:
    return 2 * rng.random() - 1


def _direction(rng: np.random.Generator) -> tuple[float, float]:
    """Draw a random unit vector, by rejection: no sine or cosine is needed."""
    while True:
        x, y = _signed(rng), _signed(rng)
        squared = x * x + y * y
        if 0.01 < squared <= 1:
            length = math.sqrt(squared)
            return x / length, y / length
