"""What the package promises: the names, and a docstring with an example behind each."""

from __future__ import annotations

import inspect

import pytest

import hypergrad_ext as hg

NAMES = [
    "Auto",
    "BlockCG",
    "CG",
    "Callable",
    "Chebyshev",
    "DenseMatrix",
    "Direct",
    "GLMHessian",
    "GaussNewton",
    "Hessian",
    "HyperOptimizer",
    "Identity",
    "Jacobi",
    "LiSSA",
    "LinearOperator",
    "MINRES",
    "MLPHessian",
    "Neumann",
    "Nystrom",
    "OuterStep",
    "Solution",
    "SolveError",
    "SolveWarning",
    "Solver",
    "SolverState",
    "Status",
    "approx_inverse_hvp",
    "hypergradient",
    "implicit",
    "inverse_hvp",
    "solve",
    "unroll",
]
WITH_EXAMPLE = [
    name
    for name in NAMES
    if name
    not in ("LinearOperator", "Solution", "SolveError", "SolveWarning", "Solver", "Status", "OuterStep", "SolverState")
]


def test_names_are_pinned():
    assert sorted(hg.__all__) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_documented(name):
    assert inspect.getdoc(getattr(hg, name))


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_docstring_has_arguments_errors_and_an_example(name):
    doc = inspect.getdoc(getattr(hg, name))
    for section in ("Args:", "Raises:", "Example:", ">>> "):
        assert section in doc, f"{name} lacks {section}"


@pytest.mark.parametrize(
    "name",
    [
        *("inverse_hvp", "solve", "hypergradient", "implicit", "approx_inverse_hvp", "unroll", "HyperOptimizer"),
        *("CG", "Chebyshev", "Direct", "Identity", "MINRES", "Neumann"),
    ],
)
def test_docstring_says_what_it_costs(name):
    assert "Cost:" in inspect.getdoc(getattr(hg, name))


def test_drop_in_signature_of_algorithm_3():
    assert str(inspect.signature(hg.approx_inverse_hvp)).startswith("(v: ")
    parameters = inspect.signature(hg.approx_inverse_hvp).parameters
    assert list(parameters) == ["v", "f", "params", "iterations", "alpha"]
    assert parameters["iterations"].default == 3 and parameters["alpha"].default == 1.0
