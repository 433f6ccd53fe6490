"""The problems on which packages are compared, as data: every package gets the same weights, batches and constants.

Small enough that a product takes a few milliseconds on two cores. Damping makes the condition number about 100, so that
every method has a fair chance, also where the Hessian of a network is indefinite; alpha is one over the largest
eigenvalue there may be. Both come from Lanczos steps in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.models import Attention, Recurrent, Residual

F64 = torch.float64
CONDITION = 100.0
_LANCZOS_STEPS = 40

Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """A network with cross entropy, one log penalty per weight of its matrices, and what to solve with.

    Attributes:
        name: As on the command line and in tables.
        title: What it is.
        module: The network; its parameters are the point at which everything is computed.
        train: Inputs and classes of the training loss.
        val: Those of the validation loss.
        closed_form: Which of our closed forms has the Hessian, if any.
        log_l2: Log penalties by the name of the weight they belong to, which is a matrix; random ones if not given.
    """

    name: str
    title: str
    module: nn.Module
    train: Batch
    val: Batch
    closed_form: str = ""
    log_l2: Tensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Draw penalties."""
        for n, p in self.params.items():
            if n not in self.log_l2 and p.dim() > 1:
                self.log_l2[n] = (0.5 * torch.randn_like(p) - 8).requires_grad_()

    @property
    def params(self) -> Tensors:
        """The weights by name."""
        return dict(self.module.named_parameters())

    @property
    def leaves(self) -> list[Tensor]:
        """The weights in order."""
        return list(self.module.parameters())

    @property
    def hparams(self) -> list[Tensor]:
        """The log penalties in the order of the weights they belong to."""
        return list(self.log_l2.values())

    def logits(self, params: Tensors, x: Tensor) -> Tensor:
        """What the network gives."""
        return functional_call(self.module, params, (x,))

    def train_loss(self, params: Tensors, log_l2: Tensors | None = None, ridge: float = 0.0) -> Tensor:
        """Cross entropy; with the penalties, if given; with ``ridge / 2 |w|^2``, for who has no damping."""
        x, y = self.train
        loss = F.cross_entropy(self.logits(params, x), y)
        for name, penalty in (log_l2 or {}).items():
            loss = loss + (penalty.exp() * params[name].square()).sum()
        if ridge:
            loss = loss + ridge / 2 * sum(p.square().sum() for p in params.values())
        return loss

    def val_loss(self, params: Tensors) -> Tensor:
        """Cross entropy of the validation batch."""
        x, y = self.val
        return F.cross_entropy(self.logits(params, x), y)

    @cached_property
    def b(self) -> list[Tensor]:
        """The right-hand side: the gradient of the validation loss."""
        return list(torch.autograd.grad(self.val_loss(self.params), self.leaves))

    @cache  # noqa: B019 (problems live as long as the process)
    def vectors(self, k: int) -> list[Tensor]:
        """As many random right-hand sides, one more leading dimension on every tensor."""
        generator = torch.Generator().manual_seed(k)
        return [torch.randn(k, *p.shape, generator=generator).to(p.dtype) for p in self.leaves]

    @cached_property
    def double(self) -> Problem:
        """The same problem in float64."""
        train, val = ((x.to(F64), y) for x, y in (self.train, self.val))
        log_l2 = {n: t.detach().to(F64).requires_grad_() for n, t in self.log_l2.items()}
        return replace(self, module=copy.deepcopy(self.module).to(F64), train=train, val=val, log_l2=log_l2)

    @cached_property
    def _spectrum(self) -> tuple[float, float]:
        start = torch.randn(sum(p.numel() for p in self.leaves), dtype=F64, generator=torch.Generator().manual_seed(0))
        values, _ = lanczos(self.double, start)
        return float(values[0]), float(values[-1]) + 2 * max(float(t.detach().exp().max()) for t in self.hparams)

    @property
    def damping(self) -> float:
        """The d of ``H + d I``."""
        low, high = self._spectrum
        return _rounded((high - CONDITION * min(low, 0.0)) / (CONDITION - 1))

    @property
    def alpha(self) -> float:
        """Step size of Neumann series."""
        return _rounded(0.95 / (self._spectrum[1] + self.damping))


def gradient_graph(loss: Tensor, leaves: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Products with the Hessian of a loss by backward passes through its gradient."""
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)
    return lambda v: list(torch.autograd.grad(gradient, leaves, v, retain_graph=True))


def lanczos(problem: Problem, start: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values of the Hessian without penalties and their weights in ``start``, which add up to its squared norm."""
    leaves = problem.leaves
    product = gradient_graph(problem.train_loss(problem.params), leaves)
    shapes, sizes = [p.shape for p in leaves], [p.numel() for p in leaves]
    basis, diagonal, beside = [start / start.norm()], [], []
    for _ in range(min(_LANCZOS_STEPS, len(start))):
        v = [t.view(s) for t, s in zip(basis[-1].split(sizes), shapes, strict=True)]
        w = torch.cat([t.reshape(-1) for t in product(v)])
        diagonal.append(float(w @ basis[-1]))
        q = torch.stack(basis)
        for _ in range(2):  # reorthogonalised
            w = w - q.T @ (q @ w)
        beside.append(float(w.norm()))
        if beside[-1] < 1e-10 * max(map(abs, diagonal)):
            break
        basis.append(w / beside[-1])
    t = torch.diag(torch.tensor(diagonal, dtype=F64))
    t = t + sum(torch.diag(torch.tensor(beside[: len(diagonal) - 1], dtype=F64), i) for i in (-1, 1))
    values, vectors = torch.linalg.eigh(t)
    return values, vectors[0].square() * start.norm() ** 2


def _rounded(x: float) -> float:
    """Two digits, so that another machine's rounding does not make another problem."""
    return float(f"{x:.1e}")


def _logistic() -> tuple[nn.Module, Batch, Batch]:
    def batch() -> Batch:
        return torch.randn(1024, 784) / torch.arange(1, 785) ** 0.25, torch.randint(10, (1024,))

    return nn.Sequential(nn.Linear(784, 10)), batch(), batch()


def _mlp() -> tuple[nn.Module, Batch, Batch]:
    net = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
    return net, *_batches(128, 784)


def _deep() -> tuple[nn.Module, Batch, Batch]:
    layers = [part for _ in range(30) for part in (nn.Linear(32, 32), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(32, 10)), *_batches(64, 32)


def _cnn() -> tuple[nn.Module, Batch, Batch]:
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 10)),
    )
    return net, *_batches(16, 1, 28, 28)


def _lstm() -> tuple[nn.Module, Batch, Batch]:
    return Recurrent(nn.LSTMCell, 32, 64), *_batches(32, 12, 32, classes=3)


def _transformer() -> tuple[nn.Module, Batch, Batch]:
    net = nn.Sequential(Attention(64, 4), Attention(64, 4), nn.Flatten(0, 1), nn.Linear(64, 10))
    train, val = ((torch.randn(8, 32, 64), torch.randint(10, (256,))) for _ in range(2))
    return net, train, val


def _resnet() -> tuple[nn.Module, Batch, Batch]:
    net = Residual(16, 32)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            # Statistics of the batch alone: not every package can take a product with a buffer that changes.
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
            part.num_batches_tracked = None
    return net, *_batches(16, 16, 16, 16, classes=3)


def _batches(n: int, *shape: int, classes: int = 10) -> tuple[Batch, Batch]:
    train, val = ((torch.randn(n, *shape), torch.randint(classes, (n,))) for _ in range(2))
    return train, val


_MAKERS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Batch, Batch]], str]] = {
    "logistic": ("logistic regression 784-10, batch 1024", _logistic, "glm"),
    "mlp": ("MLP 784-256-256-10, batch 128", _mlp, "mlp"),
    "deep": ("MLP, 30 layers of 32, batch 64", _deep, "mlp"),
    "cnn": ("CNN 16-32, 28 x 28, batch 16", _cnn, ""),
    "lstm": ("LSTM cell, 12 steps, 64 wide, batch 32", _lstm, ""),
    "transformer": ("transformer, 2 layers of 64, 8 x 32", _transformer, ""),
    "resnet": ("ResNet block, 32 wide, 16 x 16, batch 16", _resnet, ""),
}
PROBLEMS = tuple(_MAKERS)
TITLES = {name: title for name, (title, _, _) in _MAKERS.items()}


@cache
def load(name: str) -> Problem:
    """A problem by its name, in float32."""
    title, make, closed_form = _MAKERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, train, val = make()
        return Problem(name, title, module, train, val, closed_form)
