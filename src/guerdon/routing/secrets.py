"""Keys stay out of logs, errors, checkpoints and traces."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from guerdon.errors import PoolError

__all__ = ["Secret", "expand", "scrub", "variables"]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PATTERNS = re.compile(
    r"""(?ix)
    (bearer\s+|(?:api[-_]?key|authorization|access[-_]?token)["']?\s*[:=]\s*["']?(?:bearer\s+)?)[\w.~+/=-]{6,}
    | \b(sk-|hf_|gsk_|xai-|AIza)[\w-]{6,}
    """
)


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
            PoolError: the variable is not set or empty, or its value cannot be sent in a header.
        """
        value = os.environ.get(self.variable, "").strip()
        if not value:
            raise PoolError(f"environment variable {self.variable} holds no API key; export it, or change api_key_env")
        if not (value.isascii() and value.isprintable()):
            raise PoolError(
                f"environment variable {self.variable} holds line breaks or non-ASCII characters; export the key itself"
            )
        return value

    def __repr__(self) -> str:
        return f"Secret({self.variable})"


def variables(template: str) -> list[str]:
    """Names of the environment variables that ``template`` mentions as ``${NAME}``."""
    return _VARIABLE.findall(template)


def expand(template: str) -> str:
    """``template`` with every ``${NAME}`` replaced by that environment variable.

    Raises:
        PoolError: one of them is not set.
    """
    return _VARIABLE.sub(lambda m: Secret(m.group(1)).reveal(), template)


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` without the given secrets and without anything that looks like a key."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return _PATTERNS.sub(lambda m: f"{m.group(1) or m.group(2)}***", text)
