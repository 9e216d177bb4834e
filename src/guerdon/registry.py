"""Names to parts, resolved lazily.

A :class:`Registry` maps a short name to ``"package.module:attribute"``. Nothing is imported until a
name is asked for, so a lower floor can know the name of a part that lives on a higher one, and
third parties add parts through entry points (group ``guerdon.<kind>``) without touching this code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from guerdon.errors import ConfigError, UnknownName, nearest

__all__ = ["KINDS", "Registry", "registry"]

T = TypeVar("T")


class Registry(Mapping[str, Any]):
    """Lazy mapping from names to parts of one kind (``"reward"``, ``"policy"``, ``"router"``, ...).

    Args:
        kind: what the names stand for; entry points are read from the group ``guerdon.<kind>``.
        builtin: the names that ship with Guerdon, each as ``"module:attribute"``.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._paths: dict[str, str] = dict(builtin or {})
        self._parts: dict[str, Any] = {}
        self._scanned = False

    def register(self, name: str, part: T | str | None = None) -> Any:
        """Add a part, a dotted path, or (without ``part``) decorate a class or function.

        Raises:
            ConfigError: the name is taken by something else.
        """
        if part is None:

            def decorate(obj: T) -> T:
                self.register(name, obj)
                return obj

            return decorate
        taken = self._paths.get(name) or self._parts.get(name)
        if taken is not None and taken != part and not _same_source(taken, part):
            raise ConfigError(f"{self.kind} {name!r} is already registered; choose another name")
        if isinstance(part, str):
            self._paths[name] = part
        else:
            self._parts[name] = part
        return part

    def __getitem__(self, name: str) -> Any:
        if name in self._parts:
            return self._parts[name]
        if name not in self._paths:
            self._scan()
        if name not in self._paths:
            raise UnknownName(f"unknown {self.kind} {name!r}{nearest(name, self)}")
        module, _, attribute = self._paths[name].partition(":")
        part: Any = importlib.import_module(module)
        for piece in filter(None, attribute.split(".")):
            part = getattr(part, piece)
        self._parts[name] = part
        return part

    def path(self, name: str) -> str:
        """Return where a part lives, as ``"module:attribute"``, without importing it."""
        self._scan()
        if name in self._paths:
            return self._paths[name]
        if name in self._parts:
            part = self._parts[name]
            return f"{part.__module__}:{part.__qualname__}"
        raise UnknownName(f"unknown {self.kind} {name!r}{nearest(name, self)}")

    def create(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Look up ``name`` and call it."""
        factory: Callable[..., Any] = self[name]
        return factory(*args, **kwargs)

    def __iter__(self) -> Iterator[str]:
        self._scan()
        return iter(sorted({*self._paths, *self._parts}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        if name in self._paths or name in self._parts:
            return True
        self._scan()
        return name in self._paths

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for point in entry_points(group=f"guerdon.{self.kind}"):
            self._paths.setdefault(point.name, point.value)


def _same_source(a: Any, b: Any) -> bool:
    where = getattr(a, "__module__", None), getattr(a, "__qualname__", None)
    return where[1] is not None and where == (getattr(b, "__module__", None), getattr(b, "__qualname__", None))


KINDS: dict[str, Registry] = {}


def registry(kind: str, builtin: Mapping[str, str] | None = None) -> Registry:
    """Return the registry of ``kind``, made on first use; ``builtin`` names are added to it."""
    reg = KINDS.setdefault(kind, Registry(kind))
    for name, path in (builtin or {}).items():
        reg.register(name, path)
    return reg
