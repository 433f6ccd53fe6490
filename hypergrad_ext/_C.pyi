from collections.abc import Sequence

from torch import Tensor

_Tensors = list[Tensor] | tuple[Tensor, ...]

def build_info() -> dict[str, object]: ...
def neumann_step_(
    v: _Tensors, p: _Tensors, hv: _Tensors, stats: Tensor, alpha: float, damping: float = 0.0
) -> None: ...
def glm_hvp(x: Tensor, weights: Tensor, v: Tensor, l2: Tensor | None, scale: float, intercept: bool) -> Tensor: ...
def glm_gram(x: Tensor, weights: Tensor) -> Tensor: ...
def glm_neumann_solve(
    x: Tensor,
    weights: Tensor,
    b: Tensor,
    l2: Tensor | None,
    scale: float,
    intercept: bool,
    alpha: float,
    damping: float,
    steps: int,
    stop: Tensor,
) -> tuple[Tensor, Tensor]: ...
def glm_neumann_plan(
    x: Tensor, weights: Tensor, b: Tensor, l2: Tensor | None, scale: float, intercept: bool
) -> tuple[str, str]: ...
def glm_cg_solve(
    x: Tensor,
    weights: Tensor,
    b: Tensor,
    l2: Tensor | None,
    scale: float,
    intercept: bool,
    damping: float,
    steps: int,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]: ...
def mlp_hvp(
    weights: _Tensors,
    hidden: _Tensors,
    slopes: _Tensors,
    bends: _Tensors,
    deltas: _Tensors,
    probabilities: Tensor | None,
    v: Tensor,
    scale: float,
    biases: bool,
    l2: float,
) -> Tensor: ...
def mlp_hvp_plan(
    sizes: Sequence[int], n: int, k: int, itemsize: int, curved: bool, chip: dict[str, int] | None = None
) -> tuple[str, str]: ...
def mlp_neumann_solve(
    weights: _Tensors,
    hidden: _Tensors,
    slopes: _Tensors,
    bends: _Tensors,
    deltas: _Tensors,
    probabilities: Tensor | None,
    b: Tensor,
    scale: float,
    biases: bool,
    l2: float,
    alpha: float,
    damping: float,
    steps: int,
    stop: Tensor,
) -> tuple[Tensor, Tensor]: ...
def mlp_cg_solve(
    weights: _Tensors,
    hidden: _Tensors,
    slopes: _Tensors,
    bends: _Tensors,
    deltas: _Tensors,
    probabilities: Tensor | None,
    b: Tensor,
    scale: float,
    biases: bool,
    l2: float,
    damping: float,
    steps: int,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]: ...
def dense_neumann_solve(
    matrix: Tensor, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor
) -> tuple[Tensor, Tensor]: ...
def dense_cg_solve(
    matrix: Tensor, b: Tensor, damping: float, steps: int, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]: ...
def cg_step_(x: _Tensors, r: _Tensors, p: _Tensors, hp: _Tensors, state: Tensor, damping: float = 0.0) -> None: ...
def softmax_hessian(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None = None) -> Tensor: ...
def softmax_hessian_(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None = None) -> None: ...
def pcg_step_(
    x: _Tensors, r: _Tensors, p: _Tensors, hp: _Tensors, m: _Tensors, state: Tensor, damping: float = 0.0
) -> None: ...
def richardson_step_(
    x: _Tensors, hx: _Tensors, b: _Tensors, m: _Tensors, stats: Tensor, alpha: float, damping: float = 0.0
) -> None: ...
def chebyshev_step_(
    x_old: _Tensors,
    x: _Tensors,
    hx: _Tensors,
    b: _Tensors,
    m: _Tensors,
    stats: Tensor,
    alpha: float,
    momentum: float,
    damping: float = 0.0,
) -> None: ...
def minres_step_(
    x: _Tensors,
    v: _Tensors,
    v_old: _Tensors,
    w: _Tensors,
    w_old: _Tensors,
    hv: _Tensors,
    state: Tensor,
    damping: float = 0.0,
) -> None: ...
def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
def lstm_cell_backward(
    activations: Tensor,
    c: Tensor,
    c_next: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    grad_activations: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def lstm_cell_double_backward(
    activations: Tensor, c: Tensor, c_next: Tensor, grad_h: Tensor, grad_c: Tensor, v_gates: Tensor, v_c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def lstm_layer(x_gates: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
def lstm_layer_backward(
    activations: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    grad_h: Tensor,
    grad_c: Tensor | None = None,
    grad_activations: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def lstm_layer_double_backward(
    activations: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    dh: Tensor,
    dc: Tensor,
    v_gates: Tensor,
    v_h0: Tensor,
    v_c0: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...

class Graph:
    key: bytes
    refusal: str
    def __init__(self, outputs: Sequence[Tensor], leaves: Sequence[Tensor], seeds: Sequence[Tensor] = ()) -> None: ...
    def current(self) -> bool: ...

class Link:
    def constants(self, graph: Graph) -> list[Tensor]: ...
    def agrees(self, graph: Graph, shown: Sequence[Tensor]) -> bool: ...

class BoundPlan:
    def product(self, v: Sequence[Tensor], rows: int | None = None) -> Tensor: ...
    def neumann_series(
        self, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor
    ) -> tuple[Tensor, Tensor]: ...
    def conjugate_gradients(
        self, b: Tensor, damping: float, steps: int, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...

class Plan:
    def __init__(
        self,
        is_double: bool,
        arena: int,
        leaves: list[int],
        outputs: list[int],
        constants: int,
        dynamic: int,
        scalars: int,
        immediates: list[float],
        instructions: list[tuple],
    ) -> None: ...
    def bind(self, constants: Sequence[Tensor], scalars: list[float]) -> BoundPlan: ...
