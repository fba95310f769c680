"""The transformer, dense or mixture-of-experts, in the order in which a token meets it.

    x = embed[token]
    for each layer:   x = x + attention(rmsnorm(x));   x = x + feed_forward(rmsnorm(x))
    logits = rmsnorm(x) @ head.T

It is the modern plain decoder: pre-norm RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021),
no biases, and as feed-forward either SwiGLU (Shazeer 2020), or n_experts small networks of which a router
picks top_k for each token (Shazeer et al. 2017), with the balance loss of Fedus et al. 2021.

- Weights are float32 and are cast to `model.dtype` (bfloat16 where the hardware has it) when they are used.
- Weights that are several matrices side by side, like Q, K and V or the experts, are one stacked tensor
  (n, rows, cols): one product computes them all, and Muon (optim.py) still sees each matrix by itself.
- The experts' work is sorted, not masked: tokens are put in order of their expert, and each multiplies one
  contiguous slice. No token is dropped and none waits in a mask.

    python model.py    # each preset's parameters, those that a token uses, and which optimizer owns them
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class ModelConfig:
    vocab_size: int = 2048
    context_length: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    d_ff: int = 344             # about 8/3 d_model: three matrices cost what 4 d_model does with two
    n_experts: int = 0          # 0: one dense SwiGLU
    top_k: int = 2
    tied: bool = False          # the head re-uses the embedding
    dropout: float = 0.0
    rope_base: float = 10_000.0

    def __post_init__(self):
        if self.d_model % (2 * self.n_heads):       # 2: rotary positions turn pairs
            raise ValueError(f"d_model {self.d_model} must be n_heads {self.n_heads} times an even number; "
                             "change --d-model or --n-heads")
        if self.n_experts and not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k {self.top_k} must be from 1 to {self.n_experts} experts; change --top-k")

DENSE = ModelConfig(vocab_size=10_000, context_length=256, n_heads=16, d_model=512, d_ff=1344)
PRESETS = {
    "tiny": ModelConfig(),
    "dense": DENSE,
    "dense-low": DENSE,         # the same model on an eighth of the tokens
    "moe": ModelConfig(vocab_size=49_152, context_length=512, n_layers=6, n_heads=8, d_model=384, d_ff=1536,
                       n_experts=8, tied=True),
}

# Pure functions -----------------------------------------------------------------------------------

def linear(x, weight):
    """x (..., d_in) times a weight (d_out, d_in) or (n, d_out, d_in), cast to x's dtype: (..., [n] d_out)."""
    return F.linear(x, weight.flatten(0, -2).to(x.dtype))

def rmsnorm(x, gain):
    return F.rms_norm(x, (x.size(-1),), gain.to(x.dtype), eps=1e-6)

def rope_angles(context_length, d_head, base):
    """cos and sin (2, context_length, d_head) of the angle position * base^(-2i / d_head) of pair i."""
    frequencies = base ** (-torch.arange(0, d_head, 2).float() / d_head)
    angles = torch.arange(context_length).float()[:, None] * frequencies    # (context_length, d_head / 2)
    angles = torch.cat((-angles, angles), dim=-1)                           # the first of a pair gets -sin
    return torch.stack((angles.cos(), angles.sin()))

def rope(x, angles):
    """Turn pair (i, i + d_head/2) of x (B, T, n_heads, d_head) by its position: q.k depends on distance."""
    T, d_head = x.size(1), x.size(-1)
    cos, sin = angles[:, :T, None].to(x.dtype)                              # (T, 1, d_head)
    return x * cos + x.roll(d_head // 2, dims=-1) * sin

def attend(q, k, v, dropout=0.0):
    """softmax(q k' / sqrt(d_head)) v over positions up to one's own; q, k, v (B, n_heads, T, d_head)."""
    if not q.is_cpu:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    # On a CPU plain products take half the time of the fused kernel (in bfloat16; tests/bench.py parts) if a
    # block of queries meets only the keys up to its end.
    q = q * q.size(-1) ** -0.5
    out, end = [], 0
    for block in q.split(128, dim=-2):
        start, end = end, end + block.size(-2)
        future = torch.full((end - start, end), -math.inf, dtype=q.dtype).triu(start + 1)
        scores = block @ k[..., :end, :].mT + future                        # (B, n_heads, end - start, end)
        probs = F.dropout(scores.softmax(-1), dropout)
        out.append(probs @ v[..., :end, :])
    return torch.cat(out, dim=-2)

def grouped_linear(x, weight, counts):
    """x (rows, d_in): the first counts[0] rows times weight[0] (d_out, d_in), the next times weight[1] ..."""
    if x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight.mT.to(x.dtype), offs=ends)            # one kernel: nothing waits
    slices = zip(x.split(counts.tolist()), weight.to(x.dtype))              # elsewhere as fast
    return torch.cat([F.linear(rows, matrix) for rows, matrix in slices])

class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of softmax(h @ weight.T), no logits kept; h (N, d), weight (V, d), targets (N,).

    Logits are by far the largest tensor of a small model (dense: 32,768 tokens x 10,000 words), but their
    gradient, softmax - onehot, is known as soon as they are. So a slice of tokens goes through both passes at
    once, and its logits are forgotten before the next slice.
    """
    @staticmethod
    def forward(ctx, h, weight, targets):
        w = weight.to(h.dtype)
        loss = 0.0
        grad_h = []
        grad_w = torch.zeros_like(weight)
        # A slice should stay in a CPU's cache (on a GPU: in 2 GB), but each reads and writes all of grad_w.
        slice_size = max(2**28 if h.is_cuda else 2**22, w.numel())
        n_slices = math.ceil(len(h) * len(w) / slice_size)
        for rows, t in zip(h.chunk(n_slices), targets[:, None].chunk(n_slices)):
            logits = rows @ w.T                                             # (n, V)
            top = logits.amax(-1, keepdim=True).to(weight.dtype)            # (n, 1)
            e = (logits - top).exp_()
            total = e.sum(-1, keepdim=True)                                 # softmax is e / total
            nll = total.log() + top - logits.gather(1, t)                   # (n, 1)
            loss = loss + nll.sum()
            of_target = total * torch.expm1(-nll)                           # total x (p - 1), exact near 0
            grad = e.to(h.dtype).scatter_(1, t, of_target.to(h.dtype))      # total x (softmax - onehot)
            grad_h.append((grad @ w / total).to(h.dtype))
            grad_w += grad.T @ (rows / total).to(h.dtype)
        ctx.save_for_backward(torch.cat(grad_h), grad_w)                    # of the sum over tokens
        return loss / len(h)

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        scale = grad / len(grad_h)      # float32: in bfloat16 it would put every gradient off by up to 0.4%
        return (grad_h * scale).to(grad_h.dtype), grad_w * scale, None

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
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)                                    # (B, T, d_model)
        return linear(y, self.out)

class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, config.d_ff, config.d_model))
        self.down = nn.Parameter(torch.empty(config.d_model, config.d_ff))

    def forward(self, x):
        gate, up = linear(x, self.gate_up).chunk(2, dim=-1)                 # (B, T, d_ff)
        return linear(F.silu(gate) * up, self.down), None                   # no router

class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.up = nn.Parameter(torch.empty(config.n_experts, config.d_ff, config.d_model))
        self.down = nn.Parameter(torch.empty(config.n_experts, config.d_model, config.d_ff))

    def forward(self, x):
        """x (B, T, d) -> its shape again, and the record (2 + n_experts,): balance loss, entropy, shares."""
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
        chosen = experts[:, None] == torch.arange(n_experts, device=x.device)
        counts = chosen.sum(0)                                              # (n_experts,)
        token = (order // k)[:, None].expand(-1, x.size(-1))                # (N k, d), whose assignment it is
        rows = tokens.gather(0, token)                                      # (N k, d)
        hidden = F.silu(grouped_linear(rows, self.up, counts))              # (N k, d_ff)
        out = grouped_linear(hidden, self.down, counts)                     # (N k, d)
        out = out * weights.flatten()[order, None].to(x.dtype)
        y = torch.zeros_like(tokens).scatter_add(0, token, out)             # (N, d)

        # Record: balance is 1 when every expert gets as much, and n_experts / k when one takes all.
        shares = counts / len(order)
        balance = n_experts * (shares * probs.mean(0)).sum()
        entropy = -(probs * probs.clamp_min(1e-9).log()).sum(-1).mean()
        return y.view_as(x), torch.cat((balance[None], entropy[None], shares))

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

    def hidden(self, idx):
        """idx (B, T) -> the last layer, normalized (B, T, d_model), and records (n_layers, 2 + n_experts)."""
        x = F.embedding(idx, self.embed).to(self.dtype)                     # (B, T, d_model)
        routers = []
        for block in self.blocks:
            x, router = block(x, self.angles)
            routers.append(router)
        return rmsnorm(x, self.norm), torch.stack(routers) if self.config.n_experts else None

    def forward(self, idx, targets=None):
        """idx, targets (B, T) -> logits (B, T, vocab_size), mean cross-entropy in nats a token (or None)."""
        h, _ = self.hidden(idx)
        logits = linear(h, self.head)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).to(self.head.dtype), targets.flatten())

    def losses(self, idx, targets):
        """What training needs: forward()'s cross-entropy, without its logits, and the records of hidden()."""
        h, router = self.hidden(idx)
        return HeadLoss.apply(h.flatten(0, 1), self.head, targets.flatten()), router

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) -> (B, T + max_new_tokens), each new token one of the likeliest top_k (None: of all)."""
        context_length = self.config.context_length
        for _ in range(max_new_tokens):
            window = idx[:, -context_length:]
            T = window.size(1)
            # Filled up to a multiple of 64, which no earlier position sees: a GPU plans attention a length.
            padded = F.pad(window, (0, -T % 64))[:, :context_length]
            logits, _ = self(padded)
            logits = logits[:, T - 1].float()                               # (B, vocab_size)
            if top_k:
                lowest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits[logits < lowest] = -math.inf
            token = torch.multinomial((logits / temperature).softmax(-1), 1)
            idx = torch.cat((idx, token), dim=1)
        return idx

# Counting -----------------------------------------------------------------------------------------

def count_parameters(config):
    """total, used per token (top_k of n_experts experts), what Muon and AdamW get with --optimizer muon."""
    d = config.d_model
    n_experts = config.n_experts
    attention = 4 * d * d                                   # q, k, v and out
    feed_forward = 3 * d * config.d_ff                      # gate, up and down
    idle = 0
    if n_experts:
        expert = 2 * d * config.d_ff                        # up and down
        feed_forward = n_experts * (expert + d)             # d: its row of the router
        idle = config.n_layers * (n_experts - config.top_k) * expert
    muon = config.n_layers * (attention + feed_forward)
    adamw = (2 * config.n_layers + 1) * d                   # norms
    adamw += config.vocab_size * d * (2 - config.tied)      # embedding and head
    return {"total": muon + adamw, "used per token": muon + adamw - idle, "Muon": muon, "AdamW": adamw}

if __name__ == "__main__":
    for name, config in PRESETS.items():
        counts = count_parameters(config)
        print(f"{name:<10}", *[f"{n:>12,} {kind}" for kind, n in counts.items()])
