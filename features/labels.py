"""What do class names mean, and do two datasets mean the same by theirs?

Label 1 is the positive class. Which class that is follows from its name, in every dataset alike: a class that would be
label 1 of one dataset and label 0 of another is refused, because scores would be turned upside down.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from features.console import UserError, nearest, say
from features.tables import first_of, is_missing, natural_order, refuse_rows

Classes = tuple[str, str]  # the names of class 0 and class 1
ATYPICAL = "Atypical"
NUMBERS: Classes = ("0", "1")  # labels that are no names: 1 is the positive class by convention
# Names that mean "nothing found", as well as whatever begins with no, non or not.
_NEGATIVE = frozenset(
    {
        "absent",
        "background",
        "benign",
        "control",
        "false",
        "healthy",
        "neg",
        "negative",
        "normal",
        "typical",
        "ordinary",
    }
    | {"free", "low", "unaffected", "uninvolved", "nein", "nee", "wildtype", "wt", "mss", "nmf", "no", "non", "not"}
)


def binary_labels(
    names: Sequence[str], positive: str | None = None, *, classes: Classes | None = None
) -> tuple[list[int], Classes]:
    """Turn class names into labels: 1 for the positive class, 0 for every other.

    With `classes`, names are looked up there and nothing is chosen. Otherwise the positive class is `positive`; else,
    of two classes, the one named Atypical; else the one beside a usual name for "nothing found" (normal, benign,
    negative, non-...); else the one that sorts last (so 1 of 0 and 1). A message names the choice.

    >>> binary_labels(["Normal", "Atypical", "Normal"])
    ([0, 1, 0], ('Normal', 'Atypical'))
    >>> binary_labels(["stroma", "tumour", "fat"], "tumour")
    ([0, 1, 0], ('not tumour', 'tumour'))
    >>> binary_labels(["1.0", "0"])
    ([1, 0], ('0', '1'))
    >>> binary_labels(["tumour"], classes=("normal", "tumour"))
    ([1], ('normal', 'tumour'))

    Args:
        names: the class of every patch.
        positive: the class that is label 1.
        classes: the classes of the dataset that these patches test models of; one of them may be absent here.

    Returns:
        The labels, and the names of class 0 and class 1.

    Raises:
        UserError: for names that differ in case only, an unknown `positive`, names that are not among `classes`, three
            and more classes without `positive`, or one class of which it is not known whether it is the positive one.
    """
    names = _whole_numbers(names)
    present = sorted(set(names), key=natural_order)
    alike: dict[str, str] = {}
    for name in present:
        if alike.setdefault(name.casefold(), name) != name:
            raise UserError(
                f"the classes {alike[name.casefold()]!r} and {name!r} differ in case only. Make them one, for example "
                f"by `labels='{name}={alike[name.casefold()]}'`."
            )
    if classes is not None:
        return _labels_by_name(names, present, classes), classes
    if positive is not None:
        positive = _find_class(positive, present, lone=len(present) == 1)
    else:
        positive = _choose_positive(present)
    others = [name for name in present if name != positive]
    if positive == "1" and set(present) <= set(NUMBERS):
        return [int(name) for name in names], NUMBERS
    if positive not in present:
        negative = others[0]
    else:
        negative = others[0] if len(others) == 1 else f"not {positive}"
        if len(others) > 1:
            say(f"Class 0 is every class but {positive!r}: {', '.join(others)}.")
    return [int(name == positive) for name in names], (negative, positive)


def _whole_numbers(names: Sequence[str]) -> Sequence[str]:
    """Write 1.0, 01 and 1 alike where every name is a whole number."""
    try:
        numbers = {name: float(name) for name in set(names)}
    except ValueError:
        return names
    if not all(number.is_integer() for number in numbers.values()):
        return names
    return [str(int(numbers[name])) for name in names]


def _labels_by_name(names: Sequence[str], present: Sequence[str], classes: Classes) -> list[int]:
    label = {name: side for name in present for side in (0, 1) if _equal(name, classes[side])}
    if present and set(present) <= set(NUMBERS) and classes != NUMBERS:
        say(f"The labels 0 and 1 are taken as {classes[0]} and {classes[1]}.")
        label = {name: int(name) for name in present}
    if _equal(classes[0], f"not {classes[1]}"):  # of several classes of the training set, all but one
        others = [name for name in present if name not in label]
        slips = difflib.get_close_matches(classes[1].casefold(), [name.casefold() for name in others], cutoff=0.8)
        if not slips and 1 in label.values():
            label |= dict.fromkeys(others, 0)
    unknown = [name for name in present if name not in label]
    if unknown:
        raise UserError(
            f"its classes are {', '.join(present)}, those of the training set {classes[0]} (0) and {classes[1]} (1): "
            f"{', '.join(unknown)} is none of them. Say what that means, for example "
            f"`labels='{unknown[0]}={classes[1]}'`."
        )
    return [label[name] for name in names]


def _find_class(positive: str, present: Sequence[str], *, lone: bool) -> str:
    """Find the positive class among those present, whatever its case; of a lone class it may be the absent one."""
    same = [name for name in present if name.casefold() == positive.casefold()]
    if not same and not (lone and present):
        raise UserError(
            f"there is no class {positive!r}.{nearest(positive, present)} The classes are {', '.join(present)}."
        )
    return same[0] if same else positive


def _choose_positive(present: Sequence[str]) -> str:
    if not present:
        raise UserError("found no patches.")
    if len(present) > 2:
        raise UserError(
            f"found {len(present)} classes ({first_of(present)}); name the one to tell from all others with `positive`."
        )
    atypical = [name for name in present if ATYPICAL.casefold() in _words(name) and not is_negative(name)]
    if len(atypical) == 1:
        return atypical[0]
    negative = [name for name in present if is_negative(name)]
    if len(present) == 1:
        if negative or tuple(present) == ("0",):
            return f"not {present[0]}" if negative else "1"
        if tuple(present) == ("1",):
            return "1"
        raise UserError(
            f"found one class ({present[0]}) and cannot tell whether it is the positive one. Name the positive class "
            f"with `positive`: {present[0]!r}, or the one that is absent."
        )
    chosen = present[1] if len(negative) != 1 else next(name for name in present if name != negative[0])
    if tuple(present) != NUMBERS:
        say(f"The positive class (label 1) is {chosen!r}; the option `positive` names another.")
    return chosen


def is_negative(name: str) -> bool:
    """Whether a class name says by itself that nothing was found.

    >>> [name for name in ("normal", "Non-tumor", "not tumour", "tumor", "node") if is_negative(name)]
    ['normal', 'Non-tumor', 'not tumour']
    """
    return bool(_NEGATIVE.intersection(_words(name))) or name.casefold().startswith(("non", "no_"))


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", name.casefold())


def read_labels(
    cells: Sequence[str], labels: Mapping[str, str] | None, *, source: object, where: Sequence[str], skip: bool | None
) -> tuple[list[str], list[int]]:
    """Read the class names of patches: rename them, and refuse or leave out those that are missing.

    Args:
        cells: (n,) as they were written.
        labels: old class name to new.
        source: their file, for messages.
        where: (n,) what to call each patch in a message.
        skip: leave out patches without a label; None if the user cannot ask for that here.

    Returns:
        The class names of the patches that are kept, and their rows.

    Raises:
        UserError: naming the patches without a label, unless they are left out.
    """
    written = [unicodedata.normalize("NFC", cell).strip() for cell in cells]
    numbers = dict(
        zip(written, _whole_numbers([cell if not is_missing(cell) else "0" for cell in written]), strict=True)
    )
    spelled = [cell if is_missing(cell) else numbers[cell] for cell in written]
    named = [(labels or {}).get(name, name) for name in spelled]
    rows = [row for row, name in enumerate(named) if not is_missing(name)]
    missing = sorted(set(range(len(named))) - set(rows))
    if not skip:
        refuse_rows(
            source,
            [f"{where[row]} ({named[row] or 'empty'})" for row in missing],
            len(named),
            "no label",
            "Label these patches or remove them."
            if skip is None
            else "Label these patches, remove them, or leave them out with `skip_unlabelled`; if it is the name of a "
            "class, give it another with `labels`.",
        )
    elif missing:
        say(f"{source}: {len(missing)} of {len(named)} patches have no label and are left out.")
    return [named[row] for row in rows], rows


# ----------------------------------------------------------------------------------------------------- between datasets


def compare_classes(train: Classes, test: Classes) -> Literal["same", "swapped", "partly", "other"]:
    """Compare the classes of two datasets by name; case makes no difference, and "not X" may be anything but X.

    >>> compare_classes(("Normal", "Atypical"), ("normal", "atypical"))
    'same'
    >>> compare_classes(("normal", "tumor"), ("tumor", "normal"))
    'swapped'
    >>> compare_classes(("normal", "tumor"), ("normal", "cancer"))
    'partly'
    >>> compare_classes(("normal", "tumor"), ("metaphase", "anaphase"))
    'other'

    Returns:
        "same": both classes mean the same. "swapped": a class is label 1 of one and label 0 of the other. "partly":
        one class is the same and the other is not. "other": no name in common, another task.
    """
    if NUMBERS in (train, test) and not all(name.isdecimal() for name in (*train, *test)):
        return "same"
    if any(_equal(train[side], test[1 - side]) for side in (0, 1)):
        return "swapped"
    equal = [_equal(train[side], test[side]) for side in (0, 1)]
    fitting = [_fits(test[side], train[side]) for side in (0, 1)]
    if any(equal):
        return "same" if all(fitting) else "partly"
    return "other"


def aligned(train: Classes, test: Classes, *, train_name: str, test_name: str, labels: Mapping[str, str]) -> bool:
    """Decide how the labels of a test set are read: False as they are, True the other way round.

    They are turned round only where `labels` says what a class of the test set means, so that both classes are known
    by name.

    Raises:
        UserError: if a class changes sides, or a name is on one side only.
    """
    test = (labels.get(test[0], test[0]), labels.get(test[1], test[1]))
    relation = compare_classes(train, test)
    if relation == "same":
        return False
    known = all(any(_equal(name, other) for other in train) for name in test)
    if relation == "swapped" and known and any(name in labels.values() for name in test):
        return True
    in_both = [name for name in test if any(_equal(name, other) for other in train)]
    unknown = next((name for name in test if name not in in_both), test[1])
    found = {
        "swapped": f"{in_both[0]} changes sides" if in_both else "",
        "partly": f"only {in_both[0]} is in both" if in_both else "",
        "other": "no class is in both",
    }[relation]
    raise UserError(
        f"{test_name} has the classes {test[0]} (0) and {test[1]} (1), {train_name} has {train[0]} (0) and {train[1]} "
        f"(1): {found}. Say what the classes of {test_name} mean, for example `labels='{unknown}={train[1]}'`; or name "
        "the right positive class where it is loaded (fm-extract --positive); or leave it out with `test`."
    )


class Renaming(dict[str, str]):
    """Old class names to new ones, whatever their case; it remembers which it has met."""

    def __init__(self, names: Mapping[str, str] = {}) -> None:
        super().__init__(names)
        self._new = {_key(old): new for old, new in names.items()}
        self._met: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Give the new name of a class; `default` if it has none."""
        self._met.add(_key(name))
        return self._new.get(_key(name), default)

    def require_met(self) -> None:
        """Refuse old names that no dataset has.

        Raises:
            UserError: naming the first of them.
        """
        for old in self:
            if _key(old) not in self._met:
                raise UserError(f"`labels` renames {old!r}, and there is no such class.{nearest(old, self._met)}")


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def parse_renaming(text: str | None) -> Renaming:
    """Read `old=new,old=new`.

    >>> parse_renaming("cancer=tumor, benign = normal")
    {'cancer': 'tumor', 'benign': 'normal'}

    Raises:
        UserError: for anything else.
    """
    renamed: dict[str, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        old, equals, new = (piece.strip() for piece in part.partition("="))
        if not (old and equals and new) or renamed.setdefault(old, new) != new:
            raise UserError(
                f"`labels` says {part.strip()!r}; expected old=new, for example cancer=tumor, each old once."
            )
    return Renaming(renamed)


def _equal(a: str, b: str) -> bool:
    return a.casefold() == b.casefold()


def _fits(a: str, b: str) -> bool:
    """Whether two names can mean one class: equal, or one of them "not X" and the other anything but X."""
    if _equal(a, b):
        return True
    return any(
        negated.casefold().startswith("not ") and not _equal(negated[4:], other) for negated, other in ((a, b), (b, a))
    )
