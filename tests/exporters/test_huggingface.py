# ruff: noqa: RUF001 - letters that look like others are what is tested
"""The folder for transformers: configuration, preprocessing, tokens, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from exported_models import changed, make_subject
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from tokenizers import Tokenizer
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionModel

import aclip
from aclip.errors import UnsupportedModelError
from aclip.exporters import EXPORTS, Subject, made_examples, write_checked
from aclip.exporters.clip_weights import vision_obstacle
from aclip.exporters.huggingface import image_processor_config, obstacle_of
from aclip.exporters.tokenizer_files import EOT, SOT, write_tokenizer

SUBJECT = make_subject()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exports") / "huggingface"
    write_checked(EXPORTS["huggingface"], SUBJECT, place, made_examples((24, 24)), card=lambda parity: "")
    return place


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
def test_pictures_and_texts_through_their_processor_give_our_similarities(folder: Path, processor: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)  # needs no resizing
    texts = ["a cat", "a photo of a dog in “the” park"]
    inputs = processor(text=texts, images=Image.fromarray(pixels), padding=True, return_tensors="pt")
    theirs = CLIPModel.from_pretrained(folder, local_files_only=True).eval()(**inputs).logits_per_image
    ours = SUBJECT.logit_scale * SUBJECT.model.encode_images([pixels]) @ SUBJECT.model.encode_texts(texts).T
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_the_folder_can_be_taken_in_again(folder: Path) -> None:
    again = aclip.load(folder)
    pictures, texts = made_examples((24, 24)).pictures, ["a cat", "“two” dogs &amp; more", "word " * 50]
    torch.testing.assert_close(again.encode_images(pictures), SUBJECT.model.encode_images(pictures), rtol=0, atol=1e-6)
    torch.testing.assert_close(again.encode_texts(texts), SUBJECT.model.encode_texts(texts), rtol=0, atol=1e-6)


def test_an_image_tower_alone_gives_its_pooled_token(tmp_path: Path) -> None:
    subject = make_subject(with_text=False)
    write_checked(EXPORTS["huggingface"], subject, tmp_path / "out", made_examples((24, 24)), card=lambda parity: "")
    model = CLIPVisionModel.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "out", local_files_only=True)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    with torch.no_grad():
        theirs = model(**processor(images=Image.fromarray(pixels), return_tensors="pt")).pooler_output
    torch.testing.assert_close(theirs, subject.model.encode_images([pixels], normalize=False), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("config", "obstacle"), [
    (changed("vision_cfg", no_ln_pre=True), "no norm before its blocks"),
    (changed("vision_cfg", pool_type="avg"), "pooling 'avg'"),
    (changed("vision_cfg", image_size=[24, 32]), "pictures that are not square"),
    (changed("vision_cfg", patch_size=[8, 4]), "patches that are not square"),
    (changed("text_cfg", no_causal_mask=True), "not causal"),
    (changed("text_cfg", pool_type="last"), "does not pool at the end"),
    (changed("text_cfg", qk_norm=True, block_type="custom"), "not causal, or"),
    (changed("text_cfg", vocab_size=50000), "a vocabulary of 50000"),
    (changed("text_cfg", proj_bias=True), "a text projection with a bias"),
    (changed("text_cfg", tokenizer_kwargs={"clean": "canonicalize"}), "a tokenizer of its own"),
    (changed(init_logit_bias=-10.0), "a logit bias"),
])
def test_what_clipmodel_has_no_place_for_is_refused_by_name(config: dict[str, Any], obstacle: str) -> None:
    with pytest.raises(UnsupportedModelError, match="CLIPModel cannot represent tiny") as refusal:
        EXPORTS["huggingface"].check_can_represent(Subject(make_subject(config).model, config, "tiny"))
    assert obstacle in str(refusal.value)
    assert "--to open_clip, onnx or torch-export" in str(refusal.value)


@pytest.mark.parametrize(("options", "obstacle"), [
    ({"qk_norm": True, "block_type": "custom"}, "query-key norm"),
    ({"attentional_pool": True}, "pooling by attention"),
    ({"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 32},
     "not open_clip's own ViT (TimmModel)"),
])
def test_image_towers_that_it_does_not_know_are_refused(options: dict[str, Any], obstacle: str) -> None:
    """Some of them cannot be loaded here either."""
    config = changed("vision_cfg", **options)
    assert obstacle in str(vision_obstacle(open_clip.CLIP(**config).visual))


def test_a_resizing_that_it_does_not_know_is_refused() -> None:
    subject = make_subject()
    subject.model.model.visual.preprocess_cfg["resize_mode"] = "longest"
    assert "'longest'" in str(obstacle_of(subject))


@pytest.mark.parametrize(("size", "mode", "interpolation"), [
    (24, "shortest", "bicubic"), (24, "squash", "bilinear"), (24, "squash", "bicubic")])
def test_preprocessing_is_ours_to_a_grey_level(size: int, mode: str, interpolation: str) -> None:
    subject = make_subject()
    subject.model.model.visual.preprocess_cfg |= {"resize_mode": mode, "interpolation": interpolation}
    subject = Subject(type(subject.model)(subject.model.model, subject.model.tokenizer), subject.config, "tiny")
    processor = CLIPImageProcessor(**image_processor_config(subject))
    std = torch.tensor(subject.preprocess["std"])[:, None, None] * 255
    for picture in made_examples((size, size)).pictures:
        theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        assert ((theirs - subject.model.preprocess(picture)) * std).abs().max() < 1.01


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
OTHERWISE = [  # what ftfy and html.unescape do, and a list of replacements cannot
    "voilÃ  le cafÃ© dÃ©jÃ  vu",  # a wrong encoding repaired
    "ｆｕｌｌ ｗｉｄｔｈ",
    "&frac12; &copy; &#x1F600;",  # references out of the ordinary
    "ΟΔΥΣΣΕΥΣ",  # a final sigma
    "a <end_of_text> b",  # open_clip's name of a special token
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """tokenizer.json in the tokenizers library, as users of ONNX Runtime have it."""
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


@pytest.mark.parametrize("text", OTHERWISE)
def test_texts_that_are_known_to_differ_still_do(text: str, bare: Any) -> None:
    """Where one no longer does, the documentation can lose a line."""
    assert bare.encode(text).ids != ids_of_open_clip(text, 77)
