"""Text-to-SQL over real SQLite databases whose names are shuffled, so that a policy must read the schema in the prompt.

Questions come from about forty templates (selection, filters, joins, aggregates, grouping, ordering) over the databases of
:mod:`guerdon.environments.sql_schemas`. Splits: ``train``; ``test`` (the schemas of training in new databases with new
names) and ``unseen`` (two held-out schemas). A task's reference holds ``sql``, ``db`` (the image that training queries),
``fresh`` (the same database with other rows, for measuring), ``schema`` and ``question``. No gold result is empty, and a
filter changes the result, on both fills.

The compact register is for tiny policies with one token a word: a schema line says ``concept identifier`` pairs. The
natural one, for real language models, shows CREATE TABLE statements with descriptions and example values. Episodes are
single turns (:class:`~guerdon.environments.single.SingleTurn`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from guerdon.environments.sql_questions import (
    SHAPES,
    SqlQuestion,
    draw_question,
    in_own_words,
    pick,
    render,
    slipped,
    spoken_words,
    with_one_slip,
)
from guerdon.environments.sql_schemas import (
    HELD_OUT,
    SCHEMAS,
    SqlDatabase,
    identifiers,
    practice_schema,
)
from guerdon.errors import ConfigError
from guerdon.types import StopReason, Task, Trajectory, Turn

__all__ = ["HABITS", "SqlTestbed", "scripted"]

Split = Literal["train", "test", "unseen"]
Form = Literal["whole", "bare", "open"]
Habit = Literal["right", "own words", "copy", "guess", "broken"]
HABITS: tuple[Habit, ...] = ("right", "own words", "copy", "guess", "broken")
"""How a script answers: as the gold query does; rightly, in other words than the gold query's; in the gold query's words
but for one slip; without reasoning and with many slips; with a word missing and perhaps no end of the answer."""


@dataclass(frozen=True)
class SqlTestbed:
    """Tasks, scripts and words.

    Args:
        register: ``"compact"`` for tiny policies, ``"natural"`` for real language models.
        databases: of each schema and split.
        shapes: kinds of questions.
        seed: of databases and questions.
    """

    register: Literal["compact", "natural"] = "compact"
    databases: int = 24
    shapes: tuple[str, ...] = SHAPES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.register not in ("compact", "natural"):
            raise ConfigError(f"register must be 'compact' or 'natural', got {self.register!r}")
        if self.databases < 1:
            raise ConfigError(f"databases must be at least 1, got {self.databases}")
        unknown = [s for s in self.shapes if s not in SHAPES]
        if unknown or not self.shapes:
            raise ConfigError(f"shapes must be some of {', '.join(SHAPES)}, got {list(self.shapes)}")

    def tasks(self, split: Split, n: int, *, seed: int = 0) -> list[Task]:
        """``n`` tasks of a split; the same arguments give the same tasks.

        Raises:
            ConfigError: no such split.
        """
        if split not in ("train", "test", "unseen"):
            raise ConfigError(f"split must be 'train', 'test' or 'unseen', got {split!r}")
        part = ("train", "test", "unseen").index(split)
        schemas = HELD_OUT if split == "unseen" else SCHEMAS
        rng = np.random.default_rng([self.seed, part, seed])
        named = [
            [SqlDatabase.draw(schema, np.random.default_rng([self.seed, part, k, m])) for m in range(self.databases)]
            for k, schema in enumerate(schemas)
        ]
        out: list[Task] = []
        while len(out) < n:
            database = pick(rng, pick(rng, named))
            question = draw_question(database.schema, rng, pick(rng, self.shapes))
            if _telling(question, database):
                out.append(self.task(f"{split}-{seed}-{len(out)}", question, database))
        return out

    def task(self, name: str, question: SqlQuestion, database: SqlDatabase, *, rows: bool = True) -> Task:
        """One task; without ``rows`` its reference has no databases, which supervised training has no use for."""
        reference: dict[str, Any] = {
            "sql": question.sql(database),
            "schema": database.columns,
            "question": question.text,
        }
        if rows:
            reference |= {"db": database.image(0), "fresh": database.image(1)}
        prompt = (
            compact_prompt(question, database) if self.register == "compact" else natural_prompt(question, database)
        )
        meta = {"schema": database.schema.name, "shape": question.shape, "draft": question.draft(database)}
        return Task(name, prompt, reference, meta)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Words of the compact register, each with the blank before it."""
        concepts = [c for schema in (*SCHEMAS, *HELD_OUT) for c in schema.concepts]
        values = [f"'{v}'" for s in (*SCHEMAS, *HELD_OUT) for t in s.tables for c in t.columns for v in c.values]
        keys = [f"{t.concept}_{end}" for s in (*SCHEMAS, *HELD_OUT) for t in s.tables for end in ("key", "of")]
        numbers = [str(k) for k in range(1, 100)]
        known = (*spoken_words(), *concepts, *keys, *values, *identifiers(), *numbers)
        return tuple(f" {w}" for w in dict.fromkeys(known))

    def tokenizer(self) -> Any:
        """A tokenizer with one token for each word of the compact register and each tag."""
        from guerdon.policies import train_bpe

        tags = [f"<{slash}{tag}>" for tag in ("reasoning", "answer") for slash in ("", "/")]
        return train_bpe(["a"], 258 + len(tags) + len(self.words), atoms=tags, words=self.words)

    def scripts(
        self,
        policy: Any,
        n: int,
        mix: Mapping[Habit, float] | None = None,
        *,
        practice: float = 0.5,
        seed: int = 0,
    ) -> list[Trajectory]:
        """Responses to new training questions, for a warm start.

        Args:
            policy: whose tokenizer is used.
            n: how many.
            mix: share of each habit; right responses alone by default. See :data:`HABITS`.
            practice: share of them about arbitrary concepts of all schemas, so that reading a schema does not depend on
                which words the training schemas happen to hold.
            seed: of questions, identifiers and habits.

        Raises:
            ConfigError: no script, unknown habits, or shares that are no distribution.
        """
        mix = {"right": 1.0} if mix is None else mix
        if n < 1:
            raise ConfigError(f"at least one script is needed, got {n}")
        if not 0 <= practice <= 1:
            raise ConfigError(f"practice must be between 0 and 1, got {practice}")
        wrong = [habit for habit in mix if habit not in HABITS]
        if wrong or min(mix.values(), default=-1) < 0 or abs(sum(mix.values()) - 1) > 1e-6:
            raise ConfigError(f"mix must give shares that sum to 1 for some of {', '.join(HABITS)}, got {dict(mix)}")
        rng = np.random.default_rng([self.seed, 3, seed])
        out = []
        for k in range(n):
            schema = practice_schema(rng) if rng.random() < practice else pick(rng, SCHEMAS)
            database = SqlDatabase.draw(schema, rng)
            question = draw_question(schema, rng, pick(rng, self.shapes))
            habit = str(rng.choice([*mix], p=[*mix.values()]))
            form: Form = "bare" if habit == "guess" else "whole"
            if habit == "own words":
                question = in_own_words(question)
            elif habit == "copy":
                question = with_one_slip(question, schema, rng)
            elif habit == "guess":
                question = slipped(question, schema, rng, 0.6)
            elif habit == "broken":
                query = list(question.query)
                del query[int(rng.integers(1, len(query)))]
                question, form = replace(question, query=tuple(query)), pick(rng, ("open", "whole"))
            task = self.task(f"script-{k}", question, database, rows=False)
            out.append(scripted(policy, task, form))
        return out


def _telling(question: SqlQuestion, database: SqlDatabase) -> bool:
    """Whether, on both fills, the gold result is there and the filter matters."""
    for fill in (0, 1):
        connection = sqlite3.connect(":memory:")
        try:
            connection.deserialize(database.image(fill))
            gold = set(connection.execute(question.sql(database)))
            broad = question.broad and set(connection.execute(render(question.broad, database)))
        finally:
            connection.close()
        if not gold or gold == broad or gold == {(0,)} or gold == {(None,)}:
            return False
    return True


def scripted(policy: Any, task: Task, form: Form = "whole") -> Trajectory:
    """The response that a task's query and draft make, with the end token.

    Args:
        policy: whose tokenizer is used.
        task: of a :class:`SqlTestbed`.
        form: ``"whole"``; ``"bare"`` without the reasoning; ``"open"`` without the end of the answer.
    """
    thought = "" if form == "bare" else f"<reasoning> {task.meta['draft']}</reasoning>"
    text = f"{thought}<answer> {task.reference['sql']}{'' if form == 'open' else '</answer>'}"
    turns = (Turn("policy", text, (*policy.encode(text), policy.tokenizer.eos_token_id)),)
    return Trajectory(task, turns, StopReason.DONE, prompt_ids=tuple(policy.render(task.prompt)))


def compact_prompt(question: SqlQuestion, database: SqlDatabase) -> str:
    """Schema lines of ``concept identifier`` pairs, then the question."""
    lines = []
    for table in database.schema.tables:
        pairs = " ,".join(f" {c.concept} {database.names[c.concept]}" for c in table.columns)
        lines.append(f" {table.concept} {database.names[table.concept]} :{pairs}")
    return "\n".join([*lines, f" question : {question.text}"])


def natural_prompt(question: SqlQuestion, database: SqlDatabase) -> str:
    """CREATE TABLE statements with descriptions and example values, then the question and what form is wanted."""
    connection = sqlite3.connect(":memory:")
    connection.deserialize(database.image(0))
    lines = []
    for table in database.schema.tables:
        name = database.names[table.concept]
        lines.append(f"CREATE TABLE {name} ( -- {table.concept}")
        for c in table.columns:
            own = database.names[c.concept]
            example = connection.execute(f"SELECT {own} FROM {name} LIMIT 1").fetchone()[0]
            kind = "TEXT" if c.kind in ("name", "category") else "INTEGER"
            meaning = {"key": f"number of the {table.concept}", "link": f"number of its {c.target}"}.get(
                c.kind, c.concept
            )
            lines.append(f"  {own} {kind}, -- {meaning}, for example {example!r}")
        lines.append(");")
    connection.close()
    return (
        "Answer the question with one SQLite query.\n\n" + "\n".join(lines) + f"\n\nQuestion: {question.text}\n\n"
        "First say which tables and columns are needed, as <reasoning> ... </reasoning>, then give the query as "
        "<answer> SQL </answer>."
    )
