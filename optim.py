"""AdamW, Muon and gradient descent from scratch, and the edge of stability that limits their rates.

AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019) divides each weight's averaged gradient by its own typical
size, so that lr is roughly the distance that each single weight moves a step (^: divided by 1 - b^t):

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      w = w - lr (m^ / (sqrt(v^) + eps) + decay w)

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the averaged gradient U S V' of
a matrix between hidden states by U V', every singular value 1: the few directions that dominate a gradient no
longer drown the others, and lr is the distance that the matrix moves in every direction.

Each method is a pure function. lr, step and scale are 0-dim tensors, so that a CUDA graph sees them change.

    python optim.py        # singular values of a random G / |G|, and after each step of Newton-Schulz
"""
import math
from functools import partial

import torch
from torch.nn import attention

# The mathematics: one step on lists of tensors, in place ------------------------------------------

def adamw_update(params, grads, ms, vs, step, lr, betas, eps, weight_decay):
    step += 1
    beta1, beta2 = betas
    correction1 = 1 - beta1 ** step
    correction2 = 1 - beta2 ** step
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
    """Nearly U V' of each matrix of G = U S V' (..., rows, cols), in G's dtype (float16 overflows). Each step
    applies p(s) = a s + b s^3 + c s^5 to the singular values of G / |G|. These coefficients (Jordan et al.)
    take five steps from [0.01, 1] to about [0.7, 1.2], which trains as well as exactly 1."""
    if G.size(-2) > G.size(-1):
        return newton_schulz(G.mT, steps).mT        # X X' is then the smaller square
    a, b, c = 3.4445, -4.7750, 2.0315
    I = G.new_ones(G.size(-2)).diag()
    X = G / (torch.linalg.matrix_norm(G, keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = (a * I + b * A + c * (A @ A)) @ X       # with a inside, the large X is touched by products alone
    return X

def muon_update(params, grads, momenta, lr, momentum, weight_decay, dtype):
    """Nesterov momentum, and Newton-Schulz in dtype of every matrix in parameters (..., rows, cols)."""
    by_shape = {}
    for p, g, m in zip(params, grads, momenta):
        m.lerp_(g, 1 - momentum)
        ahead = g.lerp(m, momentum)
        shape = (-1, *p.shape[-2:])                                     # (n, rows, cols)
        by_shape.setdefault(shape, []).append((p.view(shape), ahead.reshape(shape)))
    for (_, rows, cols), group in by_shape.items():
        weights, aheads = zip(*group)
        stack = newton_schulz(torch.cat(aheads).to(dtype))      # on a GPU 30 times faster than one at a time
        stretch = max(1, rows / cols) ** 0.5        # a tall matrix's outputs move as much as a square one's
        for W, update in zip(weights, stack.split([len(W) for W in weights])):
            W.mul_(1 - lr * weight_decay).sub_(lr * stretch * update.to(W.dtype))

def scaled_update(update, params, grads, scale, lr, **others):
    """update with gradients times scale, for clipping; at 0 no weight moves, whatever the gradients."""
    grads = [torch.where(scale > 0, g * scale, 0.0) for g in grads]
    update(params, grads, lr=lr * (scale > 0), **others)

# What is kept from step to step, and who gets what ------------------------------------------------

class Optimizer:
    """The tensors that `update` changes: params and, named in `kept`, its state, which starts at zero."""
    def __init__(self, update, kept, params, lr, **settings):
        self.update = update
        self.params = params
        self.settings = settings
        self.peak_lr = lr
        self.lr = torch.tensor(lr, device=params[0].device)
        self.call = scaled_update
        self.state = {name: [torch.zeros_like(p) for p in params] for name in kept}
        if "step" in kept:
            self.state["step"] = torch.zeros_like(self.lr)      # one number for all

    def set_lr(self, factor):
        self.lr.fill_(self.peak_lr * factor)        # factor: from schedule.py

    @torch.no_grad()
    def step(self, scale=1.0):
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

    def compile(self):
        self.call = torch.compile(scaled_update, dynamic=False)

AdamW = partial(Optimizer, adamw_update, ("ms", "vs", "step"), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
Muon = partial(Optimizer, muon_update, ("momenta",), momentum=0.95, weight_decay=0.0, dtype=torch.float32)
SGD = partial(Optimizer, sgd_update, ("velocities",), momentum=0.0, weight_decay=0.0)
OPTIMIZERS = {"adamw": AdamW, "muon": Muon, "sgd": SGD}     # the choices of --optimizer

def build_optimizer(model, name, lr, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95, adamw_lr_ratio=0.1):
    """A list of Optimizers, one a parameter. "muon": Muon for the matrices inside the blocks, AdamW for the
    rest at adamw_lr_ratio x lr. Only those and the head decay: the embeddings of rare words would shrink."""
    groups = {}
    for key, p in model.named_parameters():
        matrix = key.startswith("blocks.") and p.ndim >= 2
        decay = weight_decay if matrix or key == "head" else 0.0
        owner = OPTIMIZERS[name], lr
        if name == "muon" and not matrix:
            owner = AdamW, lr * adamw_lr_ratio
        groups.setdefault((*owner, decay), []).append(p)
    optimizers = []
    for (make, peak_lr, decay), params in groups.items():
        settings = dict(betas=betas, momentum=momentum, weight_decay=decay, dtype=model.dtype)
        known = {key: settings[key] for key in settings if key in make.keywords}
        optimizers.append(make(params, lr=peak_lr, **known))
    return optimizers

# The edge of stability: along an eigenvector of the loss's Hessian with eigenvalue h, gradient descent
# multiplies the distance from the bottom by 1 - lr h a step; above h = 2 / lr it swings ever wider.

def stability_threshold(optimizer):
    """The sharpness above which a quadratic diverges (Cohen et al. 2021, 2022); None if none is known."""
    if optimizer.update is sgd_update:
        return (2 * (1 + optimizer.settings["momentum"]) / optimizer.lr).item()
    if optimizer.update is adamw_update:
        beta1, _ = optimizer.settings["betas"]
        return (2 * (1 + beta1) / ((1 - beta1) * optimizer.lr)).item()

def top_eigenvalue(product, start, tolerance=0.003, max_products=40):
    """Largest eigenvalue of a symmetric matrix H known by product(v) = H v, by Lanczos iteration.
    start (n,) -> eigenvalue h, unit eigenvector v (n,), |H v - h v| / |h|; nan, zeros, nan where H v is not
    finite. k products span a space in which H is k x k; its top eigenpair is the estimate."""
    basis = start.new_empty(max_products, len(start))
    small = torch.zeros(max_products, max_products, dtype=torch.float64)    # on the CPU: MPS has no float64
    rest = start
    for k in range(max_products):
        basis[k] = rest / rest.norm()
        known = basis[:k + 1]                   # (k + 1, n), orthonormal
        Hq = product(basis[k])
        overlap = known @ Hq
        rest = Hq - overlap @ known
        rest -= (known @ rest) @ known          # again: rounding leaves some of what was taken out
        size = rest.norm().cpu()
        if not size.isfinite():
            return math.nan, torch.zeros_like(start), math.nan
        small[k, :k + 1] = overlap.cpu()        # the lower triangle
        values, vectors = torch.linalg.eigh(small[:k + 1, :k + 1])
        h = values[-1]
        reached = (size * vectors[k, -1] / h).abs()
        if reached <= tolerance:
            break
    v = vectors[:, -1].float().to(start.device) @ known
    return h.item(), v / v.norm(), reached.item()

def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])

def measure_sharpness(model, optimizers, x, y, grad_clip, vectors):
    """Top eigenvalue of the Hessian H of the cross-entropy of x, y (B, T), in float32; with AdamW also of
    P^-1/2 H P^-1/2 -> cells of metrics.csv. Changes only vectors {column: where the next one starts}."""
    params = [p for optimizer in optimizers for p in optimizer.params]
    dtype, precision = model.dtype, torch.get_float32_matmul_precision()
    model.dtype = torch.float32
    torch.set_float32_matmul_precision("highest")       # no TF32
    model.eval()                                        # no dropout
    with attention.sdpa_kernel(attention.SDPBackend.MATH):      # the others have no second derivatives
        grads = torch.autograd.grad(model(x, y)[1], params, create_graph=True)
    slope = flat(grads)                                 # (n_params,)
    gradient = slope.detach()
    main = min(optimizers, key=lambda optimizer: optimizer.update is adamw_update)  # Muon, where both are
    scales = {"sharpness": 1.0}
    if main.update is adamw_update:     # P of the next update w - lr P^-1 m
        clip = ((grad_clip or math.inf) / gradient.norm()).clamp(max=1)
        step = main.state["step"] + 1
        beta1, beta2 = main.settings["betas"]
        v = flat(v for optimizer in optimizers for v in optimizer.state["vs"])
        v = v.lerp((clip * gradient) ** 2, 1 - beta2)
        root = (v / (1 - beta2 ** step)).sqrt()
        P = (1 - beta1 ** step) * (root + main.settings["eps"])
        scales["preconditioned_sharpness"] = P ** -0.5
    cells = {"stability_threshold": stability_threshold(main)}
    for column, scale in scales.items():
        def product(v):
            return scale * flat(torch.autograd.grad(slope, params, scale * v, retain_graph=True))
        # The gradient is mixed in to see a direction that has overtaken the last eigenvector.
        start = scale * gradient
        start = start / start.norm() + vectors.get(column, 0)
        cells[column], vectors[column], cells["sharpness_tolerance"] = top_eigenvalue(product, start)
    model.train()
    model.dtype = dtype
    torch.set_float32_matmul_precision(precision)
    return cells

if __name__ == "__main__":
    torch.manual_seed(0)
    G = torch.randn(64, 6) * torch.logspace(0, -2, 6)
    for steps in range(6):
        print(steps, "steps: singular values", torch.linalg.svdvals(newton_schulz(G, steps)))
