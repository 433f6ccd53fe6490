"""How the Hessian-vector product of a torch loss is executed."""

from hypergrad_ext.engines.choose import ENGINES as ENGINES
from hypergrad_ext.engines.choose import Products as Products
from hypergrad_ext.engines.eager import RetainedGradient as RetainedGradient
