"""Names for the docstrings' examples."""

import pytest
import torch

import hypergrad_ext as hg


@pytest.fixture(autouse=True)
def names(doctest_namespace: dict) -> None:
    """Names that every docstring example may use."""
    doctest_namespace.update(hg=hg, torch=torch)
