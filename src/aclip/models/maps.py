"""Where an image answers a text: how much each patch's attention raises their similarity."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aclip.errors import UnsupportedModelError
from aclip.models.blocks import blocks_of, run_block
from aclip.models.vision import NO_ATTENTION_SCORES, embed_tokens, vit_of


class _Attentions(TorchFunctionMode):
    """Keeps queries, keys, values and outputs of all attentions that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **kwargs or {})
        if function is F.scaled_dot_product_attention:
            self.calls.append((*args, output))
        return output


@torch.inference_mode(False)
@torch.enable_grad()
def text_maps(
    visual: nn.Module, pixels: Float[Tensor, "B 3 h w"], text_features: Float[Tensor, "T D"]
) -> Float[Tensor, "B T N"]:
    """Return the relevance of each patch to the similarity of image and text, by gradient-weighted attention rollout.

    Chefer et al., "Generic attention-model explainability" (arXiv 2103.15679), equations 5 and 6. With S the cosine
    similarity and A_h the attention maps of a block's heads, over all blocks, from R = 1 on,

        R <- R + mean_h max(0, A_h . dS/dA_h) R

    The map is the class token's row of R, its patches; in a tower that pools the mean, the mean of the patches' rows;
    in one that pools by attention (SigLIP), the row of the pool's query, mean_h max(0, A_h . dS/dA_h) R.

    Args:
        visual: an image tower, as `encode_image` takes it, in fp32.
        pixels: (B, 3, h, w) float32, normalised; h and w multiples of the patch size.
        text_features: (T, D) float32, L2-normalised.

    Returns:
        (B, T, N) float32, not negative, without gradient; 0 is no relevance.

    Raises:
        UnsupportedModelError: a tower without attention scores.
    """
    vit = vit_of(visual)
    if vit.scored_by is None:
        raise UnsupportedModelError(NO_ATTENTION_SCORES)
    with _Attentions() as attentions:
        # attention has a gradient even in a frozen tower; what was made in inference mode has none
        pixels = pixels.clone().detach().requires_grad_()
        x, rotary = embed_tokens(vit, pixels)
        for index, block in enumerate(blocks_of(vit.stack)):
            x, _ = run_block(block, x, rotary=rotary[index] if rotary else None)
        pooled, _ = vit.pool(x, False)
        similarity = F.normalize(vit.project(pooled), dim=-1) @ text_features.clone().mT
    calls = attentions.calls
    maps = []
    for one in similarity.unbind(1):
        gradients = torch.autograd.grad(one.sum(), [output for *_, output in calls], retain_graph=True)
        weights = [_weights(q, k, v, gradient) for (q, k, v, _), gradient in zip(calls, gradients, strict=True)]
        last = weights.pop() if vit.scored_by == "pool" else None
        relevance = torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)
        for weight in weights:
            relevance = relevance + weight @ relevance
        if last is not None:  # a pool may leave out the prefix
            relevance = last @ relevance[:, x.shape[1] - last.shape[2]:]
        rows = relevance[:, vit.num_prefix_tokens:].mean(dim=1) if vit.scored_by == "patches" else relevance[:, 0]
        maps.append(rows[:, vit.num_prefix_tokens:])
    return torch.stack(maps, dim=1)


@torch.no_grad()
def _weights(
    q: Float[Tensor, "B H M d"], k: Float[Tensor, "B H L d"], v: Float[Tensor, "B H L d"],
    gradient: Float[Tensor, "B H M d"],
) -> Float[Tensor, "B M L"]:
    """Return mean_h max(0, A_h . dS/dA_h), given the gradient of the output A v, which times v is that of A."""
    attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
    weights: Tensor = (attention * (gradient @ v.mT)).clamp_min(0).mean(dim=1)
    return weights
