"""Keys stay out of logs, errors, checkpoints and traces."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from guerdon.errors import PoolError

__all__ = ["Secret", "scrub"]

_PATTERNS = re.compile(r"(?i)(bearer\s+)[\w.~+/=-]{6,}|\b(sk-|hf_|gsk_|xai-|AIza)[\w-]{6,}")


class Secret:
    """The value of an environment variable, looked up when it is used and never printed.

    Args:
        variable: name of the environment variable.
    """

    __slots__ = ("variable",)

    def __init__(self, variable: str) -> None:
        self.variable = variable

    def reveal(self) -> str:
        """The value.

        Raises:
            PoolError: the variable is not set, or empty.
        """
        value = os.environ.get(self.variable, "").strip()
        if not value:
            raise PoolError(f"environment variable {self.variable} holds no API key; export it, or change api_key_env")
        return value

    def __repr__(self) -> str:
        return f"Secret({self.variable})"


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` without the given secrets and without anything that looks like a key."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return _PATTERNS.sub(lambda m: f"{m.group(1) or m.group(2)}***", text)
