"""Errors that Guerdon raises on purpose.

Each message is one line: what was given, what is allowed, what to do. The command line prints
that line and exits with 2; a traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetExceeded",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "GuerdonError",
    "MissingDependency",
    "ModelNotFound",
    "PoolError",
    "RewardError",
    "TrainingError",
    "UnknownName",
    "nearest",
]


class GuerdonError(Exception):
    """Base of every error that is the user's to fix; its text is one actionable line."""


class ConfigError(GuerdonError, ValueError):
    """A setting is missing, unknown, of the wrong type or out of range."""


class DataError(GuerdonError, ValueError):
    """A record, file or dataset cannot be read or means nothing (for example an empty gold list)."""


class UnknownName(GuerdonError, KeyError):
    """A name that nothing is registered under; the message suggests the nearest ones."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class MissingDependency(GuerdonError, ImportError):
    """A feature needs an extra that is not installed."""


class ModelNotFound(GuerdonError, OSError):
    """A model id or folder cannot be loaded here (wrong name, or no network)."""


class CheckpointError(GuerdonError, OSError):
    """A checkpoint is absent, incomplete or corrupt, or cannot be written."""


class EngineError(GuerdonError, RuntimeError):
    """A sampling engine cannot do what was asked (for example a prompt longer than the context)."""


class PoolError(GuerdonError, RuntimeError):
    """A pool of models is wrongly described, or a member cannot be used."""


class BudgetExceeded(GuerdonError, RuntimeError):
    """The next paid call could cost more than what is left of a money cap."""


class TrainingError(GuerdonError, RuntimeError):
    """A training step cannot go on (a loss or gradient that is not finite, nothing to learn from); weights are untouched."""


class RewardError(GuerdonError, RuntimeError):
    """A reward raised, timed out, or returned something that is not a finite score."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return ``"; did you mean a, b?"`` for the names closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
