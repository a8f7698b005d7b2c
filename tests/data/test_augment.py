"""Augmentation against torchvision and PIL, one image at a time; the draws against their stated rates."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as tv

from aclip import rng
from aclip.data import augment
from aclip.data.augment import AUGMENTATIONS, COLUMNS, IDENTITY
from aclip.structs import ViewBatch

MEAN, STD = torch.zeros(3), torch.ones(3)


def images_of(count, height=40, width=56, seed=0):
    """Smooth coloured images with full-range values, like photographs; one of them grey, one extreme."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 7, generator=generator) * 1.6 - 0.3
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).round().to(torch.uint8)
    pixels[0] = pixels[0, :1]
    pixels[1] = (pixels[1] > 127) * 255
    return pixels


def parameters(count, **columns):
    """Identity rows with some columns replaced."""
    rows = torch.tensor(IDENTITY).repeat(count, 1)
    for name, values in columns.items():
        rows[:, COLUMNS.index(name)] = torch.as_tensor(values)
    return rows


def drawn(name, count, seed=0):
    rows = [augment.draw(AUGMENTATIONS[name], rng.generator(seed, i)) for i in range(count)]
    return torch.from_numpy(np.stack(rows))


def view(pixels, rows):
    count = len(pixels)
    return ViewBatch(pixels, torch.zeros(count, 4), torch.zeros(count, dtype=torch.bool), rows)


def applied(pixels, rows):
    """Return values in [0, 1], not normalised."""
    return augment.apply(view(pixels, rows), MEAN, STD)


def to_pil(pixels):
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# --------------------------------------------------------------------------- oracles, one op at a time

FACTORS = [0.6, 0.75, 0.999, 1.0, 1.2, 1.4, 1.7, 0.0]
SHIFTS = [-0.5, -0.1, -0.03, 0.0, 0.05, 0.1, 0.27, 0.5]


@pytest.mark.parametrize(
    ("column", "values", "oracle"),
    [
        ("brightness", FACTORS, tv.adjust_brightness),
        ("contrast", FACTORS, tv.adjust_contrast),
        ("saturation", FACTORS, tv.adjust_saturation),
        ("hue", SHIFTS, tv.adjust_hue),
        ("grey", [0, 1] * 4, lambda x, on: tv.rgb_to_grayscale(x, 3) if on else x),
        ("solarize_threshold", [0.5] * 4 + [2.0] * 4, lambda x, t: tv.solarize(x, t) if t <= 1 else x),
    ],
)
def test_operations_equal_torchvision_on_floats(column, values, oracle):
    pixels = images_of(8)
    ours = applied(pixels, parameters(8, **{column: values}))
    theirs = torch.stack([oracle(p / 255, v) for p, v in zip(pixels, values, strict=True)])
    # torchvision weighs red by 0.2989, PIL and we by 0.299
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("column", "values", "oracle", "levels"),
    [
        ("brightness", FACTORS, lambda x, f: ImageEnhance.Brightness(x).enhance(f), 1.01),
        ("contrast", FACTORS, lambda x, f: ImageEnhance.Contrast(x).enhance(f), 1.51),
        ("saturation", FACTORS, lambda x, f: ImageEnhance.Color(x).enhance(f), 1.51),
        ("grey", [1] * 8, lambda x, _: x.convert("L").convert("RGB"), 0.51),
        ("solarize_threshold", [0.5] * 8, lambda x, _: ImageOps.solarize(x, 128), 1e-3),
    ],
)
def test_operations_equal_pil_up_to_its_rounding(column, values, oracle, levels):
    pixels = images_of(8)
    ours = applied(pixels, parameters(8, **{column: values})) * 255
    theirs = torch.stack([from_pil(oracle(to_pil(p), v)) for p, v in zip(pixels, values, strict=True)])
    assert (ours - theirs).abs().max() <= levels


def test_blur_equals_torchvision_with_thirteen_taps():
    pixels, sigmas = images_of(8), [0.1, 0.3, 0.5, 0.8, 1.0, 1.4, 1.7, 2.0]
    ours = applied(pixels, parameters(8, blur_sigma=sigmas))
    for i, sigma in enumerate(sigmas):
        padded = torch.nn.functional.pad(pixels[i : i + 1] / 255, (6, 6, 6, 6), mode="replicate")
        theirs = tv.gaussian_blur(padded, [13, 13], [sigma, sigma])[0, :, 6:-6, 6:-6]
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=1e-5)


def test_blur_looks_like_pils():
    # PIL approximates a Gaussian of this standard deviation by box filters, and rounds
    pixels, sigmas = images_of(6), [0.5, 0.8, 1.0, 1.4, 1.7, 2.0]
    ours = applied(pixels, parameters(6, blur_sigma=sigmas)) * 255
    for i, sigma in enumerate(sigmas):
        theirs = from_pil(to_pil(pixels[i]).filter(ImageFilter.GaussianBlur(sigma)))
        difference = (ours[i] - theirs).abs()
        assert difference.mean() < 1


def test_blur_of_a_point_is_a_gaussian_and_keeps_its_sum():
    pixels = torch.zeros(2, 3, 31, 41, dtype=torch.uint8)
    pixels[:, :, 15, 20] = 255
    blurred = applied(pixels, parameters(2, blur_sigma=[1.0, 2.0]))
    assert blurred.sum(dim=(2, 3)) == pytest.approx(torch.ones(2, 3), abs=1e-5)
    y, x = torch.meshgrid(torch.arange(31.0) - 15, torch.arange(41.0) - 20, indexing="ij")
    for image, sigma in zip(blurred, (1.0, 2.0), strict=True):
        gaussian = torch.exp(-(x**2 + y**2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
        assert (image - gaussian).abs().max() < 0.01 * gaussian.max()


def test_blur_works_on_views_smaller_than_its_kernel():
    pixels = torch.full((1, 3, 2, 3), 77, dtype=torch.uint8)
    blurred = applied(pixels, parameters(1, blur_sigma=2.0))
    torch.testing.assert_close(blurred, torch.full((1, 3, 2, 3), 77 / 255))


def test_solarize_separates_127_from_128():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    # an untouched 128 that went through a change and back is still 128
    ours = (applied(pixels, parameters(1, solarize_threshold=0.5, hue=1e-9)) * 255).round()
    expected = torch.where(pixels < 128, pixels, 255 - pixels).float()
    torch.testing.assert_close(ours, expected)


def test_the_order_is_jitter_grey_blur_solarize():
    pixels = images_of(3)
    rows = parameters(3, brightness=1.3, contrast=0.7, saturation=1.2, hue=0.08, grey=[0, 1, 0],
                      blur_sigma=1.5, solarize_threshold=0.5)
    ours = applied(pixels, rows)
    for i in range(3):
        x = tv.adjust_brightness(pixels[i] / 255, 1.3)
        x = tv.adjust_contrast(x, 0.7)
        x = tv.adjust_saturation(x, 1.2)
        x = tv.adjust_hue(x, 0.08)
        x = tv.rgb_to_grayscale(x, 3) if i == 1 else x
        padded = torch.nn.functional.pad(x[None], (6, 6, 6, 6), mode="replicate")
        x = tv.gaussian_blur(padded, [13, 13], [1.5, 1.5])[0, :, 6:-6, 6:-6]
        near_the_threshold = (x - 0.5).abs() < 1e-3
        difference = (ours[i] - tv.solarize(x, 0.5)).abs()
        assert difference[~near_the_threshold].max() < 1e-3
        assert near_the_threshold.float().mean() < 0.05


# ------------------------------------------------------------------------------------- what holds


def test_normalisation_is_that_of_the_model():
    pixels = images_of(2)
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    expected = tv.normalize(pixels / 255, mean.tolist(), std.tolist())
    torch.testing.assert_close(augment.apply(view(pixels, None), mean, std), expected)
    torch.testing.assert_close(augment.apply(view(pixels, parameters(2)), mean, std), expected)


def test_identity_parameters_change_nothing():
    pixels = images_of(5)
    assert torch.equal(applied(pixels, parameters(5)), pixels / 255)
    assert torch.equal(applied(pixels, drawn("none", 5)), pixels / 255)


def test_identity_changes_nothing_where_operations_run_on_every_sample():
    # As on an accelerator, where it is not known on the host which samples an operation concerns.
    images = torch.cat([images_of(5), torch.full((1, 3, 40, 56), 255, dtype=torch.uint8)]) / 255
    for operation, columns in augment._OPERATIONS:
        unchanged = operation(images.clone(), parameters(6)[:, columns])
        torch.testing.assert_close(unchanged, images, rtol=0, atol=1e-5)


def test_all_samples_at_once_equals_only_those_concerned():
    pixels, rows = images_of(32), drawn("a-clip", 32)
    images = pixels / 255
    for operation, columns in augment._OPERATIONS[:3]:
        images = operation(images, rows[:, columns])
    rows[:, COLUMNS.index("solarize_threshold")] = 2.0  # its step would blow up differences in the last bit
    torch.testing.assert_close(applied(pixels, rows), images, rtol=0, atol=1e-5)


def test_an_accelerator_reads_nothing_back():
    # Tensors without data refuse whatever depends on values: shapes, branches, copies to the host.
    rows = drawn("a-clip", 4).to("meta")
    pixels = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    images = augment.apply(view(pixels, rows), MEAN.to("meta"), STD.to("meta"))
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_cpu_without_synchronising():
    pixels, rows = images_of(16), drawn("a-clip", 16)
    rows[:, COLUMNS.index("solarize_threshold")] = 2.0
    on_device = view(pixels, rows).to(torch.device("cuda"))
    mean, std = MEAN.cuda(), STD.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = augment.apply(on_device, mean, std)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(images.cpu(), applied(pixels, rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["a-clip", "slip"])
def test_each_sample_depends_on_itself_alone(name):
    # 96 images of 40 x 56 are several pieces of the CPU's work
    pixels, rows = images_of(96), drawn(name, 96)
    rows[:, COLUMNS.index("solarize_threshold")] = 2.0
    together = applied(pixels, rows)
    alone = torch.cat([applied(pixels[i : i + 1], rows[i : i + 1]) for i in range(96)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(applied(pixels[order], rows[order]), together[order], rtol=0, atol=1e-6)


def test_values_stay_in_range_and_inputs_untouched():
    pixels, rows = images_of(64), drawn("a-clip", 64)
    before, rows_before = pixels.clone(), rows.clone()
    images = applied(pixels, rows)
    assert torch.isfinite(images).all()
    assert images.min() >= -1e-6
    assert images.max() <= 1 + 1e-6
    assert torch.equal(pixels, before)
    assert torch.equal(rows, rows_before)
    assert not torch.allclose(images, pixels / 255, atol=0.1)


def test_autocast_does_not_lower_the_precision():
    pixels, rows = images_of(8), drawn("slip", 8)
    expected = applied(pixels, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = applied(pixels, rows)
    assert images.dtype == torch.float32
    assert torch.equal(images, expected)


# ------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize(
    ("name", "jitter", "grey", "blur", "solarize", "spread"),
    [
        ("none", 0, 0, 0, 0, (0, 0, 0, 0)),
        ("a-clip", 0.8, 0.2, 0.1, 0.2, (0.4, 0.4, 0.2, 0.1)),
        ("slip", 0.8, 0.2, 0.5, 0, (0.4, 0.4, 0.4, 0.1)),
    ],
)
def test_operations_come_as_often_and_as_strong_as_stated(name, jitter, grey, blur, solarize, spread):
    count = 4000
    rows = drawn(name, count).numpy()
    changed = rows != np.float32(IDENTITY)
    rates = dict(zip(COLUMNS, changed.mean(axis=0), strict=True))
    expected = {"brightness": jitter, "contrast": jitter, "saturation": jitter, "hue": jitter,
                "grey": grey, "blur_sigma": blur, "solarize_threshold": solarize}
    for column, rate in expected.items():
        # five standard deviations
        assert rates[column] == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / count))
    # all of the jitter or none of it; the others independent of it and of each other
    assert (changed[:, :4].all(axis=1) == changed[:, :4].any(axis=1)).all()
    if name == "a-clip":
        correlation = np.corrcoef(changed[:, 3:].T)
        assert np.abs(correlation - np.eye(4)).max() < 5 / math.sqrt(count)
    for i, width in enumerate(spread):
        values = rows[changed[:, i], i] - IDENTITY[i]
        if width:
            # uniform on [-width, width]: mean 0, standard deviation width / sqrt(3)
            assert np.abs(values).max() <= width + 1e-6
            assert values.mean() == pytest.approx(0, abs=5 * width / math.sqrt(3 * len(values)))
            assert values.std() == pytest.approx(width / math.sqrt(3), rel=0.05)
    if blur:
        sigmas = rows[rows[:, 5] > 0, 5]
        assert sigmas.min() >= 0.1 - 1e-6
        assert sigmas.max() <= 2.0 + 1e-6
        assert sigmas.mean() == pytest.approx(1.05, abs=5 * 1.9 / math.sqrt(12 * len(sigmas)))


def test_a_draw_is_a_row_of_float32_and_takes_as_many_numbers_whatever_it_decides():
    states = set()
    for name in AUGMENTATIONS:
        generator = rng.generator(0, "augment", 0, 0, "a")
        row = augment.draw(AUGMENTATIONS[name], generator)
        assert row.dtype == np.float32
        assert row.shape == (len(COLUMNS),)
        states.add(generator.random())
    assert len(states) == 1


def test_the_same_generator_draws_the_same_row():
    first, again, other = (
        augment.draw(AUGMENTATIONS["slip"], rng.generator(0, "augment", 0, i, "a")) for i in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_setting_blurs_more_than_the_kernel_holds():
    for setting in AUGMENTATIONS.values():
        assert 3 * setting.blur_sigma[1] <= augment._BLUR_RADIUS
        assert setting.hue <= 0.5
