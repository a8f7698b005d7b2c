import logging

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tower_oracles import fresh_model, images, scores_from_full_maps, write_model

from aclip import models
from aclip.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Write a run folder with nothing but its final model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_model(folder / "final", fresh_model("vit-tiny"), models.model_config("vit-tiny"))
    return folder


@pytest.fixture(scope="module")
def loaded(run):
    return models.load(run)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8))


@torch.no_grad()
def test_loaded_model_gives_open_clips_features(loaded, run):
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run / 'final'}")
    theirs.eval()
    pixels = loaded.preprocess(picture())[None]
    assert torch.equal(pixels, preprocess(picture())[None])
    tokens = loaded.tokenizer(["a cat", "a much longer caption about two dogs"])
    for normalize in (True, False):
        torch.testing.assert_close(
            loaded.encode_image(pixels, normalize), theirs.encode_image(pixels, normalize), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            loaded.encode_text(tokens, normalize), theirs.encode_text(tokens, normalize), rtol=0, atol=1e-5)
    assert torch.allclose(loaded.encode_image(pixels).norm(dim=1), torch.ones(1))


@torch.no_grad()
def test_the_trunk_is_what_open_clip_projects(loaded, run):
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run / 'final'}")
    pixels = images(3, (64, 64))
    trunk = loaded.encode_trunk(pixels)
    assert loaded.has_text
    assert trunk.shape == (3, loaded.model.visual.proj.shape[0])
    torch.testing.assert_close(trunk @ loaded.model.visual.proj, theirs.eval().encode_image(pixels), rtol=0, atol=1e-5)


def test_attention_scores_are_the_class_tokens(loaded):
    pixels = images(2, (64, 64))
    scores = loaded.attention_scores(pixels)
    assert scores.shape == (2, 64)
    torch.testing.assert_close(scores, scores_from_full_maps(loaded.model.visual, pixels), rtol=0, atol=1e-6)
    assert loaded.attention_scores(images(1, (32, 64))).shape == (1, 32)


def test_loaded_model_is_in_evaluation_mode_and_cannot_mask(loaded):
    assert not any(module.training for module in loaded.modules())
    with pytest.raises(TypeError, match="keep_indices"):
        loaded.encode_image(images(1, (64, 64)), keep_indices=torch.tensor([[1]]))


def test_untrained_architectures_are_called_so(caplog, run):
    with caplog.at_level(logging.WARNING, "aclip"):
        models.load("vit-tiny")
    assert "'vit-tiny' names an architecture without weights" in caplog.text
    caplog.clear()
    weights = run / "final" / "open_clip_model.safetensors"
    from_file = models.load("vit-tiny", checkpoint=weights)
    assert not caplog.records
    pixels = images(1, (64, 64))
    assert torch.equal(from_file.encode_image(pixels), models.load(run).encode_image(pixels))


def test_runs_without_text_encode_images_only(tmp_path):
    model = models.create_model("vit-tiny", with_text=False)
    folder = write_model(tmp_path / "final", model, models.model_config("vit-tiny"))
    loaded = models.load(folder.parent)
    pixels = images(1, (64, 64))
    assert torch.equal(loaded.encode_image(pixels, normalize=False),
                       models.encode_image(model.visual, pixels).features)
    assert torch.equal(loaded.encode_trunk(pixels), models.encode_image(model.visual, pixels).cls)
    assert not loaded.has_text
    with pytest.raises(UnsupportedModelError, match="image tower only"):
        loaded.encode_text(loaded.tokenizer(["a cat"]))
