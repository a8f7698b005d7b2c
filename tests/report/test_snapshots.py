import pytest
import torch

from aclip.errors import CheckpointError
from aclip.report import read_snapshot, snapshot_path, write_snapshot


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    return {"images": torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=generator),
            "scores": torch.rand(2, 6, generator=generator), "keep_indices": torch.tensor([[0, 2], [1, 5]]),
            "grid": (2, 3), "captions": ("a cat", "été <\"🎈\n"), "step": 123}


def test_round_trip(parts, tmp_path):
    path = snapshot_path(tmp_path / "snapshots", 123)
    assert path.name == "step-00000123.safetensors"
    write_snapshot(path, **parts)
    read = read_snapshot(path)
    for name in ("images", "scores", "keep_indices"):
        assert torch.equal(getattr(read, name), parts[name])
    assert (read.grid, read.captions, read.step) == ((2, 3), parts["captions"], 123)
    assert list(path.parent.iterdir()) == [path]


def test_types_are_those_of_the_format(parts, tmp_path):
    path = tmp_path / "s.safetensors"
    write_snapshot(path, **(parts | {"scores": parts["scores"].bfloat16().requires_grad_(),
                                     "images": parts["images"].transpose(2, 3).contiguous().transpose(2, 3)}))
    read = read_snapshot(path)
    assert (read.images.dtype, read.scores.dtype, read.keep_indices.dtype) == (
        torch.uint8, torch.float32, torch.int64)
    assert torch.equal(read.images, parts["images"])


@pytest.mark.parametrize("change", [
    {"grid": (3, 3)}, {"captions": ("one",)}, {"keep_indices": torch.zeros(1, 2)}])
def test_parts_that_do_not_fit_are_refused(parts, tmp_path, change):
    with pytest.raises(ValueError, match="cannot hold"):
        write_snapshot(tmp_path / "s.safetensors", **(parts | change))
    assert not list(tmp_path.iterdir())


def test_missing_torn_and_foreign_files_are_named(parts, tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(CheckpointError, match=r"s\.safetensors is not a readable snapshot"):
        read_snapshot(path)
    write_snapshot(path, **parts)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="not a readable snapshot"):
        read_snapshot(path)
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a readable snapshot"):
        read_snapshot(path)
