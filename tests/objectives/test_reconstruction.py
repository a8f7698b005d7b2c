"""MAE and SimMIM against their papers, pixel by pixel, and inside a step."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from synthetic_passes import SHAPE, B, masked, step_context
from torch import Tensor, nn

from aclip import models
from aclip.config import Pass
from aclip.errors import ConfigError
from aclip.objectives import Reconstruction
from aclip.objectives.reconstruction import patch_pixels
from aclip.recipes import RECIPES
from aclip.structs import Batch, StepContext, ViewBatch
from tests_support import build as build_method
from tests_support import random_batch

MAE = {"decoder_layers": 2, "decoder_width": 32}
SIMMIM = {"decoder_layers": 0, "normalize": False, "loss": "l1"}


def build(reads: dict[str, Pass], **options: Any) -> Reconstruction:
    torch.manual_seed(0)
    return Reconstruction(reads, SHAPE, **options)


def literal_patch(image: Tensor, patch: int, across: int, size: tuple[int, int]) -> list[float]:
    """Return the pixels of one patch, in the order (channel, row, column)."""
    top, left = patch // across * size[0], patch % across * size[1]
    return [
        float(image[channel, top + y, left + x]) for channel in range(3) for y in range(size[0]) for x in range(size[1])
    ]


def literal_error(predicted: list[float], pixels: list[float], normalize: bool, loss: str) -> float:
    if normalize:  # MAE, section 4: "the mean and standard deviation of all pixels in a patch"
        mean = sum(pixels) / len(pixels)
        variance = sum((x - mean) ** 2 for x in pixels) / (len(pixels) - 1)
        pixels = [(x - mean) / math.sqrt(variance + 1e-6) for x in pixels]
    differences = [abs(a - b) for a, b in zip(predicted, pixels, strict=True)]
    return sum(d * d if loss == "mse" else d for d in differences) / len(pixels)


def literal(objective: Reconstruction, context: StepContext) -> float:
    """View by view, image by image, removed patch by removed patch; tokens come from the tested decoder."""
    seen = context.passes["masked"]
    errors = []
    for v in range(len(seen.cls)):
        for b in range(B):
            tokens = seen.patches[v, b]
            kept = range(len(tokens)) if seen.keep_indices is None else seen.keep_indices[v, b].tolist()
            if objective.decoder is not None:
                keep = torch.tensor([list(kept)])
                tokens = objective.decoder(seen.cls[v, b][None], tokens[None], keep, seen.grid_size)[0]
            for patch in set(range(len(tokens))) - set(kept):
                predicted = (objective.head.weight @ tokens[patch] + objective.head.bias).tolist()
                pixels = literal_patch(seen.pixels[v, b], patch, seen.grid_size[1], SHAPE.patch_size)
                errors.append(literal_error(predicted, pixels, objective.normalize, objective.loss))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("views", [("a",), ("a", "b")])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", ["mse", "l1"])
@pytest.mark.parametrize("layers", [0, 2])
def test_is_the_loop_over_removed_pixels(
    views: tuple[str, ...], mask_ratio: float, normalize: bool, loss: str, layers: int
) -> None:
    reads = masked(views, mask_ratio, fill=layers == 0)
    objective = build(reads, decoder_layers=layers, decoder_width=32, normalize=normalize, loss=loss)
    context = step_context(reads)
    assert objective(context).item() == pytest.approx(literal(objective, context), rel=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (8, 2)])
def test_patches_are_cut_row_by_row(grid: tuple[int, int]) -> None:
    pixels = torch.randn(2, 3, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    size = 32 // grid[0], 16 // grid[1]
    cut = patch_pixels(pixels, grid)
    for v, b, patch in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(16)).tolist():
        assert cut[v, b, patch].tolist() == literal_patch(pixels[v, b], patch, grid[1], size)


@pytest.mark.parametrize(("options", "fill"), [(MAE, False), (SIMMIM, True)])
def test_reads_the_pixels_of_removed_patches_alone(options: dict[str, Any], fill: bool) -> None:
    reads = masked(fill=fill)
    objective = build(reads, **options)
    context = step_context(reads)
    seen = context.passes["masked"]
    pixels = seen.pixels.clone().requires_grad_()
    objective(replace(context, passes={"masked": replace(seen, pixels=pixels)})).backward()
    by_patch = patch_pixels(pixels.grad, seen.grid_size).abs().amax(dim=-1)
    removed = torch.ones(2, B, 16, dtype=torch.bool).scatter(2, seen.keep_indices, False)
    assert torch.equal(by_patch > 0, removed)


@pytest.mark.parametrize(("options", "fill"), [(MAE, False), (SIMMIM, True)])
def test_nothing_removed_is_0_with_a_gradient_of_0(options: dict[str, Any], fill: bool) -> None:
    reads = masked(mask_ratio=0.0, fill=fill)
    objective = build(reads, **options)
    loss = objective(step_context(reads))
    loss.backward()
    assert loss.item() == 0.0
    assert all(q.grad is not None and not q.grad.any() for q in objective.parameters())


def test_a_flat_patch_gives_a_finite_loss() -> None:
    reads = masked()
    objective = build(reads, **MAE)
    context = step_context(reads)
    flat = replace(context.passes["masked"], pixels=torch.full((2, B, 3, 32, 32), 0.3))
    loss = objective(replace(context, passes={"masked": flat}))
    loss.backward()
    assert loss.isfinite()
    assert all(q.grad.isfinite().all() for q in objective.parameters())


def test_computes_errors_in_float32_under_autocast() -> None:
    reads = masked()
    objective = build(reads, **MAE)
    context = step_context(reads)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(context)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(objective(context).item(), rel=2**-7)


@pytest.mark.parametrize(("width", "expected"), [(12, 32), (192, 128), (384, 256), (768, 512), (1024, 512)])
def test_decoder_is_two_thirds_of_the_tower_in_heads_of_32(width: int, expected: int) -> None:
    with torch.device("meta"):
        objective = Reconstruction(masked(), replace(SHAPE, width=width))
    assert objective.decoder is not None
    assert (objective.decoder.width, objective.decoder.layers) == (expected, 8)
    assert tuple(objective.head.weight.shape) == (3 * 8 * 8, expected)


def test_cost_is_the_decoder_on_all_patches_of_every_view() -> None:
    with torch.device("meta"):
        mae = Reconstruction(masked(), replace(SHAPE, width=768))
        simmim = Reconstruction(masked(fill=True), replace(SHAPE, width=768), **SIMMIM)
    # per block and view: 12 L d^2 + 2 L^2 d with L = 197, d = 512
    assert mae.decoder_macs([(2, 196, 49)], 77) == 2 * 8 * (12 * 197 * 512**2 + 2 * 197**2 * 512)
    assert simmim.decoder_macs([(2, 196, 80)], 77) == 0.0


@pytest.mark.parametrize(
    ("fill", "options", "message"),
    [
        (False, {"decoder_layers": 0}, "has 0 layers, and fill of pass 'masked' is false"),
        (True, {}, "has 8 layers, and fill of pass 'masked' is true"),
        (False, {"decoder_width": 100}, "width is a multiple of 32"),
    ],
)
def test_refuses_what_makes_no_sense(fill: bool, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Reconstruction(masked(fill=fill), SHAPE, **options)


def literal_tokens(visual: Any, image: Tensor, keep: list[int], mask_token: Tensor | None) -> Tensor:
    """One image through open_clip's own modules: kept patches alone, or mask tokens in the others' places."""
    patches = visual.conv1(image[None]).flatten(2)[0].T
    rows = []
    for number, patch in enumerate(patches):
        if number in keep:
            rows.append(patch + visual.positional_embedding[1 + number])
        elif mask_token is not None:
            rows.append(mask_token + visual.positional_embedding[1 + number])
    cls = visual.class_embedding + visual.positional_embedding[0]
    return visual.ln_post(visual.transformer(visual.ln_pre(torch.stack([cls, *rows])[None])))[0]


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_step_equals_the_literal_paper(name: str) -> None:
    method = build_method(RECIPES[name])
    visual, objective = models.visual_of(method.model), method.objectives["reconstruction"]
    drawn = random_batch(method.plan, batch_size=3, seed=5)
    # without colour changes, which have their own oracles
    batch: Batch = replace(drawn, views={n: ViewBatch(v.pixels, v.boxes, v.flipped) for n, v in drawn.views.items()})
    output = method(batch)
    output.loss.backward()
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    gradients = {n: p.grad.clone() for n, p in trained.items()}
    method.zero_grad()

    grid, errors = method.plan.shape.grid_size, []
    for b in range(batch.size):
        image = (batch.views["a"].pixels[b] / 255.0 - 0.5) / 0.25
        keep = output.passes["masked"].keep_indices[0, b].tolist()
        tokens = literal_tokens(visual, image, keep, method.mask_token)
        if name == "mae":
            tokens = objective.decoder(tokens[:1], tokens[None, 1:], torch.tensor([keep]), grid)[0]
        else:
            tokens = tokens[1:]
        for patch in set(range(len(tokens))) - set(keep):
            pixels = torch.tensor(literal_patch(image, patch, grid[1], method.plan.shape.patch_size))
            if name == "mae":
                pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            difference = nn.functional.linear(tokens[patch], objective.head.weight, objective.head.bias) - pixels
            errors.append(difference.square().mean() if name == "mae" else difference.abs().mean())
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)

    expected.backward()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for key, parameter in trained.items():
        tolerance = 1e-4 * float(parameter.grad.abs().max()) + 1e-6 * largest
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=0, atol=tolerance)
