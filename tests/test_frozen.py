"""The frozen encoder: what training started from, or a teacher, and never anything else."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aclip
from aclip import models, plan
from aclip.checkpoint import open_newest
from aclip.config import ObjectiveConfig, Recipe, RunConfig, TextPass, override
from aclip.data import augment
from aclip.errors import ConfigError
from aclip.exporters import open_clip as exported
from aclip.method import Method
from aclip.objectives.functional import affinity_loss, clip_loss
from aclip.plan import resolve_run
from aclip.recipes import RECIPES, configure
from aclip.structs import ViewBatch
from aclip.training.guard import Interrupted
from made_pictures import captioned_noise
from tests_support import VIT_B_16, build, random_batch, stop_after

SIZES = ((0.5,) * 3, (0.25,) * 3)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def features_of(model: Any, view: ViewBatch, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return what open_clip's own forward passes give at the model's own size and normalisation."""
    config = models.preprocess_config(model)
    pixels = augment.apply(view, torch.tensor(config["mean"]), torch.tensor(config["std"]))
    pixels = F.interpolate(pixels, models.visual_of(model).image_size, mode="bilinear", antialias=True)
    whole = F.pad(tokens, (0, 77 - tokens.shape[1]))
    return model.encode_image(pixels, normalize=True), model.encode_text(whole, normalize=True)


@pytest.fixture
def run_config() -> RunConfig:
    return configure(recipe="distill", model="vit-micro", teacher="vit-tiny", data="pairs.csv")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned_noise(tmp_path_factory.mktemp("images"), 8 * [(40, 60)])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights in a folder."""
    folder = tmp_path_factory.mktemp("models") / "pretrained"
    torch.manual_seed(3)
    model, config = models.create_model("vit-micro"), models.model_config("vit-micro")
    exported.save(model, config, models.preprocess_config(model), models.tokenizer_of(config), folder)
    return folder


def test_it_is_a_copy_of_the_start_that_stays_in_evaluation_mode() -> None:
    resolved = plan.resolve(RECIPES["finetune"], models.shape_of(models.model_config("vit-micro")))
    method = Method(models.create_model("vit-micro"), resolved, *SIZES).train()
    assert method.frozen is not None
    start = weights_of(method.model)
    assert method.model.training
    assert not any(module.training for module in method.frozen.modules())
    assert not any(p.requires_grad for p in method.frozen.parameters())
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    ema = method.ema()
    for seed in range(3):
        method(random_batch(resolved, 4, seed)).loss.backward()
        optimizer.step()
        ema.update(0.9)
    assert all(torch.equal(tensor, start[name]) for name, tensor in method.frozen.state_dict().items())
    assert not torch.equal(method.model.get_parameter("visual.proj"), start["visual.proj"])


def test_only_recipes_with_a_frozen_pass_have_one() -> None:
    with_one = {"finetune", "finetune-attentive", "distill"}
    assert {name for name, recipe in RECIPES.items() if recipe.uses_frozen} == with_one
    assert build(RECIPES["clip"]).frozen is None


@pytest.mark.parametrize("name", ["finetune", "distill"])
def test_a_step_equals_the_losses_of_both_models_own_features(name: str) -> None:
    """With a teacher of another size, width and normalisation."""
    config = configure(recipe=name, model="vit-micro", teacher="vit-tiny", data="pairs.csv")
    torch.manual_seed(0)
    model, teacher = models.create_model("vit-micro"), models.create_model("vit-tiny")
    teacher.visual.preprocess_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3)}
    pixels = models.preprocess_config(model)
    method = Method(model, resolve_run(config), pixels["mean"], pixels["std"], teacher).train()
    assert method.plan.view_sizes == {"a": (64, 64)}
    batch = random_batch(method.plan, 5)
    batch = replace(batch, views={"a": replace(batch.views["a"], augmentation=None)})
    (image, text), (their_image, their_text) = (features_of(one, batch.views["a"], batch.tokens)
                                                for one in (model, teacher))
    scale = model.logit_scale.exp()
    parts = {"contrastive": clip_loss(image, text, scale)}
    for key, share in (("anchor", 0.5), ("affinity", 0.0)):
        parts[key] = affinity_loss(image, text, scale, their_image, their_text, teacher.logit_scale.exp(),
                                   label_share=share)
    expected = sum(o.weight * parts[key] for key, o in config.recipe.objectives.items())
    torch.testing.assert_close(method(batch).loss, expected)


def test_its_attention_ranks_the_patches_of_another_grid() -> None:
    config = configure(recipe="finetune-attentive", model="vit-micro", teacher="vit-tiny", data="pairs.csv")
    method = Method(models.create_model("vit-micro"), resolve_run(config), *SIZES, models.create_model("vit-tiny"))
    passes = method.run_passes(random_batch(method.plan, 4))
    assert passes["frozen"].keep_indices is None
    assert passes["masked"].keep_indices.shape == (1, 4, 32)
    assert method.run_passes(random_batch(method.plan, 4), masked=False)["masked"].keep_indices is None


def test_it_may_be_masked_and_its_captions_reduced() -> None:
    recipe = override(RECIPES["finetune"], {
        "passes.frozen.masking": "uniform", "passes.frozen.mask_ratio": 0.75,
        "texts.frozen-captions.reduction": "truncate", "texts.frozen-captions.reduction_options": {"num_keep": 2}})
    method = build(recipe, "vit-micro")
    encoded = method.encode_batch(random_batch(method.plan, 4))
    assert encoded.passes["frozen"].keep_indices.shape == (1, 4, 16)
    assert encoded.texts["frozen-captions"].tokens.shape == (4, 4)
    assert encoded.passes["full"].keep_indices is None
    assert not encoded.texts["frozen-captions"].features.requires_grad


def test_it_costs_one_forward_pass_of_its_own_size(run_config: RunConfig) -> None:
    shape, theirs = (models.shape_of(models.model_config(name)) for name in ("vit-micro", "vit-tiny"))
    clip = plan.resolve(RECIPES["clip"], shape)
    forward = plan.resolve(RECIPES["clip"], theirs).macs(9) / 3
    assert resolve_run(run_config).macs(9) == pytest.approx(clip.macs(9) + forward)
    assert plan.resolve(RECIPES["finetune"], VIT_B_16).relative_cost() == pytest.approx(4 / 3)


def test_a_contrast_with_frozen_captions_trains_the_image_tower() -> None:
    recipe = replace(RECIPES["clip"], texts={"captions": TextPass(encoder="frozen")}, freeze=(
        "token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection"))
    method = build(recipe, "vit-micro")
    method(random_batch(method.plan, 4)).loss.backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"passes.frozen.fill": True, "passes.frozen.masking": "uniform"}, "pass 'frozen' is frozen, so no mask token"),
    ({"texts.frozen-captions.mask_ratio": 0.2}, "text pass 'frozen-captions' is frozen, so no mask token"),
    ({"passes.frozen.encoder": "ema"}, "uses the EMA encoder"),
])
def test_recipes_that_cannot_work_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        override(RECIPES["finetune"], changes)


def test_a_teacher_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match="teacher has no effect: recipe 'clip' has no frozen encoder"):
        configure(recipe="clip", teacher="vit-tiny", data="pairs.csv")


@pytest.mark.parametrize(("model", "teacher"), [
    ("vit-micro", "ViT-B-16-SigLIP"), ("ViT-B-16-SigLIP", "vit-micro"), ("vit-micro", "ViT-H-14-CLIPA")])
def test_a_teacher_that_reads_other_tokens_is_refused(model: str, teacher: str) -> None:
    config = configure(recipe="distill", model=model, teacher=teacher, data="pairs.csv")
    with pytest.raises(ConfigError, match=f"the teacher '{teacher}' cannot read the tokens of '{model}'"):
        resolve_run(config)


def test_a_teacher_for_images_alone_may_read_any_tokens() -> None:
    recipe = Recipe(
        name="scored", title="", paper="", views="one_crop",
        passes={"frozen": replace(RECIPES["finetune"].passes["frozen"]),
                "masked": RECIPES["finetune-attentive"].passes["masked"]},
        objectives={"contrastive": ObjectiveConfig(reads=("masked", "captions"))})
    resolved = resolve_run(configure(recipe=recipe, model="vit-micro", teacher="ViT-B-16-SigLIP", data="pairs.csv"))
    assert resolved.passes["frozen"].scores_only
    assert resolved.passes["frozen"].grid_size == (14, 14)


# runs


def command(images: Path, output: Path, **settings: Any) -> dict[str, Any]:
    return {"data": str(images), "output": str(output), "batch_size": 4, "samples": 24, "precision": "fp32", "lr": 1e-3,
            "workers": 0, "save_every": 0.0, "evaluate_every": 0.0, "log_every": 1, **settings}


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in aclip.Run(run).metrics]


@pytest.fixture(scope="module")
def finished(images: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    aclip.train(**command(images, run, recipe="finetune", model=str(pretrained)))
    return run


def test_a_resumed_run_goes_on_with_what_it_started_from(
    images: Path, pretrained: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the model that it started from has changed meanwhile."""
    source, run = tmp_path / "source", tmp_path / "run"
    source.symlink_to(pretrained)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Interrupted):
            aclip.train(**command(images, run, recipe="finetune", model=str(source)))
    source.unlink()
    source.symlink_to(finished / "final")
    aclip.train(resume=str(run))
    assert losses(run) == losses(finished)


def test_it_is_in_checkpoints_and_not_in_the_model(finished: Path, pretrained: Path) -> None:
    kept, start = open_newest(finished / "checkpoints").tensors("method/frozen."), models.create_model(pretrained)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in start.state_dict().items())
    assert aclip.load(finished).model.state_dict().keys() == start.state_dict().keys()
    assert not torch.equal(aclip.load(finished).model.visual.proj, start.visual.proj)


def test_a_fresh_student_learns_from_a_smaller_teacher(images: Path, pretrained: Path, tmp_path: Path) -> None:
    run = aclip.train(**command(images, tmp_path / "run", recipe="distill", model="vit-tiny", teacher=str(pretrained)))
    assert run.config.teacher == str(pretrained)
    assert losses(run.folder)[-1] < losses(run.folder)[0]
    kept = open_newest(run.folder / "checkpoints").tensors("method/frozen.")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in models.create_model(pretrained).state_dict().items())


@pytest.mark.parametrize(("model", "expected"), [
    ("ViT-B-32:laion2b_s34b_b79k", "finetune"), ("hf-hub:someone/model", "finetune"), ("ViT-B/32", "a-clip-muon"),
    ("vit-tiny", "a-clip-muon"), (None, "a-clip-muon")])
def test_the_default_recipe_follows_from_the_model(model: str | None, expected: str) -> None:
    assert configure(model=model, data="pairs.csv").recipe.name == expected


def test_the_default_is_told(images: Path, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = aclip.train(**command(images, tmp_path / "run", samples=4, model=str(pretrained)))
    assert run.config.recipe.name == "finetune"
    assert caplog.text.count("comes with weights, so the recipe is finetune") == 1
    caplog.clear()
    aclip.train(**command(images, tmp_path / "named", samples=4, model=str(pretrained), recipe="finetune"))
    assert "so the recipe is" not in caplog.text


@pytest.mark.parametrize("settings", [{"recipe": "finetune"}, {"recipe": "distill", "teacher": "vit-tiny"}])
def test_random_weights_are_not_held_on_to(images: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"'vit-(micro|tiny)' is an architecture without any: name weights"):
        aclip.train(**command(images, tmp_path / "run", model="vit-micro", **settings))


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_an_image_tower_alone_knows_no_texts(images: Path, tmp_path: Path, pretrained: Path, role: str) -> None:
    tower = tmp_path / "tower"
    model, config = models.create_model("vit-micro", with_text=False), models.model_config("vit-micro")
    exported.save(model, config, models.preprocess_config(model), models.tokenizer_of(config), tower)
    names: Sequence[tuple[str, Path]] = (("model", pretrained), (role, tower))
    with pytest.raises(ConfigError, match=r"tower' are an image tower alone, and recipe 'finetune' keeps to"):
        aclip.train(**command(images, tmp_path / "run", recipe="finetune", **{key: str(path) for key, path in names}))
