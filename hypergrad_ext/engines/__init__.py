"""How the Hessian-vector product of a torch loss is executed."""

from hypergrad_ext.engines.batches import BatchedGradient as BatchedGradient
from hypergrad_ext.engines.choose import ENGINES as ENGINES
from hypergrad_ext.engines.choose import Gradient as Gradient
from hypergrad_ext.engines.choose import Products as Products
from hypergrad_ext.engines.choose import expects_replay as expects_replay
from hypergrad_ext.engines.eager import RetainedGradient as RetainedGradient
from hypergrad_ext.engines.forward import once_differentiable as once_differentiable
from hypergrad_ext.engines.forward import twice_differentiable as twice_differentiable
from hypergrad_ext.engines.linked import recall as recall
