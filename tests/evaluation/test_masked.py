"""Masked evaluation: the right patches, chosen alike in any batch."""

import math

import pytest
import torch
from torch.nn import functional as F

from aclip import models
from aclip.errors import ConfigError
from aclip.evaluation.features import KEEP_BY, MaskedEncoder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return models.load("vit-micro")


@pytest.fixture(scope="module")
def pixels(model):
    size = model.model.visual.image_size
    return torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(1))


def test_everything_kept_is_the_model_itself(model, pixels):
    masked = MaskedEncoder(model, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(masked.encode_image(pixels), model.encode_image(pixels), atol=0, rtol=0)
        torch.testing.assert_close(masked.encode_trunk(pixels), model.encode_trunk(pixels), atol=0, rtol=0)
    assert masked.num_keep == masked.num_patches


def test_the_most_attended_patches_are_kept(model, pixels):
    masked = MaskedEncoder(model, 0.5)
    with torch.no_grad():
        keep = masked.keep_indices(pixels)
        scores = model.attention_scores(pixels)
        assert keep.shape == (5, scores.shape[1] // 2)
        for row, score in zip(keep, scores, strict=True):
            assert set(row.tolist()) == set(score.argsort(descending=True)[: len(row)].tolist())
        expected = models.encode_image(model.model.visual, pixels, keep).features
        torch.testing.assert_close(masked.encode_image(pixels), F.normalize(expected, dim=-1))


@pytest.mark.parametrize("way", KEEP_BY)
def test_an_images_patches_do_not_depend_on_its_batch(model, pixels, way):
    masked = MaskedEncoder(model, 0.25, way, block_size=2)
    with torch.no_grad():
        whole = masked.keep_indices(pixels)
        apart = torch.cat([masked.keep_indices(image[None]) for image in pixels])
    assert torch.equal(whole, apart)
    assert whole.shape[1] == masked.num_keep == masked.num_patches // 4


def test_images_differ_in_what_chance_keeps(model, pixels):
    keep = MaskedEncoder(model, 0.5, "uniform").keep_indices(pixels)
    assert len({tuple(row) for row in keep.tolist()}) == len(pixels)


def test_half_size_scores_are_those_of_the_small_image_enlarged(model, pixels):
    small = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", antialias=True, align_corners=False)
    with torch.no_grad():
        scores = model.attention_scores(small)
        keep = MaskedEncoder(model, 0.25, "attentive-half").keep_indices(pixels)
    side = math.isqrt(scores.shape[1])
    enlarged = F.interpolate(scores.view(-1, 1, side, side), scale_factor=2, mode="bilinear", align_corners=False)
    for row, score in zip(keep, enlarged.flatten(1), strict=True):
        assert score[row].min() >= score.sort(descending=True).values[len(row) - 1] - 1e-6


def test_senseless_settings_are_refused(model):
    with pytest.raises(ConfigError, match=r"fraction of patches that the model sees, in \(0, 1\], not 1\.5"):
        MaskedEncoder(model, 1.5)
    with pytest.raises(ConfigError, match="did you mean 'attentive'"):
        MaskedEncoder(model, 0.5, "atentive")
