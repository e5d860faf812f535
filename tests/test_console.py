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


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        *((name, value, "a whole number of seconds") for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
          for value in ("ten", "0.5", "10s")),
        *(("HF_ENDPOINT", value, "an address like https://huggingface.co") for value in
          ("mirror", "host.example", "http://127.0.0.1:port", "http://", "ftp://127.0.0.1", " http://127.0.0.1")),
    ],
)  # fmt: skip
def test_a_setting_that_the_hub_client_cannot_read_is_one_message(
    name: str, value: str, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    app = typer.Typer()
    app.command()(lambda: pytest.fail("the command ran"))
    with pytest.raises(SystemExit) as ended:
        console.run(app)
    assert ended.value.code == 1
    assert f"The environment variable {name} is not {kind}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "10", " 10 ", "https://huggingface.co/", "http://user:pw@[::1]:80/hub"])
def test_settings_that_it_can_read_are_left_alone(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT" if "/" in value else "HF_HUB_ETAG_TIMEOUT", value)
    app = typer.Typer()
    app.command()(lambda: None)
    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as ended:
        console.run(app)
    assert ended.value.code == 0
