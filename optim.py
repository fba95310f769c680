"""
AdamW and Muon, from scratch.

AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019) divides each weight's averaged gradient by its own typical size:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        w = w - lr (m^ / (sqrt(v^) + eps) + decay w)

so lr is roughly the distance that each single weight moves a step. ^ divides by 1 - b^t, since m and v start at zero.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) treats a matrix as a matrix: it replaces the averaged
gradient U S V' by U V', every singular value 1. The few directions that dominate a gradient no longer drown the others, and
lr is the distance that the matrix moves in every direction. It is for matrices between hidden states only; embeddings, the
head and norms stay with AdamW. U V' comes from five times three matrix products (Newton-Schulz) in place of an SVD.

Each method is a pure function on lists of tensors, `adamw_update` and `muon_update`; the classes around them only keep
state. All work is done in a few large calls: torch._foreach_* runs one operation over many tensors at once, and matrices
of one shape are orthogonalized as one stack, experts included. lr may be a float or a 0-dim tensor: a tensor on the
weights' device can be changed between steps that a CUDA graph or a compiled function replays.

    python optim.py        # singular values of a random gradient before and after Newton-Schulz
"""

import math
from itertools import groupby

import torch
import torch.distributed as dist

# ----------------------------------------------------------------------------------------------------------------------
# AdamW

def adamw_update(params, grads, m, v, step, scale, lr, beta1, beta2, eps, weight_decay):
    """One step on lists of tensors of equal shapes, in place. step (0-dim tensor) counts from 1; scale multiplies grads."""
    grads = torch._foreach_mul(grads, scale)
    correction1 = -torch.expm1(step * math.log(beta1)) if beta1 else 1.0  # 1 - beta^step without float32's cancellation
    correction2 = -torch.expm1(step * math.log(beta2)) if beta2 else step / step
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(m, grads, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
    update = torch._foreach_sqrt(v)
    torch._foreach_div_(update, correction2.sqrt())
    torch._foreach_add_(update, eps)
    update = torch._foreach_div(m, update)
    torch._foreach_mul_(update, lr / correction1)
    torch._foreach_sub_(params, update)


# ----------------------------------------------------------------------------------------------------------------------
# Muon

def newton_schulz(G, steps=5, dtype=torch.float32):
    """
    Approximate U V' of each matrix of G = U S V' (..., rows, cols), in `dtype` (bfloat16 or wider; never float16).

    From X = G / |G|, X <- (a I + b X X' + c (X X')^2) X applies p(s) = a s + b s^3 + c s^5 to every singular value. These
    coefficients (Jordan et al.) rise fastest at 0, at the price of not settling: five steps bring singular values from
    [0.01, 1] into about [0.7, 1.2], which trains as well as exactly 1. A zero matrix stays zero.
    """
    assert G.ndim >= 2 and dtype != torch.float16
    a, b, c = 3.4445, -4.7750, 2.0315
    X, tall = G.to(dtype), G.size(-2) > G.size(-1)
    I = torch.eye(min(G.shape[-2:]), dtype=dtype, device=G.device)
    for i in range(steps):
        A = X.mT @ X if tall else X @ X.mT  # X (X'X) is (X X') X: take the smaller square
        if i == 0:  # X should be G / size, size = |G| = sqrt(trace(A)): dividing the small squares does it
            size = A.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.promote_types(dtype, torch.float32)).sqrt() + 1e-7
            size = size[..., None, None].to(dtype)
            A = A / size**2
        P = a * I + b * A + c * (A @ A)  # with a inside, the large X is touched by products alone
        if i == 0:
            P = P / size
        X = X @ P if tall else P @ X
    return X


def orthogonalize(flat, shapes, ns_steps):
    """
    newton_schulz of matrices that lie one after another in flat (n,); shapes: (..., rows, cols) of each. Returns a list of them.
    Neighbours of equal rows and cols are one stack and one call: on a GPU 30 times faster than one matrix at a time.
    """
    out = []
    for (rows, cols), group in groupby(shapes, key=lambda shape: shape[-2:]):
        group = list(group)
        stack, flat = flat.tensor_split((sum(shape.numel() for shape in group),))
        X = shared_out(lambda part: newton_schulz(part, ns_steps, part.dtype), stack.view(-1, rows, cols))
        out += [x.view(shape) for x, shape in zip(X.split([shape.numel() // (rows * cols) for shape in group]), group)]
    return out


def shared_out(f, stack):
    """f(stack), each process of a torchrun doing an equal share of the matrices; every process gets them all."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return f(stack)
    n, rank = math.ceil(len(stack) / world), dist.get_rank()
    mine = stack[rank * n:(rank + 1) * n]
    mine = f(torch.cat((mine, mine.new_zeros(n - len(mine), *stack.shape[1:])))).contiguous()  # equal shares, the last filled up
    parts = mine.new_empty(world * n, *stack.shape[1:])
    dist.all_gather_into_tensor(parts, mine)
    return parts[:len(stack)]


def muon_update(params, grads, momenta, scale, lr, momentum, weight_decay, ns_steps, dtype):
    """
    One step on lists of tensors (..., rows, cols), in place: Nesterov momentum of scale * grads, orthogonalization, decay.
    Fastest when tensors of equal rows and cols are neighbours in the lists.
    """
    grads = [g * scale for g in grads]
    for g, m in zip(grads, momenta):
        m.lerp_(g, 1 - momentum)
    flat = torch.cat([g.lerp(m, momentum).to(dtype).flatten() for g, m in zip(grads, momenta)])
    if torch.compiler.is_compiling():  # end the graph here: in one with the rest, m is written at its end, and so read twice
        torch._dynamo.graph_break()
    updates = orthogonalize(flat, [p.shape for p in params], ns_steps)
    for p, update in zip(params, updates):
        # A rows x cols matrix with unit singular values has entries of about 1/sqrt(max(rows, cols)); a tall one gets back
        # the factor that makes its outputs change as much as a square one's (Jordan et al.).
        stretch = max(1, p.size(-2) / p.size(-1)) ** 0.5
        p.mul_(1 - lr * weight_decay).sub_(update.to(p.dtype) * (lr * stretch))


# ----------------------------------------------------------------------------------------------------------------------
# What they keep from step to step

def check(**settings):
    for name, (value, valid) in settings.items():
        if not valid:
            raise ValueError(f"{name} cannot be {value}")


class Optimizer(torch.optim.Optimizer):
    """torch's bookkeeping of groups and state; a subclass defines init_state(p) and update_group(...)."""
    # torch wraps these four for its compiler to skip them, and the wrapper imports the compiler: 1 s of every start, even of a
    # run that compiles nothing. Here they are unwrapped.
    add_param_group, zero_grad, state_dict, load_state_dict = (getattr(method, "__wrapped__", method) for method in (
        torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad, torch.optim.Optimizer.state_dict,
        torch.optim.Optimizer.load_state_dict))

    @torch.no_grad()
    def step(self, scale=1.0):
        """One step for all that has a gradient. scale, a float or a 0-dim tensor, multiplies the gradients: so train.py clips."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            params.sort(key=lambda p: p.shape[-2:])  # equal shapes side by side: Muon stacks neighbours
            for p in params:
                if p not in self.state:
                    self.state[p] = self.init_state(p)
            if params:
                self.update_group(group, params, [p.grad for p in params], [self.state[p] for p in params], scale)


class AdamW(Optimizer):
    """
    params: tensors or groups of them; lr > 0; betas in [0, 1); weight_decay is decoupled from the gradient and
    multiplied by lr, as in torch.optim.AdamW, which gives the same numbers. Raises ValueError on anything else.
    """
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        check(lr=(lr, lr > 0), betas=(betas, all(0 <= b < 1 for b in betas)), eps=(eps, eps >= 0),
              weight_decay=(weight_decay, weight_decay >= 0))
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self.update = adamw_update

    def init_state(self, p):
        return {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "step": torch.zeros((), device=p.device)}

    def update_group(self, group, params, grads, states, scale):
        torch._foreach_add_([s["step"] for s in states], 1)
        # One bias correction serves the group: in a language model every tensor has a gradient at every step.
        self.update(params, grads, [s["m"] for s in states], [s["v"] for s in states], states[0]["step"], scale, group["lr"],
                    *group["betas"], group["eps"], group["weight_decay"])


class Muon(Optimizer):
    """
    params: tensors (..., rows, cols), leading dimensions being a stack of separate matrices; lr > 0; momentum in [0, 1);
    dtype: precision of Newton-Schulz, bfloat16 where products in it are fast. Raises ValueError on anything else.
    """
    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, ns_steps=5, dtype=torch.float32):
        check(lr=(lr, lr > 0), momentum=(momentum, 0 <= momentum < 1), weight_decay=(weight_decay, weight_decay >= 0),
              ns_steps=(ns_steps, ns_steps >= 1), dtype=(dtype, dtype != torch.float16))
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps))
        self.dtype, self.update = dtype, muon_update
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim < 2:
                raise ValueError(f"Muon is for matrices; a tensor of shape {tuple(p.shape)} belongs to AdamW")

    def init_state(self, p):
        return {"momentum": torch.zeros_like(p)}

    def update_group(self, group, params, grads, states, scale):
        self.update(params, grads, [s["momentum"] for s in states], scale, group["lr"], group["momentum"], group["weight_decay"],
                    group["ns_steps"], self.dtype)

# ----------------------------------------------------------------------------------------------------------------------
# Who gets what

def is_hidden_matrix(name, p):
    """Muon's share: matrices, or stacks of them, between hidden states."""
    return p.ndim >= 2 and name not in ("embed", "head")


def build_optimizer(model, name, lr, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95, adamw_lr_ratio=0.1):
    """
    The optimizers of a Transformer; each parameter is in exactly one group of exactly one of them.

    "adamw": AdamW for all at lr. "muon": Muon for the stacked matrices of the blocks (router included) at lr, AdamW for
    the rest at adamw_lr_ratio x lr. Decayed: matrices of the blocks and an untied head. Not decayed: norm gains and
    embeddings (a rare word's row would shrink in all the steps that do not contain it), so a tied head is not either.
    Each group keeps its peak rate in "peak_lr"; its "lr" is a tensor on the weights' device, see set_lr.
    """
    named = dict(model.named_parameters())
    hidden = [p for n, p in named.items() if is_hidden_matrix(n, p)]
    head = [p for n, p in named.items() if n == "head"]
    plain = [p for n, p in named.items() if p.ndim < 2 or n == "embed"]
    if name == "adamw":
        optimizers = [AdamW([dict(params=hidden + head), dict(params=plain, weight_decay=0.0)], lr, betas, 1e-8, weight_decay)]
    elif name == "muon":
        groups = [dict(params=head), dict(params=plain, weight_decay=0.0)]
        optimizers = [Muon(hidden, lr, momentum, weight_decay, dtype=model.dtype),
                      AdamW([g for g in groups if g["params"]], lr * adamw_lr_ratio, betas, 1e-8, weight_decay)]
    else:
        raise ValueError(f"unknown optimizer {name!r}; choose adamw or muon")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    owned = [p for group in groups for p in group["params"]]
    assert len(owned) == len(named) and {id(p) for p in owned} == {id(p) for p in named.values()}
    for group in groups:
        group["peak_lr"] = group["lr"]
        group["lr"] = torch.tensor(group["lr"], device=owned[0].device)
    return optimizers


def set_lr(optimizers, factor):
    """Every group's rate becomes factor (from schedule.py) x its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"].fill_(group["peak_lr"] * factor)


if __name__ == "__main__":
    torch.manual_seed(0)
    G = torch.randn(64, 16) @ torch.diag(torch.logspace(0, -2, 16)) @ torch.randn(16, 64)  # rank 16, very uneven
    G /= torch.linalg.matrix_norm(G)
    for steps in range(6):
        s = torch.linalg.svdvals(newton_schulz(G, steps))[:16]
        print(f"{steps} steps: singular values", " ".join(f"{x:.3f}" for x in s[::3].tolist()))
