"""Sandboxes by name, in YAML and in the environment.

``local`` (the default), ``docker``, and what other packages register under the entry points ``guerdon.sandbox``: any
object with ``run(job)``.
"""

from __future__ import annotations

import json
from typing import Any

from guerdon.errors import ConfigError
from guerdon.parts import build
from guerdon.sandbox.limits import Sandbox
from guerdon.sandbox.local import CHOICE, default_sandbox

__all__ = ["chosen", "make_sandbox"]


def make_sandbox(spec: Any = None) -> Sandbox:
    """The sandbox that a name, a mapping with ``name`` and settings, or an object stands for.

    Args:
        spec: ``None``: the process's own, see :func:`~guerdon.sandbox.default_sandbox`.

    Raises:
        UnknownName, ConfigError: a name or a setting that does not exist, or an object without ``run``.
    """
    if spec is None:
        return default_sandbox()
    made = build("sandbox", spec)
    if not callable(getattr(made, "run", None)):
        raise ConfigError(f"a sandbox has a method run(job), got {type(made).__name__}")
    return made  # type: ignore[no-any-return]


def chosen(text: str) -> Sandbox:
    """The sandbox of the environment variable ``GUERDON_SANDBOX``: a name, or a JSON object with ``name`` and settings.

    Raises:
        ConfigError: neither.
    """
    if not text.lstrip().startswith("{"):
        return make_sandbox(text.strip())
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{CHOICE} must be a name or a JSON object, got {text[:100]!r}: {error}") from error
    return make_sandbox(spec)
