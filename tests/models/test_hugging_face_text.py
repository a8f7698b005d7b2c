"""Text towers of transformers inside open_clip's models: from a folder, offline."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tower_oracles import shake
from transformers import (
    BertConfig,
    BertModel,
    M2M100Config,
    M2M100Model,
    MT5Config,
    MT5Model,
    RobertaConfig,
    RobertaModel,
)

from aclip import models
from aclip.errors import CheckpointError
from aclip.models.text import text_blocks_of
from aclip.recipes import RECIPES
from aclip.training.optim import parameter_groups
from tests_support import build, random_batch

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "vocab_size": 90, "max_position_embeddings": 40}
TOWERS: dict[str, Any] = {
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES), add_pooling_layer=False),
    "bert": lambda: BertModel(BertConfig(**SIZES | {"num_hidden_layers": 0}), add_pooling_layer=False),  # words alone
    "mt5": lambda: MT5Model(MT5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=90)),
    "m2m_100": lambda: M2M100Model(M2M100Config(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=90, max_position_embeddings=40)),
}


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any]:
    """Write a text tower, register a model that has it, and return its name, and the tower."""
    torch.manual_seed(1)
    kind = request.param
    tower = shake(TOWERS[kind]())
    tower.save_pretrained(tmp_path / kind)
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "patch_size": 4, "layers": 2, "width": 64},
        "text_cfg": {"hf_model_name": str(tmp_path / kind), "hf_proj_type": "mlp", "context_length": 12}}
    (tmp_path / f"hf-{kind}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"hf-{kind}.json")
    return f"hf-{kind}", tower.encoder if kind in ("mt5", "m2m_100") else tower


def tokens() -> torch.Tensor:
    """Return three captions, two of which end in padding (1 in RoBERTa's, 0 in the others')."""
    ids = torch.randint(2, 90, (3, 12), generator=torch.Generator().manual_seed(2))
    ids[0, 5:], ids[1, 9:] = 0, 1
    return ids


@pytest.mark.parametrize("model", TOWERS, indirect=True)
def test_fresh_models_start_from_the_towers_weights_and_drop_nothing(model: tuple[str, Any]) -> None:
    name, tower = model
    ours: Any = models.create_model(name).train()
    own = ours.text.transformer.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in tower.state_dict().items())
    encoded = models.encode_text(ours, tokens())
    torch.testing.assert_close(encoded, ours.eval().encode_text(tokens()), rtol=0, atol=1e-6)
    shape = models.shape_of(models.model_config(name))
    layers = tower.config.num_hidden_layers
    assert (shape.text_width, shape.text_layers, shape.vocab_size, shape.context_length) == (32, layers, 90, 12)
    assert not shape.text_cut


@pytest.mark.parametrize("frozen", [(), ("text.transformer.",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("model", TOWERS, indirect=True)
def test_a_step_trains_it_or_leaves_it_as_it_is(model: tuple[str, Any], frozen: tuple[str, ...]) -> None:
    method = build(replace(RECIPES["clip"], freeze=frozen), model[0])
    batch = replace(random_batch(method.plan, batch_size=3), tokens=tokens())
    first, again = method(batch).loss, method(batch).loss
    assert torch.equal(first, again)  # a training step draws nothing in the towers
    first.backward()
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    assert bool(frozen) != any(name.startswith("model.text.transformer.") for name in trained)
    assert any(name.startswith("model.text.proj.") for name in trained)


@pytest.mark.parametrize("model", TOWERS, indirect=True)
def test_layer_decay_counts_its_blocks(model: tuple[str, Any]) -> None:
    method: Any = build(RECIPES["clip"], model[0])
    factors = {p: group.lr_factor for group in parameter_groups(method, 0.1, layer_decay=0.5)
               for p in group.parameters.values()}
    text = method.model.text
    blocks = text_blocks_of(text)
    below = [0.5 ** (len(blocks) - 1 - number) for number in range(-1, len(blocks))]
    parts = text.transformer.get_input_embeddings(), *blocks, text.proj
    for part, expected in zip(parts, (*below, 1.0), strict=True):
        assert {factors[p] for p in part.parameters()} == {expected}


def test_a_tower_that_is_not_here_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"model 'roberta-ViT-B-32': its .*tower 'roberta-base' .*hf download"):
        models.create_model("roberta-ViT-B-32")
