"""A set of small images and a model of them, for processes that are started afresh."""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from aclip.data import RawSample, Source
from aclip.errors import BadSampleError

COLOURS = ("red", "green", "blue")


class Squares(Source):
    """Noisy squares of a colour with two captions each; -1 among the bad ones breaks the source at its end."""

    spec = "squares"

    def __init__(self, count: int, bad: frozenset[int] = frozenset()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        if index in self.bad:
            raise BadSampleError("torn")
        if -1 in self.bad and index == self.count - 1:
            raise OSError("the disk is gone")
        noise = np.random.default_rng(index).integers(0, 130, (4, 4, 3))
        noise[..., index % 3] += 90
        buffer = io.BytesIO()
        Image.fromarray(noise.astype(np.uint8)).save(buffer, format="PNG")
        colour = COLOURS[index % 3]
        captions = (f"{colour} {index % 5}", f"{colour} square {index}")
        return RawSample(str(index), buffer.getvalue(), captions, label=colour)


class PixelModel(nn.Module):
    """Features are projected pixels; a text's are those of its colour's channel, and a little of its letters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.projection = nn.Parameter(torch.randn(48, 8, generator=generator) / 7, requires_grad=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(20.0)), requires_grad=False)

    @property
    def model(self) -> nn.Module:
        return self

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def tokenizer(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[next(i for i, c in enumerate(COLOURS) if c in text), sum(map(ord, text))]
                             for text in texts])

    def encode_image(self, pixels: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        return F.normalize(self.encode_trunk(pixels) @ self.projection, dim=-1)

    def encode_trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - 0.4).flatten(1)

    def encode_text(self, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        channels = F.one_hot(tokens[:, 0], 3).float().repeat_interleave(16, dim=1) - 0.3
        letters = torch.sin(tokens[:, 1:] * torch.arange(1, 49))
        return F.normalize((channels + 0.3 * letters) @ self.projection, dim=-1)
