"""AdamW, Muon and plain gradient descent, from scratch.

AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019) divides each weight's averaged gradient by its own typical
size, so that lr is roughly the distance that each single weight moves a step (^: divided by 1 - b^t):

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      w = w - lr (m^ / (sqrt(v^) + eps) + decay w)

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the averaged gradient U S V' of
a matrix by U V', every singular value 1: the few directions that dominate a gradient no longer drown the
others, and lr is the distance that the matrix moves in every direction. It is for matrices between hidden
states only; embeddings, the head and norms stay with AdamW.

Each method is a pure function on lists of tensors; the classes around them only keep state. lr and scale are
0-dim tensors on the weights' device, so that a compiled step or a CUDA graph sees them change. scale is a
factor on the gradients, for clipping; at 0 the weights stay as they are, whatever the gradients.

    python optim.py        # singular values of a random gradient before and after Newton-Schulz
"""
import math

import torch
import torch.distributed as dist

# --------------------------------------------------------------------------------------------------
# The mathematics: one step on lists of tensors, in place

def scaled(g, scale):
    """g * scale, and zeros for a scale of 0 even where g is not finite."""
    return torch.where(scale > 0, g * scale, 0.0)

def bias_correction(beta, step):
    """1 - beta^step, without float32's cancellation."""
    return -torch.expm1(step * math.log(max(beta, 1e-30)))

def adamw_update(params, grads, ms, vs, step, scale, lr, betas, eps, weight_decay):
    """step (0-dim tensor) counts from 1."""
    beta1, beta2 = betas
    correction1 = bias_correction(beta1, step)
    correction2 = bias_correction(beta2, step)
    lr = lr * (scale > 0)
    for p, g, m, v in zip(params, grads, ms, vs):
        g = scaled(g, scale)
        m.lerp_(g, 1 - beta1)
        v.lerp_(g * g, 1 - beta2)
        update = (m / correction1) / ((v / correction2).sqrt() + eps)
        p.mul_(1 - lr * weight_decay).sub_(lr * update)

def sgd_update(params, grads, velocities, scale, lr, momentum, weight_decay):
    """Gradient descent w = w - lr u with u = momentum u + g (momentum 0: the textbook's)."""
    lr = lr * (scale > 0)
    for p, g, u in zip(params, grads, velocities):
        u.mul_(momentum).add_(scaled(g, scale))
        p.mul_(1 - lr * weight_decay).sub_(lr * u)

def newton_schulz(G, steps=5):
    """Approximate U V' of each matrix of G = U S V' (..., rows, cols), in G's dtype (never float16).

    From X = G / |G|, X <- (a I + b X X' + c (X X')^2) X applies p(s) = a s + b s^3 + c s^5 to every singular
    value. These coefficients (Jordan et al.) rise fastest at 0, at the price of not settling: five steps
    bring [0.01, 1] into about [0.7, 1.2], which trains as well as exactly 1. A zero matrix stays zero.
    """
    assert G.ndim >= 2 and G.dtype != torch.float16
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.size(-2) > G.size(-1)
    I = torch.eye(min(G.shape[-2:]), dtype=G.dtype, device=G.device)
    norm = torch.linalg.matrix_norm(G, keepdim=True, dtype=torch.promote_types(G.dtype, torch.float32))
    X = G / (norm + 1e-7).to(G.dtype)
    for _ in range(steps):
        A = X.mT @ X if tall else X @ X.mT      # X (X'X) is (X X') X: take the smaller square
        P = a * I + b * A + c * (A @ A)         # with a inside, the large X is touched by products alone
        X = X @ P if tall else P @ X
    return X

def muon_update(params, grads, momenta, scale, lr, momentum, weight_decay, ns_steps, dtype):
    """Tensors (..., rows, cols); Nesterov momentum, Newton-Schulz in dtype, decay."""
    lr = lr * (scale > 0)
    by_shape = {}
    for p, g, m in zip(params, grads, momenta):
        g = scaled(g, scale)
        m.lerp_(g, 1 - momentum)
        ahead = g.lerp(m, momentum).to(dtype)
        by_shape.setdefault(p.shape[-2:], []).append((p, ahead))
    for (rows, cols), group in by_shape.items():
        # One stack and one call: on a GPU 30 times faster than one matrix at a time.
        stack = torch.cat([ahead.reshape(-1, rows, cols) for _, ahead in group])
        stack = orthogonalize(stack, ns_steps)
        # Entries are about 1/sqrt(max(rows, cols)): a tall matrix gets back the factor that makes its outputs
        # change as much as a square one's (Jordan et al.).
        stretch = max(1, rows / cols) ** 0.5
        first = 0
        for p, ahead in group:
            last = first + ahead.numel() // (rows * cols)
            update = stack[first:last].view_as(p).to(p.dtype)
            p.mul_(1 - lr * weight_decay).sub_(update * (lr * stretch))
            first = last

def orthogonalize(stack, ns_steps):
    """newton_schulz of a stack (n, rows, cols), each process of a torchrun doing a share of the matrices."""
    if not (dist.is_available() and dist.is_initialized()):
        return newton_schulz(stack, ns_steps)
    world = dist.get_world_size()
    missing = -len(stack) % world       # equal shares: the last one is filled up with zeros
    filled = torch.cat((stack, stack.new_zeros(missing, *stack.shape[1:])))
    mine = newton_schulz(filled.chunk(world)[dist.get_rank()], ns_steps)
    out = torch.empty_like(filled)
    dist.all_gather_into_tensor(out, mine.contiguous())
    return out[:len(stack)]

# --------------------------------------------------------------------------------------------------
# The edge of stability: along an eigenvector of the loss's Hessian with eigenvalue h, gradient descent
# multiplies the distance from the bottom by 1 - lr h a step: above h = 2 / lr it swings ever wider

def top_eigenvalue(product, start, tolerance=0.003, max_products=40):
    """Largest eigenvalue of a symmetric matrix H known by product(v) = H v, by Lanczos iteration.

    start (n,) of any length -> eigenvalue, unit eigenvector (n,), tolerance |H v - h v| / |h| reached; nan,
    zeros, nan where H v is not finite. k products span a space in which H is k x k; its top eigenpair is the
    estimate. The error of h is about the tolerance squared over the relative gap to the next one.
    """
    basis = start.new_empty(max_products, len(start))
    small = torch.zeros(max_products, max_products, dtype=torch.float64)    # on the CPU; lower triangle
    q = start / start.norm()
    for k in range(max_products):
        basis[k] = q
        known = basis[:k + 1]
        Hq = product(q)
        overlap = known @ Hq
        small[k, :k + 1] = overlap
        rest = Hq - overlap @ known
        rest -= (known @ rest) @ known          # again: rounding leaves some of what was taken out
        size = rest.norm().item()
        if not math.isfinite(size):
            return math.nan, torch.zeros_like(start), math.nan
        values, vectors = torch.linalg.eigh(small[:k + 1, :k + 1])
        value = values[-1].item()
        reached = size * abs(vectors[k, -1].item()) / max(abs(value), 1e-30)
        if reached <= tolerance:
            break
        q = rest / size
    v = vectors[:, -1].to(known) @ known
    return value, v / v.norm(), reached

def adamw_preconditioner(grads, vs, step, betas, eps):
    """P of the next update w - lr P^-1 m; the top eigenvalue of P^-1/2 H P^-1/2 is AdamW's sharpness."""
    correction1, correction2 = (bias_correction(beta, step + 1) for beta in betas)
    after = [v.lerp(g * g, 1 - betas[1]) for g, v in zip(grads, vs)]
    return [correction1 * ((v / correction2).sqrt() + eps) for v in after]

def stability_threshold(name, lr, momentum, beta1):
    """The sharpness above which a quadratic diverges (Cohen et al. 2021, 2022); None: there is none known.

    Decay hardly changes it; clipping by a factor s raises sgd's to 1 / s of it, and leaves adamw's.
    """
    if lr == 0:
        return None
    if name == "sgd":
        return 2 * (1 + momentum) / lr
    if name == "adamw":
        return 2 * (1 + beta1) / ((1 - beta1) * lr)
    return None

# --------------------------------------------------------------------------------------------------
# What they keep from step to step

class Optimizer:
    """params: tensors, or groups: dicts of "params" and the settings that differ from the defaults.

    A group also has the lists of tensors in `kept`, and "lr", a tensor: "peak_lr" x the factor of set_lr. The
    entries in `arguments` are what its update needs besides gradients and scale.
    """
    def __init__(self, params, **defaults):
        groups = list(params)
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self.param_groups = [{**defaults, **group} for group in groups]
        for group in self.param_groups:
            if not group["lr"] > 0 or not group["weight_decay"] >= 0:
                raise ValueError(f"lr {group['lr']} must be above 0, decay {group['weight_decay']} not below")
            device = group["params"][0].device
            group["peak_lr"] = group["lr"]
            group["lr"] = torch.tensor(group["lr"], device=device)
            group["step"] = torch.zeros((), device=device)
            for name in self.kept:
                group[name] = [torch.zeros_like(p) for p in group["params"]]

    def set_lr(self, factor):
        """Every group's rate becomes factor (from schedule.py) x its peak."""
        for group in self.param_groups:
            group["lr"].fill_(group["peak_lr"] * factor)

    @torch.no_grad()
    def step(self, scale=1.0):
        """One update of all parameters; scale, a float or 0-dim tensor, multiplies their gradients."""
        for group in self.param_groups:
            group["step"] += 1
            grads = [p.grad for p in group["params"]]
            scale = torch.as_tensor(scale, device=group["lr"].device)
            self.update(grads=grads, scale=scale, **{name: group[name] for name in self.arguments})

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self):
        return [{name: group[name] for name in ("step", *self.kept)} for group in self.param_groups]

    def load_state_dict(self, saved):
        for group, state in zip(self.param_groups, saved):
            group["step"].copy_(state["step"])
            for name in self.kept:
                for tensor, value in zip(group[name], state[name], strict=True):
                    tensor.copy_(value)

    def compile(self, **settings):
        self.update = torch.compile(self.update, dynamic=False, **settings)

class AdamW(Optimizer):
    """weight_decay is decoupled from the gradient and multiplied by lr: the same as torch.optim.AdamW."""
    kept = ("ms", "vs")
    arguments = ("params", *kept, "step", "lr", "betas", "eps", "weight_decay")
    update = staticmethod(adamw_update)

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), not {betas}")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

class Muon(Optimizer):
    """params (..., rows, cols): the leading dimensions are a stack of matrices. dtype: of Newton-Schulz."""
    kept = ("momenta",)
    arguments = ("params", *kept, "lr", "momentum", "weight_decay", "ns_steps", "dtype")
    update = staticmethod(muon_update)

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, ns_steps=5, dtype=torch.float32):
        if dtype == torch.float16:
            raise ValueError("Newton-Schulz needs the range of bfloat16; float16 overflows")
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps,
                         dtype=dtype)
        if any(p.ndim < 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon is for matrices; parameters of one dimension belong to AdamW")

class SGD(Optimizer):
    kept = ("velocities",)
    arguments = ("params", *kept, "lr", "momentum", "weight_decay")
    update = staticmethod(sgd_update)

    def __init__(self, params, lr=0.1, momentum=0.0, weight_decay=0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

# --------------------------------------------------------------------------------------------------
# Who gets what

def build_optimizer(model, name, lr, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95, adamw_lr_ratio=0.1):
    """The optimizers of a Transformer, a list; each parameter is in one group of one of them.

    "adamw" and "sgd": one for all at lr. "muon": Muon for the matrices between hidden states (the router's
    too) at lr, AdamW for the rest at adamw_lr_ratio x lr. Norm gains and embeddings (tied heads too) do not
    decay: a rare word's row would shrink in all the steps that do not contain it.
    """
    hidden, head, plain = [], [], []
    for key, p in model.named_parameters():
        if p.ndim < 2 or key == "embed":
            plain.append(p)
        elif key == "head":
            head.append(p)
        else:
            hidden.append(p)
    undecayed = {"params": plain, "weight_decay": 0.0}
    if name == "adamw":
        return [AdamW([{"params": hidden + head}, undecayed], lr, betas, weight_decay=weight_decay)]
    if name == "sgd":
        return [SGD([{"params": hidden + head}, undecayed], lr, momentum, weight_decay)]
    if name == "muon":
        rest = [{"params": head}, undecayed] if head else [undecayed]
        return [Muon(hidden, lr, momentum, weight_decay, dtype=model.dtype),
                AdamW(rest, lr * adamw_lr_ratio, betas, weight_decay=weight_decay)]
    raise ValueError(f"unknown optimizer {name!r}; choose adamw, muon or sgd")

if __name__ == "__main__":
    torch.manual_seed(0)
    G = torch.randn(64, 16) * torch.logspace(0, -2, 16)
    for steps in range(6):
        print(f"{steps} steps: singular values", torch.linalg.svdvals(newton_schulz(G, steps))[::3])
