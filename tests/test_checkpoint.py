"""Does a training that was interrupted anywhere end as if it had not been?"""

from __future__ import annotations

import errno
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from extract.backbones import find_backbone
from extract.views import make_transform, parse_view
from features import files
from features.console import UserError
from finetune import checkpoint, score, setup
from finetune import run as finetuning
from finetune.checkpoint import CHECKPOINT_FILE, FORMAT, START_FILE, State, load_state, save_state
from finetune.lora import LoraOptions
from finetune.network import Method, Network
from finetune.options import ComputeOptions, FinetuneOptions
from finetune.run import finetune, resume
from probe import experiment
from probe.records import EpochRecord, RunRecord
from probe.runs import read_predictions, read_run

CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for a process that ends here."""


# ------------------------------------------------------------------------------------------------------------- the file


def some_state() -> State:
    generator = torch.Generator().manual_seed(0)
    return State(
        members=(0, 1, 2),
        values=torch.randn(3, 7, generator=generator),
        best=torch.randn(3, 7, generator=generator).double().float(),
        moments=torch.randn(3, 2, 5, generator=generator),
        n_steps=[4, 5, 6],
        history={
            fold: [EpochRecord(1 / 3 + fold, balanced_accuracy=0.1 + 0.2, auroc=2 / 3, learning_rate=1e-7 / 3)]
            for fold in range(4)
        },
        seconds=1 / 7,
        n_images=123,
        fast_paths=("CUDA graph", "kernels"),
    )


def equal(left: Any, right: Any) -> bool:
    return torch.equal(left, right) and left.dtype == right.dtype if isinstance(left, Tensor) else left == right


def assert_equal(left: State, right: State, *, but: frozenset[str] = frozenset()) -> None:
    for name in {field.name for field in fields(State)} - but:
        assert equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = some_state()
    state.values[0, 0], state.values[0, 1] = float("-inf"), -0.0
    state = replace(state, values=state.values.to(dtype))
    save_state(tmp_path, state)
    found = load_state(tmp_path, CPU)
    assert found is not None
    assert_equal(found, state)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT_FILE}


def test_before_the_first_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path, CPU) is None


def test_a_newer_state_replaces_the_older(tmp_path: Path) -> None:
    save_state(tmp_path, some_state())
    newer = replace(some_state(), n_steps=[7, 8, 9])
    save_state(tmp_path, newer)
    found = load_state(tmp_path, CPU)
    assert found is not None
    assert_equal(found, newer)


def damages() -> dict[str, Any]:
    tensors = {name: torch.zeros(1) for name in ("values", "best", "moments")}
    return {
        "empty": lambda path: path.write_bytes(b""),
        "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:20]),
        "cut at the end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "another kind": lambda path: path.write_text("not a checkpoint"),
        "no metadata": lambda path: save_file(tensors, path),
        "no JSON": lambda path: save_file(tensors, path, {"state": "{"}),
        "a tensor too few": lambda path: save_file({"values": torch.zeros(1)}, path, {"state": "{}"}),
        "nothing described": lambda path: save_file(tensors, path, {"state": "{}"}),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_checkpoint_is_named_with_a_remedy(tmp_path: Path, damage: str) -> None:
    save_state(tmp_path, some_state())
    damages()[damage](tmp_path / CHECKPOINT_FILE)
    with pytest.raises(UserError, match=rf"{CHECKPOINT_FILE} is damaged.*`resume`"):
        load_state(tmp_path, CPU)


def test_a_full_disk_is_one_message_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, some_state())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_file", full)
        with pytest.raises(UserError, match="No space left on device"):
            save_state(tmp_path, replace(some_state(), n_steps=[0, 0, 0]))
    with monkeypatch.context() as patched:
        patched.setattr(files, "flush", full)  # the disk fills while the file is written
        with pytest.raises(UserError, match="No space left on device"):
            save_state(tmp_path, replace(some_state(), n_steps=[0, 0, 0]))
    found = load_state(tmp_path, CPU)
    assert found is not None
    assert_equal(found, some_state())
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT_FILE}


# ----------------------------------------------------------------------------------------------------- whole trainings


def bright_patches(folder: Path) -> Path:
    """A table of 24 patches of twelve slides, two of them for testing; the positive ones are brighter."""
    rng = np.random.default_rng(0)
    rows = ["path,label,group,split"]
    for row in range(24):
        slide, positive = row // 2, row % 2
        pixels = (rng.integers(0, 200, (32, 32, 3)) + 40 * positive).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
        label, split = ("Atypical" if positive else "Normal"), ("test" if slide > 9 else "train")
        rows.append(f"{row}.png,{label},slide {slide},{split}")
    (folder / "bright.csv").write_text("\n".join(rows) + "\n")
    return folder / "bright.csv"


MODELS: dict[Method, str] = {"lora": "test_vit", "head": "test_vit", "full": "test_efficientnet"}
EPOCHS, FOLDS = 3, 2


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of timm's smallest networks, and sixteen patches of eight slides, two of them for testing."""
    folder = tmp_path_factory.mktemp("material")
    for arch in set(MODELS.values()):
        torch.manual_seed(0)
        save_file(timm.create_model(arch, num_classes=0).state_dict(), folder / f"{arch}.safetensors")
    rng = np.random.default_rng(0)
    rows = ["path,label,group,split"]
    for row in range(16):
        slide = row // 2
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{row}.png")
        label, split = ("Atypical" if row % 2 else "Normal"), ("test" if slide > 5 else "train")
        rows.append(f"{row}.png,{label},slide {slide},{split}")
    (folder / "patches.csv").write_text("\n".join(rows) + "\n")
    return folder


def options(material: Path, method: Method, **chosen: Any) -> FinetuneOptions:
    return FinetuneOptions(
        **{
            "model": f"timm/{MODELS[method]}",
            "train": str(material / "patches.csv"),
            "test": (),
            "method": method,
            "lora": LoraOptions(rank=2, alpha=4),
            "view": "full@32",
            "cv": FOLDS,
            "epochs": EPOCHS,
            "batch_size": 4,
            "precision": "fp32",
        }
        | chosen
    )


def compute_options(material: Path, method: Method) -> ComputeOptions:
    return ComputeOptions(weights=material / f"{MODELS[method]}.safetensors", device="cpu")


def run_folder(run: RunRecord | None) -> Path:
    """Where a finished run is."""
    assert run is not None
    assert run.folder is not None
    return run.folder


def content(path: Path) -> Any:
    """What a file of weights holds, or the bytes of another."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a run that a reader may use, but for what tells one run from another: name, time and cost."""
    record = read_run(folder).as_json()
    kept = {key: value for key, value in record.items() if key not in ("id", "created", "cost")}
    del kept["sha256"]["run.json"]  # of these three too
    weights = {path.relative_to(folder).as_posix(): content(path) for path in folder.glob("fold-*/*")}
    return {
        **kept,
        **weights,
        "predictions": (folder / "predictions.csv").read_bytes(),
        "metrics": (folder / "metrics.json").read_bytes(),
        "n_images": record["cost"]["training_images"],
    }


@pytest.fixture(scope="module")
def undisturbed(
    material: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Method, tuple[dict[str, Any], list[State]]]:
    """Per method the outcome, and the state after every epoch."""
    found: dict[Method, tuple[dict[str, Any], list[State]]] = {}
    for method in MODELS:
        with pytest.MonkeyPatch.context() as patched:
            states = remembering(patched)
            folder = run_folder(
                finetune(
                    options(material, method),
                    compute_options=compute_options(material, method),
                    runs=tmp_path_factory.mktemp("runs"),
                )
            )
        found[method] = outcome(folder), states
    return found


def remembering(patched: pytest.MonkeyPatch, *, kill_after: int | None = None) -> list[State]:
    """The states saved from now on, as copies; the training is killed after the k-th, if one is given."""
    states: list[State] = []
    save = save_state

    def remember(folder: Path, state: State) -> None:
        save(folder, state)
        loaded = load_state(folder, CPU)
        assert loaded is not None
        assert_equal(loaded, state)
        states.append(loaded)
        if len(states) == kill_after:
            raise Killed

    patched.setattr(finetuning, "save_state", remember)
    return states


def interrupted(material: Path, method: Method, runs: Path) -> Path:
    """The folder of a training that is killed on its way by whatever has been patched."""
    with pytest.raises(Killed):
        finetune(options(material, method), compute_options=compute_options(material, method), runs=runs)
    (folder,) = runs.iterdir()
    assert not (folder / "run.json").exists()
    assert (folder / START_FILE).exists()
    return folder


def assert_same_outcome(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []


N_SAVES = {"lora": EPOCHS, "head": EPOCHS, "full": FOLDS * EPOCHS}


@pytest.mark.parametrize(("method", "k"), [(method, k) for method, n in N_SAVES.items() for k in range(1, n + 1)])
def test_a_training_killed_after_any_epoch_ends_as_if_it_had_not_been(
    material: Path, tmp_path: Path, undisturbed: dict[Method, Any], method: Method, k: int
) -> None:
    expected, all_states = undisturbed[method]
    assert len(all_states) == N_SAVES[method]
    with pytest.MonkeyPatch.context() as patched:
        first = remembering(patched, kill_after=k)
        folder = interrupted(material, method, tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        rest = remembering(patched)
        assert run_folder(resume(folder)) == folder
    assert len(first + rest) == len(all_states)
    for found, plain in zip(first + rest, all_states, strict=True):
        assert_equal(found, plain, but=frozenset({"seconds"}))
    assert_same_outcome(outcome(folder), expected)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "run.json",
        "predictions.csv",
        "metrics.json",
        "samples.csv",
    }


@pytest.mark.parametrize("k", [1, EPOCHS])
def test_a_training_of_three_classes_killed_after_an_epoch_ends_as_if_it_had_not_been(
    material: Path, tmp_path: Path, k: int
) -> None:
    table = tmp_path / "three.csv"
    lines = (material / "patches.csv").read_text().splitlines()
    classes = ("low", "middle", "high")
    named = [line.replace(line.split(",")[1], classes[row % 3]) for row, line in enumerate(lines[1:])]
    table.write_text("\n".join([lines[0], *(str(material / line) for line in named)]))
    asked = options(material, "lora", train=str(table), classes=classes)
    computing = compute_options(material, "lora")
    expected = outcome(run_folder(finetune(asked, compute_options=computing, runs=tmp_path / "whole")))
    assert expected["label_names"] == list(classes)
    assert expected["options"]["classes"] == list(classes)
    with pytest.MonkeyPatch.context() as patched:
        remembering(patched, kill_after=k)
        with pytest.raises(Killed):
            finetune(asked, compute_options=computing, runs=tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    run_folder(resume(folder))
    assert_same_outcome(outcome(folder), expected)


MOMENTS = {
    "before training": (finetuning, "load_training_set", 1, 1),
    "before a network is trained": (finetuning, "train", 1, 2),
    "while folds are saved": (finetuning, "member_folder", 2, 2),
    "before scoring": (finetuning, "score", 1, 1),
    "while held-out patches are scored": (score, "validation_logits", 1, 2),
    "while test patches are scored": (score, "patch_logits", 1, 2),
    "before the run is written": (finetuning, "finish_run", 1, 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_killed_anywhere_else_ends_as_if_it_had_not_been(
    material: Path, tmp_path: Path, undisturbed: dict[Method, Any], method: Method, moment: str
) -> None:
    module, where, at_lora, at_full = MOMENTS[moment]  # the k-th call of a function; full training goes fold by fold
    function, left = getattr(module, where), at_lora if method == "lora" else at_full

    def killed(*given: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return function(*given, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, where, killed)
        folder = interrupted(material, method, tmp_path)
    resume(folder)
    assert_same_outcome(outcome(folder), undisturbed[method][0])


def test_a_training_may_be_killed_again_and_again(
    material: Path, tmp_path: Path, undisturbed: dict[Method, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        remembering(patched, kill_after=1)
        folder = interrupted(material, "full", tmp_path)
    for _ in range(FOLDS * EPOCHS - 1):
        with pytest.MonkeyPatch.context() as patched:
            remembering(patched, kill_after=1)
            with pytest.raises(Killed):
                resume(folder)
    resume(folder)
    assert_same_outcome(outcome(folder), undisturbed["full"][0])


def test_a_training_killed_before_its_files_are_swept_counts_as_finished(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish = finetuning.finish_run

    def finish_and_die(*given: Any, **named: Any) -> None:
        finish(*given, **named)
        raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetuning, "finish_run", finish_and_die)
        with pytest.raises(Killed):
            finetune(options(material, "head"), compute_options=compute_options(material, "head"), runs=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert run_folder(resume(folder)) == folder
    assert "has finished already" in capsys.readouterr().err
    assert not (folder / CHECKPOINT_FILE).exists()
    assert not (folder / START_FILE).exists()


def test_what_a_killed_writer_left_is_swept_up(material: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        remembering(patched, kill_after=1)
        folder = interrupted(material, "head", tmp_path)
    files.temporary_name(folder / CHECKPOINT_FILE).write_bytes(b"half")
    resume(folder)
    assert not list(folder.rglob(f"*{files.PARTIAL}"))


def test_a_disk_that_fills_up_ends_training_and_the_rest_follows_on_resuming(
    material: Path, tmp_path: Path, undisturbed: dict[Method, Any]
) -> None:
    write, calls = checkpoint.write_file, 0

    def full(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "write_file", full)
        with pytest.raises(UserError, match=r"cannot write to.*No space left on device.*free some space"):
            finetune(options(material, "lora"), compute_options=compute_options(material, "lora"), runs=tmp_path)
    (folder,) = tmp_path.iterdir()
    resume(folder)
    assert_same_outcome(outcome(folder), undisturbed["lora"][0])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resuming_may_compute_in_another_way(
    material: Path, tmp_path: Path, undisturbed: dict[Method, Any], method: Method
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        remembering(patched, kill_after=1)
        folder = interrupted(material, method, tmp_path)
    resume(folder, given={"folds_at_once": 2, "merge": True})
    assert (folder / "fold-1" / "model.safetensors").exists()
    expected, found = undisturbed[method][0], outcome(folder)
    assert found["best_epoch"] == expected["best_epoch"]
    for one, other in zip(found["history"], expected["history"], strict=True):
        assert [epoch["loss"] for epoch in one] == pytest.approx([epoch["loss"] for epoch in other], rel=1e-3)


def test_a_damaged_checkpoint_deleted_as_told_starts_again(
    material: Path, tmp_path: Path, undisturbed: dict[Method, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        remembering(patched, kill_after=2)
        folder = interrupted(material, "lora", tmp_path)
    (folder / CHECKPOINT_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"{CHECKPOINT_FILE} is damaged"):
        resume(folder)
    (folder / CHECKPOINT_FILE).unlink()
    resume(folder)
    assert_same_outcome(outcome(folder), undisturbed["lora"][0])


def test_the_same_command_gives_the_same_bytes(material: Path, tmp_path: Path, undisturbed: dict[Method, Any]) -> None:
    folder = run_folder(
        finetune(options(material, "lora"), compute_options=compute_options(material, "lora"), runs=tmp_path)
    )
    assert_same_outcome(outcome(folder), undisturbed["lora"][0])


def test_predictions_are_those_of_the_best_epochs(material: Path, tmp_path: Path) -> None:
    """At this rate accuracy is best early and falls; a training that ends at a fold's best epoch has its weights."""
    chosen = {"train": str(bright_patches(tmp_path)), "recipe": "paper", "learning_rate": 0.03}

    def run_of(epochs: int) -> Path:
        short = options(material, "lora", **chosen, epochs=epochs)
        return run_folder(
            finetune(short, compute_options=compute_options(material, "lora"), runs=tmp_path / str(epochs))
        )

    with pytest.MonkeyPatch.context() as patched:
        states = remembering(patched)
        folder = run_of(4)
    predictions, run = read_predictions(folder), read_run(folder)
    assert run.best_epoch is not None
    assert run.history is not None
    assert all(best < 3 for best in run.best_epoch), "the last epoch of this example must not be the best"
    assert max(run.best_epoch) > 0, "nor may the first always be"
    for fold, (history, best) in enumerate(zip(run.history, run.best_epoch, strict=True)):
        figures = [epoch.balanced_accuracy for epoch in history]
        assert best == int(np.argmax(figures))
        own = predictions.select((predictions.fold == fold) & (predictions.split == "validation"))
        hit = (own.logit[:, 0] >= 0) == own.label
        accuracy = np.mean([hit[own.label == value].mean() for value in (0, 1)])
        assert accuracy == pytest.approx(figures[best])
        assert not torch.allclose(states[best].values[fold], states[-1].values[fold], atol=0.01)
        ended = read_predictions(run_of(best + 1))
        for split in ("validation", "test"):
            found, expected = (
                each.select((each.fold == fold) & (each.split == split)).logit for each in (predictions, ended)
            )
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- what must not change


@pytest.fixture
def begun(material: Path, tmp_path: Path) -> Path:
    """A training of classifiers after one epoch, on data of its own that a test may change."""
    for path in material.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patched:
        remembering(patched, kill_after=1)
        return interrupted(tmp_path, "head", tmp_path / "runs")


def test_options_given_again_must_be_those_of_the_start(begun: Path, tmp_path: Path) -> None:
    same = {"epochs": EPOCHS, "lora.rank": 2, "test": (), "model": "timm/test_vit"}
    with pytest.raises(UserError, match=r"seed 7 instead of 42.*lora.rank 4 instead of 2"):
        resume(begun, given={"seed": 7, "epochs": EPOCHS, "lora.rank": 4})
    resume(begun, given=same)


@pytest.mark.parametrize(
    ("what", "named"), [("patch", "dataset_digest"), ("label", "table"), ("weights", "weights_sha256")]
)
def test_what_has_changed_since_the_start_is_named(begun: Path, tmp_path: Path, what: str, named: str) -> None:
    if what == "patch":
        Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "3.png")
    elif what == "label":
        table = tmp_path / "patches.csv"
        table.write_text(table.read_text().replace("15.png,Atypical", "15.png,Normal"))
    else:
        torch.manual_seed(1)
        save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "test_vit.safetensors")
    before = (begun / CHECKPOINT_FILE).read_bytes()
    with pytest.raises(UserError, match=rf"cannot be resumed.*{named}.*Restore it"):
        resume(begun)
    assert (begun / CHECKPOINT_FILE).read_bytes() == before


def test_other_package_versions_are_told_and_go_on(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((begun / START_FILE).read_bytes())
    record["versions"]["torch"] = "1.0"
    del record["sha256"]
    (begun / START_FILE).write_text(json.dumps(record))
    resume(begun)
    assert "versions have changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"training.json is damaged.*new run"),
        (b"[]", r"training.json is damaged.*new run"),
        (b"{}", r"training.json is damaged.*new run"),
        (json.dumps({"format": FORMAT}).encode(), r"training.json is damaged.*new run"),
        (json.dumps({"format": FORMAT + 1}).encode(), rf"training of format {FORMAT + 1}.*resumes format {FORMAT}"),
    ],
)
def test_a_start_that_cannot_be_read_is_named(begun: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (begun / START_FILE).write_bytes(content)
    with pytest.raises(UserError, match=message):
        resume(begun)


def test_a_folder_that_is_no_training_is_named_with_one_that_is(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no interrupted training.*Did you mean {begun.name}"):
        resume(begun.with_name(begun.name[:-1]), given={})
    with pytest.raises(UserError, match="no interrupted training"):
        resume(begun / START_FILE, given={})  # a file


def test_any_flipped_bit_of_an_interrupted_training_is_refused(begun: Path) -> None:
    for name in (START_FILE, CHECKPOINT_FILE):
        whole = (begun / name).read_bytes()
        for bit in range(8 * len(whole) // 97, 8 * len(whole), 8 * len(whole) // 13):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            (begun / name).write_bytes(data)
            with pytest.raises(UserError):
                resume(begun)
        (begun / name).write_bytes(whole)


@pytest.mark.parametrize("what", ["group", "patch"])
def test_a_test_set_that_has_changed_since_the_start_is_named(material: Path, tmp_path: Path, what: str) -> None:
    others = bright_patches(tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        remembering(patched, kill_after=1)
        asked = options(material, "head", test=(str(others),))
        with pytest.raises(Killed):
            finetune(asked, compute_options=compute_options(material, "head"), runs=tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    if what == "patch":
        Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "3.png")
    else:
        assert "slide 7" in others.read_text()
        others.write_text(others.read_text().replace("slide 7", "slide 8"))
    with pytest.raises(UserError, match=r"cannot be resumed.*bright.*Restore it"):
        resume(folder)


@pytest.mark.parametrize("part", ["values", "best", "moments", "history"])
def test_a_checkpoint_of_which_any_part_was_changed_is_refused(tmp_path: Path, part: str) -> None:
    save_state(tmp_path, some_state())
    path = tmp_path / CHECKPOINT_FILE
    with safe_open(path, "pt") as file:
        described = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, described)
    found = load_state(tmp_path, CPU)
    assert found is not None  # written again as it was
    if part == "history":
        (key,) = described
        assert '"n_steps": [4, 5, 6]' in described[key]
        described[key] = described[key].replace('"n_steps": [4, 5, 6]', '"n_steps": [4, 5, 7]')
    else:
        tensors[part].view(-1)[-1] += 1
    save_file(tensors, path, described)
    with pytest.raises(UserError, match=rf"{CHECKPOINT_FILE} is damaged"):
        load_state(tmp_path, CPU)


# Slides for training, for testing and for neither, in no order.
SPLITS = ["test", "train", "", "train", "train", "", "train", "test", "train", "train", "", "train"]


def test_rows_train_validate_and_test_as_the_table_says_in_whatever_order(material: Path, tmp_path: Path) -> None:
    bright_patches(tmp_path)
    rows: dict[str, tuple[int, str, str]] = {}
    for row in range(24):
        slide = row // 2
        # Its patches are bright and dark, in turn the one or the other first.
        source = row ^ (slide % 2)
        (tmp_path / f"p{row}.png").write_bytes((tmp_path / f"{source}.png").read_bytes())
        rows[f"p{row}.png"] = source % 2, f"slide {slide}", SPLITS[slide]
    table = tmp_path / "mixed.csv"
    lines = [f"{id},{('Normal', 'Atypical')[label]},{group},{split}" for id, (label, group, split) in rows.items()]
    table.write_text("\n".join(["path,label,group,split", *lines]))
    asked = options(material, "head", train=str(table), learning_rate=0.03, tta=False)
    folder = run_folder(finetune(asked, compute_options=compute_options(material, "head"), runs=tmp_path / "runs"))
    predictions, run = read_predictions(folder), read_run(folder)
    for split, name in (("train", "validation"), ("test", "test")):
        ids = predictions.id[predictions.split == name]
        assert set(ids.tolist()) == {id for id, row in rows.items() if row[2] == split}
        assert len(ids) == len(set(ids.tolist())) * (1 if split == "train" else FOLDS)
    for id, label, group in zip(predictions.id, predictions.label, predictions.group, strict=True):
        assert (label, group) == rows[id][:2]
    assert run.history is not None
    assert run.best_epoch is not None
    assert run.cost.training_images == EPOCHS * sum(
        int(np.ceil((14 - (predictions.fold[predictions.split == "validation"] == fold).sum()) / 4)) * 4
        for fold in range(FOLDS)
    )
    backbone = load_file(material / "test_vit.safetensors")
    transform = make_transform(find_backbone("timm/test_vit"), parse_view("full@32"))
    for fold in range(FOLDS):
        model = timm.create_model("test_vit", num_classes=2, dynamic_img_size=True).eval()
        head = {
            f"head.{name}": value for name, value in load_file(folder / f"fold-{fold}" / "head.safetensors").items()
        }
        model.load_state_dict(backbone | head)
        own = predictions.select(predictions.fold == fold)
        pixels = [np.asarray(Image.open(tmp_path / id)) for id in own.id]
        with torch.inference_mode():
            expected = model(transform(pixels, CPU)).diff(dim=1)[:, 0]
        np.testing.assert_allclose(own.logit[:, 0], expected.numpy(), rtol=1e-3, atol=1e-3)
        held_out = own.select(own.split == "validation")
        hit = (held_out.logit[:, 0] >= 0) == held_out.label
        accuracy = np.mean([hit[held_out.label == value].mean() for value in (0, 1)])
        assert accuracy == pytest.approx(run.history[fold][run.best_epoch[fold]].balanced_accuracy)
        assert accuracy > 0.9, "bright and dark can be told apart, by the labels of the right rows"


def test_the_seed_asked_for_is_the_seed_trained_with(material: Path, tmp_path: Path) -> None:
    seeds: list[int] = []

    def listen(network: Network, *_: Any, **named: Any) -> None:
        seeds.extend(model.seed for model in network.fold_models)
        raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetuning, "train", listen)
        with pytest.raises(Killed):
            finetune(
                options(material, "head", seed=7), compute_options=compute_options(material, "head"), runs=tmp_path
            )
    assert seeds == [7] * FOLDS


def test_merged_weights_of_a_training_in_bf16_are_not_rounded_to_bf16(material: Path, tmp_path: Path) -> None:
    asked = options(material, "lora", precision="bf16", epochs=1, lora=LoraOptions(rank=2, alpha=5))
    merging = replace(compute_options(material, "lora"), merge=True)
    folder = run_folder(finetune(asked, compute_options=merging, runs=tmp_path)) / "fold-1"
    frozen = load_file(material / "test_vit.safetensors")
    factors, merged = load_file(folder / "adapter_model.safetensors"), load_file(folder / "model.safetensors")
    n_adapted = 0
    for name, tensor in frozen.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in factors:
            n_adapted += 1
            tensor = tensor + 5 / 2 * factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
    assert n_adapted > 0


@pytest.mark.parametrize(
    ("recipe", "train", "scheme"),
    [("paper", "ami-br", "paper"), ("default", "ami-br", "default"), ("paper", "patches", "default")],
)
def test_the_papers_folds_belong_to_the_papers_recipe_and_data(
    material: Path, recipe: str, train: str, scheme: str
) -> None:
    asked: list[str] = []

    def listen(*_: Any, **named: Any) -> None:
        asked.append(named["scheme"])
        raise Killed

    patches = replace(setup.load_dataset(str(material / "patches.csv")), name=train)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setup, "load_dataset", lambda *_, **__: patches)
        patched.setattr(experiment, "grouped_folds", listen)
        with pytest.raises(Killed):
            setup.prepare(options(material, "head", train=train, recipe=recipe), compute_options(material, "head"))
    assert asked == [scheme]
