"""How ``H^{-1} b`` is found: small frozen dataclasses that know operators and nothing of autograd."""

from hypergrad_ext.solvers.auto import Auto as Auto
from hypergrad_ext.solvers.base import Outcome as Outcome
from hypergrad_ext.solvers.base import Solver as Solver
from hypergrad_ext.solvers.base import System as System
from hypergrad_ext.solvers.block_cg import BlockCG as BlockCG
from hypergrad_ext.solvers.cg import CG as CG
from hypergrad_ext.solvers.chebyshev import Chebyshev as Chebyshev
from hypergrad_ext.solvers.direct import Direct as Direct
from hypergrad_ext.solvers.identity import Identity as Identity
from hypergrad_ext.solvers.lissa import LiSSA as LiSSA
from hypergrad_ext.solvers.minres import MINRES as MINRES
from hypergrad_ext.solvers.neumann import Neumann as Neumann
from hypergrad_ext.solvers.nystrom import Nystrom as Nystrom
from hypergrad_ext.solvers.preconditioner import Jacobi as Jacobi
from hypergrad_ext.solvers.state import SolverState as SolverState
