"""Turn the bytes of any ordinary image into 8-bit RGB, or say why that cannot be done.

The bytes come from the internet, so nothing is trusted: formats are whitelisted, the size is read from
the header before a pixel is decoded, and whatever a decoder raises becomes a `BadSampleError`.

Pillow decodes. An ordinary JPEG, which is most of them, goes to libjpeg-turbo directly where training wants
pixels only: the same values in 0.6 of the time, see `decode_pixels`.
"""

import functools
import importlib
import io
import warnings

import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8
from PIL import Image, ImageCms, ImageOps

from aclip.errors import BadSampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are tried, by Pillow's names; formats that can run programs (EPS, WMF) are not among them."""

IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "mpo"}
)
"""File name endings, lower case and without the dot, that sources take for images."""

HEIC_EXTENSIONS = frozenset({"heic", "heif", "hif"})  # endings of images that need the package pillow-heif
MAX_PIXELS = 100_000_000  # images with more pixels are refused: 100 Mpixel are 300 MB once decoded
_JPEG, _PNG, _END_OF_JPEG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"\xff\xd9"
_START_OF_SCAN, _APP1 = b"\xda", b"\xe1"
_METADATA = (b"zTXt", b"iTXt", b"tEXt", b"iCCP")  # chunks of a PNG that say nothing about its pixels


def decode_image(data: bytes, *, min_side: int | None = None) -> Image.Image:
    """Decode `data` to an upright RGB image: first frame, 8 bits, alpha composited on white.

    16-bit images are scaled to 8 bits (v / 257), not clipped; CMYK is converted; the EXIF orientation
    is applied.

    Args:
        data: a whole file.
        min_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as neither side gets shorter than this.

    Raises:
        BadSampleError: nothing there, not a known format, more than `MAX_PIXELS`, truncated or damaged.
    """
    if not data:
        raise BadSampleError("empty file")
    # Pillow warns about sizes, EXIF and palettes; what matters of it is an error here, the rest is noise.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _decode(data, min_side)
        except BadSampleError:
            mended = _without_metadata(data) if data.startswith(_PNG) else _with_end(data)
            if mended is None:
                raise
            return _decode(mended, min_side)


def _decode(data: bytes, min_side: int | None) -> Image.Image:
    image = _open(data)
    try:
        if min_side is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (min_side, min_side))
        image.load()
        return _to_rgb(_upright(image))
    except BadSampleError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadSampleError(f"truncated or damaged {image.format} image: {one_line(error)}") from error


def _without_metadata(data: bytes) -> bytes | None:
    """Return a PNG without texts and colour profile, which may be larger than Pillow unpacks; None if it has none."""
    kept, at = [data[: len(_PNG)]], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in _METADATA:
            kept.append(data[at:end])
        at = end
    whole = b"".join(kept)
    return None if len(whole) == len(data) else whole


def _with_end(data: bytes) -> bytes | None:
    """Return a JPEG with the end marker that it lacks, if all of its pixels are there; else None.

    libjpeg fills in what is missing and warns; `strict` makes that warning an error.
    """
    if not data.startswith(_JPEG) or data.rstrip(b"\0").endswith(_END_OF_JPEG):
        return None
    whole = data.rstrip(b"\xff") + _END_OF_JPEG
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(whole)
        if height * width > MAX_PIXELS:
            return None
        printed = colours in ("CMYK", "YCCK")
        simplejpeg.decode_jpeg(whole, colorspace="CMYK" if printed else "RGB", strict=True)
    except ValueError:
        return None
    return whole


def decode_pixels(data: bytes, *, min_side: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Return the pixels of `decode_image(data, min_side=min_side)`, contiguous; raises the same errors."""
    pixels = _decode_plain_jpeg(data, min_side) if data.startswith(_JPEG) else None
    return np.array(decode_image(data, min_side=min_side)) if pixels is None else pixels


def _decode_plain_jpeg(data: bytes, min_side: int | None) -> UInt8[np.ndarray, "h w 3"] | None:
    """Decode a JPEG without Pillow around it; None for metadata, which may turn it, colours of print, and errors."""
    if _has_metadata(data):
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


def _has_metadata(data: bytes) -> bool:
    """Return whether a JPEG has an APP1 segment (EXIF, XMP), or headers that are not laid out plainly."""
    at = len(_JPEG)
    while data[at : at + 1] == b"\xff":  # ITU-T T.81, B.1.1.4: a marker, and a length that counts itself
        marker = data[at + 1 : at + 2]
        if marker in (_START_OF_SCAN, _APP1):
            return marker == _APP1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image that is decoded already as `decode_image` does: upright, RGB, alpha on white."""
    if image.width < 1 or image.height < 1:
        raise BadSampleError(f"image without pixels: {image.width}x{image.height}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _to_rgb(_upright(image))


def grey_peak(data: bytes) -> int | None:
    """Return the brightest value of a 16-bit grey image, of 65,535; None for all other images and what is damaged."""
    pixels = _deep_grey(data)
    return None if pixels is None else int(pixels.max())


def stretch_grey(data: bytes, white: float | None = None) -> bytes:
    """Return a 16-bit grey image as an 8-bit PNG whose values are stretched; other images as they are.

    `white` is the value that becomes white, such as 4,095 of 12 bits; None stretches from the darkest to the brightest.
    """
    pixels = _deep_grey(data)
    if pixels is None:
        return data
    low, high = (float(pixels.min()), float(pixels.max())) if white is None else (0.0, white)
    scaled = np.clip((pixels - low) * (255.0 / max(high - low, 1.0)), 0.0, 255.0)
    file = io.BytesIO()
    Image.fromarray(np.round(scaled).astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _deep_grey(data: bytes) -> Float32[np.ndarray, "h w"] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data)
            if not image.mode.startswith("I"):
                return None
            return np.asarray(_upright(image)).astype(np.float32)
        except Exception:  # what cannot be read is reported when it is decoded
            return None


@functools.cache
def reads_heic() -> bool:
    """Return whether HEIC images can be read: whether pillow-heif is installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _open(data: bytes) -> Image.Image:
    is_heif = data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis")
    formats = [*FORMATS, "HEIF"] if is_heif and reads_heic() else list(FORMATS)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise BadSampleError(f"image too large: more than {MAX_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:
        for name in formats:
            accept = Image.OPEN.get(name, (None, None))[1]
            if accept is not None and accept(data[:16]) is True:
                raise BadSampleError(f"truncated or damaged {name} image: {one_line(error)}") from error
        heic = is_heif and data[8:11] in (b"hei", b"hev", b"mif", b"msf")
        advice = "; HEIC: pip install 'attentive-clip[heic]'" if heic else ""
        raise BadSampleError(f"not an image in a known format ({', '.join(FORMATS)}){advice}") from error
    width, height = image.size
    if width < 1 or height < 1:
        raise BadSampleError(f"image without pixels: {width}x{height}")
    if width * height > MAX_PIXELS:
        raise BadSampleError(
            f"image too large: {width}x{height} pixels, the limit is {MAX_PIXELS // 1_000_000} million")
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata around a sound image
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit integers and floats in [0, 1]; other ranges have no agreed white
        values = np.asarray(image).astype(np.float32)
        white = 1.0 if image.mode == "F" else 65535.0
        if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > white:
            raise BadSampleError(f"pixel values outside 0..{white:.0f}: which of them is white is not defined")
        image = Image.fromarray(np.round(values * (255.0 / white)).astype(np.uint8))
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        return image.convert("RGB") if converted is None else converted
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white_image = Image.new("RGB", image.size, "white")
        white_image.paste(image, mask=image)
        return white_image
    return image if image.mode == "RGB" else image.convert("RGB")


def one_line(error: BaseException | None) -> str:
    """Return what an error says, short enough for a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__
