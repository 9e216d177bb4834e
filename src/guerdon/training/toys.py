"""Two problems with a known optimum, small enough to be learned in seconds: a check that learning works at all.

``Say``: the prompt names a word, the policy should say it (one turn). ``Echo``: the policy speaks, the environment
says a word that the prompt did not contain, and the policy should repeat it (two policy turns with an environment
turn between). The reward is 1 for the right word and 0 otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from guerdon.rollout.protocol import Episode, Observation
from guerdon.types import Message, Score, StopReason, Task, Trajectory, Usage

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["Echo", "SaidIt", "Say", "babble", "toy_tasks", "toy_texts"]

WORDS = ("red", "green", "blue", "black")


def toy_tasks(n: int, words: Sequence[str] = WORDS) -> list[Task]:
    """``n`` tasks that ask for the words in turn; the reference is the word."""
    return [
        Task(f"say-{k}", ({"role": "user", "content": f"say {words[k % len(words)]}"},), words[k % len(words)])
        for k in range(n)
    ]


def toy_texts(words: Sequence[str] = WORDS) -> list[str]:
    """Texts from which a tokenizer for these problems can be made."""
    return ["say " + " ".join(words), " hint: " + " ".join(words), "go on"] * 4


class _SayEpisode:
    def __init__(self, task: Task) -> None:
        self._task = task

    @property
    def prompt(self) -> Sequence[Message]:
        return self._task.prompt

    async def step(self, action: str) -> Observation:
        return Observation(done=True, stop=StopReason.DONE)

    def result(self) -> tuple[Usage, Mapping[str, Any]]:
        return Usage(), {}


class _EchoEpisode(_SayEpisode):
    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._turns = 0

    @property
    def prompt(self) -> Sequence[Message]:
        return ({"role": "user", "content": "go on"},)

    async def step(self, action: str) -> Observation:
        self._turns += 1
        if self._turns == 1:
            return Observation(text=f" hint: {self._task.reference}")
        return Observation(done=True, stop=StopReason.DONE)

    def result(self) -> tuple[Usage, Mapping[str, Any]]:
        return Usage(calls=1, output_tokens=2, usd=0.001), {}


class Say:
    """One policy turn, then the episode is over."""

    def start(self, task: Task, *, seed: int, group: int, member: int) -> Episode:
        """Begin ``task``."""
        return _SayEpisode(task)


class Echo:
    """A policy turn, a hint, a second policy turn."""

    def start(self, task: Task, *, seed: int, group: int, member: int) -> Episode:
        """Begin ``task``."""
        return _EchoEpisode(task)


class SaidIt:
    """1 where the last policy turn contains the reference word, else 0.

    Args:
        partial: instead of 0, this times the share of the reference's letters that were said.

    It counts how many trajectories it has scored, as a stand-in for a reward with running statistics.
    """

    name = "said_it"

    def __init__(self, partial: float = 0.0) -> None:
        self.partial = partial
        self.scored = 0

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        self.scored += len(trajectories)
        return [self._score(trajectory) for trajectory in trajectories]

    def _score(self, trajectory: Trajectory) -> Score:
        said = next((t.text for t in reversed(trajectory.turns) if t.speaker == "policy"), "")
        word = str(trajectory.task.reference)
        right = float(word in said.replace("<eos>", " ").split())
        letters = len(set(word) & set(said)) / len(set(word))
        return Score(max(right, self.partial * letters), parts={"right": right, "letters": letters})

    def state_dict(self) -> dict[str, Any]:
        """How many trajectories have been scored."""
        return {"scored": self.scored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the count."""
        self.scored = int(state["scored"])


def babble(policy: Policy, n: int, *, turns: int, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """Scripts for a warm start: the right form, but a word chosen at random.

    Args:
        policy: whose tokenizer is used.
        n: scripts.
        turns: 1 for :class:`Say`, 2 for :class:`Echo`.
        seed: of the words.

    Returns:
        ``(prompt_ids, response_ids, mask)`` as :class:`guerdon.training.SftTrainer` takes them.
    """
    rng = random.Random(seed)
    end = [policy.tokenizer.eos_token_id]
    environment = Say() if turns == 1 else Echo()
    out = []
    for task in toy_tasks(n):
        prompt = policy.render(environment.start(task, seed=0, group=0, member=0).prompt)
        first = policy.encode(f" {rng.choice(WORDS)}") + end
        response, mask = list(first), [1] * len(first)
        if turns == 2:
            hint = policy.encode(f" hint: {task.reference}")
            second = policy.encode(f" {rng.choice(WORDS)}") + end
            response += hint + second
            mask += [0] * len(hint) + [1] * len(second)
        out.append((prompt, response, mask))
    return out
