"""The step of A-CLIP against a slow, literal transcription of the paper."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aclip import models, plan
from aclip.config import EmaMomentum, ObjectiveConfig, Pass, TextPass, override
from aclip.errors import ConfigError
from aclip.masking import TEXT_REDUCTIONS, TextReductionContext
from aclip.method import Method, freeze
from aclip.recipes import RECIPES
from aclip.structs import Batch, ViewBatch
from tests_support import build, random_batch, small


def literal_scores(visual: nn.Module, image: Tensor) -> Tensor:
    """Section 3.1: [CLS] attention averaged over layers and heads, from full attention maps, one image."""
    x = visual.conv1(image[None]).flatten(2).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding[None, None], x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    rows = []
    for block in visual.transformer.resblocks:
        y = block.ln_1(x)
        _, maps = block.attn(y, y, y, need_weights=True, average_attn_weights=False)
        rows.append(maps[0, :, 0, 1:].mean(dim=0))
        x = block(x)
    return torch.stack(rows).mean(dim=0)


def literal_crop(scores: Tensor, grid: int, context: Tensor, view: Tensor, flipped: bool) -> Tensor:
    """Bilinear interpolation of the score map at the centre of each patch of the view, borders clamped."""
    result = torch.zeros(grid, grid)
    field = scores.reshape(grid, grid)
    for i in range(grid):
        for j in range(grid):
            column = grid - 1 - j if flipped else j
            y = (view[0] + (i + 0.5) / grid * view[2] - context[0]) / context[2] * grid - 0.5
            x = (view[1] + (column + 0.5) / grid * view[3] - context[1]) / context[3] * grid - 0.5
            y, x = float(y.clamp(0, grid - 1)), float(x.clamp(0, grid - 1))
            y0, x0 = min(int(y), grid - 2), min(int(x), grid - 2)
            fy, fx = y - y0, x - x0
            result[i, j] = (field[y0, x0] * (1 - fy) * (1 - fx) + field[y0, x0 + 1] * (1 - fy) * fx
                            + field[y0 + 1, x0] * fy * (1 - fx) + field[y0 + 1, x0 + 1] * fy * fx)
    return result


def literal_keep(scores: Tensor, grid: int, fraction: float) -> list[int]:
    """Section 3.1: the best blocks of 2 x 2 patches."""
    half = grid // 2
    means = [(-float(scores[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()), i * half + j)
             for i in range(half) for j in range(half)]
    best = [block for _, block in sorted(means)[: int(half * half * fraction + 0.5)]]
    return sorted((2 * (b // half) + di) * grid + 2 * (b % half) + dj
                  for b in best for di in range(2) for dj in range(2))


def literal_encode(visual: nn.Module, image: Tensor, keep: list[int] | None) -> tuple[Tensor, Tensor]:
    x = visual.conv1(image[None]).flatten(2).permute(0, 2, 1) + visual.positional_embedding[1:]
    x = x if keep is None else x[:, keep]
    cls = (visual.class_embedding + visual.positional_embedding[0])[None, None]
    x = visual.transformer(visual.ln_pre(torch.cat([cls, x], dim=1)))
    cls_out = visual.ln_post(x[:, 0])
    return cls_out[0], (cls_out @ visual.proj)[0]


def literal_a_clip(method: Method, batch: Batch) -> Tensor:
    """Equations of the paper, sample by sample; heads and BatchNorm are the method's own modules."""
    visual, ema = models.visual_of(method.model), method.ema_visual
    assert ema is not None
    grid, count = 8, batch.size
    images = {name: (view.pixels / 255.0 - 0.5) / 0.25 for name, view in batch.views.items()}
    cls: dict[str, list[Tensor]] = {"a": [], "b": [], "context": []}
    features: dict[str, list[Tensor]] = {"a": [], "b": [], "context": []}
    for n in range(count):
        with torch.no_grad():
            scores = literal_scores(ema, images["context"][n])
            for store, value in zip((cls, features), literal_encode(ema, images["context"][n], None), strict=True):
                store["context"].append(value)
        for view in ("a", "b"):
            box, seen = batch.views[view], batch.views["context"]
            cropped = literal_crop(scores, grid, seen.boxes[n], box.boxes[n], bool(box.flipped[n]))
            keep = literal_keep(cropped, grid, 0.5)
            for store, value in zip((cls, features), literal_encode(visual, images[view][n], keep), strict=True):
                store[view].append(value)

    text = F.normalize(method.model.encode_text(F.pad(batch.tokens, (0, 77 - batch.tokens.shape[1]))), dim=1)
    scale = method.model.logit_scale.exp()
    contrast = []
    for view in ("a", "b"):
        v = F.normalize(torch.stack(features[view]), dim=1)
        for rows, columns in ((v, text), (text, v)):
            for n in range(count):
                logits = torch.stack([scale * rows[n] @ columns[m] for m in range(count)])
                contrast.append(torch.logsumexp(logits, dim=0) - logits[n])

    stacked = torch.stack(cls["a"] + cls["b"])
    z = F.normalize(method.objectives["ntxent"].head(stacked), dim=1)
    simclr = []
    for i in range(2 * count):
        positive = (i + count) % (2 * count)
        others = torch.stack([z[i] @ z[k] / 0.1 for k in range(2 * count) if k != i])
        simclr.append(torch.logsumexp(others, dim=0) - z[i] @ z[positive] / 0.1)

    byol = method.objectives["byol"]
    prediction = byol.predictor(byol.projector(stacked))
    target = byol.ema_projector(torch.stack(cls["context"])).detach()
    regress = [2 - 2 * F.cosine_similarity(prediction[i], target[i % count], dim=0) for i in range(2 * count)]
    # 1/2 sum over views of [1/2 (image->text + text->image)]; then SimCLR, and BYOL of both views
    return (torch.stack(contrast).mean() + torch.stack(simclr).mean()
            + torch.stack(regress[:count]).mean() + torch.stack(regress[count:]).mean())


def plain(batch: Batch) -> Batch:
    """Return the batch without colour augmentation, which has its own oracles."""
    views = {n: ViewBatch(v.pixels, v.boxes, v.flipped) for n, v in batch.views.items()}
    return replace(batch, views=views)


def test_step_equals_the_literal_paper() -> None:
    method = build(RECIPES["a-clip"])
    with torch.no_grad():  # let the EMA differ from the online tower
        for p in method.ema_visual.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    batch = plain(random_batch(method.plan, batch_size=3, seed=3))
    ours = method(batch).loss
    literal = literal_a_clip(method, batch)
    torch.testing.assert_close(ours, literal, rtol=1e-5, atol=1e-5)

    ours.backward()
    gradients = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    literal_a_clip(method, batch).backward()
    largest = max(float(g.abs().max()) for g in gradients.values())
    before_batch_norm = {"objectives.ntxent.head.0.bias", "objectives.ntxent.head.3.bias"}
    for name, parameter in method.named_parameters():
        if name in before_batch_norm:  # 0 in exact arithmetic: the BatchNorm removes any shift
            assert max(float(g.abs().max()) for g in (gradients[name], parameter.grad)) < 1e-4 * largest
        elif parameter.requires_grad:
            tolerance = 1e-4 * float(parameter.grad.abs().max()) + 1e-6 * largest
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=tolerance)


def test_scores_of_a_flipped_source_are_read_upright() -> None:
    """A pass may take scores from any view: mirroring both source and view changes nothing."""
    recipe = replace(
        RECIPES["a-clip"], views="two_augs", view_options={},
        objectives={"contrastive": ObjectiveConfig(reads=("m", "captions"))},
        passes={"s": Pass(views=("a",), encoder="ema"),
                "m": Pass(views=("b",), masking="attentive", mask_ratio=0.5, scores_from="s")},
        ema_momentum=EmaMomentum(),
    )
    method = build(recipe)
    batch = plain(random_batch(method.plan, batch_size=4))
    upright = replace(batch, views={n: replace(v, flipped=torch.zeros(4, dtype=torch.bool))
                                    for n, v in batch.views.items()})
    source = torch.rand(4, 8, 8)
    p = method.plan.passes["m"]

    def read(batch: Batch, scores: Tensor) -> Tensor:
        encoded = replace(method.run_passes(batch)["s"], scores=scores.flatten(1)[None])
        result = method.scores_for(method.plan, p, "b", batch.views, {"s": encoded})
        assert result is not None
        return result.reshape(4, 8, 8)

    mirrored = replace(upright, views={
        "a": replace(upright.views["a"], flipped=torch.ones(4, dtype=torch.bool)), "b": upright.views["b"]})
    torch.testing.assert_close(read(mirrored, source.flip(2)), read(upright, source))
    both = replace(mirrored, views={**mirrored.views, "b": replace(
        upright.views["b"], flipped=torch.ones(4, dtype=torch.bool))})
    torch.testing.assert_close(read(both, source.flip(2)), read(upright, source).flip(2))


def test_freezing_what_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no parameter of the model is called 'visual\.conv9\.'"):
        freeze(models.create_model("vit-tiny"), ("visual.conv9.",))


def test_a_pattern_freezes_a_tower() -> None:
    method = build(replace(RECIPES["clip"], freeze=("visual.*",)))
    method(random_batch(method.plan, batch_size=4)).loss.backward()
    for name, parameter in method.model.named_parameters():
        assert (parameter.grad is None) == name.startswith("visual."), name


def test_align_trains_the_projections_alone() -> None:
    method = build(RECIPES["align"])
    method(random_batch(method.plan, batch_size=4)).loss.backward()
    trained = {name for name, parameter in method.model.named_parameters() if parameter.grad is not None}
    assert trained == {"visual.proj", "text_projection", "logit_scale"}
    assert method.plan.relative_cost() == pytest.approx(1 / 3)


def test_small_heads_change_widths_alone() -> None:
    recipe = small(RECIPES["a-clip"])
    assert list(recipe.objectives) == list(RECIPES["a-clip"].objectives)
    assert recipe.passes == RECIPES["a-clip"].passes


@pytest.mark.parametrize("name", ["clip", "a-clip", "mae", "maskclip"])
def test_a_smaller_resolution_shrinks_every_pass(name: str) -> None:
    method = build(RECIPES[name])
    batch = random_batch(method.plan, batch_size=4)
    output = method(batch, resolution=0.5)
    smaller = plan.resolve(method.plan.recipe, method.plan.shape, 0.5)
    for key, p in smaller.passes.items():
        assert p.grid_size == (4, 4)
        assert output.passes[key].grid_size == (4, 4)
        assert output.passes[key].num_tokens == p.num_tokens
    torch.testing.assert_close(output.loss, method(batch, resolution=0.5).loss, rtol=0, atol=0)
    assert output.loss.isfinite()
    assert method(batch).passes[key].grid_size == (8, 8)


@pytest.mark.parametrize("reduction", TEXT_REDUCTIONS)
def test_reduced_captions_are_what_is_encoded(reduction: str) -> None:
    texts = {"captions": TextPass(reduction=reduction, reduction_options={"num_keep": 3})}
    recipe = replace(RECIPES["clip"], texts=texts)
    method = build(recipe)
    if method.frequencies is not None:
        method.frequencies.fill_(1 / len(method.frequencies))
    batch = random_batch(method.plan, batch_size=4)
    seen = method.encode_text(method.plan.texts["captions"], batch)
    assert seen.tokens.shape == (4, 5)
    context = TextReductionContext(seeds=batch.seeds, frequencies=method.frequencies)
    assert torch.equal(seen.tokens, TEXT_REDUCTIONS[reduction](3)(batch.tokens, context))
    features = F.normalize(models.encode_text(method.model, seen.tokens), dim=-1)
    torch.testing.assert_close(seen.features, features, rtol=0, atol=0)
    assert torch.equal(method.encode_text(method.plan.texts["captions"], batch, masked=False).tokens, batch.tokens)


def test_an_online_encoder_that_only_scores_leaves_no_graph_and_every_gradient() -> None:
    """In bf16 too: autocast must not reuse weights that it cast without gradient in the masked pass."""
    recipe = override(RECIPES["attentive-2x50"], {"passes.context.encoder": "online"})
    method, twin = build(recipe), build(RECIPES["attentive-2x50"])  # whose average still equals the online encoder
    assert method.ema_visual is None
    batch = plain(random_batch(method.plan, batch_size=3))
    for one in (method, twin):
        with torch.autocast("cpu", torch.bfloat16):
            output = one(batch)
        context = output.passes["context"]
        assert not any(tensor.requires_grad for tensor in (context.features, context.cls, context.scores))
        assert context.features.shape == (1, 3, 0)
        output.loss.backward()
    for (name, ours), (_, theirs) in zip(method.model.named_parameters(), twin.model.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
