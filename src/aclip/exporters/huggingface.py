"""A folder that `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` of transformers load, without network.

Written with our own conversion, so that writing needs no transformers; the check does. An image tower alone becomes
a `CLIPVisionModel`, whose `pooler_output` are its features.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from aclip.errors import UnsupportedModelError
from aclip.exporters.base import ExportFormat, Readback, Subject, missing, multiplier
from aclip.exporters.clip_weights import activation, text_obstacle, text_weights, vision_obstacle, vision_weights
from aclip.exporters.tokenizer_files import EOT, SOT, is_bundled, write_tokenizer
from aclip.models.text import text_tower_of

RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3, "random": 3}
"""Pillow's numbers of open_clip's interpolations; a model trained with random ones is evaluated with bicubic."""


class HuggingFaceFormat(ExportFormat):
    """`config.json`, `model.safetensors`, `preprocessor_config.json` and the tokenizer's files."""

    about: ClassVar[str] = "a folder for transformers: CLIPModel and CLIPProcessor (or CLIPVisionModel)"
    library: ClassVar[str] = "transformers"

    def check_can_represent(self, subject: Subject) -> None:
        """Refuse what CLIPModel has no place for."""
        obstacle = obstacle_of(subject)
        if obstacle is not None:
            others = "open_clip, onnx or torch-export" if subject.model.has_text else "onnx or torch-export"
            raise UnsupportedModelError(f"transformers' CLIPModel cannot represent {subject.name}: it has {obstacle}; "
                                        f"use --to {others}")
        _transformers()

    def write(self, subject: Subject, folder: Path) -> None:
        """Write model, preprocessing and tokenizer."""
        model: Any = subject.model.model
        tensors = vision_weights(model.visual)
        if subject.model.has_text:
            tensors |= text_weights(text_tower_of(model))
            tensors |= {"visual_projection.weight": model.visual.proj.T, "logit_scale": model.logit_scale}
            write_tokenizer(folder, subject.context_length)
        # clones, because the file format refuses tensors that share memory; stacked matrices do
        save_file({name: t.detach().float().cpu().contiguous().clone() for name, t in tensors.items()},
                  folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in (("config.json", model_config(subject)),
                              ("preprocessor_config.json", image_processor_config(subject))):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")

    def read(self, folder: Path, subject: Subject) -> Readback:
        """Load with transformers, offline."""
        transformers = _transformers()
        if not subject.model.has_text:
            with _without_bars(transformers):
                tower = transformers.CLIPVisionModel.from_pretrained(folder, local_files_only=True).eval()
            processor = transformers.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            return Readback(lambda pixels: pooled(tower(pixels)), preprocess=_pixels_by(processor))
        with _without_bars(transformers):
            model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
        return Readback(
            lambda pixels: pooled(model.get_image_features(pixels)),
            lambda tokens: pooled(model.get_text_features(tokens)),
            _pixels_by(processor.image_processor),
            lambda texts: processor(text=texts, padding="max_length", max_length=subject.context_length,
                                    truncation=True, return_tensors="pt")["input_ids"],
            multiplier(model))

    def usage(self, subject: Subject) -> str:
        """See `ExportFormat`."""
        return '''\
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")
inputs = processor(text=["a cat", "a dog"], images=Image.open("cat.png"), padding=True, return_tensors="pt")
probabilities = model(**inputs).logits_per_image.softmax(dim=-1)''' if subject.model.has_text else '''\
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel

model, processor = CLIPVisionModel.from_pretrained("FOLDER"), CLIPImageProcessor.from_pretrained("FOLDER")
features = model(**processor(images=Image.open("cat.png"), return_tensors="pt")).pooler_output'''


def obstacle_of(subject: Subject) -> str | None:
    """Return what of a model CLIPModel cannot represent, or None."""
    model: Any = subject.model.model
    obstacle = vision_obstacle(model.visual)
    if obstacle is None and subject.preprocess.get("resize_mode", "shortest") not in ("shortest", "squash"):
        obstacle = f"a preprocessing that resizes by the '{subject.preprocess['resize_mode']}' side"
    if obstacle is None and subject.model.has_text:
        if model.visual.proj is None:
            obstacle = "no image projection"
        elif not is_bundled(subject.model.tokenizer):
            obstacle = "a tokenizer of its own"
        elif model.logit_scale.numel() != 1:
            obstacle = "a logit scale for each dimension"
        elif getattr(model, "logit_bias", None) is not None:
            obstacle = "a logit bias"
        else:
            obstacle = text_obstacle(model, text_tower_of(model))
    return obstacle


def model_config(subject: Subject) -> dict[str, Any]:
    """Return `config.json`: every size is read from the modules themselves."""
    model: Any = subject.model.model
    visual = model.visual
    vision = {
        **_tower_config(visual.transformer, visual.ln_post),
        "image_size": visual.image_size[0], "patch_size": visual.patch_size[0], "num_channels": 3,
        "projection_dim": int(visual.proj.shape[1]) if visual.proj is not None else visual.class_embedding.shape[0],
    }
    if not subject.model.has_text:
        return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "torch_dtype": "float32",
                **vision}
    tower = text_tower_of(model)
    text = {
        **_tower_config(tower.transformer, tower.ln_final),
        "model_type": "clip_text_model", "vocab_size": int(tower.token_embedding.weight.shape[0]),
        "max_position_embeddings": int(tower.positional_embedding.shape[0]), "projection_dim": vision["projection_dim"],
        # any number but 2, with which transformers pools at the highest id as its first releases did
        "eos_token_id": EOT, "bos_token_id": SOT, "pad_token_id": EOT,
    }
    return {"architectures": ["CLIPModel"], "model_type": "clip", "torch_dtype": "float32",
            "projection_dim": vision["projection_dim"], "logit_scale_init_value": 2.6592,
            "vision_config": {"model_type": "clip_vision_model", **vision}, "text_config": text}


def image_processor_config(subject: Subject) -> dict[str, Any]:
    """Return `preprocessor_config.json`: resize, crop, scale and normalise as open_clip's evaluation transform does."""
    config = subject.preprocess
    height, width = subject.image_size
    squash = config.get("resize_mode") == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "resample": RESAMPLE[config.get("interpolation", "bicubic")],
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "do_center_crop": not squash, "crop_size": {"height": height, "width": width},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(config["mean"]), "image_std": list(config["std"]),
    } | ({"processor_class": "CLIPProcessor"} if subject.model.has_text else {})


def pooled(output: Any) -> Tensor:
    """Return the features of what a model returned: a tensor before transformers 5, an object with it since."""
    features = getattr(output, "pooler_output", output)
    assert isinstance(features, Tensor)
    return features


def _tower_config(transformer: Any, norm: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {"hidden_size": block.attn.embed_dim, "intermediate_size": block.mlp.c_fc.out_features,
            "num_hidden_layers": len(transformer.resblocks), "num_attention_heads": block.attn.num_heads,
            "hidden_act": activation(block), "layer_norm_eps": norm.eps, "attention_dropout": 0.0}


def _pixels_by(processor: Any) -> Any:
    def pixels(image: Image.Image) -> Tensor:
        return torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"])[0]

    return pixels


@contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    """Keep the library from drawing progress bars."""
    log = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def _transformers() -> Any:
    """Return the library, told not to look for anything elsewhere."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError as error:
        raise missing("transformers", "transformers", "checking an export for transformers") from error
    return transformers
