"""A step on a GPU that does not exist: tensors on "cuda" without data, which refuse to be read or to meet the CPU's.

`torch.Tensor.backward` needs a driver, so gradients appear without it; test_no_synchronisation.py runs it on the meta
device. At the end, what is asked of `torch.cuda` directly, each call replaced by one line.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from aclip import devices
from aclip.config import RunConfig
from aclip.data import build_loader
from aclip.data.workers import _Packed, _tensors
from aclip.devices import peak_memory
from aclip.machine import hardware
from aclip.models import blocks
from aclip.recipes import RECIPES
from aclip.structs import StepOutput
from aclip.trainer import Trainer
from aclip.training.guard import Guard
from aclip.training.schedule import Timetable
from over_ranks import a_batch, build, recipe_of
from tests_support import Numbers

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"precision": "fp32"}, {"precision": "fp16"}, {"micro_batch": 2}, {"recompute": True},
)


def like(tensor: torch.Tensor, device: torch.device = CPU) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


class NoWaiting(TorchDispatchMode):
    """Refuses copies between host and device that the host waits for, such as `torch.tensor(1.0, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten._to_copy.default, aten.copy_.default):
            target, source = (kwargs.get("device") or args[0].device, args[0].device) if (
                func is aten._to_copy.default) else (args[0].device, args[1].device)
            waits = not (kwargs.get("non_blocking") or args[2:] == (True,))
            assert not (waits and {target.type, source.type} == {"cpu", "cuda"}), f"{source} -> {target} waits"
        return func(*args, **kwargs)


@contextmanager
def training(words: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Any]:
    """Yield a trainer, and what takes a step of it: on "cuda", with batches that come from the CPU."""
    method = build(words)
    batch = a_batch(method, 4)
    config = RunConfig(recipe=recipe_of(words), model="vit-nano", data="synthetic", output="none", batch_size=4,
                       **{"precision": "bf16", **settings})
    table = Timetable(steps_per_epoch=12, total_steps=12, warmup_steps=1, masked_steps=1, evaluate_every=0,
                      save_every=0)

    def backward(*_: Any, **__: Any) -> None:
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode():
        for module in method.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(like(parameter, CUDA), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = like(buffer, CUDA)
        trainer = Trainer(config, method, table, CUDA)
        here = batch.map(like)
        assert trainer.scaler.is_enabled() == (config.precision == "fp16")

        def step() -> StepOutput:
            with NoWaiting():
                return trainer.train_step(here)

        yield trainer, step


@pytest.mark.parametrize(("recipe", "settings"), [
    *((recipe, {}) for recipe in RECIPES), *(("a-clip", settings) for settings in SETTINGS),
    ("a-clip optimization.optimizer=muon", {}), ("clip optimization.grad_clip=1", {})])
def test_a_step_stays_on_the_device(recipe: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with training(recipe, monkeypatch, **settings) as (trainer, step):
        for _ in range(2):  # masked, and not; the second has the optimizer's state
            output = step()
        on_device = [output.loss, *output.parts.values(), trainer._grad_norm, trainer._caption_ids]
        state = [tensor for one in trainer.optimizer.state.values() for tensor in one.values()]
        assert state
        assert {tensor.device for tensor in [*on_device, *state]} == {CUDA}
        # what the host reads one step later has been copied for it
        assert [measured.device.type for _, _, measured, _ in trainer.guard._measured] == ["cpu", "cpu"]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_towers_compute_in_the_precision(precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    attend = blocks.attention
    monkeypatch.setattr(blocks, "attention", lambda q, k, v, **more: seen.append(q.dtype) or attend(q, k, v, **more))
    with training("clip", monkeypatch, precision=precision) as (_, step):
        assert step().loss.dtype == torch.float32
    assert set(seen) == {dtype}


def test_reading_a_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with training("clip", monkeypatch) as (trainer, step):
        compute_loss = trainer.method.compute_loss

        def reading(*given: Any) -> StepOutput:
            output = compute_loss(*given)
            output.loss.item()
            return output

        trainer.method.compute_loss = reading
        with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
            step()


def test_waiting_for_a_copy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with training("clip", monkeypatch) as (trainer, step):
        monkeypatch.setattr(trainer, "ema_momentum", lambda: torch.tensor(1.0, device=CUDA))
        with pytest.raises(AssertionError, match="cpu -> cuda:0 waits"):
            step()


def test_a_tensor_left_on_the_cpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with training("clip", monkeypatch) as (trainer, step):
        trainer.method.mean = torch.empty(3)
        with pytest.raises(FakeTensorDeviceMismatchError, match="cuda:0 and cpu"):
            step()


@pytest.mark.parametrize(("capability", "hip", "precision"), [
    ((7, 5), None, "fp16"), ((8, 0), None, "bf16"), ((9, 0), None, "bf16"), ((7, 5), "6.4", "bf16")])
def test_old_gpus_train_in_fp16(
    capability: tuple[int, int], hip: str | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert devices.fast_precision(CUDA) == precision


def test_auto_is_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.choose_device("auto") == torch.device("cuda")


def test_the_device_is_waited_for_and_asked_for_its_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    devices.synchronize(CPU)
    devices.synchronize(CUDA)
    assert waited == [CUDA]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {CUDA: 123}.__getitem__)
    assert peak_memory(CUDA) == 123
    monkeypatch.setattr(torch.cuda, "get_device_name", {CUDA: "Some GPU"}.__getitem__)
    assert devices.versions(CUDA)["device"] == "Some GPU"


def test_the_doctor_describes_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(
        name=f"GPU number {number}", total_memory=2**37, major=9, minor=0))
    found = {one.what: one.value for one in hardware()}
    assert "GPU" not in found
    assert found["cuda:1"].startswith("GPU number 1, 128.0 GiB, compute capability 9.0, trains in bf16")


def test_the_host_reads_a_step_when_the_next_has_been_queued() -> None:
    guard = Guard(torch.nn.Linear(1, 1), torch.amp.GradScaler("cpu", enabled=False))
    waited: list[int] = []

    def queue(step: int, skipped: float) -> None:
        event = SimpleNamespace(synchronize=lambda: waited.append(step))
        guard._measured.append((step, (), torch.tensor([skipped, 3.0, 1.0, 1.0]), event))

    queue(1, 1.0)
    assert guard.incidents(wait=False) == []
    assert waited == []
    queue(2, 0.0)
    assert [one["step"] for one in guard.incidents(wait=False)] == [1]
    assert waited == [1]
    assert guard.incidents(wait=True) == []
    assert waited == [1, 2]


def test_batches_for_a_gpu_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = SimpleNamespace(source=Numbers(8), seed=0)
    loaders = [build_loader(dataset, batch_size=4, total_steps=2, device=device) for device in (CPU, CUDA)]
    assert [loader.pin_memory for loader in loaders] == [False, True]
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batch = a_batch(build("a-clip"), 2)
    _Packed(batch).pin_memory()  # as it comes where shared memory is small
    assert len(pinned) == len(tensors := list(_tensors(batch)))
    assert {one.shape for one in pinned} == {one.shape for one in tensors}
