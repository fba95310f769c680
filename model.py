"""The transformer, dense or mixture-of-experts, in the order in which a token meets it.

    x = embed[token]
    for each layer:   x = x + attention(rmsnorm(x));   x = x + feed_forward(rmsnorm(x))
    logits = rmsnorm(x) @ head.T

It is the modern plain decoder: RMSNorm before each part (Zhang & Sennrich 2019), rotary positions (Su et al.
2021), no biases, and as feed-forward either SwiGLU (Shazeer 2020), or n_experts small networks of which a
router picks top_k for each token (Shazeer et al. 2017), with the balance loss of Fedus et al. 2021.
Weights are float32 and are cast to `model.dtype` when they are used. Matrices side by side, like Q, K and V
or the experts, are one stacked tensor (n, rows, cols). The experts' tokens are sorted, not masked: each
expert multiplies one contiguous slice, and no token is dropped.

    python model.py    # each preset's parameters, those that a token uses, and which optimizer owns them
"""
import math
from dataclasses import dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

# Sizes --------------------------------------------------------------------------------------------

def flag(default, text):    # a field of ModelConfig is a flag of train.py; a plain `x: float = 0.02` is, too
    return field(default=default, metadata={"help": text})

@dataclass
class ModelConfig:
    vocab_size: int = flag(2048, "entries of the vocabulary, or as many as the text supports")
    context_length: int = flag(128, "tokens that the model sees at once")
    n_layers: int = flag(4, "blocks of attention and feed-forward")
    n_heads: int = flag(4, "of attention; each has d_model / n_heads dimensions")
    d_model: int = flag(128, "width of the residual stream")
    d_ff: int = flag(344, "width of the feed-forward; about 8/3 d_model with its three matrices")
    n_experts: int = flag(0, "feed-forward networks of which a token uses top_k; 0: one SwiGLU")
    top_k: int = flag(2, "experts that a token uses")
    tied: bool = flag(False, "the head is the embedding")
    dropout: float = flag(0.0, "share of activations that are set to zero")
    rope_base: float = flag(10_000.0, "of the rotary positions' frequencies")

    def __post_init__(self):
        if self.d_model % (2 * self.n_heads):       # 2: rotary positions turn pairs
            raise ValueError(f"d_model {self.d_model} must be n_heads {self.n_heads} times an even number")
        if self.n_experts and not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k {self.top_k} must be from 1 to {self.n_experts} experts; change --top-k")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be from 0 to below 1; change --dropout")

# A preset: defaults of the fields above and of train.py's flags; lr is the best found (results/README.md).
DENSE = dict(vocab_size=10_000, context_length=256, n_layers=4, n_heads=16, d_model=512, d_ff=1344,
             data="tinystories", batch_size=128, max_steps=10_000, eval_tokens=131_072, lr=3e-3)
PRESETS = {
    "tiny": dict(vocab_size=512, context_length=32, n_layers=2, n_heads=4, d_model=64, d_ff=176,
                 data="stdlib", batch_size=32, max_steps=200, warmup_ratio=0.4, eval_tokens=8_192, lr=0.01),
    "dense": DENSE,
    "dense-low": DENSE | dict(batch_size=32, max_steps=5_000, lr=1.3e-3),       # an eighth of the tokens
    "moe": dict(vocab_size=49_152, context_length=512, n_layers=6, n_heads=8, d_model=384, d_ff=1536,
                n_experts=8, top_k=2, tied=True, data="cosmopedia", optimizer="muon", lr=0.065, batch_size=16,
                max_steps=100, warmup_ratio=0.02, min_lr_ratio=0.2, eval_tokens=32_768),
}

# Pure functions -----------------------------------------------------------------------------------

def linear(x, weight):
    """x (..., d_in) times a weight (d_out, d_in) or (n, d_out, d_in), cast to x's dtype: (..., [n] d_out)."""
    return F.linear(x, weight.flatten(0, -2).to(x.dtype))

def rmsnorm(x, gain):
    return F.rms_norm(x, gain.shape, gain.to(x.dtype), eps=1e-6)

def rope_angles(context_length, d_head, base):
    """cos and sin (2, context_length, d_head) of the angle position * base^(-2i / d_head) of pair i."""
    frequencies = base ** (-torch.arange(0, d_head, 2).float() / d_head)
    angles = torch.arange(context_length).float()[:, None] * frequencies    # (context_length, d_head / 2)
    angles = torch.cat((-angles, angles), dim=-1)                           # the first of a pair gets -sin
    return torch.stack((angles.cos(), angles.sin()))

def rope(x, angles):
    """Turn pair (i, i + d_head/2) of x (B, T, n_heads, d_head) by its position: q.k depends on distance."""
    cos, sin = angles[:, :x.size(1), None].to(x.dtype)                      # (T, 1, d_head)
    partners = x.roll(x.size(-1) // 2, dims=-1)
    return x * cos + partners * sin

def grouped_linear(x, weight, counts):
    """x (rows, d_in): the first counts[0] rows times weight[0] (d_out, d_in), the next times weight[1] ..."""
    if x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight.mT.to(x.dtype), offs=ends)            # one kernel: nothing waits
    slices = zip(x.split(counts.tolist()), weight.to(x.dtype))              # elsewhere as fast
    return torch.cat([F.linear(rows, matrix) for rows, matrix in slices])

# The layers ---------------------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.qkv = nn.Parameter(torch.empty(3, config.d_model, config.d_model))
        self.out = nn.Parameter(torch.empty(config.d_model, config.d_model))

    def forward(self, x, angles):
        qkv = linear(x, self.qkv).unflatten(-1, (3, self.n_heads, -1))      # (B, T, 3, n_heads, d_head)
        q, k, v = qkv.unbind(2)
        q = rope(q, angles).transpose(1, 2)                                 # (B, n_heads, T, d_head)
        k = rope(k, angles).transpose(1, 2)
        v = v.transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(2)                                    # (B, T, d_model)
        return linear(y, self.out)

class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, config.d_ff, config.d_model))
        self.down = nn.Parameter(torch.empty(config.d_model, config.d_ff))

    def forward(self, x):
        gate, up = linear(x, self.gate_up).chunk(2, dim=-1)                 # (B, T, d_ff)
        hidden = F.silu(gate) * up
        return linear(hidden, self.down), {}                                # {}: there is no router

class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.up = nn.Parameter(torch.empty(config.n_experts, config.d_ff, config.d_model))
        self.down = nn.Parameter(torch.empty(config.n_experts, config.d_model, config.d_ff))

    def forward(self, x):
        """x (B, T, d) -> its shape again, and what the router did."""
        n_experts = len(self.router)
        k = self.top_k
        tokens = x.flatten(0, 1)                                            # (N, d)

        # Choose: each token's top k experts, in float32, since a choice deserves full precision.
        logits = F.linear(tokens.to(self.router.dtype), self.router)        # (N, n_experts)
        probs = logits.softmax(-1)
        weights, experts = probs.sort(descending=True)                      # compiled faster than topk
        weights = weights[:, :k]                                            # (N, k)
        weights = weights / weights.sum(-1, keepdim=True)
        experts = experts[:, :k].flatten()                                  # (N k,), of token i // k

        # Compute: assignments sorted by expert, each expert's slice, added up by token.
        order = experts.to(torch.int16).argsort(stable=True)                # 2 bytes: a GPU sorts one a pass
        counts = F.one_hot(experts, n_experts).sum(0)                       # (n_experts,)
        token = (order // k)[:, None].expand(-1, x.size(-1))                # (N k, d), whose assignment it is
        rows = tokens.gather(0, token)                                      # (N k, d)
        hidden = F.silu(grouped_linear(rows, self.up, counts))              # (N k, d_ff)
        out = grouped_linear(hidden, self.down, counts)                     # (N k, d)
        out = out * weights.flatten()[order, None].to(x.dtype)
        y = torch.zeros_like(tokens).scatter_add(0, token, out)             # (N, d)

        # Record: balance is 1 when every expert gets as much, and n_experts / k when one takes all.
        share = counts / len(order)                                         # (n_experts,)
        balance = n_experts * (share * probs.mean(0)).sum()
        entropy = -(probs * probs.clamp_min(1e-9).log()).sum(-1).mean()
        return y.view_as(x), {"balance_loss": balance, "router_entropy": entropy, "share": share}

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.Parameter(torch.ones(config.d_model))
        self.norm2 = nn.Parameter(torch.ones(config.d_model))
        self.attention = Attention(config)
        self.feed_forward = MoE(config) if config.n_experts else SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, angles):
        x = x + self.dropout(self.attention(rmsnorm(x, self.norm1), angles))
        y, router = self.feed_forward(rmsnorm(x, self.norm2))
        return x + self.dropout(y), router

# The model ----------------------------------------------------------------------------------------

class Transformer(nn.Module):
    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.head = self.embed
        if not config.tied:
            self.head = nn.Parameter(torch.empty_like(self.embed))
        angles = rope_angles(config.context_length, config.d_model // config.n_heads, config.rope_base)
        self.register_buffer("angles", angles, persistent=False)
        for name, p in self.named_parameters():
            std = 0.02                                      # GPT-2's
            if name.endswith(("attention.out", "feed_forward.down")):
                std /= math.sqrt(2 * config.n_layers)       # so many outputs add up in x
            if p.ndim >= 2:
                nn.init.normal_(p, std=std)

    def forward(self, idx, targets=None):
        """idx, targets (B, T) -> logits (B, T, vocab_size), nats a token or None, {router: (n_layers, ..)}"""
        x = F.embedding(idx, self.embed).to(self.dtype)                     # (B, T, d_model)
        routers = []
        for block in self.blocks:
            x, router = block(x, self.angles)
            routers.append(router)
        x = rmsnorm(x, self.norm)
        logits = linear(x, self.head)                                       # (B, T, vocab_size)
        loss = None
        if targets is not None:
            exact = logits.flatten(0, 1).to(self.head.dtype)                # (B T, vocab_size), float32
            loss = F.cross_entropy(exact, targets.flatten())
        router = {}
        for name in routers[0]:
            router[name] = torch.stack([layer[name] for layer in routers])
        return logits, loss, router

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=50):
        """idx (B, T) -> (B, T + max_new_tokens); each new token is one of the top_k likeliest."""
        for _ in range(max_new_tokens):
            logits, _, _ = self(idx[:, -self.config.context_length:])
            logits = logits[:, -1].float().cpu()                            # (B, vocab_size)
            values, choices = logits.topk(top_k)                            # (B, top_k)
            chances = (values / temperature).softmax(-1)
            drawn = torch.multinomial(chances, 1)   # on the CPU: MPS draws impossible ones (pytorch#192577)
            token = choices.gather(1, drawn).to(idx.device)
            idx = torch.cat((idx, token), dim=1)
        return idx

def count(parameters):
    return sum(p.numel() for p in parameters)

def count_parameters(model):
    """total, used per token (top_k of n_experts experts), what Muon and AdamW get with --optimizer muon."""
    total = count(model.parameters())
    muon = count(p for p in model.blocks.parameters() if p.ndim >= 2)
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoE):
            n_experts = len(layer.up)
            idle += count([layer.up, layer.down]) * (n_experts - layer.top_k) // n_experts
    return {"total": total, "used per token": total - idle, "Muon": muon, "AdamW": total - muon}

if __name__ == "__main__":
    for name, preset in PRESETS.items():
        sizes = {f.name: preset.get(f.name, f.default) for f in fields(ModelConfig)}
        config = ModelConfig(**sizes)
        with torch.device("meta"):                                          # shapes without numbers
            counts = count_parameters(Transformer(config))
        print(f"{name:<10}", *[f"{n:>12,} {kind}" for kind, n in counts.items()])
