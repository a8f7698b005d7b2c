"""Folders of transformers' `CLIPModel`: features, preprocessing, and what cannot be read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from tower_oracles import images, shake
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipImageProcessor,
    ViTConfig,
    ViTImageProcessor,
)

from aclip import models
from aclip.errors import CheckpointError, UnsupportedModelError
from aclip.models import hugging_face

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 16, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
VISION = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 24, "patch_size": 8}
HF_VARIANTS = {
    "quick gelu": ({}, {}),
    "gelu, eps, other widths": ({"hidden_act": "gelu", "layer_norm_eps": 1e-6},
                                {"hidden_act": "gelu", "layer_norm_eps": 1e-6}),
    "old end of text": ({"eos_token_id": 2}, {}),
    "other end of text": ({"eos_token_id": 40000}, {}),
}
CAPTIONS = ["a cat", "two dogs on a red sofa"]


def hugging_face_folder(folder: Path, text: dict, vision: dict) -> CLIPModel:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TEXT | text, vision_config=VISION | vision, projection_dim=24)
    model = shake(CLIPModel(config)).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3]
                       ).save_pretrained(folder)
    return model


@pytest.mark.parametrize(("text", "vision"), HF_VARIANTS.values(), ids=HF_VARIANTS)
@torch.no_grad()
def test_hugging_face_folders_give_their_own_features(text, vision, tmp_path):
    theirs = hugging_face_folder(tmp_path / "clip", text, vision)
    ours = models.create_model(tmp_path / "clip").eval()
    pixels = images(2, (24, 24))
    torch.testing.assert_close(models.encode_image(ours.visual, pixels).features,
                               theirs.get_image_features(pixels).pooler_output, rtol=0, atol=1e-5)
    tokens = models.tokenizer_of(tmp_path / "clip")(CAPTIONS)
    assert tokens.shape == (2, 16)
    if text.get("eos_token_id") == 40000:
        tokens[tokens == 49407] = 40000  # and no longer the highest id
        tokens[:, 1] = 49000
    torch.testing.assert_close(models.encode_text(ours, tokens),
                               theirs.get_text_features(tokens).pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale)
    assert models.can_cut(ours) == (text.get("eos_token_id") != 40000)


SEES = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.3, 0.4]}
PROCESSORS = {
    "written by transformers": (CLIPImageProcessor, SEES | {
        "size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}),
    "classic": (CLIPImageProcessor, SEES | {
        "feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "size": 24, "do_center_crop": True,
        "crop_size": 24, "do_normalize": True, "resample": 3}),
    "bilinear": (CLIPImageProcessor, SEES | {"size": 24, "crop_size": 24, "resample": 2}),
    "squashed, cropped to the same": (CLIPImageProcessor, SEES | {
        "size": {"height": 24, "width": 24}, "crop_size": 24}),
    "SigLIP": (SiglipImageProcessor, SEES | {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 24, "width": 24}}),
    "ViT, one number": (ViTImageProcessor, SEES | {
        "image_processor_type": "ViTImageProcessor", "size": 24, "resample": 2}),
}
"""Name -> what transformers reads it with, and what is in the file."""


@pytest.mark.parametrize("nested", [False, True], ids=["own file", "nested"])
@pytest.mark.parametrize(("processor", "given"), PROCESSORS.values(), ids=PROCESSORS)
def test_processors_preprocess_as_in_transformers(processor, given, nested, tmp_path):
    other = {"size": 1, "image_mean": [0.9] * 3, "image_std": [0.9] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other if nested else given))
    (tmp_path / "processor_config.json").write_text(json.dumps(  # without nesting as transformers 4 has it
        {"processor_class": "CLIPProcessor"} | ({"image_processor": given} if nested else {})))
    ours = image_transform_v2(PreprocessCfg(size=24, **hugging_face.preprocess(tmp_path)), is_train=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8))
    theirs = processor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    # the resampling of two libraries: equal up to the rounding of pixels to bytes
    assert (ours(image) - theirs).abs().max() < 2.5 / 255 / min(given["image_std"])


@pytest.mark.parametrize("change", [
    {"resample": 1}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"size": {"longest_edge": 24}},
    {"do_resize": False}, {"do_normalize": False}, {"size": 32},
], ids=str)
def test_preprocessing_that_open_clip_does_not_have_is_refused(change, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SEES | {"size": 24, "crop_size": 24} | change))
    with pytest.raises(UnsupportedModelError, match=f"the image processor of '{tmp_path}' cannot be represented in"):
        hugging_face.preprocess(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", '{"size": 24}'])
def test_damaged_processors_are_named(content, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"'{tmp_path}.*' is damaged"):
        hugging_face.preprocess(tmp_path)


def test_hugging_face_folders_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "vit").mkdir()
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UnsupportedModelError, match="of type 'vit', and only 'clip', 'siglip' and 'siglip2' with both"):
        models.create_model(tmp_path / "vit")
    hugging_face_folder(tmp_path / "mixed", {"hidden_act": "gelu"}, {})
    with pytest.raises(UnsupportedModelError, match="activations gelu, quick_gelu"):
        models.create_model(tmp_path / "mixed")
    hugging_face_folder(tmp_path / "ends", {"eos_token_id": [49406, 49407]}, {})
    with pytest.raises(CheckpointError, match="describes no model"):
        models.create_model(tmp_path / "ends")
    hugging_face_folder(tmp_path / "clip", {}, {})
    state = load_file(tmp_path / "clip" / "model.safetensors")
    name = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    save_file({key: tensor for key, tensor in state.items() if key != name}, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mismatch for visual\.transformer\.resblocks\.1\.attn\.in_proj_weight"):
        models.create_model(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds config\.json but no weights"):
        models.create_model(tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json' is damaged"):
        models.create_model(tmp_path / "clip")


def test_weights_in_several_files_are_joined(tmp_path):
    theirs = hugging_face_folder(tmp_path / "clip", {}, {})
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="1MB")
    shutil.copy(tmp_path / "clip" / "preprocessor_config.json", tmp_path / "parts")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    whole, joined = (models.create_model(tmp_path / name).state_dict() for name in ("clip", "parts"))
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


@pytest.mark.parametrize("change", [
    {"text_config": None}, {"vision_config": {"num_attention_heads": 0}}, {"vision_config": {"hidden_size": "768"}}])
def test_configs_that_describe_no_model_are_named(change, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "clip", "text_config": {}, "vision_config": {}} | change))
    with pytest.raises(CheckpointError, match=r"config\.json' describes no model"):
        models.model_config(tmp_path)
