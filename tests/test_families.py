"""Recipes on timm's ViTs: class token, attention pool (SigLIP), mean and largest (with a register), rotations (EVA)."""

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aclip import models, plan
from aclip.config import RunConfig
from aclip.errors import UnsupportedModelError
from aclip.exporters import open_clip as exported
from aclip.plan import image_macs
from aclip.recipes import RECIPES
from aclip.report.snapshots import read_snapshot, take_snapshot
from aclip.trainer import build_trainer
from aclip.training.distributed import wrap
from aclip.training.optim import parameter_groups
from tests_support import build, random_batch

TEXT = {"width": 64, "heads": 1, "layers": 2}
SIGLIP_TEXT = TEXT | {"context_length": 9, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
FAMILIES: dict[str, dict[str, Any]] = {
    "family-token": {
        "embed_dim": 24, "text_cfg": TEXT,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 96}},
    "family-siglip": {
        "embed_dim": 96, "text_cfg": SIGLIP_TEXT, "custom_text": True, "init_logit_bias": -10,
        "vision_cfg": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 96}},
    "family-mean": {
        "embed_dim": 24, "text_cfg": TEXT,
        "vision_cfg": {"timm_model_name": "vit_wee_patch16_reg1_gap_256", "timm_pool": "", "timm_proj": "linear",
                       "image_size": 64}},
    "family-max": {
        "embed_dim": 24, "text_cfg": TEXT,
        "vision_cfg": {"timm_model_name": "vit_wee_patch16_reg1_gap_256", "timm_pool": "max", "timm_proj": "linear",
                       "image_size": 64}},
    "family-eva02": {
        "embed_dim": 24, "text_cfg": TEXT, "custom_text": True,
        "vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None,
                       "image_size": 56}},
    "family-pe-core": {
        "embed_dim": 24, "text_cfg": TEXT, "custom_text": True,
        "vision_cfg": {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "timm_proj": None,
                       "image_size": 64}},
    "family-dinov3": {
        "embed_dim": 24, "text_cfg": TEXT, "custom_text": True,
        "vision_cfg": {"timm_model_name": "vit_small_patch16_dinov3", "timm_pool": "token", "timm_proj": "linear",
                       "image_size": 64}},
}


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("families")
    for name, config in FAMILIES.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.mark.parametrize(("recipe", "family"), [
    ("a-clip", "family-token"), ("a-clip", "family-siglip"), ("a-clip-eff", "family-siglip"),
    ("flip", "family-mean"), ("simmim", "family-token"), ("simmim", "family-siglip"),
    ("mae", "family-siglip"), ("maskclip", "family-token"), ("siglip", "family-siglip"), ("a-clip", "family-mean"),
    ("a-clip", "family-eva02"), ("a-clip-eff", "family-pe-core"), ("maskclip", "family-dinov3"),
])
def test_every_trainable_parameter_gets_a_gradient(recipe: str, family: str) -> None:
    method = build(RECIPES[recipe], family)
    batch = random_batch(method.plan, batch_size=4)
    output = method(batch)
    output.loss.backward()
    for name, p in method.plan.passes.items():
        assert output.passes[name].num_tokens == p.num_tokens
    trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
    zero = [n for n, p in trainable.items() if p.grad is None or not p.grad.any()]
    # as in test_recipes: biases whose gradients vanish in exact arithmetic
    assert all("bias" in name for name in zero), zero
    embedding = models.patch_embedding_of(models.visual_of(method.model))
    assert embedding.weight.requires_grad != bool(RECIPES[recipe].freeze)
    groups = parameter_groups(method, 0.1)
    undecayed = {name for group in groups if group.weight_decay == 0 for name in group.parameters}
    assert not [name for name in trainable
                if name.endswith(("cls_token", "pos_embed", "reg_token", "latent")) and name not in undecayed]


def test_the_sigmoid_loss_starts_from_the_models_own_bias_and_trains_it(tmp_path: Path) -> None:
    """As in open_clip; the trained bias is exported."""
    method = build(RECIPES["siglip"], "family-siglip")
    model: Any = method.model
    nn.init.constant_(model.logit_bias, -12.9)
    nn.init.constant_(model.logit_scale, math.log(117.0))
    batch = random_batch(method.plan, batch_size=4)
    output = method(batch)
    text = F.normalize(models.encode_text(model, batch.tokens), dim=-1)
    theirs = SigLipLoss()(output.passes["full"].features[0], text, model.logit_scale.exp(), model.logit_bias)
    torch.testing.assert_close(output.loss, theirs)
    assert not [name for name, _ in method.objectives.named_parameters()]
    output.loss.backward()
    torch.optim.SGD([model.logit_bias], lr=0.01).step()
    assert model.logit_bias != -12.9
    exported.save(model, models.model_config("family-siglip"), models.preprocess_config(model),
                  models.tokenizer_of("family-siglip"), tmp_path / "final")
    assert models.create_model(tmp_path / "final").logit_bias == model.logit_bias


def test_the_sigmoid_loss_starts_fresh_models_as_its_paper_does() -> None:
    """Scale 10 and bias -10 (arXiv 2303.15343, section 3.2); weights and configs that have a scale keep it."""
    def started(**changes: Any) -> Any:
        config = RunConfig(recipe=RECIPES["siglip"], model="family-siglip", data="x", output="x", **changes)
        return build_trainer(config, 100, torch.device("cpu")).method.model

    assert started().logit_scale.exp().item() == pytest.approx(10)
    assert started().logit_bias.item() == -10
    assert build(RECIPES["clip"], "family-siglip").model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("way", [{"parallel": "fsdp"}, {"compile_blocks": True}], ids=["sharded", "compiled"])
def test_text_that_open_clip_runs_itself_is_wrapped_too(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's text is not cut: open_clip's own forward pass calls its blocks."""
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: None)
    plain, wrapped = (build(RECIPES["clip"], "family-siglip") for _ in range(2))
    batch = random_batch(plain.plan, batch_size=4)
    output = wrap(wrapped, torch.device("cpu"), **way).step(batch)
    torch.testing.assert_close(output.loss, plain(batch).loss)


def test_scores_need_a_pool_that_attends() -> None:
    shape = models.shape_of(models.model_config("family-max"))
    assert not shape.scored
    plan.resolve(RECIPES["flip"], shape)
    with pytest.raises(UnsupportedModelError, match=r"recipe 'a-clip', pass 'context': .*has no attention scores: "):
        plan.resolve(RECIPES["a-clip"], shape)


def test_snapshots_of_models_without_scores(tmp_path: Path) -> None:
    method = build(RECIPES["flip"], "family-max")
    path = take_snapshot(method, [Image.new("RGB", (50, 40))], ["an image"], 0, tmp_path)
    assert not read_snapshot(path).scores.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_and_cost_are_those_of_the_tower(family: str) -> None:
    """Compare with the multiplications of a forward pass as torch counts them."""
    config = models.model_config(family)
    shape, tower = models.shape_of(config), models.create_model(family, with_text=False).eval()
    trunk, patches = tower.visual.trunk, shape.grid_size[0] * shape.grid_size[1]
    assert shape.grid_size == trunk.patch_embed.grid_size
    assert shape.num_prefix_tokens == trunk.num_prefix_tokens
    assert shape.heads == trunk.blocks[0].attn.num_heads
    tokens = patches + shape.num_prefix_tokens
    with FlopCounterMode(display=False) as counted:
        tower.encode_image(torch.zeros(1, 3, *shape.image_size))
    expected = counted.get_total_flops() / 2
    # torch does not count attention on a CPU
    expected += shape.layers * 2 * tokens**2 * shape.width + (2 * patches * shape.width if trunk.attn_pool else 0)
    if trunk.attn_pool is not None and getattr(trunk, "pool_include_prefix", True):  # left out: it is a token or two
        expected -= 2 * shape.width**2 * shape.num_prefix_tokens
    assert image_macs(shape, patches, tokens) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_exported_models_equal_open_clips_own_forward(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.create_model(family).eval()
    config = models.model_config(family)
    exported.save(model, config, models.preprocess_config(model), models.tokenizer_of(config), tmp_path / "final")
    again = models.create_model(tmp_path / "final").eval()
    side = config["vision_cfg"]["image_size"]
    pixels = torch.randn(2, 3, side, side)
    tokens = torch.randint(1, 1000, (2, again.context_length))
    assert models.shape_of(models.model_config(tmp_path / "final")) == models.shape_of(config)
    for ours, theirs in ((models.encode_image(again.visual, pixels).features, model.encode_image(pixels)),
                         (models.encode_text(again, tokens), model.encode_text(tokens))):
        torch.testing.assert_close(F.normalize(ours), F.normalize(theirs), rtol=0, atol=1e-5)


@torch.no_grad()
def test_timm_towers_at_another_size() -> None:
    torch.manual_seed(0)
    model = models.create_model("family-token", image_size=(64, 32))
    assert model.visual.trunk.patch_embed.grid_size == (4, 2)
    assert models.preprocess_config(model)["size"] == (64, 32)
    pixels = torch.randn(1, 3, 64, 32)
    torch.testing.assert_close(models.encode_image(model.visual.eval(), pixels).features, model.visual(pixels),
                               rtol=0, atol=1e-5)


def test_image_towers_of_timm_have_no_projection() -> None:
    tower = models.create_model("family-token", with_text=False)
    assert not [name for name, _ in tower.named_parameters() if "head" in name]
    assert tower.encode_image(torch.zeros(1, 3, 96, 96)).shape == (1, 64)
