"""What all settings share: frozen, no unknown keys, all mistakes in one error, values from YAML and the command line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guerdon.errors import ConfigError, nearest

__all__ = ["Config", "Count", "Fraction", "NonNegative", "Positive", "load_yaml"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _Problems(ConfigError):
    """A configuration error that still knows the key of each problem, so that a parent can prefix it."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{key}: {text}" if key else text for key, text in self.problems))


class Config(BaseModel):
    """Base of all settings: frozen, no unknown keys, errors as :class:`~guerdon.errors.ConfigError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _Problems(list(_problems(type(self), error))) from None

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:
        """A mapping given for a nested configuration changes the default there, and does not replace it."""
        if not isinstance(values, Mapping):
            return values
        merged = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, Config) and isinstance(merged.get(name), Mapping):
                merged[name] = _merged(field.default, merged[name])
        return merged

    @model_validator(mode="after")
    def _together(self) -> Self:
        problems = list(self.conflicts())
        if problems:
            raise _Problems([("", text) for text in problems])
        return self

    def conflicts(self) -> Iterator[str]:
        """Yield one sentence per combination of settings that makes no sense."""
        yield from ()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str = "") -> Self:
        """Build from a mapping; ``source`` (for example a file name) begins every error message.

        Raises:
            ConfigError: unknown keys, wrong types, values out of range, or settings that exclude each other.
        """
        try:
            return cls(**dict(values))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") if source else error from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and apply ``"key.sub=value"`` overrides; see :func:`load_yaml`."""
        return cls.from_mapping(load_yaml(path, overrides), source=str(path))

    def flat(self) -> dict[str, Any]:
        """All settings with dotted keys, as JSON values."""
        return dict(_flatten(self.model_dump(mode="json")))

    def free_on_resume(self) -> frozenset[str]:
        """Dotted keys that may change when a run is resumed: they do not change what the next step learns."""
        return frozenset({"save_every", "keep_last"})

    def fingerprint(self) -> str:
        """SHA-256 over all settings; equal settings give equal fingerprints in every process."""
        return hashlib.sha256(json.dumps(self.flat(), sort_keys=True).encode()).hexdigest()


def _merged(default: Config, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is set in ``default``, changed by ``values``; configurations within likewise."""
    out: dict[str, Any] = {name: getattr(default, name) for name in default.model_fields_set}
    for name, value in values.items():
        nested = getattr(default, name, None)
        out[name] = _merged(nested, value) if isinstance(nested, Config) and isinstance(value, Mapping) else value
    return out


def load_yaml(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a mapping from a YAML file (None: an empty one) and set ``"optimiser.lr=1e-5"``-style overrides in it.

    Values of overrides are read as YAML. Numbers such as ``1e-5`` are numbers (plain YAML 1.1 reads text),
    and a key given twice is an error.

    Raises:
        ConfigError: the file is absent, not YAML, or no mapping; an override has no ``=`` or goes
            through a key that holds no mapping.
    """
    try:
        text = "" if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); give the path of a YAML file") from None
    values = _parse(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of settings is expected, got {type(values).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {override!r}: write key=value, for example optimiser.lr=1e-5")
        *above, last = key.strip().split(".")
        at = values
        for piece in above:
            nested = at.setdefault(piece, {})
            if nested is None:
                nested = at[piece] = {}
            if not isinstance(nested, dict):
                raise ConfigError(f"override {override!r}: {piece!r} in {path} holds {nested!r}, not a mapping")
            at = nested
        at[last] = _parse(value, f"override {override!r}")
    return values


class _Loader(yaml.SafeLoader):
    """Safe YAML with floats such as 1e-5, and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str | int | float | bool) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{source}: not valid YAML{where}: {getattr(error, 'problem', None) or error}") from None


def _problems(model: type[BaseModel], error: ValidationError) -> Iterator[tuple[str, str]]:
    for item in error.errors():
        key = ".".join(str(piece) for piece in item["loc"])
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, _Problems):
            for sub, text in inner.problems:
                yield ".".join(filter(None, (key, sub))), text
        elif item["type"] == "extra_forbidden":
            yield key, f"unknown setting{_suggest(str(item['loc'][-1]), model)}"
        elif item["type"] == "missing":
            yield key, "is required"
        else:
            message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            expected = f"must be {message}" if message != item["msg"] else message
            yield key, f"{expected}, got {_short(item['input'])}"


def _suggest(name: str, model: type[BaseModel]) -> str:
    for section, field in model.model_fields.items():
        if (
            isinstance(field.annotation, type)
            and issubclass(field.annotation, Config)
            and name in field.annotation.model_fields
        ):
            return f"; did you mean {section}.{name}?"
    return nearest(name, model.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
