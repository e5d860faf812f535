"""Does a command speak of its flags where the library speaks of arguments?"""

from typing import Annotated

import pytest
import typer

from features import console
from features.console import UserError, as_flags, rate
from features.options import DeviceOption, parse_names

FLAGS = {"device": "--device", "batch_size": "--batch-size", "as_json": "--json", "cv": "--cv"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("use `device='cpu'`.", "use --device cpu."),
        ('use `device="cuda:0"` or lower `batch_size`', "use --device cuda:0 or lower --batch-size"),
        ("with `as_json=True`, `cv=5`", "with --json, --cv 5"),
        ("`store.read('a')` and `threshold=0.5` stay", "`store.read('a')` and `threshold=0.5` stay"),
        ("device='cpu' outside backticks", "device='cpu' outside backticks"),
    ],
)
def test_arguments_in_messages_become_flags(message, expected):
    assert as_flags(message, FLAGS) == expected


def test_a_command_shows_a_mistake_in_its_own_flags(monkeypatch, capsys):
    app = typer.Typer()

    @app.command()
    def compute(device: DeviceOption = "auto", as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
        raise UserError("no GPU: use `device='cpu'` or `as_json=True`, not `overwrite=True`.")

    monkeypatch.setattr("sys.argv", ["compute"])
    with pytest.raises(SystemExit) as end:
        console.run(app)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: no GPU: use --device cpu or --json, not `overwrite=True`.\n"


def test_names_are_split_at_commas_and_kept_once():
    assert parse_names(" a, b,,a ") == ("a", "b")
    assert parse_names(" , ") == ()
    with pytest.raises(UserError, match="--model names nothing: found ' , '"):
        parse_names(" , ", option="--model")


@pytest.mark.parametrize(
    ("per_second", "said"),
    [
        (1234.5, "1,234 images/s"),
        (35.2, "35 images/s"),
        (3.14, "3.1 images/s"),
        (0.5, "0.5 images/s, 2 s an image"),
        (1 / 30, "0.033 images/s, 30 s an image"),
        (0.0001, "0.0001 images/s, 10,000 s an image"),
        (0, "0 images/s"),
    ],
)
def test_a_slow_rate_also_says_how_long_each_takes(per_second, said):
    assert rate(per_second) == said


def test_a_rate_names_its_unit():
    assert rate(0.2, "rows") == "0.2 rows/s, 5 s a row"
