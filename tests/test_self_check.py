"""Does the self-check pass where all is well, find what is wrong, and go on when a check itself fails?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from extract.doctor import Check
from extract.views import Transform
from finetune import measure, self_check
from finetune.measure import Profile, attention_kind, profile, synchronisations, timed
from finetune.network import Network

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def traced_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def status_of(lines: Sequence[Check]) -> dict[str, str]:
    return {line.name: line.status for line in lines}


def test_every_check_runs_and_nothing_fails_on_a_cpu() -> None:
    torch.set_float32_matmul_precision("highest")
    lines = self_check.self_check(CPU, tiny=True)
    assert [line for line in lines if line.status == "fail"] == []
    assert {line.group for line in lines} == {"self-check"}
    assert len(status_of(lines)) == len(lines) >= len(self_check.CHECKS)
    assert not torch.are_deterministic_algorithms_enabled()  # as before
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_check_that_raises_is_a_failed_line_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device, *, tiny: bool) -> list[Check]:
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")

    checks = {"broken": broken, "TF32": self_check.software}
    monkeypatch.setattr(self_check, "CHECKS", checks)
    first, *others = self_check.self_check(CPU, tiny=True)
    assert (first.name, first.status) == ("broken", "fail")
    assert first.found.endswith("RuntimeError: CUDA error: device-side assert triggered")
    assert "report" in first.remedy
    assert status_of(others) == {"versions": "ok", "TF32": "ok"}


@pytest.mark.parametrize(("name", "chosen"), [("cuda", []), ("cuda:1", [1])])
def test_a_gpu_with_a_number_becomes_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str, chosen: list[int]
) -> None:
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append(device.index))
    monkeypatch.setattr(self_check, "CHECKS", {})
    assert self_check.self_check(torch.device(name)) == []
    assert devices == chosen


# ---------------------------------------------------------------------------------------------- what each of them finds


def test_a_training_that_does_not_repeat_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    run, bits = self_check.run_training, iter([0.0, 1e-7])

    def unsteady(network: Network, data: Any, recipe: Any, compute: Any) -> None:
        run(network, data, recipe, compute)
        network.values[2, 5] += next(bits)
        compute.unrepeatable.add("flash_backward")

    monkeypatch.setattr(self_check, "run_training", unsteady)
    (line,) = self_check.determinism(CPU, tiny=True)
    assert (line.status, line.found.split()[-5]) == ("fail", "1")
    assert "These operations have no repeatable form here: flash_backward." in line.remedy


def test_gradients_that_are_a_thousandth_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = Network.gather_gradients

    def inexact(network: Network) -> None:
        gather(network)
        if network.values.dtype == torch.float32:
            network.gradients *= 1.001

    monkeypatch.setattr(Network, "gather_gradients", inexact)
    lines = status_of(self_check.gradients(CPU, tiny=True))
    assert lines == {"gradients, fp32": "fail", "gradients, bf16": "ok"}  # which rounds by more
    monkeypatch.setattr(Network, "gather_gradients", lambda network: network.gradients.fill_(torch.nan))
    assert set(status_of(self_check.gradients(CPU, tiny=True)).values()) == {"fail"}


def test_dropout_of_another_rate_and_masks_that_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status_of(self_check.dropout(CPU, tiny=True)) == {"dropout": "ok"}
    with monkeypatch.context() as patched:
        patched.setattr(self_check, "drop_threshold", lambda rate: 100)
        (line,) = self_check.dropout(CPU, tiny=True)
    assert line.status == "fail"
    assert "not 0.6094" in line.found
    select = self_check.select_folds
    monkeypatch.setattr(self_check, "select_folds", lambda model, folds, step: select(model, folds, step=0))
    (line,) = self_check.dropout(CPU, tiny=True)
    assert (line.status, line.found) == ("fail", "every step draws the same mask")


@pytest.mark.parametrize(("off_by", "status"), [(0, "ok"), (1, "note"), (10, "fail")])
def test_a_resize_beside_pil(monkeypatch: pytest.MonkeyPatch, off_by: int, status: str) -> None:
    def by_pil(transform: Transform, patches: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
        size, kind = (transform.resize, transform.resize), Image.Resampling[transform.interpolation.upper()]
        pixels = np.stack([np.asarray(Image.fromarray(patch).resize(size, kind)) for patch in patches]).astype(float)
        pixels[0, 3, 4, 1] += off_by
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    monkeypatch.setattr(Transform, "resized", by_pil)
    lines = self_check.resize(CPU, tiny=True)
    assert status_of(lines) == {"resize, bicubic": status, "resize, bilinear": status}
    assert f"by {off_by} at most" in lines[0].found


def test_a_solver_that_tf32_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = self_check.fit_logistic

    def rounded(*arguments: Any, **options: Any) -> Any:
        fits = fit(*arguments, **options)
        return replace(fits, coef=fits.coef * 1.05) if torch.get_float32_matmul_precision() == "high" else fits

    monkeypatch.setattr(self_check, "fit_logistic", rounded)
    (line,) = self_check.solver(CPU, tiny=True)
    assert (line.status, "5.0e-02" in line.found) == ("fail", True)
    assert torch.get_float32_matmul_precision() == "highest"


def test_attention_with_nan_and_attention_by_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    embed = self_check.embed_batch
    with monkeypatch.context() as patched:
        patched.setattr(self_check, "embed_batch", lambda *a, **k: {"cls": torch.tensor([[1.0, torch.nan]])})
        lines = self_check.attention(CPU, tiny=True)
    assert {line.status for line in lines} == {"fail"}
    assert self_check.embed_batch is embed
    kernels = (("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 1e-5),)

    def as_cudnn(work: Callable[[], object], device: torch.device) -> Profile:
        work()
        return Profile(kernels, 0, 0)

    monkeypatch.setattr(self_check, "profile", as_cudnn)
    lines = self_check.attention(CPU, tiny=True)
    assert {(line.status, line.found) for line in lines} == {("note", "cuDNN")}
    assert "TORCH_CUDNN_SDPA_ENABLED=0" in lines[0].remedy


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128>>", "flash"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "memory-efficient"),
        ("cudnn_generated_fort_native_sdpa_sm90_knob_7_64x128x128_4x1x1_kernel0_0", "cuDNN"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float>", "plain products"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8", "unknown"),
    ],
)
def test_attention_is_told_by_its_kernels(kernel: str, kind: str) -> None:
    assert attention_kind(["void layer_norm_kernel", kernel]) == kind


def test_products_in_tf32_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status_of(self_check.software(CPU, tiny=True))["TF32"] == "ok"
    torch.set_float32_matmul_precision("high")
    try:
        line = self_check.software(CPU, tiny=True)[1]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (line.status, line.found) == ("note", "products of fp32 in TF32")
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    assert "overridden by the environment" in self_check.software(CPU, tiny=True)[1].found


# ------------------------------------------------------------------------------ what only a GPU can be asked, pretended


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(self_check, "installed_gpus", lambda: ["NVIDIA H100, 580.1"])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    versions, tf32 = self_check.software(GPU, tiny=True)
    assert versions.found.endswith("driver 580.1, NVIDIA H100, 85.0 GB")
    assert (tf32.status, tf32.found) == ("note", "convolutions of fp32 in TF32")


def test_a_gpu_that_waits_for_its_host_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    step = (self_check.small_vit(tiny=True), lambda: None)
    monkeypatch.setattr(self_check, "_training_step", lambda device, tiny: step)
    monkeypatch.setattr(self_check, "timed", lambda work, device: Profile((), 8e-3, 10e-3))
    for milliseconds, status in ((2, "note"), (7, "ok")):
        kernels = (("gemm", milliseconds * 1e-3 / 2),) * 2
        monkeypatch.setattr(self_check, "profile", lambda work, device, kernels=kernels: Profile(kernels, 0, 0))
        (line,) = self_check.profiled_step(GPU, tiny=True)
        assert line.status == status
        assert f"4,000 images/s; 2 kernels, GPU busy {milliseconds * 10}% of 10.0 ms" in line.found
        assert "1,000 us per adapted layer" in line.found


def test_waits_in_a_step_and_a_batch_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    step = (self_check.small_vit(tiny=True), lambda: None)
    monkeypatch.setattr(self_check, "_training_step", lambda device, tiny: step)
    monkeypatch.setattr(self_check, "build_model", lambda *a: nn.ParameterList())
    monkeypatch.setattr(nn.ParameterList, "to", lambda model, device: model)
    for counts, status in (([11, 2], "note"), ([0, 0], "ok")):
        left = iter(counts)
        monkeypatch.setattr(self_check, "synchronisations", lambda work, left=left: next(left))
        (line,) = self_check.synchronised(GPU, tiny=True)
        assert (line.status, line.found) == (status, f"{counts[0]} in a training step, {counts[1]} in a batch")


def test_waits_are_counted_by_torchs_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work() -> None:
        for _ in range(3 if modes else 5):  # the first call is not counted
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert synchronisations(work) == 3
    assert modes == ["warn", 0]


def test_a_profile_lists_operations_with_their_times() -> None:
    a = torch.ones(64, 64)
    found = profile(lambda: a @ a, CPU)
    assert "aten::mm" in [name for name, _ in found.kernels]
    assert all(seconds >= 0 for _, seconds in found.kernels)
    assert 0 < found.host <= found.whole
    assert timed(lambda: None, CPU).kernels == ()


def test_the_peak_is_the_best_of_the_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 12.0] + [20.0, 29.0] * 8)  # the second of ten is the fastest: 2 s
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure.matmul_peak(CPU, tiny=True) == 2 * 64**3 / 2.0
