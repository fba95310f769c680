"""AdamW, Muon and gradient descent from scratch, and the edge of stability that limits their rates.

AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019) divides each weight's averaged gradient by its own typical
size, so that lr is roughly the distance that each single weight moves a step (^: divided by 1 - b^t):

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      w = w - lr (m^ / (sqrt(v^) + eps) + decay w)

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the averaged gradient U S V' of
a matrix by U V', every singular value 1: the few directions that dominate a gradient no longer drown the
others, and lr is the distance that the matrix moves in every direction. It is for matrices between hidden
states only; embeddings, the head and norms stay with AdamW.

Each method is a pure function on lists of tensors; one class keeps their state. lr, step and scale are 0-dim
tensors on the weights' device, so that a compiled step or a CUDA graph sees them change.

    python optim.py        # singular values of a random G / |G|, and after each step of Newton-Schulz
"""
import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

# The mathematics: one step on lists of tensors, in place ------------------------------------------

def bias_correction(beta, step):
    """1 - beta^step, without float32's cancellation."""
    return -torch.expm1(step * math.log(max(beta, 1e-30)))

def adamw_update(params, grads, ms, vs, step, lr, betas, eps, weight_decay):
    step += 1
    beta1, beta2 = betas
    correction1, correction2 = (bias_correction(beta, step) for beta in betas)
    for p, g, m, v in zip(params, grads, ms, vs):
        m.lerp_(g, 1 - beta1)
        v.lerp_(g * g, 1 - beta2)
        update = (m / correction1) / ((v / correction2).sqrt() + eps)
        p.mul_(1 - lr * weight_decay).sub_(lr * update)

def sgd_update(params, grads, velocities, lr, momentum, weight_decay):
    """Gradient descent w = w - lr u with u = momentum u + g (momentum 0: the textbook's)."""
    for p, g, u in zip(params, grads, velocities):
        u.mul_(momentum).add_(g)
        p.mul_(1 - lr * weight_decay).sub_(lr * u)

def newton_schulz(G, steps=5):
    """Approximate U V' of each matrix of G = U S V' (..., rows, cols), in G's dtype (float16 overflows).

    From X = G / |G|, X <- (a I + b X X' + c (X X')^2) X applies p(s) = a s + b s^3 + c s^5 to every singular
    value. These coefficients (Jordan et al.) rise fastest at 0, at the price of not settling: five steps
    bring [0.01, 1] into about [0.7, 1.2], which trains as well as exactly 1. A zero matrix stays zero.
    """
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

def shared_newton_schulz(stack):
    """newton_schulz of a stack (n, rows, cols), each process of a torchrun doing a share of the matrices."""
    if not dist.is_initialized():
        return newton_schulz(stack)
    world = dist.get_world_size()
    filled = F.pad(stack, (0, 0, 0, 0, 0, -len(stack) % world))     # with zeros, to equal shares
    mine = newton_schulz(filled.chunk(world)[dist.get_rank()])
    out = torch.empty_like(filled)
    dist.all_gather_into_tensor(out, mine)
    return out[:len(stack)]

def muon_update(params, grads, momenta, lr, momentum, weight_decay, dtype):
    """Nesterov momentum, and Newton-Schulz in dtype of every matrix in parameters (..., rows, cols)."""
    by_shape = {}
    for p, g, m in zip(params, grads, momenta):
        m.lerp_(g, 1 - momentum)
        ahead = g.lerp(m, momentum).to(dtype)
        shape = (-1, *p.shape[-2:])
        by_shape.setdefault(shape, []).append((p.view(shape), ahead.reshape(shape)))
    for (_, rows, cols), group in by_shape.items():
        # One stack and one call: on a GPU 30 times faster than one matrix at a time.
        weights, aheads = zip(*group)
        stack = shared_newton_schulz(torch.cat(aheads))                 # (n, rows, cols)
        # Entries are about 1/sqrt(max(rows, cols)): a tall matrix gets back the factor that makes its outputs
        # change as much as a square one's (Jordan et al.).
        stretch = max(1, rows / cols) ** 0.5
        sizes = [len(W) for W in weights]
        for W, update in zip(weights, stack.split(sizes)):
            W.mul_(1 - lr * weight_decay).sub_(update.to(W.dtype) * (lr * stretch))

def scaled_update(update, params, grads, scale, lr, **others):
    """update with gradients times scale, for clipping; at 0 no weight moves, whatever the gradients."""
    grads = [torch.where(scale > 0, g * scale, 0.0) for g in grads]
    update(params, grads, lr=lr * (scale > 0), **others)

# The edge of stability ----------------------------------------------------------------------------
#
# Along an eigenvector of the loss's Hessian with eigenvalue h, gradient descent
# multiplies the distance from the bottom by 1 - lr h a step: above h = 2 / lr it swings ever wider

def top_eigenvalue(product, start, tolerance=0.003, max_products=40):
    """Largest eigenvalue of a symmetric matrix H known by product(v) = H v, by Lanczos iteration.

    start (n,), of any norm -> eigenvalue h, unit eigenvector v (n,), |H v - h v| / |h|; or nan, zeros, nan
    where H v is not finite. k products span a space in which H is k x k; its top eigenpair is the estimate.
    The error of h is about the tolerance squared over the relative gap to the next one.
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
        h = values[-1].item()
        reached = size * abs(vectors[k, -1].item()) / max(abs(h), 1e-30)
        if reached <= tolerance:
            break
        q = rest / size
    v = vectors[:, -1].to(known) @ known
    return h, v / v.norm(), reached

def adamw_preconditioner(grads, vs, step, betas, eps):
    """P of the next update w - lr P^-1 m; the top eigenvalue of P^-1/2 H P^-1/2 is AdamW's sharpness."""
    correction1, correction2 = (bias_correction(beta, step + 1) for beta in betas)
    P = []
    for g, v in zip(grads, vs):
        v = v.lerp(g * g, 1 - betas[1])
        P.append(correction1 * ((v / correction2).sqrt() + eps))
    return P

def stability_threshold(name, lr, momentum, beta1):
    """The sharpness above which a quadratic diverges (Cohen et al. 2021, 2022); None: there is none known.

    Decay hardly changes it; clipping by a factor s raises sgd's to 1 / s of it, and leaves adamw's.
    """
    if name == "sgd" and lr > 0:
        return 2 * (1 + momentum) / lr
    if name == "adamw" and lr > 0:
        return 2 * (1 + beta1) / ((1 - beta1) * lr)
    return None

# What is kept from step to step, and who gets what ------------------------------------------------

class Optimizer:
    """The tensors that `update` changes: params, and the state that begins at zero, named in `kept`."""
    def __init__(self, update, kept, params, lr, **settings):
        self.params = list(params)
        self.update = update
        self.settings = settings
        self.peak_lr = lr
        self.lr = torch.tensor(lr, device=self.params[0].device)
        # By the names of update's arguments: a tensor for each parameter; adamw's step is one number.
        self.state = {name: [torch.zeros_like(p) for p in self.params] for name in kept}
        if update is adamw_update:
            self.state["step"] = torch.zeros_like(self.lr)
        self.call = scaled_update
        betas = settings.get("betas", ())
        if not lr > 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr {lr} must be above 0, betas {betas} in [0, 1)")
        n_dims = min(p.ndim for p in self.params)
        if update is muon_update and (n_dims < 2 or settings["dtype"] == torch.float16):
            raise ValueError("Muon is for matrices, in float32 or bfloat16: float16 overflows")

    def set_lr(self, factor):
        """The rate becomes factor (from schedule.py) x its peak."""
        self.lr.fill_(self.peak_lr * factor)

    @torch.no_grad()
    def step(self, scale=1.0):
        """One update; scale, a float or 0-dim tensor, multiplies the gradients."""
        scale = torch.as_tensor(scale, device=self.lr.device)
        grads = [p.grad for p in self.params]
        self.call(self.update, self.params, grads, scale, self.lr, **self.state, **self.settings)

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def compile(self, **settings):
        self.call = torch.compile(scaled_update, dynamic=False, **settings)

AdamW = partial(Optimizer, adamw_update, ("ms", "vs"), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
Muon = partial(Optimizer, muon_update, ("momenta",), momentum=0.95, weight_decay=0.0, dtype=torch.float32)
SGD = partial(Optimizer, sgd_update, ("velocities",), momentum=0.0, weight_decay=0.0)

def build_optimizer(model, name, lr, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95, adamw_lr_ratio=0.1):
    """The optimizers of a Transformer, a list; each parameter belongs to one of them.

    "adamw" and "sgd": all at lr. "muon": Muon for the matrices between hidden states (the router's too) at
    lr, AdamW for the rest at adamw_lr_ratio x lr. Norm gains and embeddings (tied heads too) do not decay: a
    rare word's row would shrink in all the steps that do not contain it.
    """
    hidden, head, undecayed = [], [], []
    for key, p in model.named_parameters():
        if p.ndim < 2 or key == "embed":
            undecayed.append(p)
        elif key == "head":
            head.append(p)
        else:
            hidden.append(p)
    optimizers = []
    if name == "muon":
        optimizers = [Muon(hidden, lr=lr, momentum=momentum, weight_decay=weight_decay, dtype=model.dtype)]
        hidden = []
        lr = lr * adamw_lr_ratio        # AdamW's, for the rest
    make = partial(AdamW, lr=lr, betas=betas)
    if name == "sgd":
        make = partial(SGD, lr=lr, momentum=momentum)
    for params, decay in ((hidden + head, weight_decay), (undecayed, 0.0)):
        if params:
            optimizers.append(make(params, weight_decay=decay))
    return optimizers

if __name__ == "__main__":
    torch.manual_seed(0)
    G = torch.randn(64, 16) * torch.logspace(0, -2, 16)
    for steps in range(6):
        print(f"{steps} steps: singular values", torch.linalg.svdvals(newton_schulz(G, steps))[::3])
