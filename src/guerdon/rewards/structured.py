"""Is the answer JSON of the wanted shape?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from guerdon.errors import ConfigError, DataError, MissingDependency
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.grammar import fenced, last_block
from guerdon.rewards.pattern import compile_pattern, found_in
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["JSONSchema", "read_json"]

_MOST_DIGITS = 400
_MOST_LEVELS = 64


class _Duplicate(ValueError):
    """A key that stands twice in one object."""


def read_json(text: str) -> tuple[Any, str | None]:
    """The value of a JSON text, and None; or None, and one line that says why it is none.

    Stricter than :func:`json.loads`: keys may not repeat (which of two values counts differs between readers), NaN and
    infinities are no JSON, and a number beyond the largest float is refused instead of becoming one.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in items:
            if key in made:
                raise _Duplicate(f"the key {key[:40]!r} stands twice in one object")
            made[key] = value
        return made

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    def real(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"the number {digits[:40]} is too large")
        return value

    def whole(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits is too large")
        return int(digits)

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=real, parse_int=whole)
    except (ValueError, RecursionError) as error:
        return None, "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
    if text.count("[") + text.count("{") > _MOST_LEVELS and _levels(value) > _MOST_LEVELS:
        return None, f"nested more than {_MOST_LEVELS} levels deep"
    return value, None


def _levels(value: Any) -> int:
    """Depth of nesting, without recursion."""
    level = 0
    row = [value]
    while row := [item for item in row if isinstance(item, dict | list)]:
        level += 1
        row = [x for item in row for x in (item.values() if isinstance(item, dict) else item)]
    return level


class JSONSchema(Reward):
    """1 where the answer is JSON that meets a schema, else 0.

    Args:
        schema: a JSON Schema (draft by its ``$schema``, else 2020-12), or None to take each task's reference. References
            to other documents are refused: nothing is fetched.
        where: ``"answer"`` reads the last answer block, ``"fence"`` the last fence marked ``json``, ``"response"`` the
            whole response; ``"auto"`` takes the first of these that is there.
        tag: of the answer block.
        max_characters: a longer answer gives 0.

    Parts: ``json`` (it parses, without repeated keys), ``errors`` (number of violations, up to 100), ``too_long``. A schema
    that is none is an error. A pattern of the schema that takes
    more than a second on a text does not match it.

    Raises:
        ConfigError: the schema is none.
        MissingDependency: jsonschema is not installed.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        schema: Mapping[str, Any] | bool | None = None,
        *,
        where: Literal["auto", "answer", "fence", "response"] = "auto",
        tag: str = "answer",
        max_characters: int = 200_000,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if where not in ("auto", "answer", "fence", "response"):
            raise ConfigError(f"where must be auto, answer, fence or response, got {where!r}")
        if max_characters < 1:
            raise ConfigError(f"max_characters must be at least 1, got {max_characters}")
        self.where, self.tag, self.max_characters = where, tag, max_characters
        self._fixed = None if schema is None else _validator(schema, ConfigError)
        self._made: dict[str, Any] = {}

    def score_one(self, trajectory: Trajectory) -> Score:
        validator = self._fixed or self._of_task(trajectory)
        text = self._find(policy_text(trajectory))
        if text is None or len(text) > self.max_characters:
            return Score(0.0, parts={"json": 0.0, "errors": 0.0, "too_long": float(text is not None)})
        value, problem = read_json(text)
        if problem is not None:
            return Score(0.0, parts={"json": 0.0, "errors": 0.0, "too_long": 0.0})
        errors = 0
        for errors, _ in zip(range(1, 101), _errors(validator, value, trajectory.task.id), strict=False):  # noqa: B007
            pass
        return Score(float(errors == 0), parts={"json": 1.0, "errors": float(errors), "too_long": 0.0})

    def _find(self, text: str) -> str | None:
        if self.where in ("auto", "answer"):
            block = last_block(text, self.tag)
            if block is not None:
                inside = fenced(block, "json") if "```" in block or "~~~" in block else []
                return inside[-1] if inside else block
            if self.where == "answer":
                return None
        if self.where in ("auto", "fence"):
            found = fenced(text, "json")
            if found or self.where == "fence":
                return found[-1] if found else None
        return text

    def _of_task(self, trajectory: Trajectory) -> Any:
        schema = trajectory.task.reference
        if isinstance(schema, str):
            schema, problem = read_json(schema)
            if problem is not None:
                raise DataError(f"the reference of task {trajectory.task.id!r} is no JSON Schema: {problem}")
        try:
            key = json.dumps(schema, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"the reference of task {trajectory.task.id!r} is no JSON Schema: {error}") from error
        if key not in self._made:
            if len(self._made) >= 1000:
                self._made.clear()
            self._made[key] = _validator(schema, DataError)
        return self._made[key]


def _errors(validator: Any, value: Any, task_id: str) -> Iterator[Any]:
    from referencing.exceptions import Unresolvable

    try:
        yield from validator.iter_errors(value)
    except Unresolvable as error:
        raise DataError(f"the schema of task {task_id!r} refers to what it does not hold: {error}") from error
    except RecursionError as error:
        raise DataError(f"the schema of task {task_id!r} refers to itself without end") from error


def _validator(schema: Any, error_type: type[ConfigError] | type[DataError]) -> Any:
    try:
        import jsonschema
        from referencing import Registry
    except ImportError as error:
        raise MissingDependency("JSON schemas need jsonschema: pip install 'guerdon[text]'") from error
    if not isinstance(schema, Mapping | bool):
        raise error_type(f"a JSON Schema is an object, got {type(schema).__name__}")
    base: Any = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        base.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise error_type(f"this is no JSON Schema: {error.message[:200]}") from error
    own = {"pattern": _pattern, "patternProperties": _pattern_properties, "uniqueItems": _unique}
    kind: Any = jsonschema.validators.extend(base, own)
    # An empty registry: jsonschema's own would fetch references over the network.
    return kind(schema, registry=Registry())


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(instance, str) and not _matches(pattern, instance):
        yield ValidationError(f"a text does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Mapping[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, dict):
        for pattern, subschema in patterns.items():
            for key, value in instance.items():
                if _matches(pattern, key):
                    yield from validator.descend(value, subschema, path=key, schema_path=pattern)


def _matches(pattern: str, text: str) -> bool:
    try:
        return found_in(compile_pattern(pattern), text, "search", 1.0)
    except TimeoutError:  # a text on which the pattern takes for ever is none that it was made for
        return False


def _unique(validator: Any, wanted: bool, instance: Any, schema: Any) -> Iterator[Any]:
    """In linear time: jsonschema compares all pairs of items that cannot be sorted."""
    from jsonschema import ValidationError

    if wanted and isinstance(instance, list) and len({_canonical(item) for item in instance}) < len(instance):
        yield ValidationError("items are not unique")


def _canonical(value: Any) -> Any:
    """A hashable value that is equal exactly where JSON values are: 1 is 1.0, true is not 1."""
    if isinstance(value, bool) or value is None:
        return ("constant", value)
    if isinstance(value, dict):
        return ("object", frozenset((key, _canonical(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("array", tuple(_canonical(item) for item in value))
    return value
