"""attention.py against attention written plainly: on a GPU as it is, elsewhere by Triton's interpreter."""
import pytest
import torch

pytest.importorskip("triton")
import attention
import model
import train
from model import ModelConfig, Transformer, rope_tables

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.bfloat16] if GPU else [torch.float32, torch.float16]  # Triton's interpreter does not know bfloat16


fused = attention.RotaryAttention.apply  # for any size and type


def plain(qkv, cos, sin):
    """The definition, in float64, rope as a matrix."""
    q, k, v = (t.transpose(1, 2).double() for t in qkv.chunk(3, dim=2))
    T, half = q.size(2), q.size(3) // 2
    turn = torch.zeros(T, 2 * half, 2 * half, dtype=torch.float64, device=q.device)
    for i in range(half):
        c, s = cos[:T, i].double(), sin[:T, half + i].double()
        turn[:, i, i], turn[:, i, half + i], turn[:, half + i, i], turn[:, half + i, half + i] = c, -s, s, c
    q, k = ((turn @ t[..., None])[..., 0] for t in (q, k))
    scores = (q @ k.mT / (2 * half) ** 0.5).masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def inputs(B, T, H, D, dtype=DTYPES[0], size=1.0):
    torch.manual_seed(0)
    qkv, dy = torch.randn(B, T, 3 * H, D, dtype=dtype, device=DEVICE) * size, torch.randn(B, T, H, D, dtype=dtype, device=DEVICE)
    cos, sin = (t.to(DEVICE) for t in rope_tables(T + 3, D, 10_000))
    return qkv.requires_grad_(), cos, sin, dy


def off(a, b):
    """The size of a difference, relative to what it should be."""
    return ((a - b).norm() / b.norm()).item() if b.any() else a.abs().max().item()


@pytest.mark.filterwarnings("ignore:overflow")  # of numpy, in entries that the mask then removes
@pytest.mark.parametrize("B, T, H, D, size", [(2, 100, 3, 32, 1), (1, 256, 2, 64, 1), (3, 1, 1, 32, 1), (1, 130, 2, 16, 1),
                                              (1, 192, 2, 32, 30)])  # 30: scores of a thousand
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_and_its_gradient(B, T, H, D, size, dtype):
    if size > 1 and dtype != torch.float32:
        pytest.skip("16 bits know scores of a thousand to a few nats")
    qkv, cos, sin, dy = inputs(B, T, H, D, dtype, size)
    y, expected = fused(qkv, cos, sin), plain(qkv, cos, sin)
    assert y.dtype == dtype and y.shape == (B, T, H, D) and off(y, expected) < CLOSE[dtype]
    for g in (dy, dy[:1, :1, :1, :1].expand_as(dy)):  # the second as of a sum: strides of 0
        grad, = torch.autograd.grad(y, qkv, g, retain_graph=True)
        wanted, = torch.autograd.grad(expected, qkv, g.double(), retain_graph=True)
        for ours, theirs in zip(grad.chunk(3, dim=2), wanted.double().chunk(3, dim=2)):
            assert off(ours, theirs) < CLOSE[dtype] * max(2, size)
    again, = torch.autograd.grad(fused(qkv, cos, sin), qkv, g)
    assert torch.equal(grad, again)  # nothing is summed in an order that may change


def test_no_position_sees_a_later_one():
    qkv, cos, sin, _ = inputs(1, 150, 2, 32)
    other = qkv.detach().clone()
    other[:, 97:] = 7
    a, b = fused(qkv, cos, sin), fused(other, cos, sin)
    assert torch.equal(a[:, :97], b[:, :97]) and not torch.equal(a[:, 97:], b[:, 97:])


def test_what_the_compiler_is_told_of_them():
    """Shapes, types, nothing written to that is an input; and that it compiles them in one graph."""
    qkv, cos, sin, dy = inputs(2, 70, 2, 32, DTYPES[-1])
    qk = model.rope(qkv.detach()[:, :, :4], cos, sin)
    y, lse = attention.attention(qk, qkv.detach())
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(attention.attention, (qk, qkv.detach()), test_utils=tests)
    torch.library.opcheck(attention.attention_backward, (dy, qk, qkv.detach(), cos, sin, y, lse), test_utils=tests)
    compiled = torch.compile(attention.rotary_attention, backend="aot_eager", fullgraph=True)(qkv, cos, sin)
    assert torch.equal(compiled, y)
    assert torch.equal(*(torch.autograd.grad(t, qkv, dy)[0] for t in (compiled, fused(qkv, cos, sin))))


def test_what_was_not_measured_is_left_to_torch(monkeypatch):
    """Long sequences, other heads, float32, dropout."""
    calls, whole = [], attention.attention
    monkeypatch.setattr(attention, "attention", lambda *args: calls.append(args) or whole(*args))
    narrow = DTYPES[-1]
    for qkv, dropout, own in ((inputs(1, 8, 1, 32, narrow), 0, 1), (inputs(1, 8, 1, 64, narrow), 0, 1),
                              (inputs(1, 8, 1, 32, narrow), 0.5, 0), (inputs(1, 8, 1, 32, torch.float32), 0, 0),
                              (inputs(1, 8, 1, 48, narrow), 0, 0), (inputs(1, 1025, 1, 32, narrow), 0, 0)):
        calls.clear()
        attention.rotary_attention(*qkv[:3], dropout)
        assert len(calls) == own


@pytest.mark.parametrize("device, backend, own", [("cuda", "inductor", True), ("cuda", "aot_eager", False), ("cpu", "inductor", False)])
def test_who_gets_it(monkeypatch, device, backend, own):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    m = Transformer(ModelConfig(vocab_size=50, context_length=16, n_layers=2, n_heads=2, d_model=16, d_ff=24))
    train.compiled(m, [], backend, torch.device(device))
    assert {block.attention.core for block in m.blocks} == {attention.rotary_attention if own else model.rotary_attention}


def test_the_model_learns_the_same_with_it():
    config = ModelConfig(vocab_size=50, context_length=80, n_layers=2, n_heads=2, d_model=64, d_ff=64)
    torch.manual_seed(0)
    dtype = DTYPES[0]
    m, idx, answers = Transformer(config, dtype).to(DEVICE), torch.randint(50, (3, 81), device=DEVICE), []
    for core in (lambda qkv, cos, sin, dropout: fused(qkv, cos, sin), model.rotary_attention):
        for block in m.blocks:
            block.attention.core = core
        loss = m.losses(idx[:, :-1], idx[:, 1:])[0]
        answers.append((loss, *torch.autograd.grad(loss, list(m.parameters()))))
    assert all(off(a, b) < 3 * CLOSE[dtype] for a, b in zip(*answers))
