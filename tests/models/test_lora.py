"""Low-rank updates: of which matrices, equal to what they add up to, with the gradients of full fine-tuning."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

import aclip
from aclip import checkpoint, models
from aclip.cli import main
from aclip.errors import ConfigError
from aclip.exporters import open_clip as exported
from aclip.models.lora import adapt, merged
from aclip.training.distributed import wrap
from made_pictures import captioned_noise
from over_ranks import a_batch, build, in_double, register_nano

RANK = 4
TIMM: dict[str, Any] = {
    "embed_dim": 16, "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token",
                                    "timm_proj": "linear", "image_size": 64},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}}
EVA: dict[str, Any] = {**TIMM, "embed_dim": 192, "vision_cfg": {  # queries, keys and values apart, a gated MLP
    "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None, "image_size": 56}}


def adapted(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the model with random updates, and a plain one with their sums."""
    plain = copy.deepcopy(model)
    adapt(model, RANK, ("image", "text"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".low_rank." in name:
                parameter.normal_(std=0.1)
    plain.load_state_dict(merged(model.state_dict()))
    return model.eval(), plain.eval()


@pytest.fixture(params=["open_clip", "timm", "eva"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    register_nano()
    torch.manual_seed(0)
    if request.param == "open_clip":
        return adapted(models.create_model("vit-nano"))
    return adapted(models.loading.build_modules(TIMM if request.param == "timm" else EVA))


def test_an_adapted_model_computes_what_the_sums_do(pair: tuple[nn.Module, nn.Module]) -> None:
    side = pair[1].visual.image_size
    pixels = torch.randn(2, 3, *(side if isinstance(side, tuple) else (side, side)))
    keep, tokens = torch.tensor([[0, 3, 5], [1, 2, 9]]), torch.tensor([[98, 5, 99, 0, 0], [98, 5, 6, 7, 99]])
    for first, second in zip(*(
            (models.encode_image(one.visual, pixels, return_scores=True).features,
             models.encode_image(one.visual, pixels, return_scores=True).scores,
             models.encode_image(one.visual, pixels, keep, return_patches=True).patches,
             models.encode_text(one, tokens)) for one in pair), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def matrices(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of the weight and of the update of every matrix inside the blocks."""
    for name, parameter in model.named_parameters():
        if ".low_rank." not in name and parameter.ndim == 2 and ("resblocks." in name or "trunk.blocks." in name):
            owner = name.removesuffix(".weight").removesuffix(".in_proj_weight")
            yield name, f"{owner}.low_rank"


def test_every_matrix_of_the_blocks_has_an_update_and_nothing_else_learns(pair: tuple[nn.Module, nn.Module]) -> None:
    model = pair[0]
    assert len(list(matrices(model))) >= 4 * sum(
        len(models.blocks.blocks_of(stack)) for stack in models.blocks.stacks_of(model))
    parameters = dict(model.named_parameters())
    expected = {f"{update}.{part}" for _, update in matrices(model) for part in ("up", "down")}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == expected
    for weight, update in matrices(model):
        assert (parameters[f"{update}.up"] @ parameters[f"{update}.down"]).shape == parameters[weight].shape


def test_gradients_are_those_of_full_fine_tuning_along_the_updates() -> None:
    """W' = W + U D, so that dL/dU = dL/dW' D^T and dL/dD = U^T dL/dW'."""
    low, full = build(f"a-clip lora={RANK}"), build("a-clip")
    with in_double(low), in_double(full):
        for name, parameter in low.named_parameters():
            if ".low_rank." in name:
                parameter.data.normal_(std=0.1)
        full.load_state_dict(merged(low.state_dict()))
        batch = a_batch(low, 4)
        losses = [method(batch).loss for method in (low, full)]
        for loss in losses:
            loss.backward()
    torch.testing.assert_close(*losses)
    ours, theirs = dict(low.named_parameters()), dict(full.named_parameters())
    checked = 0
    for weight, update in matrices(low.model):
        up, down, whole = ours[f"model.{update}.up"], ours[f"model.{update}.down"], theirs[f"model.{weight}"].grad
        torch.testing.assert_close(up.grad, whole @ down.T, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(down.grad, up.T @ whole, rtol=1e-7, atol=1e-10)
        checked += 1
    assert checked == 16


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks
@pytest.mark.parametrize("way", ["recompute", "compile_blocks"])
def test_recomputing_and_compiling_change_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    plain, other = (build(f"finetune-attentive lora={RANK}") for _ in range(2))
    wrap(other, torch.device("cpu"), **{way: True})
    for one in (plain, other):
        one(a_batch(plain, 4)).loss.backward()
    torch.compiler.reset()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    assert any(gradient.any() for name, gradient in gradients.items() if ".low_rank." in name)
    assert all(".low_rank." in name or name == "model.logit_scale" for name in gradients)
    for name, parameter in other.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-7)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_keeps_updates_apart_and_hands_out_the_sums(
    tmp_path: Path, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = captioned_noise(tmp_path, 16 * [(40, 40)])
    torch.manual_seed(0)
    base = models.create_model("vit-micro")
    exported.save(base, models.model_config("vit-micro"), models.preprocess_config(base),
                  models.tokenizer_of("vit-micro"), tmp_path / "base")
    run = tmp_path / "run"
    assert main(["train", "--recipe", "clip", "--model", str(tmp_path / "base"), "--data", str(images), "--lora", "8",
                 "--lora-towers", "image", "--optimizer", optimizer, "--lr", "1e-3", "--epochs", "4", "--batch-size",
                 "8", "--workers", "0", "--precision", "fp32", "--output", str(run), "--validation", str(images)]) == 0
    stored = checkpoint.open_newest(run / "checkpoints").tensors("method/model.")
    before = base.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[0] for name in stored.keys() - before.keys()} == {"visual"}
    final = models.create_model(run).state_dict()
    assert final.keys() == before.keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in merged(stored).items())
    moved = {name for name, tensor in final.items() if not torch.equal(tensor, before[name])}
    assert moved == {weight for weight, _ in matrices(base) if weight.startswith("visual.")}
    theirs = open_clip.create_model(f"local-dir:{run / 'final'}").eval()
    pixels = torch.randn(2, 3, 32, 32)
    from_step = aclip.load(next((run / "checkpoints").iterdir()))
    torch.testing.assert_close(from_step.encode_image(pixels), theirs.encode_image(pixels, normalize=True), rtol=0,
                               atol=1e-6)
    assert main(["evaluate", str(run), "--data", str(images), "--workers", "0"]) == 0
    assert main(["explain", str(run), str(images / "00.png"), "--output", str(tmp_path / "seen.png")]) == 0
    assert main(["export", str(run)]) == 0


def test_updates_that_make_no_sense_are_refused() -> None:
    register_nano()
    with pytest.raises(ConfigError, match="--lora 32 is no low rank for matrices of"):
        adapt(models.create_model("vit-nano"), 32, ("image",))
    config = models.model_config("vit-nano")
    config["text_cfg"] |= {"no_causal_mask": True}
    config["custom_text"] = True
    model = models.loading.build_modules(config)
    with pytest.raises(ConfigError, match="add --lora-towers image"):
        adapt(model, 4, ("image", "text"))
    adapt(model, 4, ("image",))
