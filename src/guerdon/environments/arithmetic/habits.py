"""Solvers with wrong habits: errors that a policy believes in, so that its own probabilities do not give them away.

Scripts in the usual styles go wrong at random places, and a policy trained on them makes errors that it finds unlikely
itself: the least likely token is nearly always the wrong one. A habit is a wrong result for one particular sum, said
as a rule half of the time. What is unlikely is then no sign of what is wrong; only outcomes tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from guerdon.environments.arithmetic.chains import Chain, apply
from guerdon.environments.arithmetic.checker import Report
from guerdon.environments.arithmetic.scripted import Script
from guerdon.errors import ConfigError
from guerdon.rollout.loop import derive_seed
from guerdon.types import StopReason, Task, Trajectory, Turn

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["Habits", "first_slip"]


@dataclass(frozen=True, slots=True)
class Habits:
    """Which sums are got wrong, and how often.

    Args:
        share: of all sums (a value, a sign and an operand); which ones depends on ``seed`` alone.
        chance: that such a sum is got wrong; the result is then always the same one, next to the right one.
        seed: of the choice.
    """

    share: float = 0.4
    chance: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.chance <= 1):
            raise ConfigError(f"share and chance must be in [0, 1], got {self.share} and {self.chance}")

    def wrong(self, value: int, sign: str, operand: int) -> int | None:
        """The habitual wrong result of a sum, or None where there is no habit. Never negative."""
        drawn = derive_seed("habit", self.seed, value, sign, operand)
        if drawn % 10_000 >= self.share * 10_000:
            return None
        right = apply(value, sign, operand)
        return right + 1 if right == 0 or (drawn // 10_000) % 2 else right - 1

    def write(self, task: Task, rng: np.random.Generator) -> Script:
        """One solution, a line a step; lines go on from what was said before."""
        chain: Chain = task.meta["chain"]
        value, lines, labels = chain.start, [], []
        for sign, operand in chain.operations:
            right, wrong = apply(value, sign, operand), self.wrong(value, sign, operand)
            said = wrong if wrong is not None and rng.random() < self.chance else right
            lines.append(f"{value}{sign}{operand}={said}")
            labels.append(said == right)
            value = said
        return Script("\n".join([*lines, f"answer {value}"]), (*labels, value == chain.answer))

    def scripts(self, policy: Policy, tasks: Sequence[Task], *, seed: int = 0) -> list[Trajectory]:
        """A solution of each task, as :func:`~guerdon.environments.arithmetic.scripts` makes them in other styles."""
        from guerdon.rollout.text import TokenText

        rng = np.random.default_rng([seed & 0xFFFFFFFF, 13])
        text = TokenText(policy.tokenizer, policy.decode)
        out = []
        for task in tasks:
            script = self.write(task, rng)
            ids = (*policy.encode(script.text), policy.tokenizer.eos_token_id)
            said, ends = text.text_and_ends(ids, final=1)
            turn = Turn("policy", said, ids, token_ends=ends)
            prompt = tuple(policy.render(task.prompt))
            out.append(Trajectory(task, (turn,), StopReason.DONE, prompt_ids=prompt, info={"labels": script.labels}))
        return out


def first_slip(report: Report) -> int | None:
    """Number of the first line that leads a plain solution astray; None where there is none.

    Besides wrong lines these are true lines off the chain: who writes no filler on purpose has miscopied there.
    """
    return next((k for k, x in enumerate(report.lines) if not x.correct or x.kind in ("filler", "noise")), None)
