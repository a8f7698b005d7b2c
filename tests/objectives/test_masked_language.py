"""Masked language modelling against a loop over captions and tokens."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from synthetic_passes import CAPTIONS, HIDDEN, LENGTH, SHAPE, B, step_context
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from aclip.config import TextPass
from aclip.errors import ConfigError
from aclip.objectives.maskclip import MaskedLanguage, max_hidden
from aclip.recipes import RECIPES
from aclip.structs import EncodedText, StepContext
from tests_support import VIT_B_16, random_batch
from tests_support import build as build_method


def build(reads: dict[str, TextPass] = HIDDEN, **options: Any) -> MaskedLanguage:
    torch.manual_seed(0)
    return MaskedLanguage(reads, SHAPE, **options)


def context_of(**changes: Any) -> StepContext:
    context = step_context(HIDDEN)
    return replace(context, texts={"hidden": replace(context.texts["hidden"], **changes)})


def literal_loss(objective: MaskedLanguage, text: EncodedText, count: int | None = None) -> Tensor:
    """Caption by caption, cut after its EOT, through open_clip's own blocks; the mean over (the first) hidden ones."""
    losses = []
    for tokens, hidden, states in zip(text.tokens.tolist(), text.hidden.tolist(), text.states, strict=True):
        end = tokens.index(max(tokens)) + 1
        decoded = objective.norm(objective.transformer(states[None, :end]))[0]
        for i in range(end):
            if hidden[i]:
                logits = objective.vocabulary.weight @ decoded[i] + objective.vocabulary.bias
                losses.append(logits.exp().sum().log() - logits[tokens[i]])
    losses = losses[:count]
    return sum(losses) / len(losses)


def gradients(objective: MaskedLanguage, context: StepContext, loss: Tensor) -> dict[str, Tensor]:
    named = {**dict(objective.named_parameters()), "states": context.texts["hidden"].states}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("layers", [1, 4])
def test_equals_a_loop_over_hidden_tokens(layers: int) -> None:
    objective, context = build(decoder_layers=layers), context_of()
    assert context.texts["hidden"].hidden.sum() == 9
    ours, expected = objective(context), literal_loss(objective, context.texts["hidden"])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    actual, reference = gradients(objective, context, ours), gradients(objective, context, expected)
    largest = max(float(g.abs().max()) for g in reference.values())
    for name, gradient in reference.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-5 * largest, msg=name)


def test_sees_in_both_directions_but_no_padding() -> None:
    objective, context = build(), context_of()
    text = context.texts["hidden"]
    gradient = gradients(objective, context, objective(context))["states"].abs().amax(dim=2) > 0
    until_end = torch.arange(LENGTH) <= text.tokens.argmax(dim=1, keepdim=True)
    with_hidden = text.hidden.any(dim=1, keepdim=True)
    assert torch.equal(gradient, until_end & with_hidden)


def test_does_not_depend_on_padding() -> None:
    objective, context = build(), context_of()
    text = context.texts["hidden"]
    noise = torch.randn(B, 5, SHAPE.text_width, generator=torch.Generator().manual_seed(7))
    longer = context_of(
        tokens=F.pad(text.tokens, (0, 5)),
        hidden=F.pad(text.hidden, (0, 5)),
        states=torch.cat([text.states, noise], dim=1),
    )
    torch.testing.assert_close(objective(longer), objective(context), rtol=0, atol=1e-6)


def test_nothing_hidden_is_zero_with_a_gradient() -> None:
    objective = build()
    context = context_of(hidden=torch.zeros(B, LENGTH, dtype=torch.bool))
    loss = objective(context)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(objective, context, loss).values())


def binomial_tail(count: int, p: float, above: int) -> float:
    """P(X > above), X of `count` draws of probability p."""
    return math.fsum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(above + 1, count + 1))


@pytest.mark.parametrize("mask_ratio", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 20, 100, 500])
def test_the_number_of_hidden_tokens_almost_never_exceeds_the_bound(count: int, mask_ratio: float) -> None:
    taken = max_hidden(count, mask_ratio)
    assert taken <= count
    assert binomial_tail(count, mask_ratio, taken) < 1e-9


def test_the_bound_is_close_to_the_mean_in_a_large_batch() -> None:
    assert 1.0 < max_hidden(256 * 14, 0.2) / (0.2 * 256 * 14) < 1.25
    assert 1.0 < max_hidden(4096 * 77, 0.2) / (0.2 * 4096 * 77) < 1.03


def test_if_exceeded_the_last_hidden_tokens_are_left_out() -> None:
    rare = {"hidden": TextPass(mask_ratio=0.01)}
    objective, context = build(rare), context_of()
    text = context.texts["hidden"]
    words = (torch.arange(LENGTH) > 0) & (torch.arange(LENGTH) < text.tokens.argmax(dim=1, keepdim=True))
    taken = max_hidden(B * LENGTH, 0.01)
    assert taken < words.sum()
    crowded = context_of(hidden=words)
    expected = literal_loss(objective, crowded.texts["hidden"], taken)
    torch.testing.assert_close(objective(crowded), expected, rtol=0, atol=1e-5)


def test_half_precision_is_close() -> None:
    objective, context = build(), context_of()
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(context)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, objective(context), rtol=0.02, atol=0)


def test_does_not_synchronise_with_the_host() -> None:
    objective, context = build(), context_of()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # tensors without data: reading one raises
        text = tree_map_only(Tensor, mode.from_tensor, vars(context.texts["hidden"]))
        assert objective(context_of(**text)).shape == ()


def test_refuses_a_text_pass_that_hides_nothing() -> None:
    with pytest.raises(ConfigError, match="text pass 'captions' hides none: set its mask_ratio"):
        build(CAPTIONS)


def test_costs_the_blocks_and_the_vocabulary_of_hidden_tokens() -> None:
    with torch.device("meta"):
        objective = MaskedLanguage({"hidden": TextPass(mask_ratio=0.2)}, VIT_B_16)
    blocks = 4 * (14 * 12 * 512**2 + 2 * 14**2 * 512)
    assert objective.decoder_macs([], 14.0) == pytest.approx(blocks + 0.2 * 14 * 512 * 49408)


def test_an_unmasked_step_leaves_the_contrast_and_a_gradient_for_every_parameter() -> None:
    """Processes that train together must agree on which parameters take part, in unmasked tuning too."""
    method = build_method(RECIPES["maskclip-text"])
    output = method(random_batch(method.plan, batch_size=4), masked=False)
    assert output.parts["masked_language"] == output.parts["masked_distillation"] == 0
    torch.testing.assert_close(output.loss, output.parts["contrastive"])
    output.loss.backward()
    without = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
