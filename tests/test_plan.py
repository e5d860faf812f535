"""Is the dry run true: modules, parameters, and memory as a real step keeps it?"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from extract.backbones import build_model, find_backbone
from features.console import UserError
from features.folds import fold_models
from finetune import options as training_options
from finetune.lora import LoraOptions
from finetune.network import Network
from finetune.options import ComputeOptions, FinetuneOptions, training_precision
from finetune.plan import make_plan
from finetune.recipes import RECIPES

COMPUTE = ComputeOptions(device="cpu")


def test_the_adapted_modules_and_counts_are_those_of_the_card():
    plan = make_plan(FinetuneOptions(model="h-optimus-1", precision="fp32"), COMPUTE)
    assert plan.n_parameters == find_backbone("h-optimus-1").n_parameters
    assert len(plan.modules) == 40 * 4
    assert plan.modules[0].name == "blocks.0.attn.qkv"
    assert (plan.modules[0].n_in, plan.modules[0].n_out) == (1536, 3 * 1536)
    assert sum(module.n_trained for module in plan.modules) == 7_864_320  # the published count for rank 8
    assert plan.n_trained == 7_864_320 + 2 * 1536 + 2
    assert plan.rows_mb == pytest.approx(5 * 5 * 4 * plan.n_trained / 2**20)


@pytest.mark.parametrize(("method", "n_backbone"), [("head", 0), ("full", 3_371_008)])
def test_other_methods_adapt_nothing(method, n_backbone):
    plan = make_plan(FinetuneOptions(method=method), COMPUTE)
    assert not plan.modules
    assert plan.n_trained == n_backbone + 2 * 1280 + 2  # running statistics are not trained


def test_classes_that_are_named_are_counted():
    options = FinetuneOptions(method="head", classes=("low", "middle", "high"))
    assert make_plan(options, COMPUTE).n_trained == 3 * 1280 + 3
    assert make_plan(FinetuneOptions(method="head", train="demo-phases"), COMPUTE).n_trained == 9 * 1280 + 9


def test_folds_by_domain_are_as_many_as_the_domains(tmp_path):
    lines = ["path,label,group,domain"]
    for k, centre in enumerate(("Oslo", "Bern", "Rome") * 4):
        Image.new("RGB", (32, 32), (20 * k, 0, 0)).save(tmp_path / f"{k}.png")
        lines.append(f"{k}.png,{('low', 'middle', 'high', 'top')[k // 3]},{k},{centre}")
    (tmp_path / "own.csv").write_text("\n".join(lines))
    options = FinetuneOptions(method="head", train=str(tmp_path / "own.csv"), folds_by="domain")
    plan = make_plan(options, COMPUTE)
    assert plan.n_folds == 3
    assert plan.n_trained == 4 * 1280 + 4  # classes are counted too, once patches are read
    assert plan.rows_mb == pytest.approx(3 * 5 * 4 * plan.n_trained / 2**20)
    with pytest.raises(UserError, match="domain"):
        make_plan(replace(options, train="demo-phases", folds_by="scanner"), COMPUTE)


def test_activations_are_those_of_a_real_step():
    options = FinetuneOptions(view="full@64", batch_size=2, precision="fp32")
    plan = make_plan(options, COMPUTE)
    backbone = find_backbone(options.model)
    network = Network(
        build_model(backbone, None), backbone, method="lora", lora=LoraOptions(), fold_models=fold_models([0], 5)
    )
    sizes: dict[int, int] = {}
    alive = []

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.zeros(2, 3, 64, 64), [0], step=0)
    for tensor in (network.values, *network.parameters(), *network.buffers()):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    assert plan.kept_mb == pytest.approx(sum(sizes.values()) / 2**20, rel=0.05)


def test_more_folds_at_once_keep_more():
    one, five = (make_plan(FinetuneOptions(), ComputeOptions(device="cpu", folds_at_once=n)) for n in (1, 5))
    assert five.kept_mb == pytest.approx(5 * one.kept_mb)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(UserError, match="match no module"):
        make_plan(FinetuneOptions(lora=LoraOptions(targets="nothing")), COMPUTE)


def test_paths_of_a_training_are_recorded_for_any_folder_and_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = ComputeOptions(data=Path("data"), weights=Path("w.pt"), folds_at_once=2).as_record()
    assert (record["data"], record["weights"]) == (str(tmp_path / "data"), str(tmp_path / "w.pt"))
    back = ComputeOptions.from_record(record)
    assert back == ComputeOptions(data=tmp_path / "data", weights=tmp_path / "w.pt", folds_at_once=2)
    assert ComputeOptions.from_record(ComputeOptions().as_record()) == ComputeOptions()
    chosen = ComputeOptions(weights=Path("w.pt"), fast=False).as_record(defaults=False)
    assert chosen == {"weights": str(tmp_path / "w.pt"), "fast": False}
    assert ComputeOptions().as_record(defaults=False) == {}


@pytest.mark.parametrize(
    ("asked", "device", "expected"), [(None, "cpu", 1), (None, "cuda", 5), (2, "cpu", 2), (2, "cuda", 2), (9, "cpu", 5)]
)
def test_folds_at_once_are_at_most_all(asked, device, expected):
    assert ComputeOptions(folds_at_once=asked).resolved_folds_at_once(torch.device(device), 5) == expected


def test_auto_precision_trains_convolutions_of_a_cpu_in_fp32(monkeypatch):
    convolutional, transformer = find_backbone("efficientnet-lite0"), find_backbone("h-optimus-1")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for has_it, expected in ((True, ("fp32", "bf16", "bf16", "bf16")), (False, ("fp32",) * 4)):
        monkeypatch.setattr(training_options, "has_bf16", lambda device, has_it=has_it: has_it)
        pairs = ((convolutional, cpu), (convolutional, gpu), (transformer, cpu), (transformer, gpu))
        assert tuple(training_precision("auto", *pair) for pair in pairs) == expected
        assert training_precision("bf16", convolutional, cpu) == "bf16"


def test_the_users_view_goes_before_the_recipes_and_that_before_the_backbones():
    backbone = replace(find_backbone("h-optimus-1"), finetune_view="center48")
    assert FinetuneOptions().resolved_view(backbone).name == "center48"
    assert FinetuneOptions(recipe="paper").resolved_view(backbone).name == RECIPES["paper"].view == "full@224+imagenet"
    for recipe in RECIPES:
        assert FinetuneOptions(recipe=recipe, view="center64").resolved_view(backbone).name == "center64"
