"""146 models of four libraries, made small from their configs, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import open_clip
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from tests.helpers import images, random

Inputs = Callable[[int], tuple[Mapping[str, Tensor], ...] | tuple[Tensor, ...]]


class Model(NamedTuple):
    """One of the sweep.

    Attributes:
        library: that it is of.
        name: there.
        make: makes it, always the same.
        size: height and width of its images.
        targets: what is adapted.
        feed: what else it takes, or in place of images: from their number, keywords of its forward pass.
    """

    library: str
    name: str
    make: Callable[[], nn.Module]
    size: int = 32
    targets: tuple[str, ...] = ("q", "v")
    feed: Callable[[int], dict[str, Tensor]] | None = None

    @property
    def key(self) -> str:
        return f"{self.library} {self.name}"

    @torch.no_grad()
    def built(self) -> nn.Module:
        """In eval mode, without zeros that would hide what an adapter does (heads, layer scales), and without values
        so large that a softmax hides it."""
        torch.manual_seed(0)
        model = self.make()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            deviation = 0.1 if parameter.dim() < 2 else min(0.1, 0.3 / max(1, parameter[0].numel()) ** 0.5)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=deviation)
        return model.eval()

    def inputs(
        self, count: int = 2, dtype: torch.dtype = torch.float32
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Positional and keyword arguments of a forward pass, of which floating-point ones have a dtype."""
        if self.feed is None:
            return (images(count, self.size, dtype=dtype),), {}
        return (), {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.feed(count).items()}


QKV = ("qkv",)

# What makes timm's models small: keywords of `create_model`, and the size of their images where it is not 32.
PLAIN = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
PLAIN_14 = PLAIN | {"img_size": 28}
NAFLEX = {"embed_dim": 48, "depth": 2, "num_heads": 3}
MAXXVIT = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 16}

TIMM: dict[str, dict[str, Any]] = {
    "aimv2_large_patch14_224": PLAIN_14,
    "beit3_base_patch16_224": PLAIN,
    "beit_base_patch16_224": PLAIN,
    "beitv2_base_patch16_224": PLAIN,
    "caformer_s18": {"size": 64, "shallow": True},
    "cait_xxs24_224": PLAIN,
    "coat_lite_tiny": {"img_size": 64, "embed_dims": (32, 32, 64, 64), "serial_depths": (1, 1, 1, 1)},
    "coatnet_0_224": MAXXVIT,
    "coatnet_0_rw_224": MAXXVIT,
    "convit_tiny": PLAIN | {"num_heads": 3},
    "crossvit_tiny_240": {
        "embed_dim": [24, 48],
        "depth": [[1, 1, 0], [1, 1, 0]],
        "num_heads": [3, 3],
        "mlp_ratio": [2, 2, 1],
        "size": 240,
    },
    "csatv2": {
        "size": 64,
        "dims": (16, 24, 32, 48),
        "depths": (1, 1, 2, 2),
        "transformer_depths": (0, 0, 1, 1),
        "targets": ("v",),
    },
    "davit_tiny": {"size": 64, "depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2)},
    "deit3_small_patch16_224": PLAIN,
    "deit_tiny_distilled_patch16_224": PLAIN,
    "deit_tiny_patch16_224": PLAIN,
    "edgenext_xx_small": {"size": 64, "depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    "efficientformer_l1": {"size": 224, "depths": (1, 1, 1, 2), "embed_dims": (16, 16, 32, 32)},
    "efficientformerv2_s0": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)},
    "efficientvit_b0": {"size": 64},
    "efficientvit_m0": {"img_size": 128},
    "eva02_base_patch14_224": PLAIN_14,
    "eva02_base_patch16_clip_224": PLAIN,
    "eva02_tiny_patch14_224": PLAIN_14,
    "eva_giant_patch14_224": PLAIN_14,
    "fastvit_sa12": {"size": 64},
    "flexivit_small": PLAIN,
    "focalnet_tiny_srf": {"size": 64, "shallow": True, "targets": ("fc1", "fc2")},
    "gcvit_xxtiny": {"img_size": 64, "window_ratio": (16, 16, 16, 32)},
    "hiera_small_abswin_256": {"img_size": 64, "embed_dim": 24, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 24, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "levit_128s": {"img_size": 128, "embed_dim": (32, 48, 64), "depth": (1, 1, 1)},
    "levit_conv_128s": {"img_size": 128, "embed_dim": (32, 48, 64), "depth": (1, 1, 1)},
    "maxvit_rmlp_nano_rw_256": MAXXVIT,
    "maxvit_tiny_tf_224": MAXXVIT,
    "mobilevit_xxs": {"size": 64},
    "mobilevitv2_050": {"size": 128},
    "mvitv2_base_cls": {"img_size": 64, "shallow": True},
    "mvitv2_tiny": {"img_size": 64, "shallow": True},
    "naflexvit_base_patch16_gap": NAFLEX,
    "naflexvit_base_patch16_parfac_gap": NAFLEX,
    "naflexvit_base_patch16_siglip": NAFLEX,
    "nest_tiny": {"img_size": 64, "shallow": True},
    "nextvit_small": {"size": 64, "depths": (2, 2, 5, 2)},
    "pit_ti_224": {"img_size": 64, "base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 2, 4)},
    "pit_ti_distilled_224": {"img_size": 64, "base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 2, 4)},
    "pvt_v2_b0": {"size": 64, "depths": (1, 1, 1, 1)},
    "pvt_v2_b2_li": {"size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 16, 40, 32)},
    "sam2_hiera_tiny": {
        "size": 64,
        "embed_dim": 24,
        "stages": (1, 1, 2, 1),
        "global_att_blocks": (3,),
        "window_spec": (4, 4, 4, 4),
    },
    "samvit_base_patch16_224": PLAIN,
    "swin_s3_tiny_224": {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "window_size": (4, 4)},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "embed_dim": 24,
        "depths": (2, 1),
        "num_heads": (1, 2),
        "window_size": 4,
    },
    "swinv2_cr_tiny_224": {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)},
    "swinv2_tiny_window8_256": {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)},
    "tiny_vit_5m_224": {"size": 224, "embed_dims": (16, 32, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
    "tnt_s_patch16_224": {
        "img_size": 32,
        "embed_dim": 48,
        "depth": 2,
        "inner_dim": 16,
        "num_heads_inner": 2,
        "num_heads_outer": 3,
    },
    "twins_pcpvt_small": {"img_size": 64, "embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1)},
    "twins_svt_small": {"img_size": 64, "embed_dims": (16, 32, 64, 128), "depths": (2, 2, 2, 2)},
    "visformer_tiny": {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": (1, 1, 1)},
    "vit_base_patch16_224": PLAIN,
    "vit_base_patch16_clip_224": PLAIN,
    "vit_base_patch16_clip_quickgelu_224": PLAIN,
    "vit_base_patch16_rope_reg1_gap_256": PLAIN,
    "vit_base_patch16_siglip_224": PLAIN,
    "vit_base_patch16_siglip_gap_224": PLAIN,
    "vit_base_patch32_224": PLAIN | {"img_size": 64},
    "vit_dpwee_patch16_reg1_gap_256": PLAIN,
    "vit_giant_patch14_dinov2": PLAIN_14,
    "vit_intern300m_patch14_448": PLAIN_14,
    "vit_large_patch16_224": PLAIN,
    "vit_large_patch16_lingbot": PLAIN,
    "vit_pe_core_tiny_patch16_384": PLAIN,
    "vit_pe_spatial_tiny_patch16_512": PLAIN,
    "vit_pwee_patch16_reg1_gap_256": PLAIN,
    "vit_relpos_small_patch16_224": PLAIN,
    "vit_small_patch14_dinov2": PLAIN_14,
    "vit_small_patch14_reg4_dinov2": PLAIN_14,
    "vit_small_patch16_18x2_224": PLAIN,
    "vit_small_patch16_224": PLAIN,
    "vit_small_patch16_dinov3": PLAIN,
    "vit_small_patch16_dinov3_qkvb": PLAIN,
    "vit_small_patch16_rope_224": PLAIN,
    "vit_small_patch16_rope_mixed_224": PLAIN,
    "vit_small_plus_patch16_dinov3": PLAIN,
    "vit_small_r26_s32_224": PLAIN | {"img_size": 64},
    "vit_so150m2_patch16_reg1_gap_256": PLAIN,
    "vit_so150m_patch16_reg4_gap_256": PLAIN,
    "vit_srelpos_small_patch16_224": PLAIN,
    "vit_tiny_patch16_224": PLAIN,
    "vit_wee_patch16_reg1_gap_256": PLAIN,
    "vitamin_small_224": {"img_size": 64, "embed_dim": 384, "depth": 2},
    "volo_d1_224": {"img_size": 64},
    "xcit_nano_12_p16_224": PLAIN,
}


def _timm(name: str, fields: dict[str, Any]) -> Model:
    given = dict(fields)
    size, targets = given.pop("size", given.get("img_size", 32)), given.pop("targets", ("q", "v"))
    shallow = given.pop("shallow", False)

    def make() -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **given)
        return _with_one_block(model) if shallow else model

    return Model("timm", name, make, size, targets)


def _with_one_block(model: nn.Module) -> nn.Module:
    """A model whose depth `create_model` cannot choose, with the first block of each stage."""
    for module in list(model.modules()):
        for name in ("blocks", "transformer_encoder"):
            blocks = getattr(module, name, None)
            if isinstance(blocks, nn.Sequential | nn.ModuleList):
                setattr(module, name, blocks[:1])
    return model


SMALL = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
IMAGES = SMALL | {"image_size": 32, "patch_size": 16, "num_labels": 5}
STAGES = {"depths": [1, 1, 1, 1], "num_labels": 5}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4}
FEATURES = {"out_features": ["stage1", "stage2"], "reshape_hidden_states": True}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
ENDS = {"bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 0}

# transformers' models: the names of their configs without "Config" where these are not their own, and their fields.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Aimv2VisionModel": ("Aimv2Vision", IMAGES),
    "BeitForImageClassification": ("Beit", IMAGES),
    "BeitForSemanticSegmentation": (
        "Beit",
        IMAGES | {"image_size": 64, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    ),
    "BlipVisionModel": ("BlipVision", IMAGES),
    "CLIPForImageClassification": ("CLIP", {"vision_config": IMAGES, "text_config": TEXT | ENDS, "num_labels": 5}),
    "CLIPModel": ("CLIP", {"vision_config": IMAGES, "text_config": TEXT | ENDS, "projection_dim": 24}),
    "CLIPVisionModel": ("CLIPVision", IMAGES),
    "CLIPVisionModelWithProjection": ("CLIPVision", IMAGES),
    "CvtForImageClassification": ("Cvt", {"embed_dim": [16, 24, 48], "depth": [1, 2, 3], "num_labels": 5}),
    "DINOv3ViTModel": ("DINOv3ViT", IMAGES),
    "DPTForDepthEstimation": ("DPT", {}),
    "DPTForSemanticSegmentation": ("DPT", {}),
    "Data2VecVisionForImageClassification": ("Data2VecVision", IMAGES),
    "DeiTForImageClassification": ("DeiT", IMAGES),
    "DeiTForImageClassificationWithTeacher": ("DeiT", IMAGES),
    "Dinov2Backbone": ("Dinov2", IMAGES | FEATURES),
    "Dinov2ForImageClassification": ("Dinov2", IMAGES),
    "Dinov2Model": ("Dinov2", IMAGES | {"use_swiglu_ffn": True}),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegisters", IMAGES),
    "FocalNetForImageClassification": ("FocalNet", {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1]}),
    "HieraForImageClassification": (
        "Hiera",
        {"image_size": [64, 64], "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "num_labels": 5},
    ),
    "IJepaForImageClassification": ("IJepa", IMAGES),
    "InternVLVisionModel": ("InternVLVision", IMAGES | {"image_size": [32, 32], "patch_size": [16, 16]}),
    "LevitForImageClassification": ("Levit", {"image_size": 128, "depths": [1, 1, 1], "num_labels": 5}),
    "MLCDVisionModel": ("MLCDVision", IMAGES | {"num_key_value_groups": 1}),
    "MobileViTForImageClassification": ("MobileViT", {"image_size": 128, "num_labels": 5}),
    "PvtForImageClassification": ("Pvt", {"image_size": 64, "hidden_sizes": [16, 32, 40, 64]} | STAGES),
    "PvtV2ForImageClassification": ("PvtV2", {"image_size": 64} | STAGES),
    "Sam2VisionModel": ("Sam2Vision", {}),
    "SamVisionModel": (
        "SamVision",
        IMAGES | {"window_size": 2, "global_attn_indexes": [1], "mlp_dim": 96, "output_channels": 16},
    ),
    "SegformerForImageClassification": (
        "Segformer",
        {"hidden_sizes": [16, 32, 40, 64], "num_attention_heads": [1, 2, 5, 8]} | STAGES,
    ),
    "Siglip2VisionModel": ("Siglip2Vision", SMALL | {"num_patches": 4, "patch_size": 4}),
    "SiglipForImageClassification": ("Siglip", {"vision_config": IMAGES, "text_config": TEXT, "num_labels": 5}),
    "SiglipVisionModel": ("SiglipVision", IMAGES),
    "SwinForImageClassification": ("Swin", WINDOWS | {"num_labels": 5}),
    "Swinv2ForImageClassification": ("Swinv2", WINDOWS | {"num_labels": 5}),
    "TimmWrapperForImageClassification": ("TimmWrapper", {}),
    "ViTForImageClassification": ("ViT", IMAGES),
    "ViTMAEForPreTraining": (
        "ViTMAE",
        IMAGES
        | {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        | {"decoder_intermediate_size": 48},
    ),
    "ViTMAEModel": ("ViTMAE", IMAGES),
    "ViTMSNForImageClassification": ("ViTMSN", IMAGES),
    "ViTModel": ("ViT", IMAGES),
    "VideoMAEForVideoClassification": ("VideoMAE", IMAGES | {"num_frames": 4, "tubelet_size": 2}),
    "VitDetModel": ("VitDet", IMAGES | {"pretrain_image_size": 32}),
    "VivitForVideoClassification": ("Vivit", IMAGES | {"num_frames": 4, "tubelet_size": [2, 16, 16]}),
    "YolosForObjectDetection": ("Yolos", IMAGES | {"image_size": [32, 32], "num_detection_tokens": 3}),
}


OTHER_TARGETS = {
    "BeitForSemanticSegmentation": ("[0-2].*.q_proj", "[0-2].*.v_proj"),  # what the last block gives is not used
    "FocalNetForImageClassification": ("fc1", "fc2"),  # it has no q and v
    "SiglipForImageClassification": ("q_proj", "v_proj"),  # its pooling's q and v go into nothing
}


def _fields(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config that are configs themselves."""
    if name.startswith("DPT"):
        return IMAGES | {
            "is_hybrid": False,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "fusion_hidden_size": 16,
            "neck_hidden_sizes": [16, 16, 16, 16],
            "use_auxiliary_head": False,
        }
    if name == "Sam2VisionModel":
        hiera = transformers.Sam2HieraDetConfig(
            image_size=[64, 64],
            hidden_size=16,
            blocks_per_stage=[1, 1, 2, 1],
            embed_dim_per_stage=[16, 32, 64, 128],
            num_attention_heads_per_stage=[1, 2, 4, 8],
            window_size_per_stage=[4, 4, 4, 4],
            global_attention_blocks=[3],
        )
        sizes = [[16, 16], [8, 8], [4, 4]]
        return {
            "backbone_config": hiera,
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": sizes,
            "fpn_hidden_size": 16,
        }
    return fields


def _transformers(name: str, config: str, fields: dict[str, Any]) -> Model:
    def make() -> nn.Module:
        if name.startswith("TimmWrapper"):
            args = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
            given = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args, num_labels=5)
        else:
            given = getattr(transformers, f"{config}Config")(**_fields(name, fields))
        model: Any = getattr(transformers, name)(given)
        if name == "DPTForDepthEstimation":
            model.head.head[-2].bias.fill_(1.0)  # else no depth is above zero
        return model  # type: ignore[no-any-return]

    size = fields.get("image_size", 32)
    size = size[0] if isinstance(size, list) else size
    size = 64 if name.startswith(("Sam2", "Segformer", "Cvt")) else size

    def feed(count: int) -> dict[str, Tensor]:
        if name == "CLIPModel":
            ids = torch.tensor([[97, 5, 7, 98], [97, 9, 98, 0]]).repeat(count, 1)[:count]
            return {"pixel_values": images(count, size), "input_ids": ids}
        if name.startswith("Vi") and "num_frames" in fields:
            return {"pixel_values": random(count, fields["num_frames"], 3, size, size, seed=1)}
        if name == "Siglip2VisionModel":
            mask, shapes = torch.ones(count, 4), torch.tensor([[2, 2]]).repeat(count, 1)
            return {"pixel_values": random(count, 4, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes}
        if name.startswith("ViTMAE"):
            return {"pixel_values": images(count, size), "noise": random(count, 4)}
        return {"pixel_values": images(count, size)}

    targets = OTHER_TARGETS.get(name, ("q", "v"))
    return Model("transformers", name, make, size, targets, feed)


def _swin(version: int) -> nn.Module:
    of: Any = torchvision.models.swin_transformer
    kinds = {"block": of.SwinTransformerBlockV2, "downsample_layer": of.PatchMergingV2} if version == 2 else {}
    model: nn.Module = of.SwinTransformer([4, 4], 24, [2, 1], [1, 2], [4, 4], num_classes=5, **kinds)
    return model


def _clip(**fields: Any) -> Any:
    vision = open_clip.CLIPVisionCfg(**({"image_size": 32, "patch_size": 16} | fields))
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=99, width=32, heads=2, layers=2)
    return open_clip.CLIP(24, vision, text)


TOWER = {"width": 48, "layers": 2, "head_width": 16}
TIMM_TOWER = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}

OTHERS = (
    Model(
        "torchvision",
        "MaxVit",
        lambda: torchvision.models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 16, 0.0, num_classes=5),
        64,
    ),
    Model("torchvision", "SwinTransformer", lambda: _swin(1), 64),
    Model("torchvision", "SwinTransformerV2", lambda: _swin(2), 64),
    Model(
        "torchvision",
        "VisionTransformer",
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 3, 48, 96, num_classes=5),
    ),
    Model(
        "open_clip",
        "CLIP",
        lambda: _clip(**TOWER),
        feed=lambda count: {
            "image": images(count, 32),
            "text": torch.tensor([[97, 5, 7, 98, 0, 0, 0, 0], [97, 9, 98, 0, 0, 0, 0, 0]]).repeat(count, 1)[:count],
        },
    ),
    Model("open_clip", "VisionTransformer", lambda: _clip(**TOWER).visual),
    Model("open_clip", "TimmModel", lambda: _clip(**TIMM_TOWER).visual, 224),
)

MODELS = {
    model.key: model
    for model in (
        *(_timm(name, fields) for name, fields in TIMM.items()),
        *(_transformers(name, *given) for name, given in TRANSFORMERS.items()),
        *OTHERS,
    )
}
