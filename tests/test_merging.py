"""Weight interpolation and soups, as a user asks for them; against plain arithmetic."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import aclip
from aclip import models
from aclip.cli import main
from aclip.errors import ConfigError
from aclip.exporters import open_clip as exported
from aclip.merging import best_alpha, mix
from made_pictures import captioned_noise


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


def save(folder: Path, config: Mapping[str, Any], seed: int, pixels: Mapping[str, Any] | None = None,
         text: bool = True) -> Path:
    """Save a model with weights away from zeros and ones, some of them -0."""
    torch.manual_seed(seed)
    model = models.loading.build_modules(config)
    open_clip.model.set_model_preprocess_cfg(model, models.preprocess_config(models.create_model("vit-micro")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model.visual.class_embedding[:2] = -0.0
    if not text:
        model = models.ImageTower(model.visual)
    exported.save(model, config, {**models.preprocess_config(model), **(pixels or {})},
                  models.tokenizer_of("vit-micro"), folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save(root / name, models.model_config("vit-micro"), seed) for seed, name in enumerate("abc")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned_noise(tmp_path_factory.mktemp("images"), 12 * [(40, 40)])


@pytest.mark.parametrize("alpha", [0, 1])
def test_the_ends_are_the_models_bit_for_bit(folders: list[Path], tmp_path: Path, alpha: float) -> None:
    merged = aclip.merge(folders[:2], alpha=alpha, output=str(tmp_path / "merged"))
    expected = weights(folders[alpha])
    assert weights(merged).keys() == expected.keys()
    for name, tensor in weights(merged).items():
        assert tensor.view(torch.uint8).equal(expected[name].view(torch.uint8)) if tensor.ndim else tensor.equal(
            expected[name]), name


@pytest.mark.parametrize(("count", "alpha", "shares"), [(2, None, (0.5, 0.5)), (2, 0.3, (0.7, 0.3)),
                                                        (3, None, (1 / 3, 1 / 3, 1 / 3))])
def test_what_lies_between_is_plain_arithmetic(
    folders: list[Path], tmp_path: Path, count: int, alpha: float | None, shares: tuple[float, ...]
) -> None:
    merged = aclip.merge(folders[:count], alpha=alpha, output=str(tmp_path / "merged"))
    states = [weights(folder) for folder in folders]
    for name, tensor in weights(merged).items():
        expected = sum(share * state[name].double() for share, state in zip(shares, states, strict=False))
        assert torch.equal(tensor, expected.float()), name
    record = json.loads((merged / "merge.json").read_text())
    assert record == {"models": [str(folder) for folder in folders[:count]], "shares": pytest.approx(list(shares))}
    theirs = open_clip.create_model(f"local-dir:{merged}").eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(aclip.load(merged).encode_image(pixels), theirs.encode_image(pixels, normalize=True),
                               rtol=0, atol=1e-6)


def test_tables_of_integers_come_from_the_model_with_the_largest_share() -> None:
    a, b = ({"counted": torch.tensor([n]), "weight": torch.tensor([float(n)])} for n in (1, 2))
    assert [int(mix([a, b], (1 - alpha, alpha))["counted"]) for alpha in (0, 0.4, 0.5, 0.6, 1)] == [1, 1, 1, 2, 2]


def test_the_multiplier_of_similarities_becomes_a_geometric_mean(folders: list[Path], tmp_path: Path) -> None:
    a, b = (weights(folder)["logit_scale"].exp() for folder in folders[:2])
    merged = weights(aclip.merge(folders[:2], output=str(tmp_path / "merged")))["logit_scale"].exp()
    torch.testing.assert_close(merged, (a * b).sqrt())


def test_a_run_and_the_model_it_came_from_are_swept_on_the_command_line(
    folders: list[Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = aclip.train(recipe="clip", model=str(folders[0]), data=str(images), output=str(tmp_path / "run"), epochs=20,
                      lr=1e-3, precision="fp32", batch_size=4, workers=0)
    sets = [f"old={images}[:5]", f"new={images}"]
    options = ["--output", str(tmp_path / "swept"), "--alpha", "sweep", "--lose", "20", "--workers", "0"]
    assert main(["merge", str(folders[0]), str(run.folder), *options, "--evaluate", *sets]) == 0
    said = capsys.readouterr().out
    frontier = json.loads((tmp_path / "swept" / "frontier.json").read_text())
    assert [point["alpha"] for point in frontier["points"]] == [step / 10 for step in range(11)]
    before, after = (
        {(r.set, r.metric): r.value for r in aclip.evaluate(str(model), data=tuple(sets), workers=0)}
        for model in (folders[0], run.folder))
    for point, values in ((frontier["points"][0], before), (frontier["points"][10], after)):
        assert point["old"] == values["old", "image_to_text_r1"]
        assert point["new"] == values["new", "image_to_text_r1"]
    assert f"alpha {frontier['alpha']:g} is best on new among those that lose at most 20 points on old" in said
    assert "Gain against loss" in (tmp_path / "swept" / "frontier.html").read_text()
    shares = 1 - frontier["alpha"], frontier["alpha"]
    expected = mix([weights(folders[0]), weights(run.folder / "final")], shares)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "swept").items())
    assert main(["evaluate", str(tmp_path / "swept"), "--data", sets[1], "--workers", "0"]) == 0
    assert main(["export", str(tmp_path / "swept"), "--output", str(tmp_path / "exported")]) == 0


def test_the_best_alpha_loses_no_more_than_allowed() -> None:
    points = [{"alpha": 0.0, "old": 0.5, "new": 0.1}, {"alpha": 0.5, "old": 0.49, "new": 0.3},
              {"alpha": 1.0, "old": 0.2, "new": 0.6}]
    assert [best_alpha(points, lose) for lose in (0, 0.99, 1.0, 29, 30)] == [0, 0, 0.5, 0.5, 1]


def test_models_that_do_not_match_are_refused(folders: list[Path], tmp_path: Path) -> None:
    config = models.model_config("vit-micro")
    heads = {**config, "text_cfg": {**config["text_cfg"], "heads": 1}}
    others = {
        "'visual.class_embedding' has shape": save(
            tmp_path / "wide", {**config, "vision_cfg": {**config["vision_cfg"], "width": 192}}, 3),
        "compute other features": save(tmp_path / "heads", heads, 3),
        "normalise or resize images differently": save(tmp_path / "pixels", config, 3, {"mean": (0.1, 0.2, 0.3)}),
        "other tokens": save(tmp_path / "tokens", {**config, "text_cfg": {
            **config["text_cfg"], "tokenizer_kwargs": {"clean": "whitespace"}}}, 3),
        "only .* has 'ln_final.bias'": save(tmp_path / "image", config, 3, text=False),
    }
    for reason, other in others.items():
        with pytest.raises(ConfigError, match=rf"cannot be merged: .*{reason}.*; merge models that"):
            aclip.merge([folders[0], other], output=str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("count", "options", "reason"), [
    (1, {}, "two models or more"), (3, {"alpha": 0.5}, "of more, each has the same share"),
    (2, {"alpha": 1.5}, "from 0 to 1, not 1.5"), (2, {"alpha": "sweep"}, "--evaluate OLD_SET NEW_SET"),
    (2, {"evaluate": ("a", "b")}, "is for --alpha sweep"),
    (2, {"alpha": "sweep", "evaluate": ("a", "b"), "evaluator": "knn"}, "a sweep cannot fit knn"),
])
def test_arguments_that_make_no_sense_are_refused(
    folders: list[Path], tmp_path: Path, count: int, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        aclip.merge(folders[:count], output=str(tmp_path / "merged"), **options)


def test_nothing_is_written_over(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken.txt").write_text("mine")
    assert main(["merge", *map(str, folders[:2]), "--output", str(tmp_path)]) == 2
    assert "choose another --output" in capsys.readouterr().err
