"""Decoding: every ordinary format becomes the RGB picture that it stands for; the rest says why not."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aclip.data.decode import (
    FORMATS,
    MAX_PIXELS,
    _decode_plain_jpeg,
    decode_image,
    decode_pixels,
    grey_peak,
    stretch_grey,
)
from aclip.errors import BadSampleError
from made_pictures import encode, giant_png, picture


def as_array(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("image_format", [name for name in FORMATS if name != "JPEG"])
def test_lossless_formats_come_back_exactly(image_format: str) -> None:
    if image_format not in Image.registered_extensions().values():
        pytest.skip(f"Pillow was built without {image_format}")
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    gradient = Image.linear_gradient("L").convert("RGB")
    data = encode(gradient, image_format, **options.get(image_format, {}))
    error = np.abs(as_array(data) - np.asarray(gradient).astype(int)).max()
    assert error <= (1 if image_format == "AVIF" else 0)


def test_16_bit_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.round(ramp / 257)[:, :, None].repeat(3, axis=2)
    for image_format in ("PNG", "TIFF"):
        assert np.array_equal(as_array(encode(Image.fromarray(ramp), image_format)), expected)


def test_32_bit_tiff_holding_16_bit_values() -> None:
    ramp = np.linspace(0, 65535, 16).astype(np.int32).reshape(4, 4)
    assert np.array_equal(as_array(encode(Image.fromarray(ramp), "TIFF"))[:, :, 0], np.round(ramp / 257))


@pytest.mark.parametrize("values", [[[0.0, 1.5]], [[float("nan"), 0.5]], [[-1.0, 0.0]]])
def test_floats_without_a_known_white_are_bad(values: list[list[float]]) -> None:
    data = encode(Image.fromarray(np.array(values, dtype=np.float32)), "TIFF")
    with pytest.raises(BadSampleError, match=r"pixel values outside 0\.\.1"):
        decode_image(data)


def test_float_tiff() -> None:
    data = encode(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "TIFF")
    assert as_array(data)[0, :, 0].tolist() == [0, 128, 255]


def test_alpha_is_composited_on_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 255, 128)])
    assert as_array(encode(rgba))[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 255]]


def test_grey_with_alpha_is_composited_on_white() -> None:
    grey = Image.new("LA", (2, 1))
    grey.putdata([(0, 0), (10, 255)])
    assert as_array(encode(grey))[0].tolist() == [[255] * 3, [10] * 3]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff\x80"])
def test_palette_with_alpha_is_composited_on_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30, 0, 0, 0])
    image.putdata([0, 1])
    data = encode(image, transparency=transparency)
    assert as_array(data)[0].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_transparent_colour_of_an_rgb_png() -> None:
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    assert as_array(encode(image, transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255], [4, 5, 6]]


def test_cmyk_jpeg() -> None:
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(as_array(data) - [255, 0, 0]).max() <= 3


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for image_format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(as_array(data), np.broadcast_to([255, 0, 0], (8, 8, 3))), image_format


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    # Pixel (row, column) of the upright picture as a function of the stored one: EXIF 2.3, "Orientation".
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored[::-1].T,
        7: stored[::-1, ::-1].T,
        8: stored.T[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(stored), exif=exif)
    assert np.array_equal(as_array(data)[:, :, 0], upright)


def test_damaged_exif_leaves_the_picture() -> None:
    data = encode(picture(0), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01")
    assert decode_image(data).size == (24, 24)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am a text file", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (giant_png(), "image too large: more than 100 million pixels"),
        (encode(picture(1, 64), "JPEG")[:600], "truncated or damaged JPEG image"),
        (encode(picture(1, 64), "PNG")[:-400], "truncated or damaged PNG image"),
        (encode(picture(1, 64), "WEBP")[:300], "truncated or damaged WEBP image"),
        (encode(picture(1, 64), "GIF")[:-400], "truncated or damaged GIF image"),
        (encode(picture(1, 64), "BMP")[:-400], "truncated or damaged BMP image"),
        (encode(picture(1, 64), "TIFF")[:-400], "truncated or damaged TIFF image"),
        (b"BM, said the text file that begins like a bitmap", "truncated or damaged BMP image"),
        (b"\xff\xd8\xff", "truncated or damaged JPEG image"),
    ],
)  # fmt: skip
def test_bad_pictures_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        decode_image(data)
    assert caught.value.reason.startswith(reason)
    assert "\n" not in caught.value.reason


def test_the_size_limit_is_on_pixels_not_sides() -> None:
    assert decode_image(encode(Image.new("1", (MAX_PIXELS // 1000, 1)))).size == (MAX_PIXELS // 1000, 1)
    with pytest.raises(BadSampleError, match="10001x10000"):
        decode_image(giant_png(10001, 10000))


@pytest.mark.parametrize(("min_side", "side"), [(None, 512), (257, 512), (256, 256), (65, 128), (1, 64)])
def test_jpeg_is_decoded_smaller_but_never_below_the_smallest_side(min_side: int | None, side: int) -> None:
    data = encode(Image.linear_gradient("L").resize((512, 512)), "JPEG")
    assert decode_image(data, min_side=min_side).size == (side, side)


@settings(deadline=None)
@given(st.floats(0, 1), st.binary(min_size=1, max_size=40), st.sampled_from(FORMATS))
def test_damage_never_escapes(position: float, garbage: bytes, image_format: str) -> None:
    buffer = io.BytesIO()
    try:
        picture(3).save(buffer, image_format)
    except (KeyError, OSError):
        return  # a format that Pillow was built without
    data = bytearray(buffer.getvalue())
    start = int(position * len(data))
    data[start : start + len(garbage)] = garbage
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(BadSampleError):
            assert decode_image(bytes(data)).mode == "RGB"


@pytest.mark.parametrize("min_side", [None, 16, 60, 100, 366])
@pytest.mark.parametrize("shape", [(500, 375), (333, 501), (17, 9), (1001, 800)])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}, {"mode": "L"}])
def test_pixels_are_those_that_pillow_decodes(
    options: dict[str, object], shape: tuple[int, int], min_side: int | None
) -> None:
    image = Image.effect_noise(shape, 60).convert("RGB") if options != {"mode": "L"} else Image.effect_noise(shape, 60)
    data = encode(image, "JPEG", **{name: value for name, value in options.items() if name != "mode"})
    pixels = decode_pixels(data, min_side=min_side)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert np.array_equal(pixels, np.asarray(decode_image(data, min_side=min_side)))
    assert _decode_plain_jpeg(data, min_side) is not None


def test_pixels_of_what_is_out_of_the_ordinary_are_those_of_pillow() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    photo = Image.effect_noise((40, 30), 60).convert("RGB")
    whole = encode(photo, "JPEG")
    for data in (encode(photo, "JPEG", exif=turned), encode(photo.convert("CMYK"), "JPEG"), encode(photo, "PNG")):
        assert np.array_equal(decode_pixels(data), np.asarray(decode_image(data)))
    for data in (b"", whole[:-200], whole[:30], b"\xff\xd8", b"no picture"):
        with pytest.raises(BadSampleError) as ours:
            decode_pixels(data)
        with pytest.raises(BadSampleError) as pillow:
            decode_image(data)
        assert ours.value.reason == pillow.value.reason


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("extra", [
    chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b'{"nodes": []}' * 400_000)),
    chunk(b"iTXt", b"XML:com\0\1\0\0\0" + zlib.compress(b"x" * 5_000_000)),
    chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(5_000_000))),
    b"".join(chunk(b"zTXt", b"part%d\0\0" % n + zlib.compress(b"x" * 900_000)) for n in range(80)),
], ids=["text", "xmp", "profile", "many texts"])  # fmt: skip
@pytest.mark.parametrize("at", [33, -12], ids=["before the pixels", "behind the pixels"])
def test_large_metadata_of_a_sound_png_is_ignored(extra: bytes, at: int) -> None:
    sound = encode(picture(1))
    assert np.array_equal(decode_image(sound[:at] + extra + sound[at:]), picture(1))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_without_its_end_marker(mode: str, progressive: bool, missing: int) -> None:
    whole = encode(picture(1, 64).convert(mode), "JPEG", progressive=progressive)
    assert np.array_equal(decode_image(whole[:-missing]), decode_image(whole))
    assert np.array_equal(decode_pixels(whole[:-missing]), decode_pixels(whole))
    with pytest.raises(BadSampleError, match="truncated or damaged JPEG"):
        decode_image(whole[:-200])


def test_rare_but_sound_kinds() -> None:
    from PIL import ImageCms

    original = picture(1, 64).resize((16, 16)).resize((64, 64))
    lab = ImageCms.profileToProfile(original, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
                                    outputMode="LAB")
    kinds = {
        "MPO": encode(original, "MPO", save_all=True, append_images=[original.rotate(90)], quality=95),
        "APNG": encode(original, "PNG", save_all=True, append_images=[original.rotate(90)]),
        "PNG without its end": encode(original, "PNG")[:-12],
        "Lab TIFF": encode(lab, "TIFF"),
        "TIFF in YCbCr": encode(original.convert("YCbCr"), "TIFF"),
        "JPEG with a large profile": encode(original, "JPEG", icc_profile=bytes(300_000), quality=95),
    }
    for kind, data in kinds.items():
        difference = np.abs(np.asarray(decode_image(data)).astype(int) - np.asarray(original).astype(int)).mean()
        assert difference < 10, kind


def test_greys_of_twelve_bits_are_stretched_if_asked() -> None:
    values = np.linspace(100, 4000, 64 * 64).astype(np.uint16).reshape(64, 64)
    data = encode(Image.fromarray(values), "PNG")
    assert (grey_peak(data), grey_peak(encode(picture(1)))) == (4000, None)
    assert np.asarray(decode_image(data)).max() == 16  # what they are without
    own, fixed = (np.asarray(decode_image(stretch_grey(data, white)))[..., 0] for white in (None, 4095.0))
    assert (own.min(), own.max()) == (0, 255)
    assert np.array_equal(fixed, np.round(values * (255 / 4095)).astype(np.uint8))
    colours = encode(picture(1))
    assert stretch_grey(colours) is colours
