"""A change of the whole process that several threads may be in the middle of."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager


class Shared:
    """A change of the whole process: the first thread that comes in makes it, the last one that goes undoes it.

    Each on its own would put back what another one had changed, and leave it so.
    """

    def __init__(self, *changes: Callable[[], AbstractContextManager]) -> None:
        """Take what makes the changes: contexts."""
        self._changes = changes
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        """Make the changes, unless a thread is inside."""
        with self._lock:
            if self._inside == 0:
                with contextlib.ExitStack() as made:
                    for change in self._changes:
                        made.enter_context(change())
                    self._undo = made.pop_all()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        """Undo them, if no other thread is inside."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._undo.close()
