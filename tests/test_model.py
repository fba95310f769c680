"""The model against plain formulations of the same mathematics, and what every part must have."""
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import train
from data import get_batch
from model import (PRESETS, HeadLoss, ModelConfig, Transformer, attend, count_parameters,
                   grouped_linear, rope, rope_angles)
from optim import build_optimizer

SMALL = ModelConfig(vocab_size=50, context_length=16, n_layers=2, n_heads=2, d_model=16, d_ff=24)
MOE = replace(SMALL, n_experts=4, top_k=2, tied=True)


def make(config, dtype=torch.float64, std=0.3):
    """A model in float64 with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = Transformer(config, dtype).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def batch(config, b=3, seed=1):
    torch.manual_seed(seed)
    idx = torch.randint(config.vocab_size, (b, config.context_length + 1))
    return idx[:, :-1], idx[:, 1:]


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def naive_moe(layer, x):
    """Every expert on every token, weighted by a gate that is zero for the experts not chosen."""
    probs = (x @ layer.router.T.to(x.dtype)).softmax(-1)
    weights, experts = probs.topk(layer.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    out = 0
    for e in range(layer.router.size(0)):
        gate = (weights * (experts == e)).sum(-1, keepdim=True)
        hidden = F.silu(x @ layer.up[e].T)
        out = out + gate * (hidden @ layer.down[e].T)
    return out


# ----------------------------------------------------------------------------------------------------
# Counts and sizes

def test_presets_have_the_published_counts():
    for name in ("dense", "dense-low"):
        assert count_parameters(PRESETS[name])["total"] == 22_696_448
    assert count_parameters(PRESETS["moe"]) == {
        "total": 79_059_840,
        "used per token": 36_592_512,
        "Muon": 60_180_480,
        "AdamW": 18_879_360}


@pytest.mark.parametrize("config", [*PRESETS.values(), SMALL, MOE, replace(MOE, tied=False)])
def test_counts_are_those_of_the_model(config):
    with torch.device("meta"):
        model = Transformer(config)
    counts = count_parameters(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert counts["total"] == sum(sizes.values()) == counts["Muon"] + counts["AdamW"]
    muon, *_ = build_optimizer(model, "muon", 0.02)
    assert counts["Muon"] == sum(p.numel() for p in muon.params)
    if config.n_experts:
        of_experts = ("feed_forward.up", "feed_forward.down")
        experts = sum(n for name, n in sizes.items() if name.endswith(of_experts))
        idle = experts * (1 - config.top_k / config.n_experts)
        assert counts["used per token"] == counts["total"] - idle


@pytest.mark.parametrize("bad", [dict(n_heads=3), dict(n_heads=16), dict(n_experts=2, top_k=3)])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(ValueError):
        replace(SMALL, **bad)


# ----------------------------------------------------------------------------------------------------
# The parts

@pytest.mark.parametrize("T", [1, 7, 128, 300])     # 300: three blocks of queries
def test_attention_is_softmax_attention(T):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, T, 8, dtype=torch.float64, requires_grad=True).unbind()
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = (q @ k.mT / 8 ** 0.5).masked_fill(future, -torch.inf)
    y = attend(q, k, v)
    torch.testing.assert_close(y, scores.softmax(-1) @ v)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_rope_depends_on_the_distance_only():
    torch.manual_seed(0)
    angles = rope_angles(64, 8, 10_000.0).double()
    vectors = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    vectors = vectors.expand(2, 64, 1, 8)       # the same at 64 positions
    q, k = rope(vectors, angles)[:, :, 0]
    products = q @ k.T      # (query position, key position)
    for distance in (0, 1, 5, 30):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert products[0, 0] != products[0, 5]
    length = q.norm(dim=-1)
    torch.testing.assert_close(length, length[:1].expand(64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("starved", [False, True])
def test_moe_equals_a_loop_over_experts(top_k, starved):
    model = make(replace(MOE, top_k=top_k))
    layer = model.blocks[0].feed_forward
    torch.manual_seed(1)
    x = torch.randn(2, 16, 16, dtype=torch.float64, requires_grad=True)
    if starved and top_k < 4:   # x is positive in a direction that expert 3's router hates: no token for it
        x.data[..., 0] = 10
        layer.router.data[3, 0] = -50
    y, record = layer(x)
    balance, entropy, share = record[0], record[1], record[2:]
    assert not starved or top_k == 4 or share[3] == 0
    expected = naive_moe(layer, x)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    inputs = [x, layer.router, layer.up, layer.down]
    mine = torch.autograd.grad(y, inputs, direction)
    naive = torch.autograd.grad(expected, inputs, direction)
    torch.testing.assert_close(mine, naive)

    probs = (x @ layer.router.T).softmax(-1).flatten(0, 1)
    chosen = F.one_hot(probs.topk(top_k).indices, 4)        # (32 tokens, top_k, 4 experts)
    chosen = chosen.sum((0, 1)) / (32 * top_k)
    torch.testing.assert_close(share, chosen.double())
    torch.testing.assert_close(balance, 4 * (chosen * probs.mean(0)).sum())
    torch.testing.assert_close(entropy, -(probs * probs.log()).sum(-1).mean())


def test_slices_equal_grouped_mm():
    torch.manual_seed(0)
    x = torch.randn(32, 16).bfloat16()
    w = torch.randn(4, 8, 16)
    counts = torch.tensor([5, 0, 15, 12])   # the second expert has no rows
    ends = counts.cumsum(0).to(torch.int32)
    reference = F.grouped_mm(x, w.bfloat16().transpose(-2, -1), offs=ends)
    torch.testing.assert_close(grouped_linear(x, w, counts), reference)


# ----------------------------------------------------------------------------------------------------
# The head and its loss

def test_the_heads_gradient_has_the_right_size_in_bfloat16():
    """Noise of bfloat16 averages out over a tensor; a factor that was rounded to it would not."""
    torch.manual_seed(0)
    h = torch.randn(96, 32).bfloat16()
    w = torch.randn(50, 32) * 0.3
    t = torch.randint(50, (96,))
    rounded = leaves(h, w)
    exact = leaves(h.double(), w.double())
    for pair in (rounded, exact):
        loss = HeadLoss.apply(*pair, t)
        (loss * 0.2).backward()             # 96 / 0.2 is no power of two
    for mine, theirs in zip(rounded, exact):
        a, b = mine.grad.double(), theirs.grad.double()
        assert (a * b).sum() / (b * b).sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("size", [0.01, 1.0, 9.0, 1000.0])  # of logits: at 9 a token loses 50 nats
def test_the_head_is_torchs_cross_entropy(size):
    torch.manual_seed(0)
    h = torch.randn(300, 8)
    w = torch.randn(70, 8) * size / 3
    t = torch.randint(70, (300,))
    h[:20] = w[t[:20]] * 50 / size      # most of these are sure of their target, but at size 0.01
    agree_with_torch(h, w, t)


def test_the_head_in_slices_is_the_head_in_one_piece():
    torch.manual_seed(0)
    h = torch.randn(5000, 4)
    w = torch.randn(3000, 4)            # four slices on a CPU
    agree_with_torch(h, w, torch.randint(3000, (5000,)))


def agree_with_torch(h, w, t):
    mine, theirs = leaves(h, w), leaves(h, w)
    loss = HeadLoss.apply(*mine, t)
    expected = F.cross_entropy(F.linear(*theirs), t)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_exact_where_a_run_diverges(dtype):
    h = torch.tensor([[500.0], [1.0]], dtype=dtype).requires_grad_()
    w = torch.tensor([[-1.0], [1.0], [0.9]]).requires_grad_()
    loss = HeadLoss.apply(h, w, torch.tensor([0, 1]))       # the first token's loss is 1,000 nats
    loss.backward()
    assert 499 < loss < 502
    assert h.grad.isfinite().all()
    assert w.grad.isfinite().all()
    assert h.grad[0] > 0            # and the way out is known
    assert w.grad[0] < 0 < w.grad[1]


# ----------------------------------------------------------------------------------------------------
# The whole model

@pytest.mark.parametrize("config", [SMALL, MOE])
def test_a_future_token_changes_no_earlier_logit(config):
    model = make(config)
    x, _ = batch(config)
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    a, _ = model(x)
    b, _ = model(changed)
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=1e-10, atol=1e-10)
    assert (a[:, 9:] - b[:, 9:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("config", [SMALL, MOE, replace(MOE, top_k=1), replace(MOE, top_k=4)])
def test_training_loss_equals_the_plain_one(config):
    model = make(config)
    x, y = batch(config)
    logits, loss = model(x, y)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ce, router = model.losses(x, y)
    ce.backward()
    torch.testing.assert_close(ce, loss)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)
    assert (router is None) == (config.n_experts == 0)


@pytest.mark.parametrize("config", [SMALL, MOE])
def test_gradients_by_finite_differences(config):
    model = make(config)
    x, y = batch(config, b=2)

    def loss():
        ce, router = model.losses(x, y)
        if router is None:
            return ce
        return ce + 0.1 * router[:, 0].sum()
    loss().backward()
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        direction = torch.randn_like(p)
        direction /= direction.norm()
        with torch.no_grad():
            p += 1e-6 * direction
            up = loss()
            p -= 2e-6 * direction
            down = loss()
            p += 1e-6 * direction
        slope = (p.grad * direction).sum()
        torch.testing.assert_close(slope, (up - down) / 2e-6, rtol=1e-4, atol=1e-7, msg=name)


def test_bfloat16_stays_near_float32():
    x, y = batch(MOE)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Transformer(MOE, dtype)
        losses.append(model.losses(x, y)[0].item())
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.01


def test_generate():
    model = make(SMALL, torch.float32)
    x, _ = batch(SMALL)
    prompt = x[:, :4]
    greedy = model.generate(prompt, 20, top_k=1)    # beyond the context: the oldest tokens fall out
    assert greedy.shape == (3, 24)
    assert torch.equal(greedy[:, :4], prompt)
    for t in range(4, 24):
        logits, _ = model(greedy[:, max(0, t - SMALL.context_length):t])
        assert torch.equal(greedy[:, t], logits[:, -1].argmax(-1))

    long = make(replace(SMALL, context_length=160), torch.float32)  # windows are filled up to 64, 128 and 160
    ids = long.generate(x[:1, :4].repeat(1, 15), 110, top_k=1)
    for t in range(60, 170):
        logits, _ = long(ids[:, max(0, t - 160):t])
        assert ids[0, t] == logits[0, -1].argmax()

    torch.manual_seed(3)
    cold = model.generate(prompt, 5, temperature=1e-4)
    assert torch.equal(cold, greedy[:, :9])
    drawn = model.generate(prompt[:1].expand(200, -1), 1, temperature=1.0, top_k=3)[:, 4]
    logits, _ = model(prompt[:1])
    best = logits[0, -1].topk(3).indices
    assert set(drawn.tolist()) <= set(best.tolist())
    assert len(drawn.unique()) > 1


def markov_tokens(n=20_000):
    """Each token is followed by one of three: there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    tokens = [0]
    for jump in torch.randint(1, 4, (n,), generator=generator).tolist():
        tokens.append((tokens[-1] * 3 + jump) % 200)
    return torch.tensor(tokens).numpy().astype("uint16")


def naive_and_record(layer, fast, x):
    _, record = fast(x)
    return naive_moe(layer, x), record


def test_fifty_steps_of_the_fast_path_follow_the_naive_one():
    """bfloat16 and sorted slices against float32, masks and logits in one piece; Muon and AdamW on both."""
    config = ModelConfig(vocab_size=200, context_length=32, n_layers=2, n_heads=2, d_model=32, d_ff=64,
                         n_experts=4, tied=True)
    args, _ = train.parse_args(["--preset", "moe"])
    tokens = markov_tokens()

    def curve(model, losses):
        step = train.make_step(losses, build_optimizer(model, "muon", 0.02), model, args)
        found = []
        for t in range(50):
            x, y = get_batch(tokens, 16, 32, 0, t)
            record = step(x[None], y[None])
            found.append(record[0].item())
        return torch.tensor(found)

    torch.manual_seed(0)
    model = Transformer(config, torch.bfloat16)
    fast = curve(model, model.losses)

    torch.manual_seed(0)
    plain = Transformer(config)
    for block in plain.blocks:
        layer = block.feed_forward
        layer.forward = partial(naive_and_record, layer, layer.forward)
    naive = curve(plain, lambda x, y: (plain(x, y)[1], plain.hidden(x)[1]))

    difference = (fast - naive).abs()
    print(f"after 50 steps {fast[-1]:.4f} and {naive[-1]:.4f}; at most {difference.max():.4f} nats apart")
    assert naive[-1] < naive[0] - 1
    assert 0 < difference.max() < 0.03
