"""A latent code that is asked about bit by bit, through noise: the smallest problem in which thinking longer helps.

Each policy turn asks for one bit (`` a`` to `` d`` for four bits) and is answered `` 0`` or `` 1``, wrongly with a fixed
probability; asking again gives an independent reply. Saying `` guess``, or spending the budget, ends the thought: the
environment says `` =`` and the next turn is the answer, one bit after the other. An episode of thought is one query.

What is worth asking, and when to stop, can be computed (:func:`posterior_success`), so a policy's regret has a floor.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.rewards import Reward
from guerdon.rollout.protocol import Observation
from guerdon.types import Message, Score, StopReason, Task, Trajectory, Usage

__all__ = [
    "ASK",
    "FORCE",
    "GUESS",
    "MetaBandit",
    "RightCode",
    "bandit_script",
    "bandit_tasks",
    "bandit_words",
    "posterior_success",
]

ASK = (" a", " b", " c", " d", " e", " f", " g", " h")
"""Names of the bits, as a query says them."""

GUESS = " guess"
FORCE = " ="
"""How the environment asks for the answer; the suffix of a forced one."""


def bandit_tasks(n: int, *, bits: int = 4, flip: float = 0.15, seed: int = 0, most: int = 64) -> list[Task]:
    """``n`` codes with the noise of their replies drawn beforehand, so that an episode repeats itself.

    Args:
        n: number of tasks.
        bits: of each code, up to eight.
        flip: probability that a reply is wrong.
        seed: of codes and noise.
        most: replies per bit that are drawn; asking for more begins again with the first.

    Raises:
        ConfigError: bits or flip out of range.
    """
    if not 1 <= bits <= len(ASK):
        raise ConfigError(f"bits must be between 1 and {len(ASK)}, got {bits}")
    if not 0 <= flip < 0.5:
        raise ConfigError(f"flip must be in [0, 0.5), got {flip}")
    rng = random.Random(seed)
    out = []
    for k in range(n):
        code = [rng.randrange(2) for _ in range(bits)]
        replies = [[b ^ (rng.random() < flip) for _ in range(most)] for b in code]
        meta = {"code": code, "replies": replies, "flip": flip}
        out.append(Task(f"code-{seed}-{k}", "code:", "".join(map(str, code)), meta))
    return out


class _BanditEpisode:
    def __init__(self, task: Task, budget: int, wait: bool) -> None:
        if "code" not in task.meta:
            raise DataError(f"task {task.id!r} carries no code in meta['code']; make tasks with bandit_tasks()")
        self._task, self._budget, self._wait = task, budget, wait
        self._asked = [0] * len(task.meta["code"])
        self._queries = self._waits = 0
        self._answer: str | None = None
        self._thinking = True

    @property
    def prompt(self) -> Sequence[Message]:
        return self._task.prompt

    async def step(self, action: str) -> Observation:
        if not self._thinking:
            self._answer = "".join(action.split())
            return Observation(done=True, stop=StopReason.DONE)
        said = action.strip()
        known = [name.strip() for name in ASK[: len(self._asked)]]
        if said not in known:
            # Anything that is no query ends the thought, so that no time is spent on nonsense.
            if self._wait and said == GUESS.strip() and self._queries + self._waits < self._budget:
                self._waits += 1
                return Observation(" wait")
            return self._ask("")
        bit = known.index(said)
        replies = self._task.meta["replies"][bit]
        text = f" {int(replies[self._asked[bit] % len(replies)])}"
        self._asked[bit] += 1
        self._queries += 1
        return self._ask(text) if self._queries + self._waits >= self._budget else Observation(text)

    def _ask(self, text: str) -> Observation:
        self._thinking = False
        return Observation(text + FORCE, final=True, meta={"forces": True})

    def result(self) -> tuple[Usage, Mapping[str, Any]]:
        return Usage(), {"queries": self._queries, "asked": tuple(self._asked), "answer": self._answer}


class MetaBandit:
    """The environment.

    Args:
        budget: queries after which the answer is asked for.
        wait: refuse to let the policy guess before the budget is spent, with the word "wait": budget forcing.
    """

    def __init__(self, budget: int, *, wait: bool = False) -> None:
        if budget < 0:
            raise ConfigError(f"budget must not be negative, got {budget}")
        self.budget, self.wait = budget, wait

    def start(self, task: Task, *, seed: int, group: int, member: int) -> _BanditEpisode:
        """Begin ``task``; all randomness is in the task.

        Raises:
            DataError: the task carries no code.
        """
        return _BanditEpisode(task, self.budget, self.wait)


class RightCode(Reward):
    """1 where the answer is the code, minus a price per query; the parts say how many were asked.

    Args:
        price: taken off per query, whether the answer is right or not (a length penalty).
    """

    def __init__(self, price: float = 0.0) -> None:
        super().__init__()
        self.price = float(price)

    def score_one(self, trajectory: Trajectory) -> Score:
        """Read the episode's own report."""
        if "queries" not in trajectory.info:
            return Score.invalid(f"task {trajectory.task.id!r} was not played in MetaBandit")
        right = float(trajectory.info["answer"] == trajectory.task.reference)
        asked = float(trajectory.info["queries"])
        return Score(right - self.price * asked, parts={"right": right, "queries": asked})


def posterior_success(asked: Sequence[Sequence[int]], flip: float) -> float:
    """Success probability of the best answer, given for each bit the replies seen so far.

    With ``n1`` ones and ``n0`` zeros a bit is known with probability ``1 / (1 + (flip / (1 - flip)) ** |n1 - n0|)``.
    """
    out = 1.0
    for replies in asked:
        margin = abs(sum(replies) * 2 - len(replies))
        out /= 1.0 + (flip / (1.0 - flip)) ** margin if margin else 2.0
    return out


def bandit_script(policy: Any, task: Task, asked: Sequence[int], *, guess: bool = True) -> tuple[list[int], ...]:
    """A played episode as ``(prompt_ids, response_ids, mask)`` for :class:`guerdon.training.SftTrainer`.

    Args:
        policy: has ``render`` and ``encode``.
        task: of :func:`bandit_tasks`.
        asked: numbers of the bits that are asked for, in order.
        guess: the thought ends with a guess; otherwise the budget was spent with the last query.

    The answer gives each bit the majority of its replies; where they are even, the code's own bit, so that over many
    tasks a policy learns to be unsure.
    """
    counts = [0] * len(task.meta["code"])
    ones = [0] * len(counts)
    pieces: list[tuple[str, int]] = []
    for bit in asked:
        reply = int(task.meta["replies"][bit][counts[bit] % len(task.meta["replies"][bit])])
        counts[bit] += 1
        ones[bit] += reply
        pieces += [(ASK[bit], 1), (f" {reply}", 0)]
    pieces += [(GUESS, 1), (FORCE, 0)] if guess or not asked else [(FORCE, 0)]
    for bit, truth in enumerate(task.meta["code"]):
        even = 2 * ones[bit] == counts[bit]
        pieces.append((f" {truth if even else int(2 * ones[bit] > counts[bit])}", 1))
    response: list[int] = []
    mask: list[int] = []
    for text, learned in pieces:
        ids = policy.encode(text)
        response += ids
        mask += [learned] * len(ids)
    return policy.render(task.prompt), response, mask


def bandit_words() -> tuple[str, ...]:
    """Words of this world as a tiny tokenizer wants them, one token each."""
    return (*ASK, GUESS, FORCE, " 0", " 1", " wait", "code:")
