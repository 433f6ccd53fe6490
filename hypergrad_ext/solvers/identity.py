"""The inverse Hessian taken for a multiple of the identity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hypergrad_ext.solution import Status
from hypergrad_ext.solvers.base import Outcome, Solver, System, check_number


@dataclass(frozen=True)
class Identity(Solver):
    r"""The approximation :math:`(H + d I)^{-1} b \approx \alpha b`, also known as T1-T2.

    Equals ``Neumann(steps=0, alpha=alpha)``, and unrolling one step of gradient descent. Damping plays no part.

    Cost: no Hessian-vector products.

    Args:
        alpha: The multiple.

    Raises:
        TypeError: If ``alpha`` is not a number.
        ValueError: If ``alpha`` is not positive.

    References:
        Luketina et al., "Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters", ICML 2016.

    Example:
        >>> hg.solve(hg.DenseMatrix(torch.eye(2)), torch.ones(2), hg.Identity(alpha=0.5)).value
        tensor([0.5000, 0.5000])
    """

    alpha: float = 1.0

    needs_symmetry = False
    needs_one_matrix = False
    gains_from_start = False

    def __post_init__(self) -> None:
        """Check the settings."""
        check_number("alpha", self.alpha, positive=True)

    def run(self, system: System, b: Tensor, b_norm: Tensor) -> Outcome:
        """Multiply."""
        return Outcome(b.mul_(self.alpha), [Status.MAX_STEPS] * (b.shape[0] if b.dim() == 2 else 1), 0)
