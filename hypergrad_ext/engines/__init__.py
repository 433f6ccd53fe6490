"""How the Hessian-vector product of a torch loss is executed."""

from hypergrad_ext.engines.eager import RetainedGradient as RetainedGradient
