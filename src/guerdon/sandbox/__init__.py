"""Untrusted code and SQL in processes with limits."""

from __future__ import annotations

import importlib
from typing import Any

_HOME: dict[str, str] = {
    "Call": "limits",
    "DockerSandbox": "docker",
    "Job": "limits",
    "Limits": "limits",
    "LocalSandbox": "local",
    "Result": "limits",
    "Sandbox": "limits",
    "SandboxError": "local",
    "Status": "limits",
    "default_sandbox": "local",
    "make_sandbox": "select",
    "run_calls": "local",
    "run_python": "local",
    "run_sql": "local",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.sandbox.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.sandbox' has no attribute {name!r}")
