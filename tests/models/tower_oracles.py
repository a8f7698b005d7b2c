"""Slow, literal versions of what the towers do, on open_clip's own modules, and models to try them on."""

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmTrunk
from torch import Tensor, nn

from aclip import checkpoint, models


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every bias, norm and scale away from zeros and ones, so that leaving one out shows."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return module


def fresh_model(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """Build a model with reproducible, shaken weights in evaluation mode."""
    torch.manual_seed(seed)
    return shake(models.create_model(name, **options)).eval()


def small_vit(seed: int = 0, **options: Any) -> VisionTransformer:
    """Build a tiny ViT: 3 x 5 patches of 4 pixels unless told otherwise."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "image_size": (12, 20), "patch_size": 4, "width": 32, "layers": 3, "heads": 4, "mlp_ratio": 2.0,
        "output_dim": 24,
    }
    return shake(VisionTransformer(**{**defaults, **options})).eval()


def images(count: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    """Return (count, 3, height, width) noise."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def draw_kept(count: int, patches: int, keep: int, seed: int = 2) -> Tensor:
    """Return (count, keep) random ascending patch numbers."""
    order = torch.rand(count, patches, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order[:, :keep].sort(dim=1).values


def embed_all_then_index(visual: Any, pixels: Tensor, keep: Tensor, positions: Tensor) -> Tensor:
    """Embed every patch with the convolution, add positions, and only then pick; run open_clip's blocks."""
    x = visual.conv1(pixels).flatten(2).transpose(1, 2) + positions[1:]
    x = torch.stack([tokens[index] for tokens, index in zip(x, keep, strict=True)])
    cls = (visual.class_embedding + positions[0]).expand(len(x), 1, -1)
    x = visual.transformer(visual.ln_pre(torch.cat([cls, x], dim=1)))
    pooled, _ = visual._pool(x)
    return pooled @ visual.proj


def scores_from_full_maps(visual: Any, pixels: Tensor) -> Tensor:
    """Average a row, the class token's or the mean of the patches', over the attention maps of every layer and head."""
    x, rows = visual._embeds(pixels), []
    for block in visual.transformer.resblocks:
        normed = block.ln_1(x)
        maps = block.attn(normed, normed, normed, need_weights=True, average_attn_weights=False)[1]
        asking = maps[:, :, 0] if visual.pool_type == "tok" else maps[:, :, 1:].mean(dim=2)
        rows.append(asking[:, :, 1:].mean(dim=1))
        x = block(x)
    return torch.stack(rows).mean(dim=0)


def write_model(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> Path:
    """Save a model as open_clip keeps local ones."""
    folder.mkdir(parents=True)
    preprocess = {**models.preprocess_config(model), "mean": [0.1, 0.2, 0.3]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": dict(config), "preprocess_cfg": preprocess}))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def write_checkpoint(run: Path, step: int, model: nn.Module, average: nn.Module | None = None) -> Path:
    """Save a model, and the EMA of its image tower, as a run's checkpoint of `step`, on pairs in batches of 32."""
    tensors = {f"method/model.{name}": tensor for name, tensor in model.state_dict().items()}
    if average is not None:
        tensors |= {f"method/ema_visual.{name}": tensor for name, tensor in average.state_dict().items()}
    temporary = run / "checkpoints" / ".temporary"
    temporary.mkdir(parents=True)
    part = {name: (tensor.detach().clone(), [0] * tensor.ndim) for name, tensor in tensors.items()}
    checkpoint.write_rank_file(temporary, part)
    return checkpoint.commit(run / "checkpoints", temporary, step, {"samples_seen": 32 * step})


def flip_bit(path: Path) -> None:
    """Damage a file in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def open_clip_alone(folder: Path, **options: Any) -> nn.Module:
    """Load a saved model with open_clip, without this package."""
    model: nn.Module = open_clip.create_model(f"local-dir:{folder}", **options)
    return model.eval()


def gradients(module: nn.Module, output: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """Return the gradient of a random weighting of `output` by every parameter that it depends on."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    module.zero_grad()
    (output * weights).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(
    ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Compare every gradient, relative to the largest entry of the whole module's."""
    assert ours.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=float(tolerance * largest), msg=name)


def small_timm(seed: int = 0, out: int = 24, trunk: type[nn.Module] = TimmTrunk, **options: Any) -> TimmModel:
    """Build open_clip's wrapper around a tiny trunk of timm's: 3 x 5 patches of 4 pixels unless told otherwise."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "img_size": (12, 20), "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0,
        "num_classes": 0,
    }
    visual = TimmModel("test_vit", out, pool="token", proj="linear")
    visual.trunk = trunk(**{**defaults, **options})
    visual.head = nn.Sequential(OrderedDict(drop=nn.Dropout(0.1), proj=nn.Linear(visual.trunk.embed_dim, out)))
    with torch.no_grad():
        for token in (visual.trunk.cls_token, visual.trunk.reg_token):
            if token is not None:
                token.normal_(std=0.5)  # timm starts them at almost nothing
    return shake(visual).eval()


def timm_on_kept(visual: TimmModel, pixels: Tensor, keep: Tensor) -> Tensor:
    """Embed every patch and add every position as timm does, and only then pick; run timm's own blocks and head."""
    trunk = visual.trunk
    return timm_after_embedding(visual, trunk.patch_embed(pixels), keep)


def timm_after_embedding(visual: TimmModel, embedded: Tensor, keep: Tensor) -> Tensor:
    """Run timm's own positions, blocks and head on some of the embedded patches, with their own rotations."""
    trunk, prefix = visual.trunk, torch.arange(visual.trunk.num_prefix_tokens)
    found = trunk._pos_embed(embedded)
    x, rotary = found if isinstance(found, tuple) else (found, None)
    x = torch.stack([tokens[torch.cat([prefix, len(prefix) + index])] for tokens, index in zip(x, keep, strict=True)])
    x = trunk.norm_pre(x)
    for depth, block in enumerate(trunk.blocks):
        if rotary is None:
            x = block(x)
        else:  # (N, e), or of each head (H, N, e), of which every sample has its own rows
            table = rotary[depth] if rotary.ndim == 4 else rotary[None]
            x = block(x, rope=torch.stack([table[:, index] for index in keep]))
    return visual.head(trunk.forward_head(trunk.norm(x)))


def timm_scores_from_full_maps(visual: TimmModel, pixels: Tensor) -> Tensor:
    """Hook the complete attention maps out of timm's own forward; the pool's from its formula, head by head."""
    trunk, maps = visual.trunk, []
    hooks = [block.attn.attn_drop.register_forward_hook(lambda _, __, out: maps.append(out)) for block in trunk.blocks]
    for block in trunk.blocks:
        block.attn.fused_attn = False
    x = trunk.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    for block in trunk.blocks:
        block.attn.fused_attn = True
    first = trunk.num_prefix_tokens
    if trunk.global_pool == "avg":  # every patch asks
        return torch.stack([m[:, :, first:, first:].mean(dim=(1, 2)) for m in maps]).mean(dim=0)
    if trunk.attn_pool is None:
        return torch.stack([m[:, :, 0, first:].mean(dim=1) for m in maps]).mean(dim=0)
    pool, rows, pooled_prefix = trunk.attn_pool, [], 0 if isinstance(trunk, TimmTrunk) else first
    query = pool.q(pool.latent[0, 0])
    keys = pool.kv(x[:, first - pooled_prefix:])[..., : len(query)]
    for head in range(pool.num_heads):
        part = slice(head * pool.head_dim, (head + 1) * pool.head_dim)
        q, k = pool.q_norm(query[part]), pool.k_norm(keys[..., part])
        rows.append(torch.softmax(k @ q / pool.head_dim**0.5, dim=-1))
    return torch.stack(rows).mean(dim=0)[:, pooled_prefix:]
