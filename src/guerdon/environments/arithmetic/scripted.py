"""Scripted solutions in many styles, with the labels of their lines: data for warm starts and for scorers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from guerdon.environments.arithmetic.chains import (
    FILLERS,
    HEDGES,
    MARKERS,
    Chain,
    Spec,
    Split,
    apply,
    make_task,
    split_of,
)
from guerdon.errors import ConfigError, nearest
from guerdon.rollout.text import TokenText
from guerdon.types import StopReason, Task, Trajectory, Turn

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["STYLES", "Script", "Style", "scripts", "write"]


@dataclass(frozen=True, slots=True)
class Style:
    """How a solution is written.

    Args:
        steps: work the chain out; False guesses the answer at once.
        error: chance that a line is wrong; without steps, that the guess is.
        wrong_lines: so many lines, chosen at random, are wrong besides.
        cancel: chance that a line after an error comes back to the true value (and so is wrong itself).
        lucky: chance that a solution which went wrong states the right answer all the same.
        slip: chance that the answer is another value than the one worked out.
        skip: chance that a line is left out; its operation is carried out silently, and rightly.
        filler: chance of a filler line behind each line, and of another one behind that.
        markers: chance that a line begins with a marker word.
        answer: ``"plain"`` ("answer 17"), ``"boxed"``, ``"malformed"`` (a box that is not closed or not opened), or
            ``"none"``.
        ramble: so many lines that lead nowhere stand in place of the solution, and it does not end by itself.
    """

    steps: bool = True
    error: float = 0.0
    wrong_lines: int = 0
    cancel: float = 0.0
    lucky: float = 0.0
    slip: float = 0.0
    skip: float = 0.0
    filler: float = 0.0
    markers: float = 0.0
    answer: Literal["plain", "boxed", "malformed", "none"] = "plain"
    ramble: int = 0

    def __post_init__(self) -> None:
        for name in ("error", "cancel", "lucky", "slip", "skip", "filler", "markers"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.filler == 1:
            raise ConfigError("filler=1 would never end; choose less than 1")
        if self.answer not in ("plain", "boxed", "malformed", "none"):
            raise ConfigError(f"answer must be plain, boxed, malformed or none, got {self.answer!r}")
        if self.wrong_lines < 0 or self.ramble < 0:
            raise ConfigError(f"wrong_lines and ramble must not be negative, got {self.wrong_lines} and {self.ramble}")


STYLES: Mapping[str, Style] = {
    "right": Style(),
    "wrong": Style(wrong_lines=1),
    "skipped": Style(skip=0.5),
    "filler": Style(filler=0.4),
    "marked": Style(markers=0.8),
    "guess": Style(steps=False, error=0.6),
    "ramble": Style(ramble=40),
    "boxed": Style(answer="boxed"),
    "malformed": Style(answer="malformed"),
    "no answer": Style(answer="none"),
}
"""The usual styles by name."""


@dataclass(frozen=True, slots=True)
class Script:
    """A written solution.

    Args:
        text: lines, each but the last with its newline.
        labels: of each line, whether it is correct (as :func:`~guerdon.environments.arithmetic.check` says, too).
        ended: False where it was cut off: no end of message follows.
    """

    text: str
    labels: tuple[bool, ...]
    ended: bool = True


def write(task: Task, rng: np.random.Generator, style: Style | str = "right") -> Script:
    """Write one solution of an arithmetic task.

    Raises:
        ConfigError: no style has this name.
    """
    style = _style(style)
    chain: Chain = task.meta["chain"]
    if style.ramble:
        return _ramble(chain, rng, style)
    lines: list[tuple[str, bool]] = []
    if style.steps:
        value = _work_out(chain, rng, style, lines)
    else:
        value = _other(chain.answer, max(chain.values), rng) if rng.random() < style.error else chain.answer
    if style.steps and value != chain.answer and rng.random() < style.lucky:
        value = chain.answer
    elif style.steps and rng.random() < style.slip:
        value = _other(value, max(chain.values), rng)
    if style.answer != "none":
        well_formed = style.answer != "malformed"
        lines.append((_answer(task, value, rng, style), well_formed and value == chain.answer))
    if not lines:
        lines.append((FILLERS[0], True))
    return Script("\n".join(text for text, _ in lines), tuple(label for _, label in lines))


def scripts(
    policy: Policy,
    n: int,
    mix: Mapping[Style | str, float] | Style | str = "right",
    *,
    tasks: Sequence[Task] | None = None,
    spec: Spec | None = None,
    split: Split = "train",
    max_tokens: int | None = None,
    seed: int = 0,
) -> list[Trajectory]:
    """Scripted trajectories for :class:`~guerdon.training.SftTrainer` or a scorer.

    Args:
        policy: whose tokenizer and prompt format are used.
        n: how many.
        mix: style (or its name) to its share; shares are relative.
        tasks: drawn from, with replacement; by default new chains of ``spec`` in ``split``.
        spec, split: of those.
        max_tokens: longer responses are cut there (``StopReason.LENGTH``, without an end token).
        seed: of tasks, styles and solutions.

    Returns:
        ``n`` trajectories of one policy turn; ``info`` holds ``labels`` (per line) and ``style`` (number in ``mix``).
    """
    shares = dict(mix) if isinstance(mix, Mapping) else {mix: 1.0}
    styles = [_style(s) for s in shares]
    weights = np.asarray(list(shares.values()), dtype=np.float64)
    if n < 0 or not len(weights) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ConfigError(f"scripts need n >= 0 and shares that are not negative and not all 0, got n={n}, {shares}")
    rng = np.random.default_rng([seed & 0xFFFFFFFF, 12])
    if tasks is None:
        draw, seen = spec or Spec(), 0
        tasks = []
        while len(tasks) < n:
            chain, seen = draw.draw(rng), seen + 1
            if split_of(chain) == split:
                tasks.append(make_task(chain, draw, rng))
            elif seen > 1000 + 100 * n:
                raise ConfigError(f"{draw} has (nearly) no chains in split {split!r}")
    else:
        tasks = [tasks[int(i)] for i in rng.integers(0, len(tasks), n)]
    text = TokenText(policy.tokenizer, policy.decode)
    end = policy.tokenizer.eos_token_id
    out = []
    for task, k in zip(tasks, rng.choice(len(styles), n, p=weights / weights.sum()).tolist(), strict=True):
        script = write(task, rng, styles[k])
        ids = policy.encode(script.text)
        ended = script.ended and (max_tokens is None or len(ids) < max_tokens)
        ids = [*ids, end] if ended else ids[:max_tokens]
        said, ends = text.text_and_ends(ids, final=int(ended))
        turn = Turn("policy", said, tuple(ids), token_ends=ends)
        stop = StopReason.DONE if ended else StopReason.LENGTH
        prompt = tuple(policy.render(task.prompt))
        out.append(Trajectory(task, (turn,), stop, prompt_ids=prompt, info={"labels": script.labels, "style": k}))
    return out


def _style(style: Style | str) -> Style:
    if isinstance(style, Style):
        return style
    if style not in STYLES:
        raise ConfigError(f"unknown style {style!r}{nearest(style, STYLES)}; one of {', '.join(STYLES)}, or a Style")
    return STYLES[style]


def _work_out(chain: Chain, rng: np.random.Generator, style: Style, lines: list[tuple[str, bool]]) -> int:
    """Append the lines of a worked solution; the value that it arrives at."""
    truth, highest = chain.values, max(chain.values)
    value = chain.start
    marked = set(rng.permutation(len(chain))[: style.wrong_lines].tolist())
    for k, (sign, operand) in enumerate(chain.operations):
        right = apply(value, sign, operand)
        wrong = k in marked or rng.random() < style.error
        back = value != truth[k] and rng.random() < style.cancel
        if not wrong and not back and rng.random() < style.skip:
            value = right
            continue
        stated = truth[k + 1] if back else _other(right, highest, rng) if wrong else right
        _line(f"{value}{sign}{operand}={stated}", stated == right, rng, style, lines)
        value = stated
        while rng.random() < style.filler:
            again = int(rng.integers(len(FILLERS) + 1))
            previous = lines[-1]
            lines.append(previous if again == len(FILLERS) else (FILLERS[again], True))
    return value


def _line(text: str, label: bool, rng: np.random.Generator, style: Style, lines: list[tuple[str, bool]]) -> None:
    marker = MARKERS[int(rng.integers(len(MARKERS)))] if rng.random() < style.markers else ""
    lines.append((marker + text, label))


def _other(right: int, highest: int, rng: np.random.Generator) -> int:
    """A wrong value near the right one."""
    centre = max(right, 0)  # after several errors a step may lead below 0
    near = [v for v in range(max(0, centre - 3), min(max(highest, centre) + 1, centre + 3) + 1) if v != right]
    return near[int(rng.integers(len(near)))]


def _answer(task: Task, value: int, rng: np.random.Generator, style: Style) -> str:
    options: Mapping[str, int] = task.meta["choices"]
    said = str(value)
    if options:
        # What is on no option is guessed among the wrong ones, as an examinee would.
        wrong = [x for x, v in options.items() if v != task.meta["chain"].answer]
        said = next((x for x, v in options.items() if v == value), wrong[int(rng.integers(len(wrong)))])
    if style.answer == "plain":
        return f"answer {said}"
    if style.answer == "boxed":
        return f"\\boxed{{{said}}}"
    return f"\\boxed{{{said}" if rng.random() < 0.5 else f"boxed {said}}}"


def _ramble(chain: Chain, rng: np.random.Generator, style: Style) -> Script:
    """Hedges, fillers, the question again: it goes on until something cuts it off."""
    said = [*HEDGES, *FILLERS, str(chain)]
    lines = [said[int(i)] for i in rng.integers(0, len(said), style.ramble)]
    return Script("\n".join(lines) + "\n", (True,) * len(lines), ended=False)
