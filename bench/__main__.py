"""``python -m bench report``: all results; ``compare --base REV``: two commits; ``agree FOLDER``: two runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Hand over to the command."""
    commands = ("report", "compare", "agree")
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise SystemExit(f"usage: python -m bench {{{','.join(commands)}}}")
    command = sys.argv.pop(1)
    if command == "report":
        from bench.report import main
    elif command == "agree":
        from bench.agree import main
    else:
        from bench.compare import main
    main()


if __name__ == "__main__":
    main()
