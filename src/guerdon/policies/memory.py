"""Freed memory back to the operating system, where the C library keeps it."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

__all__ = ["return_freed"]


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def return_freed() -> None:
    """Return what has been freed; does nothing on systems whose C library has no such call (it is glibc's).

    After large blocks have come and gone, glibc keeps them per thread, where no other thread can use them.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
