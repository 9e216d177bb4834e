"""Plain values as JSON and back, with tuples, sets, bytes and numbers that JSON lacks. Standard library only.

Nothing that comes out of untrusted code is ever unpickled or evaluated.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Unsupported", "decode", "encode"]

_DEPTH = 64


class Unsupported(TypeError):
    """A value that has no plain form."""


def encode(value: Any, depth: int = 0) -> Any:
    """JSON form of ``value``; types are compared exactly, so that a subclass with a lying ``__eq__`` is refused.

    Raises:
        Unsupported: a type that is not plain, or nesting beyond 64 levels.
    """
    if depth > _DEPTH:
        raise Unsupported(f"nested more than {_DEPTH} levels deep")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -(2**53) < value < 2**53 else {"i": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"f": repr(value)}
    if kind is list:
        return [encode(v, depth + 1) for v in value]
    if kind is tuple:
        return {"t": [encode(v, depth + 1) for v in value]}
    if kind is set or kind is frozenset:
        return {"s": [encode(v, depth + 1) for v in value]}
    if kind is dict:
        return {"d": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]}
    if kind is bytes or kind is bytearray:
        return {"b": bytes(value).hex()}
    if kind is complex:
        return {"c": [repr(value.real), repr(value.imag)]}
    if getattr(kind, "__module__", "") == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), depth + 1)
    raise Unsupported(f"a {kind.__name__} has no plain form")


def decode(form: Any, depth: int = 0) -> Any:
    """The value of a JSON form.

    Raises:
        ValueError: not something that :func:`encode` makes.
    """
    if depth > 2 * _DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(form, list):
        return [decode(v, depth + 1) for v in form]
    if not isinstance(form, dict):
        return form
    if len(form) != 1:
        raise ValueError(f"no encoded value: {sorted(form)[:3]}")
    ((tag, inner),) = form.items()
    try:
        if tag == "t":
            return tuple(decode(v, depth + 1) for v in inner)
        if tag == "s":
            return {_frozen(decode(v, depth + 1)) for v in inner}
        if tag == "d":
            return {_frozen(decode(k, depth + 1)): decode(v, depth + 1) for k, v in inner}
        if tag == "i":
            return int(inner, 16)
        if tag == "f":
            return float(inner)
        if tag == "b":
            return bytes.fromhex(inner)
        if tag == "c":
            return complex(float(inner[0]), float(inner[1]))
    except (TypeError, IndexError) as error:
        raise ValueError(f"no encoded value under {tag!r}: {error}") from error
    raise ValueError(f"unknown tag {tag!r}")


def _frozen(value: Any) -> Any:
    return frozenset(value) if isinstance(value, set) else value
