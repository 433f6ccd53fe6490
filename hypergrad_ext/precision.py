"""What ``torch.autocast`` is to leave alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without ``torch.autocast``: what it rounds would be kept.

    Returns:
        One that does nothing where autocast is off.
    """
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
