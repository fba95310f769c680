"""attention.py against attention written plainly: on a GPU as it is, elsewhere by Triton's interpreter."""
import pytest
import torch

pytest.importorskip("triton")
import attention
import model
from model import ModelConfig, Transformer, rope_tables

GPU = torch.cuda.is_available()
DEVICE, DTYPE, CLOSE = ("cuda", torch.bfloat16, 1e-2) if GPU else ("cpu", torch.float32, 1e-5)


def plain(qkv, cos, sin):
    """The definition, in float64, one entry of rope at a time."""
    q, k, v = (t.transpose(1, 2).double() for t in qkv.chunk(3, dim=2))
    T, half = q.size(2), q.size(3) // 2
    turn = torch.zeros(T, 2 * half, 2 * half, dtype=torch.float64, device=q.device)
    for i in range(half):
        c, s = cos[:T, i].double(), sin[:T, half + i].double()
        turn[:, i, i], turn[:, i, half + i], turn[:, half + i, i], turn[:, half + i, half + i] = c, -s, s, c
    q, k = ((turn @ t[..., None])[..., 0] for t in (q, k))
    scores = (q @ k.mT / (2 * half) ** 0.5).masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def inputs(B, T, H, D, size=1.0):
    torch.manual_seed(0)
    qkv, dy = torch.randn(B, T, 3 * H, D, dtype=DTYPE, device=DEVICE) * size, torch.randn(B, T, H, D, dtype=DTYPE, device=DEVICE)
    cos, sin = (t.to(DEVICE) for t in rope_tables(T + 3, D, 10_000))
    return qkv.requires_grad_(), cos, sin, dy


def off(a, b):
    """The size of a difference, relative to what it should be."""
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.filterwarnings("ignore:overflow")  # of numpy, in entries that the mask then removes
@pytest.mark.parametrize("B, T, H, D, size", [(2, 100, 3, 32, 1), (1, 256, 2, 64, 1), (3, 1, 1, 32, 1), (1, 130, 2, 16, 1),
                                              pytest.param(1, 192, 2, 32, 30, marks=pytest.mark.skipif(
                                                  GPU, reason="bfloat16 knows scores of a thousand to a few nats"))])
def test_attention_and_its_gradient(monkeypatch, B, T, H, D, size):
    qkv, cos, sin, dy = inputs(B, T, H, D, size)
    monkeypatch.setattr(model, "own_kernel_pays", lambda qkv: True)
    y = model.rotary_attention(qkv, cos, sin)
    expected = plain(qkv, cos, sin)
    assert y.dtype == DTYPE and y.shape == (B, T, H, D) and off(y, expected) < CLOSE
    grad, = torch.autograd.grad(y, qkv, dy)
    wanted, = torch.autograd.grad(expected, qkv, dy.double())
    for ours, theirs in zip(grad.chunk(3, dim=2), wanted.double().chunk(3, dim=2)):
        assert (off(ours, theirs) if theirs.any() else ours.abs().max()) < CLOSE * max(1, size)
    again, = torch.autograd.grad(model.rotary_attention(qkv, cos, sin), qkv, dy)
    assert torch.equal(grad, again)  # nothing is summed in an order that may change


def test_no_position_sees_a_later_one():
    qkv, cos, sin, _ = inputs(1, 150, 2, 32)
    other = qkv.detach().clone()
    other[:, 97:] = 7
    a, b = (attention.RotaryAttention.apply(t, model.rope(t[:, :, :4], cos, sin).detach(), cos, sin) for t in (qkv, other))
    assert torch.equal(a[:, :97], b[:, :97]) and not torch.equal(a[:, 97:], b[:, 97:])


def test_what_the_compiler_is_told_of_them():
    """Shapes, types, nothing written to that is an input."""
    qkv, cos, sin, dy = inputs(2, 70, 2, 32)
    qkv = qkv.detach()
    qk = model.rope(qkv[:, :, :4], cos, sin)
    y, lse = attention.attention(qk, qkv)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(attention.attention, (qk, qkv), test_utils=tests)
    torch.library.opcheck(attention.attention_backward, (dy, qk, qkv, cos, sin, y, lse), test_utils=tests)


def test_the_model_learns_the_same_with_it(monkeypatch):
    config = ModelConfig(vocab_size=50, context_length=80, n_layers=2, n_heads=2, d_model=64, d_ff=64)
    torch.manual_seed(0)
    m, idx = Transformer(config, DTYPE).to(DEVICE), torch.randint(50, (3, 81), device=DEVICE)

    def loss_and_gradients():
        loss = m.losses(idx[:, :-1], idx[:, 1:])[0]
        return loss, torch.autograd.grad(loss, list(m.parameters()))
    answers = []
    for pays in (True, False):
        monkeypatch.setattr(model, "own_kernel_pays", lambda qkv: pays)
        answers.append(loss_and_gradients())
    (loss, grads), (expected, wanted) = answers
    assert abs(loss - expected) < CLOSE and all(off(a, b) < 3 * CLOSE for a, b in zip(grads, wanted))
