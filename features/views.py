"""What may a view be called, and what does its name say?

A view is what the network is shown of a patch: `full` is the whole patch, prepared as the model's card says; `centerN`
is its central N source pixels, where the figure is. `@M` asks for an input of M pixels, and `+imagenet` for another
normalisation than the card's: `full@224+imagenet` is what the paper's text says. `+flips` embeds a patch in eight
orientations and takes the mean. `+rot90`, `+stain` and the like show it altered, to test a backbone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from features.alterations import ALTERATIONS
from features.console import UserError, nearest

STATISTICS = ("imagenet", "half")  # modifiers that ask for another normalisation than the card's
FLIPS = "flips"  # the modifier of views that show every patch in eight orientations
_MOST_PIXELS = 2_048  # edge of a network's input; its activations would not fit into any memory long before


@dataclass(frozen=True)
class View:
    """An input policy: which source pixels the network sees, at what size, and how they are normalised.

    Attributes:
        name: as in the store: "full", "center64", "center64@160", "full@224+imagenet".
        crop: edge of the central square in source pixels; None for the whole patch.
        input_size: edge of the network's input in pixels; None for the model's own.
        statistics: one of `STATISTICS`; None for the model card's mean and standard deviation.
        flips: whether the network sees every patch in all eight orientations, and its outputs are averaged.
        alteration: a key of `ALTERATIONS`: what is done to the patch first, to test a backbone; None for nothing.
    """

    name: str
    crop: int | None
    input_size: int | None
    statistics: str | None = None
    flips: bool = False
    alteration: str | None = None

    def resizes(self, own: int) -> bool:
        """Whether a network gets images of another size than its own, in pixels, and so has to be built for any."""
        return self.input_size not in (None, own)


def parse_view(text: str) -> View:
    """Read a view's name: `full` or `centerN` (central N source pixels), then perhaps `@M` (input of M pixels), then
    perhaps modifiers, each after a `+`: one of `ALTERATIONS` (the patch is turned, blurred and so on), `+imagenet` or
    `+half` (normalised by ImageNet's statistics, or by one half), and `+flips` (the mean over the patch in all eight
    orientations).

    >>> parse_view("full")
    View(name='full', crop=None, input_size=None, statistics=None, flips=False, alteration=None)
    >>> parse_view("center64@160+flips")
    View(name='center64@160+flips', crop=64, input_size=160, statistics=None, flips=True, alteration=None)
    >>> parse_view("full@224+imagenet+blur").name
    'full@224+blur+imagenet'

    Raises:
        UserError: if the name is none of these; the message names the nearest.
    """
    pixels, *modifiers = text.split("+")
    match = re.fullmatch(r"(full|center([1-9][0-9]{0,8}))(?:@([1-9][0-9]{0,8}))?", pixels)
    if not match:
        raise UserError(
            f"unknown view {text!r}.{_nearest(pixels)} Use 'full' (the whole patch), 'center64' (its central 64 "
            "pixels), 'center64@160' (the same, resized to an input of 160 pixels), or any of these with '+imagenet' "
            "(normalised by ImageNet's statistics), '+flips' (the mean over eight orientations) or an alteration such "
            "as '+rot90'."
        )
    if match[3] and int(match[3]) > _MOST_PIXELS:
        raise UserError(f"view {text!r}: an input of {int(match[3]):,} pixels is too large; at most {_MOST_PIXELS:,}.")
    known = (*STATISTICS, FLIPS, *ALTERATIONS)
    unknown = [modifier for modifier in modifiers if modifier not in known]
    if unknown:
        listed = ", ".join(f"+{name}" for name in known)
        raise UserError(
            f"view {text!r}: unknown modifier '+{unknown[0]}'; known are {listed}.{nearest(unknown[0], known)}"
        )
    alterations, statistics = (
        [name for name in dict.fromkeys(modifiers) if name in of] for of in (ALTERATIONS, STATISTICS)
    )
    if len(statistics) > 1:
        raise UserError(f"view {text!r}: images are normalised in one way; use one of +{' and +'.join(statistics)}.")
    if len(alterations) > 1:
        raise UserError(f"view {text!r}: patches are altered in one way; use one of +{' and +'.join(alterations)}.")
    flips = FLIPS in modifiers
    return View(
        # One name, in whatever order they were given.
        "+".join([pixels, *alterations, *statistics, *[FLIPS] * flips]),
        crop=int(match[2]) if match[2] else None,
        input_size=int(match[3]) if match[3] else None,
        statistics=statistics[0] if statistics else None,
        flips=flips,
        alteration=alterations[0] if alterations else None,
    )


def _nearest(pixels: str) -> str:
    """Suggest a view for what stands before the modifiers of an unknown one."""
    number = re.search(r"[1-9][0-9]*", pixels)
    return nearest(pixels.partition("@")[0], ("full", f"center{number[0] if number else 64}"))
