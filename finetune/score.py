"""How are patches scored by the saved fold models?

Scoring starts from the weights on disk, not from those in memory: so a run's predictions are those of the weights that
it keeps, even if the process was stopped between saving and scoring.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.datasets import Decode
from extract.embed import decoded
from extract.views import Transform
from features.console import ProgressCallback, progress
from finetune.compute import EVALUATION_BATCH, Compute, network_logits
from finetune.network import Network
from finetune.setup import Setup, new_network
from finetune.step import TrainingSet
from finetune.train import validation_logits
from probe.experiment import FoldLogits


def score(setup: Setup, run: Path, data: TrainingSet) -> FoldLogits:
    """Score held-out rows under the models of their own fold, and every test set under all models."""
    experiment, compute, transform = setup.experiment, setup.compute, setup.scoring_transform
    data = replace(data, transform=transform)
    seeds, fold_models = setup.options.training_seeds, setup.fold_models
    n_logits = setup.n_classes - 1
    validation = np.empty((len(experiment.rows), len(seeds), n_logits), dtype=np.float32)
    tests = {
        name: np.empty((len(rows), len(fold_models), n_logits), dtype=np.float32)
        for name, rows in experiment.tests.items()
    }
    with progress("score", len(fold_models) * sum(map(len, tests.values()))) as advance:
        for members in setup.network_members:
            network = new_network(setup, members, run=run)
            for member, logit in validation_logits(network, data, members, compute=compute).items():
                seed, fold = fold_models[member]
                validation[data.held_out(fold), seeds.index(seed)] = logit
            for name, rows in experiment.tests.items():
                decode = setup.datasets[name].decode
                tests[name][:, list(members)] = patch_logits(
                    network, decode, rows, transform, compute=compute, advance=advance
                )
    return FoldLogits(validation, tests, seeds)


def patch_logits(
    network: Network,
    decode: Decode,
    rows: NDArray[np.intp],
    transform: Transform,
    *,
    compute: Compute,
    advance: ProgressCallback,
) -> NDArray[np.float32]:
    """Compute the logits (len(rows), n_members, c-1) of patches, under the weights of all of the network's members."""
    size, process_group = EVALUATION_BATCH[compute.device.type], compute.process_group
    shard = rows[process_group.shard_rows(len(rows))]
    batches = [shard[start : start + size].tolist() for start in range(0, len(shard), size)]
    logits = [np.empty((0, len(network.members), network.n_classes - 1), dtype=np.float32)]
    with closing(decoded(decode, batches, device=compute.device)) as ready:
        for batch, images in ready:
            pixels = transform.resized(images, compute.device)

            def logits_of(network: Network, group: list[int], pixels: Tensor = pixels) -> Tensor:
                repeated = pixels.expand(len(group), -1, -1, -1, -1)
                return network_logits(network, transform, repeated, group, compute=compute)

            parts = compute.map_passes(network, network.members, logits_of)
            logits.append(torch.cat(parts).transpose(0, 1).cpu().numpy())  # (b, f, c-1)
            advance(len(batch) * len(network.members) * process_group.world_size)
    return process_group.all_gather(np.concatenate(logits), len(rows), compute.device)
