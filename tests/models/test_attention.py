import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aclip.models import blocks as module
from aclip.models.blocks import LONGEST_PLAIN, attention, first_row


def heads(
    length: int, *, rows: int | None = None, dtype: torch.dtype, grad: bool = False
) -> tuple[Tensor, ...]:
    noise = torch.Generator().manual_seed(length)
    shapes = [(2, 3, rows or length, 16), (2, 3, length, 16), (2, 3, length, 16)]
    return tuple(torch.randn(s, generator=noise).to(dtype).requires_grad_(grad) for s in shapes)


def exact(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    logits = torch.einsum("bhmd,bhld->bhml", q.double(), k.double()) / q.shape[-1] ** 0.5
    if visible is not None:
        logits = torch.where(visible, logits, float("-inf"))
    return torch.einsum("bhml,bhld->bhmd", logits.softmax(-1), v.double())


@pytest.mark.parametrize(("dtype", "grad", "tolerance"), [
    (torch.float32, False, 1e-6), (torch.float32, True, 1e-6),
    (torch.bfloat16, False, 2e-2), (torch.bfloat16, True, 2e-2),
])
@pytest.mark.parametrize("length", [17, 65])
def test_every_kernel_computes_the_formula(dtype, grad, tolerance, length):
    q, k, v = heads(length, dtype=dtype, grad=grad)
    tril = torch.ones(length, length, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v).double(), exact(q, k, v), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        attention(q, k, v, causal=True).double(), exact(q, k, v, tril), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "grad", "tolerance"), [(torch.float32, False, 1e-6), (torch.bfloat16, True, 2e-2)])
def test_one_query_sees_what_is_visible(dtype, grad, tolerance):
    q, k, v = heads(9, rows=1, dtype=dtype, grad=grad)
    visible = (torch.arange(9) <= torch.tensor([[3], [8]]))[:, None, None]
    ours = attention(q, k, v, visible=visible)
    torch.testing.assert_close(ours.double(), exact(q, k, v, visible), rtol=0, atol=tolerance)
    alone = attention(q[:1], k[:1, :, :4], v[:1, :, :4])
    torch.testing.assert_close(ours[:1], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "grad", "amx", "length", "plain"), [
    (torch.bfloat16, True, True, 33, True),
    (torch.bfloat16, True, False, 33, True),
    (torch.bfloat16, False, True, 33, False),
    (torch.bfloat16, False, False, 33, True),
    (torch.float32, True, False, 33, False),
    (torch.bfloat16, True, False, LONGEST_PLAIN + 1, False),
])
def test_kernel_is_chosen_by_the_documented_rule(dtype, grad, amx, length, plain, monkeypatch):
    monkeypatch.setattr(module, "HAS_AMX", amx)
    fused = []

    def record(*arguments, **options):
        fused.append(True)
        return F.scaled_dot_product_attention(*arguments, **options)

    q, k, v = heads(length, dtype=dtype, grad=grad)
    monkeypatch.setattr(module, "F", type("F", (), {"scaled_dot_product_attention": staticmethod(record)}))
    attention(q, k, v)
    assert bool(fused) != plain


def test_gradients_of_plain_and_fused_attention_agree():
    q, k, v = heads(33, dtype=torch.bfloat16, grad=True)
    attention(q, k, v).sum().backward()
    q32, k32, v32 = (t.detach().double().requires_grad_() for t in (q, k, v))
    exact(q32, k32, v32).sum().backward()
    for ours, expected in ((q, q32), (k, k32), (v, v32)):
        torch.testing.assert_close(ours.grad.double(), expected.grad, rtol=0, atol=3e-2)


def test_first_row_is_that_of_the_full_attention_maps():
    q, k, _ = heads(12, dtype=torch.float32)
    maps = (torch.einsum("bhmd,bhld->bhml", q, k) / 4).softmax(-1)
    torch.testing.assert_close(first_row(q, k), maps[:, :, 0].mean(1), rtol=0, atol=1e-6)


def test_first_row_stays_fp32_under_autocast_and_carries_no_gradient():
    q, k, _ = heads(12, dtype=torch.bfloat16, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = first_row(q, k)
    assert ours.dtype == torch.float32
    assert not ours.requires_grad
    torch.testing.assert_close(ours, first_row(q.float(), k.float()), rtol=0, atol=0)
