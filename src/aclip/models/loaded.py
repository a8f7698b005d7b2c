"""Trained models in use: pictures and captions in, features and attention out."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.data import CaptionTokenizer
from aclip.data.workers import read_ahead
from aclip.errors import ConfigError
from aclip.masking import AttentiveMasking, Keep, MaskingContext
from aclip.models.averaged import load_average
from aclip.models.models import ImageTower, create_model, preprocess_config, visual_of
from aclip.models.pictures import BadPictures, Picture, PreparePictures
from aclip.models.shapes import pair
from aclip.models.sources import Tokenizer, resolve_source, tokenizer_of
from aclip.models.text import can_cut, cut_after_eot, encode_text
from aclip.models.vision import encode_image, grid_of, vit_of

logger = logging.getLogger(__name__)


class LoadedModel(nn.Module):
    """A model as `aclip.load` returns it. It always sees whole pictures: there is nothing here to mask with.

    Attributes:
        model: the open_clip model itself (or `ImageTower`, for a run without text).
        preprocess: PIL image -> (3, h, w) float32, resized, cropped and normalised as the model expects.
        tokenizer: texts -> (B, T) int64 token ids.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.preprocess: Callable[[Any], Tensor] = image_transform_v2(
            PreprocessCfg(**preprocess_config(model)), is_train=False)

    @property
    def has_text(self) -> bool:
        """Whether it can encode captions: a run of a recipe without text saves its image tower alone."""
        return not isinstance(self.model, ImageTower)

    def encode_image(self, images: Float[Tensor, "B 3 h w"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Return image features in the joint space.

        Args:
            images: (B, 3, h, w) normalised pixels, see `preprocess`; any size of whole patches.
            normalize: whether rows have L2 norm 1.
        """
        features = encode_image(visual_of(self.model), images).features
        return F.normalize(features, dim=-1) if normalize else features

    def encode_trunk(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B C"]:
        """Return the pooled image token after the final norm, before the projection into the joint space.

        What CLIP's (arXiv 2103.00020, appendix A.3) and SLIP's probes read; also of models without text.

        Args:
            images: as in `encode_image`.

        Returns:
            (B, C), not normalised.
        """
        return encode_image(visual_of(self.model), images).cls

    def encode_text(self, tokens: Int[Tensor, "B T"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Return text features in the joint space.

        Args:
            tokens: (B, T) int64, see `tokenizer`.
            normalize: whether rows have L2 norm 1.

        Raises:
            UnsupportedModelError: the model has no text tower.
        """
        features = encode_text(self.model, tokens)
        return F.normalize(features, dim=-1) if normalize else features

    @torch.no_grad()
    def encode_images(
        self, pictures: Iterable[Picture], *, batch_size: int = 64, normalize: bool = True, progress: bool = False,
        workers: int = 0, bad: BadPictures = "raise",
    ) -> Float[Tensor, "N D"]:
        """Return the features of any number of pictures, whatever they come as, on the CPU.

        Args:
            pictures: paths, Pillow images or arrays (see `aclip.models.pictures.Picture`), mixed as they come.
            batch_size: pictures that are encoded at once; the features do not depend on it beyond rounding.
            normalize: whether rows have L2 norm 1.
            progress: show a bar on standard error.
            workers: processes that read and resize; 0 does it in this one.
            bad: "raise" stops at the first picture that cannot be used; "nan" gives it a row of NaN, so that row i
                is still picture i.

        Returns:
            (N, D) float32 in the order of `pictures`.

        Raises:
            DataError: a picture that cannot be used, with its path (or its number) and the reason.
            ConfigError: a batch size below 1, or an unknown value for `bad`.

        Example:
            >>> import aclip
            >>> model = aclip.load("runs/first")
            >>> features = model.encode_images(["cat.png", "dog.png"])
            >>> features.shape, features.dtype
            (torch.Size([2, 128]), torch.float32)
            >>> similarity = features @ model.encode_texts(["a cat", "a dog"]).T
        """
        if bad not in ("raise", "nan"):
            raise ConfigError(f"bad is 'raise' or 'nan', not {bad!r}")
        height, width = self.image_size
        read = PreparePictures(self.preprocess, bad, (3, height, width))
        batches = read_ahead(read, _batches(enumerate(pictures), batch_size), workers=workers)
        return self._gather(lambda pixels: self.encode_image(pixels, normalize), batches,
                            torch.zeros(1, 3, height, width), pictures, "pictures", progress)

    @torch.no_grad()
    def encode_texts(
        self, texts: Sequence[str], *, batch_size: int = 256, normalize: bool = True, progress: bool = False
    ) -> Float[Tensor, "N D"]:
        """Return the features of any number of texts, on the CPU.

        Args:
            texts: of any length; what exceeds the context is cut.
            batch_size, normalize, progress: as in `encode_images`.

        Returns:
            (N, D) float32 in the order of `texts`.

        Raises:
            UnsupportedModelError: the model has no text tower.

        Example:
            >>> import aclip
            >>> model = aclip.load("runs/first")
            >>> model.encode_texts(["a cat", "two dogs"]).norm(dim=1)
            tensor([1.0000, 1.0000])
        """
        if isinstance(texts, str):
            raise ConfigError("encode_texts takes a list of texts, not one text")
        tokenizer = self.tokenizer if isinstance(self.tokenizer, CaptionTokenizer) else CaptionTokenizer(self.tokenizer)
        cut = cut_after_eot if self.has_text and can_cut(self.model) else _unchanged
        tokens = (cut(tokenizer(batch)) for batch in _batches(texts, batch_size))
        return self._gather(lambda ids: self.encode_text(ids, normalize), tokens,
                            tokenizer([""]), texts, "texts", progress)

    @torch.no_grad()
    def keep_mask(
        self, images: Float[Tensor, "B 3 h w"], mask_ratio: float = 0.5,
        keep: Keep = "highest", block_size: int = 2,
    ) -> Bool[Tensor, "B N"]:
        """Return which patches attentive masking would keep, by this model's own attention.

        Args:
            images: (B, 3, h, w) normalised pixels, see `preprocess`.
            mask_ratio: share of the patches that is removed, in [0, 1).
            keep: which scores survive, see `aclip.masking.AttentiveMasking`; "mixed" and "sampled" draw from torch's
                default generator.
            block_size: side of the blocks that are kept or removed, in patches; 1 where they do not tile the grid.

        Returns:
            (B, N) bool, patches row by row, True where kept; every row keeps the same number.

        Raises:
            ConfigError: a ratio, block size or `keep` that does not make sense.

        Example:
            >>> import aclip
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

    @property
    def device(self) -> torch.device:
        """Where its weights are, and what it computes on."""
        return next(self.model.parameters()).device

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what `preprocess` returns, in pixels."""
        return pair(preprocess_config(self.model)["size"])

    def _gather(
        self, encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor], example: Tensor, items: Iterable[Any],
        unit: str, progress: bool,
    ) -> Float[Tensor, "N D"]:
        """Encode batch after batch on the model's device, under a bar if asked for, and collect on the CPU.

        Args:
            example: one row, which tells the width where there are no batches.
            items, unit: what is encoded, and what it is called.
        """
        from rich.console import Console
        from rich.progress import Progress

        found = []
        with Progress(console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task(f"encoding {unit}", total=len(items) if isinstance(items, Sized) else None)
            for batch in batches:
                found.append(encode(batch.to(self.device, non_blocking=True)).float().cpu())
                bar.advance(task, len(batch))
        return torch.cat(found) if found else encode(example.to(self.device)).float().cpu()[:0]

    @torch.no_grad()
    def attention_scores(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B N"]:
        """Return how much the class token attends to each patch, averaged over layers and heads.

        Args:
            images: (B, 3, h, w) normalised pixels.

        Returns:
            (B, N) float32 in [0, 1], patches row by row; see `aclip.models.encode_image`.
        """
        scores = encode_image(visual_of(self.model), images, return_scores=True).scores
        assert scores is not None
        return scores


def load(
    source: str | Path, *, checkpoint: str | Path | None = None, weights: Literal["online", "ema"] = "online",
    device: str | torch.device = "cpu",
) -> LoadedModel:
    """Load a model for use, in fp32 and evaluation mode.

    Args:
        source: a run folder (its `final/`), a folder with `open_clip_config.json`, or an open_clip name,
            as in `aclip.models.sources.resolve_source`.
        checkpoint: a weight file to use in place of the source's own.
        weights: "ema" takes the image tower's moving average from the run's newest checkpoint.
        device: where it computes: "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ConfigError: an unknown name or device, or "ema" of what is no run.
        CheckpointError, UnsupportedModelError: as `create_model`.

    Example:
        >>> import aclip
        >>> model = aclip.load("runs/first")
        >>> features = model.encode_images(["cat.png"])
    """
    if weights not in ("online", "ema"):
        raise ConfigError(f"weights are 'online' or 'ema', not {weights!r}")
    run = Path(source)
    if weights == "ema" and (checkpoint is not None or not (run / "checkpoints").is_dir()):
        raise ConfigError(f"the moving average is in a run's folder with its checkpoints, which {source} is not"
                          if checkpoint is None else "a weight file holds no moving average: leave out checkpoint")
    if checkpoint is None and not resolve_source(source).has_weights:
        logger.warning("'%s' names an architecture without weights: its features mean nothing yet", source)
    model = create_model(source, checkpoint=checkpoint, with_text=None)
    if weights == "ema":
        load_average(visual_of(model), run / "checkpoints")
    loaded = LoadedModel(model.eval(), tokenizer_of(source)).eval()
    try:
        return loaded.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no device '{device}' here: {str(error).splitlines()[0]}") from error


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` items; the last may be shorter."""
    if size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {size}")
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _unchanged(tokens: Tensor) -> Tensor:
    return tokens
