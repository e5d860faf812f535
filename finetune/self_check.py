"""Does this device compute what mitofm promises, and how fast? A minute of small checks, for `fm-doctor --device cuda`.

Each check is a function from a device to lines. One that fails, in whatever way, becomes a failed line, and the others
go on: what a user sends when something is wrong has to be whole. Networks have random weights; nothing is downloaded.
All of it runs on a CPU too, with tiny sizes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from extract.backbones import BACKBONES, Backbone, build_model, find_backbone
from extract.compute import embed_batch
from extract.doctor import Check, Status, installed_gpus
from extract.views import Transform, make_transform, parse_view
from features.console import progress
from features.device import compute_exactly
from features.folds import Folds, fold_models
from finetune import kernels
from finetune.compute import Compute
from finetune.dropout import drop_threshold
from finetune.fast import try_compiled_blocks, try_kernels
from finetune.lora import LoraOptions, adapters, add_adapters, select_folds
from finetune.measure import attention_kind, bandwidth, matmul_peak, profile, synchronisations, timed
from finetune.network import Network
from finetune.recipes import Recipe, recipe_for
from finetune.step import Step, TrainingSet
from finetune.train import draw_epoch, epoch_batches, new_state, train
from probe.logistic import fit_logistic

N_FOLDS = 5
EFFICIENCY = 0.6  # of the measured matmul peak, which a good forward pass reaches; an assumption
_WITHOUT = (
    "mitofm works without it, more slowly. A C compiler, and Triton of the version that this torch asks for, are what "
    "compiled code needs."
)
_REPORT = "This should not happen: please report it with all lines of `fm-doctor --json`."


def self_check(device: torch.device, *, tiny: bool = False) -> list[Check]:
    """Run every check on a device, showing progress.

    Args:
        device: a GPU, or "cpu".
        tiny: sizes of a test.
    """
    compute_exactly(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log
    lines: list[Check] = []
    with progress(f"checking {device}", len(CHECKS), unit="checks") as advance:
        for name, check in CHECKS.items():
            lines += guarded(name, check, device, tiny=tiny)
            advance(1)
    return lines


def guarded(
    name: str, check: Callable[..., Sequence[Check]], device: torch.device, *, tiny: bool = False
) -> list[Check]:
    """Run a check; whatever it raises becomes a failed line."""
    try:
        return list(check(device, tiny=tiny))
    except Exception as error:  # noqa: BLE001 - drivers and compilers raise what they like
        reason = (str(error).strip() or "no message").splitlines()[0]
        return [_line(name, "fail", f"could not be checked: {type(error).__name__}: {reason}", _REPORT)]


def _line(name: str, status: Status, found: str, remedy: str = "") -> Check:
    return Check("self-check", name, status, found, remedy if status != "ok" else "")


# ------------------------------------------------------------------------------------------ what there is, and how fast


def software(device: torch.device, *, tiny: bool) -> list[Check]:
    """Name versions, GPU and the switches that change float32 products."""
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    triton = "present" if find_spec("triton") else "absent"
    found = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}, Triton {triton}"
    if device.type == "cuda":
        name, _, driver = next(iter(installed_gpus()), "unknown").rpartition(", ")
        properties = torch.cuda.get_device_properties(device)
        found += f", driver {driver}, {properties.name or name}, {properties.total_memory / 1e9:.1f} GB"
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    in_tf32 = [
        *(["products"] if products != "highest" else []),
        *(["convolutions"] if convolutions and device.type == "cuda" else []),
    ]
    override = os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
    return [
        _line("versions", "ok", found),
        _line(
            "TF32",
            "note" if in_tf32 or override else "ok",
            f"{' and '.join(in_tf32) or 'nothing'} of fp32 in TF32"
            + (", overridden by the environment" * bool(override)),
            "TF32 rounds inputs to 11 bits. Unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE and NVIDIA_TF32_OVERRIDE where they "
            "are set; embeddings in fp32 differ from those of a CPU in the fourth digit otherwise.",
        ),
    ]


def speed(device: torch.device, *, tiny: bool) -> list[Check]:
    """Measure bf16 products and memory, and what extraction should reach from that."""
    peak, bytes_per_second = matmul_peak(device, tiny=tiny), bandwidth(device, tiny=tiny)
    rates = [
        f"{name} {EFFICIENCY * peak / (backbone.gflops * 1e9):,.0f}"
        for name, backbone in BACKBONES.items()
        if backbone.gflops and backbone.hub_id
    ]
    return [
        _line("speed", "ok", f"bf16 products {peak / 1e12:.3g} TFLOP/s, memory {bytes_per_second / 1e12:.3g} TB/s"),
        _line("extraction, an estimate", "ok", f"images/s at {EFFICIENCY:.0%} of these products: {', '.join(rates)}"),
    ]


# ----------------------------------------------------------------------------------------------------- the same numbers


def determinism(device: torch.device, *, tiny: bool) -> list[Check]:
    """Train the same few steps twice, dropout and augmentation included, and compare every bit.

    Training tries every fast way but compiled blocks, so that these are compared with plain PyTorch, and named, too.
    """
    backbone = small_vit(tiny=tiny)
    data = drawn_training_set(backbone, 4 * N_FOLDS, device)
    with _reproducibly():
        (first, compute), (second, _) = (_trained(backbone, data, device) for _ in range(2))
    n = int((first != second).sum())
    same = "three steps of each fold, trained twice: "
    remedy = "A training that is resumed will not equal one that was not interrupted."
    if compute.unrepeatable:
        remedy += f" These operations have no repeatable form here: {', '.join(sorted(compute.unrepeatable))}."
    lines = [
        _line("determinism", "fail", f"{same}{n:,} of {first.numel():,} values differ", remedy)
        if n
        else _line("determinism", "ok", f"{same}the same to the bit")
    ]
    if device.type != "cuda":
        return lines
    for name in ("kernels", "augmentation kernels", "CUDA graph"):
        used = name in compute.fast_paths
        said = "agree with plain PyTorch" if used else "not used: what was printed above says why"
        lines.append(_line(f"training, {name}", "ok" if used else "note", said, _WITHOUT))
    return lines


def _trained(backbone: Backbone, data: TrainingSet, device: torch.device) -> tuple[Tensor, Compute]:
    network = lora_network(backbone, device)
    start, on_gpu = network.values.clone(), device.type == "cuda"
    precision = "bf16" if on_gpu else "fp32"
    network.compute_in(precision)
    recipe = replace(recipe_for("default", method="lora", convolutional=False), epochs=1, batch_size=6)
    compute = Compute(device, precision, N_FOLDS, same_shapes=on_gpu, fast=on_gpu)
    if on_gpu:
        try_kernels(network, compute)
    run_training(network, data, recipe, compute)
    if torch.equal(start, network.values):
        raise RuntimeError("training changed nothing")
    return network.values.clone(), compute


def run_training(
    network: Network,
    data: TrainingSet,
    recipe: Recipe,
    compute: Compute,
    *,
    after_epoch: Callable[[Any], None] = lambda state: None,
) -> None:
    """Train a network by `finetune.train`, without checkpoints."""
    train(
        network,
        data,
        recipe,
        state=new_state(network),
        compute=compute,
        save=after_epoch,
        advance=lambda n, note=None: None,
    )


@contextmanager
def _reproducibly() -> Iterator[None]:
    """Compute as a training does: sums in the same order wherever there is a way."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def gradients(device: torch.device, *, tiny: bool) -> list[Check]:
    """Compare the gradients of all folds' adapters with a CPU's in float64, without dropout."""
    # Unit roundoff is 6e-8 in float32, 5e-4 in TF32 and 4e-3 in bf16; errors of a few layers add up to some times that.
    tolerances = {"fp32": 1e-4, "bf16": 1e-1}
    expected = _gradients(torch.device("cpu"), "fp32", torch.float64, tiny=tiny)
    lines = []
    for precision, tolerance in tolerances.items():
        found = _gradients(device, precision, torch.float32, tiny=tiny)
        difference = float((found - expected).norm() / expected.norm())
        remedy = f"Expected at most {tolerance:g}. Figures trained here cannot be trusted: {_REPORT}"
        status: Status = "ok" if difference <= tolerance else "fail"  # NaN fails
        lines.append(
            _line(f"gradients, {precision}", status, f"{difference:.1e} from those of a CPU in float64", remedy)
        )
    return lines


def _gradients(device: torch.device, precision: str, dtype: torch.dtype, *, tiny: bool) -> Tensor:
    backbone = small_vit(tiny=tiny)
    network = lora_network(backbone, device, dtype=dtype, dropout=0)
    generator = torch.Generator().manual_seed(1)
    # Adapters begin at zero, where A has no gradient. Drawn in float32: initial values in float64 are others.
    network.values.copy_(0.05 * torch.randn(network.values.shape, generator=generator))
    size = backbone.input_size
    images = torch.randn(2 * N_FOLDS, 3, size, size, generator=generator).to(device, dtype)
    network.compute_in(precision)
    if device.type == "cuda":
        try_kernels(network, Compute(device, precision, N_FOLDS))
    network.clear_gradients()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = network(images, range(N_FOLDS), step=0)
    logits.square().mean().backward()
    network.gather_gradients()
    return network.gradients.double().cpu()


def dropout(device: torch.device, *, tiny: bool) -> list[Check]:
    """See a layer's dropout mask through the layer: its rate, and that it comes again, in the backward pass too."""
    width, tokens = (16, 64) if tiny else (32, 8192)
    options = LoraOptions(rank=width, alpha=width, targets="0")
    model = nn.Sequential(nn.Linear(width, width, bias=False)).to(device)
    add_adapters(model, options, fold_models=fold_models([0], N_FOLDS))
    ((_, module),) = adapters(model)
    module.triton = device.type == "cuda" and kernels.verify(device, torch.float32)
    with torch.no_grad():  # the frozen product is zero and both factors are the identity: the output is the mask
        module.base.weight.zero_()  # type: ignore[operator]
        module.A.copy_(torch.eye(width, device=device).expand_as(module.A))
        module.B.copy_(torch.eye(width, device=device).expand_as(module.B))

    def masks(step: int) -> tuple[Tensor, Tensor]:
        select_folds(model, range(N_FOLDS), step=step)
        x = torch.ones(N_FOLDS, tokens, width, device=device, requires_grad=True)
        y = model(x)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return y.detach() != 0, gradient != 0

    forward, backward = masks(0)
    again, other = masks(0)[0], masks(1)[0]
    keep = 1 - drop_threshold(options.dropout) / 256
    rate, spread = float(forward.double().mean()), (keep * (1 - keep) / forward.numel()) ** 0.5
    problems = {
        f"kept {rate:.4f}, not {keep:.4f}": abs(rate - keep) > 6 * spread,
        "the backward pass draws another mask": not torch.equal(forward, backward),
        "the same step draws another mask": not torch.equal(forward, again),
        "every step draws the same mask": torch.equal(forward, other),
        "folds have the same mask": torch.equal(forward[0], forward[1]),
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        return [_line("dropout", "fail", "; ".join(found), f"Training here is wrong: {_REPORT}")]
    return [_line("dropout", "ok", f"keeps {rate:.4f} of inputs (expected {keep:.4f}), drawn again the same")]


def resize(device: torch.device, *, tiny: bool) -> list[Check]:
    """Compare resized patches with PIL's, with which the models were trained."""
    n, size, target = (2, 32, 56) if tiny else (32, 128, 224)
    patches = list(np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8))
    lines = []
    for interpolation in ("bicubic", "bilinear"):
        transform = Transform(None, target, target, interpolation, (0.5,) * 3, (0.5,) * 3)
        found = transform.resized(patches, device).cpu().float().permute(0, 2, 3, 1).numpy()
        kind = Image.Resampling[interpolation.upper()]
        expected = np.stack([np.asarray(Image.fromarray(patch).resize((target, target), kind)) for patch in patches])
        difference = np.abs(found - expected)
        share, largest = float((difference > 0).mean()), int(difference.max())
        status: Status = "ok" if largest == 0 else "note" if largest <= 3 else "fail"
        remedy = (
            f"Embeddings differ a little from those of patches that PIL resized. {_REPORT if status == 'fail' else ''}"
        )
        said = f"{share:.1%} of pixels differ from PIL's, by {largest} at most (noise, {size} to {target} pixels)"
        lines.append(_line(f"resize, {interpolation}", status, said, remedy.strip()))
    return lines


def solver(device: torch.device, *, tiny: bool) -> list[Check]:
    """Fit probes with TF32 forced on beforehand, and off: the answer has to be the same."""
    n, d = (120, 8) if tiny else (2000, 256)
    generator = np.random.default_rng(0)
    X = generator.standard_normal((n, d)).astype(np.float32)
    y = (X[:, 0] + generator.standard_normal(n) > 0).astype(np.int64)
    masks = np.arange(n) % N_FOLDS != np.arange(N_FOLDS)[:, None]
    before = torch.get_float32_matmul_precision()
    fits = {}
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            fits[setting] = fit_logistic(X, y, masks=masks, strengths=(0.01, 1.0), device=str(device))
    finally:
        torch.set_float32_matmul_precision(before)
    off, on = fits["highest"], fits["high"]
    difference = float(np.abs(on.coef - off.coef).max() / np.abs(off.coef).max())
    lost = int((~off.converged).sum() + (~on.converged).sum())
    # Both stop at a gradient of 1e-6; the penalty of the weakest strength, 1 / (C n), bounds how far apart that leaves.
    status: Status = "ok" if difference <= 1e-2 and not lost else "fail"
    found = f"coefficients differ by {difference:.1e} with TF32 on, {lost} of {2 * off.converged.size} fits unfinished"
    return [_line("solver", status, found, f"Probes fitted here cannot be trusted: use `device='cpu'`. {_REPORT}")]


# ------------------------------------------------------------------------------------------------- attention, fast ways


def attention(device: torch.device, *, tiny: bool) -> list[Check]:
    """Say which attention runs at the lengths of ViT/16 and of ViT/14 with registers, and look for NaN."""
    lines = []
    for patch_size, n_registers in ((16, 0), (14, 4)):
        backbone = small_vit(patch_size=patch_size, n_registers=n_registers, tiny=tiny)
        model = build_model(backbone, None).to(device)
        length = (backbone.input_size // patch_size) ** 2 + 1 + n_registers
        images = torch.randn(2 if tiny else 16, 3, backbone.input_size, backbone.input_size, device=device)
        for precision in ("bf16", "fp32"):
            outputs: list[dict[str, Tensor]] = []

            def work(
                model: nn.Module = model,
                backbone: Backbone = backbone,
                images: Tensor = images,
                precision: str = precision,
                outputs: list[dict[str, Tensor]] = outputs,
            ) -> None:
                outputs.append(embed_batch(model, backbone, images, precision=precision))

            names = [name for name, _ in profile(work, device).kernels]
            finite = all(bool(values.isfinite().all()) for output in outputs for values in output.values())
            kind = attention_kind(names)
            status: Status = "fail" if not finite else "note" if kind == "cuDNN" else "ok"
            remedy = (
                "cuDNN's attention has given NaN at lengths that are no multiple of 128 (pytorch issue 166211): "
                "update torch and cuDNN (9.15.1 or later), or set TORCH_CUDNN_SDPA_ENABLED=0."
            )
            said = f"{kind}{'' if finite else ', NaN or infinite'}"
            lines.append(_line(f"attention, length {length}, {precision}", status, said, remedy))
    return lines


def compiled_blocks(device: torch.device, *, tiny: bool) -> list[Check]:
    """Compile the blocks of a small network, and compare a training step and an evaluation with plain PyTorch."""
    if device.type != "cuda":
        return [_line("compiled blocks", "ok", "used on GPUs alone")]
    backbone = small_vit(tiny=tiny)
    network = lora_network(backbone, device)
    network.compute_in("bf16")
    compute = Compute(device, "bf16", N_FOLDS, same_shapes=True, fast=True, evaluation_batch=4)
    try_kernels(network, compute)
    started = time.perf_counter()
    try_compiled_blocks(network, compute, batch_size=4, image_size=backbone.input_size)
    seconds = time.perf_counter() - started
    if "compiled blocks" in compute.fast_paths:
        return [_line("compiled blocks", "ok", f"agree with plain PyTorch, compiled in {seconds:.0f} s")]
    return [_line("compiled blocks", "note", "not used: what was printed above says why", _WITHOUT)]


# ------------------------------------------------------------------------------------------------------ where time goes


def profiled_step(device: torch.device, *, tiny: bool) -> list[Check]:
    """Profile one LoRA step of ViT-S/16, five folds of eight images: kernels, busy share, the host's time."""
    backbone, step = _training_step(device, tiny=tiny)
    n_layers = 4 * 2 if tiny else 4 * 12
    for _ in range(3):
        step()
    kernels = profile(step, device).kernels
    plain = [timed(step, device) for _ in range(5)]  # a profiler takes time of its own
    host, whole = statistics.median(one.host for one in plain), statistics.median(one.whole for one in plain)
    busy = sum(seconds for _, seconds in kernels) / whole
    rate = N_FOLDS * 8 / whole
    status: Status = "note" if device.type == "cuda" and busy < 0.5 else "ok"
    found = (
        f"{rate:,.0f} images/s; {len(kernels):,} kernels, GPU busy {min(busy, 1):.0%} of {whole * 1e3:.1f} ms; to "
        f"start them the host needs {host * 1e6 / n_layers:,.0f} us per adapted layer"
    )
    remedy = (
        "The host starts kernels more slowly than the GPU runs them: larger batches, or a faster or idle CPU, help."
    )
    return [_line(f"a training step of {backbone.title}", status, found, remedy)]


def synchronised(device: torch.device, *, tiny: bool) -> list[Check]:
    """Count how often a training step and a batch of extraction make the host wait for the GPU."""
    if device.type != "cuda":
        return [_line("synchronisations", "ok", "only a GPU is waited for")]
    backbone, step = _training_step(device, tiny=tiny)
    model = build_model(backbone, None).to(device)
    transform = make_transform(backbone, parse_view("full"))
    patches = list(np.zeros((8, 128, 128, 3), np.uint8))
    counts = {
        "training step": synchronisations(step),
        "batch": synchronisations(lambda: embed_batch(model, backbone, transform(patches, device), precision="bf16")),
    }
    found = ", ".join(f"{n} in a {what}" for what, n in counts.items())
    remedy = "Each wait leaves the GPU idle for a moment. Results are right; more than these is worth a report."
    return [_line("synchronisations", "note" if any(counts.values()) else "ok", found, remedy)]


def _training_step(device: torch.device, *, tiny: bool) -> tuple[Backbone, Callable[[], None]]:
    """Make a training step of five folds of eight patches, as `finetune.train` takes it."""
    backbone = small_vit(tiny=True) if tiny else find_backbone("kaiko-s16")
    on_gpu = device.type == "cuda"
    precision = "bf16" if on_gpu else "fp32"
    network = lora_network(backbone, device)
    network.compute_in(precision)
    compute = Compute(device, precision, N_FOLDS, same_shapes=on_gpu, fast=on_gpu)
    if on_gpu:
        try_kernels(network, compute)
    data = drawn_training_set(backbone, 16 * N_FOLDS, device)
    recipe = replace(recipe_for("default", method="lora", convolutional=False), batch_size=8)
    network.shard_batches(compute.process_group, recipe.batch_size)
    state = new_state(network)
    drawn = {member: draw_epoch(data, network.fold_models[member], recipe, epoch=0) for member in network.members}
    step = Step(network, data, recipe, moments=state.moments, compute=compute)
    step.begin(epoch_batches(network, data, recipe, drawn, state=state, epoch=0))
    return backbone, lambda: step(0, network.members)


# ---------------------------------------------------------------------------------------------- small things to look at


def small_vit(*, patch_size: int = 16, n_registers: int = 0, tiny: bool = False) -> Backbone:
    """Describe a ViT of two blocks with random weights, at 224 pixels (32 or 28 if tiny)."""
    size = 224 if not tiny else 2 * patch_size
    width, heads = (16, 2) if tiny else (192, 3)
    registers: dict[str, Any] = {"reg_tokens": n_registers, "no_embed_class": True} if n_registers else {}
    return Backbone(
        name="small-vit",
        title="a small ViT",
        hub_id="",
        arch="vit_tiny_patch16_224",
        kwargs={
            "img_size": size,
            "patch_size": patch_size,
            "depth": 2,
            "embed_dim": width,
            "num_heads": heads,
            **registers,
        },
        input_size=size,
        resize=size,
        n_parameters=0,
        embedding_dim=width,
        gflops=None,
        licence="none",
    )


def lora_network(
    backbone: Backbone, device: torch.device, *, dtype: torch.dtype = torch.float32, dropout: float = 0.3
) -> Network:
    """Build a network of random weights, the same on every device, with adapters of five folds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(backbone, None)
    lora = LoraOptions(dropout=dropout)
    return Network(model.to(device, dtype), backbone, method="lora", lora=lora, fold_models=fold_models([0], N_FOLDS))


def drawn_training_set(backbone: Backbone, n: int, device: torch.device) -> TrainingSet:
    """Draw n patches of noise in five folds, both classes in each."""
    rows = np.arange(n)
    generator = torch.Generator().manual_seed(0)
    size = backbone.input_size
    return TrainingSet(
        pixels=torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator).to(device),
        label=torch.from_numpy(rows // N_FOLDS % 2).to(device),
        folds=Folds(fold=rows % N_FOLDS, n_folds=N_FOLDS, source="drawn", digest=""),
        transform=make_transform(backbone, parse_view("full")),
    )


CHECKS: dict[str, Callable[..., list[Check]]] = {
    "versions": software,
    "speed": speed,
    "attention": attention,
    "determinism": determinism,
    "gradients": gradients,
    "dropout": dropout,
    "resize": resize,
    "solver": solver,
    "compiled blocks": compiled_blocks,
    "a training step": profiled_step,
    "synchronisations": synchronised,
}
