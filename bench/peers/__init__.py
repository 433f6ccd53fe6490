"""This package against every peer, on the same problems, with the same steps, step size and damping.

One module per package, with the methods it has and ``make(problem, task)``, which returns a function without arguments
that does the whole task anew, from the loss on, and returns one tensor per parameter or hyperparameter. What a package
compiles for one function, it compiles before the clock starts. ``python -m bench.peers`` runs it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

OURS = "hypergrad_ext"
COMPILED = "hypergrad_ext, compiled"
CLOSED_FORM = "hypergrad_ext, closed form"
# Name in tables: the module here, the distribution whose version counts.
PEERS: dict[str, tuple[str, str]] = {
    OURS: ("ours", "hypergrad_ext"),
    COMPILED: ("compiled", "hypergrad_ext"),
    CLOSED_FORM: ("closed_form", "hypergrad_ext"),
    "by hand, _foreach": ("by_hand", "torch"),
    "torch.compile": ("torch_compile", "torch"),
    "hypertorch": ("hypertorch", "hypergrad"),
    "betty-ml": ("betty", "betty-ml"),
    "TorchOpt": ("torchopt", "torchopt"),
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
    "jaxopt": ("jaxopt", "jaxopt"),
    "lineax": ("lineax", "lineax"),
    "optimistix": ("optimistix", "optimistix"),
}


def adapter(name: str) -> ModuleType:
    """The module that runs a package.

    Raises:
        ImportError: If the package is not installed.
    """
    return importlib.import_module(f"bench.peers.{PEERS[name][0]}")
