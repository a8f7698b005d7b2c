"""Folders of transformers' `SiglipModel` and `Siglip2Model`: features, tokens, and what cannot be read."""

from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import canonicalize_text
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tower_oracles import draw_kept, images, shake
from transformers import (
    AutoTokenizer,
    GemmaTokenizer,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from aclip import models
from aclip.errors import UnsupportedModelError

VISION = {"image_size": 64, "num_patches": 16, "patch_size": 16}  # of the base size, which timm has
TEXT = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 8, "vocab_size": 300, "projection_size": 768}
KINDS = {"siglip": (SiglipConfig, SiglipModel), "siglip2": (Siglip2Config, Siglip2Model)}
CAPTIONS = ["A cat.", "two dogs on a red sofa, and more than fits"]


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer as SigLIP 2's is made: Gemma's, lower case, an end and padding after each text."""
    letters = [chr(letter) for letter in range(97, 123)]
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *letters])}
    own = Tokenizer(BPE(words, [], unk_token="<unk>"))
    own.pre_tokenizer = Metaspace()
    own.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    GemmaTokenizer(tokenizer_object=own, add_bos_token=False, add_eos_token=True).save_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_siglip_folders_give_their_own_features_and_tokens(kind, tmp_path):
    torch.manual_seed(0)
    config, cls = KINDS[kind]
    theirs = shake(cls(config(text_config=TEXT, vision_config=VISION))).eval()
    theirs.logit_scale.fill_(4.7)
    theirs.logit_bias.fill_(-12.9)
    theirs.save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    ours, pixels = models.create_model(tmp_path, logit_scale=10.0).eval(), images(2, (64, 64))
    if kind == "siglip":
        seen = {"pixel_values": pixels}
    else:
        patches = torch.stack([convert_image_to_patches(image, 16) for image in pixels])
        seen = {"pixel_values": patches, "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
                "spatial_shapes": torch.tensor([[4, 4], [4, 4]])}
    expected = theirs.get_image_features(**seen).pooler_output
    torch.testing.assert_close(models.encode_image(ours.visual, pixels).features, expected, rtol=0, atol=1e-5)
    kept = models.encode_image(ours.visual, pixels, draw_kept(2, 16, 8), return_patches=True)
    assert kept.patches.shape == (2, 8, 768)
    tokens = models.tokenizer_of(tmp_path)(CAPTIONS)
    cleaned = [canonicalize_text(text) for text in CAPTIONS]
    by_transformers = AutoTokenizer.from_pretrained(tmp_path)(
        cleaned, padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokens, by_transformers)
    torch.testing.assert_close(models.encode_text(ours, tokens), theirs.get_text_features(tokens).pooler_output,
                               rtol=0, atol=1e-5)
    assert (ours.logit_scale, ours.logit_bias) == (theirs.logit_scale, theirs.logit_bias)
    assert models.preprocess_config(ours)["resize_mode"] == "squash"


def test_sizes_that_timm_has_no_name_for_are_refused(tmp_path):
    SiglipConfig(vision_config=VISION | {"hidden_size": 96, "num_hidden_layers": 2}, text_config=TEXT
                 ).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"siglip model of .* \(96, 2, 12, 3072\).* can build \(768"):
        models.create_model(tmp_path)
