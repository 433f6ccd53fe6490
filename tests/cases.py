"""Problems as data, for tests and benchmarks: well-conditioned by construction, odd sizes on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import hypergrad_ext as hg


@dataclass
class Problem:
    """A bilevel problem at a point ``params``, with losses that are functions of a list of tensors."""

    params: list[Tensor]
    hparams: list[Tensor]
    train: Callable[[list[Tensor]], Tensor]
    val: Callable[[list[Tensor]], Tensor]

    def hessian(self) -> Tensor:
        """The dense Hessian of the training loss by torch.func, an implementation that is not ours."""
        sizes = [p.numel() for p in self.params]
        shapes = [p.shape for p in self.params]

        def flat_loss(w: Tensor) -> Tensor:
            return self.train([part.view(shape) for part, shape in zip(w.split(sizes), shapes, strict=True)])

        point = torch.cat([p.detach().reshape(-1) for p in self.params])
        return torch.func.hessian(flat_loss)(point).detach()


def spd(n: int, condition: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Symmetric positive definite matrix with eigenvalues log-spaced in [1 / condition, 1]."""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    a = (q * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)) @ q.T
    return ((a + a.T) / 2).to(dtype)


def quadratic(dtype: torch.dtype = torch.float64) -> Problem:
    """``1/2 w^T A w - lam^T w`` over three tensors of odd shapes."""
    shapes = [(3, 5), (7,), ()]
    sizes = [15, 7, 1]
    a = spd(sum(sizes), 20.0, dtype)
    lam = torch.randn(sum(sizes), dtype=dtype, requires_grad=True)
    target = torch.randn(sum(sizes), dtype=dtype)
    best = torch.linalg.solve(a, lam.detach())

    def flat(w: list[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in w])

    return Problem(
        [part.view(shape).clone().requires_grad_() for part, shape in zip(best.split(sizes), shapes, strict=True)],
        [lam],
        lambda w: flat(w) @ a @ flat(w) / 2 - lam @ flat(w),
        lambda w: ((flat(w) - target) ** 2).sum(),
    )


def logistic(dtype: torch.dtype = torch.float64, n: int = 120, d: int = 9, classes: int = 3) -> Problem:
    """Softmax regression with one log L2 penalty per weight, at its optimum (Newton's method in float64)."""
    x = torch.randn(2 * n, d, dtype=torch.float64)
    y = (x @ torch.randn(d, classes, dtype=torch.float64) + torch.randn(2 * n, classes)).argmax(1)
    lam = torch.randn(d, classes, dtype=torch.float64) * 0.5 - 3

    def loss(w: Tensor, lam: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x @ w, y) + (lam.exp() * w.square()).sum()

    w = torch.zeros(d, classes, dtype=torch.float64)
    for _ in range(30):
        inner = lambda flat: loss(flat.view(d, classes), lam, x[:n], y[:n])  # noqa: E731
        gradient = torch.func.grad(inner)(w.view(-1))
        w = w - torch.linalg.solve(torch.func.hessian(inner)(w.view(-1)), gradient).view_as(w)
    lam = lam.to(dtype).requires_grad_()
    x_t, x_v = x[:n].to(dtype), x[n:].to(dtype)
    return Problem(
        [w.to(dtype).requires_grad_()],
        [lam],
        lambda p: loss(p[0], lam, x_t, y[:n]),
        lambda p: F.cross_entropy(x_v @ p[0], y[n:]),
    )


def mlp(dtype: torch.dtype = torch.float64) -> Problem:
    """A tanh network with a strong penalty per weight: a convex neighbourhood, though not at its optimum."""
    sizes = [(11, 6), (11,), (4, 11), (4,)]
    params = [(torch.randn(s, dtype=dtype) * 0.3).requires_grad_() for s in sizes]
    lam = [torch.full(s, -1.0, dtype=dtype, requires_grad=True) for s in sizes]
    x = torch.randn(40, 6, dtype=dtype)
    y = torch.randint(4, (40,))

    def logits(w: list[Tensor]) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, w[0], w[1])), w[2], w[3])

    def penalty(w: list[Tensor]) -> Tensor:
        return sum((a.exp() * t.square()).sum() for a, t in zip(lam, w, strict=True))  # type: ignore[return-value]

    return Problem(
        params,
        lam,
        lambda w: F.cross_entropy(logits(w)[:20], y[:20]) + penalty(w),
        lambda w: F.cross_entropy(logits(w)[20:], y[20:]),
    )


PROBLEMS = {"quadratic": quadratic, "logistic": logistic, "mlp": mlp}


F64 = torch.float64
OUTLIERS = torch.cat([torch.logspace(0, -1, 20, dtype=F64), torch.logspace(-3, -4, 180, dtype=F64)])


def with_eigenvalues(eigenvalues: Tensor) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=F64))
    a = (q * eigenvalues.double()) @ q.T
    return (a + a.T) / 2


def products(a: Tensor) -> hg.Callable:
    """The matrix as a function, which nothing can factorise."""
    return hg.Callable(lambda v: a @ v, torch.zeros(len(a), dtype=a.dtype))


def energy_error(a: Tensor, b: Tensor, x: Tensor) -> float:
    """Of the error, in the norm of ``a``, squared and relative."""
    truth = torch.linalg.solve(a, b)
    return float((x - truth) @ a @ (x - truth) / (truth @ a @ truth))
