"""What every command shares: one-line errors, exit codes, JSON output, folders."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import typer

__all__ = ["STATE", "emit", "guarded", "progress"]

F = TypeVar("F", bound=Callable[..., Any])


class _State:
    debug = False


STATE = _State()


def progress(message: str) -> None:
    """Print one line to stderr."""
    print(message, file=sys.stderr, flush=True)


def emit(value: Any, *, as_json: bool, text: str | None = None) -> None:
    """Print data to stdout: JSON when asked for, else ``text``."""
    print(json.dumps(value, ensure_ascii=False, indent=1, default=str) if as_json else text, flush=True)


def guarded(command: F) -> F:
    """Turn the user's mistakes into one line and exit code 2, and Ctrl-C into exit code 130.

    Errors of Guerdon's own making pass through as tracebacks: they are bugs and must be seen.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from guerdon.errors import GuerdonError

        try:
            return command(*args, **kwargs)
        except (GuerdonError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
            if STATE.debug or os.environ.get("GUERDON_DEBUG"):
                raise
            line = " ".join(str(error).split()) if "\n" not in str(error) else str(error)
            print(f"guerdon: {line}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("guerdon: interrupted; start the same command again to go on", file=sys.stderr)
            raise typer.Exit(130) from None

    return run  # type: ignore[return-value]


def fresh_or_resumable(folder: Path) -> Path:
    """Make ``folder`` and return it; an existing file in its place is refused."""
    from guerdon.errors import ConfigError

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
