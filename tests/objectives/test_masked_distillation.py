"""MaskCLIP's masked self-distillation against a loop over images, patches and codewords."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from synthetic_passes import GRID, NUM_PATCHES, SHAPE, B, masked, step_context
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from aclip.config import Pass
from aclip.ema import Ema
from aclip.errors import ConfigError
from aclip.objectives import functional
from aclip.objectives.maskclip import MaskedDistillation, Quantizer
from aclip.objectives.reconstruction import PatchDecoder, sine_cosine
from aclip.plan import resolve
from aclip.recipes import RECIPES
from aclip.structs import Encoded, StepContext
from over_ranks import in_double
from tests_support import VIT_B_16

CODEWORDS = 7


READS = {**masked(), "teacher": Pass(views=("a", "b"), encoder="ema")}


def build(**options: Any) -> MaskedDistillation:
    """Return the objective with an average that differs from its quantizer."""
    torch.manual_seed(0)
    objective = MaskedDistillation(READS, SHAPE, codewords=CODEWORDS, **options)
    with torch.no_grad():
        for parameter in objective.ema_quantizer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return objective


def without_removal(context: StepContext, indices: bool) -> StepContext:
    """Return a context whose student saw every patch, with or without saying which."""
    teacher = context.passes["teacher"]
    whole = replace(teacher, cls=teacher.cls.clone().requires_grad_(), patches=teacher.patches.clone().requires_grad_())
    keep = torch.arange(NUM_PATCHES).expand(2, B, -1) if indices else None
    return replace(context, passes={**context.passes, "masked": replace(whole, keep_indices=keep)})


def literal_decode(decoder: PatchDecoder, seen: Encoded, v: int, n: int) -> Tensor:
    """Put one image's sequence together patch by patch and run open_clip's own blocks on it."""
    keep = seen.keep_indices[v, n].tolist()
    positions = sine_cosine(SHAPE.width, GRID, torch.device("cpu"))
    sequence = [decoder.embed(seen.cls[v, n])]
    for patch in range(NUM_PATCHES):
        token = decoder.embed(seen.patches[v, n, keep.index(patch)]) if patch in keep else decoder.mask_token
        sequence.append(token + positions[patch])
    return decoder.norm(decoder.transformer(torch.stack(sequence)[None]))[0, 1:]


def literal_codewords(quantizer: Quantizer, x: Tensor) -> list[Tensor]:
    """Return the cosine of the patch and each codeword."""
    y = quantizer.bottleneck.weight @ x + quantizer.bottleneck.bias
    return [(y @ c) / ((y @ y).sqrt() * (c @ c).sqrt()) for c in quantizer.codewords]


def literal_softmax(logits: list[Tensor], temperature: float) -> list[Tensor]:
    powers = [(logit / temperature).exp() for logit in logits]
    return [power / sum(powers) for power in powers]


def literal_loss(
    objective: MaskedDistillation, context: StepContext, temperature: float = 0.1, teacher_temperature: float = 0.04
) -> Tensor:
    seen, whole = context.passes["masked"], context.passes["teacher"]
    said, aimed = [], []
    for v, n in product(range(2), range(B)):
        decoded = literal_decode(objective.decoder, seen, v, n)
        for patch in range(NUM_PATCHES):
            if patch not in seen.keep_indices[v, n].tolist():
                said.append(literal_codewords(objective.quantizer, decoded[patch]))
                with torch.no_grad():
                    aimed.append(literal_codewords(objective.ema_quantizer, whole.patches[v, n, patch]))
    centre = [sum(row[w] for row in aimed) / len(aimed) for w in range(CODEWORDS)]
    losses = []
    for logits, target in zip(said, aimed, strict=True):
        p = literal_softmax(logits, temperature)
        q = literal_softmax([t - c for t, c in zip(target, centre, strict=True)], teacher_temperature)
        losses.append(-sum(q[w] * p[w].log() for w in range(CODEWORDS)))
    return sum(losses) / len(losses)


def gradients(objective: MaskedDistillation, context: StepContext, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    named |= {"cls": context.passes["masked"].cls, "patches": context.passes["masked"].patches}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("options", [{}, {"decoder_layers": 2, "student_temperature": 0.2, "teacher_temperature": 0.1}])
def test_equals_a_loop_over_removed_patches(options: dict[str, Any]) -> None:
    objective, context = build(**options), step_context(READS)
    temperatures = [options[name] for name in ("student_temperature", "teacher_temperature") if name in options]
    ours, expected = objective(context), literal_loss(objective, context, *temperatures)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    actual, reference = gradients(objective, context, ours), gradients(objective, context, expected)
    largest = max(float(g.abs().max()) for g in reference.values())
    for name, gradient in reference.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-5 * largest, msg=name)


def test_only_the_online_side_learns() -> None:
    objective, context = build(), step_context(READS)
    aimed = context.passes["teacher"].patches.requires_grad_()
    objective(context).backward()
    assert aimed.grad is None
    assert all(p.grad is None and not p.requires_grad for p in objective.ema_quantizer.parameters())
    for module in (objective.decoder, objective.quantizer):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    for seen in (context.passes["masked"].cls.grad, context.passes["masked"].patches.grad):
        assert (seen.abs().amax(dim=-1) > 0).all()


def test_targets_are_removed_patches_alone() -> None:
    objective, context = build(), step_context(READS)
    whole = context.passes["teacher"]
    kept = torch.zeros(2, B, NUM_PATCHES, dtype=torch.bool)
    kept.scatter_(2, context.passes["masked"].keep_indices, True)

    def with_noise_at(where: Tensor) -> Tensor:
        noisy = torch.where(where[..., None], whole.patches + 1.0, whole.patches)
        return objective(replace(context, passes={**context.passes, "teacher": replace(whole, patches=noisy)}))

    assert with_noise_at(kept) == objective(context)
    assert with_noise_at(~kept) != objective(context)


@pytest.mark.parametrize("indices", [False, True])
def test_nothing_removed_is_zero_with_a_gradient(indices: bool) -> None:
    objective = build()
    context = without_removal(step_context(READS), indices)
    loss = objective(context)
    assert loss == 0
    found = gradients(objective, context, loss)
    assert all(not gradient.any() for gradient in found.values())


def test_the_centre_removes_what_all_patches_share() -> None:
    """A direction common to all the teacher's logits does not decide which codeword a patch gets."""
    objective, context = build(), step_context(READS)
    plain = objective(context)

    class Shifted(Quantizer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.arange(CODEWORDS)

        def mean(self, x: Tensor) -> Tensor:
            return super().mean(x) + torch.arange(CODEWORDS)

    objective.ema_quantizer.__class__ = Shifted
    torch.testing.assert_close(objective(context), plain, rtol=0, atol=1e-4)


def test_logits_in_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build()
    with in_double(objective):
        context = step_context(READS)
        loss = objective(context)
        reference = gradients(objective, context, loss)
        monkeypatch.setattr(functional, "LOGITS_AT_ONCE", 5 * CODEWORDS)  # some patches at a time, the last time fewer
        parts = objective(context)
        for actual, expected in ((parts, loss), *(
                (gradient, reference[name]) for name, gradient in gradients(objective, context, parts).items())):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_no_more_logits_are_held_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, rows = build(), []
    monkeypatch.setattr(functional, "LOGITS_AT_ONCE", 5 * CODEWORDS)
    for quantizer in (objective.quantizer, objective.ema_quantizer):
        quantizer.register_forward_hook(lambda _, given, made: rows.append(len(made)))
    objective(step_context(READS)).backward()
    removed = 2 * B * (NUM_PATCHES - round(NUM_PATCHES / 4))
    assert removed % 5 == 0
    assert set(rows) == {5}


def test_the_quantizer_alone_has_an_average() -> None:
    objective = build()
    assert objective.ema_pairs() == [(objective.quantizer, objective.ema_quantizer)]
    old = [p.clone() for p in objective.ema_quantizer.parameters()]
    Ema(objective.ema_pairs()).update(0.9)
    for new, start, online in zip(objective.ema_quantizer.parameters(), old, objective.quantizer.parameters(),
                                  strict=True):
        torch.testing.assert_close(new, 0.9 * start + 0.1 * online)


def test_half_precision_is_close() -> None:
    objective, context = build(), step_context(READS)
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(context)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, objective(context), rtol=0.02, atol=0)


def test_does_not_synchronise_with_the_host() -> None:
    objective = build()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # tensors without data: reading one raises
        context = step_context(READS)
        passes = {
            name: replace(encoded, **tree_map_only(Tensor, mode.from_tensor, vars(encoded)))
            for name, encoded in context.passes.items()
        }
        assert objective(replace(context, passes=passes)).shape == ()


@pytest.mark.parametrize(
    ("name", "change"),
    [("teacher", {"encoder": "online"}), ("masked", {"encoder": "ema"}), ("teacher", {"views": ("b", "a")}),
     ("teacher", {"resolution": 0.5}), ("teacher", {"masking": "uniform", "mask_ratio": 0.5}),
     ("masked", {"fill": True})],
)
def test_refuses_passes_that_cannot_be_compared(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"distils an EMA pass of whole images .* pass 'masked' or 'teacher'"):
        MaskedDistillation({**READS, name: replace(READS[name], **change)}, SHAPE)


@pytest.mark.parametrize(("width", "codewords"), [(1024, 8192), (768, 8192), (384, 4096), (192, 2048)])
def test_codewords_are_8192_from_width_768_and_in_proportion_below(width: int, codewords: int) -> None:
    assert len(MaskedDistillation(READS, replace(SHAPE, width=width)).quantizer.codewords) == codewords


def test_costs_what_the_decoder_costs_over_all_patches() -> None:
    block = 197 * 12 * 768**2 + 2 * 197**2 * 768
    with torch.device("meta"):
        objective = MaskedDistillation(READS, VIT_B_16, decoder_layers=2)
    assert objective.decoder_macs([(2, 196, 49), (2, 196, 196)], 77.0) == pytest.approx(2 * 2 * block)
    plan = resolve(RECIPES["maskclip"], VIT_B_16)
    assert plan.relative_cost() == pytest.approx(1.57, rel=0.01)
    assert plan.relative_cost(14) == pytest.approx(1.65, rel=0.01)
