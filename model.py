"""
The transformer, dense or mixture-of-experts, in the order in which a token meets it.

    x = embed[token]
    for each layer:   x = x + attention(rmsnorm(x));   x = x + feed_forward(rmsnorm(x))
    logits = rmsnorm(x) @ head.T

It is the modern plain decoder: pre-norm RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), no biases,
and as feed-forward either SwiGLU (Shazeer 2020), or n_experts small networks of which a router picks top_k for each
token (Shazeer et al. 2017; the balance loss is the Switch Transformer's, Fedus et al. 2021).

Three conventions keep it short and fast:
- Weights are float32 and are cast to `model.dtype` (bfloat16 where the hardware has it) at the moment they are used.
- Weights that are several matrices side by side, like Q, K and V or the experts, are one stacked tensor (n, rows, cols):
  one product computes them all, and Muon (optim.py) still sees each matrix by itself.
- The experts' work is sorted, not masked: tokens are put in order of their expert, so that each expert multiplies one
  contiguous slice. No token is dropped, none waits in a mask, and on a GPU with a fused kernel for it (Hopper, Blackwell)
  the host never waits for a count.

    python model.py        # a table: each preset's parameters, those a token uses, and which optimizer owns them
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
    d_ff: int = 344             # about 8/3 d_model: SwiGLU has three matrices, so this costs what 4 d_model does with two
    n_experts: int = 0          # 0: one dense SwiGLU
    top_k: int = 2
    tied: bool = False          # the head re-uses the embedding
    dropout: float = 0.0
    rope_base: float = 10_000.0

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "n_layers", "n_heads", "d_model", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(f"d_model {self.d_model} must be n_heads {self.n_heads} times an even number; "
                             "change --d-model or --n-heads")
        if self.n_experts < 0 or (self.n_experts and not 1 <= self.top_k <= self.n_experts):
            raise ValueError(f"top_k {self.top_k} must be between 1 and the {self.n_experts} experts; change --top-k")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


PRESETS = {
    "tiny": ModelConfig(),
    "dense": ModelConfig(vocab_size=10_000, context_length=256, n_layers=4, n_heads=16, d_model=512, d_ff=1344),
    "dense-low": ModelConfig(vocab_size=10_000, context_length=256, n_layers=4, n_heads=16, d_model=512, d_ff=1344),
    "moe": ModelConfig(vocab_size=49_152, context_length=512, n_layers=6, n_heads=8, d_model=384, d_ff=1536,
                       n_experts=8, top_k=2, tied=True),
}

# ----------------------------------------------------------------------------------------------------------------------
# Pure functions

def linear(x, weight):
    """x (..., d_in) times a float32 weight (d_out, d_in) or (n, d_out, d_in), cast to x's dtype: (..., [n *] d_out)."""
    return F.linear(x, weight.flatten(0, -2).to(x.dtype))


def rmsnorm(x, gain):
    return F.rms_norm(x, (x.size(-1),), gain.to(x.dtype), eps=1e-6)


def rope_tables(context_length, d_head, base):
    """cos and signed sin, each (context_length, d_head), of position * base^(-2i / d_head) for the pairs (i, i + d_head/2)."""
    frequencies = base ** (-torch.arange(0, d_head, 2).float() / d_head)
    angles = torch.arange(context_length).float()[:, None] * frequencies
    return angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)


def rope(x, cos, sin):
    """Turn each pair (i, i + d_head/2) of x (B, T, n_heads, d_head) by its position's angle: q.k then depends on distance."""
    cos, sin = cos[:x.size(1), None].to(x.dtype), sin[:x.size(1), None].to(x.dtype)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def attend(q, k, v, dropout=0.0):
    """softmax(q k' / sqrt(d_head)) v over positions up to one's own; q, k, v (B, n_heads, T, d_head)."""
    if not q.is_cpu:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    # On a CPU the fused kernel's backward is slow at these sizes; plain products over blocks of queries, each with the
    # keys up to its end, take half its time for the dense preset and a fifth for tiny (tests/bench.py train).
    shape, T, out = q.shape, q.size(-2), []
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    for i in range(0, T, 128):
        j = min(i + 128, T)
        future = torch.ones(j - i, j, dtype=torch.bool).triu(i + 1)
        mask = q.new_zeros(j - i, j).masked_fill(future, -math.inf).expand(q.size(0), -1, -1)
        scores = torch.baddbmm(mask, q[:, i:j], k[:, :j].mT, alpha=q.size(-1) ** -0.5)    # (B n_heads, j - i, j)
        probs = F.dropout(scores.softmax(-1), dropout) if dropout else scores.softmax(-1)
        out.append(probs @ v[:, :j])
    return torch.cat(out, dim=1).unflatten(0, shape[:2])


def rotary_attention(qkv, cos, sin, dropout=0.0):
    """rope and attend: qkv (B, T, 3 n_heads, d_head) -> (B, T, n_heads, d_head)."""
    n_heads = qkv.size(2) // 3
    qk, v = qkv.split((2 * n_heads, n_heads), dim=2)
    q, k, v = (t.transpose(1, 2) for t in (*rope(qk, cos, sin).chunk(2, dim=2), v))     # (B, n_heads, T, d_head)
    return attend(q, k, v, dropout).transpose(1, 2)


def grouped_linear(x, weight, ends):
    """
    Rows of x (rows, d_in), sorted by expert, times that expert's matrix of weight (n_experts, d_out, d_in).
    ends (n_experts,) int32 holds the row at which each expert's slice ends; an empty slice is fine.
    On CUDA one kernel reads `ends` on the device; elsewhere a loop over slices is as fast (tests/bench.py moe).
    """
    if x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weight.mT.to(x.dtype), offs=ends)  # cast as the product wants it: compiled, once and not twice
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes), weight.to(x.dtype))])


class Permute(torch.autograd.Function):
    """x[order] for a permutation, given its inverse: the gradient is then a gather too, not a scatter of atomic adds."""
    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


class LinearCrossEntropy(torch.autograd.Function):
    """
    mean cross-entropy of softmax(h @ weight.T), keeping no logits for the backward pass: h (N, d), weight (V, d), targets (N,).

    Logits are by far the largest tensor of a small model (dense preset: 32,768 tokens x 10,000 words). Their gradient is
    known as soon as they are, softmax - onehot, so a slice of tokens is carried to the end of both passes and forgotten.
    Measured from its target's logit l_t a token's loss is log(sum_j e_j) with e_j = exp(l_j - l_t), and the gradient is
    (e_j - [j = t] sum_i e_i) / sum_i e_i: one pass over the logits, the division being done on the far smaller h. That sum is
    at least 1; so that it stays finite, l_j - l_t is cut at 70, which only a token with a loss of over 70 nats can notice.
    """
    @staticmethod
    def forward(ctx, h, weight, targets):
        assert h.dtype != torch.float16  # e_j needs the range of bfloat16
        w, wide = weight.to(h.dtype), torch.promote_types(h.dtype, torch.float32)
        loss, grad_h, grad_w = h.new_zeros((), dtype=wide), [], torch.zeros_like(weight)
        # A slice's logits should stay in the cache (GPU: below 2 GB with copies), but each reads and writes all of grad_w.
        n_slices = math.ceil(h.size(0) * w.size(0) / max(2**28 if h.is_cuda else 2**22, w.numel()))
        for rows, t in zip(h.chunk(n_slices), targets[:, None].chunk(n_slices)):
            logits = rows @ w.T
            e = logits.sub(logits.gather(1, t).to(wide)).clamp_(max=70).exp_()
            total = e.sum(-1, keepdim=True)
            loss = loss + total.log().sum()
            grad = e.to(h.dtype).scatter_(1, t, (1 - total).to(h.dtype))
            grad_h.append(((grad @ w) / total).to(h.dtype))
            grad_w += grad.T @ (rows / total).to(h.dtype)
        ctx.save_for_backward(torch.cat(grad_h), grad_w)  # of the sum over tokens; backward makes them those of the mean
        return loss / h.size(0)

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        grad = grad / grad_h.size(0)  # used in float32: in bfloat16 it would put every gradient below off by up to 0.4%
        return (grad_h.to(grad.dtype) * grad).to(grad_h.dtype), grad_w * grad, None

# ----------------------------------------------------------------------------------------------------------------------
# The layers

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_heads, self.dropout = c.n_heads, c.dropout
        self.core = rotary_attention  # compiled for a GPU it is attention.py's, which does the same in less time
        self.qkv = nn.Parameter(torch.empty(3, c.d_model, c.d_model))
        self.out = nn.Parameter(torch.empty(c.d_model, c.d_model))

    def forward(self, x, cos, sin):
        qkv = linear(x, self.qkv).unflatten(-1, (3 * self.n_heads, -1))             # (B, T, 3 n_heads, d_head)
        return linear(self.core(qkv, cos, sin, self.dropout if self.training else 0.0).flatten(2), self.out)


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, c.d_ff, c.d_model))
        self.down = nn.Parameter(torch.empty(c.d_model, c.d_ff))

    def forward(self, x):
        gate, up = linear(x, self.gate_up).chunk(2, dim=-1)  # (B, T, d_ff)
        return linear(F.silu(gate) * up, self.down), None


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.top_k = c.top_k
        self.router = nn.Parameter(torch.empty(c.n_experts, c.d_model))
        self.up = nn.Parameter(torch.empty(c.n_experts, c.d_ff, c.d_model))
        self.down = nn.Parameter(torch.empty(c.n_experts, c.d_model, c.d_ff))

    def forward(self, x):
        """x (B, T, d) -> the same shape, and the router's figures (2 + n_experts,): balance loss, entropy, shares."""
        n_experts, k = self.router.size(0), self.top_k
        tokens = x.flatten(0, 1)                                                # (N, d)
        wide = torch.promote_types(x.dtype, torch.float32)                      # routing decisions deserve full precision
        probs = F.linear(tokens.to(wide), self.router).softmax(-1)              # (N, n_experts)
        weights, experts = (t[:, :k] for t in probs.sort(descending=True))      # (N, k); the compiler fuses it, but not topk
        weights = weights / weights.sum(-1, keepdim=True)

        narrow = torch.uint8 if n_experts <= 256 else torch.int16               # CUDA sorts a byte of the key a pass
        order = experts.flatten().to(narrow).argsort(stable=True)               # (N k,) assignments, sorted by expert
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        chosen = experts.flatten()[:, None] == torch.arange(n_experts, device=x.device)
        counts = chosen.sum(0)                                                  # (n_experts,) without a host sync
        ends = counts.cumsum(0).to(torch.int32)

        copies = tokens[:, None].expand(-1, k, -1).flatten(0, 1)                # (N k, d): a token once for each expert
        hidden = F.silu(grouped_linear(Permute.apply(copies, order, inverse), self.up, ends))
        y = Permute.apply(grouped_linear(hidden, self.down, ends), inverse, order)
        y = (y.view(-1, k, x.size(-1)) * weights[..., None].to(x.dtype)).sum(1)

        share = counts / order.numel()
        balance = n_experts * (share * probs.mean(0)).sum()                     # 1 when even, up to n_experts / k at collapse
        entropy = -(probs * probs.clamp_min(1e-9).log()).sum(-1).mean()
        return y.view_as(x), torch.cat((balance[None], entropy[None], share))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(c.d_model)), nn.Parameter(torch.ones(c.d_model))
        self.attention = Attention(c)
        self.feed_forward = MoE(c) if c.n_experts else SwiGLU(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, cos, sin):
        x = x + self.dropout(self.attention(rmsnorm(x, self.norm1), cos, sin))
        y, router = self.feed_forward(rmsnorm(x, self.norm2))
        return x + self.dropout(y), router

# ----------------------------------------------------------------------------------------------------------------------
# The model

class Transformer(nn.Module):
    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.head = self.embed if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        cos, sin = rope_tables(config.context_length, config.d_model // config.n_heads, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():  # GPT-2's: 0.02, and less where 2 n_layers outputs add up in x
            if p.ndim >= 2:
                residual = name.endswith(("attention.out", "feed_forward.down"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)

    def hidden(self, idx):
        """idx (B, T) -> the normalized last layer (B, T, d_model) and the routers' figures (n_layers, 2 + n_experts) or None."""
        assert idx.size(1) <= self.config.context_length, f"{idx.size(1)} tokens exceed context_length"
        x, figures = F.embedding(idx, self.embed).to(self.dtype), []
        for block in self.blocks:
            x, router = block(x, self.cos, self.sin)
            figures.append(router)
        return rmsnorm(x, self.norm), torch.stack(figures) if self.config.n_experts else None

    def forward(self, idx, targets=None):
        """idx, targets (B, T) -> logits (B, T, vocab_size) and the mean cross-entropy in nats a token (None without targets)."""
        logits = linear(self.hidden(idx)[0], self.head)
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten())
        return logits, loss

    def losses(self, idx, targets):
        """What training needs: the cross-entropy of forward(), without its logits, and the routers' figures of hidden()."""
        h, router = self.hidden(idx)
        return LinearCrossEntropy.apply(h.flatten(0, 1), self.head, targets.flatten()), router

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T) by max_new_tokens samples; temperature 0 takes the likeliest, top_k the best few only."""
        for _ in range(max_new_tokens):
            window = idx[:, -self.config.context_length:]
            # Filled up to a multiple of 64, which no earlier position sees: torch's attention on a GPU plans each new length anew.
            padded = F.pad(window, (0, min(-window.size(1) % 64, self.config.context_length - window.size(1))))
            logits = self(padded)[0][:, window.size(1) - 1].float()  # (B, vocab_size)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                if top_k:
                    logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
                token = torch.multinomial((logits / temperature).softmax(-1), 1)
            idx = torch.cat((idx, token), dim=1)
        return idx

# ----------------------------------------------------------------------------------------------------------------------
# Counting

def count_parameters(model):
    """total, used by one token (top_k of n_experts experts), and the shares of Muon and AdamW under --optimizer muon."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}  # a tied head appears once
    c = model.config
    idle = sum(n for name, n in sizes.items() if c.n_experts and name.endswith(("feed_forward.up", "feed_forward.down")))
    muon = sum(p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and name not in ("embed", "head"))
    total = sum(sizes.values())
    used = total - (idle * (c.n_experts - c.top_k) // c.n_experts if c.n_experts else 0)
    return {"total": total, "used per token": used, "Muon": muon, "AdamW": total - muon}


if __name__ == "__main__":
    print(f"{'preset':<12}{'total':>14}{'used per token':>18}{'Muon':>14}{'AdamW':>14}")
    for name, config in PRESETS.items():
        with torch.device("meta"):
            counts = count_parameters(Transformer(config))
        print(f"{name:<12}{counts['total']:>14,}{counts['used per token']:>18,}{counts['Muon']:>14,}{counts['AdamW']:>14,}")
