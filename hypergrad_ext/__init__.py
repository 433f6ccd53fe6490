"""Inverse-Hessian-vector products for PyTorch, and the hypergradients built on them.

The loss is a scalar tensor or a function of the parameters; parameters are a tensor, list, dict or module.
"""

from importlib.metadata import PackageNotFoundError, version

from hypergrad_ext.hyper_optimizer import HyperOptimizer as HyperOptimizer
from hypergrad_ext.hyper_optimizer import OuterStep as OuterStep
from hypergrad_ext.hypergradient import hypergradient as hypergradient
from hypergrad_ext.implicit import implicit as implicit
from hypergrad_ext.inverse_hvp import approx_inverse_hvp as approx_inverse_hvp
from hypergrad_ext.inverse_hvp import inverse_hvp as inverse_hvp
from hypergrad_ext.linear_solve import solve as solve
from hypergrad_ext.operators import Callable as Callable
from hypergrad_ext.operators import DenseMatrix as DenseMatrix
from hypergrad_ext.operators import GaussNewton as GaussNewton
from hypergrad_ext.operators import GLMHessian as GLMHessian
from hypergrad_ext.operators import Hessian as Hessian
from hypergrad_ext.operators import LinearOperator as LinearOperator
from hypergrad_ext.operators import MLPHessian as MLPHessian
from hypergrad_ext.solution import Solution as Solution
from hypergrad_ext.solution import SolveError as SolveError
from hypergrad_ext.solution import SolveWarning as SolveWarning
from hypergrad_ext.solution import Status as Status
from hypergrad_ext.solvers import CG as CG
from hypergrad_ext.solvers import MINRES as MINRES
from hypergrad_ext.solvers import Auto as Auto
from hypergrad_ext.solvers import BlockCG as BlockCG
from hypergrad_ext.solvers import Chebyshev as Chebyshev
from hypergrad_ext.solvers import Direct as Direct
from hypergrad_ext.solvers import Identity as Identity
from hypergrad_ext.solvers import Jacobi as Jacobi
from hypergrad_ext.solvers import LiSSA as LiSSA
from hypergrad_ext.solvers import Neumann as Neumann
from hypergrad_ext.solvers import Nystrom as Nystrom
from hypergrad_ext.solvers import Solver as Solver
from hypergrad_ext.solvers import SolverState as SolverState
from hypergrad_ext.unroll import unroll as unroll

try:
    __version__ = version("hypergrad_ext")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [
    # Functions
    "approx_inverse_hvp",
    "hypergradient",
    "implicit",
    "inverse_hvp",
    "solve",
    "unroll",
    # The outer loop
    "HyperOptimizer",
    "OuterStep",
    # Operators: what H is
    "Callable",
    "DenseMatrix",
    "GLMHessian",
    "GaussNewton",
    "Hessian",
    "LinearOperator",
    "MLPHessian",
    # Solvers: how H^{-1} b is found
    "Auto",
    "BlockCG",
    "CG",
    "Chebyshev",
    "Direct",
    "Identity",
    "Jacobi",
    "LiSSA",
    "MINRES",
    "Neumann",
    "Nystrom",
    "Solver",
    "SolverState",
    # What a solve returns
    "Solution",
    "SolveError",
    "SolveWarning",
    "Status",
]
