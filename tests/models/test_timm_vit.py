"""Plain ViTs of timm: against timm's own forward, and against literal versions of removal and scores."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DiffAttention, RmsNorm, SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock
from tower_oracles import (
    assert_same_gradients,
    draw_kept,
    gradients,
    images,
    small_timm,
    timm_after_embedding,
    timm_on_kept,
    timm_scores_from_full_maps,
)

from aclip import models
from aclip.errors import UnsupportedModelError

VARIANTS = {
    "class token": {},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 2},
    "pre-norm, no biases": {"pre_norm": True, "qkv_bias": False, "proj_bias": False},
    "qk norm, layer scale": {"qk_norm": True, "init_values": 0.3},
    "gated MLP, RMS norm": {"mlp_layer": SwiGLUPacked, "norm_layer": RmsNorm, "scale_attn_norm": True},
    "no class token, pooled by attention": {"class_token": False, "global_pool": "map"},
    "registers, pooled by attention": {"class_token": False, "reg_tokens": 3, "global_pool": "map"},
    "class token, pooled by attention": {"global_pool": "map"},
    "mean": {"class_token": False, "global_pool": "avg"},
    "mean beside a class token": {"global_pool": "avg"},
    "EVA-01": {"trunk": Eva, "global_pool": "token"},
    "EVA-02-E": {"trunk": Eva, "global_pool": "token", "use_post_norm": True},
    "EVA-02": {"trunk": Eva, "global_pool": "token", "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True,
               "scale_attn_inner": True, "use_rot_pos_emb": True, "ref_feat_shape": (4, 4)},
    "PE-Core": {"trunk": Eva, "global_pool": "map", "attn_type": "rope", "use_pre_transformer_norm": True,
                "use_rot_pos_emb": True, "ref_feat_shape": (3, 5), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy",
                "attn_pool_num_heads": 8},
    "PE-Core-bigG": {"trunk": Eva, "global_pool": "map", "attn_type": "rope", "use_pre_transformer_norm": True,
                     "class_token": False, "use_rot_pos_emb": True, "rope_grid_indexing": "xy"},
    "DINOv3": {"trunk": Eva, "global_pool": "token", "use_rot_pos_emb": True, "rope_type": "dinov3",
               "num_reg_tokens": 4, "rope_rotate_half": True, "use_abs_pos_emb": False, "dynamic_img_size": True,
               "qkv_bias": False, "init_values": 0.3, "use_fc_norm": False},
    "DINOv3, mean": {"trunk": Eva, "global_pool": "avg", "use_rot_pos_emb": True, "rope_type": "dinov3",
                     "num_reg_tokens": 4, "rope_rotate_half": True, "use_abs_pos_emb": False},
    "learned rotations": {"trunk": Eva, "global_pool": "token", "attn_type": "rope", "use_rot_pos_emb": True,
                          "rope_type": "mixed", "use_abs_pos_emb": False, "no_embed_class": True, "qk_norm": True},
}
UNSCORED = {
    "registers, mean and largest": {"class_token": False, "reg_tokens": 2, "global_pool": "avgmax"},
}
ALL = VARIANTS | UNSCORED


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_all_patches_equal_timms_forward_and_gradients(options):
    visual, pixels = small_timm(**options), images(3, (12, 20))
    ours, theirs = models.encode_image(visual, pixels), visual(pixels)
    torch.testing.assert_close(ours.features, theirs, rtol=0, atol=1e-5)
    assert ours.num_tokens == 15 + visual.trunk.num_prefix_tokens
    assert_same_gradients(gradients(visual, ours.features), gradients(visual, theirs))


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_kept_patches_equal_embedding_all_and_indexing(options):
    visual, pixels, keep = small_timm(**options), images(3, (12, 20)), draw_kept(3, 15, 7)
    ours, theirs = models.encode_image(visual, pixels, keep), timm_on_kept(visual, pixels, keep)
    torch.testing.assert_close(ours.features, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(visual.head(ours.cls), ours.features, rtol=0, atol=1e-6)
    assert ours.num_tokens == 7 + visual.trunk.num_prefix_tokens  # registers are never counted, never removed
    mine, expected = gradients(visual, ours.features), gradients(visual, theirs)
    assert_same_gradients(mine, expected)
    assert mine.keys() == dict(visual.named_parameters()).keys()
    everything = models.encode_image(visual, pixels, torch.arange(15).expand(3, -1)).features
    torch.testing.assert_close(everything, visual(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_scores_equal_those_of_full_attention_maps(options):
    visual, pixels = small_timm(**options), images(3, (12, 20))
    encoding = models.encode_image(visual, pixels, return_scores=True)
    expected = timm_scores_from_full_maps(visual, pixels)
    assert expected.std() > 1e-4  # a ranking, and no constant
    torch.testing.assert_close(encoding.scores, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoding.features, visual(pixels), rtol=0, atol=1e-5)
    assert encoding.scores.dtype == torch.float32
    assert not encoding.scores.requires_grad


@pytest.mark.parametrize("options", UNSCORED.values(), ids=UNSCORED)
def test_towers_without_attention_scores_say_so(options):
    with pytest.raises(UnsupportedModelError, match=r"no attention scores: .* such as uniform"):
        models.encode_image(small_timm(**options), images(1, (12, 20)), return_scores=True)


@pytest.mark.parametrize("name", ["class token", "registers", "registers with positions", "mean",
                                  "no class token, pooled by attention", "EVA-02", "PE-Core", "DINOv3",
                                  "learned rotations"])
def test_another_resolution_equals_timm_resized(name):
    visual, pixels = small_timm(**ALL[name]), images(2, (20, 8))
    ours = models.encode_image(visual, pixels)
    resized = small_timm(**ALL[name])
    models.resize_images(resized, (20, 8))
    assert models.vit_of(resized).grid_size == (5, 2)
    torch.testing.assert_close(models.encode_image(resized, pixels).features, ours.features, rtol=0, atol=1e-5)
    visual.trunk.set_input_size((20, 8))
    theirs = visual(pixels)
    torch.testing.assert_close(ours.features, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(resized(pixels), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["registers", "no class token, pooled by attention", "mean", "EVA-02", "DINOv3"])
def test_patch_tokens_and_mask_tokens(name):
    visual, pixels, keep = small_timm(**ALL[name]), images(2, (12, 20)), draw_kept(2, 15, 6)
    trunk, first = visual.trunk, visual.trunk.num_prefix_tokens
    whole = models.encode_image(visual, pixels, return_patches=True)
    tokens = trunk.fc_norm(trunk.forward_features(pixels))[:, first:]
    torch.testing.assert_close(whole.patches, tokens, rtol=0, atol=1e-5)
    mask = torch.randn(32)
    filled = models.encode_image(visual, pixels, keep, mask_token=mask)
    embedded = trunk.patch_embed(pixels)
    hidden = torch.ones(2, 15, dtype=torch.bool).scatter(1, keep, False).view(2, *embedded.shape[1:-1], 1)
    theirs = timm_after_embedding(visual, torch.where(hidden, mask, embedded), torch.arange(15).expand(2, -1))
    torch.testing.assert_close(filled.features, theirs, rtol=0, atol=1e-5)


def test_training_mode_draws_nothing():
    visual, pixels = small_timm(drop_path_rate=0.5), images(2, (12, 20))
    still = models.encode_image(visual, pixels).features
    visual.train()
    assert not torch.equal(visual(pixels), visual(pixels))  # timm's own forward does
    torch.testing.assert_close(models.encode_image(visual, pixels).features, still, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["registers", "EVA-02", "learned rotations"])
def test_recomputing_activations_changes_nothing(name):
    visual, pixels, keep = small_timm(**ALL[name]), images(2, (12, 20)), draw_kept(2, 15, 6)
    expected = gradients(visual, models.encode_image(visual, pixels, keep).features)
    visual.set_grad_checkpointing(True)
    assert_same_gradients(gradients(visual, models.encode_image(visual, pixels, keep).features), expected, 1e-7)


@pytest.mark.parametrize("name", ["registers", "no class token, pooled by attention", "EVA-02"])
def test_half_precision_is_close_and_scores_stay_fp32(name):
    visual, pixels = small_timm(**ALL[name]), images(4, (12, 20))
    exact = models.encode_image(visual, pixels, return_scores=True)
    with torch.autocast("cpu", torch.bfloat16):
        half = models.encode_image(visual, pixels, return_scores=True)
    assert F.cosine_similarity(half.features.float(), exact.features).min() > 0.999
    assert half.scores.dtype == torch.float32
    torch.testing.assert_close(half.scores, exact.scores, rtol=0.03, atol=0)


@pytest.mark.parametrize("options", [
    {"block_fn": ParallelScalingBlock}, {"attn_layer": DiffAttention}, {"pos_embed": "none"}, {"global_pool": "prr"},
    {"trunk": Eva, "global_pool": "token", "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2},
])
def test_other_parts_are_refused(options):
    with pytest.raises(UnsupportedModelError, match=r"a (VisionTransformer|Eva), is not a plain ViT .*supported are"):
        models.encode_image(small_timm(**options), images(1, (12, 20)))


def test_the_patch_embedding_has_one_name():
    visual = small_timm()
    assert models.patch_embedding_of(visual) is visual.trunk.patch_embed.proj
