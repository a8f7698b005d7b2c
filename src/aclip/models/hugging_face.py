"""Folders of Hugging Face's `CLIPModel`, read by our own code: config, weights, preprocessing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from aclip.errors import CheckpointError, UnsupportedModelError
from aclip.models.weights import read_state

CONFIG_NAME = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
          "self_attn.out_proj": "attn.out_proj"}
_OTHER = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",  # so spelt
    "vision_model.post_layernorm.": "visual.ln_post.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "logit_scale": "logit_scale",
}


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the `config.json` of a folder of Hugging Face's, or None if it is no such folder.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}") from error
    return config if isinstance(config, dict) and "model_type" in config else None


def open_clip_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the open_clip config of a `CLIPModel`'s.

    Raises:
        UnsupportedModelError: another kind of model, activations that open_clip does not have, or captions that end
            with any of several tokens.
        CheckpointError: settings that are missing.
    """
    if config["model_type"] != "clip" or not {"vision_config", "text_config"} <= config.keys():
        raise UnsupportedModelError(f"'{folder}' holds a Hugging Face model of type '{config['model_type']}': 'clip' "
                                    "with both towers is read; SigLIP comes by open_clip's names, such as "
                                    "ViT-B-16-SigLIP:webli")
    vision, text = {**_VISION_DEFAULTS, **config["vision_config"]}, {**_TEXT_DEFAULTS, **config["text_config"]}
    if vision.get("num_channels", 3) != 3:
        raise UnsupportedModelError(f"'{folder}' holds a model for {vision['num_channels']} channels, not 3")
    activations = {vision["hidden_act"], text["hidden_act"]}
    if len(activations) != 1 or not activations <= {"quick_gelu", "gelu"}:
        raise UnsupportedModelError(f"'{folder}' holds a model with the activations {', '.join(sorted(activations))}: "
                                    "open_clip has quick_gelu or gelu, the same in both towers")
    ours: dict[str, Any] = {
        "embed_dim": config.get("projection_dim", 512),
        "vision_cfg": {
            "layers": vision["num_hidden_layers"], "width": vision["hidden_size"], "patch_size": vision["patch_size"],
            "image_size": vision["image_size"], "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_common(vision)},
        "text_cfg": {
            "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"],
            "width": text["hidden_size"], "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"],
            **_common(text), **_end_of_text(text), **_tokenizer(folder, text["vocab_size"])},
    }
    if activations == {"quick_gelu"}:
        ours["quick_gelu"] = True
    return ours


def preprocess(folder: Path) -> dict[str, Any]:
    """Return open_clip's `preprocess_cfg` of a folder's image processor; empty where there is none.

    Raises:
        CheckpointError: a file is damaged.
        UnsupportedModelError: pictures are prepared as open_clip has no words for.
    """
    path, given = _image_processor(folder)
    if given is None:
        return {}
    try:
        # CLIP's processors crop unless told otherwise, other models' (SigLIP's, ViT's) do not
        clip = "CLIP" in given.get("image_processor_type", given.get("feature_extractor_type", "CLIP"))
        size, cropped = _sides(given.get("size")), given.get("do_center_crop", clip)
        what = _unlike_open_clip(given, size, _sides(given.get("crop_size")) if cropped else None)
        if what:
            raise UnsupportedModelError(f"'{path}' prepares pictures with {what}: write there what comes nearest, to "
                                        "use the model with that")
        mean, std = ((0.0,) * 3, (1.0,) * 3) if given.get("do_normalize") is False else (
            tuple(map(float, given["image_mean"])), tuple(map(float, given["image_std"])))
        return {"mean": mean, "std": std, "interpolation": _RESAMPLING[given.get("resample", 3)],
                "resize_mode": "shortest" if cropped and "height" not in size else "squash"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error!r}") from error


def _image_processor(folder: Path) -> tuple[Path, Any]:
    """Return what a folder says of its image processor, and in which file; None where it says nothing.

    transformers 5 writes it into `processor_config.json` and looks there first, as here; others have a file for it.
    """
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = folder / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                found = found if key is None else found.get(key)
            except (OSError, ValueError, AttributeError) as error:
                raise CheckpointError(f"'{path}' is damaged: {error!r}") from error
            if found is not None:
                return path, found
    return folder, None


def _sides(size: Any) -> dict[str, int]:
    """Return a size by its sides: one number, as older files have it, is the shorter one."""
    if isinstance(size, int):
        return {"shortest_edge": size}
    return dict(zip(("height", "width"), size, strict=True)) if isinstance(size, list) else dict(size or {})


def _unlike_open_clip(given: Mapping[str, Any], size: Mapping[str, int], crop: Mapping[str, int] | None) -> str | None:
    """Name what of an image processor open_clip cannot do, if anything; `crop` is None where nothing is cropped."""
    if given.get("resample", 3) not in _RESAMPLING:
        return f"resample {given['resample']}, and open_clip has 2 (bilinear) and 3 (bicubic)"
    if given.get("do_rescale") is False or abs(255 * given.get("rescale_factor", 1 / 255) - 1) > 1e-6:
        return "other pixels than those from 0 to 1, which are what open_clip normalises"
    if size.keys() not in (set(), {"shortest_edge"}, {"height", "width"}):
        return f"a size by {' and '.join(size)}, and open_clip has shortest_edge, or height and width"
    if crop is not None and given.get("do_resize") is False:
        return "a crop and no resizing, and open_clip always resizes"
    if crop and size and set(crop.values()) != set(size.values()):
        return f"a crop to {_by(crop)} of pictures resized to {_by(size)}, and open_clip resizes to what it crops"
    return None


def _by(size: Mapping[str, int]) -> str:
    return " x ".join(map(str, size.values()))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights: one, or the parts that its index lists.

    Raises:
        CheckpointError: there are none, or the index is damaged.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return sorted({folder / Path(part).name for part in parts})
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"'{index}' is damaged: {error!r}") from error
    raise CheckpointError(f"'{folder}' holds {CONFIG_NAME} but no weights beside it ({' or '.join(_WEIGHTS)})")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a folder in open_clip's names.

    Raises:
        CheckpointError: damaged or missing files.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        state |= read_state(file)
    return from_hugging_face(state)


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a `CLIPModel`'s state in open_clip's names: q, k, v stacked, projections transposed."""
    ours: dict[str, Tensor] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        side, _, rest = name.partition(".encoder.layers.")
        if rest:
            number, _, part = rest.partition(".")
            prefix = f"{'visual.' if side == 'vision_model' else ''}transformer.resblocks.{number}."
            module, _, kind = part.rpartition(".")
            if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                stacked.setdefault(f"{prefix}attn.in_proj_{kind}", {})[module[-6]] = tensor
            else:
                ours[f"{prefix}{_LAYER.get(module, module)}.{kind}"] = tensor
        elif name in ("visual_projection.weight", "text_projection.weight"):
            ours["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.T
        elif not name.endswith("position_ids"):
            theirs = next((start for start in _OTHER if name.startswith(start)), name)
            ours[_OTHER.get(theirs, theirs) + name.removeprefix(theirs)] = tensor
    for name, parts in stacked.items():
        if parts.keys() == {"q", "k", "v"}:
            ours[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return ours


# transformers leaves out of a config.json what equals its defaults
_VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
                  "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu",
                  "layer_norm_eps": 1e-5, "eos_token_id": 49407}


def _common(tower: Mapping[str, Any]) -> dict[str, Any]:
    """Return what both towers' configs say alike: the MLP's width, and the norms' epsilon."""
    eps, hidden, width = tower["layer_norm_eps"], tower["intermediate_size"], tower["hidden_size"]
    # open_clip rounds width x ratio down
    ratio = hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
    return {"mlp_ratio": ratio} | ({} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}})


def _end_of_text(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return which token is read: the highest id, as older configs mean by 2, or the one that is named."""
    eos = text["eos_token_id"]
    if isinstance(eos, list) and len(eos) == 1:
        eos = eos[0]
    if not isinstance(eos, int):
        raise UnsupportedModelError(f"the text tower's eos_token_id is {eos}: captions must end with one known token")
    if eos in (2, text["vocab_size"] - 1):
        return {}
    return {"pool_type": "eos", "eos_id": eos}


def _tokenizer(folder: Path, vocabulary: int) -> dict[str, Any]:
    """Return what a config says of a tokenizer that is not CLIP's own byte-pair one, which open_clip bundles."""
    own = SimpleTokenizer().encoder
    for name in ("vocab.json", "tokenizer.json"):
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8"))
                words = found if name == "vocab.json" else found["model"]["vocab"]
                # the two special tokens, last in both, have other names
                plain = {word: i for word, i in own.items() if i < len(own) - 2}
                same = len(words) == len(own) and plain.items() <= words.items()
                return {} if same else {"hf_tokenizer_name": str(folder)}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"'{folder / name}' is damaged: {error!r}") from error
    return {} if vocabulary == len(own) else {"hf_tokenizer_name": str(folder)}
