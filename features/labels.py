"""What do class names mean, and do two datasets mean the same by theirs?

A class is a number from 0; its name says what it means, in every dataset alike. Of two classes, label 1 is the positive
one: a class that would be label 1 of one dataset and label 0 of another is refused, because scores would be turned
upside down. More than two are put in one order when a dataset is loaded, and are found by name ever after.
"""

from __future__ import annotations

import colorsys
import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from features.console import UserError, nearest, say
from features.samples import MOST_CLASSES
from features.tables import first_of, is_missing, natural_order, refuse_rows

Classes = tuple[str, ...]  # the names of class 0, class 1, ...
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

# Colours that colour-blind eyes tell apart as well (Okabe and Ito, Color Universal Design, 2008).
_COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (230, 159, 0), (86, 180, 233), (204, 121, 167), (240, 228, 66))
_GOLDEN = 0.618  # turns of the colour wheel between further classes


def class_labels(
    names: Sequence[str],
    positive: str | None = None,
    *,
    classes: Classes | None = None,
    order: Sequence[str] | None = None,
) -> tuple[list[int], Classes]:
    """Turn class names into labels: the number of each class, from 0.

    With `classes`, names are looked up there and nothing is chosen. With `order`, that is their order. With `positive`,
    that class is label 1 and every other is label 0. Otherwise the order of three and more is that of their names, and
    a message names it. Of two, the positive class is the one named Atypical; else the one beside a usual name for
    "nothing found" (normal, benign, negative, non-...); else the one that sorts last (so 1 of 0 and 1). A message names
    the choice.

    >>> class_labels(["Normal", "Atypical", "Normal"])
    ([0, 1, 0], ('Normal', 'Atypical'))
    >>> class_labels(["stroma", "tumour", "fat"], "tumour")
    ([0, 1, 0], ('not tumour', 'tumour'))
    >>> class_labels(["mild", "severe", "clear"], order=("clear", "mild", "severe"))
    ([1, 2, 0], ('clear', 'mild', 'severe'))
    >>> class_labels(["3", "1", "2.0"])
    ([2, 0, 1], ('1', '2', '3'))
    >>> class_labels(["tumour"], classes=("normal", "tumour"))
    ([1], ('normal', 'tumour'))

    Args:
        names: the class of every patch.
        positive: the class that is label 1, told from all others.
        classes: the classes of the dataset that these patches test models of; some of them may be absent here.
        order: all classes in the order of their labels, whatever their case.

    Returns:
        The labels, and the names of class 0, class 1, ...

    Raises:
        UserError: for names that differ in case only, an unknown `positive`, an `order` that does not name each class
            once, names that are not among `classes`, more than 62 classes, or one class of which it is not known
            whether it is the positive one.
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
        label = _labels_by_name(present, classes)
    elif order is not None:
        if positive is not None:
            raise UserError(
                f"`positive={positive!r}` tells one class from the rest and `classes` tells all apart: give one of "
                "both. Of two classes in `classes`, the second is the positive one."
            )
        classes = _in_order(present, order)
        label = {name: k for k, name in enumerate(classes)}
    elif positive is None and len(present) > 2:
        _require_few(present)
        classes = tuple(present)
        label = {name: k for k, name in enumerate(classes)}
        say(
            f"{len(classes)} classes in the order {numbered(classes)}. The option `classes` gives another order, "
            "`positive` tells one class from all others."
        )
    else:
        classes = _with_positive(present, positive)
        label = {name: int(name == classes[1]) for name in present}
    return [label[name] for name in names], classes


def _with_positive(present: Sequence[str], positive: str | None) -> Classes:
    """Choose the negative and the positive class: the given one and the rest, or one of at most two."""
    positive = _choose_positive(present) if positive is None else _find_class(positive, present)
    others = [name for name in present if name != positive]
    if positive == "1" and set(present) <= set(NUMBERS):
        return NUMBERS
    if len(others) > 1:
        named = first_of(others) if len(others) > MOST_CLASSES else ", ".join(others)
        say(f"Class 0 is every class but {positive!r}: {named}.")
    alone = len(others) == 1 or positive not in present
    return (others[0] if alone else f"not {positive}", positive)


def _in_order(present: Sequence[str], order: Sequence[str]) -> Classes:
    """Put the classes that are present into a given order, which must name each of them once."""
    listed = _whole_numbers([name.strip() for name in order])
    found = {name.casefold(): name for name in present}
    repeated = [name for k, name in enumerate(listed) if name.casefold() in map(str.casefold, listed[:k])]
    unlisted = [name for name in present if name.casefold() not in map(str.casefold, listed)]
    absent = [name for name in listed if name.casefold() not in found]
    if repeated:
        raise UserError(f"`classes` names {repeated[0]} twice; expected each class once.")
    if unlisted:
        slip = nearest(absent[0], unlisted) if absent else ""
        comma = next(
            (f" {name!r} cannot be listed, as it has a comma: change it." for name in unlisted if "," in name), ""
        )
        raise UserError(
            f"`classes` leaves out {first_of(unlisted)}; expected every class of the patches, in the order of their "
            f"labels: {first_of([*listed, *unlisted])}.{slip}{comma} To tell one class from all others, give "
            "`positive`; to make two classes one, give `labels`."
        )
    if absent:  # as of a test set that has some of the classes
        say(f"No patch is of {', '.join(absent)}, which `classes` names.")
    _require_few(listed)
    if len(listed) < 2:
        raise UserError(f"`classes` names one class ({listed[0]}); expected two or more, in the order of their labels.")
    return tuple(found.get(name.casefold(), name) for name in listed)


def _require_few(classes: Sequence[str]) -> None:
    if len(classes) > MOST_CLASSES:
        raise UserError(
            f"found {len(classes):,} classes ({first_of(classes)}); expected at most {MOST_CLASSES}. If these are "
            "measurements or identifiers, take another column as the label. Otherwise make several classes one with "
            "`labels`, or tell one from all others with `positive`."
        )


def require_grades(classes: Classes, *, ordered: bool) -> None:
    """Refuse two classes as grades, and those of which only the alphabet says which is more.

    >>> require_grades(("grade 1", "grade 2", "grade 3"), ordered=False)

    Args:
        classes: from the least to the most.
        ordered: whether the user gave that order.

    Raises:
        UserError: for two classes, or for names without numbers in an order that nobody gave.
    """
    if len(classes) == 2:
        raise UserError(f"`ordinal` is for three and more classes; found two, {classes[0]!r} and {classes[1]!r}.")
    if not ordered and not all(re.search("[0-9]", name) for name in classes):
        raise UserError(
            f"`ordinal` needs to know which class is more: found {', '.join(classes)}. Name them from the least to the "
            "most with `classes`."
        )


def numbered(classes: Classes) -> str:
    """List classes with their labels.

    >>> numbered(("a", "b")), numbered(("a", "b", "c"))
    ('a (0) and b (1)', 'a (0), b (1) and c (2)')
    """
    *first, last = (f"{name} ({k})" for k, name in enumerate(classes))
    return f"{', '.join(first)} and {last}"


def _whole_numbers(names: Sequence[str]) -> Sequence[str]:
    """Write 1.0, 01 and 1 alike where every name is a whole number."""
    try:
        numbers = {name: float(name) for name in set(names)}
    except ValueError:
        return names
    if not all(number.is_integer() for number in numbers.values()):
        return names
    return [str(int(numbers[name])) for name in names]


def _labels_by_name(present: Sequence[str], classes: Classes) -> dict[str, int]:
    """Look up the label of every class that is present among the classes of a training set."""
    if len(classes) == 2 and classes != NUMBERS and present and set(present) <= set(NUMBERS):
        say(f"The labels 0 and 1 are taken as {classes[0]} and {classes[1]}.")
        return {name: int(name) for name in present}
    found = zip(present, _find_labels(present, classes, rest=_against_rest(classes)), strict=True)
    label = {name: k for name, k in found if k is not None}
    unknown = [name for name in present if name not in label]
    if unknown:
        raise UserError(
            f"its classes are {', '.join(present)}, those of the training set {numbered(classes)}: "
            f"{', '.join(unknown)} is none of them. Say what that means, for example "
            f"`labels='{unknown[0]}={_meant(unknown[0], classes)}'`."
        )
    return label


def _find_labels(names: Sequence[str], classes: Classes, *, rest: bool) -> list[int | None]:
    """Find the label of every name; None where there is none. With `rest`, what is not class 1 is class 0."""
    known = {name.casefold(): k for k, name in enumerate(classes)}
    label = [known.get(name.casefold()) for name in names]
    others = [name.casefold() for name, k in zip(names, label, strict=True) if k is None]
    slips = difflib.get_close_matches(classes[1].casefold(), others, cutoff=0.8)
    return [0 if k is None and rest and 1 in label and not slips else k for k in label]


def _against_rest(classes: Classes) -> bool:
    """Whether class 0 is every class but class 1."""
    return len(classes) == 2 and _equal(classes[0], f"not {classes[1]}")


def _meant(name: str, classes: Classes) -> str:
    """Choose a class for the example in a message: of several the one whose name is the nearest, of two the second."""
    close = difflib.get_close_matches(name, classes, n=1, cutoff=0.5) if len(classes) > 2 else []
    return close[0] if close else classes[1]


def _find_class(positive: str, present: Sequence[str]) -> str:
    """Find the positive class among those present, whatever its case; of a lone class it may be the absent one."""
    same = [name for name in present if name.casefold() == positive.casefold()]
    if not same and len(present) != 1:
        named = first_of(present) if len(present) > MOST_CLASSES else ", ".join(present)
        raise UserError(f"there is no class {positive!r}.{nearest(positive, present)} The classes are {named}.")
    return same[0] if same else positive


def _choose_positive(present: Sequence[str]) -> str:
    """Choose the positive class of at most two."""
    if not present:
        raise UserError("found no patches.")
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
    >>> compare_classes(("fat", "stroma", "tumor"), ("tumor", "fat"))
    'swapped'

    Returns:
        "same": every class means the same and has the same label. "swapped": a class has one label here and another
        there; or, of more than two, all classes of the test set are known and some are absent from it. "partly": one
        class is the same and another is not known. "other": no name in common, another task.
    """
    two = len(train) == len(test) == 2
    if two and NUMBERS in (train, test) and not all(name.isdecimal() for name in (*train, *test)):
        return "same"
    equal = [_equal(here, there) for here, there in zip(train, test, strict=False)]
    if two:
        if any(_equal(train[side], test[1 - side]) for side in (0, 1)):
            return "swapped"
        fitting = all(_fits(test[side], train[side]) for side in (0, 1))
        return ("same" if fitting else "partly") if any(equal) else "other"
    if len(train) == len(test) and all(equal):
        return "same"
    label = _training_labels(train, test)
    return "swapped" if None not in label else "partly" if set(label) != {None} else "other"


def _training_labels(train: Classes, test: Classes) -> list[int | None]:
    """Find the training label of every test class by its name; of several, all may be "not X" but X."""
    return _find_labels(test, train, rest=len(test) > 2 and _against_rest(train))


def aligned(
    train: Classes, test: Classes, *, train_name: str, test_name: str, labels: Mapping[str, str]
) -> tuple[int, ...]:
    """Decide how the labels of a test set are read: give the training label of each of its labels.

    More than two classes are found by name. Two are turned round, (1, 0), only where `labels` says what a class of the
    test set means, so that both are known by name; otherwise they stay as they are, (0, 1).

    >>> aligned(("fat", "stroma", "tumor"), ("tumor", "fat"), train_name="a", test_name="b", labels={})
    (2, 0)

    Raises:
        UserError: if a class of two changes sides, or a class of the test set is none of the training set.
    """
    test = tuple(labels.get(name, name) for name in test)
    relation = compare_classes(train, test)
    if relation == "same":
        return tuple(range(len(test)))
    label = _training_labels(train, test)
    known = [k for k in label if k is not None]
    said = len(train) > 2 or len(test) > 2 or any(name in labels.values() for name in test)
    if relation == "swapped" and len(known) == len(test) and said:
        return tuple(known)
    in_both = [name for name, k in zip(test, label, strict=True) if k is not None]
    unknown = next((name for name in test if name not in in_both), test[1])
    found = {
        "swapped": f"{in_both[0]} changes sides" if in_both else "",
        "partly": f"only {', '.join(in_both)} {'is' if len(in_both) == 1 else 'are'} in both",
        "other": "no class is in both",
    }[relation]
    where = (
        "name the right positive class where it is loaded (fm-extract --positive)"
        if len(train) == 2
        else "load it with the training set's classes (fm-extract --classes)"
    )
    raise UserError(
        f"{test_name} has the classes {numbered(test)}, {train_name} has {numbered(train)}: {found}. Say what the "
        f"classes of {test_name} mean, for example `labels='{unknown}={_meant(unknown, train)}'`; or {where}; or leave "
        "it out with `test`."
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


def class_color(k: int) -> tuple[int, int, int]:
    """Choose the colour of a class: red, green and blue from 0 to 255.

    >>> class_color(0), class_color(1)
    ((0, 114, 178), (213, 94, 0))
    """
    if k < len(_COLORS):
        return _COLORS[k]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(k * _GOLDEN % 1, 0.8, 0.8))
    return red, green, blue
