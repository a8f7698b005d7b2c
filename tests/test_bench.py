"""Steps timed in turns, on synthetic batches shaped as the loader's."""

import time

import pytest
import torch

from aclip import models
from aclip.bench import caption_lengths, summary, synthetic_batch, synthetic_tokens, time_in_turns
from aclip.plan import resolve
from aclip.recipes import RECIPES


def test_steps_are_taken_in_turns_and_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    order: list[str] = []

    def step(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += seconds + len(order)  # later steps take longer, whoever takes them

    advanced: list[int] = []
    found = time_in_turns({"a": lambda: step("a", 0.1), "b": lambda: step("b", 0.2)}, warmup=1, rounds=2,
                          device=torch.device("cpu"), advance=advanced.append)
    assert "".join(order) == "ababab"
    assert found["a"] == pytest.approx([3.1, 5.1])
    assert found["b"] == pytest.approx([4.2, 6.2])
    assert len(advanced) == 6


def test_summary_by_hand() -> None:
    assert summary([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "median": 3.0, "first_quartile": 2.0, "third_quartile": 4.0, "rounds": 5}
    assert summary([2.0]) == {"median": 2.0, "first_quartile": 2.0, "third_quartile": 2.0, "rounds": 1}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_lengths_follow_the_stated_distribution() -> None:
    lengths = caption_lengths(100_000, 14, 77, generator()).float()
    assert lengths.mean() == pytest.approx(14, rel=0.01)
    assert lengths.quantile(torch.tensor([0.25, 0.75])).tolist() == [9, 17]
    assert (lengths > 39).float().mean() == pytest.approx(0.01, rel=0.1)
    assert (lengths.min(), lengths.max()) == (3, 77)
    assert caption_lengths(100, 30, 16, generator()).max() == 16


def test_tokens_end_where_they_should() -> None:
    lengths = torch.tensor([3, 7, 5])
    tokens = synthetic_tokens(lengths, 9, 49408, generator())
    assert tokens.shape == (3, 9)
    assert (tokens.argmax(dim=1) + 1).tolist() == lengths.tolist()
    assert (tokens != 0).sum(dim=1).tolist() == lengths.tolist()


@pytest.mark.parametrize("cut", [True, False])
def test_batches_hold_what_the_plan_reads(cut: bool) -> None:
    plan = resolve(RECIPES["a-clip-eff"], models.shape_of(models.model_config("vit-micro")))
    batch = synthetic_batch(plan, 4, cut_text=cut)
    assert {name: view.pixels.shape for name, view in batch.views.items()} == {
        name: (4, 3, *size) for name, size in plan.view_sizes.items()}
    assert batch.tokens.shape[1] == (int((batch.tokens.argmax(dim=1) + 1).max()) if cut else 77)
    assert batch.views["context"].augmentation is None
    assert batch.views["a"].augmentation is not None
    assert synthetic_batch(plan, 4, augmented=False).views["a"].augmentation is None
    assert torch.equal(synthetic_batch(plan, 4, cut_text=cut).tokens, batch.tokens)
    assert not torch.equal(synthetic_batch(plan, 4, seed=1).seeds, batch.seeds)
