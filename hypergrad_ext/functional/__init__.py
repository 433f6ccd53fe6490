"""Differentiable functions on top of the fused ops: torch.func transforms them, autograd goes through them."""

from hypergrad_ext.dropout import concrete_mask as concrete_mask
from hypergrad_ext.functional.glm import glm_hvp as glm_hvp
from hypergrad_ext.functional.glm_solve import glm_solve as glm_solve
from hypergrad_ext.functional.mlp import mlp_hvp as mlp_hvp
from hypergrad_ext.functional.softmax import softmax_hessian as softmax_hessian
from hypergrad_ext.lstm_cell import lstm_cell as lstm_cell

__all__ = ["concrete_mask", "glm_hvp", "glm_solve", "lstm_cell", "mlp_hvp", "softmax_hessian"]
