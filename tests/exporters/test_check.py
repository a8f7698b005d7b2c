"""The check itself: what it refuses, and what is left when something fails."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_models import TINY, tiny_model
from torch import Tensor

from aclip.errors import CheckpointError, ConfigError, ExportError, MissingDependencyError, UnsupportedModelError
from aclip.exporters import EXPORTERS, Readback
from aclip.exporters import open_clip as open_clip_exporter
from aclip.exporters.base import TOKENS, check_differences, compare, write_checked
from aclip.models import LoadedModel, load, resize_images

MODEL = tiny_model()


def perfect() -> Readback:
    return Readback(MODEL.encode_image, MODEL.encode_text, MODEL.preprocess, MODEL.tokenizer,
                    MODEL.model.logit_scale.exp().item())


def test_a_perfect_readback_has_no_differences() -> None:
    differences = compare(perfect(), MODEL)
    assert len(differences) == 5
    assert max(differences.values()) < 2e-7  # normalising twice
    check_differences(differences, 2e-7, "itself")


def test_differences_of_features_logit_scale_and_pixels_are_refused_but_length_does_not_count() -> None:
    encode = MODEL.encode_image
    assert compare(replace(perfect(), encode_image=lambda x: 2 * encode(x)), MODEL)["image features"] < 2e-7
    for broken, name in (
        (replace(perfect(), encode_image=lambda x: encode(x).roll(1, dims=0)), "image features"),
        (replace(perfect(), encode_image=lambda x: encode(x) * float("nan")), "image features"),
        (replace(perfect(), encode_image=lambda x: encode(x)[:, :-1]), "image features"),
        (replace(perfect(), encode_text=lambda x: MODEL.encode_text(x).abs()), "text features"),
        (replace(perfect(), logit_scale=1.0), "logit scale"),
        (replace(perfect(), preprocess=lambda image: MODEL.preprocess(image) + 0.1), "preprocessed pixels"),
        (replace(perfect(), preprocess=lambda image: MODEL.preprocess(image)[:, :20]), "preprocessed pixels"),
    ):
        with pytest.raises(ExportError, match=name):
            check_differences(compare(broken, MODEL), 1e-5, "it")


def test_captions_tokenized_differently_are_counted() -> None:
    def tokenize(texts: list[str]) -> Tensor:
        ids = MODEL.tokenizer(texts)
        ids[1, 2] += 1
        ids[:, -1] = 7  # after the end of every caption but the longest
        return ids

    assert compare(replace(perfect(), tokenize=tokenize), MODEL)[TOKENS] == 2


def write(folder: Path, *, model: LoadedModel = MODEL, to: str = "open_clip", **options: Any) -> None:
    write_checked(EXPORTERS[to], model, TINY, folder, **options)


def test_an_earlier_export_is_replaced_only_with_overwrite_and_by_a_good_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder)
    (folder / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        write(folder)
    with pytest.raises(ExportError, match="nothing was written"):
        write(folder, overwrite=True, tolerance=-1.0)
    assert (folder / "note.txt").exists()
    write(folder, overwrite=True)
    assert not (folder / "note.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_not_an_export_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    for occupied in (tmp_path / "photos", tmp_path / "photos" / "cat.png"):
        with pytest.raises(ConfigError, match="not an earlier export"):
            write(occupied, overwrite=True)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip_exporter, "save_file", full_disk)
    with pytest.raises(ExportError, match=r"export to .* failed, so nothing was written: .*No space left on device"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"the export to .*/file/out .*failed"):
        write(tmp_path / "file" / "out")


@pytest.mark.parametrize(("error", "expected", "message"), [
    (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
    (RuntimeError("size mismatch\n\tfor visual"), ExportError, r"for open_clip failed.*: .*size mismatch"),
])
def test_an_interruption_or_an_error_on_loading_leaves_nothing(
    error: BaseException, expected: type[BaseException], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(open_clip, "create_model_and_transforms", fail)
    with pytest.raises(expected, match=message):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "package", "extra"), [
    ("huggingface", "transformers", "transformers"), ("onnx", "onnxruntime", "onnx"), ("onnx", "onnxscript", "onnx"),
    ("torch-export", "tokenizers", "transformers")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    to: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package}: pip install 'attentive-clip\[{extra}\]'"):
        write(tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_open_clip_cannot_hold_an_image_tower_alone(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"only an image tower.*--to huggingface, onnx"):
        write(tmp_path / "out", model=tiny_model(with_text=False))


def test_a_timm_tower_at_another_size_than_open_clip_builds_is_refused(tmp_path: Path) -> None:
    config = TINY | {"vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear",
                                    "image_size": 160}}
    model = tiny_model(config)
    write_checked(EXPORTERS["open_clip"], model, config, tmp_path / "own")
    resize_images(model.model.visual, (96, 96))
    with pytest.raises(ExportError, match=r"for open_clip failed, so nothing was written: .*size mismatch"):
        write_checked(EXPORTERS["open_clip"], model, config, tmp_path / "other")


def test_save_replaces_a_model_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(step: int) -> None:
        open_clip_exporter.save(MODEL.model, TINY, MODEL.model.visual.preprocess_cfg, MODEL.tokenizer,
                                tmp_path / "final", step=step, samples_seen=64 * step)

    save(3)
    found = json.loads((tmp_path / "final" / "aclip.json").read_text())
    assert (found["step"], found["samples_seen"]) == (3, 192)
    pixels = torch.randn(2, 3, 24, 24)
    loaded: Callable[[Tensor], Tensor] = open_clip.create_model_and_transforms(
        f"local-dir:{tmp_path / 'final'}")[0].eval().encode_image
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels), MODEL.encode_image(pixels, normalize=False), rtol=0, atol=1e-6)
    monkeypatch.setattr(open_clip_exporter, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(4)
    assert '"step": 3' in (tmp_path / "final" / "aclip.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_weights_that_have_changed_since_they_were_saved_are_not_loaded(tmp_path: Path) -> None:
    open_clip_exporter.save(MODEL.model, TINY, MODEL.model.visual.preprocess_cfg, MODEL.tokenizer, tmp_path)
    load(tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="have changed since they were written: take an undamaged copy"):
        load(tmp_path)
    (tmp_path / "aclip.json").unlink()
    load(tmp_path)
