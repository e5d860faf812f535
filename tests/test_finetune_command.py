"""Does fm-finetune write whole runs, resume them, say what it would do, and refuse mistakes in one message?"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import processes
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from extract.backbones import find_backbone
from extract.views import make_transform, parse_view
from features.console import UserError
from finetune import cli
from finetune import run as finetuning
from finetune.report import _load_patches
from probe.evidence import evaluate
from probe.runs import read_predictions, read_run

SMALL = ("--view", "full@32", "--cv", "2", "--epochs", "2", "--batch-size", "4", "--test", "", "--precision", "fp32")
N_TRAIN, N_TEST = 12, 4


class Done(NamedTuple):
    """What a command has left: its status and both streams."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]


def write_patches(folder: Path, *, sizes: tuple[int, ...] = (32,), table: str = "patches.csv", seed: int = 0) -> Path:
    """Sixteen patches of eight slides, two of which are for testing; every slide has both classes."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["path,label,group,split"]
    for row in range(N_TRAIN + N_TEST):
        edge = sizes[row % len(sizes)]
        pixels = rng.integers(0, 255, (edge, edge + row % len(sizes), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
        label, split = ("Atypical" if row % 2 else "Normal"), ("train" if row < N_TRAIN else "test")
        rows.append(f"{row}.png,{label},slide {seed}.{row // 2},{split}")
    (folder / table).write_text("\n".join(rows) + "\n")
    return folder / table


def write_weights(path: Path, arch: str) -> Path:
    """Random weights of one of timm's smallest networks, which would be a download."""
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model(arch, num_classes=0).state_dict(), path)
    return path


def run_command(capsys: pytest.CaptureFixture[str], cwd: Path, *arguments: object) -> Done:
    """fm-finetune in this process."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(cwd)
        patched.setattr(sys, "argv", ["fm-finetune", *map(str, arguments)])
        patched.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay
        patched.setenv("GOMP_SPINCOUNT", "10000")
        with pytest.raises(SystemExit) as end:
            cli.main()
    out, err = capsys.readouterr()
    return Done(int(end.value.code or 0), out, err)


@pytest.fixture
def finetune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """fm-finetune on small patches, with small options that later ones may replace."""
    write_patches(tmp_path)
    return lambda *arguments: run_command(capsys, tmp_path, "--train", "patches.csv", *SMALL, *arguments)


@pytest.fixture
def bare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """fm-finetune without options."""
    return lambda *arguments: run_command(capsys, tmp_path, *arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a training has run; its run is a copy's to change."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        write_patches(folder)
        cli.finetune_app(["--train", "patches.csv", *SMALL, "--merge"], standalone_mode=False)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run, below a folder with its patches."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def refused(done: Done) -> str:
    """The one message of a command that failed, on one line."""
    assert done.status == 1, done
    assert done.out == ""
    assert "Traceback" not in done.err
    _, message = done.err.split("error: ")
    return message.replace("\n", " ")


def begin(patched: pytest.MonkeyPatch) -> None:
    """Kill trainings after their first epoch."""
    save = finetuning.save_state

    def save_and_die(*given: object) -> None:
        save(*given)  # type: ignore[arg-type]
        raise UserError("killed")

    patched.setattr(finetuning, "save_state", save_and_die)


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_is_complete_and_leaves_nothing_else(run: Path) -> None:
    assert {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} == {
        "run.json",
        "predictions.csv",
        "metrics.json",
        "samples.csv",
        *(
            f"fold-{fold}/{name}"
            for fold in range(2)
            for name in ("adapter_config.json", "adapter_model.safetensors", "model.safetensors")
        ),
    }
    record = read_run(run).as_json()
    assert (record["id"], record["kind"], record["model"]) == (run.name, "finetune", "efficientnet-lite0")
    assert (record["method"], record["view"], record["train"], record["test"]) == ("lora", "full@32", "patches", [])
    assert (record["options"]["epochs"], record["recipe"]["epochs"], record["recipe"]["batch_size"]) == (2, 2, 4)
    assert record["options"]["lora"] == {"rank": 8, "alpha": 16, "dropout": 0.3, "targets": None}
    assert record["label_names"] == ["Normal", "Atypical"]
    assert record["folds"]["n"] == len(record["best_epoch"]) == len(record["history"]) == 2
    assert all(len(history) == 2 for history in record["history"])
    assert record["cost"]["training_images"] == 2 * 2 * 8  # folds, epochs, six patches in batches of four
    assert record["cost"]["training_seconds"] <= record["cost"]["seconds"]


def test_predictions_hold_every_patch_once_per_fold_that_may_judge_it(run: Path) -> None:
    predictions, record = read_predictions(run), read_run(run).as_json()
    assert predictions.sets() == [("patches", "validation"), ("patches", "test")]
    held_out = predictions.select(predictions.split == "validation")
    assert sorted(held_out.id) == sorted(f"{row}.png" for row in range(N_TRAIN))
    slides = {group: set(held_out.fold[held_out.group == group].tolist()) for group in held_out.group}
    assert all(len(folds) == 1 for folds in slides.values())
    tested = predictions.select(predictions.split == "test")
    expected = sorted((f"{row}.png", fold) for row in range(N_TRAIN, N_TRAIN + N_TEST) for fold in range(2))
    assert sorted(zip(tested.id.tolist(), tested.fold.tolist(), strict=True)) == expected
    assert np.isfinite(predictions.logit).all()
    assert json.loads(json.dumps(evaluate(predictions).as_dict())) == record["metrics"]


def test_saved_weights_give_the_saved_logits_in_plain_timm_as_means_over_eight_orientations(run: Path) -> None:
    predictions = read_predictions(run)
    transform = make_transform(find_backbone("efficientnet-lite0"), parse_view("full@32"))
    for fold in range(2):
        model = timm.create_model("tf_efficientnet_lite0", num_classes=2).eval()
        model.load_state_dict(safetensors.torch.load_file(run / f"fold-{fold}" / "model.safetensors"))
        judged = predictions.select(predictions.fold == fold)
        patches = [np.asarray(Image.open(run.parent.parent / name)) for name in judged.id]
        images = transform(patches, torch.device("cpu"))
        turned = [torch.rot90(one, turns, (2, 3)) for one in (images, images.flip(2)) for turns in range(4)]
        with torch.inference_mode():
            logits = torch.stack([model(one).diff(dim=1)[:, 0] for one in turned]).mean(dim=0)
        np.testing.assert_allclose(judged.logit[:, 0], logits.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "file"), [("lora", "adapter_model"), ("head", "head"), ("full", "model")], ids=["lora", "head", "full"]
)
def test_every_method_trains_what_its_dry_run_says_and_saves_it(
    finetune: Command, tmp_path: Path, method: str, file: str
) -> None:
    model = ("--model", "timm/test_efficientnet", "--method", method, "--json")
    done = finetune(*model, "--weights", write_weights(tmp_path / "tiny.safetensors", "test_efficientnet"))
    assert done.status == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    (record,) = json.loads(done.out)["results"]
    assert record == read_run(folder).as_json()
    assert len(read_predictions(folder).label) == N_TRAIN + 2 * N_TEST
    weights = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    assert weights == {f"fold-{fold}/{file}.safetensors" for fold in range(2)}
    planned = json.loads(finetune(*model, "--dry-run").out)
    assert (planned["model"], planned["method"], planned["n_folds"]) == ("timm/test_efficientnet", method, 2)
    assert planned["n_trained"] == record["n_trained"]
    assert [module["name"] for module in planned["modules"]] == record["adapted_modules"]
    assert (planned["batch_size"], planned["precision"]) == (4, "fp32")


def test_json_is_alone_on_stdout(finetune: Command, tmp_path: Path) -> None:
    done = finetune("--json", "--method", "head")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    (folder,) = (tmp_path / "runs").iterdir()
    assert (tmp_path / found["runs"][0]).resolve() == folder.resolve()
    assert found["results"][0]["id"] == folder.name
    assert "--resume" in done.err
    assert "\r" not in done.err  # no progress bar in a pipe


def test_a_command_ends_with_tables_and_where_the_run_is(finetune: Command, tmp_path: Path) -> None:
    done = finetune("--method", "head", "--runs", "elsewhere")
    assert done.status == 0, done.err
    (folder,) = (tmp_path / "elsewhere").iterdir()
    assert "Kept" in done.out
    assert "efficientnet-lite0" in done.out
    assert done.err.splitlines()[-1] == f"run written to elsewhere/{folder.name}/"


def test_other_datasets_are_scored_under_all_folds(finetune: Command, tmp_path: Path) -> None:
    write_patches(tmp_path / "others", table="others.csv", seed=1)
    done = finetune("--method", "head", "--test", "others/others.csv, patches.csv")
    assert done.status == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    record = read_run(folder).as_json()
    assert record["test"] == ["others"]
    assert {name: figures["n"] for name, figures in record["metrics"]["sets"].items()} == {
        "patches/validation": N_TRAIN,
        "patches/test": N_TEST,
        "others/test": N_TRAIN + N_TEST,  # all of it, whatever its own split
    }


def test_two_datasets_of_one_name_are_refused(finetune: Command, tmp_path: Path) -> None:
    write_patches(tmp_path / "others", seed=1)
    said = refused(finetune("--method", "head", "--test", "others/patches.csv"))
    assert "patches" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("view", ["full@32", "center24@32"])
def test_patches_of_different_sizes_are_trained_on(finetune: Command, tmp_path: Path, view: str) -> None:
    write_patches(tmp_path, sizes=(24, 40, 61))
    done = finetune("--view", view, "--method", "head", "--json")
    assert done.status == 0, done.err
    (record,) = json.loads(done.out)["results"]
    assert record["metrics"]["sets"]["patches/test"]["n"] == N_TEST


def test_patches_smaller_than_the_view_are_refused(finetune: Command) -> None:
    assert "--view center32 or --view full" in refused(finetune("--view", "center40@32"))


def test_a_folder_per_class_is_trained_on_and_says_that_slides_are_unknown(bare: Command, tmp_path: Path) -> None:
    table = write_patches(tmp_path / "flat").read_text().splitlines()[1:]
    for line in table:
        name, label, _, _ = line.split(",")
        (tmp_path / "classes" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "flat" / name).rename(tmp_path / "classes" / label / name)
    done = bare("--train", "classes", *SMALL, "--method", "head", "--positive", "Normal", "--json")
    assert done.status == 0, done.err
    assert "no known group" in done.err
    (record,) = json.loads(done.out)["results"]
    assert record["label_names"] == ["Atypical", "Normal"]
    assert set(record["metrics"]["sets"]) == {"classes/validation"}


# -------------------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_shows_modules_and_totals_and_writes_nothing(bare: Command, tmp_path: Path, run: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = bare("--dry-run", *SMALL)
    assert done.status == 0, done.err
    record = read_run(run).as_json()
    for name in record["adapted_modules"]:
        assert f" {name} " in done.out
    assert f"{len(record['adapted_modules'])} modules would be adapted" in done.out
    assert f"{record['n_trained']:,} (" in done.out
    for line in ("Parameters of the backbone", "Trained per fold", "Memory: estimated peak"):
        assert line in done.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_needs_no_weights(bare: Command) -> None:
    done = bare("--dry-run", "--json", "--model", "uni", "--lora-targets", r"blocks\.23\.attn\.qkv")
    assert done.status == 0, done.err
    (module,) = json.loads(done.out)["modules"]
    assert (module["n_in"], module["n_out"], module["n_trained"]) == (1024, 3072, 8 * (1024 + 3072))


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lora-targets", "nothing"), r"'nothing' match no module of this EfficientNet.*such as"),
        (("--lora-targets", r"blocks\..*\.conv_dw"), r"match blocks.*Conv2d.*narrow the pattern"),
        (("--lora-targets", "("), r"not a regular expression"),
        (("--lora-rank", "0"), r"rank 0: expected 1 or more"),
        (("--lora-alpha", "0"), r"alpha 0.*expected"),
        (("--lora-dropout", "1"), r"dropout 1.*expected"),
        (("--recipe", "best"), r"unknown recipe 'best': use default, paper, authors"),
        (("--recipe", "authors"), r"no script for efficientnet-lite0 by --method lora.*uni2-h.*--recipe paper"),
        (("--method", "dora"), r"unknown method 'dora': use lora, full, head"),
        (("--precision", "fp16"), r"precision 'fp16'.*fp32 or bf16"),
        (("--model", "h-optimus"), r"unknown model 'h-optimus'.*h-optimus-"),
        (("--train", "atnorm"), r"'atnorm'.*Did you mean"),
        (("--train", "missing.csv"), r"no file or folder named 'missing.csv'"),
        (("--test", "missing.csv"), r"no file or folder named 'missing.csv'"),
        (("--view", "middle"), r"unknown view 'middle'"),
        (("--device", "tpu"), r"device 'tpu'"),
        (("--weights", "missing.safetensors"), r"missing.safetensors: no such weights file"),
        (("--positive", "Odd"), r"no class 'Odd'"),
        (("--classes", "Atypical,Odd"), r"--classes leaves out Normal"),
        (("--classes", " , "), r"--classes names nothing"),
        (("--soft-labels", "scores"), r"--soft-labels scores: expected votes"),
        (("--soft-labels", "votes"), r"patches has no votes of raters to train on. Leave --soft-labels out"),
        (("--ordinal",), r"ordinal"),
        (("--cv", "1"), r"at least 2 folds, got 1"),
        (("--cv", "7"), r"7 folds were asked for, but there are 6 groups.*--cv 6"),
        (("--model", "timm/test_vit", "--view", "full@40"), r"40 px is not a multiple of its 16 px"),
        (("--learning-rate", "-1"), r"learning.rate"),
        (("--learning-rate", "nan"), r"learning.rate"),
        (("--dry-run", "--cv", "0"), r"at least 2 folds, got 0"),
        (("--resume", "runs/none"), r"runs/none is no interrupted training"),
        (("--resume", "patches.csv"), r"patches.csv is no interrupted training"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_gets_one_clear_message_and_leaves_no_run(
    finetune: Command, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    if "timm/test_vit" in arguments:
        arguments += ("--weights", str(write_weights(tmp_path / "vit.safetensors", "test_vit")))
    said = refused(finetune(*arguments))
    assert re.search(message, said), said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("option", "value"), [("--epochs", "0"), ("--epochs", "many"), ("--seed", "-1")])
def test_wrong_usage_is_status_2(finetune: Command, option: str, value: str) -> None:
    assert finetune(option, value).status == 2


def test_folds_that_lack_a_class_are_refused(finetune: Command, tmp_path: Path) -> None:
    table = tmp_path / "patches.csv"
    lines = table.read_text().splitlines()
    lines[1:] = [line.replace("Atypical", "Normal") if row > 1 else line for row, line in enumerate(lines[1:])]
    table.write_text("\n".join(lines))
    said = refused(finetune())
    assert "has no patch of the positive class (label 1), which occurs in 1 group;" in said
    assert not (tmp_path / "runs").exists()


def test_a_table_without_training_patches_is_refused(finetune: Command, tmp_path: Path) -> None:
    table = tmp_path / "patches.csv"
    table.write_text(table.read_text().replace(",train", ",test"))
    refused(finetune())
    assert not (tmp_path / "runs").exists()


def test_a_truncated_patch_is_named(finetune: Command, tmp_path: Path) -> None:
    path = tmp_path / "3.png"
    path.write_bytes(path.read_bytes()[:-200])
    assert "3.png" in refused(finetune("--method", "head"))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_fold_whose_weights_are_lost_before_scoring_is_named(finetune: Command, damage: str) -> None:
    score = finetuning.score

    def damaged(setup: object, folder: Path, *rest: object) -> object:
        path = folder / "fold-1" / "adapter_model.safetensors"
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:100])
        return score(setup, folder, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetuning, "score", damaged)
        done = finetune("--epochs", "1")
    assert "fold-1/adapter_model.safetensors" in refused(done)


# ------------------------------------------------------------------------------------------------------------- resuming


def test_resuming_a_finished_run_shows_it_and_changes_nothing(bare: Command, tmp_path: Path, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = bare("--resume", f"runs/{run.name}", "--json")
    assert done.status == 0, done.err
    assert "has finished already" in done.err
    assert json.loads(done.out)["results"][0]["id"] == run.name
    refused = bare("--resume", f"runs/{run.name}", "--no-tta")
    assert (refused.status, "tta False instead of" in refused.err) == (1, True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_of_another_format_is_refused(bare: Command, run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"format": 99}))
    assert "is a run of format 99; this version reads format" in refused(bare("--resume", f"runs/{run.name}"))


def test_a_training_of_another_format_is_refused(bare: Command, tmp_path: Path) -> None:
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "training.json").write_text('{"format": 99}')
    assert "is a training of format 99; this version resumes format" in refused(bare("--resume", "runs/old"))


def test_resuming_needs_no_options_and_refuses_others(bare: Command, finetune: Command, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        begin(patched)
        refused(finetune("--lora-rank", "2"))
    (folder,) = (tmp_path / "runs").iterdir()
    changed = ("--seed", "7", "--lora-rank", "3", "--epochs", "2", "--method", "head", "--test", "demo")
    said = refused(bare("--resume", folder, *changed))
    for difference in ("seed 7 instead of 42", "lora.rank 3 instead of 2", "method 'head' instead of 'lora'", "test "):
        assert difference in said
    assert "epochs" not in said
    # The same options again are no change, nor are those that say how to compute.
    same = ("--lora-rank", "2", "--seed", "42", "--test", "", "--train", "patches.csv", "--view", "full@32")
    done = bare("--resume", folder, *same, "--folds-at-once", "2", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["results"][0]["options"]["lora"]["rank"] == 2
    assert not (folder / "training.json").exists()
    assert not (folder / "checkpoint.safetensors").exists()


def test_resuming_after_the_patches_have_changed_is_refused(bare: Command, finetune: Command, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        begin(patched)
        refused(finetune("--method", "head"))
    (folder,) = (tmp_path / "runs").iterdir()
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "2.png")
    assert "dataset_digest" in refused(bare("--resume", folder))


def test_a_killed_command_resumes_to_the_same_bytes(tmp_path: Path, finished: Path) -> None:
    """A real process, killed at some moment of its training, scoring or writing."""
    write_patches(tmp_path)
    (expected,) = (finished / "runs").iterdir()
    moment = random.Random(os.getpid()).uniform(0, read_run(expected).cost.seconds or 0.0)
    process = processes.start("fm-finetune", "--train", "patches.csv", *SMALL, cwd=tmp_path)
    while not (runs := list((tmp_path / "runs").glob("*/training.json"))) and not process.ended():
        time.sleep(0.01)  # what comes before is of no interest
    assert runs
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = runs[0].parent
    resumed = processes.run("fm-finetune", "--resume", folder, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for name in (*(f"fold-{fold}/adapter_model.safetensors" for fold in range(2)), "predictions.csv"):
        same = (folder / name).read_bytes() == (expected / name).read_bytes()
        assert same, f"{name}, killed after {moment:.3f} s"


# ---------------------------------------------------------------------------------------------- every option, by itself


def test_every_option_reaches_the_training(finetune: Command, tmp_path: Path) -> None:
    """None of these is a default, nor follows from another."""
    write_patches(tmp_path / "others", table="others.csv", seed=1)
    weights = write_weights(tmp_path / "vit.safetensors", "test_vit")
    chosen = {
        **{"model": "timm/test_vit", "recipe": "paper", "method": "lora", "cv": 3, "epochs": 4, "batch_size": 3},
        **{
            "learning_rate": 0.002,
            "seed": 7,
            "seeds": 2,
            "fold_seed": 5,
            "precision": "bf16",
            "positive": "Normal",
            "view": "center16@32+imagenet",
        },
        **{"labels": "Atypical=Unusual"},
    }
    lora = {"rank": 3, "alpha": 5.0, "dropout": 0.1, "targets": r"blocks\.0\.attn\.qkv"}
    computing = {"weights": weights, "device": "cpu", "folds_at_once": 2}
    named = {**chosen, **{f"lora_{name}": value for name, value in lora.items()}, **computing}
    arguments = [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags = (
        "--test",
        "others/others.csv",
        "--grad-checkpointing",
        "--merge",
        "--skip-unlabelled",
        "--runs",
        "elsewhere",
        "--no-compile",
        "--no-fast",
    )
    with pytest.MonkeyPatch.context() as patched:
        begin(patched)
        assert "killed" in refused(finetune(*arguments, *flags))
    (folder,) = (tmp_path / "elsewhere").iterdir()
    started = json.loads((folder / "training.json").read_bytes())
    identity, how = started["identity"], started["compute"]
    assert identity["options"] == {
        **chosen,
        "skip_unlabelled": True,
        "train": "patches.csv",
        "test": ["others/others.csv"],
        "lora": lora,
    }
    recipe = {name: chosen[name] for name in ("epochs", "batch_size", "learning_rate")}
    recipe |= {"optimizer": "adam", "schedule": "plateau", "view": "full@224+imagenet"}
    assert {name: identity["recipe"][name] for name in recipe} == recipe
    assert identity["backbone"]["precision"] == "bf16"
    transform = identity["backbone"]["transform"]
    assert (transform["mean"], transform["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (transform["crop"], transform["input_size"]) == (16, 32)
    assert Path(how["weights"]) == weights
    computed = {"device": "cpu", "folds_at_once": 2, "compile": False, "fast": False}
    computed |= {"grad_checkpointing": True, "merge": True}
    assert {name: how[name] for name in computed} == computed


def relabelled(tmp_path: Path, classes: tuple[str, ...]) -> None:
    """Give the patches these classes in turn."""
    table = tmp_path / "patches.csv"
    header, *lines = table.read_text().splitlines()
    cells = [line.split(",") for line in lines]
    named = [",".join([cell[0], classes[row % len(classes)], *cell[2:]]) for row, cell in enumerate(cells)]
    table.write_text("\n".join([header, *named]) + "\n")


def test_three_classes_are_trained_in_the_order_asked_for(finetune: Command, tmp_path: Path) -> None:
    relabelled(tmp_path, ("Medium", "low", "high"))
    model = ("--model", "timm/test_vit", "--weights", write_weights(tmp_path / "vit.safetensors", "test_vit"))
    done = finetune(*model, "--classes", "low,medium,high", "--ordinal", "--merge", "--no-tta", "--json")
    assert done.status == 0, done.err
    (record,) = json.loads(done.out)["results"]
    assert record["label_names"] == ["low", "Medium", "high"]
    assert record["ordinal"] is True
    assert record["options"]["classes"] == ["low", "medium", "high"]
    (folder,) = (tmp_path / "runs").iterdir()
    predictions = read_predictions(folder)
    for id, label in zip(predictions.id, predictions.label, strict=True):
        assert label == (1, 0, 2)[int(id.removesuffix(".png")) % 3]
    # For its pictures, a report reads the patches in the same order.
    again = _load_patches("patches", read_run(folder), None)
    assert again.samples.table_digest == record["table_digests"]["patches"]
    transform = make_transform(find_backbone("timm/test_vit"), parse_view("full@32"))
    for fold in range(2):
        model = timm.create_model("test_vit", num_classes=3, dynamic_img_size=True).eval()
        model.load_state_dict(safetensors.torch.load_file(folder / f"fold-{fold}" / "model.safetensors"))
        judged = predictions.select(predictions.fold == fold)
        patches = [np.asarray(Image.open(tmp_path / name)) for name in judged.id]
        with torch.inference_mode():
            outputs = model(transform(patches, torch.device("cpu")))
        np.testing.assert_allclose(judged.logit, outputs[:, 1:] - outputs[:, :1], rtol=1e-4, atol=1e-4)


def test_one_class_against_the_rest_is_two_classes(finetune: Command, tmp_path: Path) -> None:
    relabelled(tmp_path, ("medium", "low", "high"))
    model = ("--model", "timm/test_vit", "--weights", write_weights(tmp_path / "vit.safetensors", "test_vit"))
    done = finetune(*model, "--method", "head", "--positive", "high", "--json")
    assert done.status == 0, done.err
    (record,) = json.loads(done.out)["results"]
    assert record["label_names"] == ["not high", "high"]


def test_a_fold_that_validates_on_one_class_alone_is_refused(finetune: Command, tmp_path: Path) -> None:
    relabelled(tmp_path, ("a", "a", "b", "b", "c", "c"))  # every slide has one class
    said = refused(finetune("--cv", "6"))
    assert re.search(r"fold \d of 6 validates on [abc] alone; expected patches of at least two classes.*--cv", said)
    assert not (tmp_path / "runs").exists()


def test_votes_are_trained_towards(bare: Command, tmp_path: Path) -> None:
    """The drawn patches have votes, a majority of which is the label."""
    model = ("--model", "timm/test_vit", "--weights", write_weights(tmp_path / "vit.safetensors", "test_vit"))
    small = ("--train", "demo", *model, *SMALL, "--epochs", "1", "--method", "head", "--json")
    records = []
    for asked in ((), ("--soft-labels", "votes")):
        done = bare(*small, *asked)
        assert done.status == 0, done.err
        (record,) = json.loads(done.out)["results"]
        records.append(record)
    hard, soft = records
    assert "soft_labels" not in hard["options"]
    assert soft["options"]["soft_labels"] == "votes"
    # The same patches are drawn, so losses differ by what they are trained towards.
    losses = [[history[0]["loss"] for history in record["history"]] for record in records]
    assert all(abs(one - other) > 1e-3 for one, other in zip(*losses, strict=True))
    assert hard["table_digests"] == soft["table_digests"]


def test_the_positive_class_is_positive_in_every_dataset(finetune: Command, tmp_path: Path) -> None:
    write_patches(tmp_path / "others", table="others.csv", seed=1)
    model = ("--model", "timm/test_vit", "--weights", write_weights(tmp_path / "vit.safetensors", "test_vit"))
    done = finetune(*model, "--method", "head", "--test", "others/others.csv", "--positive", "Normal")
    assert done.status == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    predictions = read_predictions(folder)
    assert set(predictions.sets()) == {("patches", "validation"), ("patches", "test"), ("others", "test")}
    for id, label in zip(predictions.id, predictions.label, strict=True):
        assert label == 1 - int(id.removesuffix(".png")) % 2  # odd ones are Atypical
