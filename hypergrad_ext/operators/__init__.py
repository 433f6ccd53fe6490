"""What H is: symmetric linear operators on the space of some parameters."""

from hypergrad_ext.operators.base import LinearOperator as LinearOperator
from hypergrad_ext.operators.callable import Callable as Callable
from hypergrad_ext.operators.dense import DenseMatrix as DenseMatrix
from hypergrad_ext.operators.gauss_newton import GaussNewton as GaussNewton
from hypergrad_ext.operators.glm import GLMHessian as GLMHessian
from hypergrad_ext.operators.hessian import Hessian as Hessian
from hypergrad_ext.operators.mlp import MLPHessian as MLPHessian
