"""Compiled blocks take captions of any length: nothing is compiled anew once the first lengths have been seen."""

from collections.abc import Iterator

import pytest
import torch
from tower_oracles import assert_same_gradients, fresh_model, gradients

from aclip import models
from aclip.engine.trial import caption_lengths, made_tokens
from aclip.models import text as text_module
from aclip.models.blocks import call_as_modules

BATCHES = 8


def captions() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(BATCHES):
        lengths = caption_lengths(6, 14, 77, generator)
        yield made_tokens(lengths, int(lengths.max()), 49408, generator)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_no_recompilation_as_the_text_length_varies(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "packs", lambda tokens: packs)
    torch.compiler.reset()
    model, plain = fresh_model("vit-micro"), fresh_model("vit-micro")
    call_as_modules(model.transformer)
    for block in model.transformer.resblocks:
        block.compile(dynamic=True, fullgraph=True, backend="eager")  # what is compiled is decided before the backend
    widths = set()
    for number, tokens in enumerate(captions()):
        widths.add(tokens.shape[1])
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            ours = models.encode_text(model, tokens)
        assert_same_gradients(gradients(model, ours), gradients(plain, models.encode_text(plain, tokens)))
    assert len(widths) > BATCHES // 2
    torch.compiler.reset()
