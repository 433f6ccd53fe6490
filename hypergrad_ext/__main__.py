"""Command line: ``python -m hypergrad_ext info`` and ``python -m hypergrad_ext demo``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# What the demo imports, beside torch.
_EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it.

    Args:
        arguments: The arguments; by default those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m hypergrad_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, processor, and which kernels can run here")
    demo = commands.add_parser("demo", help="tune, distil and time on scikit-learn's digits, in about half a minute")
    demo.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the figures (default: out)"
    )
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the data split (default: 0)")
    demo.add_argument("--quick", action="store_true", help="smaller settings, for tests")
    options = parser.parse_args(arguments)
    if options.command == "info":
        from hypergrad_ext.info import describe

        print(describe())
        return 0
    refusal = _missing_extras() or _unwritable(options.out)
    if refusal:
        print(f"hypergrad_ext demo: {refusal}", file=sys.stderr)
        return 1
    from hypergrad_ext.demo.run import run

    run(options.out, seed=options.seed, quick=options.quick)
    return 0


def _seed(value: str) -> int:
    if not value.isdecimal() or int(value) >= 2**64:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2^64 - 1, got {value}")
    return int(value)


def _missing_extras() -> str:
    """Why the demo cannot start; empty if it can."""
    missing = [name for module, name in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    return f"{', '.join(missing)} not installed: pip install '.[demo]' in a checkout" if missing else ""


def _unwritable(folder: Path) -> str:
    """Make the folder and write into it once: better to fail now than after a minute. Empty if it worked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"cannot write to --out {folder}: {error.strerror}"


if __name__ == "__main__":
    sys.exit(main())
