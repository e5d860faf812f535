"""What is trained, and where do its numbers lie? A backbone with one classifier per member, by one of three methods.

A member is one of the models that a training makes: that of one seed, without the rows of one fold. Members are
numbered seed by seed (`features.folds.fold_models`), so with one seed their numbers are those of the folds.

- lora: one frozen backbone, an adapter and a classifier per member; a batch holds the images of several members.
- head: one frozen backbone, a classifier per member.
- full: the whole backbone is trained, so each member needs its own: the network holds a single one.

Everything that training changes is one matrix with a row per member, and the parameters are views into it. So an
optimiser steps a row, a checkpoint saves rows, and the epoch that a member keeps is a copy of its row.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from extract.backbones import Backbone, build_model
from extract.compute import compile_blocks, fastest, reformed, takes_openvino, worth_converting
from extract.openvino import OpenvinoNetwork
from extract.pooling import forward_poolings, pooling_widths
from features.folds import FoldModel
from finetune import weight_files
from finetune.dropout import WHOLE_BATCH, BatchRows, seed_of
from finetune.frozen import simplify
from finetune.lora import LoraOptions, adapters, add_adapters, cast_frozen, select_folds, trainable
from finetune.process_group import ProcessGroup, synchronize_batch_norms

Method = Literal["lora", "full", "head"]
METHODS: tuple[Method, ...] = ("lora", "full", "head")
MODEL_FILE = "model.safetensors"
HEAD_FILE = "head.safetensors"
_HEAD_SEED = 1  # keeps these generators apart from the adapters', which are seeded by (seed, fold)


class Network(nn.Module):
    """A backbone and the classifiers of some members.

    Attributes:
        backbone: the registry's record of the backbone.
        model: the timm network, adapted in place.
        n_classes: c, how many classes the classifiers tell apart.
        fold_models: seed and fold of all members of the training, by number.
        members: the number of each row's member.
        pooling: the embedding that the classifiers read. It is the card's; where the card joins two (Virchow), it is
            the class token alone, so that the classifier is timm's own and adapters load elsewhere.
        weight, bias: (n_rows, c, d) and (n_rows, c) classifiers.
        values: (n_rows, p) everything that training changes: trained parameters first, then running statistics.
        gradients: (n_rows, p_trained), filled by `gather_gradients`.
        copies: (n_rows, p_adapters) the adapters in half precision, made anew in every pass; None in fp32.
        frozen: what computes each member's poolings in evaluations, see `freeze`; empty for `model`.
        batch_rows: which images of each member's batch this process holds in a training step.
        n_synchronized_norms: how many batch norms wait for the other processes in every pass.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        *,
        method: Method,
        lora: LoraOptions,
        fold_models: Sequence[FoldModel],
        members: Sequence[int] | None = None,
        n_classes: int = 2,
    ) -> None:
        """Adapt `model`, which `build_model` has built and which lies on its device (or on meta), in place.

        Args:
            lora: the adapters' options; other methods ignore them.
            fold_models: of the training; a member's initial values depend on its seed and fold alone.
            members: numbers of those to hold: all, which is the default, for lora and head; a single one for full.
            n_classes: how many classes the classifiers tell apart.

        Raises:
            UserError: as `add_adapters` does.
            ValueError: members that the method cannot hold at once.
        """
        super().__init__()
        self.n_classes = n_classes
        self.fold_models = tuple(fold_models)
        self.members = tuple(range(len(fold_models)) if members is None else members)
        own = [self.fold_models[member] for member in self.members]
        if list(self.members) != list(range(len(own))) and (method == "lora" or len(own) != 1):
            raise ValueError(f"{method} cannot hold the members {list(self.members)} at once")
        if method == "full" and len(own) != 1:
            raise ValueError("full fine-tuning holds one member at a time")
        self.backbone, self.model, self.method = backbone, model, method
        self.batch_rows: BatchRows = WHOLE_BATCH
        self.n_synchronized_norms = 0
        self.copies: Tensor | None = None
        self.frozen: dict[int, nn.Module] = {}
        self._hooks: list[RemovableHandle] = []
        self._replicas: list[Network] = []
        self.pooling = backbone.card_pooling.split("+")[0]
        width = pooling_widths(model, backbone)[self.pooling]
        device = next(model.parameters()).device
        dtype = next(model.parameters()).dtype
        self._takes_openvino = takes_openvino(model, device, precision="fp32")  # before there are adapters
        stacked: list[Parameter] = []  # with a leading axis of members
        single: list[Tensor] = []  # of the one member of a full network
        if method == "lora":
            self.adapted = add_adapters(model, lora, fold_models=own)
            stacked += trainable(model)
        else:
            self.adapted = ()
            model.requires_grad_(method == "full")
            single += list(model.parameters()) if method == "full" else []
        heads = [_new_head(n_classes, width, *one) for one in own]
        self.weight = Parameter(torch.stack([weight for weight, _ in heads]).to(device, dtype))
        self.bias = Parameter(torch.stack([bias for _, bias in heads]).to(device, dtype))
        statistics = [b for b in model.buffers() if b.is_floating_point()] if method == "full" else []
        # Counters of batches change nothing, but would differ in a resumed training: files get the backbone's own.
        self._counters = {
            name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")
        }
        self._lay_out([*stacked, self.weight, self.bias], single, statistics)

    def _lay_out(self, stacked: list[Parameter], single: list[Tensor], statistics: list[Tensor]) -> None:
        """Move every tensor that training changes into one row per member, and leave views in their place."""
        n_rows = len(self.members)
        pieces = [(t, t.flatten(1)) for t in stacked] + [(t, t.reshape(1, -1)) for t in (*single, *statistics)]
        n_tensors = len(stacked) + len(single)
        n_trained = sum(flat.shape[1] for _, flat in pieces[:n_tensors])
        self._n_trained = n_trained
        self.values = torch.cat([flat.detach() for _, flat in pieces], dim=1)
        self.gradients = torch.zeros(n_rows, n_trained, dtype=self.values.dtype, device=self.values.device)
        start = 0
        for tensor, flat in pieces:
            end = start + flat.shape[1]
            tensor.data = self.values[:, start:end].view(tensor.shape)
            start = end
        self._trained = [tensor for tensor, _ in pieces[:n_tensors]]

    def replicas(self, n: int) -> list[Network]:
        """Return n networks, this one first, that threads can use at the same time; all share the same tensors.

        Which members a pass holds is written into the adapted modules, so each thread needs modules of its own. The
        gradients of all replicas add up in the same tensors. As long as each works on other members, the order of the
        additions does not change the bits.
        """
        tensors = [self.values, self.gradients, *self.parameters(), *self.buffers()]
        if self.copies is not None:
            tensors += [self.copies, *(copy for _, layer in adapters(self.model) for copy in layer.copies or ())]
        shared = {id(tensor): tensor for tensor in tensors}
        while len(self._replicas) < n - 1:
            self._replicas.append(copy.deepcopy(self, shared | {id(self._replicas): [], id(self._hooks): []}))
        return [self, *self._replicas[: n - 1]]

    def release(self) -> None:
        """Give the memory of all tensors back, whoever still holds the network; it is of no use afterwards."""
        self.forget_replicas()
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.grad = None
            tensor.data = tensor.new_empty(0)
        self.values = self.gradients = self.values.new_empty(0)
        self.copies = None

    def forget_replicas(self) -> None:
        """Discard the replicas; to be called before the modules change."""
        self._replicas.clear()

    def compute_in(self, precision: str, *, fold_norms: bool = True) -> bool:
        """Prepare for many passes in "fp32" or "bf16" (autocast). Afterwards nothing can be merged.

        On a CPU a frozen backbone with batch norms computes the same without them (`finetune.frozen`), unless
        `fold_norms` is False. Returns whether it does.
        """
        model = self.model
        has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        if fold_norms and has_norms and self.method != "full" and self.values.device.type == "cpu":
            self._simplify()
        if self.method == "lora" and precision == "bf16":
            self._round_frozen()
        return self.model is not model

    def _simplify(self) -> None:
        """Have the frozen backbone compute the same in fewer passes, if that reproduces it."""
        self.forget_replicas()
        if self.method == "lora":
            select_folds(self.model, [0])
        size = self.backbone.input_size
        example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.values)
        self.model = reformed(self.model, simplify, example=example.contiguous(memory_format=torch.channels_last))

    def _round_frozen(self) -> None:
        """Hold the frozen weights of adapted layers, and a copy of the adapters, in bf16."""
        cast_frozen(self.model, torch.bfloat16)
        factors = trainable(self.model)
        self.copies = self.values[:, : sum(factor[0].numel() for factor in factors)].to(torch.bfloat16)
        parts = torch.split(self.copies, [factor[0].numel() for factor in factors], dim=1)
        views = [part.view(factor.shape) for part, factor in zip(parts, factors, strict=True)]
        for (_, layer), A, B in zip(adapters(self.model), views[::2], views[1::2], strict=True):
            layer.copies = A, B

    def freeze(self, *, size: int, n_images: int, precision: str) -> bool:
        """Have OpenVINO compute members as plain frozen networks wherever they are evaluated, if it is faster.

        To be called when the members' weights are final, before `compute_in`; the classifiers may still change.

        Args:
            size: pixels along the edge of the input.
            n_images: that each member will evaluate, about.
            precision: to compute in.

        Returns:
            Whether it does: for convolutional networks in fp32 on a processor, where OpenVINO is installed and agrees,
            and where there are enough images.
        """
        if precision != "fp32" or not self._takes_openvino or not worth_converting(n_images, size=size):
            return False
        one = self.model if self.method != "lora" else None  # of all members
        frozen: dict[int, nn.Module] = {}
        for member in self.members:
            if one is None or not frozen:
                model = self.plain(member) if one is None else copy.deepcopy(one).eval()
                fast = fastest(
                    model, self.backbone, self.values.device, size=size, n_images=n_images, precision=precision
                )
            frozen[member] = fast
        if all(isinstance(fast, OpenvinoNetwork) for fast in frozen.values()):
            self.frozen = frozen
        return bool(self.frozen)

    def plain(self, member: int) -> nn.Module:
        """Make a plain timm network of a member of method "lora", adapters merged, without classifier."""
        model = build_model(self.backbone, None)
        model.load_state_dict(weight_files.merge(self.model, self.members.index(member)) | self._counters)
        return model

    def shard_batches(self, process_group: ProcessGroup, batch_size: int) -> None:
        """Have training steps hold this process's rows of each member's batch, and trained batch norms see all rows.

        Raises:
            UserError: a batch norm of an unknown kind.
        """
        self.forget_replicas()
        rows = process_group.shard_rows(batch_size)
        self.batch_rows = BatchRows(rows.start, rows.stop - rows.start, batch_size)
        if self.method == "full" and process_group.world_size > 1:
            self.n_synchronized_norms += synchronize_batch_norms(self.model, process_group)

    @property
    def has_random_layers(self) -> bool:
        """Whether layers of the backbone draw random numbers while training, as Swin's stochastic depth does."""
        drop_rates = [
            getattr(layer, "drop_prob", None) or getattr(layer, "p", 0.0)
            for layer in self.model.modules()
            if isinstance(layer, DropPath | nn.Dropout)
        ]
        return self.method == "full" and any(drop_rates)

    def seed_layers(self, *key: int) -> None:
        """Let what such layers draw follow from (seed, fold) and a key, by torch's own generators."""
        if self.has_random_layers:
            torch.manual_seed(seed_of(*self.fold_models[self.members[0]], *key))

    def compile_blocks(self) -> bool:
        """Have torch.compile translate equal blocks of the backbone at their first call; False if it has none."""
        self.forget_replicas()
        if not compile_blocks(self.model):
            return False
        # So that the first block, whose input nothing trains, is called as all others are.
        blocks = getattr(self.model, "blocks", None)
        if isinstance(blocks, nn.Sequential) and self.method == "lora":
            self._hooks.append(blocks.register_forward_pre_hook(_require_grad))
        return True

    @property
    def is_compiled(self) -> bool:
        """Whether `compile_blocks` has found blocks."""
        return any(module._compiled_call_impl is not None for module in self.model.modules())

    def forget_compiled(self) -> None:
        """Compute the blocks as before `compile_blocks`."""
        for module in self.model.modules():
            module._compiled_call_impl = None
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def n_trained(self) -> int:
        """Trained parameters of one member."""
        return self._n_trained

    def rows_of(self, members: Sequence[int]) -> slice | list[int]:
        """Find the rows of members: a slice where they lie one after the other, for a list has to go to the device."""
        rows = [self.members.index(member) for member in members]
        whole = rows == list(range(rows[0], rows[0] + len(rows)))
        return slice(rows[0], rows[0] + len(rows)) if whole else rows

    def clear_gradients(self) -> None:
        """Forget all gradients; to be called before a backward pass."""
        for parameter in self._trained:
            parameter.grad = None

    def gather_gradients(self) -> None:
        """Copy the gradients of all parameters into `gradients`; to be called after one or several backward passes."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
        torch.cat([gradient.reshape(len(self.members), -1) for gradient in gradients], dim=1, out=self.gradients)

    def forward(self, images: Tensor, members: Sequence[int], *, step: int | Tensor | None = None) -> Tensor:
        """Compute one output per class; logits are their differences.

        Args:
            images: (f * b, 3, h, w) normalised, member after member.
            members: the f members they belong to.
            step: identifies a training step, from which dropout follows: any number, or its (f,) `dropout_keys`. None
                evaluates.

        Returns:
            (f, b, c) in the type of the classifiers, float32.
        """
        rows = self.rows_of(members)
        if self.method == "lora":
            select_folds(self.model, members, step=step, rows=self.batch_rows)
            if self.copies is not None:
                # By `data`, as other replicas, whose backward pass may not have ended, hold views of other rows.
                self.copies.data[rows] = self.values[rows, : self.copies.shape[1]].to(self.copies.dtype)
        elif self.method == "full":
            self.model.train(step is not None)
        if step is None and self.frozen:
            parts = zip(members, images.chunk(len(members)), strict=True)
            features = torch.cat([self.frozen[member](part)[self.pooling] for member, part in parts])
        else:
            features = forward_poolings(self.model, self.backbone, images)[self.pooling].to(self.weight.dtype)
        # (f * b, d)
        with torch.autocast(images.device.type, enabled=False):
            return torch.baddbmm(
                self.bias[rows][:, None], features.view(len(members), -1, features.shape[1]), self.weight[rows].mT
            )

    def save_member(self, folder: Path, member: int) -> None:
        """Write the trained weights of one member.

        lora: an adapter as `peft` writes it; full: `model.safetensors`, the network under timm's names with its
        classifier; head: `head.safetensors`, "weight" (c, d) and "bias" (c,).

        Raises:
            UserError: the disk cannot be written.
        """
        row = self.members.index(member)
        head = {"weight": self.weight[row].detach(), "bias": self.bias[row].detach()}
        if self.method == "lora":
            weight_files.save_adapter(self.model, folder, fold=row, head=head, base_model=self.backbone.name)
        elif self.method == "full":
            self.save_merged(folder, member)
        else:
            weight_files.write_tensors(folder / HEAD_FILE, head)

    def save_merged(self, folder: Path, member: int) -> None:
        """Write one member as a plain timm network with its classifier, adapters added to the weights they adapt.

        The file's metadata hold the arguments of `timm.create_model` under "timm", as JSON.

        Raises:
            UserError: the disk cannot be written.
        """
        row = self.members.index(member)
        state = weight_files.merge(self.model, row) if self.method == "lora" else dict(self.model.state_dict())
        name = weight_files.classifier_name(self.model)
        state |= self._counters
        state |= {f"{name}.weight": self.weight[row].detach(), f"{name}.bias": self.bias[row].detach()}
        timm = {"architecture": self.backbone.arch, "kwargs": dict(self.backbone.kwargs), "num_classes": self.n_classes}
        own = self.backbone.network is not None  # then `backbone` builds it, not timm
        weight_files.write_tensors(folder / MODEL_FILE, state, {"custom" if own else "timm": json.dumps(timm)})

    def load_member(self, folder: Path, member: int) -> None:
        """Read the weights that `save_member` wrote.

        Raises:
            UserError: a missing, truncated or foreign file.
        """
        row = self.members.index(member)
        if self.method == "lora":
            path, head = folder, weight_files.load_adapter(self.model, folder, fold=row)
        elif self.method == "head":
            path = folder / HEAD_FILE
            head = weight_files.read_tensors(path)
        else:
            path = folder / MODEL_FILE
            tensors = weight_files.read_tensors(path)
            name = weight_files.classifier_name(self.model)
            head = {leaf: tensors.pop(f"{name}.{leaf}") for leaf in ("weight", "bias") if f"{name}.{leaf}" in tensors}
            weight_files.copy_tensors(tensors, self.model.state_dict(), path)
        weight_files.copy_tensors(head, {"weight": self.weight.data[row], "bias": self.bias.data[row]}, path)


def _require_grad(blocks: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if not torch.is_grad_enabled() or given[0].requires_grad:
        return None
    return given[0].detach().requires_grad_(), *given[1:]


def _new_head(n_classes: int, width: int, seed: int, fold: int) -> tuple[Tensor, Tensor]:
    """Draw a classifier's initial weight (c, d) and bias (c,) from the distribution that `nn.Linear` uses."""
    generator = torch.Generator().manual_seed(seed_of(seed, fold, _HEAD_SEED))
    bound = 1 / math.sqrt(width)
    weight, bias = torch.empty(n_classes, width), torch.empty(n_classes)
    return weight.uniform_(-bound, bound, generator=generator), bias.uniform_(-bound, bound, generator=generator)
