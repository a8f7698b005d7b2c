"""The checkpoint layout of the public A-CLIP release (and of SLIP, from which it comes)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from aclip.errors import CheckpointError, UnsupportedModelError

_SIZES = {(192, 12): "tiny", (768, 12): "base", (1024, 24): "large"}
"""(width, layers) -> timm's word for it, all with heads 64 wide. The releases have base and large."""

_SMALL = (384, 12)
"""SLIP's and A-CLIP's ViT-S/16 has MoCo v3's 12 heads, timm's has 6. The tensors are the same, the features are not."""

_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale")


def is_released(state: Mapping[str, Tensor]) -> bool:
    """Whether a state has the release's names: timm's in `visual.*`, and a separate `image_projection`."""
    return {"image_projection", "visual.cls_token", "visual.blocks.0.attn.qkv.weight"} <= state.keys()


def released_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the open_clip config of a state of the release: timm's ViT, and CLIP's text tower with its quick GELU.

    Raises:
        CheckpointError: a size that timm has no ViT for, or tensors that are not there.
        UnsupportedModelError: a ViT-S, whose heads are narrower than those of timm's.
    """
    try:
        patch, positions = state["visual.patch_embed.proj.weight"], state["visual.pos_embed"]
        width, layers = patch.shape[0], _layers(state, "visual.blocks.")
        text_width = state["ln_final.weight"].shape[0]
        context, vocabulary = state["positional_embedding"].shape[0], state["token_embedding.weight"].shape[0]
        joint = state["image_projection"].shape[1]
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"the weights {path} have the release's layout, but {error} is missing or broken"
                              ) from error
    sizes = ", ".join(f"{w} x {n}" for w, n in _SIZES)
    if (width, layers) == _SMALL:
        raise UnsupportedModelError(f"the weights {path} are the release's ViT-S, which has 12 heads where timm's ViT "
                                    "of its size, the one that an open_clip config can name, has 6, and would give "
                                    f"wrong features: sizes that load are {sizes}")
    size = _SIZES.get((width, layers))
    if size is None:
        raise CheckpointError(f"the weights {path} have the release's layout, but timm has no ViT of width {width} and "
                              f"{layers} layers: there are {sizes}")
    side = patch.shape[-1]
    return {
        "embed_dim": joint,
        "quick_gelu": True,
        "vision_cfg": {
            "timm_model_name": f"vit_{size}_patch{side}_224", "timm_model_pretrained": False, "timm_pool": "token",
            "timm_proj": "linear", "image_size": round((positions.shape[1] - 1) ** 0.5) * side,
        },
        "text_cfg": {
            "context_length": context, "vocab_size": vocabulary, "width": text_width, "heads": text_width // 64,
            "layers": _layers(state, "transformer.resblocks."),
        },
    }


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the online towers of the release's state in open_clip's names; its EMA copies and heads are left out."""
    ours = {name: tensor for name, tensor in state.items()
            if name in _TEXT or name.startswith(tuple(part for part in _TEXT if part.endswith(".")))}
    ours["visual.head.proj.weight"] = state["image_projection"].T
    for name, tensor in state.items():
        if name.startswith("visual.") and not name.startswith("visual.head."):
            ours[f"visual.trunk.{name.removeprefix('visual.')}"] = tensor
    return ours


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max((int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)),
                   default=-1)
