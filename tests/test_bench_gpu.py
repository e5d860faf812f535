"""Does the bench for GPUs run every row, go on where it stopped, and go on after a row that fails?"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_gpu
import pytest
import torch
from bench_gpu import Bench, Row, make_bench, markdown, run_rows
from PIL import Image

CPU = torch.device("cpu")


@pytest.fixture
def bench() -> Bench:
    return make_bench(CPU, tiny=True)


def rows_of(monkeypatch: pytest.MonkeyPatch, *rows: Row) -> None:
    monkeypatch.setattr(bench_gpu, "list_rows", lambda bench: list(rows))


def held(out: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def test_every_row_runs_on_a_cpu_and_is_not_run_again(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, so that it cannot fail at its first run on a GPU."""
    bench_gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    found = held(tmp_path)
    assert found.keys() == {row.name for row in bench_gpu.list_rows(bench)}
    assert {name: figures["error"] for name, figures in found.items() if "error" in figures} == {}
    table = capsys.readouterr().out
    for way in bench_gpu.WAYS.values():
        assert table.count(f"| ViT-S/16 | {way} |") == 1
    assert "training went on with 3 folds at once" in table
    assert "| forward, blocks compiled | 2 |" in table

    def refuse(bench: Bench, row: Row) -> None:
        raise AssertionError(row)

    monkeypatch.setattr(bench_gpu, "_measured", refuse)
    bench_gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    assert held(tmp_path) == found
    assert capsys.readouterr().out == table


def test_a_row_that_raises_leaves_its_error_and_the_others_go_on(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = [True]

    def bad(bench: Bench) -> dict[str, Any]:
        if fails[0]:
            raise RuntimeError("no kernel image\nand much more")
        return {"images_per_second": 2.0}

    rows_of(monkeypatch, Row("bad", 1, bad), Row("good", 1, lambda bench: {"images_per_second": 1.0}))
    assert run_rows(bench, tmp_path, minutes=1) == ["bad", "good"]
    assert held(tmp_path)["bad"]["error"] == "RuntimeError: no kernel image"
    assert held(tmp_path)["good"]["images_per_second"] == 1.0
    assert "- bad: RuntimeError: no kernel image" in markdown(tmp_path)
    fails[0] = False
    assert run_rows(bench, tmp_path, minutes=1) == []
    assert run_rows(bench, tmp_path, minutes=1, retry=True) == ["bad"]
    assert "error" not in held(tmp_path)["bad"]


def test_a_row_that_ends_the_process_is_not_met_again(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(bench: Bench) -> dict[str, Any]:
        raise SystemExit(139)

    rows_of(monkeypatch, Row("killed", 1, killed), Row("next", 1, lambda bench: {"images_per_second": 1.0}))
    with pytest.raises(SystemExit):
        run_rows(bench, tmp_path, minutes=1)
    assert run_rows(bench, tmp_path, minutes=1) == ["next"]
    assert held(tmp_path)["killed"]["error"] == "it began and did not end"


def test_no_row_begins_that_would_take_longer_than_is_left(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row("long", 90, lambda bench: {"images_per_second": 1.0})]
    rows_of(monkeypatch, *rows, replace(rows[0], name="short", seconds=30))
    assert run_rows(replace(bench, tiny=False), tmp_path, minutes=1) == ["short"]


def test_a_row_that_hangs_is_stopped(tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "LEAST_LIMIT", 0.1)
    rows_of(monkeypatch, Row("hangs", 0, lambda bench: time.sleep(60) or {}))
    started = time.monotonic()
    run_rows(bench, tmp_path, minutes=1)
    assert held(tmp_path)["hangs"]["error"].startswith("TooLong")
    assert time.monotonic() - started < 30


def write(out: Path, **rows: Mapping[str, Any]) -> None:
    for name, figures in rows.items():
        (out / f"{name.replace('_', '-')}.json").write_text(json.dumps(figures))


def test_shares_and_ratios_of_the_table(tmp_path: Path) -> None:
    machine = {"device": "GPU", "torch": "2", "cuda": "13", "matmul_peak": 500e12, "bandwidth": 3e12}
    step = {"gflops": 1000.0, "peak_bytes": 2**31}
    write(
        tmp_path,
        machine=machine,
        forward_g={"images_per_second": {"64": 300.0, "1024": "CUDA out of memory"}, "gflops": 1000.0},
        extract_g={"end_to_end": 288.0, "forward": 300.0, "batch_size": 256, "gflops": 1000.0},
        lora_g_ours=step | {"images_per_second": 150.0, "kept_per_image": 40e6},
        lora_g_peft_bf16=step | {"images_per_second": 80.0, "kept_per_image": 100e6},
        lora_g_peft_bf16_compiled=step | {"images_per_second": 100.0, "kept_per_image": 90e6},
    )
    table = markdown(tmp_path)
    assert "| forward, eager | 64 | 300 | 60% |" in table
    assert "| forward, eager | 1024 | CUDA out of memory |  |" in table
    assert "| PNG files to store, 0.96 of its forward pass (target .95) | 256 | 288 | 58% |" in table
    # Forward, and the gradient of the input: twice the FLOPs of a forward pass.
    assert (
        "| ViT-g/14 | ours, all folds at once, Triton kernels | 150 | 1.50 (target 1.3) | 60% | 40 | 0.40 | 2.0 |"
        in table
    )
    assert "| ViT-g/14 | peft, bf16 | 80 |  | 32% | 100 |  | 2.0 |" in table


def test_drawn_patches_differ_and_are_as_large_as_real_ones(tmp_path: Path) -> None:
    files = sorted(bench_gpu.draw_patches(tmp_path / "patches", 8).glob("*/*.png"))
    assert len({file.read_bytes() for file in files}) == 8
    for file in files:
        with Image.open(file) as image:
            assert image.size == (128, 128)
    assert all(20_000 < file.stat().st_size < 50_000 for file in files)


def test_a_gpu_has_a_number() -> None:
    """Functions of torch that limit memory take no other."""
    assert make_bench(torch.device("cuda"), tiny=True).device.index == 0
    assert make_bench(torch.device("cuda:1"), tiny=True).device.index == 1


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_gpu.main(["--out", str(tmp_path / "out")])
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
