"""The check itself: what it refuses, and what is left when something fails."""

import errno
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from exported_models import TINY, files_below, make_subject
from torch import Tensor

from aclip.errors import ConfigError, ExportError, MissingDependencyError, UnsupportedModelError
from aclip.exporters import EXPORTS, Readback, Subject, made_examples, write_checked
from aclip.exporters import safetensors as safetensors_format
from aclip.exporters.check import compare, refuse_difference
from aclip.models.models import resize_images

SUBJECT = make_subject()
EXAMPLES = made_examples((24, 24))


def own(subject: Subject = SUBJECT) -> Readback:
    """What a perfect export reads back as."""
    return Readback(subject.model.encode_image, subject.model.encode_text, subject.model.preprocess,
                    subject.model.tokenizer, subject.logit_scale)


@torch.no_grad()
def test_the_model_itself_differs_in_nothing() -> None:
    parity = compare(own(), SUBJECT, EXAMPLES)
    assert (parity.logit_scale, parity.pixels, parity.differing, parity.captions) == (0.0, 0.0, (), 10)
    refuse_difference(parity, 2e-7, "itself")


def doubled(encode: object) -> object:
    return lambda batch: 2 * encode(batch)  # type: ignore[operator]


@torch.no_grad()
def test_length_does_not_count_but_everything_else_does() -> None:
    assert compare(replace(own(), encode_image=doubled(SUBJECT.model.encode_image)), SUBJECT, EXAMPLES).image < 1e-7
    encode = SUBJECT.model.encode_image
    for broken, sentence in (
        (replace(own(), encode_image=lambda x: encode(x).roll(1, dims=0)), "image features"),
        (replace(own(), encode_image=lambda x: encode(x) * float("nan")), "image features"),
        (replace(own(), encode_image=lambda x: encode(x)[:, :-1]), "image features"),
        (replace(own(), encode_text=lambda x: SUBJECT.model.encode_text(x).abs()), "text features"),
        (replace(own(), logit_scale=1.0), "the logit scale"),
        (replace(own(), preprocess=lambda picture: SUBJECT.model.preprocess(picture) + 0.1), "grey levels"),
        (replace(own(), preprocess=lambda picture: SUBJECT.model.preprocess(picture)[:, :20]), "grey levels"),
    ):
        with pytest.raises(ExportError, match=sentence):
            refuse_difference(compare(broken, SUBJECT, EXAMPLES), 1e-5, "it")


@torch.no_grad()
def test_captions_that_are_split_otherwise_are_named() -> None:
    def tokenize(texts: list[str]) -> Tensor:
        ids = SUBJECT.model.tokenizer(texts)
        ids[1, 2] += 1
        ids[:, -1] = 7  # behind the end of most, so it does not count there
        return ids

    long = EXAMPLES.captions[-1]
    assert compare(replace(own(), tokenize=tokenize), SUBJECT, EXAMPLES).differing == (EXAMPLES.captions[1], long)


def write(folder: Path, *, subject: Subject = SUBJECT, to: str = "safetensors", **options: object) -> None:
    write_checked(EXPORTS[to], subject, folder, EXAMPLES, card=lambda parity: "card\n", **options)  # type: ignore[arg-type]


def test_an_earlier_export_is_replaced_only_if_asked_for_and_only_by_a_good_one(tmp_path: Path) -> None:
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


def test_what_is_no_export_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    write(tmp_path / "photos")  # an empty folder is no loss
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cat.png").touch()
    with pytest.raises(ConfigError, match="no earlier export"):
        write(tmp_path / "other", overwrite=True)
    with pytest.raises(ConfigError, match="no earlier export"):
        write(tmp_path / "other" / "cat.png", overwrite=True)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_format, "save_file", full)
    with pytest.raises(ExportError, match=r"cannot write the export to .*: .*No space left on device"):
        write(tmp_path / "deep" / "out")
    assert files_below(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"cannot write the export to .*/file/out"):
        write(tmp_path / "file" / "out")


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_format, "load_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(("to", "package", "extra"), [
    ("huggingface", "transformers", "transformers"), ("onnx", "onnxruntime", "onnx"), ("onnx", "onnxscript", "onnx")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    to: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package}: pip install 'attentive-clip\[{extra}\]'"):
        write(tmp_path / "out", to=to)
    assert files_below(tmp_path) == []


def test_open_clip_cannot_hold_an_image_tower_alone(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"image tower only.*--to huggingface, onnx"):
        write(tmp_path / "out", subject=make_subject(with_text=False), to="open_clip")


def test_open_clip_builds_towers_of_timm_at_one_size(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    subject = make_subject(TINY | {"vision_cfg": vision})
    write(tmp_path / "own", subject=subject, to="open_clip")
    resize_images(subject.model.model.visual, (96, 96))
    with pytest.raises(UnsupportedModelError, match=r"of 96 x 96 pixels, and open_clip builds it for 160 x 160 only"):
        write(tmp_path / "other", subject=subject, to="open_clip")


def test_what_the_library_says_against_an_export_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("size mismatch\n\tfor visual")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", refuse)
    with pytest.raises(ExportError, match=r"^open_clip cannot load what was written of tiny, .*: size mismatch for"):
        write(tmp_path / "out", to="open_clip")
    assert files_below(tmp_path) == []
