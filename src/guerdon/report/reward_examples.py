"""One worked example of every registered reward: what the page of all rewards shows, and what its tests attack.

A reward that is registered without an example here fails ``tests/unit/test_reward_catalogue.py``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.types import StopReason, Task, Trajectory, Turn, Usage

__all__ = ["Example", "examples"]


@dataclass(frozen=True, slots=True)
class Example:
    """A response that a reward likes.

    Args:
        group: heading under which the page lists the reward.
        completion: what the policy wrote.
        reference: of the task; None where the reward reads none.
        settings: of the reward.
        meta: of the task.
        prompt: its question.
        reply: an environment's turn behind the completion.
        shown: settings as the page shows them, where they hold objects.
    """

    group: str
    completion: str
    reference: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = "What is the capital of Peru?"
    reply: str | None = None
    shown: str | None = None

    def trajectory(self, **changes: Any) -> Trajectory:
        """The example as a trajectory; ``completion``, ``reference`` or ``meta`` may be others."""
        task = Task(
            "example", self.prompt, changes.get("reference", self.reference), dict(changes.get("meta", self.meta))
        )
        turns = [Turn("policy", changes.get("completion", self.completion))]
        if self.reply is not None:
            turns.append(Turn("environment", self.reply))
        return Trajectory(task, tuple(turns), StopReason.DONE, usage=Usage(calls=1, usd=0.002))


def _words(text: str) -> int:
    return len(text.split())


def _grade(prompt: str) -> str:
    return "<answer>0.9</answer>"


def _encode(texts: Sequence[str]) -> np.ndarray:
    """Counts of letters: enough to show how a reward of embeddings behaves."""
    rows = np.zeros((len(texts), 64))
    for row, text in zip(rows, texts, strict=True):
        for letter in text:
            row[ord(letter) % 64] += 1.0
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


class _Letters:
    """A policy's embeddings and tokenizer: one row for each of 64 letters."""

    all_special_ids: tuple[int, ...] = ()

    @property
    def tokenizer(self) -> Any:
        return self

    @property
    def model(self) -> Any:
        return self

    def get_input_embeddings(self) -> Any:
        import torch

        table = torch.nn.Embedding(64, 64)
        table.weight.data = torch.eye(64)
        return table

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 64 for letter in text]


def database(folder: Path) -> str:
    """A small SQLite file in a folder."""
    path = folder / "example.sqlite"
    if not path.exists():
        connection = sqlite3.connect(path)
        connection.executescript(
            "CREATE TABLE city (id INTEGER, name TEXT, country TEXT);"
            "INSERT INTO city VALUES (1, 'Lima', 'Peru'), (2, 'Oslo', 'Norway');"
        )
        connection.close()
    return str(path)


_ANSWER, _MATHS, _TEXT = "Short answers", "Mathematics and numbers", "Text beside a reference"
_FORM, _LENGTH, _STYLE = "Form", "Length and repetition", "Language and tone"
_TOOLS, _MODEL = "Code, SQL and tools", "Rewards that hold a model"

_GOOD = "<think>Peru is in South America.</think>\n<answer>Lima</answer>"
_CODE = "```python\nn = int(input())\nprint(n * n)\n```"
_CALL = '<think>look it up</think>\n<tool_call>\n{"name": "capital", "parameters": {"country": "Peru"}}\n</tool_call>'
_PLAIN = "The drug lowers blood pressure. Take 5 mg each day. Do not take it with wine."
_SOURCE = (
    "The pharmaceutical preparation ameliorates hypertension; administration of 5 mg daily is indicated. Do not combine "
    "the medication with alcoholic beverages."
)
_ENGLISH = "The capital of Peru is Lima, which lies at the coast of the Pacific and has many people who live there."
_QUERY = "SELECT name FROM city WHERE country = 'Peru'"


def examples(folder: Path) -> dict[str, Example]:
    """Examples by registered name.

    Args:
        folder: where the database of the SQL examples is written.
    """
    counted: dict[str, Any] = {"count": _words}
    sql = Example(
        _TOOLS, f"<reasoning>filter by country</reasoning>\n<answer>{_QUERY}</answer>",
        {"sql": _QUERY, "db": database(folder), "schema": {"city": ["id", "name", "country"]}},
        prompt="Which cities lie in Peru?",
    )  # fmt: skip
    made: dict[str, Example] = {
        "exact_match": Example(_ANSWER, _GOOD, ["Lima"]),
        "token_f1": Example(_ANSWER, _GOOD, "Lima"),
        "choice_match": Example(_ANSWER, "<answer>(B)</answer>", "B", meta={"options": ["Oslo", "Lima"]}),
        "typed_outcome": Example(_ANSWER, "<think>2+2</think><answer>4</answer>", "4", meta={"type": "numerical"}),
        "regex_match": Example(_ANSWER, _GOOD, settings={"pattern": r"\bLima\b", "tag": "answer"}),
        "math_equality": Example(_MATHS, r"So it is \boxed{\frac{x}{2}}.", "x/2"),
        "boxed_match": Example(_MATHS, r"So it is \boxed{\frac{1}{2}}.", "0.5"),
        "boxed_format": Example(_MATHS, r"So it is \boxed{\frac{1}{2}}."),
        "relaxed_number": Example(_MATHS, "<answer>102</answer>", 100),
        "quantity": Example(_MATHS, "<answer>1.5 km</answer>", "1500 m"),
        "box_iou": Example(_MATHS, "<answer>[0, 0, 10, 10]</answer>", [0, 0, 10, 10]),
        "rouge": Example(_TEXT, "Lima is the capital of Peru.", "The capital of Peru is Lima."),
        "bleu": Example(_TEXT, "The capital of Peru is Lima.", "The capital of Peru is Lima."),
        "chrf": Example(_TEXT, "Lima is the capital of Peru.", "The capital of Peru is Lima."),
        "citations": Example(
            _TEXT, "Lima is the capital of Peru [1].", ["Lima is the capital and largest city of Peru."]
        ),
        "tag_format": Example(_FORM, _GOOD, settings={"tags": ["think", "answer"]}),
        "think_answer_format": Example(_FORM, _GOOD),
        "router_format": Example(_FORM, _GOOD),
        "json_schema": Example(
            _FORM, '<answer>{"city": "Lima"}</answer>',
            {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
        ),
        "hump_length": Example(_LENGTH, "one two three four", settings={"max_len": 8, **counted}),
        "linear_length": Example(_LENGTH, "one two three four", settings={"max_len": 4, **counted}),
        "overlong_penalty": Example(_LENGTH, "one two", settings={"max_len": 8, "buffer": 4, **counted}),
        "target_length": Example(_LENGTH, "one two three four", settings={"target": 4, **counted}),
        "format_length": Example(_LENGTH, r"so \boxed{2} it is", settings={"max_len": 8, **counted}),
        "length_incentive": Example(_LENGTH, "one two three four"),
        "trigram_uniqueness": Example(_LENGTH, "one two three four"),
        "repetition_ratio": Example(_LENGTH, "one two one two one two", settings={"n": 2}),
        "phrase_reward": Example(_STYLE, "Wait, let me check. Alternatively, since we know that, therefore."),
        "fkgl": Example(_STYLE, _PLAIN, prompt=_SOURCE),
        "zipf_simplicity": Example(_STYLE, _PLAIN),
        "preservation_gate": Example(_STYLE, _PLAIN, prompt=_SOURCE),
        "language_match": Example(_STYLE, _ENGLISH, settings={"language": "en"}),
        "script_share": Example(_STYLE, "The capital of Peru is Lima.", settings={"script": "Latin"}),
        "sentiment": Example(_STYLE, "I love Lima. It is a great city!"),
        "toxicity": Example(_STYLE, "The capital of Peru is Lima."),
        "code_tests": Example(_TOOLS, _CODE, [{"input": "3\n", "output": "9\n"}]),
        "toolrl": Example(_TOOLS, _CALL, _CALL),
        "grounding": Example(_TOOLS, "open the door", reply="The door is open."),
        "call_cost": Example(_TOOLS, "Lima"),
        **dict.fromkeys(("sql_execution", "sql_syntax", "sql_schema", "sql_ngrams", "sql_clauses", "reasoning_sql"), sql),
        "sql_format": Example(_TOOLS, sql.completion, prompt=sql.prompt),
        "embedding_similarity": Example(
            _MODEL, "Lima is the capital of Peru.", "The capital of Peru is Lima.", settings={"encoder": _encode},
            shown="encoder: minilm",
        ),
        "regularized_relevance": Example(
            _MODEL, "Lima is the capital of Peru.", settings={"encoder": _encode}, meta={"type": "open"},
            shown="encoder: minilm",
        ),
        "bmas": Example(
            _MODEL, "<answer>The capital is Lima.</answer>", "The capital is Lima.", settings={"policy": _Letters()},
            shown="policy: smollm2",
        ),
        "judge": Example(_MODEL, "Lima", settings={"generate": _grade}, shown="model: NAME, base_url: URL"),
    }  # fmt: skip
    return made
