"""`aclip.load` as people use it: pictures and texts of any kind in, features out, on the CPU."""

import doctest
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tower_oracles import fresh_model, write_model

import aclip
from aclip import models
from aclip.errors import CheckpointError, ConfigError, DataError
from aclip.masking import AttentiveMasking, MaskingContext
from aclip.models import loaded as module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of vit-micro with a final model, and a checkpoint with a moving average that differs from it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    write_model(folder / "final", fresh_model("vit-micro"), models.model_config("vit-micro"))
    average = fresh_model("vit-micro", seed=1).visual
    for step in (5, 10):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        save_file({f"method/ema_visual.{name}": tensor * (step / 10) for name, tensor in average.state_dict().items()},
                  folder / "checkpoints" / f"step-{step:08d}" / "state.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> models.LoadedModel:
    return aclip.load(run)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 50 + number, 3), np.uint8)).save(path)
    return paths


@pytest.fixture
def place(run: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder as the examples of the docstrings expect it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/first")
    for name, picture in (("cat.png", pictures[0]), ("dog.png", pictures[1])):
        shutil.copy(picture, name)


@pytest.mark.usefixtures("place")
def test_the_examples_of_the_docstrings_run_and_say_the_truth() -> None:
    found = doctest.testmod(module)
    assert found.attempted >= 12
    assert found.failed == 0


def test_pictures_of_every_kind_give_the_same_features(model: models.LoadedModel, pictures: list[Path]) -> None:
    opened = [Image.open(path) for path in pictures]
    expected = model.encode_image(torch.stack([model.preprocess(image.convert("RGB")) for image in opened])).detach()
    for kind in (pictures, [str(path) for path in pictures], opened, [np.asarray(image) for image in opened],
                 [pictures[0], opened[1], np.asarray(opened[2]), str(pictures[3]), opened[4]], iter(pictures)):
        for batch_size in (2, 64):
            features = model.encode_images(kind if batch_size == 2 else list(pictures), batch_size=batch_size)
            torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert not features.requires_grad
    assert not features.is_inference()  # so that a probe can learn from them
    assert torch.allclose(features.norm(dim=1), torch.ones(5))
    raw = model.encode_images(pictures, normalize=False)
    assert not torch.allclose(raw.norm(dim=1), torch.ones(5), atol=1e-2)
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=1), features, rtol=0, atol=1e-6)


def test_reading_processes_and_a_bar_change_nothing(
    model: models.LoadedModel, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    features = model.encode_images(pictures, batch_size=2)
    assert capsys.readouterr().err == ""
    assert torch.equal(model.encode_images(pictures, batch_size=2, workers=1, progress=True), features)
    assert "encoding pictures" in capsys.readouterr().err


def test_transparency_grey_and_orientation_are_as_in_training(model: models.LoadedModel, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    alpha = np.dstack([pixels, np.zeros((40, 60), np.uint8)])
    white = model.encode_images([np.full((40, 60, 3), 255, np.uint8)])
    assert torch.equal(model.encode_images([alpha]), white)
    assert torch.equal(model.encode_images([Image.fromarray(alpha)]), white)
    grey = np.full((40, 60), 90, np.uint8)
    assert torch.equal(model.encode_images([grey]), model.encode_images([np.dstack([grey] * 3)]))
    turned = Image.fromarray(np.rot90(pixels).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise to stand upright
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = model.encode_images([pixels])
    assert torch.equal(model.encode_images([tmp_path / "turned.png"]), upright)
    assert torch.equal(model.encode_images([Image.open(tmp_path / "turned.png")]), upright)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_named_or_becomes_nan(
    model: models.LoadedModel, pictures: list[Path], tmp_path: Path, workers: int
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be used: truncated or damaged JPEG"):
        model.encode_images([pictures[0], broken], workers=workers)
    with pytest.raises(DataError, match=r"absent\.png cannot be used: No such file"):
        model.encode_images([tmp_path / "absent.png"], workers=workers)
    features = model.encode_images([pictures[0], broken, pictures[1]], bad="nan", workers=workers)
    assert features[1].isnan().all()
    torch.testing.assert_close(features[[0, 2]], model.encode_images(pictures[:2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("array", [np.zeros((8, 8, 3)), np.zeros((3, 8, 8), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_that_are_no_pictures_are_told_by_their_number(model: models.LoadedModel, array: np.ndarray) -> None:
    with pytest.raises(DataError, match="picture 1 cannot be used"):
        model.encode_images([np.zeros((8, 8, 3), np.uint8), array])


def test_texts_give_open_clips_features_in_their_order(model: models.LoadedModel) -> None:
    texts = ["a cat", "a much longer caption about two dogs &amp; a “bird”", "", "word " * 200]
    expected = model.model.encode_text(model.tokenizer(texts), normalize=True).detach()
    for batch_size in (1, 3, 256):
        torch.testing.assert_close(model.encode_texts(texts, batch_size=batch_size), expected, rtol=0, atol=1e-6)


def test_nothing_gives_no_rows_of_the_right_width(model: models.LoadedModel) -> None:
    assert model.encode_images([]).shape == (0, 128)
    assert model.encode_texts([]).shape == (0, 128)


def test_what_makes_no_sense_is_refused(model: models.LoadedModel, pictures: list[Path], run: Path) -> None:
    for call, sentence in (
        (lambda: model.encode_images(pictures, batch_size=0), "batch_size must be at least 1"),
        (lambda: model.encode_images(pictures, bad="skip"), "'raise' or 'nan'"),
        (lambda: model.encode_texts("a cat"), "a list of texts"),
        (lambda: aclip.load(run, weights="averaged"), "'online' or 'ema'"),
        (lambda: aclip.load(run / "final", weights="ema"), "a run's folder with its checkpoints"),
        (lambda: aclip.load(run, weights="ema", checkpoint="x"), "leave out checkpoint"),
        (lambda: aclip.load(run, device="cuda:77"), "there is no device 'cuda:77'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            call()


@pytest.mark.parametrize("keep", ["highest", "lowest"])
def test_the_keep_mask_is_attentive_maskings(model: models.LoadedModel, keep: str) -> None:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = model.keep_mask(images, mask_ratio=0.75, keep=keep, block_size=2)
    assert mask.shape == (3, 64)
    assert mask.sum(dim=1).tolist() == [16] * 3
    kept = AttentiveMasking(0.75, keep=keep)(
        MaskingContext(3, (8, 8), "cpu", scores=model.attention_scores(images)))
    assert torch.equal(mask.nonzero()[:, 1].reshape(3, 16), kept)
    assert model.keep_mask(images[:, :, :, :16], block_size=1).sum(dim=1).tolist() == [16] * 3


def test_the_moving_average_comes_from_the_newest_checkpoint(run: Path) -> None:
    averaged, online = aclip.load(run, weights="ema"), aclip.load(run)
    expected = fresh_model("vit-micro", seed=1)
    for name, tensor in averaged.model.visual.state_dict().items():
        assert torch.equal(tensor, expected.visual.state_dict()[name])
    assert torch.equal(averaged.encode_texts(["a cat"]), online.encode_texts(["a cat"]))  # text has no average


def test_a_run_without_an_average_and_one_of_another_tower_say_so(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "step-00000010" / "state.safetensors"
    for tensors, sentence in (
        ({"method/model.x": torch.zeros(1)}, "keeps no moving average"),
        ({"method/ema_visual.x": torch.zeros(1)}, "of another image tower"),
    ):
        save_file(tensors, state)
        with pytest.raises(CheckpointError, match=sentence):
            aclip.load(tmp_path / "run", weights="ema")
    state.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        aclip.load(tmp_path / "run", weights="ema")
