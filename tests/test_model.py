"""The model against plain formulations of the same mathematics, and the properties that every part must have."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model
import train
from data import get_batch
from model import PRESETS, ModelConfig, Transformer, attend, count_parameters, grouped_linear, rope, rope_angles
from optim import build_optimizer

SMALL = ModelConfig(vocab_size=50, context_length=16, n_layers=2, n_heads=2, d_model=16, d_ff=24)
MOE = replace(SMALL, n_experts=4, top_k=2, tied=True)


def make(config, dtype=torch.float64, std=0.3):
    """A model in float64 with weights large enough that every part matters."""
    torch.manual_seed(0)
    m = Transformer(config, dtype).to(dtype)
    for p in m.parameters():
        torch.nn.init.normal_(p, std=std)
    return m


def batch(config, b=3, seed=1):
    torch.manual_seed(seed)
    idx = torch.randint(config.vocab_size, (b, config.context_length + 1))
    return idx[:, :-1], idx[:, 1:]


def naive_moe(layer, x):
    """Every expert on every token, weighted by a gate that is zero for the experts not chosen."""
    probs = (x @ layer.router.T.to(x.dtype)).softmax(-1)
    weights, experts = probs.topk(layer.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    out = 0
    for e in range(layer.router.size(0)):
        gate = (weights * (experts == e)).sum(-1, keepdim=True)
        out = out + gate * (F.silu(x @ layer.up[e].T) @ layer.down[e].T)
    return out


def test_presets_have_the_published_counts():
    counts = {name: count_parameters(config) for name, config in PRESETS.items()}
    assert counts["dense"]["total"] == counts["dense-low"]["total"] == 22_696_448
    assert counts["moe"] == {
        "total": 79_059_840, "used per token": 36_592_512, "Muon": 60_180_480, "AdamW": 18_879_360}


@pytest.mark.parametrize("config", [*PRESETS.values(), SMALL, MOE, replace(MOE, tied=False)])
def test_counts_are_those_of_the_model(config):
    with torch.device("meta"):
        m = Transformer(config)
    counts = count_parameters(config)
    sizes = {name: p.numel() for name, p in m.named_parameters()}
    assert counts["total"] == sum(sizes.values()) == counts["Muon"] + counts["AdamW"]
    muon, *rest = build_optimizer(m, "muon", 0.02)
    assert counts["Muon"] == sum(p.numel() for p in muon.param_groups[0]["params"])
    experts = sum(n for name, n in sizes.items() if name.endswith(("feed_forward.up", "feed_forward.down")))
    if config.n_experts:
        assert counts["used per token"] == counts["total"] - experts * (1 - config.top_k / config.n_experts)


@pytest.mark.parametrize("T", [1, 7, 128, 300])  # 300: three blocks of queries
def test_attention_is_softmax_attention(T):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, T, 8, dtype=torch.float64, requires_grad=True).unbind()
    scores = (q @ k.mT / 8 ** 0.5).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(attend(q, k, v), scores.softmax(-1) @ v)
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_rope_depends_on_the_distance_only():
    torch.manual_seed(0)
    angles = rope_angles(64, 8, 10_000.0).double()
    q, k = torch.randn(2, 8, dtype=torch.float64)
    q, k = (rope(t.expand(1, 64, 1, 8), angles)[0, :, 0] for t in (q, k))
    products = q @ k.T  # (query position, key position)
    for distance in (0, 1, 5, 30):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert products[0, 0] != products[0, 5]
    torch.testing.assert_close(q.norm(dim=-1), q.norm(dim=-1)[:1].expand(64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, MOE])
def test_a_future_token_changes_no_earlier_logit(config):
    m, (x, _) = make(config), batch(config)
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    a, b = m(x)[0], m(changed)[0]
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=1e-10, atol=1e-10)
    assert (a[:, 9:] - b[:, 9:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("config", [SMALL, MOE, replace(MOE, top_k=1), replace(MOE, top_k=4)])
def test_training_loss_equals_the_plain_one(config):
    m, (x, y) = make(config), batch(config)
    logits, loss = m(x, y)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    loss.backward()
    plain = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    ce, router = m.losses(x, y)
    ce.backward()
    torch.testing.assert_close(ce, loss)
    for n, p in m.named_parameters():
        torch.testing.assert_close(p.grad, plain[n], msg=n)
    assert (router is None) == (config.n_experts == 0)


@pytest.mark.parametrize("config", [SMALL, MOE])
def test_gradients_by_finite_differences(config):
    m, (x, y) = make(config), batch(config, b=2)

    def loss():
        ce, router = m.losses(x, y)
        return ce if router is None else ce + 0.1 * router[:, 0].sum()
    loss().backward()
    torch.manual_seed(2)
    for name, p in m.named_parameters():
        direction = torch.randn_like(p)
        direction /= direction.norm()
        with torch.no_grad():
            p += 1e-6 * direction
            up = loss()
            p -= 2e-6 * direction
            numeric = (up - loss()) / 2e-6
            p += 1e-6 * direction
        torch.testing.assert_close((p.grad * direction).sum(), numeric, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("starved", [False, True])
def test_moe_equals_a_loop_over_experts(top_k, starved):
    layer = make(replace(MOE, top_k=top_k)).blocks[0].feed_forward
    torch.manual_seed(1)
    x = torch.randn(2, 16, 16, dtype=torch.float64, requires_grad=True)
    if starved and top_k < 4:  # x is made positive in one direction that expert 3's router hates: it gets no token
        x.data[..., 0] = 10
        layer.router.data[3, 0] = -50
    y, figures = layer(x)
    share = figures[2:]
    assert not starved or top_k == 4 or share[3] == 0
    expected = naive_moe(layer, x)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    inputs = [x, layer.router, layer.up, layer.down]
    for mine, naive in zip(torch.autograd.grad(y, inputs, direction), torch.autograd.grad(expected, inputs, direction)):
        torch.testing.assert_close(mine, naive)

    probs = (x @ layer.router.T).softmax(-1).flatten(0, 1)
    chosen = F.one_hot(probs.topk(top_k).indices, 4).sum((0, 1)) / (32 * top_k)
    torch.testing.assert_close(share, chosen.double())
    torch.testing.assert_close(figures[0], 4 * (chosen * probs.mean(0)).sum())
    torch.testing.assert_close(figures[1], -(probs * probs.log()).sum(-1).mean())


def test_slices_equal_grouped_mm():
    torch.manual_seed(0)
    x, w = torch.randn(32, 16).bfloat16(), torch.randn(4, 8, 16)
    counts = torch.tensor([5, 0, 15, 12])  # the second expert has no rows
    ends = counts.cumsum(0).to(torch.int32)
    reference = F.grouped_mm(x, w.bfloat16().transpose(-2, -1), offs=ends)
    torch.testing.assert_close(grouped_linear(x, w, counts), reference)


def test_bfloat16_stays_near_float32():
    x, y = batch(MOE)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        losses.append(Transformer(MOE, dtype).losses(x, y)[0].item())
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.01


def test_the_heads_gradient_has_the_right_size_in_bfloat16():
    """Noise of bfloat16 averages out over a tensor; a factor that was rounded to it would not."""
    torch.manual_seed(0)
    h, w, t = torch.randn(96, 32).bfloat16(), torch.randn(50, 32) * 0.3, torch.randint(50, (96,))
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.detach().clone().requires_grad_() for x in (h.to(dtype), w.to(torch.promote_types(dtype, torch.float32)))]
        loss = model.HeadLoss.apply(*leaves, t)  # 96 / 0.2 is no power of two
        (loss * 0.2).backward()
        grads.append([x.grad.double() for x in leaves])
    for mine, exact in zip(*grads):
        assert (mine * exact).sum() / (exact * exact).sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("size", [0.01, 1.0, 9.0, 1000.0])  # of the logits: at 9 a token loses 50 nats, at 1,000 many
def test_the_head_is_torchs_cross_entropy(size):
    torch.manual_seed(0)
    h, w, t = torch.randn(300, 8), torch.randn(70, 8) * size / 3, torch.randint(70, (300,))
    h[:20] = w[t[:20]] * 50 / size  # most of these are sure of their target, but at size 0.01
    mine, theirs = ([x.clone().requires_grad_() for x in (h, w)] for _ in range(2))
    losses = model.HeadLoss.apply(*mine, t), F.cross_entropy(F.linear(*theirs), t)
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_exact_where_a_run_diverges(dtype):
    h = torch.tensor([[500.0], [1.0]], dtype=dtype).requires_grad_()
    w = torch.tensor([[-1.0], [1.0], [0.9]]).requires_grad_()
    loss = model.HeadLoss.apply(h, w, torch.tensor([0, 1]))  # the first token's loss is 1,000 nats
    loss.backward()
    assert 499 < loss < 502 and h.grad.isfinite().all() and w.grad.isfinite().all()
    assert h.grad[0] > 0 and w.grad[0] < 0 < w.grad[1]  # and the way out is known


def test_the_head_in_slices_is_the_head_in_one_piece():
    torch.manual_seed(0)
    h, w, t = torch.randn(5000, 4), torch.randn(3000, 4), torch.randint(3000, (5000,))  # four slices on a CPU
    mine, theirs = ([x.clone().requires_grad_() for x in (h, w)] for _ in range(2))
    model.HeadLoss.apply(*mine, t).backward()
    F.cross_entropy(F.linear(*theirs), t).backward()
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_generate():
    m, (x, _) = make(SMALL, torch.float32), batch(SMALL)
    greedy = m.generate(x[:, :4], 20, temperature=0)  # beyond the context: the oldest tokens fall out
    assert greedy.shape == (3, 24) and (greedy[:, :4] == x[:, :4]).all()
    for t in range(4, 24):
        assert (greedy[:, t] == m(greedy[:, max(0, t - SMALL.context_length):t])[0][:, -1].argmax(-1)).all()
    long = make(replace(SMALL, context_length=160), torch.float32)  # windows are filled up to 64, 128 and 160
    ids = long.generate(x[:1, :4].repeat(1, 15), 110, temperature=0)
    for t in range(60, 170):
        assert ids[0, t] == long(ids[:, max(0, t - 160):t])[0][0, -1].argmax()
    torch.manual_seed(3)
    first = m.generate(x[:, :4], 5, temperature=1.0, top_k=1)
    assert (first == greedy[:, :9]).all()
    many = m.generate(x[:1, :4].expand(200, -1), 1, temperature=1.0, top_k=3)[:, 4]
    assert set(many.tolist()) <= set(m(x[:1, :4])[0][0, -1].topk(3).indices.tolist()) and len(set(many.tolist())) > 1


@pytest.mark.parametrize("bad", [dict(n_heads=3), dict(n_heads=16), dict(n_experts=2, top_k=3)])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(ValueError):
        replace(SMALL, **bad)


def test_fifty_steps_of_the_fast_path_follow_the_naive_one():
    """bfloat16 and sorted slices against float32, masks and logits in one piece: the same weights, batches, Muon and AdamW."""
    config = ModelConfig(vocab_size=200, context_length=32, n_layers=2, n_heads=2, d_model=32, d_ff=64, n_experts=4, tied=True)
    args, _ = train.parse_args(["--preset", "moe"])
    walk = [0]
    generator = torch.Generator().manual_seed(1)
    for step in torch.randint(1, 4, (20_000,), generator=generator).tolist():
        walk.append((walk[-1] * 3 + step) % 200)  # the next token is one of three: there is something to learn
    tokens, curves = torch.tensor(walk).numpy().astype("uint16"), []
    for fast in (True, False):
        torch.manual_seed(0)
        m = Transformer(config, torch.bfloat16 if fast else torch.float32)
        if not fast:
            for block in m.blocks:
                layer = block.feed_forward
                layer.forward = lambda x, layer=layer, plain=layer.forward: (naive_moe(layer, x), plain(x)[1])
        optimizers = build_optimizer(m, "muon", 0.02)
        losses = m.losses if fast else lambda x, y, m=m: (m(x, y)[1], m.hidden(x)[1])
        step, curve = train.make_step(losses, optimizers, m, args), []
        for t in range(50):
            curve.append(step(*(b[None] for b in get_batch(tokens, 16, 32, 0, t)))[0].item())
        curves.append(torch.tensor(curve))
    difference = (curves[0] - curves[1]).abs()
    print(f"after 50 steps {curves[0][-1]:.4f} and {curves[1][-1]:.4f}; at most {difference.max():.4f} nats apart")
    assert curves[1][-1] < curves[1][0] - 1 and difference.max() < 0.03 and difference.max() > 0
