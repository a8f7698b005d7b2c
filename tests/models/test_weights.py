"""Weight files: what is read of them, and one sentence for each way in which they are of no use."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tower_oracles import fresh_model, images, open_clip_alone, write_model

from aclip import models
from aclip.errors import CheckpointError, ConfigError, UnsupportedModelError
from aclip.models.weights import read_state


@pytest.fixture(scope="module")
def micro():
    return fresh_model("vit-micro")


@pytest.fixture(scope="module")
def file(micro, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("micro") / "model", micro, models.model_config("vit-micro")
                       ) / "open_clip_model.safetensors"


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def wrapped(state: dict[str, torch.Tensor], form: str) -> object:
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    return {
        "plain": state,
        "open_clip": {"epoch": 3, "name": "run", "state_dict": prefixed, "optimizer": {"step": 1}},
        "with arguments": {"state_dict": prefixed, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)},
        "compiled": {"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
        "half": {name: tensor.half() for name, tensor in state.items()},
    }[form]


@pytest.mark.parametrize("form", ["plain", "open_clip", "with arguments", "compiled", "half"])
def test_torch_files_are_read_whatever_they_are_wrapped_in(micro, form, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(wrapped(dict(micro.state_dict()), form), path)
    model = models.create_model(f"vit-micro:{path}")
    assert same(model.half().float() if form == "half" else model, micro.half().float() if form == "half" else micro)


def test_a_file_after_an_architecture_is_its_weights(micro, file):
    assert same(models.create_model(f"vit-micro:{file}"), micro)
    assert models.model_config(f"vit-micro:{file}") == models.model_config("vit-micro")
    pixels = images(1, (32, 32))
    loaded = models.load(f"vit-micro:{file}")
    torch.testing.assert_close(
        loaded.encode_image(pixels, normalize=False), micro.encode_image(pixels), rtol=0, atol=1e-5)
    assert list(models.preprocess_config(loaded.model)["mean"]) == pytest.approx([0.481, 0.458, 0.408], abs=1e-3)


def test_positions_of_another_grid_are_interpolated_as_in_open_clip(micro, tmp_path):
    folder = write_model(tmp_path / "larger", micro, models.model_config("vit-micro", image_size=48))
    ours, theirs = models.create_model(folder), open_clip_alone(folder)
    assert ours.visual.grid_size == (12, 12)
    torch.testing.assert_close(ours.visual.positional_embedding, theirs.visual.positional_embedding, rtol=0, atol=1e-6)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.victim),)


def test_code_in_a_file_is_not_run(tmp_path):
    victim = tmp_path / "run"
    for name in ("weights.pt", "weights.safetensors"):
        path = tmp_path / name
        torch.save({"state_dict": {"logit_scale": torch.zeros(())}, "extra": Payload(victim)}, path)
        with pytest.raises(CheckpointError, match=r"hold more than tensors \(it would call posix\.mkdir\)") as refused:
            models.create_model(f"vit-micro:{path}")
        assert not victim.exists()
        assert str(path) in str(refused.value)
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert victim.exists()  # it is a payload


def cut(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("kind", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize(("share", "match"), [(0.0, "the file is empty"), (0.5, "are damaged"), (0.999, "are damaged")])
def test_files_that_are_cut_off(micro, kind, share, match, tmp_path):
    path = tmp_path / kind
    state = {"visual.conv1.weight": micro.visual.conv1.weight.detach().clone()}
    if kind.endswith("t"):
        torch.save(state, path)
    else:
        save_file(state, path)
    cut(path, share)
    for use in (lambda: models.create_model(f"vit-micro:{path}"), lambda: models.load("vit-micro", checkpoint=path)):
        with pytest.raises(CheckpointError, match=match) as refused:
            use()
        assert str(path) in str(refused.value)


@pytest.mark.parametrize(("content", "match"), [
    (b"these are no weights at all", "neither safetensors nor in torch's format"),
    (b"\x89PNG\r\n\x1a\n" + bytes(50), "neither safetensors nor in torch's format"),
    (b"\x08\0\0\0\0\0\0\0{}      ", "are empty"),
    (b"\x80\x02garbage", "more than tensors|damaged"),
    (b"PK\x03\x04" + bytes(100), "damaged"),
])
def test_files_of_another_kind(content, match, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as refused:
        models.create_model(f"vit-micro:{path}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [{"state_dict": {"a": 1}}, [torch.zeros(1)], {"epoch": 1}, torch.zeros(2),
                                     {"a": torch.zeros(2, device="meta")}])
def test_torch_files_without_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="hold no state dict"):
        read_state(tmp_path / "weights.pt")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_an_image_tower_are_used_without_text_whatever_their_file(micro, suffix, prefix, tmp_path):
    """A fresh text tower would give captions features that mean nothing."""
    path = tmp_path / f"weights{suffix}"
    state = {f"{prefix}visual.{name}": tensor for name, tensor in micro.visual.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    loaded = models.load("vit-micro", checkpoint=path)
    assert not loaded.has_text
    with pytest.raises(UnsupportedModelError, match="image tower only"):
        loaded.encode_texts(["a cat"])
    pixels = images(1, (32, 32))
    assert torch.equal(loaded.encode_trunk(pixels), models.encode_image(micro.visual, pixels).cls)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_programs_are_not_run(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="TorchScript program, which is not run here"):
        models.create_model(f"vit-micro:{tmp_path / 'weights.pt'}")


def changed(state: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    if what == "missing":
        return {name: tensor for name, tensor in state.items() if "ln_2" not in name}
    if what == "extra":
        return state | {"visual.head.weight": torch.zeros(3, 3)}
    return state | {"visual.conv1.weight": torch.zeros(128, 3, 8, 8)}


@pytest.mark.parametrize(("what", "match"), [
    ("missing", r"12 missing \(visual\.transformer\.resblocks\.0\.ln_2\.weight, .* and 9 more\)"),
    ("extra", r"1 unknown \(visual\.head\.weight\)$"),
    ("shape", r"1 of another shape \(visual\.conv1\.weight is 128 x 3 x 8 x 8 in the file and 128 x 3 x 4 x 4 in the"),
])
def test_tensors_that_are_not_the_models(file, what, match, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(changed(load_file(file), what), path)
    with pytest.raises(CheckpointError, match=match) as refused:
        models.create_model(f"vit-micro:{path}")
    assert f"the weights {path} cannot be loaded into this model" in str(refused.value)


def test_names_of_files_that_mean_nothing(file):
    with pytest.raises(CheckpointError, match=r"there is no weight file nowhere/x\.pt: .*laion2b_s34b_b79k"):
        models.create_model("ViT-B-32:nowhere/x.pt")
    with pytest.raises(ConfigError, match=r"does not say which architecture .*: name it, as in ViT-B-16:"):
        models.create_model(file)
