import pytest
import torch

from aclip.errors import DataError
from aclip.evaluation.features import encode_pictures


@pytest.fixture
def model(table_model):
    generator = torch.Generator().manual_seed(1)
    texts = {f"t{i}": torch.randn(6, generator=generator) for i in range(9)}
    return table_model(torch.randn(20, 6, generator=generator), texts)


def test_features_follow_the_order_of_the_set(model, picture_set, cpu):
    done = []
    encoded = encode_pictures(model, picture_set([f"c{i}" for i in range(20)]), cpu, progress=done.append)
    expected = model.images / model.images.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(encoded.features, expected)
    assert encoded.keys == tuple(f"key{i}" for i in range(20))
    assert done == [7, 7, 6]


def test_features_of_the_trunk_are_as_the_tower_pools_them(model, picture_set, cpu):
    pictures = picture_set([f"c{i}" for i in range(20)])
    assert torch.equal(encode_pictures(model, pictures, cpu, space="trunk").features, model.images)
    in_half = encode_pictures(model, pictures, cpu, space="trunk", precision=torch.bfloat16)
    assert in_half.features.dtype == torch.float32
    assert model.modes == [(False, False)] * 6


def test_runs_in_evaluation_mode_without_gradient_and_restores_every_module(model, picture_set, cpu):
    model.train()
    model.drop.eval()
    encode_pictures(model, picture_set(["a"] * 3), cpu)
    assert model.modes == [(False, False)]
    assert model.training
    assert not model.drop.training


def test_mode_is_restored_when_the_set_fails(model, cpu):
    class Failing:
        skipped = ()

        def __iter__(self):
            raise OSError("gone")

    model.train()
    with pytest.raises(OSError, match="gone"):
        encode_pictures(model, Failing(), cpu)
    assert model.training


def test_autocast_reaches_the_encoder_and_features_are_float32(model, picture_set, cpu):
    seen = []
    encode = model.encode_image

    def spy(pixels, normalize=True):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return encode(pixels, normalize).bfloat16()

    model.encode_image = spy
    encoded = encode_pictures(model, picture_set(["a"] * 3), cpu, precision=torch.bfloat16)
    assert seen == [(True, torch.bfloat16)]
    assert encoded.features.dtype == torch.float32
    torch.testing.assert_close(encoded.features.norm(dim=-1), torch.ones(3))


def test_empty_set_is_an_error_that_counts_the_skipped(model, picture_set, cpu):
    with pytest.raises(DataError, match=r"no usable picture \(2 skipped\)"):
        encode_pictures(model, picture_set([], skipped=[("a", "x"), ("b", "y")]), cpu)


def test_thumbnails_are_bounded_evenly_spread_and_undo_the_normalisation(model, picture_set, cpu):
    encoded = encode_pictures(model, picture_set(["a"] * 20, batch_size=3), cpu, thumbnails=6)
    assert sorted(encoded.thumbnails) == [0, 4, 8, 12, 16]
    # Green and blue are 0 after normalisation, which is the mean: 0.4 and 0.3 of 255.
    assert encoded.thumbnails[4][1:, 0, 0].tolist() == [102, 76]
    assert not encode_pictures(model, picture_set(["a"] * 20), cpu, thumbnails=0).thumbnails


def test_thumbnails_are_at_most_96_pixels(model, picture_set, cpu):
    encoded = encode_pictures(model, picture_set(["a"], side=200), cpu)
    assert encoded.thumbnails[0].shape == (3, 96, 96)
