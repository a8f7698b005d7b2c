# ruff: noqa: RUF001 - letters that look like others are what is tested
"""The folder for transformers: configuration, preprocessing, tokens, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from tiny_models import TINY, changed, tiny_model
from tokenizers import Tokenizer
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionModel

import aclip
from aclip.errors import UnsupportedModelError
from aclip.exporters import EXPORTERS
from aclip.exporters.base import synthetic_images, write_checked
from aclip.exporters.huggingface import EOT, SOT, image_processor_config, write_tokenizer

MODEL = tiny_model()
IMAGES = synthetic_images((24, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exports") / "huggingface"
    write_checked(EXPORTERS["huggingface"], MODEL, TINY, path)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return CLIPProcessor.from_pretrained(folder, local_files_only=True)


def test_every_size_is_in_the_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["projection_dim"] == 24
    for half, expected in (
        ("vision_config", {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "image_size": 24, "patch_size": 8, "hidden_act": "quick_gelu", "projection_dim": 24}),
        ("text_config", {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3,
                         "max_position_embeddings": 20, "vocab_size": 49408, "hidden_act": "quick_gelu",
                         "eos_token_id": 49407, "bos_token_id": 49406}),
    ):
        assert expected.items() <= config[half].items()


@torch.no_grad()
def test_its_processor_and_model_compute_our_similarities(folder: Path, processor: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)  # needs no resizing
    texts = ["a cat", "a photo of a dog in “the” park"]
    inputs = processor(text=texts, images=Image.fromarray(pixels), padding=True, return_tensors="pt")
    theirs = CLIPModel.from_pretrained(folder, local_files_only=True).eval()(**inputs).logits_per_image
    ours = MODEL.model.logit_scale.exp().item() * MODEL.encode_images([pixels]) @ MODEL.encode_texts(texts).T
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_the_folder_can_be_loaded_again(folder: Path) -> None:
    again = aclip.load(folder)
    texts = ["a cat", "“two” dogs &amp; more", "word " * 50]
    for theirs, ours in ((again.encode_images(IMAGES), MODEL.encode_images(IMAGES)),
                         (again.encode_texts(texts), MODEL.encode_texts(texts))):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_an_image_tower_alone_gives_its_pooled_token(tmp_path: Path) -> None:
    model = tiny_model(with_text=False)
    write_checked(EXPORTERS["huggingface"], model, TINY, tmp_path / "out")
    theirs = CLIPVisionModel.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "out", local_files_only=True)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    with torch.no_grad():
        features = theirs(**processor(images=Image.fromarray(pixels), return_tensors="pt")).pooler_output
    torch.testing.assert_close(features, model.encode_images([pixels], normalize=False), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("config", "obstacle"), [
    (changed("vision_cfg", no_ln_pre=True), "no norm before the blocks"),
    (changed("vision_cfg", pool_type="avg"), "pools 'avg'"),
    (changed("vision_cfg", image_size=[24, 32]), "images are not square"),
    (changed("vision_cfg", timm_model_name="test_vit", timm_pool="token", timm_proj="linear", image_size=160),
     "is a TimmModel, not open_clip's own ViT"),
    (changed("text_cfg", no_causal_mask=True), "not causal"),
    (changed("text_cfg", pool_type="last"), "does not pool at the end"),
    (changed("text_cfg", proj_bias=True), "no place for the tensor text_projection.bias"),
    (changed("text_cfg", tokenizer_kwargs={"clean": "canonicalize"}), "a tokenizer of its own"),
    (changed(init_logit_bias=-10.0), "no place for the tensor logit_bias"),
])
def test_what_clipmodel_cannot_represent_is_refused_by_name(config: dict[str, Any], obstacle: str) -> None:
    with pytest.raises(UnsupportedModelError, match="CLIPModel cannot represent this model") as refusal:
        EXPORTERS["huggingface"].check_supported(tiny_model(config))
    assert obstacle in str(refusal.value)
    assert str(refusal.value).endswith("use --to open_clip, onnx or torch-export")


@pytest.mark.parametrize(("size", "mode", "interpolation"), [
    (24, "shortest", "bicubic"), (24, "squash", "bilinear"), (24, "squash", "bicubic")])
def test_preprocessing_equals_ours_to_a_grey_level(size: int, mode: str, interpolation: str) -> None:
    model = tiny_model()
    model.model.visual.preprocess_cfg |= {"resize_mode": mode, "interpolation": interpolation}
    model = type(model)(model.model, model.tokenizer)
    processor = CLIPImageProcessor(**image_processor_config(model))
    std = torch.tensor(model.model.visual.preprocess_cfg["std"])[:, None, None] * 255
    for image in synthetic_images((size, size)):
        theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert ((theirs - model.preprocess(image)) * std).abs().max() < 1.01


SAME = [
    "a cat", "", " ", "A PHOTO of a Dog.", "it's, don't, we'll, they've, I'm, he'd", "12345 67,890.12",
    "a/b-c_d (e) [f]",
    "café crème à la française", "naïve façade Ångström", "北京 東京 서울 Москва Ελλάδα שלום مرحبا हिन्दी",
    "😀 👍🏽 🇩🇪 ❤️ 👨‍👩‍👧",
    "rock &amp; roll", "&lt;b&gt; &quot;x&quot; &#39;y&#39; &amp;amp; &amp;lt;", "non&nbsp;breaking",
    "“curly” ‘quotes’ and cat’s", "ﬁnd the ﬂower", "tabs\tand\nnew  lines\r\nhere", "x" * 300, "word " * 100,
    "e\u0301 decomposed", "zero\u200bwidth", "\ufeffmark", "C++ & C# !!! ??? ...", "http://www.example.com/a?b=c&d=e",
    "<start>", "'s 't", "€ £ ¥ © ® ™", "½ ² ³ Ⅷ", "ß ẞ İ ı ſ", "\u00ad soft", "it’s 5 o’clock", "100% pure &c",
]
DIFFERENT = [  # what ftfy and html.unescape do, and a list of replacements cannot
    "voilÃ  le cafÃ© dÃ©jÃ  vu",  # mojibake, repaired
    "ｆｕｌｌ ｗｉｄｔｈ",
    "&frac12; &copy; &#x1F600;",  # rare entities
    "ΟΔΥΣΣΕΥΣ",  # a final sigma
    "a <end_of_text> b",  # open_clip's name of a special token
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return tokenizer.json in the tokenizers library, as users of ONNX Runtime load it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 77)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(77)
    return tokenizer


def ids_of_open_clip(text: str, context: int) -> list[int]:
    row = SimpleTokenizer(context_length=context)([text])[0].tolist()
    return row[: row.index(EOT) + 1]


@pytest.mark.parametrize("text", SAME)
def test_texts_become_open_clips_tokens(text: str, bare: Any, processor: Any) -> None:
    assert bare.encode(text).ids == ids_of_open_clip(text, 77)
    theirs = processor(text=[text], truncation=True, max_length=20, padding="max_length", return_tensors="pt")
    row = theirs["input_ids"][0].tolist()
    assert row[: row.index(EOT) + 1] == ids_of_open_clip(text, 20)
    assert row[0] == SOT
    assert len(row) == 20


@pytest.mark.parametrize("text", DIFFERENT)
def test_texts_known_to_differ_still_do(text: str, bare: Any) -> None:
    """Where one no longer does, docs/interop.md can lose a line."""
    assert bare.encode(text).ids != ids_of_open_clip(text, 77)
