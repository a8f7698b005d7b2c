"""Crops: the geometry over many images, the pixels against coordinates painted into them."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop, functional

from aclip import rng
from aclip.data.augment import AUGMENTATIONS, draw
from aclip.data.views import (
    VIEWS,
    OneCrop,
    TwoAugs,
    TwoCropsInContext,
    cut,
    enclosing_box,
    random_box,
    released_context_box,
)
from aclip.errors import ConfigError

SHAPES = [(1, 1), (3, 2), (2, 3), (1, 500), (500, 1), (7, 400), (72, 72), (128, 128), (300, 199), (480, 640)]


def inside(box, height, width):
    top, left, h, w = box
    return top >= 0 and left >= 0 and h >= 1 and w >= 1 and top + h <= height and left + w <= width


def contains(outer, box):
    return (
        outer[0] <= box[0]
        and outer[1] <= box[1]
        and outer[0] + outer[2] >= box[0] + box[2]
        and outer[1] + outer[3] >= box[1] + box[3]
    )


def coordinates(height, width):
    """An image whose red is the row and whose green is the column (both below 256)."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(height)[:, None]
    pixels[..., 1] = np.arange(width)
    return pixels


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_context_contains_both_views_and_stays_inside_the_image(height, width):
    pipeline = TwoCropsInContext()
    for sample in range(1000):
        boxes = pipeline.boxes(height, width, seed=0, epoch=0, sample=sample)
        assert all(inside(box, height, width) for box in boxes.values())
        assert contains(boxes["context"], boxes["a"])
        assert contains(boxes["context"], boxes["b"])


@settings(max_examples=400, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 100),
    sample=st.integers(0, 2**40),
    scale=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted).map(tuple),
    ratio=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted).map(tuple),
    context=st.sampled_from(["paper", "released"]),
)
def test_any_image_and_any_options_give_boxes_inside(
    height, width, seed, epoch, sample, scale, ratio, context
):
    pipeline = TwoCropsInContext(scale=scale, ratio=ratio, context=context)
    boxes = pipeline.boxes(height, width, seed=seed, epoch=epoch, sample=sample)
    assert list(boxes) == ["a", "b", "context"]
    assert all(inside(box, height, width) for box in boxes.values())
    if context == "paper":
        assert contains(boxes["context"], boxes["a"])
        assert contains(boxes["context"], boxes["b"])


def rounded_from_the_range(h, w, height, width, scale, ratio):
    """Whether some real-valued box of allowed area and ratio rounds to h x w."""
    area, half = height * width, 0.5 + 1e-9
    return (
        (h - half) * (w - half) <= scale[1] * area
        and (h + half) * (w + half) >= scale[0] * area
        and (w - half) / (h + half) <= ratio[1]
        and (w + half) / (h - half) >= ratio[0]
    )


@settings(max_examples=400, deadline=None)
@given(
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    sample=st.integers(0, 10**6),
    scale=st.sampled_from([(0.5, 1.0), (0.08, 1.0), (0.3, 0.3), (1.0, 1.0)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 2.0), (2.0, 2.5), (0.2, 0.3)]),
)
def test_area_and_ratio_are_in_range_or_the_box_is_the_central_one(height, width, sample, scale, ratio):
    top, left, h, w = random_box(rng.generator(1, "crop", sample), height, width, scale, ratio)
    if not rounded_from_the_range(h, w, height, width, scale, ratio):
        assert (top, left) == ((height - h) // 2, (width - w) // 2)
        if width / height < ratio[0]:
            assert (h, w) == (min(height, max(1, round(width / ratio[0]))), width)
        elif width / height > ratio[1]:
            assert (h, w) == (height, min(width, max(1, round(height * ratio[1]))))
        else:
            assert (h, w) == (height, width)


def test_every_position_is_as_likely():
    # half of each side of a 12 x 10 image: 7 x 6 positions
    count, draw_for = 6000, {"height": 12, "width": 10, "scale": (0.25, 0.25), "ratio": (10 / 12, 10 / 12)}
    boxes = [random_box(rng.generator(0, sample), **draw_for) for sample in range(count)]
    assert {box[2:] for box in boxes} == {(6, 5)}
    counts = np.zeros((7, 6))
    np.add.at(counts, tuple(np.array(boxes).T[:2]), 1)
    # chi-square with 41 degrees of freedom: 84.6 is passed by chance once in 10,000
    assert ((counts - count / 42) ** 2 / (count / 42)).sum() < 84.6


@pytest.mark.parametrize(("height", "width"), [(256, 256), (200, 300), (90, 400)])
@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.08, 1.0)])
def test_boxes_are_distributed_as_torchvision_draws_them(height, width, scale):
    count, ratio = 1500, (3 / 4, 4 / 3)
    ours = np.array([
        random_box(rng.generator(0, "crop", sample), height, width, scale, ratio) for sample in range(count)
    ])
    image = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = np.array([
            RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)
        ])
    # Two-sample Kolmogorov-Smirnov distance; 0.0705 is passed by chance once in a thousand columns.
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        values = np.union1d(a, b)
        distance = np.abs(np.searchsorted(a, values, "right") - np.searchsorted(b, values, "right")).max()
        assert distance / count < 0.0705


def test_edges_of_the_context_move_uniformly_up_to_the_image():
    height, width, count = 20, 12, 6000
    views = (5, 2, 6, 4), (7, 3, 8, 6)  # together rows 5 to 15 of 20, columns 2 to 9 of 12
    edges = np.array([
        (top, left, height - top - h, width - left - w)
        for top, left, h, w in (
            enclosing_box(rng.generator(0, sample), height, width, *views) for sample in range(count)
        )
    ])
    for column, room in zip(edges.T, (5, 2, 5, 3), strict=True):
        share = np.bincount(column, minlength=room + 1) / count
        assert len(share) == room + 1
        # five standard deviations of a share near 1 / (room + 1)
        assert share == pytest.approx(1 / (room + 1), abs=5 * math.sqrt(0.25 / count))
    assert np.abs(np.corrcoef(edges.T) - np.eye(4)).max() < 5 / math.sqrt(count)


def test_released_context_is_what_the_release_computes():
    # The union is rows 5 to 15 of 20 and columns 3 to 13 of 16; the left edge, which should start at b's 3,
    # starts at min(a's left 7, b's height 6) = 6.
    height, width, a, b = 20, 16, (5, 7, 4, 6), (9, 3, 6, 5)
    boxes = np.array([
        released_context_box(rng.generator(0, sample), height, width, a, b) for sample in range(6000)
    ])
    rows = {(top, h) for top in range(6) for h in range(10, height - top + 1)}
    columns = {(left, w) for left in range(7) for w in range(13 - 6, width - left + 1)}
    assert {tuple(pair) for pair in boxes[:, [0, 2]].tolist()} == rows
    assert {tuple(pair) for pair in boxes[:, [1, 3]].tolist()} == columns
    # first the edge, uniformly; then the side, uniformly among what that edge leaves
    for start, lengths in ((top, boxes[boxes[:, 0] == top, 2]) for top in range(6)):
        assert len(lengths) / 6000 == pytest.approx(1 / 6, abs=0.03)
        share = np.bincount(lengths - 10) / len(lengths)
        assert share == pytest.approx(1 / (height - start - 10 + 1), abs=0.06)


def test_released_context_misses_part_of_a_view_in_most_samples():
    # Shapes of photographs; 71 % of these draws, with the release's own area and ratio.
    shapes = [(375, 500), (500, 375), (500, 500), (333, 500)]
    missed, total = 0, 0
    for height, width in shapes:
        pipeline = TwoCropsInContext(context="released")
        for sample in range(1500):
            boxes = pipeline.boxes(height, width, seed=0, epoch=0, sample=sample)
            total += 1
            missed += not (contains(boxes["context"], boxes["a"]) and contains(boxes["context"], boxes["b"]))
    assert 0.6 < missed / total < 0.8


# ------------------------------------------------------------------------------------------- draws


def test_draws_are_a_function_of_seed_epoch_sample_and_view():
    pipeline = TwoCropsInContext(flip=0.5)
    image, sizes = noise(90, 120), {"a": (16, 16), "b": (16, 16), "context": (16, 16)}
    first = pipeline(image, seed=3, epoch=1, sample=7, sizes=sizes)
    again = TwoCropsInContext(flip=0.5)(image.copy(), seed=3, epoch=1, sample=7, sizes=sizes)
    for name, crop in first.items():
        assert crop.box == again[name].box
        assert crop.flipped == again[name].flipped
        np.testing.assert_array_equal(crop.pixels, again[name].pixels)
        np.testing.assert_array_equal(crop.augmentation, again[name].augmentation)
    assert first["a"].box != first["b"].box
    assert not np.array_equal(first["a"].augmentation, first["b"].augmentation)
    for other in (
        {"seed": 4, "epoch": 1, "sample": 7},
        {"seed": 3, "epoch": 2, "sample": 7},
        {"seed": 3, "epoch": 1, "sample": 8},
    ):
        changed = pipeline(image, **other, sizes=sizes)
        assert all(changed[name].box != first[name].box for name in pipeline.names)


def test_no_two_samples_share_their_draws():
    pipeline = TwoAugs()
    boxes = [pipeline.boxes(997, 1009, seed=s, epoch=e, sample=i) for s in (0, 1) for e in (0, 1, 2)
             for i in range(300)]
    assert len({box for views in boxes for box in views.values()}) == 2 * len(boxes)


def test_draws_stay_the_same_between_releases():
    # A resumed run must see the crops that it would have seen: change these only with a note to users.
    boxes = TwoCropsInContext().boxes(128, 128, seed=0, epoch=0, sample=0)
    assert boxes == {"a": (10, 15, 101, 108), "b": (2, 18, 117, 93), "context": (2, 14, 125, 112)}


def test_a_view_is_the_same_in_every_pipeline():
    shape = {"height": 300, "width": 200, "seed": 0, "epoch": 0, "sample": 5}
    three = TwoCropsInContext().boxes(**shape)
    assert TwoAugs().boxes(**shape) == {"a": three["a"], "b": three["b"]}
    assert OneCrop().boxes(**shape) == {"a": three["a"]}


def test_flips_come_as_often_as_asked():
    pipeline, image, sizes = OneCrop(flip=0.3), noise(8, 8), {"a": (4, 4)}
    crops = [pipeline(image, seed=0, epoch=0, sample=i, sizes=sizes)["a"] for i in range(2000)]
    assert np.mean([crop.flipped for crop in crops]) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 2000))


def test_augmentations_are_drawn_per_view_and_the_context_has_none():
    image, sizes = noise(30, 40), {"a": (8, 8), "b": (8, 8), "context": (8, 8)}
    crops = TwoCropsInContext(augmentation="slip", flip=1.0)(image, seed=1, epoch=2, sample=3, sizes=sizes)
    for name in ("a", "b"):
        expected = draw(AUGMENTATIONS["slip"], rng.generator(1, "augment", 2, 3, name))
        np.testing.assert_array_equal(crops[name].augmentation, expected)
        assert crops[name].flipped
    assert crops["context"].augmentation is None
    assert not crops["context"].flipped
    plain = OneCrop()(image, seed=1, epoch=2, sample=3, sizes={"a": (8, 8)})
    assert plain["a"].augmentation is None


# ------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("pipeline", [build() for build in VIEWS.values()] + [TwoCropsInContext(flip=1.0)])
def test_pixels_show_the_box(pipeline):
    """Every pixel's own coordinates, read from its colours, are those that the box promises."""
    height, width = 150, 240
    sizes = {name: (48 + 4 * i, 72 - 4 * i) for i, name in enumerate(pipeline.names)}
    for sample in range(20):
        crops = pipeline(coordinates(height, width), seed=0, epoch=0, sample=sample, sizes=sizes)
        boxes = pipeline.boxes(height, width, seed=0, epoch=0, sample=sample)
        assert list(crops) == list(pipeline.names)
        for name, crop in crops.items():
            h, w = sizes[name]
            assert crop.box == boxes[name]
            assert crop.pixels.dtype == np.uint8
            assert crop.pixels.shape == (3, h, w)
            top, left, box_height, box_width = crop.box
            rows = top + (np.arange(h) + 0.5) / h * box_height - 0.5
            columns = left + (np.arange(w) + 0.5) / w * box_width - 0.5
            if crop.flipped:
                columns = columns[::-1]
            # up to rounding, and away from the image's border, where the filter is cut off
            np.testing.assert_allclose(crop.pixels[0, 2:-2], np.repeat(rows[2:-2, None], w, 1), atol=0.6)
            np.testing.assert_allclose(crop.pixels[1][:, 2:-2], np.tile(columns[2:-2], (h, 1)), atol=0.6)


def test_a_flip_mirrors_the_pixels_and_nothing_else():
    image, asked = noise(60, 50), {"seed": 0, "epoch": 0, "sample": 1, "sizes": {"a": (16, 24)}}
    plain = OneCrop(augmentation="a-clip")(image, **asked)["a"]
    mirrored = OneCrop(augmentation="a-clip", flip=1.0)(image, **asked)["a"]
    assert (plain.flipped, mirrored.flipped) == (False, True)
    assert plain.box == mirrored.box
    np.testing.assert_array_equal(plain.augmentation, mirrored.augmentation)
    np.testing.assert_array_equal(mirrored.pixels, plain.pixels[:, :, ::-1])


def test_the_whole_image_at_its_own_size_is_unchanged():
    image, whole = noise(64, 64), OneCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    crop = whole(image, seed=0, epoch=0, sample=0, sizes={"a": (64, 64)})
    np.testing.assert_array_equal(crop["a"].pixels, image.transpose(2, 0, 1))


@pytest.mark.parametrize("box", [(10, 20, 180, 250), (0, 0, 200, 300), (30, 40, 20, 25)])
def test_pixels_are_those_of_torchvision_on_pillow(box):
    image = noise(200, 300)
    theirs = functional.resized_crop(Image.fromarray(image), *box, [64, 80], functional.InterpolationMode.BICUBIC)
    ours = cut(image, box, (64, 80), flipped=False).transpose(1, 2, 0).astype(int)
    difference = np.abs(ours - np.asarray(theirs).astype(int))
    assert difference.max() <= 3  # both round between their two passes, with weights of other precision
    assert difference.mean() < 0.3


@pytest.mark.parametrize(
    "pipeline", [build() for build in VIEWS.values()] + [OneCrop(scale=(0.2, 0.9), ratio=(0.5, 3))]
)
@pytest.mark.parametrize("shape", [(1.0, 1.0), (1.0, 1.5), (2.0, 1.0)])
def test_from_the_least_side_on_no_view_is_enlarged(pipeline, shape):
    sizes = dict.fromkeys(pipeline.names, (64, 48))
    least = pipeline.least_side(sizes)
    height, width = (round(least * side) for side in shape)
    boxes = [box for n in range(500) for box in pipeline.boxes(height, width, seed=0, epoch=0, sample=n).values()]
    # boxes are rounded to whole pixels
    assert min(box[2] for box in boxes) >= 63
    assert min(box[3] for box in boxes) >= 47
    # and it is no larger than it must be: some boxes are nearly as small
    if shape == (1.0, 1.0):
        assert min(min(box[2] / 64, box[3] / 48) for box in boxes) < 1.2


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_the_smallest_and_longest_images_are_cut(height, width):
    sizes = {"a": (32, 32), "b": (32, 32), "context": (16, 24)}
    crops = TwoCropsInContext()(noise(height, width), seed=0, epoch=0, sample=0, sizes=sizes)
    assert [crop.pixels.shape for crop in crops.values()] == [(3, 32, 32), (3, 32, 32), (3, 16, 24)]


def test_views_without_a_size_are_not_cut_and_do_not_change_the_others():
    pipeline, image = TwoCropsInContext(), noise(70, 50)
    sizes = {"a": (8, 8), "b": (8, 8), "context": (8, 8)}
    every = pipeline(image, seed=0, epoch=0, sample=0, sizes=sizes)
    some = pipeline(image, seed=0, epoch=0, sample=0, sizes={"a": (8, 8), "context": (8, 8)})
    assert list(some) == ["a", "context"]
    assert all(some[name].box == every[name].box for name in some)
    np.testing.assert_array_equal(some["context"].pixels, every["context"].pixels)


def test_pipelines_travel_to_spawned_workers():
    pipeline = TwoCropsInContext(scale=(0.2, 0.9), context="released")
    copy = pickle.loads(pickle.dumps(pipeline))
    assert copy == pipeline
    where = {"height": 40, "width": 30, "seed": 0, "epoch": 0, "sample": 9}
    assert copy.boxes(**where) == pipeline.boxes(**where)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("one_crop", {"scale": (0.9, 0.5)}, "0 < low <= high <= 1"),
        ("one_crop", {"scale": (0.0, 1.0)}, "0 < low <= high <= 1"),
        ("one_crop", {"scale": (0.5, 1.5)}, "0 < low <= high <= 1"),
        ("two_augs", {"ratio": (-1.0, 1.0)}, "'ratio'"),
        ("two_augs", {"ratio": (0.5, float("inf"))}, "'ratio'"),
        ("two_augs", {"scale": (float("nan"), 1.0)}, "'scale'"),
        ("two_augs", {"flip": 1.5}, "between 0 and 1"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_a_sentence(name, options, sentence):
    with pytest.raises(ConfigError) as caught:
        VIEWS[name](**options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_size_for_a_view_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="unknown view 'context'"):
        OneCrop()(noise(8, 8), seed=0, epoch=0, sample=0, sizes={"context": (4, 4)})
