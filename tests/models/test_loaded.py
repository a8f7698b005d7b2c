"""`aclip.load` as people use it: images and texts of any kind in, features out, on the CPU."""

import json
import logging
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tower_oracles import (
    flip_bit,
    fresh_model,
    images,
    scores_from_full_maps,
    write_checkpoint,
    write_model,
)

import aclip
from aclip import models
from aclip.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from aclip.masking import AttentiveMasking, MaskingContext


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of vit-micro, with checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    write_model(folder / "final", fresh_model("vit-micro"), models.model_config("vit-micro"))
    (folder / "final" / "aclip.json").write_text(json.dumps({"step": 10, "samples_seen": 320}))
    for step in (5, 10):
        write_checkpoint(folder, step, fresh_model("vit-micro"), fresh_model("vit-micro", seed=step).visual)
    return folder


@pytest.fixture
def killed(tmp_path):
    """A run that was killed after step 10; the scale of the logits tells its steps apart."""
    folder = tmp_path / "killed"
    for step in (8, 9, 10):
        model = fresh_model("vit-micro")
        model.logit_scale.data.fill_(step)
        write_checkpoint(folder, step, model, fresh_model("vit-micro", seed=step).visual)
    (folder / "config.json").write_text(json.dumps({"model": "vit-micro"}))
    return folder


@pytest.fixture(scope="module")
def model(run):
    return aclip.load(run)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 50 + number, 3), np.uint8)).save(path)
    return paths


@torch.no_grad()
def test_features_and_preprocessing_are_open_clips(model, run):
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run / 'final'}")
    theirs.eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8))
    pixels = model.preprocess(image)[None]
    assert torch.equal(pixels, preprocess(image)[None])
    tokens = model.tokenizer(["a cat", "a much longer caption about two dogs"])
    for normalize in (True, False):
        torch.testing.assert_close(
            model.encode_image(pixels, normalize), theirs.encode_image(pixels, normalize), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            model.encode_text(tokens, normalize), theirs.encode_text(tokens, normalize), rtol=0, atol=1e-5)
    trunk = model.encode_trunk(pixels)
    torch.testing.assert_close(trunk @ model.model.visual.proj, theirs.encode_image(pixels), rtol=0, atol=1e-5)
    assert model.has_text
    assert not any(part.training for part in model.modules())


def test_preprocess_composites_transparency_on_white_as_encode_images_does(model, paths):
    image = Image.open(paths[0]).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(model.preprocess(image)[None]), model.encode_images([image]))


def test_images_of_every_kind_give_the_same_features(model, paths):
    opened = [Image.open(path) for path in paths]
    expected = model.encode_image(torch.stack([model.preprocess(image.convert("RGB")) for image in opened])).detach()
    for kind in (paths, [str(path) for path in paths], opened, [np.asarray(image) for image in opened],
                 [paths[0], opened[1], np.asarray(opened[2]), str(paths[3]), opened[4]], iter(paths)):
        features = model.encode_images(kind, batch_size=2)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert not features.requires_grad
    assert not features.is_inference()  # so that a probe can be trained on them
    raw = model.encode_images(paths, normalize=False)
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=1), features, rtol=0, atol=1e-6)


def test_reading_in_another_process_changes_nothing(model, paths):
    features = model.encode_images(paths, batch_size=2)
    assert torch.equal(model.encode_images(paths, batch_size=2, workers=1), features)


def test_transparency_grey_and_orientation_are_as_in_training(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    alpha = np.dstack([pixels, np.zeros((40, 60), np.uint8)])
    white = model.encode_images([np.full((40, 60, 3), 255, np.uint8)])
    assert torch.equal(model.encode_images([alpha]), white)
    assert torch.equal(model.encode_images([Image.fromarray(alpha)]), white)
    grey = np.full((40, 60), 90, np.uint8)
    assert torch.equal(model.encode_images([grey]), model.encode_images([np.dstack([grey] * 3)]))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "turned.png", exif=exif)
    upright = model.encode_images([pixels])
    assert torch.equal(model.encode_images([tmp_path / "turned.png"]), upright)
    assert torch.equal(model.encode_images([Image.open(tmp_path / "turned.png")]), upright)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named_or_becomes_nan(model, paths, tmp_path, workers):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be used: "):
        model.encode_images([paths[0], broken], workers=workers)
    with pytest.raises(DataError, match=r"absent\.png cannot be used: No such file"):
        model.encode_images([tmp_path / "absent.png"], workers=workers)
    features = model.encode_images([paths[0], broken, paths[1]], bad="nan", workers=workers)
    assert features[1].isnan().all()
    torch.testing.assert_close(features[[0, 2]], model.encode_images(paths[:2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("array", [np.zeros((8, 8, 3)), np.zeros((3, 8, 8), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_that_are_not_images_are_named_by_number(model, array):
    with pytest.raises(DataError, match="image 1 cannot be used"):
        model.encode_images([np.zeros((8, 8, 3), np.uint8), array])


def test_texts_give_open_clips_features_in_order(model):
    texts = ["a cat", "a much longer caption about two dogs &amp; a “bird”", "", "word " * 200]
    expected = model.model.encode_text(model.tokenizer(texts), normalize=True).detach()
    for batch_size in (1, 3, 256):
        torch.testing.assert_close(model.encode_texts(texts, batch_size=batch_size), expected, rtol=0, atol=1e-6)


def test_no_items_give_no_rows_of_the_right_width(model):
    assert model.encode_images([]).shape == (0, 128)
    assert model.encode_texts([]).shape == (0, 128)


def test_features_that_are_not_finite_name_the_model(run, paths, tmp_path):
    shutil.copytree(run, tmp_path / "diverged")
    diverged = aclip.load(tmp_path / "diverged")
    diverged.model.visual.proj.data.fill_(float("nan"))
    diverged.model.text_projection.data.fill_(float("inf"))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"nothing")
    for encode in (lambda: diverged.encode_images(paths), lambda: diverged.encode_texts(["a cat"]),
                   lambda: diverged.encode_images([broken, paths[0]], bad="nan")):
        with pytest.raises(CheckpointError, match=r"^the features of '.*/diverged' are NaN or inf: its weights"):
            encode()


def test_wrong_arguments_are_refused(model, paths, run):
    for call, sentence in (
        (lambda: model.encode_images(paths, batch_size=0), "batch_size must be at least 1"),
        (lambda: model.encode_images(paths, bad="skip"), "'raise' or 'nan'"),
        (lambda: model.encode_texts("a cat"), "a list of texts"),
        (lambda: aclip.load(run, weights="averaged"), "'online' or 'ema'"),
        (lambda: aclip.load(run / "final", weights="ema"), "is not a run that has any"),
        (lambda: aclip.load("vit-micro", weights="ema"), "is not a run that has any"),
        (lambda: aclip.load(run, device="cuda:77"), "device 'cuda:77' is not available"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            call()


@pytest.mark.parametrize("keep", ["highest", "lowest"])
def test_keep_mask_is_attentive_masking_by_the_models_own_scores(model, keep):
    pixels = images(3, (32, 32))
    scores = model.attention_scores(pixels)
    torch.testing.assert_close(scores, scores_from_full_maps(model.model.visual, pixels), rtol=0, atol=1e-6)
    mask = model.keep_mask(pixels, mask_ratio=0.75, keep=keep, block_size=2)
    kept = AttentiveMasking(0.75, keep=keep)(MaskingContext(3, (8, 8), "cpu", scores=scores))
    assert torch.equal(mask.nonzero()[:, 1].reshape(3, 16), kept)
    assert model.keep_mask(pixels[:, :, :, :16], block_size=1).sum(dim=1).tolist() == [16] * 3
    with pytest.raises(TypeError, match="keep_indices"):
        model.encode_image(pixels, keep_indices=kept)


def test_final_weights_and_ema_of_a_finished_run(run):
    online, averaged = aclip.load(run), aclip.load(run, weights="ema")
    for loaded in (online, averaged):
        assert (loaded.step, loaded.samples_seen) == (10, 320)
    expected = fresh_model("vit-micro", seed=10).visual.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in averaged.model.visual.state_dict().items())
    assert torch.equal(averaged.encode_texts(["a cat"]), online.encode_texts(["a cat"]))  # text has no EMA
    assert aclip.load(run / "checkpoints" / "step-00000005", weights="ema").step == 5


@pytest.mark.parametrize("weights", ["online", "ema"])
def test_a_killed_run_gives_its_newest_undamaged_checkpoint_and_says_its_step(killed, weights):
    for step in (10, 9, 8):
        loaded = aclip.load(killed, weights=weights)
        assert (loaded.step, loaded.samples_seen, loaded.model.logit_scale) == (step, 32 * step, step)
        average = fresh_model("vit-micro", seed=step).visual
        assert torch.equal(loaded.model.visual.conv1.weight, average.conv1.weight) == (weights == "ema")
        place = killed / "checkpoints" / f"step-{step:08d}"
        flip_bit(next(place.glob("*.safetensors")))
        with pytest.raises(CheckpointError, match=f"step-{step:08d} is damaged"):
            aclip.load(place, weights=weights)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is undamaged"):
        aclip.load(killed, weights=weights)


def test_a_run_without_ema_says_so(tmp_path):
    write_checkpoint(tmp_path, 1, fresh_model("vit-micro"))
    (tmp_path / "config.json").write_text('{"model": "vit-micro"}')
    with pytest.raises(CheckpointError, match="keeps no EMA: use the online weights"):
        aclip.load(tmp_path, weights="ema")


def test_untrained_architectures_are_named(run, caplog):
    with caplog.at_level(logging.WARNING, "aclip"):
        fresh = aclip.load("vit-micro")
    assert "'vit-micro' is an architecture without weights" in caplog.text
    assert fresh.step is fresh.samples_seen is None
    caplog.clear()
    from_file = aclip.load(f"vit-micro:{run / 'final' / 'open_clip_model.safetensors'}")
    assert not caplog.records
    assert from_file.step is None


def test_runs_without_text_encode_images_only(tmp_path):
    model = models.create_model("vit-micro", with_text=False)
    pixels = images(1, (32, 32))
    expected = models.encode_image(model.visual, pixels)
    write_model(tmp_path / "finished" / "final", model, models.model_config("vit-micro"))
    write_checkpoint(tmp_path / "killed", 1, model)
    (tmp_path / "killed" / "config.json").write_text('{"model": "vit-micro"}')
    for run in ("finished", "killed"):
        loaded = models.load(tmp_path / run)
        assert not loaded.has_text
        assert torch.equal(loaded.encode_image(pixels, normalize=False), expected.features)
        assert torch.equal(loaded.encode_trunk(pixels), expected.cls)
        with pytest.raises(UnsupportedModelError, match="image tower only"):
            loaded.encode_texts(["a cat"])
