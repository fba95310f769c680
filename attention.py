"""
model.py's rotary_attention again, for a GPU: FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691) in Triton.

    s_ij = q_i.k_j / sqrt(d_head)       lse_i = log sum_(j <= i) exp(s_ij)
    p_ij = exp(s_ij - lse_i)            y_i = sum_(j <= i) p_ij v_j

Written plainly, s and p are two T x T matrices a head that travel to memory and back. Here one program takes a block of M
queries, goes through keys N at a time, and holds an M x N piece of them in registers. It does not know lse_i before the end:
it measures from the largest s_ij so far, and shrinks what it has summed whenever a larger one turns up. Only y and lse are
written; the backward pass has p again from q, k and lse, and with delta_i = dy_i.y_i

    ds_ij = p_ij (dy_i.v_j - delta_i)   dq_i = sum_j ds_ij k_j / sqrt(d_head)
    dv_j = sum_i p_ij dy_i              dk_j = sum_i ds_ij q_i / sqrt(d_head)

Each row of a gradient is summed by one program: nothing is added up in memory, and every run gives the same bits. rope itself
is left to the compiler, which makes one pass of it; its gradient is taken here, where dq and dk still are in registers.

Why not torch's kernels? With small heads and short sequences time goes into passes over memory, and they leave several to
others: delta, dq in float32, turning dq and dk back, putting three gradients side by side. On one H100, rope and attention
forward and backward, compiled, 32,768 tokens of width 512, in microseconds:

    T, d_head         256, 32   512, 32   1024, 32   256, 64   512, 64   1024, 64
    torch             630       754       1010       492       531       654
    here              327       450       719        281       356       537
"""

import torch
import triton
import triton.language as tl

import model

# Each the fastest of some 30 settings, for d_head 32 on an H100
FORWARD = dict(M=64, N=64, num_warps=4, num_stages=3)
BACKWARD_Q = dict(M=64, N=32, num_warps=4, num_stages=4)
BACKWARD_KV = dict(M=64, N=64, num_warps=4, num_stages=1)

# ----------------------------------------------------------------------------------------------------------------------
# Pieces

@triton.jit
def my_share(T, M: tl.constexpr):
    """A program's head, 0 to B H - 1, and the first of its M positions. Programs of one head are neighbours: its k and v stay
    in the cache."""
    blocks = tl.cdiv(T, M)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * M


@triton.jit
def at(x, n: tl.constexpr, part: tl.constexpr, head, T, H: tl.constexpr, D: tl.constexpr):
    """Where the head begins in x (B, T, n, H, D); its rows are n H D apart."""
    return x + ((head // H * T * n + part) * H + head % H) * D


@triton.jit
def find(qk, qkv, head, T, H: tl.constexpr, D: tl.constexpr):
    """Where its turned q, its turned k and its v begin."""
    return at(qk, 2, 0, head, T, H, D), at(qk, 2, 1, head, T, H, D), at(qkv, 3, 2, head, T, H, D)


@triton.jit
def scores(a, b, D: tl.constexpr):
    """a_i.b_j / sqrt(D), times log2(e): an exponential is a power of two from here on, for which there is an instruction."""
    return tl.dot(a, b.T) * (D ** -0.5 * 1.44269504)


@triton.jit
def load(x, rows, stride: tl.constexpr, T, D: tl.constexpr):
    """Rows of x, as (len(rows), D); zeros from T on."""
    return tl.load(x + rows[:, None] * stride + tl.arange(0, D), rows[:, None] < T, 0.0)


@triton.jit
def store(x, value, rows, stride: tl.constexpr, T, D: tl.constexpr):
    tl.store(x + rows[:, None] * stride + tl.arange(0, D), value.to(x.dtype.element_ty), rows[:, None] < T)


@triton.jit
def turn_back(grad, cos, sin, rows, T, D: tl.constexpr):
    """The gradient of rope's input, from that of its output."""
    c, s = load(cos, rows, D, T, D // 2), load(sin + D // 2, rows, D, T, D // 2)
    a, b = grad.reshape(rows.shape[0], 2, D // 2).permute(0, 2, 1).split()
    return tl.join(a * c + b * s, b * c - a * s).permute(0, 2, 1).reshape(rows.shape[0], D)

# ----------------------------------------------------------------------------------------------------------------------
# Kernels: qk (B, T, 2, H, D) turned, qkv and dqkv (B, T, 3, H, D) not turned, y and dy (B, T, H, D), lse and delta (B, H, T).
# lse is a logarithm to base 2.

@triton.jit
def forward_kernel(qk, qkv, y, lse, T, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    head, first = my_share(T, M)
    i = first + tl.arange(0, M)
    q_at, k_at, v_at = find(qk, qkv, head, T, H, D)
    q = load(q_at, i, 2 * H * D, T, D)
    top, total, out = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, D], tl.float32)
    for start in range(0, first + M, N):
        j = start + tl.arange(0, N)
        k, v = load(k_at, j, 2 * H * D, T, D), load(v_at, j, 3 * H * D, T, D)
        s = tl.where(i[:, None] >= j, scores(q, k, D), -float("inf"))       # (M, N)
        higher = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
        out, total, top = tl.dot(p.to(v.dtype), v, out * shrink[:, None]), total * shrink + tl.sum(p, 1), higher
    store(at(y, 1, 0, head, T, H, D), out / total[:, None], i, H * D, T, D)
    tl.store(lse + head * T + i, top + tl.log2(total), i < T)


@triton.jit
def backward_q_kernel(qk, qkv, cos, sin, y, lse, dy, delta, dqkv, T, H: tl.constexpr, D: tl.constexpr,
                      M: tl.constexpr, N: tl.constexpr):
    head, first = my_share(T, M)
    i = first + tl.arange(0, M)
    q_at, k_at, v_at = find(qk, qkv, head, T, H, D)
    q, dyi = load(q_at, i, 2 * H * D, T, D), load(at(dy, 1, 0, head, T, H, D), i, H * D, T, D)
    d = tl.sum(dyi.to(tl.float32) * load(at(y, 1, 0, head, T, H, D), i, H * D, T, D), 1)
    tl.store(delta + head * T + i, d, i < T)
    l = tl.load(lse + head * T + i, i < T, 0.0)
    dq = tl.zeros([M, D], tl.float32)
    for start in range(0, first + M, N):
        j = start + tl.arange(0, N)
        k, v = load(k_at, j, 2 * H * D, T, D), load(v_at, j, 3 * H * D, T, D)
        p = tl.exp2(scores(q, k, D) - l[:, None])
        ds = tl.where(i[:, None] >= j, p * (tl.dot(dyi, v.T) - d[:, None]), 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq)
    store(at(dqkv, 3, 0, head, T, H, D), turn_back(dq * D ** -0.5, cos, sin, i, T, D), i, 3 * H * D, T, D)


@triton.jit
def backward_kv_kernel(qk, qkv, cos, sin, lse, dy, delta, dqkv, T, H: tl.constexpr, D: tl.constexpr,
                       M: tl.constexpr, N: tl.constexpr):
    head, first = my_share(T, M)
    j = first + tl.arange(0, M)
    q_at, k_at, v_at = find(qk, qkv, head, T, H, D)
    dy_at = at(dy, 1, 0, head, T, H, D)
    k, v = load(k_at, j, 2 * H * D, T, D), load(v_at, j, 3 * H * D, T, D)
    dk, dv = tl.zeros([M, D], tl.float32), tl.zeros([M, D], tl.float32)
    for start in range(first, T, N):
        i = start + tl.arange(0, N)
        q, dyi = load(q_at, i, 2 * H * D, T, D), load(dy_at, i, H * D, T, D)
        l, d = tl.load(lse + head * T + i, i < T, 0.0), tl.load(delta + head * T + i, i < T, 0.0)
        p = tl.exp2(scores(k, q, D) - l)                                    # (M, N), transposed
        p = tl.where(i >= j[:, None], p, 0.0)
        dv = tl.dot(p.to(v.dtype), dyi, dv)
        dk = tl.dot((p * (tl.dot(v, dyi.T) - d)).to(v.dtype), q, dk)
    store(at(dqkv, 3, 1, head, T, H, D), turn_back(dk * D ** -0.5, cos, sin, j, T, D), j, 3 * H * D, T, D)
    store(at(dqkv, 3, 2, head, T, H, D), dv, j, 3 * H * D, T, D)

# ----------------------------------------------------------------------------------------------------------------------
# What torch sees: two operators that torch.compile leaves alone (it would copy what a bare kernel writes to)

def sizes(qk, qkv):
    assert qk.is_contiguous() and qkv.is_contiguous()
    return qk.size(0), qk.size(1), qk.size(2) // 2, qk.size(3)


def empty_outputs(qk, qkv):
    """For y and lse; all that the compiler wants to know of them."""
    B, T, H, D = sizes(qk, qkv)
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("nanolr::attention", mutates_args=())
def attention(qk: torch.Tensor, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """qk (B, T, 2 H, D) turned, qkv (B, T, 3 H, D) not -> y (B, T, H, D), lse (B, H, T)."""
    B, T, H, D = sizes(qk, qkv)
    y, lse = empty_outputs(qk, qkv)
    forward_kernel[B * H * triton.cdiv(T, FORWARD["M"]),](qk, qkv, y, lse, T, H, D, **FORWARD)
    return y, lse


@torch.library.custom_op("nanolr::attention_backward", mutates_args=())
def attention_backward(dy: torch.Tensor, qk: torch.Tensor, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                       y: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The gradient of qkv, through qk as well."""
    dy, delta, dqkv, (B, T, H, D) = dy.contiguous(), torch.empty_like(lse), torch.empty_like(qkv), sizes(qk, qkv)
    q_grid, kv_grid = ((B * H * triton.cdiv(T, setting["M"]),) for setting in (BACKWARD_Q, BACKWARD_KV))
    backward_q_kernel[q_grid](qk, qkv, cos, sin, y, lse, dy, delta, dqkv, T, H, D, **BACKWARD_Q)  # writes delta for the next
    backward_kv_kernel[kv_grid](qk, qkv, cos, sin, lse, dy, delta, dqkv, T, H, D, **BACKWARD_KV)
    return dqkv


attention.register_fake(empty_outputs)
attention_backward.register_fake(lambda dy, qk, qkv, *rest: torch.empty_like(qkv))


class RotaryAttention(torch.autograd.Function):
    """qkv (B, T, 3 H, D), cos and sin (at least T, D) -> y (B, T, H, D); D a power of 2 from 16 on."""
    @staticmethod
    def forward(ctx, qkv, cos, sin):
        qk = model.rope(qkv[:, :, :qkv.size(2) // 3 * 2], cos, sin)
        y, lse = attention(qk, qkv)
        ctx.save_for_backward(qk, qkv, cos, sin, y, lse)
        return y

    @staticmethod
    def backward(ctx, dy):
        return attention_backward(dy, *ctx.saved_tensors), None, None


def rotary_attention(qkv, cos, sin, dropout=0.0):
    """As in model.py: qkv (B, T, 3 H, D) -> y (B, T, H, D); what was not measured to be faster is left to it."""
    if dropout or qkv.element_size() > 2 or qkv.size(1) > 1024 or qkv.size(3) not in (32, 64):
        return model.rotary_attention(qkv, cos, sin, dropout)
    return RotaryAttention.apply(qkv, cos, sin)
