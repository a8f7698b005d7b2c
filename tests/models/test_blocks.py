"""Blocks in which some tokens are not seen, and compiled ones: against open_clip's own forward."""

import pytest
import torch
from open_clip.transformer import Transformer
from tower_oracles import assert_same_gradients, fresh_model, gradients, shake

from aclip import models
from aclip.models import text as text_module
from aclip.models.blocks import call_as_modules, run_blocks

HEADS = 4
# a prefix, a gap, everything, a single token
VISIBLE = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]]).bool()


def blocks() -> Transformer:
    torch.manual_seed(0)
    return shake(Transformer(32, 3, HEADS))


def tokens() -> torch.Tensor:
    return torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))


def literal(transformer: Transformer, x: torch.Tensor) -> torch.Tensor:
    """Add minus infinity to the logits of every key that is not seen, in every head."""
    mask = torch.zeros(4, HEADS, 6, 6).masked_fill(~VISIBLE[:, None, None, :], float("-inf"))
    return transformer(x, attn_mask=mask.flatten(0, 1))


@pytest.mark.parametrize("recompute", [False, True])
def test_tokens_that_are_not_visible_are_not_seen(recompute: bool) -> None:
    transformer, x = blocks(), tokens()
    transformer.grad_checkpointing = recompute
    ours, _ = run_blocks(transformer, x, visible=VISIBLE)
    transformer.grad_checkpointing = False
    expected = literal(transformer, x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(transformer, ours), gradients(transformer, expected))


def test_one_token_is_read_among_the_visible() -> None:
    transformer, x, read = blocks(), tokens(), torch.tensor([0, 2, 5, 1])
    ours, _ = run_blocks(transformer, x, read, visible=VISIBLE)
    expected = literal(transformer, x)[torch.arange(4), read][:, None]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_what_is_not_visible_changes_nothing() -> None:
    transformer, x = blocks(), tokens()
    other = torch.where(VISIBLE[:, :, None], x, 100.0)
    a, b = (run_blocks(transformer, y, visible=VISIBLE)[0][VISIBLE] for y in (x, other))
    assert torch.equal(a, b)
    all_seen = run_blocks(transformer, x, visible=torch.ones(4, 6, dtype=torch.bool))[0]
    torch.testing.assert_close(all_seen, run_blocks(transformer, x)[0], rtol=0, atol=1e-5)


def test_half_precision_is_close() -> None:
    transformer, x = blocks(), tokens()
    exact, _ = run_blocks(transformer, x, visible=VISIBLE)
    with torch.autocast("cpu", torch.bfloat16):  # plain attention in place of the fused kernel
        rough, _ = run_blocks(transformer, x, visible=VISIBLE)
    assert torch.nn.functional.cosine_similarity(rough.float(), exact, dim=-1).min() > 0.999


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_compiled_blocks_are_not_recompiled_as_the_text_length_varies(packs: bool, monkeypatch) -> None:
    monkeypatch.setattr(text_module, "packs", lambda tokens: packs)
    torch.compiler.reset()
    model, plain = fresh_model("vit-micro"), fresh_model("vit-micro")
    call_as_modules(model.transformer)
    for block in model.transformer.resblocks:
        block.compile(dynamic=True, fullgraph=True, backend="eager")  # what is compiled is decided before the backend
    generator = torch.Generator().manual_seed(0)
    for number, longest in enumerate((14, 30, 22, 77, 9, 41)):
        ends = torch.randint(3, longest, (6, 1), generator=generator)
        ends[0] = longest - 1
        place = torch.arange(longest)
        words = torch.randint(1, 49405, (6, longest), generator=generator)
        tokens = torch.where(place < ends, words, torch.where(place == ends, 49407, 0))
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            ours = models.encode_text(model, tokens)
        assert_same_gradients(gradients(model, ours), gradients(plain, models.encode_text(plain, tokens)))
    torch.compiler.reset()
