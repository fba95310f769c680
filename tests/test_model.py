"""The model against plain formulations of the same mathematics, and what every part must have.

They hold for an edited model, too: with another feed-forward, norm or positions they pass or are skipped.
"""
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import model as code
from data import get_batch
from model import PRESETS, ModelConfig, Transformer, count_parameters, grouped_linear
from optim import build_optimizer

SMALL = ModelConfig(vocab_size=50, context_length=16, n_layers=2, n_heads=2, d_model=16, d_ff=24)
MOE = replace(SMALL, n_experts=4, top_k=2, tied=True)
SHIPPED = {"embed", "head", "norm", "norm1", "norm2", "attention.qkv", "attention.out", "feed_forward.down"}
SWIGLU, EXPERTS = {"feed_forward.gate_up"}, {"feed_forward.up", "feed_forward.router"}


def make(config, dtype=torch.float64, std=0.3):
    """A model in float64 with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = Transformer(config, dtype).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def of_preset(name):
    sizes = {f.name: PRESETS[name].get(f.name, f.default) for f in fields(ModelConfig)}
    with torch.device("meta"):
        return Transformer(ModelConfig(**sizes))


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
        hidden = F.silu(x @ layer.up[e].T)
        out = out + gate * (hidden @ layer.down[e].T)
    return out


# ----------------------------------------------------------------------------------------------------
# Counts and sizes

PUBLISHED = {
    "dense": {"total": 22_696_448, "used per token": 22_696_448},
    "dense-low": {"total": 22_696_448},
    "moe": {"total": 79_059_840, "used per token": 36_592_512, "Muon": 60_180_480, "AdamW": 18_879_360}}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_counts(preset):
    model = of_preset(preset)
    names = {name for name, _ in model.blocks[0].named_parameters()}
    names |= {name for name, _ in model.named_parameters() if "." not in name}
    if names - SHIPPED not in (SWIGLU, EXPERTS):
        pytest.skip("an edited model has counts of its own")
    assert count_parameters(model).items() >= PUBLISHED[preset].items()


@pytest.mark.parametrize("config", [SMALL, MOE, replace(MOE, tied=False, top_k=1)])
def test_counts_are_those_of_the_model(config):
    model = make(config)
    counts = count_parameters(model)
    sizes = [p.numel() for p in model.parameters()]
    assert counts["total"] == sum(sizes) == counts["Muon"] + counts["AdamW"]
    groups = build_optimizer(model, "muon", 0.02)
    assert counts["Muon"] == sum(p.numel() for o in groups if "momenta" in o.state for p in o.params)

    # One token alone: an expert that it does not use has no gradient.
    x, y = batch(config, b=1)
    model(x[:, :1], y[:, :1])[1].backward()
    idle = 0
    for p in model.blocks.parameters():
        if config.n_experts and len(p) == config.n_experts and p.ndim == 3:
            idle += sum(expert.numel() for expert in p.grad if not expert.any())
    assert counts["used per token"] == counts["total"] - idle
    assert (idle > 0) == (config.n_experts > 0)


@pytest.mark.parametrize("bad", [dict(n_heads=3), dict(n_heads=16), dict(n_experts=2, top_k=3)])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(ValueError):
        replace(SMALL, **bad)


def test_a_field_has_a_type_and_a_default_of_that_type():
    for f in fields(ModelConfig):       # train.py makes a flag of each
        assert f.type in (int, float, bool)
        assert isinstance(f.default, f.type)


# ----------------------------------------------------------------------------------------------------
# The parts

@pytest.mark.skipif(not hasattr(code, "rope"), reason="a model with other positions")
def test_rope_depends_on_the_distance_only():
    torch.manual_seed(0)
    angles = code.rope_angles(64, 8, 10_000.0).double()
    vectors = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    vectors = vectors.expand(2, 64, 1, 8)       # the same at 64 positions
    q, k = code.rope(vectors, angles)[:, :, 0]
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
    assert not starved or top_k == 4 or record["share"][3] == 0
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
    torch.testing.assert_close(record["share"], chosen)
    torch.testing.assert_close(record["balance_loss"], 4 * (chosen * probs.mean(0)).sum())
    torch.testing.assert_close(record["router_entropy"], -(probs * probs.log()).sum(-1).mean())


def test_slices_equal_grouped_mm():
    torch.manual_seed(0)
    x = torch.randn(32, 16).bfloat16()
    w = torch.randn(4, 8, 16)
    counts = torch.tensor([5, 0, 15, 12])   # the second expert has no rows
    ends = counts.cumsum(0).to(torch.int32)
    reference = F.grouped_mm(x, w.bfloat16().transpose(-2, -1), offs=ends)
    torch.testing.assert_close(grouped_linear(x, w, counts), reference)


# ----------------------------------------------------------------------------------------------------
# The whole model

@pytest.mark.parametrize("config", [SMALL, MOE])
def test_a_token_changes_later_logits_only_and_its_position_counts(config):
    model = make(config)
    x, _ = batch(config)
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    a = model(x)[0]
    b = model(changed)[0]
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=1e-10, atol=1e-10)
    assert (a[:, 9:] - b[:, 9:]).abs().amax(-1).min() > 1e-6
    swapped = x.clone()
    swapped[:, [2, 7]] = x[:, [7, 2]]
    assert (a[:, -1] - model(swapped)[0][:, -1]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("config", [SMALL, MOE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_in_nats_a_token_and_float32(config, dtype):
    torch.manual_seed(0)
    model = Transformer(config, dtype)
    with torch.no_grad():
        model.head.mul_(1000)           # logits of tens: a loss far from the uniform one
    x, y = batch(config)
    logits, loss, router = model(x, y)
    exact = logits.double()
    by_hand = exact.logsumexp(-1) - exact.gather(-1, y[..., None])[..., 0]
    assert logits.dtype == dtype and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), by_hand.mean(), rtol=1e-6, atol=1e-6)
    assert loss > 5
    assert model(x)[1] is None
    if not config.n_experts:
        assert router == {}
        return
    shapes = {name: tuple(value.shape) for name, value in router.items()}
    assert shapes == {"balance_loss": (2,), "router_entropy": (2,), "share": (2, 4)}
    torch.testing.assert_close(router["share"].sum(-1), torch.ones(2))


@pytest.mark.parametrize("config", [SMALL, MOE])
def test_gradients_by_finite_differences(config):
    model = make(config)
    x, y = batch(config, b=2)

    def loss():
        _, nats, router = model(x, y)
        return nats + 0.1 * sum(router.get("balance_loss", torch.zeros(1)))
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


def test_dropout_is_for_training_alone():
    model = make(replace(SMALL, dropout=0.5))
    x, _ = batch(SMALL)
    a, b = model(x)[0], model(x)[0]
    assert not torch.equal(a, b)
    model.eval()
    assert torch.equal(model(x)[0], make(SMALL).eval()(x)[0])


def test_bfloat16_stays_near_float32():
    x, y = batch(MOE)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        losses.append(Transformer(MOE, dtype)(x, y)[1].item())
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
        logits, _, _ = model(greedy[:, max(0, t - SMALL.context_length):t])
        assert torch.equal(greedy[:, t], logits[:, -1].argmax(-1))

    torch.manual_seed(3)
    cold = model.generate(prompt, 5, temperature=1e-4)
    assert torch.equal(cold, greedy[:, :9])
    drawn = model.generate(prompt[:1].expand(2000, -1), 1, temperature=2.0, top_k=3)[:, 4]
    logits, _, _ = model(prompt[:1])
    values, best = logits[0, -1].topk(3)
    found = torch.stack([(drawn == token).float().mean() for token in best])
    torch.testing.assert_close(found, (values / 2).softmax(-1), rtol=0, atol=0.04)


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


def test_steps_of_the_fast_path_follow_the_naive_one():
    """bfloat16 and sorted slices against float32 and masks; Muon and AdamW on both."""
    config = ModelConfig(vocab_size=200, context_length=32, n_layers=2, n_heads=2, d_model=32, d_ff=64,
                         n_experts=4, tied=True)
    tokens = markov_tokens()

    def curve(dtype, naive):
        torch.manual_seed(0)
        model = Transformer(config, dtype)
        for block in model.blocks:
            layer = block.feed_forward
            if naive:
                layer.forward = partial(naive_and_record, layer, layer.forward)
        optimizers = build_optimizer(model, "muon", 0.02)
        found = []
        for t in range(25):
            x, y = get_batch(tokens, 16, 32, 0, t)
            _, loss, router = model(x, y)
            (loss + 0.01 * router["balance_loss"].sum()).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    fast, naive = curve(torch.bfloat16, False), curve(torch.float32, True)
    difference = (fast - naive).abs()
    print(f"after 25 steps {fast[-1]:.4f} and {naive[-1]:.4f}; at most {difference.max():.4f} nats apart")
    assert naive[-1] < naive[0] - 0.5
    assert 0 < difference.max() < 0.03
