"""Is a plan read as the rows that it asks for, and is each mistake in it one clear message?"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import finetune.run
from extract import cli as extract_cli
from features.console import UserError
from finetune import cli
from finetune.benchmark_plan import EMBED, PROBE, SHIPPED, Plan, Where, command, read_plan
from finetune.options import FinetuneOptions
from probe import cli as probe_cli
from probe import probing

APPS = {"fm-extract": extract_cli.app, "fm-probe": probe_cli.app, "fm-finetune": cli.finetune_app}


def plan_of(tmp_path: Path, text: str) -> Plan:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return read_plan(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models = ", "no TOML file"),
        ("", "`models` is missing"),
        ("models = []", "`models` is empty"),
        ("models = [1]", "expected a list of names"),
        ("rows = []", "`rows` is empty"),
        ("model = 'uni'", "`model` is no key of a plan. Did you mean"),
        ("models = 'unni'", "unknown model 'unni'.*uni"),
        ("models = 'uni'\nmethods = ['prob']", "unknown method 'prob'. Did you mean probe"),
        ("models = 'uni'\nrecipes = ['papr']", "unknown recipe 'papr'. Did you mean paper"),
        ("models = 'uni'\nviews = ['middle']", "unknown view 'middle'"),
        ("models = 'uni'\nviews = ['centre48']", "unknown view 'centre48'. Did you mean center48"),
        ("models = 'uni'\nmethods = 'lora'\nview = 'fulll'", "unknown view 'fulll'. Did you mean full"),
        ("models = 'uni'\nmethods = 'lora'\nview = 'full+flips'", "is for frozen backbones"),
        ("models = 'uni'\npooling = 'maen'", "`pooling = 'maen'`: uni has no pooling 'maen'.*Did you mean mean"),
        ("models = 'uni'\npooling = 'cls+mid'", "uni has no pooling 'mid'. It has cls, mean, center, and card"),
        ("models = 'resnet50'\npooling = 'cls'", "resnet50 has no pooling 'cls'. It has pooled, center, mid, and card"),
        ("imported = 'mine'\nmethods = 'probe'\npooling = 'cls'", "mine has no pooling 'cls'. It has pooled, and"),
        ("models = 'uni'\ndevice = 'cpu'", "`device` is no key of a plan, .*: fm-benchmark .*mine.toml --device"),
        ("models = 'uni'\nshard = '0/2'", r"`shard` is no key of a plan\. Keys: "),  # none is near
        ("models = 'uni'\nmethods = 'head'\nrecipes = 'authors'", "authors exists for no model of `models` by head"),
        (
            "models = 'uni'\nepochs = 'ten'",
            '`epochs` is "ten": expected a whole number, without quotes.*Epochs, at most',
        ),
        ("models = 'uni'\ncv = '3'", '`cv` is "3": expected a whole number, without quotes'),
        ("models = 'uni'\ncv = 5.5", "`cv` is 5.5: expected a whole number"),
        ("models = 'uni'\nlora_rank = '8'", '`lora_rank` is "8": expected a whole number, without quotes'),
        ("models = 'uni'\nlearning_rate = 'x'", '`learning_rate` is "x": expected a number, without quotes'),
        ("models = 'uni'\ntta = 'yes'", '`tta` is "yes": expected true or false, without quotes'),
        ("models = 'uni'\nordinal = 'yes'", '`ordinal` is "yes": expected true or false, without quotes'),
        ("models = 'uni'\nskip_unlabelled = 1", "`skip_unlabelled` is 1: expected true or false"),
        ("models = 'uni'\nlabels = {a='b'}", '`labels` is {"a": "b"}: expected text in quotes.*old=new'),
        ("models = 'uni'\nlabels = 'imposter'", "`labels` says 'imposter'; expected old=new"),
        ("models = 'uni'\nfractions = 0.5", r"`fractions` is 0.5: expected a list of numbers, such as \[0.1, 0.5, 1\]"),
        ("models = 'uni'\nfractions = [2]\nrecipes = 'paper'", "`fractions`: 2 is no share"),
        ("models = 'uni'\nclasses = [1, 2]", r"`classes` is \[1, 2\]: expected a list of names"),
        ("models = 'uni'\nclasses = ['a,b']", r'expected names without commas, such as \["a", "b"\]'),
        ("models = 'uni'\ntest = ''", '`test` is "": expected a list of names'),
        ("models = 'uni'\ntitle = 1979-05-27", '`title` is "1979-05-27": expected text in quotes'),
        ("models = 'uni'\n[[rows]]\nepochs = true", "`epochs` is true: expected a whole number"),
        ("models = 'uni'\nlr = 0.1", "`lr` is no key of a plan. Did you mean learning_rate?"),
        *(
            (f"models = 'uni'\nmethods = 'probe'\nseeds = {value}", f"`seeds` is {said}: expected a whole number{then}")
            for value, said, then in (
                ("0", "0", ", from 1 to 100"),
                ("101", "101", ", from 1 to 100"),
                ("'2'", '"2"', ", without quotes"),
                ("true", "true", ""),
                ("1.5", "1.5", ""),
                ("[1]", r"\[1\]", ""),
            )
        ),
        ("models = 'uni'\nmethods = 'probe'\nfolds_by = 'slide'", '`folds_by = "slide"`: .*expected domain'),
        ("models = 'uni'\nmethods = 'lora'\nfolds_by = 'slide'", '`folds_by = "slide"`: .*expected domain'),
        ("models = 'uni'\nmethods = 'probe'\nsoft_labels = 'yes'", '`soft_labels = "yes"`: .*expected votes'),
        ("models = 'uni'\nepochs = 0", "`epochs` is 0: expected a whole number, from 1 to 100,000"),
        ("models = 'uni'\nepochs = -1", "`epochs` is -1: expected a whole number, from 1 to 100,000"),
        ("models = 'uni'\ncv = 100000", "`cv` is 100000: expected a whole number, at most 1,000"),
        (f"models = 'uni'\nseed = {2**40}", f"`seed` is {2**40}: expected a whole number, from 0 to 4,294,967,295"),
        ("models = 'uni'\ncv = 200", "`cv = 200`: 200 folds: at most 100 are fine-tuned"),
        ("models = 'uni'\ncv = 1\nmethods = 'lora'", "`cv = 1`: .*at least 2 folds"),
        ("models = 'uni'\nlora_rank = 0", "`lora_rank = 0`: .*expected 1 or more"),
        ("models = 'uni'\nlearning_rate = inf", "`learning_rate = Infinity`: .*expected a number above 0"),
        ("models = 'uni'\ncv = 2\nmethods = 'probe'", "`cv = 2`: exact probes .* at least 3"),
        ("models = 'uni'\nmethods = 'probe'\nepochs = 3", "`epochs` is no option of probe"),
        ("[[rows]]\nmodels = 'uni'\ntrain = 'ami-br'", "`train` stands above the first"),
    ],
)
def test_a_faulty_plan_gets_one_clear_message(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s)^{re.escape(str(tmp_path))}/mine.toml.*{message}"):
        plan_of(tmp_path, text)


def test_a_plan_is_text_in_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    path, text = tmp_path / "mine.toml", "title = 'Mitösen'\r\nmodels = 'uni'\r\n"
    path.write_bytes(text.encode("utf-8-sig"))
    assert read_plan(str(path)).title == "Mitösen"
    for encoding in ("utf-16", "utf-16-le", "latin-1"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=r"mine\.toml is not text in UTF-8: .*Save the plan in the encoding UTF-8"):
            read_plan(str(path))


def test_every_key_of_a_plan_is_documented_by_the_type_of_its_value(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    table = page.partition("| value | keys |\n|---|---|\n")[2].partition("\n\n")[0]
    types = {
        key: value.partition(":")[0].replace("`", "")
        for _, value, keys, _ in (line.split("|") for line in table.splitlines())
        for key in re.findall(r"`(\w+)`", keys)
    }
    with pytest.raises(UserError) as error:
        plan_of(tmp_path, "nothing = 1")
    assert set(types) == set(str(error.value).partition("Keys: ")[2].rstrip(".").split(", "))
    for key, kind in types.items():
        others = "" if key == "models" else "models = 'uni'\n"
        article = "" if kind.strip().startswith(("true", "text")) else "a "
        with pytest.raises(UserError, match=rf"`{key}` is {{}}: expected {article}{kind.strip()}"):
            plan_of(tmp_path, f"{others}{key} = {{}}")


def test_names_in_one_text_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    text = "models = '{0}'\nclasses = '{1}'\ntest = '{2}'\nmethods = 'lora'"
    joined = text.format("uni, virchow2", "imposter,mitosis", "atnorm-br,atnorm-md")
    listed = "models = ['uni', 'virchow2']\nclasses = ['imposter', 'mitosis']\ntest = ['atnorm-br', 'atnorm-md']"
    plan = plan_of(tmp_path, joined)
    assert plan.reading == {"classes": ("imposter", "mitosis")}
    assert plan.rows == plan_of(tmp_path, f"{listed}\nmethods = 'lora'").rows
    assert len(plan.rows) == 2


def test_an_unknown_plan_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"Did you mean banerjee2025.*demo, embedded"):
        read_plan("banerjee2024")


def test_banerjee2025_is_every_row_of_table_3_and_h0_mini() -> None:
    plan = read_plan("banerjee2025")
    models = ["uni", "uni2-h", "virchow", "virchow2", "prov-gigapath", "h-optimus-0", "h-optimus-1", "h0-mini"]
    of = {
        (method, recipe): [row.model for row in plan.rows if (row.method, row.recipe) == (method, recipe)]
        for method, recipe in {(row.method, row.recipe) for row in plan.rows}
    }
    assert of[EMBED, ""] == of[PROBE, "paper"] == of[PROBE, "authors"] == of[PROBE, "exact"] == models
    assert of["lora", "paper"] == of["lora", "default"] == models
    assert of["lora", "authors"] == models[:-1]  # no script for H0-mini
    ends = ["efficientnetv2-m", "vit-l", "swin-b"]
    assert of["full", "paper"] == of["full", "authors"] == of["full", "default"] == ends
    assert len(plan.rows) == 8 * 4 + 23 + 9
    assert plan.datasets == ("ami-br", "atnorm-br", "atnorm-md")


OWN = """
train = "mine=patches.csv"
test = ["other=others.csv"]
models = ["efficientnet-lite0", "uni"]
methods = ["probe", "lora", "full"]
recipes = ["paper", "default"]
views = ["center64", "full"]
classes = ["Normal", "Atypical"]
seeds = 2
fold_seed = 7
lora_rank = 4
tta = false
fractions = [0.5, 1]
learning_rate = 0.001
ordinal = false
"""


@pytest.mark.parametrize("name", ["banerjee2025", OWN], ids=["shipped", "own"])
def test_a_command_line_is_read_as_the_options_of_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By these a row finds its run."""
    plan = plan_of(tmp_path, name) if "\n" in name else read_plan(name)

    class Read(Exception): ...

    def caught(options: Any, models: Any = None) -> None:
        raise Read(options, models)

    monkeypatch.setattr(finetune.run, "finetune", lambda options, **_: caught(options))
    monkeypatch.setattr(probing, "probe_store", lambda store, models, options, runs: caught(options, models))
    monkeypatch.setattr("features.store.FeatureStore.open", lambda where: None)
    for row in {(row.method, row.recipe): row for row in plan.rows if row.method != EMBED}.values():
        line = command(plan, [row], Where())
        with pytest.raises(Read) as read:
            APPS[line[0]](line[1:], standalone_mode=False)
        options, models = read.value.args
        assert options == row.options, shlex.join(line)
        assert models == (None if isinstance(options, FinetuneOptions) else (row.model,))


def test_models_that_probes_read_are_embedded_once_in_all_views_they_need() -> None:
    rows = [row for row in read_plan("banerjee2025").rows if row.model == "uni"]
    (embed,) = (row for row in rows if row.method == EMBED)
    probes = [row for row in rows if row.method == PROBE]
    assert {view for row in probes for view in row.views} == set(embed.views)
    assert [row.views for row in probes] == [("full@224+imagenet",), ("full",), ("full", "center64")]
    assert {row.unit for row in probes} == {embed.unit}  # nobody waits for another process's embeddings


def test_every_plan_that_is_shipped_can_be_read() -> None:
    names = [path.stem for path in SHIPPED.glob("*.toml")]
    assert sorted(names) == ["banerjee2025", "demo", "embedded"]
    assert all(read_plan(name).rows for name in names)
