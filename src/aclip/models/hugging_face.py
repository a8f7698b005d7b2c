"""transformers' models in folders, without transformers, and the names of `CLIPModel`'s weights in open_clip.

Both libraries compute the same function of the same numbers; they name and stack them differently:

    open_clip                                   CLIPModel
    attn.in_proj_weight (3C, C)                 self_attn.q_proj, k_proj, v_proj (C, C) each
    visual.proj (C, D), text_projection (C, D)  visual_projection (D, C), text_projection (D, C)
    ls_1.gamma, ls_2.gamma (C,)                 none: multiplied into the linear layer before them

    x + s * (W y + b) = x + (s W) y + s b
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from aclip.errors import CheckpointError, UnsupportedModelError
from aclip.models import siglip_model
from aclip.models.weights import read_weights

# transformers leaves out of a config.json what equals its defaults
_COMMON = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_VISION = {**_COMMON, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224,
           "patch_size": 32}
_TEXT = {**_COMMON, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
         "max_position_embeddings": 77, "vocab_size": 49408, "eos_token_id": 49407}
_RESAMPLING = {2: "bilinear", 3: "bicubic"}


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None if there is none; CheckpointError if it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}") from error


def open_clip_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the open_clip config of a `CLIPModel`'s, or a `SiglipModel`'s (`siglip_model`).

    Raises:
        UnsupportedModelError: another kind of model, or one that open_clip cannot build.
        CheckpointError: settings that describe no model.
    """
    kind = config["model_type"]
    if kind not in ("clip", "siglip", "siglip2") or not {"vision_config", "text_config"} <= config.keys():
        raise UnsupportedModelError(f"'{folder}' holds a transformers model of type '{kind}', and only 'clip', "
                                    "'siglip' and 'siglip2' with both towers can be read")
    try:
        if kind != "clip":
            return siglip_model.open_clip_config(config, folder)
        vision, text = {**_VISION, **config["vision_config"]}, {**_TEXT, **config["text_config"]}
        activations = {vision["hidden_act"], text["hidden_act"]}
        if len(activations) != 1 or not activations <= {"quick_gelu", "gelu"}:
            raise UnsupportedModelError(f"'{folder}' holds a model with the activations "
                                        f"{', '.join(sorted(activations))}: open_clip has quick_gelu or gelu, the same "
                                        "in both towers")
        vocabulary, eos = text["vocab_size"], text["eos_token_id"]
        # the highest id, which older configs mean by 2, is pooled by default
        pooled = {} if eos in (2, vocabulary - 1) else {"pool_type": "eos", "eos_id": int(eos)}
        own_tokenizer = {} if _is_clips(folder, vocabulary) else {"hf_tokenizer_name": str(folder)}
        return {
            "embed_dim": config.get("projection_dim", 512),
            "quick_gelu": activations == {"quick_gelu"},
            "vision_cfg": {
                "layers": vision["num_hidden_layers"], "width": vision["hidden_size"],
                "patch_size": vision["patch_size"], "image_size": vision["image_size"],
                "head_width": vision["hidden_size"] // vision["num_attention_heads"], **_mlp_and_norm(vision)},
            "text_cfg": {
                "context_length": text["max_position_embeddings"], "vocab_size": vocabulary,
                "width": text["hidden_size"], "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"],
                **_mlp_and_norm(text), **pooled, **own_tokenizer},
        }
    except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"'{folder / 'config.json'}' describes no model: {error!r}") from error


def read_folder(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a folder, in one file or several, in open_clip's names; CheckpointError if damaged."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = read_json(folder / f"{name}.index.json")
        files = sorted(set(index["weight_map"].values())) if index else [name]
        if index or (folder / name).is_file():
            state = {key: tensor for file in files for key, tensor in read_weights(folder / file).items()}
            if config["model_type"] == "clip":
                return to_open_clip(state)
            return siglip_model.to_open_clip(state, config["vision_config"].get("patch_size", 16))
    raise CheckpointError(f"'{folder}' holds config.json but no weights beside it (model.safetensors or "
                          "pytorch_model.bin)")


def preprocess(folder: Path) -> dict[str, Any]:
    """Return open_clip's `preprocess_cfg` of a folder's image processor; empty if there is none.

    Raises:
        CheckpointError: a file is damaged.
        UnsupportedModelError: a preprocessing that open_clip does not have.
    """
    # transformers 5 writes processor_config.json and looks there first
    nested = read_json(folder / "processor_config.json") or {}
    given = nested.get("image_processor") or read_json(folder / "preprocessor_config.json")
    if given is None:
        return {}
    try:
        # CLIP's processors crop by default, others (SigLIP's, ViT's) do not
        clip = "CLIP" in given.get("image_processor_type", given.get("feature_extractor_type", "CLIP"))
        size, cropped = _sides(given.get("size")), given.get("do_center_crop", clip)
        crop = _sides(given.get("crop_size")) if cropped else {}
        resample = given.get("resample", 3)
        if (resample not in _RESAMPLING or size.keys() not in (set(), {"shortest_edge"}, {"height", "width"})
                or (crop and size and set(crop.values()) != set(size.values()))
                or abs(255 * given.get("rescale_factor", 1 / 255) - 1) > 1e-6
                or any(given.get(step) is False for step in ("do_resize", "do_rescale", "do_normalize"))):
            raise UnsupportedModelError(
                f"the image processor of '{folder}' cannot be represented in open_clip, which resizes to shortest_edge "
                "(then crops to the same), or height and width, by bilinear (2) or bicubic (3) resampling, scales to "
                "[0, 1] and normalises: write into its file what comes closest")
        return {"mean": tuple(map(float, given["image_mean"])), "std": tuple(map(float, given["image_std"])),
                "interpolation": _RESAMPLING[resample],
                "resize_mode": "shortest" if cropped and "height" not in size else "squash"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the image processor of '{folder}' is damaged: {error!r}") from error


def _sides(size: Any) -> dict[str, int]:
    """Return a size by its sides; one number, as in older files, is the shorter one."""
    return {"shortest_edge": size} if isinstance(size, int) else dict(size or {})


def _mlp_and_norm(tower: Mapping[str, Any]) -> dict[str, Any]:
    eps = tower["layer_norm_eps"]
    return {"mlp_ratio": siglip_model.mlp_ratio(tower)} | ({} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}})


def _is_clips(folder: Path, vocabulary: int) -> bool:
    """Return whether a folder's tokenizer is CLIP's byte-pair one, which open_clip bundles."""
    own = SimpleTokenizer().encoder
    words = read_json(folder / "vocab.json")
    if words is None and (tokenizer := read_json(folder / "tokenizer.json")):
        words = tokenizer["model"]["vocab"]
    if words is None:
        return vocabulary == len(own)
    # the two special tokens, last in both, have other names
    return len(words) == len(own) and {w: i for w, i in own.items() if i < len(own) - 2}.items() <= words.items()


_OUTSIDE_BLOCKS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # the misspelling is part of the format
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_IN_BLOCKS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
              "attn.out_proj": "self_attn.out_proj"}
_SCALES = {"attn.out_proj": "ls_1.gamma", "mlp.c_proj": "ls_2.gamma"}
"""Linear layer -> the LayerScale after it."""

_OPEN_CLIP_BLOCK = re.compile(r"((visual\.)?transformer\.resblocks\.(\d+)\.)(.+)[._](weight|bias|gamma)")
_CLIP_MODEL_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a `CLIPModel` under open_clip's names: q, k, v stacked, projections transposed.

    Names that `CLIPModel` does not have are passed on unchanged, for `load_state_dict` to report.
    """
    inside, outside, transposed = (
        {theirs: ours for ours, theirs in names.items()} for names in (_IN_BLOCKS, _OUTSIDE_BLOCKS, _TRANSPOSED))
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _CLIP_MODEL_BLOCK.fullmatch(name)
        if block:
            tower, number, module, kind = block.groups()
            prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
            if module == "self_attn.q_proj":
                thirds = (name.replace(module, f"self_attn.{letter}_proj") for letter in "qkv")
                stacked = [state[third] for third in thirds if third in state]
                renamed[f"{prefix}.attn.in_proj_{kind}"] = torch.cat(stacked)
            elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
                renamed[f"{prefix}.{inside.get(module, module)}.{kind}"] = tensor
        elif name in transposed:
            renamed[transposed[name]] = tensor.T
        elif not name.endswith("position_ids"):  # a constant that older versions saved
            renamed[outside.get(name, name)] = tensor
    return renamed


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of an open_clip ViT, or of its image tower alone, under `CLIPModel`'s names.

    LayerScale is multiplied into the layer before it. Tensors may share memory with `state`.

    Raises:
        UnsupportedModelError: a tensor that `CLIPModel` has no place for.
    """
    state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _OPEN_CLIP_BLOCK.fullmatch(name)
        prefix, visual, number, module, kind = block.groups() if block else ("",) * 5
        layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
        if module == "attn.in_proj":
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{letter}_proj.{kind}"] = third
        elif module in _IN_BLOCKS:
            scale = state.get(prefix + _SCALES[module]) if module in _SCALES else None
            if scale is not None:
                tensor = tensor * (scale[:, None] if kind == "weight" else scale)
            renamed[f"{layer}.{_IN_BLOCKS[module]}.{kind}"] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T
        elif name == "text_projection.weight":  # a linear layer, already (D, C)
            renamed[name] = tensor
        elif name in _OUTSIDE_BLOCKS:
            renamed[_OUTSIDE_BLOCKS[name]] = tensor
        elif kind != "gamma":
            raise UnsupportedModelError(f"transformers' CLIPModel has no place for the tensor {name}")
    return renamed
