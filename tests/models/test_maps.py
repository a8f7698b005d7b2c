"""Maps of texts: against a literal transcription of Chefer et al. (arXiv 2103.15679) on the towers' own modules."""

import pytest
import torch
import torch.nn.functional as F
from test_timm_vit import UNSCORED, VARIANTS
from tower_oracles import images, small_timm, small_vit

from aclip import models
from aclip.errors import UnsupportedModelError

TEXTS = F.normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(5)), dim=-1)


def relevance(maps, similarity):
    """Equations 5 and 6 for one image, from attention maps (..., H, L, L) of which `similarity` was computed."""
    rollout = torch.eye(maps[0].shape[-1])
    for attention, gradient in zip(maps, torch.autograd.grad(similarity, maps, retain_graph=True), strict=True):
        heads = [torch.relu(one) for one in (gradient * attention).detach().flatten(0, -3)]
        rollout = rollout + sum(heads) / len(heads) @ rollout
    return rollout


def attend(q, k, v):
    """Attention of one image, (H, L, d), whose maps have a gradient; return the output and them."""
    maps = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
    return maps @ v, maps


def literal_open_clip(visual, image, text):
    x, maps = visual._embeds(image[None]), []
    for block in visual.transformer.resblocks:
        joined = F.linear(block.ln_1(x)[0], block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = (part.unflatten(-1, (block.attn.num_heads, -1)).transpose(0, 1) for part in joined.chunk(3, dim=-1))
        mixed, attention = attend(q, k, v)
        maps.append(attention)
        x = x + block.attn.out_proj(mixed.transpose(0, 1).flatten(1))[None]
        x = x + block.mlp(block.ln_2(x))
    similarity = F.cosine_similarity((visual.ln_post(x[:, 0]) @ visual.proj)[0], text, dim=0)
    return relevance(maps, similarity)[0, 1:]


def literal_timm(visual, image, text):
    """Hook the attention maps out of timm's own forward; the pool's are recomputed from its input."""
    trunk, maps, pooled = visual.trunk, [], []
    hooks = [block.attn.attn_drop.register_forward_hook(lambda _, __, out: maps.append(out)) for block in trunk.blocks]
    for block in trunk.blocks:
        block.attn.fused_attn = False
    if trunk.attn_pool is not None:
        pool = trunk.attn_pool
        pool.fused_attn = False
        hooks.append(pool.kv.register_forward_hook(lambda _, __, out: pooled.append(out)))
    feature = visual(image[None])[0]
    if trunk.attn_pool is None:
        rollout = relevance(maps, F.cosine_similarity(feature, text, dim=0))
        row = rollout[trunk.num_prefix_tokens:].mean(dim=0) if trunk.global_pool == "avg" else rollout[0]
    else:
        heads = (pool.num_heads, -1)
        query = pool.q_norm(pool.q(pool.latent)[0].unflatten(-1, heads).transpose(0, 1))
        k, v = (part.unflatten(-1, heads).transpose(0, 1) for part in pooled[0][0].chunk(2, dim=-1))
        mixed, attention = attend(query, pool.k_norm(k), v)
        token = pool.proj(mixed.transpose(0, 1).flatten(1))
        token = (token + pool.mlp(pool.norm(token)))[None]
        again = visual.head(trunk.head(trunk.fc_norm(token[:, 0])))[0]
        torch.testing.assert_close(again, feature)
        similarity = F.cosine_similarity(again, text, dim=0)
        rollout = relevance(maps, similarity)
        (gradient,) = torch.autograd.grad(similarity, attention, retain_graph=True)
        last = torch.relu(gradient * attention).mean(dim=0).detach()
        row = (last @ rollout[rollout.shape[-1] - last.shape[-1]:])[0]
    for hook in hooks:
        hook.remove()
    for part in [*(block.attn for block in trunk.blocks), *([trunk.attn_pool] if trunk.attn_pool else [])]:
        part.fused_attn = True
    return row[trunk.num_prefix_tokens:]


@pytest.mark.parametrize("size", [(12, 20), (24, 16)], ids=["own size", "another size and aspect"])
def test_maps_of_open_clips_vit(size):
    visual, pixels = small_vit(), images(2, size)
    visual.requires_grad_(False)
    with torch.no_grad():
        maps = models.text_maps(visual, pixels, TEXTS)
    assert maps.shape == (2, 2, size[0] * size[1] // 16)
    assert not maps.requires_grad
    if size == (12, 20):
        visual.requires_grad_(True)
        for image, of_image in zip(pixels, maps, strict=True):
            for text, one in zip(TEXTS, of_image, strict=True):
                torch.testing.assert_close(one, literal_open_clip(visual, image, text), rtol=1e-4, atol=1e-8)
    else:
        models.resize_images(visual, size)
        torch.testing.assert_close(maps, models.text_maps(visual, pixels, TEXTS))


def test_maps_within_inference_mode():
    visual = small_vit()
    with torch.inference_mode():
        maps = models.text_maps(visual, images(1, (12, 20)), TEXTS.clone())
    torch.testing.assert_close(maps, models.text_maps(visual, images(1, (12, 20)), TEXTS))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_maps_of_timms_vits(options):
    visual, pixels = small_timm(**options), images(2, (12, 20))
    maps = models.text_maps(visual, pixels, TEXTS)
    assert maps.shape == (2, 2, 15)
    for image, of_image in zip(pixels, maps, strict=True):
        for text, one in zip(TEXTS, of_image, strict=True):
            torch.testing.assert_close(one, literal_timm(visual, image, text), rtol=1e-4, atol=1e-8)


def test_maps_need_attention_that_pools():
    options = UNSCORED["registers, mean and largest"]
    with pytest.raises(UnsupportedModelError, match="no attention scores"):
        models.text_maps(small_timm(**options), images(1, (12, 20)), TEXTS)

