"""Aligned text."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows under a header, in aligned columns.

    Args:
        header: One title per column.
        rows: Cells, as many as titles.
        left: So many first columns are aligned to the left, the others to the right.

    Returns:
        The lines, indented by two spaces.
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join("  " + line.rstrip() for line in text)
