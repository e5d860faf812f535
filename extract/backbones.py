"""How does a model's name become a network that turns patches into embeddings?

The records are in extract/registry.py. This file finds one, fetches and reads its weights, builds the network in timm,
and loads every tensor strictly. `extract.pooling` pools the network's output.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers.mlp import GluMlp, SwiGLUPacked
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from extract import hub
from extract.checkpoints import common_prefix, first_names, network_tensors, read_checkpoint
from extract.custom import CustomNetwork, NetworkError, is_code, raised, run_code
from extract.keymaps import KEYMAPS, TIMM_RAISES, KeyMapError, StateDict
from extract.pooling import default_pooling, forward_poolings, keep_middle, pooling_width, pooling_widths
from extract.registry import BACKBONES as BACKBONES
from extract.registry import IMAGENET_MEAN, IMAGENET_STD, NATURAL_IMAGES
from extract.registry import Backbone as Backbone
from extract.registry import list_models as list_models
from features.console import UserError, nearest, say
from features.device import out_of_memory


@dataclass(frozen=True)
class Weights:
    """A file of weights.

    Attributes:
        path: the file.
        sha256: the digest of its bytes.
        revision: a commit of the hub, a package version, or "local" for a file whose digest is not the record's.
        source: where it comes from: the hub, an installed package, or the user. "code" means that the user's code has
            loaded them: there is no file, and the digest is that of the tensors.
    """

    path: Path
    sha256: str
    revision: str
    source: Literal["hub", "package", "file", "code"]


# ---------------------------------------------------------------------------------------------------------- finding


def find_backbone(name: str, *, run_file: bool = False) -> Backbone:
    """Find the record of a registered name, of `timm/<name>`, of `hf-hub:<org>/<repo>[@revision]`, or of a file.

    For a repository its config.json is read through the hub. One of the registry keeps its record instead, because
    those files leave out arguments that decide the features.

    Args:
        name: the model.
        run_file: whether the user has named it, so that a Python file may be run (`extract.custom.run_code`). A name
            that a run or a store says has not been.

    >>> find_backbone("uni")
    Backbone('uni': vit_large_patch16_224, 303.4 M parameters, 1,024 numbers by cls)
    >>> find_backbone("timm/resnet18.a1_in1k").input_size
    224

    Raises:
        UserError: unknown name (the message names the nearest), a repository that timm cannot build without running
            code from it, a file that may not be run, or any of `run_code`.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if name.startswith("timm/"):
        return _from_timm(name)
    if name.startswith("hf-hub:"):
        return _from_hub(name)
    if is_code(name) and run_file:
        return run_code(name)
    if is_code(name):
        raise UserError(
            f"'{name}' is Python code, which is run only where you name it: as a command's `model`, in Python by "
            "find_backbone(name, run_file=True). What a run, a store or a plan names is not run."
        )
    raise UserError(
        f"unknown model '{name}'.{_suggestion(name)} `fm-extract --list-models` lists the registered ones; "
        "timm/<name>, hf-hub:<org>/<repo>[@revision] and a Python file of your own work too."
    )


def recorded_backbone(name: str, revision: str, *, named: Sequence[Backbone], where: object) -> Backbone:
    """Find the backbone of a run or a store. What these record makes no code run.

    Args:
        name, revision: as recorded.
        named: those of the user's own that the user has named, of which one is taken that is called so.
        where: what has recorded it, for messages.

    Raises:
        UserError: one of a user's own that is not among `named`; and as `find_backbone`.
    """
    if own := next((backbone for backbone in named if backbone.name == name), None):
        return own
    if name in BACKBONES or name.startswith(("timm/", "hf-hub:")):
        return find_backbone(name)
    found = f", found {', '.join(backbone.name for backbone in named)}" if named else ""
    raise UserError(
        f"{where} was made by '{name}', a model of a user's own ({revision}){found}. Code is run only if you name it, "
        "not because a run does: give its file by `model=PATH`."
    )


def _suggestion(name: str) -> str:
    """Make a sentence of what an unknown name may mean: another spelling, a page of the hub, a timm name, a file."""
    name = re.sub(r"^https?://[^/]+/|^hf[-_]hub:|/(tree|blob|resolve)/.*$|/$", "", name)
    if Path(name).suffix in _SUFFIXES:
        return " A file of weights is passed as `weights`, beside the `model` that it is of."
    names = {_folded(known): known for known in BACKBONES}
    known = names | {_folded(backbone.hub_id): backbone.name for backbone in BACKBONES.values() if backbone.hub_id}
    of_timm = {_folded(arch): f"timm/{arch}" for arch in timm.list_models()}
    arch, _, tag = name.rpartition("/")[2].partition(".")
    if found := known.get(_folded(name)):
        return f" Did you mean {found}?"
    if found := of_timm.get(_folded(arch)):
        return f" Did you mean {found}{'.' * bool(tag)}{tag}?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return f" For a repository of the hub write hf-hub:{name}."
    return nearest(name.lower(), BACKBONES)


def _folded(name: str) -> str:
    return re.sub(r"[\s_.-]", "", name.lower())


def _from_timm(name: str) -> Backbone:
    model_name = name.removeprefix("timm/")
    arch, _, tag = model_name.partition(".")
    if not timm.is_model(arch):
        raise UserError(f"timm {timm.__version__} has no model '{model_name}'.{nearest(arch, timm.list_models())}")
    tags = [listed.partition(".")[2] for listed in timm.list_pretrained(f"{arch}.*")]
    if not tags or (tag and tag not in tags):
        raise UserError(
            f"timm {timm.__version__} has no weights '{model_name}'. "
            + (f"There are {', '.join(f'timm/{arch}.{listed}' for listed in tags)}." if tags else "There are none.")
        )
    pretrained = timm.get_pretrained_cfg(model_name)
    if pretrained is None or not pretrained.hf_hub_id:
        raise UserError(f"the weights of '{model_name}' are not on the hub, the one place mitofm fetches from.")
    config = asdict(pretrained)
    return _unregistered(
        name, config["hf_hub_id"], arch, {}, config, weight_file=config.get("hf_hub_filename") or "model.safetensors"
    )


def _from_hub(name: str) -> Backbone:
    match = re.fullmatch(r"hf-hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", name)
    if match is None:
        raise UserError(f"'{name}' is not of the form hf-hub:<org>/<repo> or hf-hub:<org>/<repo>@<revision>.")
    repo, revision = match["repo"], match["revision"]
    for backbone in BACKBONES.values():
        if backbone.hub_id.lower() == repo.lower():
            if revision in (None, backbone.revision):
                return replace(backbone, name=name)
            return replace(backbone, name=name, revision=revision, sha256=None)
    file = hub.fetch_file(repo, "config.json", revision=revision or "main")
    try:
        config = json.loads(file.path.read_text())
        arch = config["architecture"]
        # Older files are the pretrained_cfg themselves.
        pretrained, kwargs = config.get("pretrained_cfg", config), config.get("model_args") or {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{repo} is not a timm model: its config.json names no timm architecture. mitofm runs no code from "
            "the hub, so other repositories need a record in extract/registry.py (docs/models.md says how)."
        ) from None
    if not timm.is_model(arch):
        raise UserError(f"{repo} asks for the architecture '{arch}', which timm {timm.__version__} does not have.")
    # The weights are taken from the very commit whose configuration was read.
    return _unregistered(name, repo, arch, kwargs, pretrained, revision=file.commit)


def _unregistered(
    name: str, hub_id: str, arch: str, kwargs: Mapping[str, Any], config: Mapping[str, Any], **known: str
) -> Backbone:
    """Make a record from timm's description of a checkpoint (`pretrained_cfg`).

    The parameters are counted on a network without memory (torch's device "meta").
    """
    size = int((config.get("input_size") or (3, 224, 224))[-1])
    arguments = {key: value for key, value in kwargs.items() if key != "num_classes"}
    if config.get("fixed_input_size"):
        arguments.setdefault("img_size", size)
    interpolation = config.get("interpolation")
    record = partial(
        Backbone,
        name=name,
        title=name,
        hub_id=hub_id,
        layout="timm-hub",
        arch=arch,
        kwargs=arguments,
        input_size=size,
        resize=math.floor(size / (config.get("crop_pct") or 1.0)),
        mean=tuple(config.get("mean") or IMAGENET_MEAN),
        std=tuple(config.get("std") or IMAGENET_STD),
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
        mpp=NATURAL_IMAGES,
        gflops=None,
        licence=str(config.get("license") or "see its page"),
        **known,  # type: ignore[arg-type]
    )
    with torch.device("meta"):
        model = _create(record(n_parameters=0, embedding_dim=0), dynamic=False).eval()
    pooling = default_pooling(model)
    backbone = record(
        card_pooling=pooling,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding_dim=pooling_width(model, pooling),
    )
    check_forward(model, backbone, size)
    return backbone


# ---------------------------------------------------------------------------------------------------------- weights


def fetch_weights(backbone: Backbone, *, weights: Path | None = None) -> Weights:
    """Fetch the weights file of a model: the given one, the installed package's, or the hub's at the record's revision.

    A file of the hub or the package must have the record's digest, or where the record has none, the one that the hub
    gives. A file given by the user (from a mirror, or converted) may have any digest: it is recorded, and loading
    checks names and shapes as for every file.

    Raises:
        UserError: no such file, another digest than the record's, or any of `hub.fetch_file`.
    """
    argument = "`weights`"
    if weights is None and backbone.network is not None:
        if backbone.sha256 is not None:
            return Weights(Path(), backbone.sha256, backbone.revision, "code")
        weights, argument = Path(backbone.weight_file), "Backbone.custom(..., weights=...)"
    if weights is not None:
        if weights.is_dir():
            files = sorted(path.name for path in weights.iterdir() if path.suffix in _SUFFIXES)
            raise UserError(
                f"{weights}: a folder. {argument} takes one file of it"
                + (f": {', '.join(files[:5])}." if files else ", a safetensors or PyTorch file; it holds none.")
            )
        if not weights.is_file():
            raise UserError(f"{weights}: no such weights file ({argument} takes a .safetensors, .bin or .pth file).")
        try:
            digest = hub.sha256_of(weights)
        except OSError as error:
            raise UserError(f"{weights}: cannot be read ({error.strerror}).") from None
        known = digest == backbone.sha256 or backbone.network is not None
        return Weights(weights, digest, backbone.revision if known else "local", "file")
    expected = backbone.sha256
    if not backbone.hub_id:
        fetched = Weights(_file_of_package(backbone), "", backbone.revision, "package")
    else:
        file = _fetch_from_hub(backbone)
        fetched = Weights(file.path, "", file.commit, "hub")
        expected = expected or hub.published_sha256(file.path)
    digest = hub.sha256_of(fetched.path)
    if expected is not None and digest != expected:
        # The file itself is named and not the link to it: with only the link gone, the cache would serve it again.
        raise UserError(
            f"{fetched.path.resolve()}: these are not the published weights of {backbone.name}. SHA-256 {digest}, "
            f"expected {expected}. Delete the file and run again; if it stays, pass a file that you trust as `weights`."
        )
    return replace(fetched, sha256=digest)


def _file_of_package(backbone: Backbone) -> Path:
    found = find_spec(backbone.package)
    if found is None or found.origin is None:
        raise UserError(
            f"{backbone.name}: its weights are in the Python package {backbone.package}, which is not installed. It "
            "comes with mitofm: install mitofm again, or that package."
        )
    return Path(found.origin).parent / "models" / backbone.weight_file


_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar"}


def _fetch_from_hub(backbone: Backbone) -> hub.HubFile:
    fetch = partial(hub.fetch_file, backbone.hub_id, revision=backbone.revision, licence=backbone.licence)
    first, *others = weight_files(backbone)
    try:
        return fetch(first)
    except hub.MissingFile:
        if not others:
            raise
        return fetch(others[0])


def weight_files(backbone: Backbone) -> list[str]:
    """List the names under which a repository may hold the weights, in the order to ask for them."""
    if backbone.name in BACKBONES:
        return [backbone.weight_file]
    names = list(dict.fromkeys((backbone.weight_file, "pytorch_model.bin")))  # older repositories have the second
    # The cached one comes first: a gate or a broken connection refuses the question for the other.
    return sorted(names, key=lambda name: hub.cached_commit(backbone.hub_id, name, revision=backbone.revision) is None)


# A classifier is no part of the features. By exact name: ConvNeXt's `head.norm` is one.
_CLASSIFIER = re.compile(r"(head|head\.fc|head_dist|fc|classifier|(head|fc|classifier)\.\d+)\.(weight|bias)")
# Nor is what pretraining alone uses, in DINO, iBOT and masked autoencoders.
_PRETRAINING = re.compile(r"mask_token|(dino_head|ibot_head)\..+|decoder_(pos_embed|\w+\..+)")


# --------------------------------------------------------------------------------------------------------- building


def build_model(backbone: Backbone, weights: Weights | None, *, dynamic: bool = False) -> nn.Module:
    """Build a network in eval mode, frozen, float32, on the CPU.

    Args:
        backbone: the record.
        weights: what to load, every tensor strictly; None leaves random weights (tests, benchmarks), or those that the
            user's own network has.
        dynamic: accept other input sizes than the record's.

    Raises:
        UserError: if the checkpoint does not fit (the message gives tensors, counts and the likely cause), a gated MLP
            is without SiLU, or an architecture of fixed input size is to be `dynamic`.
    """
    if backbone.network is not None:
        return _copy_of_custom(backbone.network, weights, backbone)
    if weights is None:
        model = _create(backbone, dynamic)
    else:
        # Drawing random weights first would take half a minute for a billion parameters, so the network is built
        # without memory (on "meta") and takes over the file's tensors. That does not work for networks with computed
        # buffers (rotary phases, window indices), which are in no file.
        with torch.device("meta"):
            model = _create(backbone, dynamic)
        if not model.state_dict().keys() >= {name for name, _ in model.named_buffers()}:
            model = _create(backbone, dynamic)
        _load(model, _fitting(model, weights.path, backbone), weights.path, backbone)
    _check_gated_mlp(model, backbone)
    model.eval().requires_grad_(False)
    keep_middle(model, backbone)
    return model


def _copy_of_custom(own: CustomNetwork, weights: Weights | None, backbone: Backbone) -> nn.Module:
    """Copy a network of the user's own, on "meta" where networks are built there, and load a file of weights."""
    model = copy.deepcopy(own)
    if weights is not None and weights.source != "code":
        _load(model.network, _fitting(model.network, weights.path, backbone), weights.path, backbone)
        model.float()
    if torch.get_default_device().type == "meta":
        model.to("meta")
    model.eval().requires_grad_(False)
    keep_middle(model, backbone)
    return model


def _create(backbone: Backbone, dynamic: bool) -> nn.Module:
    arguments = {**backbone.kwargs, "num_classes": 0}
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = _LAYERS.get(arguments["mlp_layer"], arguments["mlp_layer"])
    family = timm.models.model_entrypoint(backbone.arch).__module__.rpartition(".")[2]
    if dynamic:
        arguments |= _DYNAMIC.get(family, {})
    try:
        model: nn.Module = timm.create_model(backbone.arch, pretrained=False, **arguments)
    except TypeError as error:
        raise UserError(f"{backbone.name}: timm {timm.__version__} cannot build {backbone.arch}: {error}.") from error
    if dynamic and family not in _DYNAMIC and hasattr(model, "patch_embed"):
        raise UserError(
            f"{backbone.name}: {backbone.arch} takes {backbone.input_size} px images only. Ask for a view of that "
            "input size, or take another model."
        )
    return model


_LAYERS = {"SwiGLUPacked": SwiGLUPacked}  # records are JSON values; timm wants the class
# Arguments that free an architecture from its image size; convolutional networks need none.
_DYNAMIC: Mapping[str, dict[str, Any]] = {
    "vision_transformer": {"dynamic_img_size": True},
    "eva": {"dynamic_img_size": True},
    "swin_transformer": {"strict_img_size": False},
}


def _fitting(model: nn.Module, path: Path, backbone: Backbone) -> StateDict:
    """Read the network's tensors under timm's names, without classifier; resample positions, if the record says so."""
    expected = model.state_dict()

    def convert(tensors: StateDict) -> StateDict:
        return KEYMAPS[backbone.layout](tensors, model)

    tensors = network_tensors(path, read_checkpoint(path), model, convert)
    try:
        converted = convert(tensors)
    except KeyMapError as error:
        raise UserError(
            f"{path}: these weights do not fit {backbone.name} ({backbone.arch}): {error}. The file's tensors are "
            f"{first_names(tensors)}."
        ) from None
    state = {name: value for name, value in converted.items() if name in expected or not _CLASSIFIER.fullmatch(name)}
    if pretraining := [name for name in state if name not in expected and _PRETRAINING.fullmatch(name)]:
        say(f"{path}: left out what only pretraining uses: {first_names(pretraining)}.")
        state = {name: value for name, value in state.items() if name not in pretraining}
    if backbone.resample_pos_embed and "pos_embed" in state and "pos_embed" in expected:
        grid = model.patch_embed.grid_size  # type: ignore[union-attr]
        n_prefix = expected["pos_embed"].shape[1] - math.prod(grid)  # type: ignore[arg-type]
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=grid, num_prefix_tokens=n_prefix)
    return state


def _load(model: nn.Module, state: StateDict, path: Path, backbone: Backbone) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected]
    misshaped = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    if missing or unexpected or misshaped:
        differences = []
        if missing:
            differences.append(f"{len(missing)} tensors are missing (first: {missing[0]})")
        if unexpected:
            differences.append(f"{len(unexpected)} are unknown to it (first: {unexpected[0]})")
        if misshaped:
            name = misshaped[0]
            differences.append(
                f"{len(misshaped)} have another shape (first: {name}, {shapes[name]} in the file, {expected[name]} in "
                "the model)"
            )
        raise UserError(
            f"{path}: these weights do not fit {backbone.name} ({backbone.arch}): {', '.join(differences)}. "
            f"{_likely_cause(missing, unexpected, misshaped, len(expected))}"
            + (f" All its names begin with '{prefix}'." if unexpected and (prefix := common_prefix(shapes)) else "")
        )
    model.load_state_dict(state, strict=True, assign=True)


def _likely_cause(missing: list[str], unexpected: list[str], misshaped: list[str], n_expected: int) -> str:
    def any_in(names: list[str], part: str) -> bool:
        return any(part in name for name in names)

    if any_in(unexpected, ".lora_A."):
        return "It holds LoRA adapters beside the weights: merge them (peft: merge_and_unload()) and save the result."
    if len(missing) == n_expected:
        return "Likely a file of another model, or in another layout than the record says."
    if any_in(unexpected, ".ls1.gamma"):
        return "Likely LayerScale is in the weights but not in the model: the record needs init_values=1e-5."
    if any_in(missing, ".ls1.gamma"):
        return "Likely the model has LayerScale and the weights do not: the record must not set init_values."
    if any_in(missing, "fc_norm."):
        return "Likely global_pool='avg' has moved the final norm into the head: the record needs global_pool='token'."
    if any_in(misshaped, ".mlp.fc"):
        return (
            "Likely one of the two has a gated MLP: SwiGLU weights need mlp_layer='SwiGLUPacked', act_layer='silu' and "
            "their own mlp_ratio."
        )
    if any_in(misshaped, "pos_embed"):
        return (
            "Likely weights for another image size or patch size, or with other register tokens: set img_size as "
            "trained, or resample_pos_embed=True."
        )
    return "Likely a file of another model."


def _check_gated_mlp(model: nn.Module, backbone: Backbone) -> None:
    """Refuse a SwiGLU network whose gate is not SiLU: with timm's default GELU it loads, but its features are wrong."""
    for module in model.modules():
        if isinstance(module, GluMlp) and not module.gate_last and not isinstance(module.act, nn.SiLU):
            raise UserError(
                f"{backbone.name}: its gated MLP is built with {type(module.act).__name__} instead of SiLU, which "
                "loads but computes other features. The record needs act_layer='silu' beside mlp_layer."
            )


def check_input_size(model: nn.Module, backbone: Backbone, size: int) -> None:
    """Refuse an input edge the patch embedding cannot cut into whole patches.

    Raises:
        UserError: naming the nearest sizes that work.
    """
    patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch_size is None:
        return
    edge = int(patch_size[0] if isinstance(patch_size, (tuple, list)) else patch_size)
    if size % edge:
        lower = max(size // edge, 1) * edge
        raise UserError(
            f"{backbone.name}: {size} px is not a multiple of its {edge} px patches. Use {lower} or {lower + edge}."
        )


def check_forward(model: nn.Module, backbone: Backbone, size: int) -> None:
    """Pass one image of `size` pixels through a network, before patches are read or, on "meta", weights fetched.

    Raises:
        UserError: as `check_input_size`; a network that takes no image of that size, whose output cannot be pooled, or,
            outside the registry, whose card's embedding would not be timm's own.
    """
    check_input_size(model, backbone, size)
    device = next(model.parameters()).device
    image = torch.linspace(-1, 1, 3 * size * size, device=device).view(1, 3, size, size)
    try:
        with torch.inference_mode():
            poolings = forward_poolings(model, backbone, image)
            features = model.forward_features(image)  # type: ignore[operator]
            own = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    except TIMM_RAISES as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        if isinstance(error, NetworkError) and size == backbone.input_size:
            raise
        own_size = f"Ask for a view of its own {backbone.input_size} px, or take another model."
        remedy = "Take another model." if size == backbone.input_size else own_size
        raise UserError(
            f"{backbone.name}: {backbone.arch} cannot embed an image of {size} px ({raised(error)}). {remedy}"
        ) from None
    embedding = torch.cat([poolings[pooling] for pooling in backbone.card_pooling.split("+")], dim=1)
    widths = {pooling: values.shape[1] for pooling, values in poolings.items()}
    same = widths == pooling_widths(model, backbone)
    if same and not _is_registered(backbone):
        same = own.shape == embedding.shape and (own.is_meta or _close(own, embedding))
    if not same:
        raise UserError(
            f"{backbone.name}: {backbone.arch} makes its embedding, {tuple(own.shape)}, in another way than by "
            f"{backbone.card_pooling} pooling, {tuple(embedding.shape)}. Take another model."
        )


def _close(one: Tensor, other: Tensor) -> bool:
    one, other = one.float().nan_to_num(), other.nan_to_num()  # NaN is refused when a patch gives it
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def _is_registered(backbone: Backbone) -> bool:
    return any(known.hub_id == backbone.hub_id for known in BACKBONES.values())
