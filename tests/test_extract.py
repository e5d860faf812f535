"""Does extraction write the right embeddings, once, whatever interrupts it?"""

import dataclasses
import hashlib
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from patch_folders import MODEL, content, write_patches, write_weights
from PIL import Image
from processes import start
from safetensors.torch import save_file

from extract import compute, embed, prepare
from extract.backbones import Backbone, Weights, build_model, find_backbone
from extract.compute import choose_precision, embed_batch, largest_batch, optimize_for_inference
from extract.datasets import PatchDataset, load_dataset
from extract.embed import extract_dataset
from extract.openvino import version
from extract.prepare import ExtractOptions, fingerprint_parts
from extract.views import make_transform, parse_view
from features.console import UserError
from features.entry import Entry
from features.fingerprint import differences, fingerprint
from features.samples import make_samples
from features.store import FeatureStore

CPU = torch.device("cpu")
N = 150  # patches: three blocks, the last one short


@pytest.fixture(scope="module")
def patches(tmp_path_factory) -> Path:
    return write_patches(tmp_path_factory.mktemp("patches"), N, size=32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def run(patches: Path, weights: Path, path: Path, **options) -> FeatureStore:
    store = FeatureStore.open_or_create(path)
    dataset = load_dataset(str(patches))
    options = ExtractOptions(**({"views": ("full", "center16"), "precision": "fp32"} | options))
    extract_dataset(dataset, [find_backbone(MODEL)], store=store, options=options, weights=weights)
    return store


def test_every_pooling_and_view_equals_a_plain_forward_pass(patches, weights, tmp_path):
    store = run(patches, weights, tmp_path / "s.zarr")
    dataset, backbone = load_dataset(str(patches)), find_backbone(MODEL)
    model = timm.create_model("test_vit", num_classes=0).eval()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(weights))
    for view in ("full", "center16"):
        images = make_transform(backbone, parse_view(view))([dataset.decode(row) for row in range(N)], CPU)
        with torch.inference_mode():
            tokens = model.forward_features(images)
        n_prefix = model.num_prefix_tokens
        cells = tokens[:, n_prefix:].unflatten(1, model.patch_embed.grid_size)
        expected = {
            "cls": tokens[:, 0],
            "mean": tokens[:, n_prefix:].mean(1),
            "center": cells[:, 3:7, 3:7].mean((1, 2)),
        }
        for pooling, values in expected.items():
            found = store.read(dataset.name, model=MODEL, view=view, pooling=pooling)
            np.testing.assert_allclose(found, values.numpy(), rtol=2e-3, atol=2e-3, err_msg=f"{view} {pooling}")


def test_a_view_with_flips_holds_the_mean_over_eight_orientations(patches, weights, tmp_path):
    store = run(patches, weights, tmp_path / "s.zarr", views=("full+flips", "full"))
    dataset, backbone = load_dataset(str(patches)), find_backbone(MODEL)
    model = build_model(backbone, Weights(weights, "", "", "file"))
    images = make_transform(backbone, parse_view("full"))([dataset.decode(row) for row in range(N)], CPU)
    turned = [torch.rot90(one, turns, (2, 3)) for one in (images, images.flip(2)) for turns in range(4)]
    with torch.inference_mode():
        expected = torch.stack([model.forward_features(one)[:, 0] for one in turned]).mean(dim=0)
    found = store.read(dataset.name, model=MODEL, view="full+flips", pooling="cls")
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3, atol=2e-3)
    assert not np.allclose(store.read(dataset.name, model=MODEL, view="full", pooling="cls"), found, atol=2e-2)
    plain, flipped = (store.entry(dataset.name, model=MODEL, view=view) for view in ("full", "full+flips"))
    assert plain.fingerprint != flipped.fingerprint
    assert "flips" not in plain.parts["transform"]  # fingerprints of views without stay as they were


def test_the_same_command_again_computes_nothing(patches, weights, tmp_path, monkeypatch):
    before = content(run(patches, weights, tmp_path / "s.zarr").path)
    monkeypatch.setattr(prepare, "build_model", lambda *a, **k: pytest.fail("a network was built for nothing"))
    assert content(run(patches, weights, tmp_path / "s.zarr").path) == before


def test_several_models_share_one_decode(patches, weights, tmp_path, monkeypatch):
    dataset = load_dataset(str(patches))
    decoded = []
    counting = type(dataset)(**(vars(dataset) | {"decode": lambda row: decoded.append(row) or dataset.decode(row)}))
    monkeypatch.setattr(
        prepare, "fetch_weights", lambda backbone, **k: prepare.Weights(weights, backbone.name, "r", "file")
    )
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    backbones = [find_backbone(MODEL), find_backbone("timm/test_vit.r160_in1k")]
    options = ExtractOptions(views=("full", "center16"), precision="fp32")
    extract_dataset(counting, backbones, store=store, options=options)
    assert len(store.entries()) == 4
    assert len(decoded) == N + 8  # the first few once more, to prepare the networks


def test_a_changed_label_updates_the_table_and_keeps_the_embeddings(patches, weights, tmp_path, capsys):
    store = run(patches, weights, tmp_path / "s.zarr")
    dataset = load_dataset(str(patches), positive="Normal")
    extract_dataset(
        dataset,
        [find_backbone(MODEL)],
        store=store,
        options=ExtractOptions(views=("full",), precision="fp32"),
        weights=weights,
    )
    assert "table was updated" in capsys.readouterr().err
    assert store.samples(dataset.name).label.sum() == 100
    assert all(entry.complete for entry in store.entries())


def test_another_order_of_classes_is_said_and_names_move_with_their_labels(tmp_path, weights, capsys):
    for name in ("grade 1", "grade 2", "grade 3"):
        for number in range(2):
            (tmp_path / "grades" / name).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([int(name[-1]), number]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "grades" / name / f"{number}.png")
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    options = ExtractOptions(views=("full",), precision="fp32")
    for order, ordinal in (
        (("grade 1", "grade 2", "grade 3"), True),
        (("grade 3", "grade 1", "grade 2"), False),
    ):
        dataset = load_dataset(str(tmp_path / "grades"), order=order, ordinal=ordinal)
        extract_dataset(dataset, [find_backbone(MODEL)], store=store, options=options, weights=weights)
        names = store.class_names("grades")
        assert names == order
        samples = store.samples("grades")
        assert [names[k] for k in samples.label] == [id.partition("/")[0] for id in samples.id.tolist()]
        assert store.dataset_attrs("grades").get("ordinal", False) is ordinal
        said = capsys.readouterr().err
        assert ("Its classes were grade 1 (0), grade 2 (1) and grade 3 (2), now grade 3 (0), " in said) is not ordinal
    assert all(entry.complete for entry in store.entries())


def test_other_weights_are_refused_and_nothing_is_lost(patches, weights, tmp_path):
    store = run(patches, weights, tmp_path / "s.zarr")
    before = content(store.path)
    write_weights(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(UserError, match=r"(?s)weights_sha256.*`overwrite=True`"):
        run(patches, tmp_path / "other.safetensors", store.path)
    assert content(store.path) == before
    run(patches, tmp_path / "other.safetensors", store.path, overwrite=True)
    assert content(store.path) != before


@pytest.mark.parametrize("batch_size", [7, 100])
def test_any_batch_size_gives_the_same_embeddings(patches, weights, tmp_path, batch_size):
    reference = run(patches, weights, tmp_path / "a.zarr")
    store = run(patches, weights, tmp_path / "b.zarr", batch_size=batch_size)
    for view in ("full", "center16"):
        name = load_dataset(str(patches)).name
        np.testing.assert_allclose(
            store.read(name, model=MODEL, view=view), reference.read(name, model=MODEL, view=view), rtol=2e-3, atol=2e-3
        )


def test_a_truncated_patch_ends_with_its_name_and_keeps_finished_blocks(patches, weights, tmp_path):
    dataset = load_dataset(str(patches))

    def decode(row: int) -> np.ndarray:
        if row == 140:
            raise UserError(f"{dataset.samples.id[row]} cannot be decoded.")
        return dataset.decode(row)

    broken = type(dataset)(**(vars(dataset) | {"decode": decode}))
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    options = ExtractOptions(precision="fp32")
    with pytest.raises(UserError, match=r"cannot be decoded"):
        extract_dataset(broken, [find_backbone(MODEL)], store=store, options=options, weights=weights)
    (entry,) = store.entries()
    assert entry.n_done == 2
    extract_dataset(dataset, [find_backbone(MODEL)], store=store, options=options, weights=weights)
    assert store.entries()[0].complete


def test_a_network_that_embeds_otherwise_than_its_record_says_is_refused_before_anything_is_stored(
    patches, weights, tmp_path
):
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    backbone = dataclasses.replace(find_backbone(MODEL), card_pooling="mean")
    with pytest.raises(UserError, match=r"in another way than by mean pooling"):
        extract_dataset(load_dataset(str(patches)), [backbone], store=store, weights=weights)
    assert store.entries() == []


def test_not_a_number_is_refused_with_the_patch_named(patches, tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    state["norm.weight"][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"NaN or infinite .*Atypical/000.png"):
        run(patches, tmp_path / "nan.safetensors", tmp_path / "s.zarr")


def test_out_of_memory_halves_the_batch_instead_of_failing(patches, weights, tmp_path, monkeypatch, capsys):
    real = embed.embed_batch

    def small_memory(model, backbone, images, **options):
        if len(images) > 16:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, backbone, images, **options)

    monkeypatch.setattr(embed, "embed_batch", small_memory)
    store = run(patches, weights, tmp_path / "s.zarr", batch_size=32)
    assert "going on with batches of 16" in capsys.readouterr().err
    assert all(entry.complete and entry.batch_size == 16 for entry in store.entries())


def test_the_largest_batch_leaves_room():
    def forward(n: int) -> None:
        if n > 100:
            raise torch.OutOfMemoryError("out of memory")

    assert largest_batch(forward, device=CPU, at_most=1024) == 32
    assert largest_batch(lambda n: None, device=CPU) == 256  # more waits longer for its first and its last images
    with pytest.raises(UserError, match="not even one image"):
        largest_batch(lambda n: forward(101), device=CPU)
    with pytest.raises(RuntimeError, match="a bug"):
        largest_batch(lambda n: (_ for _ in ()).throw(RuntimeError("a bug")), device=CPU)


def test_auto_precision_keeps_bf16_only_where_it_changes_nothing(weights, monkeypatch):
    backbone = find_backbone(MODEL)
    model = build_model(backbone, None)
    images = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(compute, "has_bf16", lambda device: True)
    cosine = min(
        float(torch.nn.functional.cosine_similarity(a, b).min())
        for a, b in zip(
            embed_batch(model, backbone, images, precision="fp32").values(),
            embed_batch(model, backbone, images, precision="bf16").values(),
            strict=True,
        )
    )
    monkeypatch.setattr(compute, "MIN_COSINE", cosine - 1e-6)
    assert choose_precision("auto", backbone, model, images) == "bf16"
    monkeypatch.setattr(compute, "MIN_COSINE", cosine + 1e-6)
    assert choose_precision("auto", backbone, model, images) == "fp32"
    monkeypatch.setattr(compute, "has_bf16", lambda device: False)
    monkeypatch.setattr(compute, "MIN_COSINE", 0)
    assert choose_precision("auto", backbone, model, images) == "fp32"
    with pytest.raises(UserError, match="fp16 is for GPUs"):
        choose_precision("fp16", backbone, model, images)


@pytest.mark.parametrize(("asked", "expected"), [("auto", "fp32"), ("fp32", "fp32"), ("bf16", None), ("fp16", None)])
def test_an_apple_gpu_computes_in_float32(asked, expected):
    """Whatever the card says of NVIDIA's."""
    backbone, elsewhere = dataclasses.replace(CARD, amp="fp16"), SimpleNamespace(device=torch.device("mps"))
    if expected is None:
        with pytest.raises(UserError, match=rf"{asked} on Apple's GPUs .* use `precision='fp32'`"):
            choose_precision(asked, backbone, torch.nn.Identity(), elsewhere)
    else:
        assert choose_precision(asked, backbone, torch.nn.Identity(), elsewhere) == expected


@pytest.mark.parametrize("arch", ["test_efficientnet", "resnet18"])
def test_settling_a_network_keeps_its_function(arch):
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=0).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    example = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    settled = optimize_for_inference(model, CPU, example=example)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in settled.modules())
    with torch.inference_mode():
        torch.testing.assert_close(settled(example), model(example), rtol=1e-3, atol=1e-4)


def test_a_norm_that_does_not_follow_its_convolution_is_left_alone():
    class NormFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1)
            self.norm = torch.nn.BatchNorm2d(3)
            torch.nn.init.constant_(self.norm.running_mean, 3.0)

        def forward(self, x):
            return self.conv(self.norm(x))  # registered in the other order

    model = NormFirst().eval()
    example = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(optimize_for_inference(model, CPU, example=example)(example), model(example))


def command(patches: Path, weights: Path, store: Path) -> list[str]:
    return [
        *("fm-extract", "--model", MODEL, "--weights", str(weights), "--dataset", str(patches), "--store", str(store)),
        *("--view", "full,center16", "--precision", "fp32", "--batch-size", "8"),
    ]


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_bit_for_bit_like_an_undisturbed_one(patches, weights, tmp_path, how):
    undisturbed = content(run(patches, weights, tmp_path / "a.zarr", batch_size=8).path)
    path = tmp_path / "b.zarr"
    moments = random.Random(int(how))
    for _ in range(2):
        process = start(*command(patches, weights, path))
        while not path.exists() and not process.ended():  # the imports are of no interest
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(how)
        done = process.wait()
        if done.returncode == 1:
            assert "run the same command again to finish the rest" in done.stderr
            assert "Traceback" not in done.stderr
        else:
            assert done.returncode in (0, -how)  # done already, or not yet listening
    assert start(*command(patches, weights, path)).wait().returncode == 0
    assert content(path) == undisturbed


# What decides the numbers.

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
CARD = Backbone(
    name="small",
    title="a small transformer",
    hub_id="org/small",
    revision="main",
    arch="vit_tiny_patch16_224",
    kwargs=SMALL,
    input_size=32,
    resize=40,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
    n_parameters=0,
    embedding_dim=32,
    gflops=None,
    licence="",
)


def drawn(n: int = 10, *, seed: int = 0, mpp: float | None = 0.25, name: str = "drawn") -> PatchDataset:
    """A few patches in memory."""
    pixels = np.random.default_rng(seed).integers(0, 255, (n, 36, 41, 3), dtype=np.uint8)
    samples = make_samples(
        [f"{row}.png" for row in range(n)],
        [row % 2 for row in range(n)],
        sha256=[hashlib.sha256(patch.tobytes()).hexdigest() for patch in pixels],
    )
    return PatchDataset(name, samples, ("Normal", "Atypical"), "", mpp, lambda row: pixels[row])


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("small") / "a.safetensors"
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        save_file(timm.create_model(CARD.arch, num_classes=0, **SMALL).state_dict(), path.with_stem(name))
    return path


def embedded(
    store: Path, weights: Path, card: Backbone = CARD, dataset: PatchDataset | None = None, **options
) -> Entry:
    """What extraction records of its one new entry."""
    opened = FeatureStore.open_or_create(store)
    dataset = drawn() if dataset is None else dataset
    chosen = ExtractOptions(**({"precision": "fp32", "device": "cpu"} | options))
    extract_dataset(dataset, [card], store=opened, options=chosen, weights=weights)
    (view,) = chosen.views
    return next(entry for entry in opened.entries(dataset.name, card.name) if entry.view == view)


CHANGED_CARDS = {
    "hub_id": {"hub_id": "org/other"},
    "architecture": {"arch": "deit_tiny_patch16_224"},  # of the same tensors
    "kwargs": {"kwargs": SMALL | {"act_layer": "relu"}},
    "layout": {"layout": "timm-hub"},
    "resample_pos_embed": {"resample_pos_embed": True},
    "transform": {"resize": 41},
    "mean": {"mean": (0.5, 0.4, 0.31)},
    "std": {"std": (0.2, 0.3, 0.41)},
    "interpolation": {"interpolation": "bilinear"},
}


@pytest.fixture(scope="module")
def original(small_weights, tmp_path_factory) -> Entry:
    return embedded(tmp_path_factory.mktemp("original") / "s.zarr", small_weights)


@pytest.mark.parametrize("part", CHANGED_CARDS)
def test_a_card_changed_in_one_part_never_reuses_embeddings(original, small_weights, part):
    before = content(original.storage.root)
    with pytest.raises(UserError, match=r"(?s)computed differently.*`overwrite=True`") as caught:
        embedded(original.storage.root, small_weights, dataclasses.replace(CARD, **CHANGED_CARDS[part]))
    assert f"{'transform.' if part in ('mean', 'std', 'interpolation') else ''}{part}" in str(caught.value)
    assert content(original.storage.root) == before


@pytest.mark.parametrize("what", ["weights", "precision"])
def test_other_weights_or_another_precision_never_reuse_embeddings(original, small_weights, what):
    path = small_weights.with_stem("b") if what == "weights" else small_weights
    with pytest.raises(UserError, match=rf"(?s)computed differently.*{what}"):
        embedded(original.storage.root, path, precision="bf16" if what == "precision" else "fp32")


def test_the_commit_the_view_and_the_patches_are_in_the_fingerprint(original, small_weights, tmp_path):
    digest = hashlib.sha256(small_weights.read_bytes()).hexdigest()
    cards = [dataclasses.replace(CARD, sha256=digest, revision=commit) for commit in ("0" * 40, "1" * 40)]
    found = [original]
    found += [embedded(tmp_path / f"{k}", small_weights, card) for k, card in enumerate(cards)]
    found += [embedded(tmp_path / "name", small_weights, dataclasses.replace(CARD, name="another"))]
    found += [embedded(tmp_path / view, small_weights, views=(view,)) for view in ("full@32", "center32", "center24")]
    found += [
        embedded(tmp_path / f"data {k}", small_weights, dataset=dataset)
        for k, dataset in enumerate([drawn(seed=1), drawn(9), drawn(mpp=0.5), drawn(mpp=None)])
    ]
    whole = dataclasses.replace(CARD, resize=32)  # its `full` is the pixels of `full@32`, by another name
    found += [embedded(tmp_path / "whole", small_weights, whole)]
    assert len({entry.fingerprint for entry in found}) == len(found)
    again = embedded(tmp_path / "again", small_weights)
    assert (again.fingerprint, again.parts) == (original.fingerprint, original.parts)
    assert again.parts["poolings"] == again.poolings == {"cls": 32, "mean": 32, "center": 32}


def test_the_device_is_in_the_fingerprint(small_weights):
    view, found = parse_view("full"), Weights(small_weights, "0" * 64, "local", "file")
    records = [
        fingerprint_parts(drawn(), CARD, found, view, precision="fp32", device=torch.device(device))
        for device in ("cpu", "cuda", "cuda:1")
    ]
    assert fingerprint(records[0]) != fingerprint(records[1]) == fingerprint(records[2])


def test_what_decides_the_last_bits_on_a_gpu_is_in_the_fingerprint_there(small_weights):
    found = Weights(small_weights, "0" * 64, "local", "file")

    def parts(device: str, *, compiled: bool) -> dict:
        view = parse_view("full")
        place = torch.device(device)
        return fingerprint_parts(drawn(), CARD, found, view, precision="fp32", device=place, compiled=compiled)

    for device in ("cuda", "mps"):
        plain, fast = (parts(device, compiled=compiled) for compiled in (False, True))
        assert list(differences(plain, fast)) == [("numerics.compiled", "false", "true")]
        assert set(plain["numerics"]) == {"attention", "tf32", "compiled"}
    # Stores written on processors before GPUs had more parts are still theirs.
    expected = "bde51b0965022bb43d2b489f704cc6edcb534587dc4245b23dfc2acc32d5d7c6"
    assert fingerprint(parts("cpu", compiled=False)) == expected


@pytest.mark.skipif(version() is None, reason="OpenVINO is not installed")
def test_what_openvino_embeds_is_recorded_and_entries_go_on_as_begun(tmp_path, monkeypatch, capsys):
    """A finished entry needs it no more; an unfinished one is not gone on with by torch."""
    card, weights = find_backbone("timm/test_efficientnet.r160_in1k"), tmp_path / "cnn.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(card.arch, num_classes=0).state_dict(), weights)

    third = drawn(70, name="third", seed=2)  # two blocks

    def stop(row: int) -> np.ndarray:
        if row > 65:
            raise UserError("stopped")
        return third.decode(row)

    by_torch = embedded(tmp_path / "torch", weights, card, fast=False)
    by_openvino = embedded(tmp_path / "openvino", weights, card)
    assert "numerics" not in by_torch.parts
    assert list(differences(by_torch.parts, by_openvino.parts)) == [
        ("numerics", '"(none)"', '{"compiled": "openvino"}')
    ]
    for pooling in ("pooled", "center"):
        one, other = (
            FeatureStore.open(tmp_path / name).read("drawn", model=card.name, view="full", pooling=pooling)
            for name in ("torch", "openvino")
        )
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)  # float16's own rounding
    for name, begun in (("torch", by_torch), ("openvino", by_openvino)):
        second = embedded(tmp_path / name, weights, card, dataset=drawn(name="second", seed=1))
        assert second.parts.get("numerics") == begun.parts.get("numerics")
    with pytest.raises(UserError, match="stopped"):
        embedded(tmp_path / "openvino", weights, card, dataset=dataclasses.replace(third, decode=stop))
    capsys.readouterr()
    monkeypatch.setattr("extract.openvino.find_spec", lambda name: None)
    assert embedded(tmp_path / "openvino", weights, card).fingerprint == by_openvino.fingerprint
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"(?s)computed differently.*numerics"):
        embedded(tmp_path / "openvino", weights, card, dataset=third)
    assert "OpenVINO is not installed: pip install 'mitofm[cpu]'" in capsys.readouterr().err


def test_a_gpu_computes_exactly_before_its_first_pass(patches, weights, tmp_path, monkeypatch):
    """Here on a processor: what matters is that it is asked first."""
    asked = []
    monkeypatch.setattr(prepare, "compute_exactly", asked.append)
    monkeypatch.setattr(prepare, "check_forward", lambda *a: asked or pytest.fail("a pass came before"))
    run(patches, weights, tmp_path / "s.zarr")
    assert asked == [CPU]


def test_the_thread_that_writes_waits_for_the_device_and_the_main_one_goes_on(patches, weights, tmp_path, monkeypatch):
    """One mark for each step, set before its embeddings are handed over."""
    marks, fetched = [], []

    def fetch(poolings, done):
        fetched.append((done, threading.current_thread().name))
        return {name: values.numpy() for name, values in poolings.items()}

    monkeypatch.setattr(embed, "mark", lambda device: marks.append(len(marks)) or marks[-1])
    monkeypatch.setattr(embed, "fetch", fetch)
    run(patches, weights, tmp_path / "s.zarr", views=("full",))
    assert [done for done, _ in fetched] == marks == [0, 1, 2]
    assert all(thread.startswith("write") for _, thread in fetched)


def test_a_padded_batch_stores_its_patches_alone(patches, weights, tmp_path, monkeypatch):
    """As on a GPU, where every batch has the same shape; here 64 = 40 + 24 rows, and 22 at the end."""
    reference = run(patches, weights, tmp_path / "a.zarr", views=("full",))
    shapes, embed_batch = set(), embed.embed_batch

    def watched(model, backbone, images, **options):
        shapes.add(len(images))
        return embed_batch(model, backbone, images, **options)

    monkeypatch.setattr(embed, "embed_batch", watched)
    monkeypatch.setattr(
        embed, "padded", lambda images, n: torch.cat([images, images[-1:].expand(n - len(images), -1, -1, -1)])
    )
    store = run(patches, weights, tmp_path / "b.zarr", views=("full",), batch_size=40)
    assert shapes == {40}
    name = load_dataset(str(patches)).name
    found, expected = (one.read(name, model=MODEL, view="full") for one in (store, reference))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("device", "n_cores", "expected"), [("cpu", 8, 4), ("cpu", 64, 8), ("cuda", 8, 8), ("cuda", 64, 16), ("mps", 8, 8)]
)
def test_beside_a_gpu_all_cores_decode(monkeypatch, device, n_cores, expected):
    asked = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, n: int, **options):
            asked.append(n)
            super().__init__(1, **options)

    monkeypatch.setattr(embed, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(embed.os, "cpu_count", lambda: n_cores)
    units = [range(2), range(2, 3)]
    found = list(embed.decoded(lambda row: np.full((1, 1, 3), row), units, device=torch.device(device)))
    assert [[int(patch[0, 0, 0]) for patch in patches] for _, patches in found] == [[0, 1], [2]]
    assert asked == [expected]


def test_auto_precision_follows_what_the_same_weights_chose_and_no_others(small_weights, tmp_path, monkeypatch):
    """A processor that has bf16, on which this network would always be computed in it."""
    monkeypatch.setattr(compute, "has_bf16", lambda device: True)
    monkeypatch.setattr(compute, "MIN_COSINE", -1)
    store, others = tmp_path / "s.zarr", small_weights.with_stem("b")
    assert embedded(store, small_weights, dataset=drawn(name="a"), precision="fp32").parts["precision"] == "fp32"
    second = embedded(store, small_weights, dataset=drawn(name="b", seed=1), precision="auto")
    assert second.parts["precision"] == "fp32"
    third = embedded(store, others, dataset=drawn(name="c", seed=2), precision="auto")
    assert third.parts["precision"] == "bf16"
    another_view = embedded(store, small_weights, dataset=drawn(name="a"), precision="auto", views=("center24",))
    assert another_view.parts["precision"] == "bf16"
    monkeypatch.setattr(compute, "has_bf16", lambda device: False)
    fourth = embedded(store, others, dataset=drawn(name="d", seed=3), precision="auto")
    assert fourth.parts["precision"] == "bf16"  # as the same weights before
    assert embedded(store, small_weights, dataset=drawn(name="e"), precision="auto").parts["precision"] == "fp32"


def test_what_a_card_says_of_precision_is_for_gpus(monkeypatch):
    backbone = dataclasses.replace(CARD, amp="fp16")
    monkeypatch.setattr(compute, "has_bf16", lambda device: False)
    assert choose_precision("auto", backbone, torch.nn.Identity(), torch.zeros(1, 3, 32, 32)) == "fp32"


def test_auto_precision_does_not_follow_what_was_chosen_on_another_kind_of_device(small_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "has_bf16", lambda device: False)
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    sha256 = hashlib.sha256(small_weights.read_bytes()).hexdigest()
    for name, device in (("a", "cuda"), ("b", "cpu")):
        store.put_samples(name, drawn(name=name).samples, attrs={})
        parts = {"weights_sha256": sha256, "device": device, "precision": "bf16"}
        store.begin(name, model=CARD.name, view="full", poolings={"cls": 32}, card_pooling="cls", parts=parts)
        found = embedded(tmp_path / "s.zarr", small_weights, dataset=drawn(name=f"of {name}"), precision="auto")
        assert found.parts["precision"] == {"cuda": "fp32", "cpu": "bf16"}[device]
        store.remove(f"of {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True])
def test_a_gpu_embeds_as_the_processor_does_and_again_to_the_bit(patches, weights, tmp_path, monkeypatch, fast):
    """But for the processor's resize, which is off by a grey level in a few pixels."""
    monkeypatch.setattr("extract.prepare.worth_compiling", lambda *_: True)
    name = load_dataset(str(patches)).name
    stores = [
        run(patches, weights, tmp_path / f"{k}.zarr", device=device, fast=fast, batch_size=64)
        for k, device in enumerate(("cuda", "cuda", "cpu"))
    ]
    for view in ("full", "center16"):
        first, second, processor = (store.read(name, model=MODEL, view=view).astype(np.float32) for store in stores)
        np.testing.assert_array_equal(first, second)
        cosine = (first * processor).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(processor, axis=1)
        assert cosine.min() > 0.999
    (entry, _) = stores[0].entries()
    assert entry.parts["numerics"]["compiled"] == fast
