"""Who takes part in `step.py`: open_clip's training step, and a step of every recipe, whole and part by part."""

import ctypes
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from open_clip.loss import ClipLoss
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from aclip import models, plan
from aclip.bench import synthetic_batch
from aclip.config import Recipe
from aclip.data import augment
from aclip.devices import peak_memory, synchronize
from aclip.method import Method
from aclip.models import text
from aclip.models.lora import adapt
from aclip.recipes import RECIPES
from aclip.structs import Batch, EncodedBatch, TowerShape
from aclip.training.distributed import wrap
from aclip.training.optim import build_optimizer, parameter_groups

WIDTHS = {f"ViT-B-16-of-width-{width}": width for width in (192, 384, 576)}
"""Models with ViT-B/16's tokens, depth, heads of 64 and ratio of text to image, and less width, which is 768 there."""

SIZES = {"half": "ViT-B-16-of-width-384", "ViT-B-16": "ViT-B-16", "ViT-B-32": "ViT-B-32", "vit-micro": "vit-micro"}
BATCHES = 4  # different ones, which all competitors read


def register_sizes() -> None:
    """Tell open_clip of the models that are no presets."""
    with tempfile.TemporaryDirectory() as folder:
        for name, width in WIDTHS.items():
            narrower = width * 2 // 3
            Path(folder, f"{name}.json").write_text(json.dumps({
                "embed_dim": narrower,
                "vision_cfg": {"image_size": 224, "layers": 12, "width": width, "head_width": 64, "patch_size": 16},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": narrower, "heads": narrower // 64,
                             "layers": 12},
            }))
        open_clip.add_model_config(folder)


@dataclass
class Stopwatch:
    """Seconds by name, of the clock on the wall or of the processor."""

    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add what happens inside to `name`."""
        self.wait()
        begun = self.clock()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - begun

    def wait(self) -> None:
        """Let the device finish."""
        synchronize(self.device)


@dataclass
class Settings:
    """What the competitors share."""

    model: str
    device: torch.device
    precision: str
    compiled: bool
    batch_size: int
    text_tokens: float
    image_size: int | None = None

    def shape(self) -> TowerShape:
        """Return the sizes of the model."""
        return models.shape_of(models.model_config(self.model, image_size=self.image_size))

    def autocast(self) -> torch.autocast:
        """Return the precision of the towers."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def batches(self, resolved: plan.Plan, cut_text: bool) -> list[Batch]:
        """Return batches of the same captions for everybody."""
        return [synthetic_batch(resolved, self.batch_size, text_tokens=self.text_tokens, cut_text=cut_text,
                                augmented=False, seed=seed).to(self.device) for seed in range(BATCHES)]


class OpenClip:
    """open_clip's training step, as `open_clip_train` takes it."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(0)
        self.settings = settings
        self.plan = plan.resolve(RECIPES["clip"], settings.shape())
        self.bare = open_clip.create_model(settings.model, device=settings.device, output_dict=True).train()
        self.model = torch.compile(self.bare) if settings.compiled else self.bare
        self.loss = ClipLoss()
        named = [(name, p) for name, p in self.bare.named_parameters() if p.requires_grad]
        vectors = [p for name, p in named if excluded(name, p)]
        matrices = [p for name, p in named if not excluded(name, p)]
        self.optimizer = torch.optim.AdamW(
            [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.2}],
            lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
        self.batches = settings.batches(self.plan, cut_text=False)
        self.mean, self.std = (torch.tensor(value, device=settings.device) for value in
                               (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def propagate(self, batch: Batch) -> None:
        """Forward pass, loss and backward pass."""
        self.optimizer.zero_grad()
        images = augment.apply(batch.views["a"], self.mean, self.std)
        with self.settings.autocast():
            out = self.model(images, batch.tokens)
            losses = self.loss(**out, output_dict=True)
        sum(losses.values()).backward()

    def optimize(self) -> None:
        """Take the optimizer's step."""
        self.optimizer.step()
        with torch.no_grad():
            self.bare.logit_scale.clamp_(0, math.log(100))

    def average(self) -> None:
        """There is no EMA."""

    def stages(self, watch: Stopwatch, batch: Batch) -> None:
        """The parts of this step are not told apart."""


def excluded(name: str, parameter: nn.Parameter) -> bool:
    """Return whether open_clip's trainer leaves a parameter out of weight decay."""
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


class Ours:
    """A recipe's training step, as `aclip train` takes it; without `cut_text`, text is padded to the full context.

    With `lora`, low-rank updates of both towers are trained, else everything.
    """

    def __init__(self, settings: Settings, recipe: Recipe, cut_text: bool, lora: int = 0) -> None:
        torch.manual_seed(0)
        self.settings = settings
        self.plan = plan.resolve(recipe, settings.shape())
        model = models.create_model(settings.model, image_size=settings.image_size, with_text=self.plan.uses_text)
        if lora:
            adapt(model, lora, ("image", "text"))
        pixels = models.preprocess_config(model)
        self.method = Method(model, self.plan, pixels["mean"], pixels["std"]).to(settings.device).train()
        if settings.compiled:
            wrap(self.method, settings.device, compile_blocks=True)
        self.optimizer = build_optimizer(parameter_groups(self.method, 0.2), recipe.optimization)
        self.ema = self.method.ema()
        self.batches = settings.batches(self.plan, cut_text)
        self.packs = text.packs if cut_text else lambda tokens: False

    def propagate(self, batch: Batch) -> None:
        """Forward pass, losses and backward pass."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.settings.autocast(), patch.object(text, "packs", self.packs):
            output = self.method(batch)
        output.loss.backward()

    def optimize(self) -> None:
        """Take the optimizer's step."""
        self.optimizer.step()
        with torch.no_grad():
            models.logit_scale_of(self.method.model).clamp_(0, math.log(100))

    def average(self) -> None:
        """Update the EMA."""
        if self.plan.recipe.uses_ema:
            self.ema.update(0.996)

    def stages(self, watch: Stopwatch, batch: Batch) -> None:
        """Take the step's forward and backward pass part by part, cut where one part hands over to the next."""
        self.optimizer.zero_grad(set_to_none=True)
        cuts: list[tuple[str, Tensor, Tensor]] = []

        def cut(name: str, part: Any, *fields: str) -> Any:
            """Return the part with leaves in place of its tensors that require a gradient."""
            leaves = {}
            for field_name in fields:
                tensor = getattr(part, field_name)
                if tensor is not None and tensor.requires_grad:
                    leaves[field_name] = tensor.detach().requires_grad_()
                    cuts.append((name, tensor, leaves[field_name]))
            return replace(part, **leaves)

        def encode_text(*arguments: Any) -> Any:
            with watch.measure("text"), patch.object(text, "packs", self.packs):
                out = Method.encode_text(self.method, *arguments)
            return cut("text", out, "features", "states")

        def encode(p: plan.PassPlan, *arguments: Any) -> Any:
            name = "EMA pass" if p.spec.encoder == "ema" else "online pass"
            with watch.measure(name):
                out = Method.encode(self.method, p, *arguments)
            return cut(name, out, "features", "cls", "patches")

        hooks = [hook for objective in self.method.objectives.values() for head in objective.children()
                 for hook in timing_hooks(watch, head)]
        watched = patch.multiple(self.method, encode_text=encode_text, encode=encode)
        try:
            with watched, watch.measure("all"):
                with self.settings.autocast():
                    encoded: EncodedBatch = self.method.encode_batch(batch)
                with watch.measure("heads and losses"):
                    with self.settings.autocast():
                        loss = self.method.compute_loss(encoded, batch.caption_ids).loss
                    loss.backward()
                for name in ("text", "online pass"):
                    reached = [(tensor, leaf.grad) for part, tensor, leaf in cuts
                               if part == name and leaf.grad is not None]
                    if reached:
                        with watch.measure(name):
                            torch.autograd.backward([tensor for tensor, _ in reached], [grad for _, grad in reached])
        finally:
            for hook in hooks:
                hook.remove()


def timing_hooks(watch: Stopwatch, head: nn.Module) -> list[Any]:
    """Measure a head's forward and backward pass."""
    begun: list[float] = []

    def start(*_: object) -> None:
        watch.wait()
        begun.append(watch.clock())

    def stop(*_: object) -> None:
        watch.wait()
        watch.seconds["heads"] = watch.seconds.get("heads", 0.0) + watch.clock() - begun.pop()

    hooks: list[Any] = [head.register_forward_pre_hook(start), head.register_forward_hook(stop)]
    if any(p.requires_grad for p in head.parameters()):
        hooks += [head.register_full_backward_pre_hook(start), head.register_full_backward_hook(stop)]
    return hooks


def peak_of(competitor: OpenClip | Ours, take: Callable[[], object]) -> int:
    """Return the most memory that one step takes, its own weights and optimizer state included.

    On a CPU: what the process grows by in the step (Linux only), and what the competitor holds between steps.
    """
    device = competitor.settings.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        clear = Path("/proc/self/clear_refs")
        if not clear.exists():
            return 0
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide what the step takes
        clear.write_text("5")
        before = status("VmRSS")
    take()
    peak = peak_memory(device) if device.type == "cuda" else status("VmHWM")
    module = competitor.method if isinstance(competitor, Ours) else competitor.bare
    held = [*module.parameters(), *module.buffers(),
            *(t for state in competitor.optimizer.state.values() for t in state.values())]
    return peak - before + sum(int(t.nbytes) for t in held)


def status(name: str) -> int:
    """Return a size in bytes from the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
