"""How fast is extraction on this machine? Ratios measured in one run; `make bench` prints them.

Ways over the same patches, in turn, several times: the paper's (one image at a time, PIL, fp32, no overlap), the
network alone on ready batches, and `extract_dataset` from files to store, the last two computed by torch and, where it
is used, by OpenVINO. Random weights of the true shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from safetensors.torch import save_file

from extract.backbones import Backbone, build_model, fetch_weights, find_backbone
from extract.compute import (
    choose_precision,
    compiled,
    embed_batch,
    hold_weights,
    optimize_for_inference,
    side_by_side,
    takes_openvino,
)
from extract.datasets import PatchDataset, load_dataset
from extract.embed import extract_dataset
from extract.openvino import version
from extract.prepare import ExtractOptions
from extract.views import make_transform, parse_view
from features.console import show
from features.store import FeatureStore

CPU = torch.device("cpu")
BATCH = 8


def patch_files(n: int, folder: Path) -> Path:
    """A class folder of n PNG patches: real ones where there are any, else drawn ones."""
    data = Path(os.environ.get("MITOFM_DATA", Path(__file__).resolve().parents[2] / "shared" / "datasets"))
    dataset = load_dataset("atnorm-br", data=data) if (data / "AMi-Br").is_dir() else load_dataset("demo")
    for row in range(n):
        path = folder / ("Atypical" if row % 4 == 0 else "Normal") / f"{row:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.decode(row % len(dataset.samples))).save(path)
    return folder


def papers_way(model: torch.nn.Module, backbone: Backbone, files: list[Path]) -> float:
    """Images per second, one at a time: open, resize, normalise, forward."""
    mean = torch.tensor(backbone.mean).view(3, 1, 1)
    std = torch.tensor(backbone.std).view(3, 1, 1)
    started = time.perf_counter()
    with torch.inference_mode():
        for file in files:
            image = Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
            model(((pixels - mean) / std)[None]).numpy()
    return len(files) / (time.perf_counter() - started)


def forward_only(model: torch.nn.Module, backbone: Backbone, precision: str, n: int) -> float:
    """Images per second of the network on ready batches, which are computed side by side."""
    batch = torch.randn(BATCH, 3, backbone.input_size, backbone.input_size).to(memory_format=torch.channels_last)
    started = time.perf_counter()
    with side_by_side(CPU, torch.get_num_threads()) as map_batches:
        list(map_batches(lambda _: embed_batch(model, backbone, batch, precision=precision), range(n // BATCH)))
    return n // BATCH * BATCH / (time.perf_counter() - started)


def measure(name: str, title: str, dataset: PatchDataset, files: list[Path], repeats: int, table: Table) -> None:
    """One row per form of the network: medians over `repeats` interleaved rounds, and of each round's ratios."""
    backbone = dataclasses.replace(find_backbone(name), resize=224)
    n = len(dataset.samples)
    with tempfile.TemporaryDirectory() as folder:
        weights = None  # the embedded network has real ones
        if backbone.hub_id:
            weights = Path(folder) / "random.safetensors"
            save_file(build_model(backbone, None).state_dict(), weights)
        eager = build_model(backbone, fetch_weights(backbone, weights=weights))
        example = make_transform(backbone, parse_view("full"))([dataset.decode(row) for row in range(8)], CPU)
        settled = optimize_for_inference(eager, CPU, example=example)
        precision = choose_precision("auto", backbone, settled, example)
        forms = {"torch": hold_weights(settled, precision)}
        if version() and takes_openvino(settled, CPU, precision=precision):
            started = time.process_time()
            fast = compiled(settled, backbone, example, precision=precision)
            show(f"{title}: converted for OpenVINO in {time.process_time() - started:.1f} s of processor time")
            forms |= {"OpenVINO": fast} if fast else {}
        rounds: dict[str, list[tuple[float, float, float, float]]] = {form: [] for form in forms}
        embeddings = {}
        for repeat in range(repeats + 1):
            plain = papers_way(eager, backbone, files[: max(n // 8, 16)])
            for form, network in forms.items():
                alone = forward_only(network, backbone, precision, n)
                store = FeatureStore.open_or_create(Path(folder) / f"{form} {repeat}.zarr")
                options = ExtractOptions(device="cpu", precision=precision, batch_size=BATCH, fast=form == "OpenVINO")
                (summary,) = extract_dataset(dataset, [backbone], store=store, options=options, weights=weights)
                if repeat:  # the first round warms caches up
                    first = rounds["torch"][repeat - 1][2] if form != "torch" else summary.images_per_second
                    rounds[form].append((plain, alone, summary.images_per_second, first))
                (entry,) = store.entries()
                embeddings[form] = {
                    pooling: torch.from_numpy(store.read(dataset.name, model=name, view="full", pooling=pooling))
                    for pooling in entry.poolings
                }
    for form, found in rounds.items():
        plain, alone, whole, _ = (statistics.median(column) for column in zip(*found, strict=True))
        ratios = [(r[2] / r[1], r[2] / r[0], r[2] / r[3]) for r in found]
        to_alone, to_plain, to_torch = (statistics.median(column) for column in zip(*ratios, strict=True))
        cosine = min(
            float(torch.nn.functional.cosine_similarity(values.double(), embeddings["torch"][pooling].double()).min())
            for pooling, values in embeddings[form].items()
        )
        table.add_row(
            *(title, form, precision),
            *(f"{rate:.1f}" for rate in (plain, alone, whole)),
            *(f"{to_alone:.2f}", f"{to_plain:.1f}", f"{to_torch:.2f}", f"{cosine:.7f}"),
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="only this one")
    arguments = parser.parse_args()
    table = Table(title=f"Extraction on CPU, {torch.get_num_threads()} threads, {arguments.patches} patches")
    for column in ("Model", "By", "Precision", "Paper's way /s", "Forward only /s", "Files to store /s"):
        table.add_column(column, justify="right")
    table.add_column("of forward only\n(target 0.9)", justify="right")
    table.add_column("times paper's way\n(target 3)", justify="right")
    table.add_column("times torch\n(target 2)", justify="right")
    table.add_column("cosine to torch\n(target .99999)", justify="right")
    with tempfile.TemporaryDirectory() as folder:
        patches = patch_files(arguments.patches, Path(folder) / "patches")
        dataset, files = load_dataset(str(patches)), sorted(patches.glob("*/*.png"))
        titles = {"efficientnet-lite0": "EfficientNet-Lite0", "timm/vit_small_patch16_224": "ViT-S/16"}
        for model, title in titles.items():
            if arguments.model in (None, model):
                measure(model, title, dataset, files, arguments.repeats, table)
    show(table)


if __name__ == "__main__":
    main()
