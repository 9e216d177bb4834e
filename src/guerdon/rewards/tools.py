"""Tool calls: is the output in the required form, and how near do its calls come to the reference calls?

Nothing is executed; all that is needed is a prompt with reference calls. Every constant of the paper, and every switch of
its ablations, is an argument.

Source: Qian et al. 2025, "ToolRL: Reward is All Tool Learning Needs" (arXiv 2504.13958) and its released code.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.rewards.base import OnError, Progress, Reward
from guerdon.rewards.plain import RewardBatch
from guerdon.types import Score, Trajectory, policy_text

__all__ = [
    "LengthReward",
    "ScaleSchedule",
    "ToolCallMatch",
    "ToolFormat",
    "ToolParseError",
    "ToolRLReward",
    "parse_tool_calls",
    "reference_calls",
    "toolrl",
]

Call = Mapping[str, Any]


class ToolParseError(GuerdonError, ValueError):
    """Text that holds no well-formed block of tool calls."""


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls between the first ``<tool_call>`` and the next ``</tool_call>``: one JSON object a line.

    Args:
        text: the assistant's own text; a prompt holds an example of the form.

    Raises:
        ToolParseError: a tag is missing, a line is no JSON, or an entry is no object with a text ``name`` and an object
            ``parameters``.
    """
    start = text.find("<tool_call>")
    stop = text.find("</tool_call>", start + 11) if start >= 0 else -1
    if start < 0 or stop < 0:
        raise ToolParseError(f"there is no {'<tool_call>' if start < 0 else '</tool_call>'} tag")
    calls = []
    for number, line in enumerate(text[start + 11 : stop].strip().split("\n"), 1):
        try:
            call = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ToolParseError(f"line {number} of the tool calls is not JSON") from error
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ToolParseError(f"line {number} of the tool calls is no object with a text under 'name'")
        if not isinstance(call.get("parameters"), dict):
            raise ToolParseError(f"line {number} of the tool calls has no object under 'parameters'")
        calls.append(call)
    return calls


def reference_calls(reference: Any, task_id: str = "") -> tuple[str, list[dict[str, Any]] | None]:
    """The reference output behind its thought, and its calls; None where it calls nothing.

    A reference's thought is not read: in real data thoughts talk about the tags.

    Args:
        reference: the reference output as text, or a list of calls (``[]``: an answer in words is expected).
        task_id: for the error's text.

    Raises:
        DataError: its calls cannot be read: a mistake in the data, never a low reward.
    """
    where = f"task {task_id!r}: " if task_id else ""
    if isinstance(reference, str):
        reference = _behind_thought(reference)
        if "<tool_call>" not in reference:
            return reference, None
        try:
            return reference, parse_tool_calls(reference)
        except ToolParseError as error:
            raise DataError(f"{where}the reference's {error}") from error
    if isinstance(reference, Sequence):
        calls = list(reference)
        if not all(
            isinstance(c, Mapping) and isinstance(c.get("name"), str) and isinstance(c.get("parameters"), Mapping)
            for c in calls
        ):
            raise DataError(f"{where}reference calls are objects with name and parameters")
        block = "\n".join(json.dumps(c) for c in calls)
        text = f"\n<tool_call>\n{block}\n</tool_call>" if calls else "\n<response> </response>"
        return text, [dict(c) for c in calls] or None
    raise DataError(f"{where}a reference is text or a list of calls, got {type(reference).__name__}")


def _behind_thought(reference: str) -> str:
    return reference.rsplit("</think>", 1)[-1]


def _equal(a: Any, b: Any, strict: bool) -> bool:
    """JSON equality; as Python compares, unless ``strict`` keeps booleans apart from numbers."""
    if not strict:
        return bool(a == b)
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k], True) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y, True) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _overlap(a: Sequence[str], b: Sequence[str], whole: bool) -> float:
    """Jaccard index of two lists as multisets; all or nothing where ``whole``."""
    if list(a) == list(b):
        return 1.0
    if whole or not a or not b:
        return 0.0
    common = sum((Counter(a) & Counter(b)).values())
    return common / (len(a) + len(b) - common)


class ToolCallMatch:
    """How near predicted calls come to reference calls, between ``c_range``.

    ``S = r_name + sum of s(g, p)`` over matched pairs, ``S_max = 1 + sum over g of (1 + |parameters of g|)``, and the value
    is ``(c_max - c_min) S / S_max + c_min``; ``r_name`` is the Jaccard index of the lists of names and ``s`` that of the
    parameter names plus the number of parameters with the reference's value.

    Args:
        c_range: lowest and highest value.
        granularity: ``"fine"`` (the default); ``"strict_keys"`` (the code's "refined": a Jaccard index is 1 for equal lists
            and else 0); ``"intermediate"`` (names, and 1 for each reference call that an unused predicted call equals
            whole; ``S_max = 1 + |G|``); ``"coarse"`` (highest where the lists are equal, else lowest).
        matching: ``"greedy"`` in the order of the reference calls (the code) or ``"optimal"`` (the paper's maximum).
        strict: tell ``true`` from 1.
    """

    def __init__(
        self,
        c_range: tuple[float, float] = (-3.0, 3.0),
        granularity: Literal["fine", "intermediate", "coarse", "strict_keys"] = "fine",
        matching: Literal["greedy", "optimal"] = "greedy",
        *,
        strict: bool = False,
    ) -> None:
        self.c_range = _range("c_range", c_range)
        if granularity not in ("fine", "intermediate", "coarse", "strict_keys"):
            raise ConfigError(f"granularity must be fine, intermediate, coarse or strict_keys, got {granularity!r}")
        if matching not in ("greedy", "optimal"):
            raise ConfigError(f"matching must be 'greedy' or 'optimal', got {matching!r}")
        self.granularity, self.matching, self.strict = granularity, matching, strict

    def score(
        self, pred_calls: Sequence[Call] | None, ref_calls: Sequence[Call], c_range: tuple[float, float] | None = None
    ) -> float:
        """The value of predicted calls.

        Args:
            pred_calls: in order; ``None`` where they could not be read, which gives the lowest value.
            ref_calls: at least one.
            c_range: in place of the constructor's.
        """
        low, high = c_range or self.c_range
        if pred_calls is None:
            return low
        made = self.explain(pred_calls, ref_calls)
        if made["equal"]:
            return high
        return (high - low) * made["s"] / made["s_max"] + low

    def explain(self, pred_calls: Sequence[Call], ref_calls: Sequence[Call]) -> dict[str, float]:
        """The terms: ``name`` (r_name), ``keys`` and ``values`` (summed over pairs), ``s``, ``s_max``, ``equal``.

        Raises:
            DataError: no reference call.
        """
        if not ref_calls:
            raise DataError(
                "there are no reference calls; a reference without calls has correctness 0, whatever is said"
            )
        equal = len(pred_calls) == len(ref_calls) and all(
            _equal(dict(p), dict(g), self.strict) for p, g in zip(pred_calls, ref_calls, strict=True)
        )
        whole = self.granularity == "strict_keys"
        if self.granularity == "coarse":
            return {
                "name": float(equal),
                "keys": 0.0,
                "values": 0.0,
                "s": float(equal),
                "s_max": 1.0,
                "equal": float(equal),
            }
        name = _overlap([g["name"] for g in ref_calls], [p["name"] for p in pred_calls], whole)
        table = [[self._pair(g, p, whole) for p in pred_calls] for g in ref_calls]
        pairs = self._match([[k + v for k, v in row] for row in table])
        keys = sum(table[i][j][0] for i, j in pairs)
        values = sum(table[i][j][1] for i, j in pairs)
        if self.granularity == "intermediate":
            s_max = 1.0 + len(ref_calls)
        else:
            s_max = 1.0 + sum(1 + len(g["parameters"]) for g in ref_calls)
        return {
            "name": name, "keys": keys, "values": values, "s": name + keys + values, "s_max": s_max, "equal": float(equal),
        }  # fmt: skip

    def _pair(self, g: Call, p: Call, whole: bool) -> tuple[float, float]:
        if self.granularity == "intermediate":
            return 0.0, float(_equal(dict(p), dict(g), self.strict))
        if p["name"] != g["name"]:
            return 0.0, 0.0
        want, got = g["parameters"], p["parameters"]
        values = sum(k in got and _equal(got[k], want[k], self.strict) for k in want)
        return _overlap(list(want), list(got), whole), float(values)

    def _match(self, scores: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
        if not scores or not scores[0]:
            return []
        if self.matching == "optimal":
            from scipy.optimize import linear_sum_assignment

            rows, columns = linear_sum_assignment(np.asarray(scores), maximize=True)
            return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if scores[i][j] > 0]
        used: set[int] = set()
        out = []
        for i, row in enumerate(scores):
            best, chosen = 0.0, -1
            for j, value in enumerate(row):
                # Strictly greater: the first on ties, and nothing that scores 0.
                if j not in used and value > best:
                    best, chosen = value, j
            if chosen >= 0:
                used.add(chosen)
                out.append((i, chosen))
        return out


_FORMS = {
    (False, True): (r"<think>.*?</think>\n<response>.*?</response>", ("response",)),
    (True, False): (r"<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>", ("tool_call",)),
    (True, True): (
        r"<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>\n<response>.*?</response>",
        ("tool_call", "response"),
    ),
    (False, False): (r"<think>.*?</think>", ()),
}
_COMPILED = {key: (re.compile(pattern, re.DOTALL), tags) for key, (pattern, tags) in _FORMS.items()}


class ToolFormat:
    """Whether the output has the form that the reference has: highest of ``f_range``, else its lowest.

    Which blocks are required depends on the reference alone, on what stands behind its thought. Newlines are single and
    mandatory.

    Args:
        f_range: lowest and highest value.
    """

    def __init__(self, f_range: tuple[float, float] = (0.0, 1.0)) -> None:
        self.f_range = _range("f_range", f_range)

    def matches(self, text: str, reference: str) -> bool:
        """Whether one stripped assistant text has the reference's form."""
        text, reference = text.strip(), _behind_thought(reference)
        pattern, tags = _COMPILED["<tool_call>" in reference, "<response>" in reference]
        if any(text.count(f"<{t}>") != 1 or text.count(f"</{t}>") != 1 for t in tags):
            return False
        return pattern.fullmatch(text) is not None

    def __call__(self, texts: Sequence[str], refs: Sequence[str]) -> np.ndarray:
        """``[B]`` float64."""
        if len(texts) != len(refs):
            raise ConfigError(f"{len(texts)} texts for {len(refs)} references")
        low, high = self.f_range
        return np.array(
            [high if self.matches(t, r) else low for t, r in zip(texts, refs, strict=True)], dtype=np.float64
        )


@dataclass(frozen=True, slots=True)
class LengthReward:
    """``min(1, round(words / L, 2))``, the words being those of the last think block; 0 without its tags.

    Args:
        length: L.
        final: L at ``steps``; it grows linearly and goes on growing behind it, as in the code.
        steps: of the growth.
    """

    length: float = 512.0
    final: float | None = None
    steps: int = 105

    def __post_init__(self) -> None:
        if not self.length > 0 or (self.final is not None and not self.final > 0) or self.steps < 1:
            raise ConfigError("length and final must be positive and steps at least 1")

    @classmethod
    def dynamic(cls) -> LengthReward:
        """The paper's growing length: 384 to 640 over 105 steps."""
        return cls(384.0, 640.0, 105)

    def __call__(self, text: str, step: int = 0) -> float:
        """Of one assistant text."""
        if "<think>" not in text or "</think>" not in text:
            return 0.0
        inside = text.rsplit("<think>", 1)[1].split("</think>", 1)[0]
        limit = self.length if self.final is None else self.length + (self.final - self.length) * step / self.steps
        return min(1.0, round(len(inside.split()) / limit, 2))


@dataclass(frozen=True, slots=True)
class ScaleSchedule:
    """How the two ranges change over training steps.

    Args:
        kind: ``"constant"``; ``"two_stage"`` (correctness divided by 3 before ``switch``, format halved from it on);
            ``"smooth"`` (both ranges start as [-2, 2] and move linearly towards the constructor's over ``steps``; the
            format's never gets narrower than [-1, 1], so that its lowest value is not 0, the correctness's never wider
            than [-3, 3]).
        switch: step of ``"two_stage"``.
        steps: of ``"smooth"``.
    """

    kind: Literal["constant", "two_stage", "smooth"] = "constant"
    switch: int = 30
    steps: int = 150

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "two_stage", "smooth"):
            raise ConfigError(f"kind must be constant, two_stage or smooth, got {self.kind!r}")
        if self.switch < 0 or self.steps < 1:
            raise ConfigError("switch must be >= 0 and steps at least 1")

    def changes(self) -> Iterable[int]:
        """The steps from which on the ranges are others than before, beginning with 0."""
        return {"constant": (0,), "two_stage": (0, self.switch), "smooth": range(self.steps + 1)}[self.kind]

    def ranges(
        self, f_range: tuple[float, float], c_range: tuple[float, float], step: int
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Ranges of format and correctness at a step (steps of the optimiser, not epochs)."""
        if self.kind == "two_stage":
            if step < self.switch:
                return f_range, (c_range[0] / 3, c_range[1] / 3)
            return (f_range[0] / 2, f_range[1] / 2), c_range
        if self.kind == "smooth":
            done = min(1.0, step / self.steps)
            (f_min, f_max), (c_min, c_max) = f_range, c_range
            return (
                (min(-1.0, -2.0 + (2.0 + f_min) * done), max(1.0, 2.0 - (2.0 - f_max) * done)),
                (max(-3.0, -2.0 + (c_min + 2.0) * done), min(3.0, 2.0 + (c_max - 2.0) * done)),
            )
        return f_range, c_range


class ToolRLReward(Reward):
    """Format plus correctness (plus length), in [-3, 4] with the defaults; a wrong format does not gate correctness.

    Args:
        format, match: the two terms.
        length: adds a length reward.
        schedule: of the ranges.

    The task's reference is the reference output, or its list of calls; without calls, correctness is 0. A broken
    reference is an error. Parts: ``format``, ``correctness``, ``length``. ``reward(trajectories)``, or
    ``reward(texts, refs, step)`` for a :class:`~guerdon.rewards.RewardBatch`; in training the step is read from the run.
    """

    gives = frozenset({"outcome"})

    def __init__(
        self,
        format: ToolFormat | None = None,
        match: ToolCallMatch | None = None,
        length: LengthReward | None = None,
        schedule: ScaleSchedule | None = None,
        *,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.format, self.match = format or ToolFormat(), match or ToolCallMatch()
        self.length, self.schedule = length, schedule or ScaleSchedule()
        low, high = zip(*map(self._ranges, self.schedule.changes()), strict=True)
        self.range = (min(low), max(high) + (length is not None))

    def _ranges(self, step: int) -> tuple[float, float]:
        f, c = self.schedule.ranges(self.format.f_range, self.match.c_range, step)
        return f[0] + min(c[0], 0.0), f[1] + max(c[1], 0.0)

    def score_text(self, text: str, reference: Any, step: int = 0, task_id: str = "") -> Score:
        """Of one assistant text."""
        text = text.strip()
        wanted, calls = reference_calls(reference, task_id)
        f_range, c_range = self.schedule.ranges(self.format.f_range, self.match.c_range, step)
        parts = {"format": f_range[self.format.matches(text, wanted)]}
        if calls is None:
            parts["correctness"] = 0.0
        else:
            try:
                predicted: list[dict[str, Any]] | None = parse_tool_calls(text)
            except ToolParseError:
                predicted = None  # a low reward is what the method gives for it
            parts["correctness"] = self.match.score(predicted, calls, c_range)
        if self.length is not None:
            parts["length"] = self.length(text, step)
        return Score(math.fsum(parts.values()), parts=parts)

    def score(self, trajectories: Sequence[Trajectory], progress: Progress | None = None) -> list[Any]:
        """Score a batch at the run's step (0 outside training)."""
        step = 0 if progress is None else progress.step
        return [self.score_text(policy_text(t), t.task.reference, step, t.task.id) for t in trajectories]

    def __call__(self, trajectories: Any, refs: Any = None, step: int = 0, *, progress: Progress | None = None) -> Any:
        """See the class."""
        if refs is None:
            return super().__call__(trajectories, progress=progress)
        if len(trajectories) != len(refs):
            raise ConfigError(f"{len(trajectories)} texts for {len(refs)} references")
        scores = [self.score_text(t, r, step, str(k)) for k, (t, r) in enumerate(zip(trajectories, refs, strict=True))]
        parts = {
            k: np.array([s.parts[k] for s in scores], dtype=np.float64) for k in (scores[0].parts if scores else ())
        }
        return RewardBatch(np.array([s.value for s in scores], dtype=np.float64), parts)


def toolrl(
    granularity: Literal["fine", "intermediate", "coarse", "strict_keys"] = "fine",
    matching: Literal["greedy", "optimal"] = "greedy",
    *,
    f_range: tuple[float, float] = (0.0, 1.0),
    c_range: tuple[float, float] = (-3.0, 3.0),
    length: Literal["none", "fixed", "dynamic"] = "none",
    schedule: Literal["constant", "two_stage", "smooth"] = "constant",
    strict: bool = False,
    on_error: OnError = "raise",
) -> ToolRLReward:
    """The paper's reward with its ablation switches, for configurations; ``c_range=(-1, 1)`` is "equal max"."""
    lengths = {"none": None, "fixed": LengthReward(), "dynamic": LengthReward.dynamic()}
    if length not in lengths:
        raise ConfigError(f"length must be none, fixed or dynamic, got {length!r}")
    return ToolRLReward(
        ToolFormat(_range("f_range", f_range)),
        ToolCallMatch(_range("c_range", c_range), granularity, matching, strict=strict),
        lengths[length],
        ScaleSchedule(schedule),
        name="toolrl",
        on_error=on_error,
    )


def _range(what: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2 or not all(math.isfinite(v) for v in values) or not values[0] < values[1]:
        raise ConfigError(f"{what} must be two increasing numbers, got {tuple(values)}")
    return float(values[0]), float(values[1])
