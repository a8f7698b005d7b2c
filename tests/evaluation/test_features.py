import pytest
import torch

from aclip.errors import CheckpointError, DataError
from aclip.evaluation.features import TextEncoder, encode_image_set


@pytest.fixture
def model(table_model):
    generator = torch.Generator().manual_seed(1)
    texts = {f"t{i}": torch.randn(6, generator=generator) for i in range(9)}
    return table_model(torch.randn(20, 6, generator=generator), texts)


def test_features_follow_the_order_of_the_set(model, image_set, cpu):
    done = []
    encoded = encode_image_set(model, image_set([f"c{i}" for i in range(20)]), cpu, progress=done.append)
    expected = model.images / model.images.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(encoded.features, expected)
    assert encoded.keys == tuple(f"key{i}" for i in range(20))
    assert done == [7, 7, 6]


def test_features_of_the_trunk_are_as_the_tower_pools_them(model, image_set, cpu):
    images = image_set([f"c{i}" for i in range(20)])
    assert torch.equal(encode_image_set(model, images, cpu, space="trunk").features, model.images)
    assert model.modes == [(False, False)] * 3


def test_runs_in_evaluation_mode_without_gradient_and_restores_every_module(model, image_set, cpu):
    model.train()
    model.drop.eval()
    encode_image_set(model, image_set(["a"] * 3), cpu)
    assert model.modes == [(False, False)]
    assert model.training
    assert not model.drop.training


def test_mode_is_restored_when_the_set_fails(model, cpu):
    class Failing:
        skipped = ()

        def __len__(self):
            return 1

        def __iter__(self):
            raise OSError("gone")

    model.train()
    with pytest.raises(DataError, match="cannot evaluate: gone"):
        encode_image_set(model, Failing(), cpu)
    assert model.training


def test_empty_set_is_an_error_that_counts_the_skipped(model, image_set, cpu):
    with pytest.raises(DataError, match=r"no usable image \(2 skipped\)"):
        encode_image_set(model, image_set([], skipped=[("a", "x"), ("b", "y")]), cpu)


def test_features_that_are_not_finite_are_refused_and_counted(model, image_set, cpu):
    model.images[3, 1], model.images[7, 0] = torch.nan, torch.inf
    for space in ("joint", "trunk"):
        with pytest.raises(CheckpointError, match="features of 2 of 20 images are NaN or inf"):
            encode_image_set(model, image_set(["a"] * 20), cpu, space=space)
    model.texts["t2"] = torch.full((6,), torch.nan)
    with pytest.raises(CheckpointError, match="features of 1 of 9 texts are NaN or inf"):
        TextEncoder(model, cpu)(model.names)
