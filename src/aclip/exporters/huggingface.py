"""Export for transformers: a folder that `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` load.

An image tower alone becomes a `CLIPVisionModel`, whose `pooler_output` are its features. CLIP's tokenizer is written
from the vocabulary that open_clip bundles, with what `tokenizer.json` can express of open_clip's cleaning of texts
(`CLEANING`); docs/interop.md lists the rest.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from aclip.errors import UnsupportedModelError
from aclip.exporters.base import Exporter, Readback, optional_package, write_json
from aclip.models import LoadedModel, can_cut, preprocess_config
from aclip.models.hugging_face import to_hugging_face
from aclip.models.text import text_tower_of

START, END = "<|startoftext|>", "<|endoftext|>"
SOT, EOT = 49406, 49407
"""Token ids of the start and the end of a text."""

_AMPERSAND = ("&amp;|&#38;|&#0?38;", "&")
_ENTITIES = {"nbsp": " ", "quot": '"', "apos": "'", "#39": "'", "#039": "'", "#x27": "'", "#34": '"', "lt": "<",
             "gt": ">", "hellip": "…", "ndash": "–", "mdash": "—", "eacute": "é"}  # noqa: RUF001
CLEANING = (
    _AMPERSAND, _AMPERSAND,  # twice, so that &amp;lt; becomes <
    *((f"&{name};", character) for name, character in _ENTITIES.items()),
    ("[ʼ‘-‛]", "'"), ("[“-‟]", '"'),  # noqa: RUF001
    ("ﬀ", "ff"), ("ﬁ", "fi"), ("ﬂ", "fl"), ("ﬃ", "ffi"), ("ﬄ", "ffl"),
    ("[\\x00-\\x08\\x0B\\x0E-\\x1F\\x7F\\u200E\\u200F\\uFEFF]", ""),  # control characters that ftfy removes
)
"""Regular expressions and their replacements, in order; then NFC, collapsed white space and lower case."""

PATTERN = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
"""Splits a cleaned text into words (openai/CLIP, `simple_tokenizer.py`)."""


class HuggingFaceExporter(Exporter):
    """`config.json`, `model.safetensors`, `preprocessor_config.json` and the tokenizer's files."""

    library = "transformers"

    def check_supported(self, model: LoadedModel) -> None:
        found = obstacle(model)
        if found is not None:
            raise UnsupportedModelError(f"transformers' CLIPModel cannot represent this model ({found}): use --to "
                                        f"{'open_clip, ' if model.has_text else ''}onnx or torch-export")
        _transformers()

    def write(self, model: LoadedModel, config: Mapping[str, Any], folder: Path) -> None:
        weights = to_hugging_face(model.model.state_dict())
        # clones, because safetensors refuses tensors that share memory, as thirds of a stacked matrix do
        save_file({name: tensor.float().contiguous().clone() for name, tensor in weights.items()},
                  folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", clip_config(model))
        write_json(folder / "preprocessor_config.json", image_processor_config(model))
        if model.has_text:
            write_tokenizer(folder, text_tower_of(model.model).context_length)

    def read(self, folder: Path, model: LoadedModel) -> Readback:
        names = ("CLIPModel", "CLIPProcessor") if model.has_text else ("CLIPVisionModel", "CLIPImageProcessor")
        theirs, processor = (getattr(_transformers(), name).from_pretrained(folder, local_files_only=True)
                             for name in names)
        theirs.eval()

        def preprocess(image: Image.Image) -> Tensor:
            read = processor.image_processor if model.has_text else processor
            return torch.as_tensor(read(images=image, return_tensors="pt")["pixel_values"])[0]

        if not model.has_text:
            return Readback(lambda pixels: _pooled(theirs(pixels)), preprocess=preprocess)
        return Readback(
            lambda pixels: _pooled(theirs.get_image_features(pixels)),
            lambda tokens: _pooled(theirs.get_text_features(tokens)), preprocess,
            lambda texts: processor(
                text=texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"],
            theirs.logit_scale.exp().item())

    def usage(self, model: LoadedModel) -> str:
        return '''\
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")
inputs = processor(text=["a cat", "a dog"], images=Image.open("cat.png"), padding=True, return_tensors="pt")
probabilities = model(**inputs).logits_per_image.softmax(dim=-1)''' if model.has_text else '''\
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel

model, processor = CLIPVisionModel.from_pretrained("FOLDER"), CLIPImageProcessor.from_pretrained("FOLDER")
image_features = model(**processor(images=Image.open("cat.png"), return_tensors="pt")).pooler_output'''


def obstacle(model: LoadedModel) -> str | None:
    """Return what of a model `CLIPModel` cannot represent, or None; what is not named here fails the check."""
    clip, visual = model.model, model.model.visual
    if not isinstance(visual, VisionTransformer):
        return f"its image tower is a {type(visual).__name__}, not open_clip's own ViT"
    try:
        to_hugging_face(clip.state_dict())
    except UnsupportedModelError as error:
        return str(error)
    found = (
        (visual.pool_type != "tok", f"its image tower pools '{visual.pool_type}', not the class token"),
        (not isinstance(visual.ln_pre, nn.LayerNorm), "its image tower has no norm before the blocks"),
        (len(set(visual.image_size)) != 1, "its images are not square"),
        (model.has_text and not can_cut(clip), "its text tower is not causal, or does not pool at the end of the text"),
        (model.has_text and not is_clip_tokenizer(model.tokenizer), "it has a tokenizer of its own"))
    return next((words for obstructs, words in found if obstructs), None)


def clip_config(model: LoadedModel) -> dict[str, Any]:
    """Return `config.json`, every size read from the modules."""
    clip: Any = model.model
    visual = clip.visual
    width = int(visual.class_embedding.shape[0] if visual.proj is None else visual.proj.shape[1])
    vision = {**_tower_config(visual.transformer, visual.ln_post), "model_type": "clip_vision_model",
              "image_size": visual.image_size[0], "patch_size": visual.patch_size[0], "projection_dim": width}
    if not model.has_text:
        return {"architectures": ["CLIPVisionModel"], **vision}
    tower = text_tower_of(clip)
    text = {**_tower_config(tower.transformer, tower.ln_final), "model_type": "clip_text_model",
            "vocab_size": int(tower.token_embedding.weight.shape[0]), "projection_dim": width,
            "max_position_embeddings": int(tower.positional_embedding.shape[0]),
            # the default of 2 would pool at the highest id, as the first releases of transformers did
            "eos_token_id": EOT, "bos_token_id": SOT, "pad_token_id": EOT}
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width, "vision_config": vision,
            "text_config": text}


def _tower_config(transformer: Any, norm: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {"hidden_size": block.attn.embed_dim, "intermediate_size": block.mlp.c_fc.out_features,
            "num_hidden_layers": len(transformer.resblocks), "num_attention_heads": block.attn.num_heads,
            "hidden_act": "quick_gelu" if isinstance(block.mlp.gelu, QuickGELU) else "gelu",
            "layer_norm_eps": norm.eps, "torch_dtype": "float32"}


def image_processor_config(model: LoadedModel) -> dict[str, Any]:
    """Return `preprocessor_config.json`: resize, crop, scale and normalise as open_clip's evaluation transform does."""
    config, (height, width) = preprocess_config(model.model), model.image_size
    squash = config["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "resample": 2 if config["interpolation"] == "bilinear" else 3,  # as Pillow numbers them
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "do_center_crop": not squash, "crop_size": {"height": height, "width": width},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(config["mean"]), "image_std": list(config["std"]),
    } | ({"processor_class": "CLIPProcessor"} if model.has_text else {})


def _pooled(output: Any) -> Tensor:
    """Return features: what transformers 4 returns, and an attribute of what transformers 5 returns."""
    features = getattr(output, "pooler_output", output)
    assert isinstance(features, Tensor)
    return features


def _transformers() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would warn when data loaders fork
    return optional_package("transformers", "transformers")


def write_tokenizer(folder: Path, context_length: int) -> None:
    """Write `tokenizer.json`, `vocab.json`, `merges.txt` and `tokenizer_config.json`; transformers truncates to T."""
    optional_package("tokenizers", "transformers")
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    bundled = SimpleTokenizer()
    vocabulary = {token: number for token, number in bundled.encoder.items() if number < SOT}
    vocabulary |= {START: SOT, END: EOT}  # under other names in open_clip
    bpe = models.BPE(vocabulary, list(bundled.bpe_ranks), unk_token=END, end_of_word_suffix="</w>",
                     continuing_subword_prefix="")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([
        *(normalizers.Replace(Regex(pattern), by) for pattern, by in CLEANING),
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.RobertaProcessing((END, EOT), (START, SOT), False, False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    bpe.save(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    # Not CLIPTokenizer: from transformers 5 on that class replaces this cleaning with its own, shorter one.
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, "bos_token": START,
        "eos_token": END, "pad_token": END, "unk_token": END, "model_input_names": ["input_ids", "attention_mask"]})


def is_clip_tokenizer(tokenizer: Any) -> bool:
    """Return whether a tokenizer is the one that `write_tokenizer` writes: open_clip's own, with default cleaning."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)  # unwrapped from `aclip.data.CaptionTokenizer`
    return (isinstance(inner, SimpleTokenizer) and len(inner.all_special_ids) == 2 and inner.reduction_fn is None
            and inner.clean_fn.__name__ == "_clean_lower")


def save_pretrained(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of Hugging Face's as it is; open_clip's own needs no files."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)  # unwrapped from `aclip.data.CaptionTokenizer`
    if isinstance(inner, HFTokenizer):
        inner.save_pretrained(folder)
