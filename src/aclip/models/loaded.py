"""Trained models in use: images and texts in, features and attention out."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Compose
from torchvision.transforms.functional import to_pil_image

from aclip.data import CaptionTokenizer, decode_image
from aclip.data.decode import as_rgb
from aclip.data.evaluation_set import limit_aspect
from aclip.data.workers import read_ahead
from aclip.devices import choose_device
from aclip.errors import BadSampleError, CheckpointError, ConfigError, DataError
from aclip.masking import AttentiveMasking, Keep, MaskingContext
from aclip.models import loading
from aclip.models.loading import ImageTower, Source, Tokenizer, WeightsOf, fetch, preprocess_config, resolve_source
from aclip.models.text import can_cut, cut_after_eot, encode_text
from aclip.models.vision import encode_image, grid_of, pair, visual_of, vit_of

logger = logging.getLogger(__name__)

ImageLike = str | Path | Image.Image | np.ndarray
"""A path; a Pillow image of any mode; or a uint8 array, (h, w, 3) RGB, (h, w, 4) with alpha or (h, w) grey."""


class LoadedModel(nn.Module):
    """A model as `aclip.load` returns it; it sees whole images.

    Attributes:
        model: the open_clip model itself (or `ImageTower`, of a run without text).
        preprocess: PIL image of any mode -> (3, h, w) float32: transparency on white, resized, cropped, normalised.
        tokenizer: texts -> (B, T) int64 token ids.
        name: what it was loaded from, for messages.
        step, samples_seen: how far the loaded weights were trained; None if unknown.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, *, name: str = "this model", step: int | None = None,
        samples_seen: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.name, self.step, self.samples_seen = name, step, samples_seen
        self.preprocess: Callable[[Any], Tensor] = Compose([
            as_rgb, image_transform_v2(PreprocessCfg(**preprocess_config(model)), is_train=False)])

    @property
    def has_text(self) -> bool:
        """Whether it can encode texts; runs of recipes without text save their image tower alone."""
        return not isinstance(self.model, ImageTower)

    @property
    def device(self) -> torch.device:
        """The device of its weights, on which it computes."""
        return next(self.model.parameters()).device

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what `preprocess` returns, in pixels."""
        return pair(preprocess_config(self.model)["size"])

    def display_transform(self, side: int) -> Callable[[Image.Image], Image.Image]:
        """Return `preprocess` for people: the same part of an RGB image, its shorter side at least `side` pixels."""
        config = preprocess_config(self.model)
        scale = max(1, -(-side // min(self.image_size)))
        config |= {"size": tuple(scale * pixels for pixels in self.image_size), "mean": (0.0,) * 3, "std": (1.0,) * 3}
        transform = image_transform_v2(PreprocessCfg(**config), is_train=False)
        return lambda image: to_pil_image(transform(image))

    def encode_image(self, images: Float[Tensor, "B 3 h w"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Return features, L2-normalised by default, of normalised pixels (see `preprocess`) of whole patches."""
        features = encode_image(visual_of(self.model), images).features
        return F.normalize(features, dim=-1) if normalize else features

    def encode_trunk(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B C"]:
        """Return the pooled token before its projection, not normalised: what CLIP's linear probes read."""
        return encode_image(visual_of(self.model), images).cls

    def encode_text(self, tokens: Int[Tensor, "B T"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Return features, L2-normalised by default, of (B, T) int64 token ids (see `tokenizer`).

        Raises:
            UnsupportedModelError: the model has no text tower.
        """
        features = encode_text(self.model, tokens)
        return F.normalize(features, dim=-1) if normalize else features

    @torch.no_grad()
    def encode_images(
        self, images: Iterable[ImageLike], *, batch_size: int = 64, normalize: bool = True, workers: int = 0,
        bad: Literal["raise", "nan"] = "raise",
    ) -> Float[Tensor, "N D"]:
        """Return the features of any number of images, on the CPU, in their order.

        Args:
            images: paths, Pillow images or uint8 arrays, in any mixture.
            batch_size: images per forward pass; features do not depend on it beyond rounding.
            normalize: whether rows have L2 norm 1.
            workers: processes that read and resize; 0 does it in this one.
            bad: "raise" stops at the first image that cannot be used; "nan" gives it a row of NaN, so that row i is
                always image i.

        Raises:
            DataError: an image that cannot be used, with its path (or number) and the reason.
            CheckpointError: features that are NaN or inf.

        Example:
            >>> model = aclip.load("runs/first")
            >>> features = model.encode_images(["cat.png", "dog.png"])
            >>> features.shape, features.dtype
            (torch.Size([2, 128]), torch.float32)
            >>> similarity = features @ model.encode_texts(["a cat", "a dog"]).T
        """
        if bad not in ("raise", "nan"):
            raise ConfigError(f"bad is 'raise' or 'nan', not {bad!r}")
        example = torch.zeros(1, 3, *self.image_size)
        unusable = torch.full_like(example[0], torch.nan) if bad == "nan" else None
        read = partial(_preprocessed, self.preprocess, unusable)
        batches = read_ahead(read, _batches(enumerate(images), batch_size), workers=workers)
        return self._gather(lambda pixels: self.encode_image(pixels, normalize), batches, example)

    @torch.no_grad()
    def encode_texts(
        self, texts: Sequence[str], *, batch_size: int = 256, normalize: bool = True
    ) -> Float[Tensor, "N D"]:
        """Return the features of any number of texts, on the CPU, in their order.

        Args:
            texts: of any length; what exceeds the context is cut.
            batch_size, normalize: as in `encode_images`.

        Raises:
            UnsupportedModelError: the model has no text tower.
            CheckpointError: features that are NaN or inf.

        Example:
            >>> model = aclip.load("runs/first")
            >>> model.encode_texts(["a cat", "two dogs"]).shape
            torch.Size([2, 128])
        """
        if isinstance(texts, str):
            raise ConfigError("encode_texts takes a list of texts, not one text")
        tokenizer = self.tokenizer if isinstance(self.tokenizer, CaptionTokenizer) else CaptionTokenizer(self.tokenizer)
        cuts = self.has_text and can_cut(self.model)
        tokens = (cut_after_eot(ids) if cuts else ids for ids in map(tokenizer, _batches(texts, batch_size)))
        return self._gather(lambda ids: self.encode_text(ids, normalize), tokens, tokenizer([""]))

    @torch.no_grad()
    def attention_scores(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B N"]:
        """Return the attention of the class token to each patch in [0, 1], row by row; see `models.encode_image`.

        Raises:
            UnsupportedModelError: a tower without attention scores.
        """
        scores = encode_image(visual_of(self.model), images, return_scores=True).scores
        assert scores is not None
        return scores

    @torch.no_grad()
    def keep_mask(
        self, images: Float[Tensor, "B 3 h w"], mask_ratio: float = 0.5, keep: Keep = "highest", block_size: int = 2,
    ) -> Bool[Tensor, "B N"]:
        """Return which patches, row by row, attentive masking would keep by this model's own attention.

        Args:
            images: (B, 3, h, w) normalised pixels, see `preprocess`.
            mask_ratio: fraction of the patches that is removed, in [0, 1).
            keep: which scores survive, see `aclip.masking.AttentiveMasking`; "mixed" and "sampled" draw from torch's
                default generator.
            block_size: side in patches of the blocks that are kept or removed; 1 if they do not tile the grid.

        Raises:
            ConfigError: a ratio, block size or `keep` out of range.

        Example:
            >>> from PIL import Image
            >>> model = aclip.load("runs/first")
            >>> pixels = model.preprocess(Image.open("cat.png"))[None]
            >>> kept = model.keep_mask(pixels, mask_ratio=0.75)
            >>> kept.shape, int(kept.sum())
            (torch.Size([1, 64]), 16)
        """
        masking = AttentiveMasking(mask_ratio, block_size=block_size, keep=keep)
        grid = grid_of((images.shape[-2], images.shape[-1]), vit_of(visual_of(self.model)).patch_size)
        scores = self.attention_scores(images)
        kept = masking(MaskingContext(len(images), grid, images.device, scores=scores))
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)

    def _gather(
        self, encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor], example: Tensor
    ) -> Float[Tensor, "N D"]:
        """Collect the features of all batches on the CPU; without any batch, no rows of the width of `example`'s."""
        found = []
        for batch in batches:
            features = encode(batch.to(self.device)).float().cpu()
            usable = batch.flatten(1).isfinite().all(dim=1)  # rows of images that could not be used are NaN
            if not features[usable].isfinite().all():
                raise CheckpointError(f"the features of {self.name} are NaN or inf: its weights are damaged or its "
                                      "training diverged; use an earlier checkpoint, RUN/checkpoints/step-...")
            found.append(features)
        return torch.cat(found) if found else encode(example.to(self.device)).float().cpu()[:0]


def load(
    name: str | Path, *, weights: WeightsOf = "online", device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load a model for use, in fp32 and evaluation mode.

    Args:
        name: a run folder (its `final/`, or its newest undamaged checkpoint before it is finished), a folder with
            `open_clip_config.json`, an open_clip name, NAME:FILE, and more: see `aclip.models.resolve_source`.
        weights: "ema" takes the newest undamaged checkpoint of a run, with the EMA of its image tower.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ConfigError: an unknown name or device, or "ema" of something that is not a run.
        CheckpointError: weights that are missing, damaged, of another model, or cannot be fetched.
        UnsupportedModelError: a model whose towers cannot be trained here.

    Example:
        >>> model = aclip.load("runs/first")
        >>> features = model.encode_images(["cat.png"])
    """
    if weights not in ("online", "ema"):
        raise ConfigError(f"weights are 'online' or 'ema', not {weights!r}")
    where = choose_device(str(device))
    source = loading.resolve_source(name, weights)
    if source.read is None:
        logger.warning("'%s' is an architecture without weights: its features mean nothing yet", name)
    model, origin = loading.build(source, with_text=None)
    return LoadedModel(
        model, tokenizer_of(source), name=f"'{name}'", step=origin.step if origin else None,
        samples_seen=origin.samples_seen if origin else None).eval().to(where)


def tokenizer_of(model: str | Path | Source | Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a model: texts -> (B, context_length) int64; picklable.

    It is the byte-pair tokenizer that open_clip bundles, unless the config names one of Hugging Face (fetched, then
    cached; a folder may bring its own). Captions over the context length are cut and keep their EOT.

    Args:
        model: a name as in `resolve_source`, or a config as `model_config` returns it.

    Raises:
        CheckpointError: a tokenizer that cannot be fetched, or needs code of its own, which is never run.
    """
    folder = None
    if not isinstance(model, Mapping):
        source = model if isinstance(model, Source) else resolve_source(model)
        model, folder = source.config, source.folder
    text = model["text_cfg"]
    options = {"context_length": text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})}
    options.pop("trust_remote_code", None)  # not for a config from elsewhere to decide
    where = text.get("hf_tokenizer_name")
    if not where:
        return CachingTokenizer(**options)
    if folder is not None and any(folder.glob("tokenizer*")):
        where = str(folder)
    return cast(Tokenizer, fetch(
        f"the tokenizer '{where}' of this model", HFTokenizer, where, tokenizer_mode=text.get("tokenizer_mode"),
        trust_remote_code=False, **options))


class CachingTokenizer(SimpleTokenizer):  # type: ignore[misc]  # open_clip has no annotations
    """`SimpleTokenizer` with a cache of words, which it never merges across a space.

    Captions repeat their words, so most of the work becomes a look-up. Printable ASCII without `&` needs no ftfy and
    no unescaping.
    """

    cache: dict[str, str]

    def __init__(self, *, clean: str = "lower", **options: Any) -> None:
        super().__init__(clean=clean, **options)
        self._lower = clean == "lower"
        self._special = dict(self.cache)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end tokens."""
        plain = self._lower and text.isascii() and text.isprintable() and "&" not in text
        text = text.lower() if plain else self.clean_fn(text)
        return [token for word in text.split() for token in self._encode_word(word)]

    @functools.lru_cache(maxsize=10_000)  # noqa: B019  # some 3 MB, shared by the few tokenizers of a process
    def _encode_word(self, word: str) -> tuple[int, ...]:
        self.cache = dict(self._special)  # open_clip's own has no limit
        pieces = ("".join(self.byte_encoder[byte] for byte in piece.encode()) for piece in self.pat.findall(word))
        return tuple(self.encoder[part] for piece in pieces for part in self.bpe(piece).split(" "))


def _preprocessed(
    preprocess: Callable[[Any], Tensor], unusable: Tensor | None, images: list[tuple[int, ImageLike]]
) -> Float[Tensor, "B 3 h w"]:
    """Return the pixels of (number, image) pairs, `unusable` in place of an image that cannot be used."""
    pixels = []
    for number, image in images:
        try:
            pixels.append(preprocess(limit_aspect(open_image(image))))
        except BadSampleError as error:
            if unusable is None:
                name = image if isinstance(image, str | Path) else f"image {number}"
                raise DataError(f"{name} cannot be used: {error.reason} (bad='nan' gives it a row of NaN instead)"
                                ) from error
            pixels.append(unusable)
    return torch.stack(pixels)


def open_image(image: ImageLike) -> Image.Image:
    """Return an image upright, in RGB, transparency on white, as in training; BadSampleError if it cannot be used."""
    if isinstance(image, str | Path):
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise BadSampleError(error.strerror or str(error)) from error
        return decode_image(data)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            raise BadSampleError(f"an array of {image.dtype} and shape {image.shape}: images are uint8, (h, w, 3) RGB, "
                                 "(h, w, 4) with alpha or (h, w) grey")
        image = Image.fromarray(image)
    return as_rgb(image)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    if size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {size}")
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
