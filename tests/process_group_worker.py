"""What does one of several processes do in test_process_group.py? Started by torchrun.

`train FOLDER` trains the cases below and the first process writes what became of each. `finetune RANK STEP ...` is
fm-finetune whose process RANK kills itself in its STEP-th step, unless torchrun has started it again; the first is 1.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from test_network import CNN, VIT, tiny_network
from test_train import CPU, DROPPING, N_FOLDS, PLATEAU, RECIPE, nothing, patches
from torch import Tensor

from extract.backbones import Backbone
from finetune import optimizer
from finetune.checkpoint import State
from finetune.compute import Compute, checkpoint_gradients
from finetune.network import Method
from finetune.process_group import SINGLE_PROCESS, ProcessGroup, join_process_group
from finetune.recipes import Recipe
from finetune.step import Step
from finetune.train import new_state, train

TWO_EPOCHS = replace(RECIPE, epochs=2)


@dataclass(frozen=True)
class Case:
    """One small training, with dropout (of adapters) and augmentation."""

    method: Method
    backbone: Backbone = VIT
    dtype: torch.dtype = torch.float64
    recipe: Recipe = TWO_EPOCHS
    folds_at_once: int = N_FOLDS
    checkpoint_gradients: bool = False
    linear: bool = False  # steps in proportion to gradients: Adam makes the last digit of one near zero a whole step


CASES = {
    "lora": Case("lora"),
    "lora, plateau, fold by fold": Case("lora", recipe=replace(PLATEAU, epochs=3, patience=2), folds_at_once=1),
    "lora in float32": Case("lora", dtype=torch.float32, linear=True),
    "lora of convolutions": Case("lora", CNN),
    "head": Case("head"),
    "full": Case("full"),
    "full with batch norms": Case("full", CNN),
    "full with batch norms, twice": Case("full", CNN, checkpoint_gradients=True),
    "full with batch norms in float32": Case("full", CNN, dtype=torch.float32, linear=True),
    "full with batch norms in float64": Case("full", CNN, linear=True),
}


def outcome(case: Case, process_group: ProcessGroup = SINGLE_PROCESS) -> State:
    """The state after a case's last epoch. Linear steps have a denominator sqrt(v) + eps that is eps."""
    eps = optimizer.EPS
    optimizer.EPS = 1.0 if case.linear else eps
    try:
        return _outcome(case, process_group)
    finally:
        optimizer.EPS = eps


def _outcome(case: Case, process_group: ProcessGroup) -> State:
    network = tiny_network(case.method, case.backbone, lora=DROPPING, dtype=case.dtype)
    if case.checkpoint_gradients:
        assert checkpoint_gradients(network)
    state = new_state(network)
    train(
        network,
        patches(torch.uint8 if case.dtype == torch.float32 else case.dtype),
        case.recipe,
        state=state,
        compute=Compute(CPU, "fp32", case.folds_at_once, process_group),
        save=nothing,
        advance=nothing,
    )
    return state


def exact_embed(model: Any, backbone: object, images: Tensor) -> dict[str, Tensor]:
    """Features in float64, which extraction rounds to float32: then only the order of sums is left to differ."""
    features = model.forward_features(images)
    return {"cls": features[:, 0]} if features.ndim == 3 else {"pooled": model.forward_head(features, True)}


def _train(folder: Path) -> None:
    from finetune import network

    network.forward_poolings = exact_embed  # type: ignore[assignment]
    with join_process_group() as process_group:
        device = torch.device("cpu")
        process_group.connect(device)
        for name, case in CASES.items():
            state = outcome(case, process_group)
            tensors = {kind: getattr(state, kind).contiguous() for kind in ("values", "best", "moments")}
            same = tensors["values"].clone()
            process_group.broadcast_(same)
            assert torch.equal(same, tensors["values"]), f"process {process_group.rank} has other values: {name}"
            if process_group.is_first:
                history = {fold: [asdict(epoch) for epoch in epochs] for fold, epochs in state.history.items()}
                described = {"history": history, "n_steps": state.n_steps, "n_images": state.n_images}
                save_file(tensors, folder / f"{name}.safetensors", {"state": json.dumps(described)})


def _finetune(rank: int, step: int, arguments: list[str]) -> None:
    backward, left = Step._backward, step

    def killed(*given: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(*given, **named)

    if int(os.environ["RANK"]) == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Step._backward = killed  # type: ignore[method-assign]
    from finetune import cli

    sys.argv = ["fm-finetune", *arguments]
    cli.main()


if __name__ == "__main__":
    if sys.argv[1] == "train":
        _train(Path(sys.argv[2]))
    else:
        _finetune(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
