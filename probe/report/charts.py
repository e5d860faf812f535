"""How are plots drawn? As SVG, without a plotting library.

It follows the page's light or dark theme, prints, and needs no script. Lines are told apart by dash and number as well
as by colour; the style sheet gives class `s0` .. `s7` both. The SVG of a plotting library carries style attributes,
which the page's content policy forbids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from probe.metrics import Interval

N_STYLES = 8
_ROW = 26  # height of a row of the interval plot
_LABEL = 290  # width of its labels
_PANEL = 400  # width of a panel
_GAP = 34
_SIDE = 320  # of a square plot
SMALL = 190  # of one of many
_MARGIN = 56
_MOST_LETTERS = 40


@dataclass(frozen=True)
class Row:
    """A row of the interval plot; for every panel a figure with its interval, and what else is marked.

    Attributes:
        label: the run.
        style: number of its line style.
        figures: per panel; NaN where there is none.
        folds: per panel, what each fold model reaches.
        published: per panel, (source, value, hint on it) of published figures.
    """

    label: str
    style: int
    figures: Sequence[Interval]
    folds: Sequence[Sequence[float]]
    published: Sequence[Sequence[tuple[str, float, str]]]


@dataclass(frozen=True)
class Line:
    """A line of a square plot: (x, y) points, and the hint shown on it."""

    style: int
    points: Sequence[tuple[float, float]]
    hint: str
    spread: Sequence[float] = ()  # above and below every point


def intervals(panels: Sequence[str], rows: Sequence[Row], *, title: str) -> Markup:
    """Draw values with their intervals, a panel per figure, a row per run."""
    height = _ROW * len(rows)
    width = _LABEL + len(panels) * (_PANEL + _GAP)
    body = [
        _text(_LABEL - 12, 30 + _ROW * (number + 0.5), _short(row.label), "label end", row.label)
        for number, row in enumerate(rows)
    ]
    for panel, name in enumerate(panels):
        seen = [
            value
            for row in rows
            for value in (
                *(row.figures[panel].value, row.figures[panel].low, row.figures[panel].high, *row.folds[panel]),
                *(row.figures[panel].wide or ()),
                *(value for _, value, _ in row.published[panel]),
            )
            if math.isfinite(value)
        ]
        ticks = _ticks(min(seen, default=0.0), max(seen, default=1.0))
        left = _LABEL + panel * (_PANEL + _GAP)
        scale = _Scale(ticks[0], ticks[-1], left, left + _PANEL)
        body.append(_text(left + _PANEL / 2, 14, name, "head"))
        for tick in ticks:
            body.append(_line(scale(tick), 24, scale(tick), 30 + height, "grid"))
            body.append(_text(scale(tick), 46 + height, f"{tick:.2f}".lstrip("0") or "0", "tick"))
        for number, row in enumerate(rows):
            body += _marks(row, panel, scale, 30 + _ROW * (number + 0.5))
    return _svg(width, height + 56, title, body)


def _marks(row: Row, panel: int, scale: _Scale, y: float) -> Iterator[Markup]:
    for value in row.folds[panel]:
        if math.isfinite(value):
            yield _line(scale(value), y - 6, scale(value), y + 6, "fold")
    low, high, value = row.figures[panel].low, row.figures[panel].high, row.figures[panel].value
    hint = f"{row.label}: {value:.3f}" + (f" ({low:.3f} to {high:.3f})" if math.isfinite(low) else "")
    wide = row.figures[panel].wide
    if wide is not None and math.isfinite(wide[0]):
        hint += f"; {wide[0]:.3f} to {wide[1]:.3f} if patients gave several patches"
        yield _line(scale(wide[0]), y, scale(wide[1]), y, f"thin s{row.style}", hint)
    if math.isfinite(low):
        yield _line(scale(low), y, scale(high), y, f"interval s{row.style}", hint)
    if math.isfinite(value):
        yield _circle(scale(value), y, 4.5, f"dot s{row.style}", hint)
    for source, published, hint in row.published[panel]:
        shape = "M0-5L5 0L0 5L-5 0Z" if source == "table-3" else "M-4-4H4V4H-4Z"
        yield Markup(
            '<path class="published" transform="translate({:.1f} {:.1f})" d="{}"><title>{}</title></path>'
        ).format(scale(published), y, shape, hint)


def square(
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    diagonal: bool = False,
    level: float | None = None,
    side: int = _SIDE,
) -> Markup:
    """Draw curves in the unit square, with what chance gives: the `diagonal`, or a `level`."""
    across, up = _Scale(0, 1, _MARGIN, _MARGIN + side), _Scale(0, 1, 12 + side, 12)
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1] if side == _SIDE else [0, 0.5, 1]
    body = list(_axes(across, up, ticks, ticks, x, y))
    if diagonal:
        body.append(_line(across(0), up(0), across(1), up(1), "chance"))
    if level is not None:
        body.append(_line(across(0), up(level), across(1), up(level), "chance"))
    body += [_curve(line, across, up) for line in lines]
    return _svg(_MARGIN + side + 14, side + 54, title, body)


def reliability(bins: Sequence[tuple[float, float, int]], *, title: str, style: int) -> Markup:
    """Draw the observed rate over the mean probability; a circle's area is its bin's number of patches."""
    across, up = _Scale(0, 1, _MARGIN, _MARGIN + SMALL), _Scale(0, 1, SMALL + 12, 12)
    body = list(_axes(across, up, [0, 0.5, 1], [0, 0.5, 1], "mean probability", "observed rate"))
    body.append(_line(across(0), up(0), across(1), up(1), "chance"))
    most = max((count for _, _, count in bins), default=1)
    for mean, rate, count in bins:
        hint = f"{count:,} patches: probability {mean:.2f}, observed {rate:.2f}"
        body.append(_circle(across(mean), up(rate), 3 + 8 * math.sqrt(count / most), f"bin s{style}", hint))
    return _svg(_MARGIN + SMALL + 14, SMALL + 54, title, body)


@dataclass(frozen=True)
class Dot:
    """A point of a plot: where, its interval upwards, its radius, and the hint shown on it."""

    x: float
    y: float
    hint: str
    low: float = math.nan
    high: float = math.nan
    r: float = 3.5
    hollow: bool = False


def agreement(dots: Sequence[Dot], *, title: str, x: str, y: str, style: int) -> Markup:
    """Draw what was predicted over what was annotated, both from 0 to the largest; on the dotted line they agree."""
    most = max((value for dot in dots for value in (dot.x, dot.y, dot.high) if math.isfinite(value)), default=1.0)
    ticks = _ticks(0.0, most)
    across, up = _Scale(0, ticks[-1], _MARGIN, _MARGIN + _SIDE), _Scale(0, ticks[-1], 12 + _SIDE, 12)
    body = list(_axes(across, up, ticks, ticks, x, y))
    body.append(_line(across(0), up(0), across(ticks[-1]), up(ticks[-1]), "chance"))
    body += [mark for dot in dots for mark in _dot(dot, across, up, style)]
    return _svg(_MARGIN + _SIDE + 14, _SIDE + 54, title, body)


def bland_altman(
    dots: Sequence[Dot], levels: Sequence[tuple[Interval, str]], *, title: str, x: str, y: str, style: int
) -> Markup:
    """Draw differences over means, with levels (bias, limits of agreement) and bands for their intervals."""
    xs = [dot.x for dot in dots]
    ys = [value for level, _ in levels for value in (level.value, level.low, level.high)] + [dot.y for dot in dots]
    seen = [value for value in ys if math.isfinite(value)]
    x_ticks, y_ticks = _ticks(0.0, max(xs, default=1.0)), _ticks(min(seen, default=-0.1), max(seen, default=0.1))
    across = _Scale(x_ticks[0], x_ticks[-1], _MARGIN, _MARGIN + _SIDE)
    up = _Scale(y_ticks[0], y_ticks[-1], 12 + _SIDE, 12)
    body = list(_axes(across, up, x_ticks, y_ticks, x, y))
    for level, name in levels:
        hint = f"{name}: {level.value:+.3f}"
        if math.isfinite(level.low):
            top, height = up(level.high), up(level.low) - up(level.high)
            body.append(
                Markup('<rect class="band s{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                    style, across.start, top, across.end - across.start, height
                )
            )
        if math.isfinite(level.value):
            at = up(level.value)
            body.append(_line(across.start, at, across.end, at, f"level s{style}", hint))
            body.append(_text(across.end - 4, at - 8, hint, "tick end"))
    body += [mark for dot in dots for mark in _dot(dot, across, up, style)]
    return _svg(_MARGIN + _SIDE + 14, _SIDE + 54, title, body)


def decision_curves(lines: Sequence[Line], everyone: Sequence[tuple[float, float]], *, title: str) -> Markup:
    """Draw the net benefit over the probability from which on one acts, beside acting on `everyone` and on none."""
    most = max((y for line in lines for _, y in line.points), default=0.1)
    ticks = _ticks(-0.15 * most, most)
    across, up = _Scale(0, 1, _MARGIN, _MARGIN + _SIDE), _Scale(ticks[0], ticks[-1], 12 + _SIDE, 12)
    body = list(_axes(across, up, [0, 0.2, 0.4, 0.6, 0.8, 1], ticks, "acting from this probability on", "net benefit"))
    body.append(_line(across(0), up(0), across(1), up(0), "chance"))
    shown = [(x, y) for x, y in everyone if y >= ticks[0]]
    d = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in shown)
    body.append(
        Markup('<polyline class="everyone" points="{}"><title>acting on every patch</title></polyline>').format(d)
    )
    within = [replace(line, points=[(x, y) for x, y in line.points if y >= ticks[0]]) for line in lines]
    body += [_curve(line, across, up) for line in within if line.points]
    return _svg(_MARGIN + _SIDE + 14, _SIDE + 54, title, body)


def _dot(dot: Dot, across: _Scale, up: _Scale, style: int) -> Iterator[Markup]:
    if not (math.isfinite(dot.x) and math.isfinite(dot.y)):
        return
    if math.isfinite(dot.low):
        yield _line(across(dot.x), up(dot.low), across(dot.x), up(dot.high), f"thin faint s{style}")
    yield _circle(across(dot.x), up(dot.y), dot.r, f"{'ring' if dot.hollow else 'dot'} s{style}", dot.hint)


def over_slides(
    lines: Sequence[Line], *, title: str, y: str, x: str = "training slides", level: float | None = None
) -> Markup:
    """Draw learning curves: a figure over a number of slides, beside the `level` that needs none."""
    xs = [at for line in lines for at, _ in line.points]
    ys = [
        y + sign * spread
        for line in lines
        for (_, y), spread in zip(line.points, line.spread or [0.0] * len(line.points), strict=True)
        for sign in (-1, 1)
    ]
    ys += [] if level is None else [level]
    ticks, most = _ticks(min(ys, default=0.0), max(ys, default=1.0)), max(xs, default=1.0)
    across, up = _Scale(0, most * 1.05, _MARGIN, _MARGIN + _SIDE), _Scale(ticks[0], ticks[-1], 12 + _SIDE, 12)
    step = max(1, round(most / 5, -1)) if most >= 25 else 5
    slides = [step * number for number in range(int(most * 1.05 / step) + 1)]
    body = list(_axes(across, up, slides, ticks, x, y))
    if level is not None:
        body.append(_line(across.start, up(level), across.end, up(level), "chance"))
    for line in lines:
        for (at, value), spread in zip(line.points, line.spread or [0.0] * len(line.points), strict=True):
            if spread:
                ends = (across(at), up(value - spread), across(at), up(value + spread))
                body.append(_line(*ends, f"thin s{line.style}"))
            body.append(_circle(across(at), up(value), 3, f"dot s{line.style}"))
        body.append(_curve(line, across, up))
    return _svg(_MARGIN + _SIDE + 14, _SIDE + 54, title, body)


@dataclass(frozen=True)
class _Scale:
    """Turn a value into pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(low: float, high: float) -> list[float]:
    """Round values from below `low` to above `high`, four to eight of them."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if (high - low) / step <= 6 or step == 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 2) for number in range(first, max(last, first + 1) + 1)]


def _axes(
    across: _Scale, up: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x: str, y: str
) -> Iterator[Markup]:
    for tick in x_ticks:
        yield _line(across(tick), up.start, across(tick), up.end, "grid")
        yield _text(across(tick), up.start + 16, f"{tick:g}", "tick")
    for tick in y_ticks:
        yield _line(across.start, up(tick), across.end, up(tick), "grid")
        yield _text(across.start - 6, up(tick), f"{tick:g}", "tick end")
    yield _text((across.start + across.end) / 2, up.start + 34, x, "axis")
    middle = (up.start + up.end) / 2
    yield Markup('<text class="axis" transform="translate(11 {:.1f}) rotate(-90)">{}</text>').format(middle, y)


def _curve(line: Line, across: _Scale, up: _Scale) -> Markup:
    d = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
    return Markup('<polyline class="curve s{}" points="{}"><title>{}</title></polyline>').format(
        line.style, d, line.hint
    )


def _line(x1: float, y1: float, x2: float, y2: float, name: str, hint: str = "") -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}">{}</line>').format(
        name, x1, y1, x2, y2, _titled(hint)
    )


def _circle(x: float, y: float, r: float, name: str, hint: str = "") -> Markup:
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">{}</circle>').format(
        name, x, y, r, _titled(hint)
    )


def _text(x: float, y: float, text: str, name: str, hint: str = "") -> Markup:
    title = _titled(hint if hint != text else "")
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}{}</text>').format(name, x, y, text, title)


def _titled(hint: str) -> Markup:
    """Make what a browser shows when one points at a shape."""
    return Markup("<title>{}</title>").format(hint) if hint else Markup()


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"


def _svg(width: float, height: float, title: str, body: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" height="{:.0f}" role="img" aria-label="{}">{}</svg>'
    ).format(width, height, width, height, title, Markup("").join(body))
