"""Is the dry run true: modules, parameters, and memory as a real step keeps it?"""

import pytest
import torch

from extract.backbones import build_model, find_backbone
from features.console import UserError
from finetune.lora import LoraOptions
from finetune.network import Network
from finetune.options import ComputeOptions, FinetuneOptions
from finetune.plan import make_plan

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


def test_activations_are_those_of_a_real_step():
    options = FinetuneOptions(view="full@64", batch_size=2, precision="fp32")
    plan = make_plan(options, COMPUTE)
    backbone = find_backbone(options.model)
    network = Network(build_model(backbone, None), backbone, method="lora", lora=LoraOptions(), folds=range(5), seed=0)
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
