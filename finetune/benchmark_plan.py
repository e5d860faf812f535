"""Which rows does a benchmark plan ask for, and which command is each?

A plan is a TOML file (docs/benchmark.md): models x methods x recipes on one training set. Each row is a command that
stands by itself, and its options are the record that this command writes into its run: by that a row knows its run.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import msgspec
import typer
from typer.main import get_command
from typer.models import OptionInfo

from extract.backbones import Backbone, find_backbone
from extract.datasets import DATASETS, parse_source, require_distinct_names
from extract.registry import POOLINGS
from extract.views import parse_view
from features.console import UserError, nearest
from features.exchange import IMPORTED_POOLING
from features.fingerprint import fingerprint
from features.labels import parse_renaming
from features.options import DEFAULT_RUNS, DEFAULT_STORE, parse_names
from finetune.lora import LoraOptions
from finetune.network import METHODS
from finetune.options import FinetuneOptions
from finetune.recipes import AUTHORS, RECIPE_NAMES
from probe.candidates import TRAINED_VIEWS
from probe.curve import checked_fractions
from probe.probing import ProbeOptions

EMBED, PROBE = "embed", "probe"  # methods of rows, beside those of fine-tuning
SHIPPED = Path(str(files("finetune"))) / "plans"

_READING = ("positive", "labels", "classes", "ordinal", "skip_unlabelled")  # how the patches of one's own are read
_GRID = ("models", "imported", "methods", "recipes", "views")
# A combination would be a second run of a row.
_SET_BY_ROW = {"model", "train", "test", "method", "recipe", "lora", "device", "combine"}
_SET_BY_ROW |= {"size", "size_um", "mpp"}  # plans have no points on slides


def _names(options: type[ProbeOptions | FinetuneOptions | LoraOptions]) -> set[str]:
    return {one.name for one in fields(options)} - _SET_BY_ROW


_OF_LORA = {f"lora_{name}" for name in _names(LoraOptions)}
_OF_PROBES, _OF_TRAININGS = _names(ProbeOptions), _names(FinetuneOptions) | _OF_LORA
_OPTIONS = _OF_PROBES | _OF_TRAININGS
_TYPES = {f"lora_{name}": of for name, of in get_type_hints(LoraOptions).items()}
_TYPES |= get_type_hints(ProbeOptions) | get_type_hints(FinetuneOptions)
_IN_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    tuple[str, ...]: "a list of names",
    tuple[float, ...]: "a list of numbers, such as [0.1, 0.5, 1]",
}
_Options = TypeVar("_Options", ProbeOptions, FinetuneOptions, LoraOptions)
_ALSO_CALLED = {"lr": "learning_rate", "folds": "cv", "rank": "lora_rank"}


@dataclass(frozen=True)
class Row:
    """One command of a benchmark.

    Attributes:
        number: from 1, in the order in which rows are run.
        unit: number, from 0, of the rows that one process runs one after the other: the embeddings of a model and the
            probes that read them, or one fine-tuning.
        model: its name.
        method: "embed", "probe", or how it is fine-tuned.
        views: that are embedded, or that a probe chooses from; none of a fine-tuning, and of embeddings that were
            imported all that there are.
        options: of a probe or a fine-tuning.
        imported: whether the embeddings that it reads were made elsewhere, and imported into the store.
    """

    number: int
    unit: int
    model: str
    method: str
    views: tuple[str, ...]
    options: ProbeOptions | FinetuneOptions | None
    imported: bool = False

    @property
    def recipe(self) -> str:
        """The name that the command knows the recipe by; empty where there is none."""
        return "" if self.options is None else self.options.recipe

    @property
    def title(self) -> str:
        """What a message calls it."""
        return " ".join(part for part in (self.model, self.method, self.recipe) if part)

    @property
    def fold_options(self) -> tuple[Any, ...]:
        """What decides its folds: cv, fold_seed, paper_folds, soft_labels and folds_by of `make_experiment`."""
        of = self.options or ProbeOptions()
        return of.cv, of.fold_seed, of.recipe in ("paper", "authors"), of.soft_labels, of.folds_by

    @property
    def key(self) -> str:
        """Digest of what is asked, whatever plan asks it."""
        options = None if self.options is None else self.options.as_record()
        return fingerprint({"model": self.model, "method": self.method, "views": self.views, "options": options})


@dataclass(frozen=True)
class Plan:
    """What a plan asks for.

    Attributes:
        source: the name or path that it was read by.
        title: in the plan's words.
        train, test: datasets, as the user names them.
        reading: how patches of one's own are read, by the options of fm-extract.
        rows: embeddings first, then probes, then fine-tunings.
        notes: what is left out of it, and why.
    """

    source: str
    title: str
    train: str
    test: tuple[str, ...]
    reading: Mapping[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def n_units(self) -> int:
        """How many parts of the work there are that do not wait for another."""
        return 1 + max(row.unit for row in self.rows)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Training set and test sets."""
        return (self.train, *(name for name in self.test if name != self.train))


@dataclass(frozen=True)
class Where:
    """Where the commands find and leave things: the options that say no more than that."""

    data: Path | None = None
    store: str = DEFAULT_STORE
    runs: Path = DEFAULT_RUNS
    device: str = "auto"

    @property
    def has_store(self) -> bool:
        """Whether there is a store; one in a bucket is taken to be there."""
        return "://" in self.store or (Path(self.store) / "zarr.json").is_file()


_PLACES = frozenset(one.name for one in fields(Where))


# ----------------------------------------------------------------------------------------------------------- the plan


def read_plan(name_or_path: str, *, without: Sequence[str] = ()) -> Plan:
    """Read a plan: one of those that come with mitofm, by name, or a file.

    >>> [row.title for row in read_plan("demo").rows][:2]
    ['efficientnet-lite0 embed', 'efficientnet-lite1 embed']

    Args:
        name_or_path: of the plan.
        without: test sets to leave out, because they are not here.

    Raises:
        UserError: no such plan, no TOML, an unknown key, model, dataset, method, recipe or view, nothing to do, or a
            value that an option does not take.
    """
    path = Path(name_or_path)
    if not path.is_file():
        names = sorted(one.stem for one in SHIPPED.glob("*.toml"))
        if name_or_path not in names:
            raise UserError(
                f"there is no plan and no file {name_or_path!r}.{nearest(name_or_path, names)} Plans that come with "
                f"mitofm: {', '.join(names)}. docs/benchmark.md says how to write one."
            )
        path = SHIPPED / f"{name_or_path}.toml"
    content = path.read_bytes()
    try:
        if b"\0" in content:  # UTF-16 of plain letters is UTF-8 as well
            raise ValueError("it has zero bytes")
        text = content.decode("utf-8-sig")  # Windows begins files with a mark
    except ValueError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}. Save the plan in the encoding UTF-8.") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is no TOML file: {error}. Expected a benchmark plan (docs/benchmark.md).") from None
    try:
        return _plan(name_or_path, raw, without)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _plan(source: str, raw: dict[str, Any], without: Sequence[str]) -> Plan:
    tables = raw.pop("rows", [{}])
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        raise UserError("`rows` is empty or no table. Expected [[rows]] with models and methods, or leave it out.")
    known = {"title", "train", "test", *_READING, *_GRID, *_OPTIONS}
    of_rows = {*_GRID, *_OPTIONS} - {*_READING}
    for table, names in ((raw, known), *((table, of_rows) for table in tables)):
        for key in table:
            if key not in names:
                if key in _PLACES:
                    raise UserError(
                        f"`{key}` is no key of a plan, which is the same on every machine. Give it on the command "
                        f"line: fm-benchmark {source} --{key} ..."
                    )
                where = "stands above the first [[rows]], for all" if key in known else "is no key of a plan"
                known_as = _ALSO_CALLED.get(key)
                meant = f" Did you mean {known_as}?" if known_as else nearest(key, names)
                raise UserError(f"`{key}` {where}.{meant} Keys: {', '.join(sorted(names))}.")
    title, train = (_text(raw, name, default) for name, default in (("title", source), ("train", "demo")))
    test = tuple(name for name in _list(raw, "test", []) if name not in without)
    require_distinct_names((train, *test))
    shared, *tables = (
        {key: _value(table, key) for key in table if key in _GRID or key in _OPTIONS} for table in (raw, *tables)
    )
    reading = {name: shared[name] for name in _READING if name in shared}
    asked: list[Row] = []
    notes: dict[str, None] = {}
    for table in tables:
        asked += _product(shared | table, train, test, reading, notes)
    return Plan(source, title, train, test, reading, tuple(_numbered(asked)), tuple(notes))


def _product(
    table: Mapping[str, Any], train: str, test: tuple[str, ...], reading: Mapping[str, Any], notes: dict[str, None]
) -> Iterator[Row]:
    """Make the probes and fine-tunings of one table, not numbered yet."""
    imported = _list(table, "imported", [])
    models, methods = _list(table, "models", [] if imported else None), _list(table, "methods", ["probe", "lora"])
    recipes, views = _list(table, "recipes", ["default"]), _list(table, "views", ["full"])
    for kind, names, all_names in (("method", methods, (PROBE, *METHODS)), ("recipe", recipes, RECIPE_NAMES)):
        for name in names:
            if name not in all_names:
                raise UserError(f"unknown {kind} {name!r}.{nearest(name, all_names)} Use {', '.join(all_names)}.")
    # Those on the hub are read there.
    backbones = {model: None if model.startswith("hf-hub:") else find_backbone(model) for model in models}
    chosen = {name: value for name, value in table.items() if name in _OPTIONS} | dict(reading)
    for name in table.keys() - set(_READING):
        takes = _OF_PROBES if methods == [PROBE] else _OPTIONS if PROBE in methods else _OF_TRAININGS
        if name in _OPTIONS and name not in takes:
            raise UserError(f"`{name}` is no option of {', '.join(methods)}. Leave it out.")
    if imported and PROBE not in methods:
        raise UserError(f"`imported` is of probes, and `methods` are {', '.join(methods)}. Add probe.")
    if "view" in chosen:
        parse_view(chosen["view"])
    if "pooling" in chosen:
        pooling = chosen["pooling"]
        for model, backbone in backbones.items():
            _require_pooling(pooling, model, POOLINGS if backbone is None else backbone.possible_poolings)
        for model in imported:
            _require_pooling(pooling, model, (IMPORTED_POOLING,))
    for model in imported:
        for recipe in recipes:
            yield _probe(model, recipe, chosen, train, test, (), imported=True)
    if imported and not models:
        return
    for method in methods:
        for recipe in recipes:
            scripts = {model for by, model in AUTHORS if by == method}
            there = [model for model in models if recipe != "authors" or method == PROBE or model in scripts]
            if not there:
                raise UserError(
                    f"the recipe authors exists for no model of `models` by {method}; there are "
                    f"{', '.join(sorted(scripts)) or 'none'}. Name one of them, or leave the recipe out."
                )
            for model in models:
                if model not in there:
                    notes[f"{model} by {method}: the paper's authors published no script, so there is no such row"] = (
                        None
                    )
                elif method == PROBE:
                    yield _probe(model, recipe, chosen, train, test, views)
                else:
                    yield _training(model, backbones[model], method, recipe, chosen, train, test)


def _probe(
    model: str,
    recipe: str,
    chosen: Mapping[str, Any],
    train: str,
    test: tuple[str, ...],
    views: Sequence[str],
    *,
    imported: bool = False,
) -> Row:
    recipe = "exact" if recipe == "default" else recipe
    view = chosen.get("view", TRAINED_VIEWS.get(recipe, ",".join(_view_names(views))) if views else None)
    names = [name if name in DATASETS else parse_source(name)[0] for name in (train, *test)]
    given = {name: value for name, value in chosen.items() if name in _OF_PROBES}
    if recipe == "exact":
        given.pop("seeds", None)  # it draws nothing at random
    else:
        given.pop("fractions", None)  # of the exact probe alone
    named = {
        "train": names[0],
        "test": tuple(names[1:]),
        "recipe": recipe,
        "view": view and ",".join(_view_names(view.split(","))),
    }
    options = _made(ProbeOptions, given | named)
    if recipe == "exact" and options.cv < 3 and options.folds_by is None:
        raise UserError(
            f"`cv = {options.cv}`: exact probes choose a strength within training folds, and need at least 3."
        )
    return Row(0, 0, model, PROBE, tuple(options.view.split(",")) if options.view else (), options, imported)


def _require_pooling(pooling: str, model: str, possible: Sequence[str]) -> None:
    """Refuse a pooling that a model's embeddings will not have, before they are computed."""
    for name in pooling.split("+"):
        if name not in possible and pooling != "card":
            raise UserError(
                f"`pooling = {pooling!r}`: {model} has no pooling {name!r}. It has {', '.join(possible)}, and card, "
                f"which is what the model's card recommends.{nearest(name, (*possible, 'card'))}"
            )


def _training(
    model: str,
    backbone: Backbone | None,
    method: str,
    recipe: str,
    chosen: Mapping[str, Any],
    train: str,
    test: tuple[str, ...],
) -> Row:
    given = {name: value for name, value in chosen.items() if name in _OF_TRAININGS}
    lora = {name.removeprefix("lora_"): given.pop(name) for name in _OF_LORA & given.keys()}
    named = {"model": model, "train": train, "test": test, "method": method, "recipe": recipe}
    options = _made(FinetuneOptions, given | named | {"lora": _made(LoraOptions, lora, prefix="lora_")})
    if backbone is not None:
        options.resolved_view(backbone)  # refuses one that no training has
    return Row(0, 0, model, method, (), options)


def _made(options: type[_Options], values: Mapping[str, Any], *, prefix: str = "") -> _Options:
    """Make the options of a row; a message about one value names its key and says what the plan has there."""
    try:
        return options(**values)
    except UserError as error:
        for name, value in values.items():
            try:
                options(**{name: value})
            except UserError as alone:
                if str(alone) == str(error):
                    raise UserError(f"`{prefix}{name} = {_shown(value)}`: {error}") from None
        raise


def _view_names(views: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(parse_view(view).name for view in views))


def _numbered(asked: Sequence[Row]) -> Iterator[Row]:
    """Number the rows, each once, the embeddings that probes read before them; and say which belong together."""
    rows = list({row.key: row for row in asked}.values())
    views: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.method == PROBE:
            views.setdefault(row.model, {}).update(dict.fromkeys(row.views))
    unit_of = {model: unit for unit, model in enumerate(views)}
    ours = {row.model for row in rows if not row.imported}
    embeddings = [
        Row(0, unit_of[model], model, EMBED, tuple(of_model), None)
        for model, of_model in views.items()
        if model in ours
    ]
    probes = [replace(row, unit=unit_of[row.model]) for row in rows if row.method == PROBE]
    trainings = [row for row in rows if row.method != PROBE]
    trainings = [replace(row, unit=len(unit_of) + k) for k, row in enumerate(trainings)]
    for number, row in enumerate((*embeddings, *probes, *trainings), start=1):
        yield replace(row, number=number)


def _value(table: Mapping[str, Any], name: str) -> Any:
    """Read the value of a key by itself, as the options have it, whether or not a row needs it."""
    if name in _GRID:
        return _list(table, name, [] if name == "imported" else None)
    kind = next(kind for kind in _IN_WORDS if _TYPES[name] in (kind, kind | None))
    if kind == tuple[str, ...]:
        return tuple(_list(table, name))
    if kind is str:
        value: Any = _text(table, name, "")
    else:
        try:
            value = msgspec.convert(table[name], kind)
        except msgspec.ValidationError:
            _refuse(name, table[name], _IN_WORDS[kind])
    option = _described()[name]
    least, most = option.min, option.max
    if (least is not None and value < least) or (most is not None and value > most):
        said = f"at most {most:,}" if least is None else f"from {least:,} to {most:,}"
        _refuse(name, value, f"{_IN_WORDS[kind]}, {said}")
    if name == "labels":
        parse_renaming(value)
    return checked_fractions(value) if name == "fractions" else value


@cache
def _described() -> dict[str, OptionInfo]:
    """Find what fm-probe and fm-finetune say of their options: range and meaning."""
    from finetune.cli import finetune
    from probe.cli import probe

    hints = [*get_type_hints(probe, include_extras=True).items()]
    hints += get_type_hints(finetune, include_extras=True).items()
    return {name: hint.__metadata__[0] for name, hint in hints if hasattr(hint, "__metadata__")}


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Say what a key has, what it should have, and what it is for."""
    number = isinstance(value, str) and not expected.startswith(("text", "a list of names"))
    meaning = f" It means: {_described()[name].help}" if name in _OPTIONS else ""
    raise UserError(f"`{name}` is {_shown(value)}: expected {expected}{', without quotes' * number}.{meaning}")


def _shown(value: Any) -> str:
    """Show a value about as the plan has it."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _text(table: Mapping[str, Any], name: str, default: str) -> str:
    value = table.get(name, default)
    if not (isinstance(value, str) and value):
        _refuse(name, value, _IN_WORDS[str])
    return value


def _list(table: Mapping[str, Any], name: str, default: list[str] | None = None) -> list[str]:
    """Read a list of names, or names in one text, separated by commas as on the command line."""
    found = table.get(name, default)
    if found is None:
        raise UserError(f"`{name}` is missing: expected a list of names.")
    value = list(parse_names(found)) or [""] if isinstance(found, str) else found
    if not (isinstance(value, list) and all(isinstance(one, str) and one for one in value)):
        _refuse(name, found, "a list of names")
    if not value and default != []:
        raise UserError(f"`{name}` is empty: expected one or more names.")
    if any("," in one for one in value):  # it would be two names on the command line of its row
        names = [part for one in value for part in parse_names(one)]
        _refuse(name, found, f"names without commas, such as {_shown(names)}")
    return list(dict.fromkeys(value))


# -------------------------------------------------------------------------------------------------------- the commands


def command(plan: Plan, rows: Sequence[Row], where: Where) -> list[str]:
    """Write the command of a row, or of the embeddings of several models in the same views.

    >>> " ".join(command(plan := read_plan("embedded"), plan.rows[-1:], Where()))
    'fm-finetune --model efficientnet-lite2 --train ami-br --test atnorm-br,atnorm-md'
    """
    (first, *_) = rows
    if first.method == EMBED:
        asked = {"model": [row.model for row in rows], "dataset": plan.datasets, "view": first.views}
        reading = _flags(plan.reading, {"ordinal": False, "skip_unlabelled": False})
        return ["fm-extract", *_flags(asked), *reading, *_place(where, "data", "store", "device")]
    if isinstance(first.options, ProbeOptions):
        defaults = asdict(ProbeOptions())
        options = {"model": first.model} | {"train": None, "test": None} | asdict(first.options)
        place = _place(where, "store", "runs", "device")
        return ["fm-probe", *_flags(options, defaults), *place]
    assert first.options is not None
    defaults = FinetuneOptions().by_name() | {"model": None, "train": None}
    place = _place(where, "data", "runs", "device")
    return ["fm-finetune", *_flags(first.options.by_name(), defaults), *place]


def resuming(run: Path, where: Where) -> list[str]:
    """Write the command that goes on with an interrupted fine-tuning."""
    return ["fm-finetune", "--resume", str(run), *_place(where, "data", "device")]


def _place(where: Where, *names: str) -> list[str]:
    defaults = asdict(Where())
    return _flags({name: getattr(where, name) for name in names}, defaults)


def _flags(options: Mapping[str, Any], defaults: Mapping[str, Any] = {}) -> list[str]:
    """Write options as flags, but for those that are as the command has them anyway."""
    flags = []
    for name, value in options.items():
        if value is None or (name in defaults and value == defaults[name]):
            continue
        flag = name.replace(".", "-").replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return flags


def require_parsable(plan: Plan) -> None:
    """Have each command's own parser read the rows, which knows the range of every number.

    Raises:
        UserError: a value outside its range.
    """
    from extract.cli import app as extract_app
    from finetune.cli import finetune_app
    from probe.cli import app as probe_app

    apps = {"fm-extract": extract_app, "fm-probe": probe_app, "fm-finetune": finetune_app}
    parsers = {name: get_command(app) for name, app in apps.items()}
    checked = set()
    for row in plan.rows:
        name, *arguments = command(plan, [row], Where())
        if (asked := (name, *(one for one in arguments if one != row.model))) in checked:
            continue
        checked.add(asked)
        try:
            parsers[name].make_context(name, arguments)
        except typer.BadParameter as error:
            raise UserError(f"{plan.source}, {row.title}: {error.format_message()}") from None
