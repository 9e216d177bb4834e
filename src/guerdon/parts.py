"""Parts of a run by name: a pure function called without tensors is a part; YAML names the same parts.

``group_relative(rewards_B, group_ids_B, scale=False)`` computes. ``group_relative(scale=False)`` computes nothing: it
returns a :class:`Part`, which prints as it was written, compares by value, and goes into a configuration or a YAML file
as ``{name: group_relative, scale: false}``. :func:`build` turns any of these spellings into the object that a trainer
calls. This module imports no torch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from guerdon import names
from guerdon.errors import ConfigError, nearest
from guerdon.registry import registry

__all__ = ["CREDIT", "ENVIRONMENTS", "OBJECTIVES", "REWARDS", "SANDBOXES", "SHAPES", "Part", "build", "part", "spec"]

Kind = Literal["environment", "reward", "shape", "credit", "objective", "sandbox"]

ENVIRONMENTS = registry("environment", names.ENVIRONMENT)
"""Factories of environments: ``(**settings)`` gives an object with ``start(task, ...)``."""

REWARDS = registry("reward", names.REWARD)
"""Factories of rewards: ``(**settings) -> Reward``."""

SANDBOXES = registry("sandbox", names.SANDBOX)
"""Factories of sandboxes: ``(**settings)`` gives an object with ``run(job)``."""

SHAPES = registry("shape", names.SHAPE)
"""Factories of shapes: ``(**settings)`` gives a callable ``(trajectories, scores) -> scores``, or a :class:`Part` of a
pure function of one tensor, which the trainer applies to the outcomes."""

CREDIT = registry("credit", names.CREDIT)
"""Factories of credit rules: ``(**settings)`` gives a callable ``(experience, config) -> [N] advantages``."""

OBJECTIVES = registry("objective", names.OBJECTIVE)
"""Pure functions ``(logprobs, old_logprobs, advantages, **settings) -> loss per token``."""

P = ParamSpec("P")
T = TypeVar("T")
First = TypeVar("First", contravariant=True)
Out = TypeVar("Out", covariant=True)


@dataclass(frozen=True, slots=True)
class Part:
    """A pure function with its settings, waiting for tensors.

    Args:
        kind: ``"shape"``, ``"credit"``, ``"objective"`` or ``"reward"``.
        name: under which :func:`build` and YAML know it.
        settings: keyword arguments.
        function: what is called; no part of its identity.
    """

    kind: str
    name: str
    settings: Mapping[str, Any]
    function: Callable[..., Any] = field(compare=False, repr=False)

    def __call__(self, *tensors: Any, **more: Any) -> Any:
        """Call the function with its settings; ``more`` wins over them. Those of the rule around it are left out."""
        own = {key: value for key, value in self.settings.items() if key in self.parameters}
        return self.function(*tensors, **{**own, **more})

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the function, by which a trainer sees what else it reads."""
        return inspect.signature(self.function).parameters


class PartFunction(Protocol[First, P, Out]):
    """A function that computes when given its first argument, and is a part otherwise."""

    @overload
    def __call__(self, first: First, /, *args: P.args, **kwargs: P.kwargs) -> Out: ...
    @overload
    def __call__(self, **settings: Any) -> Part: ...


def part(
    kind: Kind, name: str | None = None
) -> Callable[[Callable[Concatenate[First, P], Out]], PartFunction[First, P, Out]]:
    """Decorate a pure function so that a call without its first argument binds settings instead of computing.

    Args:
        kind: which registry knows the name.
        name: default: the function's own.

    Raises (when bound):
        ConfigError: a setting that the function does not have, or one without default that is missing.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        known = list(inspect.signature(function).parameters.values())
        first = known[0].name
        inputs = {p.name for p in known if p.default is p.empty and "Tensor" in str(p.annotation)} | {first}
        label = name or function.__name__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if args or first in kwargs:
                return function(*args, **kwargs)
            # A name may stand for more than the function: a credit rule has settings that its mathematics has not.
            target = registry(kind).get(label, call)
            target = function if target is call else target
            free = {p.name: p for p in inspect.signature(target).parameters.values() if p.name not in inputs}
            for key in kwargs:
                if key not in free:
                    raise ConfigError(f"{label} has no setting {key!r}{nearest(key, free)}")
            missing = [key for key, p in free.items() if p.default is p.empty and key not in kwargs]
            if missing:
                raise ConfigError(f"{label} needs {' and '.join(missing)}: {label}({missing[0]}=...)")
            return Part(kind, label, dict(kwargs), function)

        return call

    return decorate


def build(kind: Kind, value: Any) -> Any:
    """The object that a name, a mapping with ``name``, or a :class:`Part` stands for; other objects pass as they are.

    Raises:
        UnknownName: nothing is registered under the name.
        ConfigError: a setting that the part does not have, one that is missing, or a part of another kind.
    """
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Part):
        if value.kind != kind:
            raise ConfigError(f"{value!r} is a part of kind {value.kind}, a {kind} is expected here")
        if value.name not in registry(kind):
            return value
        value = {"name": value.name, **value.settings}
    if not isinstance(value, Mapping):
        return value
    settings = dict(value)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"a {kind} given as a mapping needs a name, got {dict(value)!r}")
    factory = registry(kind)[name]
    star = _check_settings(kind, name, factory, settings)
    listed = settings.pop(star, ()) if star else ()
    return factory(*(listed if isinstance(listed, list | tuple) else [listed]), **settings)


def spec(value: Any) -> Any:
    """A part in the spelling of YAML: its name, or a mapping of name and settings; ``None`` for other objects."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, Mapping):
        return dict(value) if len(value) > 1 else value.get("name")
    if isinstance(value, Part):
        return {"name": value.name, **value.settings} if value.settings else value.name
    return None


def _check_settings(kind: str, name: str, factory: Any, settings: Mapping[str, Any]) -> str | None:
    """Refuse settings that do not fit; returns the name of a ``*parameter``, which YAML gives as a list."""
    try:
        known = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return None
    star = next((key for key, p in known.items() if p.kind is p.VAR_POSITIONAL), None)
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return star
    for key in settings:
        if key not in known:
            raise ConfigError(f"{kind} {name!r} has no setting {key!r}{nearest(key, known)}")
    bound = hasattr(factory, "__wrapped__")  # a pure function's inputs come later, and it checks its own settings
    missing = [
        key
        for key, p in known.items()
        if p.default is p.empty and key not in settings and p.kind is not p.VAR_POSITIONAL
    ]
    if missing and not bound:
        raise ConfigError(f"{kind} {name!r} needs {' and '.join(missing)}: {{name: {name}, {missing[0]}: ...}}")
    return star
