"""The moving average against its definition, written out."""

import copy

import torch
from torch import nn

from aclip.ema import Ema, frozen_copy


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def moved(module: nn.Module) -> nn.Module:
    """Change every parameter and buffer, as a training step would."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.add_(1 if tensor.dtype == torch.int64 else torch.rand_like(tensor))
    return module


def test_frozen_copy_is_deep_and_takes_no_gradient() -> None:
    online = network()
    average = frozen_copy(online)
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in online.parameters())
    before = copy.deepcopy(average.state_dict())
    moved(online)
    assert all(torch.equal(average.state_dict()[k], v) for k, v in before.items())


def test_update_follows_the_definition_over_several_pairs() -> None:
    online = [network(), nn.Linear(2, 2)]
    averages = [frozen_copy(module) for module in online]
    ema = Ema(zip(online, averages, strict=True))
    for momentum in (0.9, 0.5, 0.996):
        before = [copy.deepcopy(a.state_dict()) for a in averages]
        for module in online:
            moved(module)
        ema.update(momentum)
        for module, average, old in zip(online, averages, before, strict=True):
            for key, value in average.state_dict().items():
                new = module.state_dict()[key]
                if value.is_floating_point():
                    expected = momentum * old[key].double() + (1 - momentum) * new.double()
                    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
                else:  # the batch counter of the normalisation
                    assert torch.equal(value, new)


def test_momentum_one_changes_no_bit_and_zero_copies() -> None:
    online = network()
    average = frozen_copy(online)
    ema = Ema([(online, average)])
    before = copy.deepcopy(dict(average.named_parameters()))
    moved(online)
    ema.update(1.0)
    assert all(torch.equal(p, before[name]) for name, p in average.named_parameters())
    ema.update(0.0)
    for name, parameter in average.named_parameters():
        torch.testing.assert_close(parameter, online.get_parameter(name))


def test_online_modules_stay_untouched_and_no_graph_is_built() -> None:
    online = network()
    average = frozen_copy(online)
    moved(online)
    before = copy.deepcopy(online.state_dict())
    Ema([(online, average)]).update(0.5)
    assert all(torch.equal(online.state_dict()[k], v) for k, v in before.items())
    assert all(p.grad_fn is None and not p.requires_grad for p in average.parameters())


def test_nothing_to_average_is_allowed() -> None:
    Ema([]).update(0.5)


def test_a_skipped_step_leaves_the_averages_as_they_are() -> None:
    online = network()
    average = frozen_copy(online)
    moved(online)
    before = copy.deepcopy(dict(average.named_parameters()))
    ema = Ema([(online, average)])
    ema.update(0.5, skipped=torch.ones(()))
    assert all(torch.equal(p, before[name]) for name, p in average.named_parameters())
    ema.update(0.5, skipped=torch.zeros(()))
    for name, parameter in average.named_parameters():
        torch.testing.assert_close(parameter, (before[name] + online.get_parameter(name)) / 2)


def test_distance_is_relative_to_the_online_tensors() -> None:
    online = network()
    average = frozen_copy(online)
    ema = Ema([(online, average)])
    assert ema.distance() == 0.0
    moved(online)
    pairs = [(p, q) for p, q in zip([*online.parameters(), *online.buffers()],
                                    [*average.parameters(), *average.buffers()], strict=True) if p.is_floating_point()]
    difference, length = (torch.cat([t.flatten() for t in tensors]).norm()
                          for tensors in ([q - p for p, q in pairs], [p for p, _ in pairs]))
    torch.testing.assert_close(ema.distance(), difference / length)
