"""`aclip data encode`: a teacher's features of some crops and captions of every sample, for many runs to learn from."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aclip import data, models, plan
from aclip.data.batches import ReadBatch
from aclip.data.progress import progress
from aclip.data.stored import DESCRIPTION, describe
from aclip.data.workers import read_ahead
from aclip.devices import choose_device, fast_precision
from aclip.errors import ConfigError, UnsupportedModelError
from aclip.files import write_atomically
from aclip.method import Method
from aclip.recipes import configure
from aclip.search.store import weights_digest
from aclip.trainer import AUTOCAST

BATCH_SIZE = 64

SAVE_SECONDS = 20.0
"""What a kill may cost at most."""

_log = logging.getLogger(__name__)


def encode(
    teacher: str, source: str, *, output: str, crops: int = 4, recipe: str = "distill", model: str | None = None,
    seed: int = 0, precision: Literal["fp32", "bf16", "fp16"] | None = None, device: str = "auto",
    workers: int | None = None,
) -> data.StoredFeatures:
    """Store a teacher's features of some crops and captions of every sample, for `aclip train --teacher-features`.

    They are the crops and captions of the first epochs of a run with the same recipe, data and seed, which repeats
    these epochs. As float16 they take 2 x crops x samples x (views + 1) x width bytes. A call that was killed is
    continued by the next one.

    Args:
        teacher: any model with weights that training starts from.
        source: the training pairs.
        output: folder of the features.
        crops: epochs of which crops and captions are encoded.
        recipe: of the runs; its frozen passes are encoded.
        model: of the runs: crops are cut to the larger of its input size and the teacher's (default: the teacher's).
        seed: of the runs.
        precision: of the teacher's arithmetic (default: bf16 where the device multiplies in it, fp16 on older GPUs,
            else fp32).
        device: auto, cpu, cuda, cuda:1, mps.
        workers: processes that read images (default: what suits the cores and the device).

    Raises:
        ConfigError: a recipe of whose frozen passes more is read than features; a teacher without weights, or that
            reads other tokens; an output that holds something else.
        DataError: a source that cannot be read.
    """
    if crops < 1:
        raise ConfigError(f"--crops is at least 1, not {crops}")
    where, folder = choose_device(device), Path(output)
    teacher = os.path.abspath(teacher) if os.path.exists(teacher) else teacher
    if models.resolve_source(teacher).read is None:
        raise ConfigError(f"'{teacher}' is an architecture without weights, and cannot teach: name weights, such as a "
                          "run or NAME:TAG")
    spec = data.absolute(source)
    pairs = data.open_training(spec)
    config = configure(recipe=recipe, model=model or teacher, teacher=teacher, data=(spec,), seed=seed)
    resolved = plan.resolve_run(config)
    loaded = models.load(teacher).to(where)
    if isinstance(loaded.model, models.ImageTower) and resolved.uses_text:
        raise UnsupportedModelError(f"'{teacher}' is an image tower alone, and recipe '{recipe}' compares with "
                                    "captions: name another teacher")
    description = {
        "teacher": teacher, "digest": weights_digest(loaded), "source": spec, "crops": crops,
        "logit_scale": models.logit_scale_of(loaded.model).exp().item() if resolved.uses_text else None,
        "settings": json.loads(json.dumps({"seed": seed, "samples": len(pairs), "source": pairs.digest(),
                                           **resolved.frozen_inputs()}))}
    pixels = models.preprocess_config(loaded.model)
    method = Method(loaded.model, resolved.frozen_alone(), pixels["mean"], pixels["std"]).to(where).train()
    dataset = data.PairDataset(pairs, resolved.pipeline, data.CaptionTokenizer(models.tokenizer_of(config.model)),
                               sizes=resolved.view_sizes, seed=seed)
    read = ReadBatch(dataset, models.cut_after_eot if resolved.shape.text_cut else None)
    _Encoding(folder, description, method, precision or fast_precision(where), where).run(
        read, data.suitable_workers(where, workers))
    return data.StoredFeatures(folder)


class _Encoding:
    """Features that are being stored: an array for every pass, and how many rows of all are done."""

    def __init__(self, folder: Path, description: dict[str, Any], method: Method, precision: str, device: torch.device
                 ) -> None:
        self.folder, self.method, self.device = folder, method, device
        self.autocast = torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")
        earlier = describe(folder)
        if earlier is None and folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds something else than features: name a new folder with --output")
        if earlier is not None and {key: earlier[key] for key in description} != description:
            raise ConfigError(f"{folder} holds features of another teacher, source, recipe, seed or number of crops: "
                              "name a new folder with --output")
        self.description = earlier or {**description, "widths": {}, "done": 0}
        self.arrays = {name: np.lib.format.open_memmap(folder / f"{name}.npy", "r+")
                       for name in self.description["widths"]}

    def run(self, read: ReadBatch, workers: int) -> None:
        samples, crops = self.description["settings"]["samples"], self.description["crops"]
        numbers = range(crops * samples)
        requests = ([data.Request(*divmod(number, samples)) for number in numbers[first : first + BATCH_SIZE]]
                    for first in numbers[self.description["done"] :: BATCH_SIZE])
        saved = time.monotonic()
        try:
            with progress(f"encoding {self.folder}", len(numbers), "crops") as advance:
                advance(self.description["done"])
                for batch in read_ahead(read, requests, workers=workers):
                    with torch.inference_mode(), self.autocast:
                        encoded = self.method.encode_batch(batch.to(self.device))
                    found = {name: p.features.transpose(0, 1) for name, p in encoded.passes.items()}
                    found |= {name: text.features for name, text in encoded.texts.items() if text.features is not None}
                    self._write(found, samples, crops)
                    advance(batch.size)
                    if time.monotonic() > saved + SAVE_SECONDS:
                        self._save()
                        saved = time.monotonic()
        finally:
            self._save()

    def _write(self, found: dict[str, Tensor], samples: int, crops: int) -> None:
        start = self.description["done"]
        for name, features in found.items():
            if name not in self.arrays:
                self.folder.mkdir(parents=True, exist_ok=True)
                shape = (crops, samples, *features.shape[1:])
                self.arrays[name] = np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", np.float16, shape)
                self.description["widths"][name] = list(shape[2:])
            rows = self.arrays[name].reshape(crops * samples, *features.shape[1:])
            rows[start : start + len(features)] = features.half().cpu().numpy()
        self.description["done"] = start + len(next(iter(found.values())))

    def _save(self) -> None:
        """Write what is done, and then that it is."""
        for array in self.arrays.values():
            array.flush()
        write_atomically(self.folder / DESCRIPTION, json.dumps(self.description, indent=1) + "\n")
