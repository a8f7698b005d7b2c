"""Muon against a literal transcription and torch's, and what torch's lacks: packed matrices, skipped steps, shards."""

import copy
from pathlib import Path

import pytest
import torch
from test_optim import stored
from torch import Tensor, nn

from aclip.config import MuonConfig, Optimization
from aclip.training.muon import Muon, newton_schulz
from aclip.training.optim import build_optimizer, empty_optimizer_state, optimizer_state, parameter_groups
from over_ranks import build

SETTINGS = Optimization(optimizer="muon", lr=1e-3)
SHAPES = [(4, 4), (12, 4), (4, 12), (4, 12), (6, 4)]


def parameters(shapes: list[tuple[int, int]] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(shapes: list[tuple[int, int]], step: int) -> list[Tensor]:
    return [p.detach() for p in parameters(shapes, seed=100 + step)]


def muon(
    matrices: list[nn.Parameter], packed: tuple[nn.Parameter, ...] = (), dtype: torch.dtype = torch.float32
) -> Muon:
    group = {"params": matrices, "muon": True, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.3, "packed": set(packed)}
    return Muon([group], dtype, lr=0.02)


def take_steps(optimizer: torch.optim.Optimizer, matrices: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for p, gradient in zip(matrices, gradients([tuple(p.shape) for p in matrices], step), strict=True):
            p.grad = gradient
        optimizer.step()


def orthogonalized(matrix: Tensor) -> Tensor:
    """The iteration of K. Jordan's post, one matrix at a time, in double."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_steps_follow_the_definition() -> None:
    matrices = parameters()
    expected = [(p.detach().double(), torch.zeros(p.shape, dtype=torch.float64)) for p in matrices]
    take_steps(muon(matrices), matrices, 3)
    for step in range(3):
        for index, gradient in enumerate(gradients(SHAPES, step)):
            w, m = expected[index]
            m = 0.9 * m + gradient.double()
            update = orthogonalized(gradient.double() + 0.9 * m) * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
            expected[index] = (1 - 0.02 * 0.3) * w - 0.02 * update, m
    for p, (w, _) in zip(matrices, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=1e-5)


def test_steps_are_those_of_torch() -> None:
    ours, theirs = parameters(), parameters()
    take_steps(muon(ours, dtype=torch.bfloat16), ours, 3)
    take_steps(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn="original"), theirs, 3)
    for a, b, start in zip(ours, theirs, parameters(), strict=True):  # torch's momentum and iteration round otherwise
        assert (a - b).norm() < 0.02 * (b - start).norm()


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(newton_schulz(torch.randn(8, 16, 48, generator=torch.Generator().manual_seed(0)),
                                                torch.float32))
    assert 0.6 < values.min() < values.max() < 1.3


def test_a_packed_projection_is_three_matrices() -> None:
    packed = parameters([(12, 4)])
    apart = [nn.Parameter(part.clone()) for part in packed[0].detach().chunk(3)]
    for p, gradient in zip(apart, gradients([(12, 4)], 0)[0].chunk(3), strict=True):
        p.grad = gradient
    muon(apart).step()
    take_steps(muon(packed, packed=(packed[0],)), packed, 1)
    torch.testing.assert_close(packed[0].detach(), torch.cat([p.detach() for p in apart]), rtol=0, atol=1e-6)


def test_a_skipped_step_changes_nothing() -> None:
    matrices = parameters()
    optimizer = muon(matrices)
    take_steps(optimizer, matrices, 2)
    before = copy.deepcopy([*matrices, *(optimizer.state[p]["momentum_buffer"] for p in matrices)])
    for p in matrices:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    after = [*matrices, *(optimizer.state[p]["momentum_buffer"] for p in matrices)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_step_does_not_synchronise() -> None:
    """The meta device holds no values to wait for."""
    matrices = [nn.Parameter(p.to("meta")) for p in parameters()]
    optimizer = muon(matrices, packed=(matrices[1],))
    for p in matrices:
        p.grad = torch.empty_like(p)
    optimizer.found_inf = torch.ones((), device="meta")  # type: ignore[attr-defined]
    optimizer.step()


def test_only_matrices_inside_blocks_are_muons() -> None:
    method = build("a-clip")
    groups = parameter_groups(method, weight_decay=0.5, layer_decay=0.5, muon=MuonConfig(lr_ratio=10.0))
    hidden = {name: group.lr_factor for group in groups if group.muon for name in group.parameters}
    assert hidden == {
        f"model.{tower}transformer.resblocks.{block}.{name}": 10.0 * factor
        for tower in ("", "visual.") for block, factor in ((0, 0.5), (1, 1.0))
        for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")}
    everything = [name for group in groups for name in group.parameters]
    assert sorted(everything) == sorted(name for name, p in method.named_parameters() if p.requires_grad)
    optimizer = build_optimizer(groups, SETTINGS)
    packed = {p for group in optimizer.param_groups if group["muon"] for p in group["packed"]}
    assert packed == {p for name, p in method.named_parameters()
                      if name.endswith("in_proj_weight") and p.requires_grad}


def test_restored_state_continues_bit_for_bit(tmp_path: Path) -> None:
    def steps(method: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> None:
        for step in range(first, first + 2):
            generator = torch.Generator().manual_seed(step)
            for p in method.parameters():
                p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
            optimizer.step()

    method = build("a-clip")
    groups = parameter_groups(method, 0.5, muon=SETTINGS.muon)
    optimizer = build_optimizer(groups, SETTINGS)
    steps(method, optimizer, 0)
    resumed = copy.deepcopy(method)
    resumed_groups = parameter_groups(resumed, 0.5, muon=SETTINGS.muon)
    resumed_optimizer = build_optimizer(resumed_groups, SETTINGS)
    saved = stored(tmp_path, optimizer_state(optimizer, groups))
    state = empty_optimizer_state(resumed_optimizer, resumed_groups, saved, "optimizer/")
    assert "model.transformer.resblocks.0.mlp.c_fc.weight/momentum_buffer" in state
    assert "model.logit_scale/exp_avg" in state
    saved.load_into({f"optimizer/{name}": tensor for name, tensor in state.items()})
    for m, o in ((method, optimizer), (resumed, resumed_optimizer)):
        steps(m, o, 2)
    assert all(torch.equal(p, resumed.get_parameter(n)) for n, p in method.named_parameters())


@pytest.mark.parametrize("lr", [1e-3, 2e-3])
def test_one_learning_rate_moves_both(lr: float) -> None:
    method = build("clip")
    optimizer = build_optimizer(parameter_groups(method, 0.5, muon=SETTINGS.muon), SETTINGS)
    before = copy.deepcopy(dict(method.named_parameters()))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    for p in method.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    bias, matrix = "model.transformer.resblocks.0.mlp.c_fc.bias", "model.transformer.resblocks.0.mlp.c_proj.weight"
    moved = {name: (method.get_parameter(name) - before[name]).abs().max().item() for name in (bias, matrix)}
    assert moved[bias] == pytest.approx(lr, rel=1e-3)  # of Adam's first step
    spectral = torch.linalg.matrix_norm(method.get_parameter(matrix) - before[matrix], 2).item()
    assert spectral == pytest.approx(20 * lr, rel=0.4)
