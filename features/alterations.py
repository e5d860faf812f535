"""Which views show a patch altered, to test a backbone, and what was done to it?

The name of such a view has the name of the alteration among its modifiers: `full+rot90` is to `full` what a patch
turned by 90 degrees is to the patch. No probe chooses among these views.
"""

from __future__ import annotations

# Name in a view to what is done to the pixels that the view shows.
ALTERATIONS = {
    "rot90": "turned by 90 degrees, counterclockwise",
    "fliph": "mirrored, left to right",
    "stain": "haematoxylin a fifth stronger, eosin a fifth weaker",
    "blur": "blurred, by a Gaussian with a sigma of one pixel of the patch",
    "mpp2": "at twice the µm per pixel: squares of 2 x 2 pixels averaged",
}


def split_alteration(view: str) -> tuple[str, str | None]:
    """Split the name of a view into that of the same view of unaltered patches, and the alteration, if there is one.

    >>> split_alteration("center64+stain+imagenet+flips"), split_alteration("full")
    (('center64+imagenet+flips', 'stain'), ('full', None))
    """
    pixels, *modifiers = view.split("+")
    found = next((modifier for modifier in modifiers if modifier in ALTERATIONS), None)
    return "+".join([pixels, *(modifier for modifier in modifiers if modifier != found)]), found


def altered_view(view: str, alteration: str) -> str:
    """Name a view with an alteration.

    >>> altered_view("center64+flips", "blur")
    'center64+blur+flips'
    """
    pixels, *modifiers = view.split("+")
    return "+".join([pixels, alteration, *modifiers])
