"""Is a network of the user's own a backbone like any other, and is its code run only where the user names it?"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from patch_folders import write_patches
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from extract import Backbone, ExtractOptions, extract_dataset, find_backbone, load_dataset
from extract.backbones import build_model, fetch_weights, recorded_backbone
from extract.custom import CustomNetwork, is_code, run_code, state_digest
from extract.doctor import _models
from extract.pooling import center_window, forward_poolings, output_poolings, pooling_widths
from features.console import UserError, as_flags
from features.folds import fold_models
from features.store import FeatureStore
from finetune.checkpoint import write_start
from finetune.lora import LoraOptions, add_adapters, default_targets
from finetune.options import ComputeOptions, FinetuneOptions
from finetune.plan import make_plan
from finetune.predict import predict_paths
from finetune.report import make_report
from finetune.run import finetune, resume
from finetune.setup import prepare
from probe.commands import commands
from probe.probing import ProbeOptions, probe_store
from probe.records import RunRecord
from probe.resample import Resampling
from probe.runs import read_predictions

# A convolutional stem before a transformer of timm's, as in CTransPath.
STEM = """
from pathlib import Path
import timm, torch
from torch import nn
from extract import Backbone
from beside import SIZE

Path(__file__).with_suffix(".ran").touch()

class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.trunk = timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, img_size=16, in_chans=8, patch_size=4, embed_dim=24, depth=2
        )

    def forward(self, images):
        return self.trunk.forward_features(self.stem(images))

def backbone():
    torch.manual_seed(0)
    return Backbone.custom(Stem(), name="stem", size=SIZE, n_prefix_tokens=1, mpp=0.25)

def other():
    torch.manual_seed(1)
    return Backbone.custom(Stem(), name="stem", size=SIZE, n_prefix_tokens=1, mpp=0.25)
"""
# A ResNet with bottlenecks, as of torchvision, that gives its feature map.
RESNET = """
from pathlib import Path
import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck
from extract import Backbone

Path(__file__).with_suffix(".ran").touch()

def backbone():
    torch.manual_seed(0)
    network = nn.Sequential(*list(ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4).children())[:-2])
    return Backbone.custom(network, name="small-resnet", size=64)
"""


def written(folder: Path, text: str, name: str = "net.py") -> str:
    (folder / "beside.py").write_text("SIZE = 32\n")
    (folder / "drawn").mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


class Wide(nn.Module):
    """Gives whatever `answer` makes of its images, times its one weight."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer(images * self.scale)


def custom(answer: Callable[[Tensor], Any], **options: Any) -> Backbone:
    return Backbone.custom(Wide(answer), **{"name": "own", "size": 16, **options})


# ------------------------------------------------------------------------------------------- from patches to the report


def embed(file: str, patches: Any, store: FeatureStore, **options: Any) -> list[Any]:
    chosen = ExtractOptions(device="cpu", precision="fp32", fast=False, **options)
    return extract_dataset(patches, [find_backbone(file, run_file=True)], store=store, options=chosen)


def train(file: str, data: Path, runs: Path, *, method: Any = "lora") -> RunRecord:
    options = FinetuneOptions(model=file, train=str(data), method=method, cv=2, epochs=1, precision="fp32", tta=False)
    run = finetune(options, compute_options=ComputeOptions(device="cpu", fast=False, merge=True), runs=runs)
    assert run is not None
    return run


@pytest.mark.parametrize(("text", "name", "pooling"), [(STEM, "stem", "cls"), (RESNET, "small-resnet", "pooled")])
def test_a_file_goes_through_all_stages(tmp_path: Path, text: str, name: str, pooling: str) -> None:
    file = written(tmp_path, text)
    mark = Path(file).with_suffix(".ran")
    data = write_patches(tmp_path / "drawn", 24, size=32)
    store = FeatureStore.open_or_create(tmp_path / "store")
    embed(file, load_dataset(str(data)), store)
    entry = store.entry("drawn", model=name, view="full")
    assert entry.card_pooling == pooling
    runs = tmp_path / "runs"
    (probed,) = probe_store(store, options=ProbeOptions(cv=3, train="drawn", pooling="card", device="cpu"), runs=runs)
    trained = train(file, data, runs)
    assert len(trained.adapted_modules) == 8  # four layers of two blocks; two 1x1 convolutions of four
    assert trained.embedding["weights_sha256"] == entry.parts["weights_sha256"]
    mark.unlink()
    assert name in make_report(runs, format="markdown", resampling=Resampling(replicates=200))[0]
    assert commands(probed)[0].startswith("fm-extract --model net.py:backbone --dataset ")
    for run in (probed, trained):
        assert run.folder is not None
        with pytest.raises(UserError, match=rf"'{name}'.*net\.py:backbone.*only if you name it.*`model=PATH`"):
            predict_paths(run.folder, [data], out=tmp_path / "x.csv", device="cpu")
        assert not mark.exists()  # neither report nor prediction has run what the record names
        summary = predict_paths(run.folder, [data], out=tmp_path / "x.csv", model=[file], device="cpu")
        assert summary["n"] == 24
        mark.unlink()
    with Path(file).open("a") as edited:
        edited.write("# changed\n")
    with pytest.raises(UserError, match=r"kwargs\.file_sha256: stored \"\w{64}\", now \"\w{64}\"(?s:.*)overwrite=True"):
        embed(file, load_dataset(str(data)), store)
    with pytest.raises(UserError, match=r"kwargs\.file_sha256: the run had"):
        predict_paths(trained.folder, [data], out=tmp_path / "x.csv", model=[file], device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["full", "head"])
def test_the_whole_network_or_its_head_is_trained_saved_and_read_back(tmp_path: Path, method: str) -> None:
    file = written(tmp_path, STEM)
    data = write_patches(tmp_path / "drawn", 24, size=32)
    run = train(file, data, tmp_path / "runs", method=method)
    assert run.folder is not None
    out = tmp_path / "x.csv"
    predict_paths(run.folder, [data], out=out, model=[file], device="cpu")
    lines = [line.split(",") for line in out.read_text().splitlines()]
    found = {row[1]: list(map(float, row[-2:])) for row in lines[1:]}  # each fold's model
    own = read_predictions(run.folder)
    for id, fold, probability in zip(own.id.tolist(), own.fold.tolist(), own.probability[:, 1].tolist(), strict=True):
        assert found[id][fold] == pytest.approx(probability, abs=2e-5)


def test_a_training_is_resumed_only_with_the_file_named_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, STEM)
    data = write_patches(tmp_path / "drawn", 24, size=32)
    folder = train(file, data, tmp_path / "runs").folder
    assert folder is not None
    options = json.loads((folder / "run.json").read_text())["options"]
    setup = prepare(FinetuneOptions.from_record(options), ComputeOptions(device="cpu", fast=False))
    begun = tmp_path / "begun"
    write_start(begun, {"identity": setup.identity(), "compute": setup.compute_options.as_record(), "versions": {}})
    mark = Path(file).with_suffix(".ran")
    mark.unlink()
    with pytest.raises(UserError, match=r"net\.py.*only if you name it.*again by `model=PATH`"):
        resume(begun)
    assert not mark.exists()
    with pytest.raises(UserError, match="weights_sha256 was"):
        resume(begun, given={"model": f"{file}:other"})
    moved = shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("runs", "begun"))
    again = resume(begun, given={"model": str(moved / "net.py"), "data": None})
    assert again is not None
    assert f"--resume {begun} --model {moved / 'net.py'}" in capsys.readouterr().err.replace("\n", " ")
    assert again.embedding == setup.fingerprint_parts(setup.patches)


# ------------------------------------------------------------------------------------------------------------- security


def test_no_record_makes_code_run(tmp_path: Path) -> None:
    file = written(tmp_path, STEM)
    for name in (file, f"{file}:other"):
        with pytest.raises(UserError, match="run only where you name it"):
            find_backbone(name)
        with pytest.raises(UserError, match="only if you name it"):
            recorded_backbone(name, "main", named=(), where="a run")
    assert not Path(file).with_suffix(".ran").exists()
    code = ("a.py", "./timm/a.py", "nets/a.py:other", "a.b:c")
    assert all(map(is_code, code))
    assert not any(map(is_code, ("timm/vit.a1_in1k", "hf-hub:a/b@main", "a:b.c", "a/b:c", "uni")))


# ---------------------------------------------------------------------------------------------------------- what is run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"net\.py has no function 'backbone'. Expected a function backbone\(\), without"),
        (
            "class N:\n    pass\ndef backbon():\n    pass\ndef other():\n    pass\n",
            r"has no function 'backbone' \(it has backbon, other\)\. Did you mean backbon\? Expected a function",
        ),
        ("import nothing_like_it\n", r"net\.py, line 1, `import nothing_like_it`: ModuleNotFoundError"),
        ("def backbone(:\n", r"net\.py, line 1: SyntaxError"),
        ("def backbone():\n\n    return {}['x']\n", r"net\.py, line 3, `return {}\['x'\]`: KeyError: 'x'"),
        ("import sys\ndef backbone():\n    sys.exit(3)\n", r"line 3, .*SystemExit"),
        ("def backbone():\n    return 1\n", r"backbone\(\) returned int, expected a Backbone"),
        (
            "from torch import nn\ndef backbone():\n    return nn.Linear(1, 1)\n",
            r"Linear.*return Backbone\.custom\(network, name",
        ),
    ],
)
def test_a_file_that_gives_no_backbone_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_code(written(tmp_path, text))


def test_files_and_modules_are_found_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, STEM)
    monkeypatch.chdir(tmp_path)
    by_file, by_module = run_code("net.py"), run_code("net:other")
    assert by_file.kwargs["file_sha256"] == by_module.kwargs["file_sha256"]
    assert by_file.sha256 != by_module.sha256
    with pytest.raises(UserError, match=r"absent\.py: no such file"):
        run_code("absent.py")
    with pytest.raises(UserError, match=r"absent: no such Python module"):
        run_code("absent:backbone")
    (line,) = _models(("net.py",), reachable=False)
    assert (line.status, line.cached) == ("ok", "net.py:backbone")
    plan = make_plan(FinetuneOptions(model="net.py", cv=2, batch_size=2), ComputeOptions(device="cpu"))
    assert plan.n_parameters == by_file.n_parameters
    assert all(module.name.startswith("network.trunk.blocks.") for module in plan.modules)


def test_a_file_may_give_the_record_of_a_network_of_timm(tmp_path: Path) -> None:
    text = """
from extract import Backbone

def backbone():
    return Backbone(
        name="mine", title="Mine", hub_id="org/mine", arch="test_vit",
        n_parameters=1, embedding_dim=64, gflops=None, licence="",
    )
"""
    record = run_code(written(tmp_path, text))
    assert (record.network, record.revision) == (None, "main")
    assert len(list(forward_poolings(build_model(record, None), record, torch.zeros(1, 3, 160, 160)))) == 3
    with pytest.raises(UserError, match="'uni' is a model that mitofm knows"):
        run_code(written(tmp_path, text.replace('"mine"', '"uni"')))


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        (lambda x: x[0], {}, r"own: of two images, mean is torch\.float32 of the shape \(3, 16\)"),
        (lambda x: x.flatten(1)[:, :3] / 0 * 0, {}, "pooled holds NaN or infinity.*weights loaded"),
        (lambda x: x.flatten(1)[:, :3] * 0, {}, "pooled is the same for two images.*weights loaded"),
        (lambda x: x.flatten(1)[:1], {}, r"of two images, pooled is torch\.float32 of the shape \(1, 768\)"),
        (lambda x: x.flatten(), {}, r"cannot embed an image of 16 px \(.*its output is \(1536,\)"),
        (lambda x: x.flatten(2).mT[:, :5], {"n_prefix_tokens": 2}, r"n_prefix_tokens=1 would leave 2 x 2"),
        (lambda x: x.view(-1, 3, 8, 8), {"size": 12}, r"test_custom\.py, line \d+, `.*view.*If it takes another size"),
        (lambda x: (x.flatten(1), 3), {"poolings": "a"}, "forward returns 2 outputs, and poolings has 1 names"),
        (lambda x: {"a": x}, {}, r"a is torch\.float32 of the shape \(2, 3, 16, 16\)"),
        (lambda x: {"a+b": x.flatten(1)}, {}, r"'a\+b' cannot name a pooling"),
        (lambda x: x.detach().flatten(1), {}, "does not follow from the parameters"),
        (lambda x: x.flatten(1), {"card_pooling": "cls"}, "its output has pooled, and no cls"),
        (lambda x: x.flatten(1), {"std": (1, 0, 1)}, "std above 0"),
        (lambda x: x.flatten(1), {"size": "16"}, r"size '16', .*'str' object .*\. Expected whole numbers of pixels"),
        (lambda x: x.flatten(1), {"size": 16.5}, r"size 16\.5, .*Expected whole numbers of pixels"),
        (lambda x: x.flatten(1), {"mean": 0.5}, r"mean 0\.5, .*Expected .*three numbers each"),
        (lambda x: x.flatten(1), {"mpp": "fine"}, r"mpp 'fine': one is no number"),
        (lambda x: x.flatten(1), {"resize": 8}, r"resize 8, .*no less for resize"),
        (lambda x: x.flatten(1), {"n_prefix_tokens": -1}, r"n_prefix_tokens -1: expected"),
        (lambda x: x.flatten(1), {"card_pooling": 1}, r"card_pooling 1: expected a name"),
        (lambda x: x.flatten(1), {"name": ["a"]}, r"\['a'\] cannot name a model"),
        (lambda x: x.flatten(1), {"name": "uni"}, "'uni' is a model that mitofm knows"),
        (lambda x: x.flatten(1), {"name": "a/b"}, "'a/b' cannot name a model"),
        (lambda x: x.flatten(1), {"name": "samples"}, "'samples' cannot name a model"),
        (lambda x: x.flatten(1), {"name": "net.py"}, "'net.py' cannot name a model"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused(answer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        custom(answer, **options)


# A network that works once, on two images on the processor, and what it does besides.
FAULTY = """
import threading
import torch
from torch import nn
from extract import Backbone

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 4, 4)
        self.n = 0

    def forward(self, images):
        found = self.layer(images).mean((2, 3))
        {fault}
        return found

def backbone():
    return Backbone.custom(nn.Sequential(Inner()), name="faulty", size=16)
"""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("self.kept = found", r"net\.py, line 15: forward of Inner keeps .* copied: self\.kept of 0 \(RuntimeError\)"),
        ("self.kept = [(found,)]", r"net\.py, line 15: forward of Inner keeps .*: self\.kept of 0"),
        ("self.lock = threading.Lock()", r"net\.py, line 15: forward of Inner keeps .*: self\.lock of 0 \(TypeError\)"),
        ("self.n += 1; found = found + self.n", r"pooled is another one .* keeps from call to call"),
        ("found = nn.functional.dropout(found)", r"pooled is another one .*F\.dropout without training"),
    ],
)
def test_what_forward_keeps_or_draws_is_refused(tmp_path: Path, fault: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_code(written(tmp_path, FAULTY.format(fault=fault)))


def test_a_cache_that_can_be_copied_may_be_kept(tmp_path: Path) -> None:
    backbone = run_code(written(tmp_path, FAULTY.format(fault="self.cache = {images.shape: torch.ones(3)}")))
    assert build_model(backbone, None) is not backbone.network


def test_what_fails_on_other_images_than_those_tried_is_named_with_its_line(tmp_path: Path) -> None:
    file = written(tmp_path, FAULTY.format(fault="found = found.view(2, 4)"))
    with pytest.raises(
        UserError, match=r"Sequential cannot embed images .*\(\d+, 3, 16, 16\).*net\.py, line 15, `found = "
    ):
        embed(
            file,
            load_dataset(str(write_patches(tmp_path / "drawn", 6, size=16))),
            FeatureStore.open_or_create(tmp_path / "s"),
        )
    in_training = written(tmp_path, FAULTY.format(fault="assert not self.training"))
    with pytest.raises(UserError, match=r"net\.py, line 15, `assert not self\.training`: AssertionError"):
        train(in_training, tmp_path / "drawn", tmp_path / "runs", method="full")


def test_the_attribute_that_cannot_be_copied_is_named() -> None:
    network = nn.Sequential(Wide(lambda x: x.flatten(1)))
    network[0].lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"cannot be copied.*: self\.lock of 0 \(TypeError"):
        Backbone.custom(network, name="own", size=16)


def test_arguments_in_a_users_file_do_not_become_options_of_a_command(tmp_path: Path) -> None:
    flags = dict.fromkeys(("size", "resize", "weights", "poolings", "mean", "std", "mpp", "card_pooling"), "--option")
    faults: list[tuple[Any, dict[str, Any]]] = [
        (lambda x: x.view(-1, 3, 8, 8), {"size": 12}),
        (lambda x: x.detach().flatten(1), {}),
        (lambda x: (x.flatten(1), 3), {"poolings": "a"}),
        (lambda x: x.flatten(1), {"size": "16"}),
        (lambda x: x.flatten(1), {"weights": tmp_path / "absent.pt"}),
        (lambda x: x.flatten(1), {"weights": tmp_path}),
    ]
    for answer, options in faults:
        with pytest.raises(UserError) as refused:
            fetch_weights(custom(answer, **options))
        assert "--option" not in as_flags(str(refused.value), flags)
    with pytest.raises(UserError, match="`weights` takes one file"):  # here it is an option's
        fetch_weights(custom(lambda x: x.flatten(1)), weights=tmp_path)


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "drawn").mkdir()
    data = load_dataset(str(write_patches(tmp_path / "drawn", 6, size=16)))
    twice = [custom(lambda x: x.flatten(1)), custom(lambda x: -x.flatten(1))]
    with pytest.raises(UserError, match="two models are called 'own'"):
        extract_dataset(data, twice, store=FeatureStore.open_or_create(tmp_path / "store"))


# ------------------------------------------------------------------------------------------------------- what comes out


def test_outputs_are_pooled_as_timms_are() -> None:
    maps = torch.randn(2, 5, 7, 7)
    tokens = torch.cat([torch.randn(2, 1, 5), maps.flatten(2).mT], dim=1)
    middle = maps[:, :, center_window(7), center_window(7)].mean(dim=(2, 3))
    of_maps, of_tokens = output_poolings(maps), output_poolings(tokens, n_prefix_tokens=1)
    assert list(of_maps) == ["pooled", "center"]
    assert list(of_tokens) == ["cls", "mean", "center"]
    torch.testing.assert_close(of_maps["center"], middle)
    torch.testing.assert_close(of_tokens["center"], middle)
    torch.testing.assert_close(of_tokens["mean"], maps.mean(dim=(2, 3)))
    assert torch.equal(of_tokens["cls"], tokens[:, 0])


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        ("test_resnet", {}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2},
        ),
    ],
)
def test_middle_stages_are_those_of_the_same_network_of_timm(arch: str, arguments: dict[str, Any]) -> None:
    record = Backbone(
        name="x", title="x", arch=arch, kwargs=arguments, card_pooling="pooled", input_size=64,
        n_parameters=1, embedding_dim=1, gflops=None, licence="",
    )  # fmt: skip
    timms = build_model(record, None)
    plain = timm.create_model(arch, num_classes=0, **arguments)
    plain.load_state_dict(timms.state_dict())
    own = Backbone.custom(plain, name="own", size=64)
    images = torch.randn(2, 3, 64, 64)
    model = build_model(own, fetch_weights(own))
    expected, found = forward_poolings(timms, record, images), forward_poolings(model, own, images)
    assert list(found) == list(pooling_widths(model, own)) == ["pooled", "mid"]
    assert torch.equal(found["mid"], expected["mid"])
    assert torch.equal(found["pooled"], expected["pooled"])
    named = Backbone.custom(plain, name="own", size=64, poolings="pooled")
    assert list(forward_poolings(build_model(named, None), named, images)) == ["pooled"]


@pytest.mark.parametrize(
    ("answer", "poolings", "names"),
    [
        (lambda x: x.flatten(1), "projected", ["projected"]),
        (lambda x: (x.mean((2, 3)), x.amax((2, 3))), ["mean", "largest"], ["mean", "largest"]),
        (lambda x: {"a": x.mean((2, 3)), "b": x.amax((2, 3)), "c": x}, ["b", "a"], ["b", "a"]),
        (lambda x: x, lambda network, x: {"red": network(x).mean((2, 3))[:, :1]}, ["red"]),
    ],
)
def test_poolings_are_named_or_computed(answer: Any, poolings: Any, names: list[str]) -> None:
    backbone = custom(answer, poolings=poolings, card_pooling="+".join(names))
    model = build_model(backbone, fetch_weights(backbone))
    found = forward_poolings(model, backbone, torch.randn(3, 3, 16, 16))
    assert list(found) == list(pooling_widths(model, backbone)) == names
    assert backbone.embedding_dim == sum(values.shape[1] for values in found.values())
    assert torch.equal(
        model(torch.ones(1, 3, 16, 16)), model.forward_head(model.forward_features(torch.ones(1, 3, 16, 16)))
    )


def test_the_digest_is_that_of_names_types_shapes_and_bytes() -> None:
    def digest(**buffers: Tensor) -> str:
        module = nn.Module()
        for name, values in buffers.items():
            module.register_buffer(name, values)
        return state_digest(module)

    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    digests = [
        digest(a=zeros, b=ones),
        digest(b=ones, a=zeros),
        digest(a=zeros, c=ones),
        digest(a=zeros.int(), b=ones),
        digest(a=zeros.T.contiguous(), b=ones),
        digest(a=zeros + 1e-9, b=ones),
        digest(a=zeros),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(a=zeros.clone(), b=torch.ones(3, 2).T) == digests[0]  # whatever lies where in memory
    assert digest(a=torch.tensor(1.0, dtype=torch.bfloat16)) != digest(a=torch.tensor(2.0, dtype=torch.bfloat16))


def test_what_is_done_to_the_network_later_changes_nothing(tmp_path: Path) -> None:
    network = Wide(lambda x: x.flatten(1)).train()
    backbone = Backbone.custom(network, name="own", size=16)
    network.scale.data.fill_(5)
    model = build_model(backbone, fetch_weights(backbone))
    assert not model.training
    assert float(model.network.scale) == 1  # type: ignore[union-attr,arg-type]
    model.network.scale.data.fill_(7)  # type: ignore[union-attr,operator]
    assert float(build_model(backbone, None).network.scale) == 1  # type: ignore[union-attr,arg-type]
    assert network.training


def test_a_checkpoint_is_loaded_strictly_and_its_digest_recorded(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"module.scale": torch.full((1,), 3.0)}, path)
    backbone = custom(lambda x: x.flatten(1), weights=path)
    weights = fetch_weights(backbone)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    model = build_model(backbone, weights)
    assert float(model.network.scale) == 3  # type: ignore[union-attr,arg-type]
    save_file({"scales": torch.full((1,), 3.0)}, path)
    with pytest.raises(UserError, match="do not fit own"):
        build_model(backbone, fetch_weights(backbone))


# -------------------------------------------------------------------------------------------------------------- targets


def test_a_network_without_numbered_blocks_says_what_can_be_adapted() -> None:
    def adapt(network: nn.Module) -> None:
        add_adapters(CustomNetwork(network, None, 0), LoraOptions(), fold_models=fold_models([0], 2))

    plain = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(
        UserError, match=r"no module of this Sequential\. It has no nn\.Linear .*`method='full'`.*'head'"
    ):
        adapt(plain)
    named = nn.ModuleDict({"stem": plain, "mixer": nn.Conv2d(4, 4, 1), "attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(UserError, match=r"of this ModuleDict\. .*`lora_targets`.*, such as network\.mixer\.$"):
        adapt(named)


def test_targets_are_the_familys_behind_a_prefix_else_layers_in_blocks() -> None:
    def targets(network: nn.Module) -> set[str]:
        model = CustomNetwork(network, None, 0)
        pattern = default_targets(model)
        return {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}

    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, num_classes=0, embed_dim=8, depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1), window_size=2,
    )  # fmt: skip
    leaves = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"network.visual.layers.{k}.blocks.0.{leaf}" for k in range(4) for leaf in leaves}
    assert targets(nn.ModuleDict({"visual": swin})) == expected
    # torchvision's: attention reads its weights without calling them
    vit = VisionTransformer(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8)
    assert targets(vit) == {f"network.encoder.layers.encoder_layer_{k}.mlp.{leaf}" for k in (0, 1) for leaf in (0, 3)}
    # an EfficientNet: from the third stage on, without squeeze and excitation
    lite = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    found = targets(lite)
    assert found
    assert all(re.fullmatch(r"network\.blocks\.[2-6]\.\d\.conv_pwl?", name) for name in found)
