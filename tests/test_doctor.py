"""Does fm-doctor find what cannot work, name what mends it, and answer in seconds whatever the network does?"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from huggingface_hub import constants
from PIL import Image
from stub_hub import StubHub, StubRepo

from extract import benchmark, doctor, hub
from extract.doctor import Check, Diagnosis, DoctorOptions, ModelCheck, diagnose
from extract.registry import BACKBONES
from features.console import UserError
from features.samples import make_samples
from features.store import FeatureStore
from finetune import cli

UNI, KAIKO = BACKBONES["uni"], BACKBONES["kaiko-s16"]
Point = Callable[[str], None]
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def stub(point: Point, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    """A hub with one gated and one open model, an empty folder to stand in, no data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MITOFM_DATA", raising=False)
    monkeypatch.setenv("MITOFM_CACHE", str(tmp_path / "downloads"))
    repos = {
        UNI.hub_id: StubRepo({UNI.weight_file: b"weights"}, gated=True, commit=UNI.revision),
        KAIKO.hub_id: StubRepo({KAIKO.weight_file: b"weights"}, commit=KAIKO.revision),
    }
    with StubHub(repos) as running:
        point(running.url)
        yield running


def check(found: Diagnosis, name: str) -> Check:
    (line,) = [line for line in found.checks if line.name == name]
    return line


def model(name: str) -> ModelCheck:
    (line,) = diagnose(DoctorOptions(models=(name,))).models
    return line


def test_a_bare_look_fails_at_nothing_that_was_not_asked_for(stub: StubHub) -> None:
    found = diagnose(DoctorOptions())
    assert not found.failed
    assert [line.name for line in found.models] == list(BACKBONES)
    lines = {line.name: line for line in found.models}
    assert (lines["efficientnet-lite0"].status, lines["efficientnet-lite0"].access) == ("ok", "not needed")
    assert (lines["uni"].status, lines["uni"].access) == ("note", "not granted")
    assert (lines["kaiko-s16"].status, lines["kaiko-s16"].access) == ("ok", "granted")
    assert check(found, "hub").status == "ok"
    assert check(found, "token").status == "note"


def test_nothing_is_downloaded_and_nothing_written(stub: StubHub, tmp_path: Path) -> None:
    diagnose(DoctorOptions(models=("uni", "kaiko-s16")))
    assert {method for method, path, _ in stub.requests if path != "/"} == {"HEAD"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("token", "access", "remedy"),
    [
        (None, "not granted", "no token was found"),
        ("hf_stranger", "not granted", "Request access on https://huggingface.co/MahmoodLab/UNI"),
        ("hf_revoked", "not granted", "rejected your token"),
        ("hf_member", "granted", ""),
    ],
)
def test_a_gated_model(
    stub: StubHub, monkeypatch: pytest.MonkeyPatch, token: str | None, access: str, remedy: str
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    found = model("uni")
    assert (found.access, found.status, found.cached) == (access, "ok" if token == "hf_member" else "fail", None)
    assert remedy in found.remedy


def test_a_token_that_is_no_good_fails(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    line = check(diagnose(DoctorOptions(models=("efficientnet-lite0",))), "token")
    assert (line.status, line.remedy) == ("fail", hub.TOKEN_REJECTED)
    monkeypatch.setenv("HF_TOKEN", "hf_member “quoted”")
    stub.requests.clear()
    line = check(diagnose(DoctorOptions(models=("efficientnet-lite0",))), "token")
    assert line.status == "fail"
    assert "characters that no token has" in line.remedy
    assert stub.requests == []


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_hub_only_what_is_cached_can_be_had(
    stub: StubHub, point: Point, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    hub.fetch_file(UNI.hub_id, UNI.weight_file, revision=UNI.revision)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    point(NOBODY)
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    found = diagnose(DoctorOptions(models=("uni", "kaiko-s16", "hf-hub:org/other")))
    assert pauses == []
    here, absent, unknown = found.models
    assert (here.status, here.cached, here.access) == ("ok", UNI.revision, "not asked")
    assert (absent.status, absent.cached, absent.access) == ("fail", None, "not asked")
    assert "not in the cache" in absent.remedy
    assert unknown.status == "fail"
    assert check(found, "hub").status == "note"
    assert ("HF_HUB_OFFLINE" if offline else "did not answer") in check(found, "hub").found


def test_a_hub_that_never_answers_holds_nothing_up(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    # As a name server that is away, which heeds no timeout. Whoever waits for it has its answer, and fails below.
    monkeypatch.setattr(hub, "check_hub", lambda: never.wait(60))
    monkeypatch.setattr(doctor, "_HUB_SECONDS", 0.2)
    found = diagnose(DoctorOptions(models=("efficientnet-lite0",)))
    assert "no answer" in check(found, "hub").remedy
    never.set()


def test_a_name_that_is_no_model(stub: StubHub) -> None:
    found = model("unni")
    assert found.status == "fail"
    assert "Did you mean uni" in found.remedy


def test_weights_that_do_not_fit_on_the_disk(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage("/")._replace(free=5_000_000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    found = model("kaiko-s16")
    assert found.status == "fail"
    assert "0.0 GB free" in found.remedy


def test_places_that_cannot_be_written(stub: StubHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "embeddings.zarr").mkdir()
    monkeypatch.setattr(doctor.os, "access", lambda *arguments: False)
    places = {line.name: line for line in diagnose(DoctorOptions(models=("efficientnet-lite0",))).checks}
    assert (places["runs"].status, places["weights"].status) == ("fail", "fail")
    assert "`runs`" in places["runs"].remedy
    assert "HF_HOME" in places["weights"].remedy
    (disk,) = [line for line in diagnose(DoctorOptions()).checks if (line.group, line.name) == ("disk", "store")]
    assert disk.status == "note"  # what is there can be read


# --- data and store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three patches in the place of AtNorM-Br."""
    folder = tmp_path / "data"
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    paths = [folder / "AtNorM-Br" / name for name in ("Atypical/0.png", "Normal/1.png", "Normal/2.png")]
    for path, image in zip(paths, pixels, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    ids = [path.relative_to(folder / "AtNorM-Br").as_posix() for path in paths]
    digests = [hub.sha256_of(path) for path in paths]
    record = replace(
        benchmark.DATASETS["atnorm-br"],
        n_atypical=1,
        n_normal=2,
        n_bytes=sum(path.stat().st_size for path in paths),
        digest=benchmark.files_digest(ids, digests),
    )
    monkeypatch.setitem(benchmark.DATASETS, "atnorm-br", record)
    return folder


def look(data: Path, name: str, *, verify: bool = False) -> Check:
    return check(diagnose(DoctorOptions(models=("efficientnet-lite0",), data=data, verify=verify)), name)


def test_data_as_published(stub: StubHub, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(data, "atnorm-br").found == "3 patches, as published (number and size)"
    assert look(data, "atnorm-br", verify=True).found == "3 patches, as published (every byte)"
    monkeypatch.setenv("MITOFM_DATA", str(data))
    assert check(diagnose(DoctorOptions(models=("efficientnet-lite0",))), "atnorm-br").status == "ok"


def test_data_that_differ_by_a_byte_are_found_when_every_byte_is_read(stub: StubHub, data: Path) -> None:
    swapped = data / "AtNorM-Br" / "Normal" / "1.png"
    other = data / "AtNorM-Br" / "Normal" / "2.png"
    first, second = swapped.read_bytes(), other.read_bytes()
    swapped.write_bytes(second)
    other.write_bytes(first)
    assert look(data, "atnorm-br").status == "ok"
    line = look(data, "atnorm-br", verify=True)
    assert line.status == "note"
    assert "expected " in line.found


def test_data_that_cannot_be_used(stub: StubHub, data: Path, tmp_path: Path) -> None:
    (data / "AtNorM-Br" / "Normal" / "1.png").unlink()
    line = look(data, "atnorm-br")
    assert line.status == "fail"
    assert "Restore the missing files" in line.remedy
    for nothing in (tmp_path / "absent", tmp_path):
        assert look(nothing, "folder").status == "fail"


def test_a_changed_table_is_named(stub: StubHub, data: Path) -> None:
    (data / "amibr_train_split.csv").write_text("dataset_uid,final_label\n")
    assert look(data, "amibr_train_split.csv").status == "note"


def test_the_store(stub: StubHub, tmp_path: Path) -> None:
    def store(path: Path | None, *, verify: bool = False) -> Check:
        found = diagnose(DoctorOptions(models=("efficientnet-lite0",), store=path, verify=verify))
        return next(line for line in found.checks if line.group == "store")

    path = tmp_path / "embeddings.zarr"
    assert (store(None).status, store(path).status) == ("note", "fail")
    n = 70  # two blocks
    opened = FeatureStore.open_or_create(path)
    table = make_samples([f"{i}.png" for i in range(n)], [i % 2 for i in range(n)], sha256=[str(i) for i in range(n)])
    opened.put_samples("patches", table, attrs={})
    writer = opened.begin(
        "patches", model="uni", view="full", poolings={"cls": 3}, card_pooling="cls", parts={"model": "uni"}
    )
    blocks = writer.missing()
    writer.write(blocks[0], {"cls": np.ones((len(blocks[0]), 3), np.float32)})
    line = store(path)
    assert (line.status, line.found) == ("note", "1 dataset, 1 set of embeddings, 1 unfinished")
    writer.write(blocks[1], {"cls": np.ones((len(blocks[1]), 3), np.float32)})
    assert store(path, verify=True).found.endswith("every byte sound")
    block = writer.entry.block_path("cls", 1)
    block.write_bytes(block.read_bytes()[:-1] + b"?")
    assert store(path).status == "ok"
    assert store(path, verify=True).status == "fail"


def test_openvino(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, status, said in (("2026.4.1", "ok", ""), (None, "note", "pip install 'mitofm[cpu]'")):
        monkeypatch.setattr(doctor.openvino, "version", lambda version=version: version)
        line = check(diagnose(DoctorOptions(models=("efficientnet-lite0",))), "OpenVINO")
        assert (line.status, said in line.remedy, (version or "not installed") in line.found) == (status, True, True)


# --- graphics processors ----------------------------------------------------------------------------------------------


def test_a_gpu(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70_000_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(doctor, "installed_gpus", lambda: ["H100, 580.1"])
    found = diagnose(DoctorOptions(models=("efficientnet-lite0",), device="cuda:1"))
    assert check(found, "GPU 0").found == "H100, 70.0 GB free of 80.0 GB, bf16, driver 580.1"
    assert check(found, "device").status == "fail"
    assert "torch sees 1 GPUs" in check(found, "device").remedy

    def refuse(index: int) -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    assert check(diagnose(DoctorOptions(models=("efficientnet-lite0",))), "GPU 0").status == "fail"


@pytest.mark.parametrize(
    ("installed", "build", "device", "status", "remedy"),
    [
        ([], "13.0", "auto", "note", ""),
        ([], "13.0", "cuda", "fail", "no NVIDIA GPU"),
        (["H100, 580.1"], None, "auto", "note", "built for CPUs only"),
        (["H100, 580.1"], "13.0", "cuda:0", "fail", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_no_gpu_that_torch_can_use(
    stub: StubHub,
    monkeypatch: pytest.MonkeyPatch,
    installed: list[str],
    build: str | None,
    device: str,
    status: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(doctor, "installed_gpus", lambda: installed)
    line = check(diagnose(DoctorOptions(models=("efficientnet-lite0",), device=device)), "GPU")
    assert line.status == status
    assert remedy in line.remedy


# --- the command ------------------------------------------------------------------------------------------------------


def ask(**options: object) -> None:
    defaults = {"model": None, "device": "auto", "data": None, "store": None, "runs": Path("runs"), "verify": False}
    cli.doctor(**(defaults | {"as_json": False} | options))  # type: ignore[arg-type]


def test_the_command_says_each_failure_with_its_remedy(stub: StubHub, capsys: pytest.CaptureFixture[str]) -> None:
    ask(model="kaiko-s16")
    assert "Everything that was asked for can work here." in capsys.readouterr().out
    with pytest.raises(UserError, match=r"(?s)1 of these cannot work.*- uni: MahmoodLab/UNI is gated") as caught:
        ask(model="uni,kaiko-s16")
    assert "Request access" in str(caught.value)
    assert "FAIL" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as exit:
        ask(model="uni", as_json=True)
    assert exit.value.exit_code == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["models"][0]["access"]) == (False, "not granted")


def test_a_token_is_never_shown(
    stub: StubHub, point: Point, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = ""
    for token in ("hf_member", "hf_stranger", "hf_revoked", "hf_member “quoted”"):
        monkeypatch.setenv("HF_TOKEN", token)
        for url in (stub.url, NOBODY.replace("//", "//user:hf_password@")):
            point(url)
            for as_json in (True, False):
                try:
                    ask(model="uni,kaiko-s16", as_json=as_json)
                except (UserError, typer.Exit) as error:
                    said += str(error)
    said += "".join(capfd.readouterr())
    assert "present" in said
    for secret in ("hf_member", "hf_stranger", "hf_revoked", "quoted", "hf_password"):
        assert secret not in said


# --- the self-check of a GPU ------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A GPU that is tested with one bad result; the devices that were tested."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70_000_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(doctor, "installed_gpus", lambda: ["H100, 580.1"])
    tested: list[torch.device] = []

    def self_check(device: torch.device) -> list[Check]:
        tested.append(device)
        return [
            Check("self-check", "speed", "ok", "700 TFLOP/s"),
            Check("self-check", "solver", "fail", "coefficients differ", "Use `device='cpu'`."),
        ]

    monkeypatch.setattr("finetune.self_check.self_check", self_check)
    return tested


def test_a_gpu_that_is_named_is_tested(gpu: list[torch.device], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="solver: Use --device cpu"):
        ask(model="efficientnet-lite0", device="cuda:0")
    assert gpu == [torch.device("cuda", 0)]
    assert "700 TFLOP/s" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        ask(model="efficientnet-lite0", device="cuda", as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert [line["status"] for line in said["checks"] if line["group"] == "self-check"] == ["ok", "fail"]
    assert said["ok"] is False


def test_a_gpu_that_is_not_named_or_not_there_is_not_tested(gpu: list[torch.device]) -> None:
    ask(model="efficientnet-lite0")
    with pytest.raises(UserError, match=r"(?s)1 of these cannot work.*torch sees 1 GPUs"):  # all lines come first
        ask(model="efficientnet-lite0", device="cuda:1")
    assert gpu == []
