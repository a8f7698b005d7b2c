"""Turn the bytes of any ordinary picture into 8-bit RGB, or say why that cannot be done.

The bytes come from the internet, so nothing is trusted: formats are whitelisted, the size is read from
the header before a pixel is decoded, and whatever a decoder raises becomes a `BadSampleError`.

Pillow decodes. An ordinary JPEG, which is most of them, goes to libjpeg-turbo directly where training wants
pixels only: the same values in 0.6 of the time, see `decode_pixels`.
"""

import io
import struct
import warnings

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from aclip.errors import BadSampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are tried, by Pillow's names; formats that can run programs (EPS, WMF) are not among them."""

IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif"}
)
"""File name endings, lower case and without the dot, that sources take for pictures."""

MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused: 100 Mpixel are 300 MB once decoded."""

_JPEG = b"\xff\xd8"
_ORIENTATIONS = (b"Exif\0\0", b"tiff:Orientation")  # wherever they stand, though most of what matches is in headers
_ORIENTATION_TAG = 0x0112  # EXIF 2.3, section 4.6.4
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, min_side: int | None = None) -> Image.Image:
    """Decode `data` to an upright RGB image: first frame, 8 bits, alpha composited on white.

    16-bit pictures are scaled to 8 bits (v / 257), not clipped; CMYK is converted; the EXIF orientation
    is applied.

    Args:
        data: a whole file.
        min_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as neither side gets
            shorter than this, in pixels; None decodes every pixel.

    Raises:
        BadSampleError: nothing there, not a known format, more than `MAX_PIXELS`, truncated or damaged.
    """
    if not data:
        raise BadSampleError("empty file")
    # Pillow warns about sizes, EXIF and palettes; what matters of it is an error here, the rest is noise.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadSampleError(
                f"image too large: {width}x{height} pixels, the limit is {MAX_PIXELS // 1_000_000} million"
            )
        try:
            if min_side is not None and image.format == "JPEG":
                image.draft(None, (min_side, min_side))
            image.load()
            return _to_rgb(_upright(image))
        except BadSampleError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise BadSampleError(f"truncated or damaged {image.format} image: {_one_line(error)}") from error


def decode_pixels(data: bytes, *, min_side: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Return the pixels of `decode_image(data, min_side=min_side)`, which raises the same errors.

    Returns:
        (h, w, 3) uint8 RGB, contiguous.
    """
    pixels = _decode_plain_jpeg(data, min_side) if data.startswith(_JPEG) else None
    return np.array(decode_image(data, min_side=min_side)) if pixels is None else pixels


def _decode_plain_jpeg(data: bytes, min_side: int | None) -> UInt8[np.ndarray, "h w 3"] | None:
    """Decode a JPEG without Pillow around it; None if anything about it is out of the ordinary.

    Out of the ordinary are metadata, which may turn the picture, colours of print, too many pixels, and whatever
    the decoder complains of: Pillow then decides.
    """
    if any(mark in data for mark in _ORIENTATIONS):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        # the scales that Pillow takes: others are slower to decode at
        scale = 1 if min_side is None else min(height // min_side, width // min_side)
        scale = next((one for one in (8, 4, 2) if one <= scale), 1)
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            data, min_height=-(-height // scale), min_width=-(-width // scale), min_factor=scale, strict=True)
    except ValueError:
        return None
    return pixels


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a picture that is decoded already as `decode_image` does: upright, RGB, alpha on white.

    Raises:
        BadSampleError: no pixels, or numbers without an agreed white.
    """
    if image.width < 1 or image.height < 1:
        raise BadSampleError(f"image without pixels: {image.width}x{image.height}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _to_rgb(_upright(image))


def _open(data: bytes) -> Image.Image:
    """Read the header with the first whitelisted decoder that knows the signature.

    `PIL.Image.open` would refuse large pictures without telling their size, and holds its limit in a
    global; the decoders that it calls do not.
    """
    Image.init()
    for name in FORMATS:
        if name not in Image.OPEN:  # WEBP and AVIF depend on how Pillow was built
            continue
        factory, accept = Image.OPEN[name]
        if accept is None or accept(data[:16]) is not True:
            continue
        try:
            image = factory(io.BytesIO(data), "")
        except Exception as error:
            raise BadSampleError(f"truncated or damaged {name} image: {_one_line(error)}") from error
        if image.width < 1 or image.height < 1:
            raise BadSampleError(f"image without pixels: {image.width}x{image.height}")
        return image
    raise BadSampleError(f"not an image in a known format ({', '.join(FORMATS)})")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, TypeError, ValueError, KeyError, struct.error):
        return image  # damaged metadata around a sound picture
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit integers by 1/257 and floats in [0, 1] by 255; other ranges have no agreed white."""
    values = np.asarray(image).astype(np.float32)
    white = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > white:
        raise BadSampleError(f"pixel values outside 0..{white:.0f}: no telling which of them is white")
    return Image.fromarray(np.round(values * (255.0 / white)).astype(np.uint8))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
