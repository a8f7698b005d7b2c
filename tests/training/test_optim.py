"""Who decays, AdamW against its definition, and its state at rest."""

import copy
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from aclip import checkpoint
from aclip.checkpoint import Checkpoint
from aclip.config import Optimization
from aclip.errors import CheckpointError
from aclip.training.optim import build_optimizer, empty_optimizer_state, optimizer_state, parameter_groups, total_norm
from over_ranks import build

SETTINGS = Optimization(lr=0.1, weight_decay=0.5)


class Towers(nn.Module):
    """The kinds of parameters that a CLIP model has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.token_embedding = nn.Embedding(5, 4)
        self.positional_embedding = nn.Parameter(torch.randn(5, 4))
        self.class_embedding = nn.Parameter(torch.randn(4))
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self) -> torch.Tensor:
        return sum(((p + 1.0) ** 2).sum() for p in self.parameters() if p.requires_grad)


def test_matrices_decay_and_nothing_else() -> None:
    matrices, others = parameter_groups(Towers(), weight_decay=0.5)
    assert matrices.weight_decay == 0.5
    assert set(matrices.parameters) == {"conv.weight", "linear.weight", "token_embedding.weight"}
    assert others.weight_decay == 0.0
    assert set(others.parameters) == {
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "linear.bias",
        "positional_embedding",
        "class_embedding",
        "logit_scale",
    }
    assert sum(p.numel() for p in matrices.parameters.values()) == 48 + 16 + 20
    assert sum(p.numel() for p in others.parameters.values()) == 4 * 3 + 4 + 20 + 4 + 1


def test_lower_blocks_learn_more_slowly() -> None:
    method = build("a-clip")  # two towers of two blocks
    groups = parameter_groups(method, weight_decay=0.5, layer_decay=0.5)
    factors = {name: group.lr_factor for group in groups for name in group.parameters}
    assert {name: factors[name] for name in (
        "model.visual.positional_embedding", "model.token_embedding.weight",
        "model.visual.transformer.resblocks.0.ln_1.weight", "model.transformer.resblocks.0.mlp.c_fc.weight",
        "model.transformer.resblocks.1.ln_2.bias", "model.visual.ln_post.bias", "model.visual.proj",
        "model.text_projection", "model.logit_scale", "objectives.ntxent.head.0.weight",
    )} == {
        "model.visual.positional_embedding": 0.25, "model.token_embedding.weight": 0.25,
        "model.visual.transformer.resblocks.0.ln_1.weight": 0.5, "model.transformer.resblocks.0.mlp.c_fc.weight": 0.5,
        "model.transformer.resblocks.1.ln_2.bias": 1.0, "model.visual.ln_post.bias": 1.0, "model.visual.proj": 1.0,
        "model.text_projection": 1.0, "model.logit_scale": 1.0, "objectives.ntxent.head.0.weight": 1.0,
    }
    assert set(factors) == {name for name, p in method.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(groups, SETTINGS)
    assert {group["lr_factor"] for group in optimizer.param_groups} == {0.25, 0.5, 1.0}


def test_layers_of_a_timm_tower_decay_too() -> None:
    names = ("model.visual.trunk.pos_embed", "model.visual.trunk.blocks.0.norm1.weight",
             "model.visual.trunk.blocks.1.norm1.weight", "model.visual.trunk.norm.weight",
             "model.visual.head.proj.weight")
    module = nn.Module()
    for name in names:  # named as open_clip names timm's
        place = module
        *parts, last = name.split(".")
        for part in parts:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, nn.Parameter(torch.zeros(2)))
    groups = parameter_groups(module, 0.5, layer_decay=0.5)
    factors = {name: group.lr_factor for group in groups for name in group.parameters}
    assert [factors[name] for name in names] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_an_open_clip_model_is_split_whole() -> None:
    model = open_clip.model.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 64, "layers": 1},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    )
    matrices, others = parameter_groups(model, 0.5)
    assert sorted([*matrices.parameters, *others.parameters]) == sorted(name for name, _ in model.named_parameters())
    assert {name.removeprefix("visual.") for name in matrices.parameters} == {
        "conv1.weight",
        "proj",
        "text_projection",
        "token_embedding.weight",
        *(
            f"transformer.resblocks.0.{matrix}"
            for matrix in (
                "attn.in_proj_weight",
                "attn.out_proj.weight",
                "mlp.c_fc.weight",
                "mlp.c_proj.weight",
            )
        ),
    }


def test_empty_groups_are_left_out() -> None:
    assert [g.title for g in parameter_groups(nn.LayerNorm(3), 0.5)] == ["vectors, norms, positions, logit_scale"]
    assert parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.5) == []


def test_steps_follow_the_definition_of_adamw() -> None:
    model = Towers()
    groups = parameter_groups(model, SETTINGS.weight_decay)
    optimizer = build_optimizer(groups, SETTINGS)
    expected = {n: [p.detach().double().clone(), 0.0, 0.0] for n, p in model.named_parameters() if p.requires_grad}
    beta1, beta2 = SETTINGS.betas
    for t, lr in enumerate((0.1, 0.03, 0.01), start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        for name, state in expected.items():
            theta, m, v = state
            gradient = 2 * (theta + 1)
            m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
            decay = 0.5 if name in groups[0].parameters else 0.0
            theta = theta * (1 - lr * decay)
            theta = theta - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + SETTINGS.eps)
            state[:] = theta, m, v
    for name, (theta, _, _) in expected.items():
        torch.testing.assert_close(model.get_parameter(name).double(), theta, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.frozen.weight, Towers().frozen.weight)


def stepped(model: Towers, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    """Write the state of an optimizer into a checkpoint, and open it."""
    (folder / "new").mkdir()
    named = {f"optimizer/{name}": tensor for name, tensor in tensors.items()}
    checkpoint.write_rank_file(folder / "new", checkpoint.own_part(named))
    return checkpoint.open_checkpoint(checkpoint.commit(folder, folder / "new", 1, {}))


def test_restored_state_continues_bit_for_bit(tmp_path: Path) -> None:
    model = Towers()
    groups = parameter_groups(model, 0.5)
    optimizer = build_optimizer(groups, SETTINGS)
    stepped(model, optimizer, 3)

    resumed = copy.deepcopy(model)
    resumed_groups = parameter_groups(resumed, 0.5)
    resumed_optimizer = build_optimizer(resumed_groups, SETTINGS)
    saved = stored(tmp_path, optimizer_state(optimizer, groups))
    state = empty_optimizer_state(resumed_optimizer, resumed_groups, saved, "optimizer/")
    assert {"linear.weight/exp_avg", "linear.weight/exp_avg_sq", "linear.weight/step"} <= set(state)
    saved.load_into({f"optimizer/{name}": tensor for name, tensor in state.items()})

    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        stepped(m, o, 2)
    assert all(torch.equal(p, resumed.get_parameter(n)) for n, p in model.named_parameters())


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    groups = parameter_groups(Towers(), 0.5)
    with pytest.raises(CheckpointError, match="has no optimizer state for"):
        empty_optimizer_state(build_optimizer(groups, SETTINGS), groups, stored(tmp_path, {"o/step": torch.ones(())}),
                              "optimizer/")


def test_the_norm_is_that_of_all_tensors_together() -> None:
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(())]
    expected = torch.cat([t.flatten() for t in tensors]).double().norm()
    assert total_norm(tensors).item() == pytest.approx(expected.item(), rel=1e-6)
