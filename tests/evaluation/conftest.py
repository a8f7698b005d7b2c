"""A model and an image set whose features are written down, not computed."""

import io
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F


class TableModel(nn.Module):
    """Pixel [0, 0, 0] holds the row of the image table; texts look themselves up.

    The trunk gives the rows as they are, so that normalisation is visible.
    """

    def __init__(self, images, texts=()):
        super().__init__()
        self.images, self.texts = images, texts
        self.names = list(texts)
        self.drop = nn.Dropout(0.5)
        self.modes = []

    @property
    def model(self):
        return self

    def tokenizer(self, texts):
        return torch.tensor([[self.names.index(text)] for text in texts])

    def encode_image(self, pixels, normalize=True):
        self.modes.append((self.training, torch.is_grad_enabled()))
        features = self.images[pixels[:, 0, 0, 0].long()]
        return F.normalize(features, dim=-1) if normalize else features

    def encode_trunk(self, pixels):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.images[pixels[:, 0, 0, 0].long()]

    def encode_text(self, tokens, normalize=True):
        features = torch.stack([self.texts[self.names[i]] for i in tokens[:, 0].tolist()])
        return F.normalize(features, dim=-1) if normalize else features


@dataclass
class FakeBatch:
    pixels: torch.Tensor
    all_captions: list
    labels: list
    keys: list
    indices: list


class FakeSet:
    def __init__(self, captions, labels=None, batch_size=7, skipped=(), others=None):
        self.captions, self.labels = captions, labels or [None] * len(captions)
        self.others = others or [()] * len(captions)
        self.batch_size = batch_size
        self.skipped = list(skipped)
        self.source = self

    def __len__(self):
        return len(self.captions)

    def __iter__(self):
        for start in range(0, len(self.captions), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self.captions)))
            pixels = torch.zeros(len(rows), 3, 4, 4)
            pixels[:, 0, 0, 0] = torch.tensor(rows, dtype=torch.float32)
            yield FakeBatch(pixels, [(self.captions[i], *self.others[i]) for i in rows],
                            [self.labels[i] for i in rows], [f"key{i}" for i in rows], list(rows))

    def read(self, index):
        file = io.BytesIO()
        Image.new("RGB", (200, 100), (index, 0, 0)).save(file, "PNG")
        return SimpleNamespace(image=file.getvalue())


@pytest.fixture
def table_model():
    return TableModel


@pytest.fixture
def image_set():
    return FakeSet


@pytest.fixture
def cpu():
    return torch.device("cpu")
