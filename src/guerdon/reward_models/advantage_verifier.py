"""A verifier of progress: values of prefixes under a prover, and what each step changes about them.

Source: Setlur et al. 2024 (arXiv 2410.08146).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from guerdon.credit import best_of_k_value, progress
from guerdon.errors import ConfigError, DataError
from guerdon.reward_models.reader import Places
from guerdon.reward_models.step_heads import HeadFit, StepValue
from guerdon.reward_models.steps import at_step_ends
from guerdon.types import Segmenter, Trajectory, response_ids

__all__ = ["ProcessAdvantageVerifier"]


class ProcessAdvantageVerifier:
    """Predicts a prover's chance of success from every prefix; advantages are differences of these.

    Soft labels stay soft: a prefix from which 3 of 8 rollouts succeed has the label 3/8, and the loss is the cross
    entropy with it. A missing label (NaN: no rollout) is left out.

    Where solutions are asked for, one solution or a sequence of them may be given: a trajectory (cut by the segmenter),
    or a pair of a prompt and the texts of its steps. Where prefixes are asked for: a :class:`~guerdon.search.Prefix`, a
    trajectory that breaks off there, a pair of a prompt and a text, or a text alone. Texts are tokenised step by step
    (a step's text without the blanks at its end, then ``separator``), in training and in reading alike.

    Args:
        model: a policy (trained in place), or a transformers model with ``tokenizer``; see :meth:`from_policy`.
        tokenizer: of the model; None for a policy.
        best_of: the prover is the best of so many tries of the policy whose values are learned: values are read as
            ``1 - (1 - f) ** best_of``. Labels are then shares of the policy's own rollouts. 1 leaves them as they are
            (labels come from the prover's rollouts, or are transformed already).
        segmenter: how trajectories are cut; lines by default.
        separator: ends a step of a pair of texts.
        settings: of :class:`~guerdon.reward_models.StepValue` (``layers``, ``by``, ``seed``, ...).

    Attributes:
        scorer: the value model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        best_of: float = 1,
        segmenter: Segmenter | None = None,
        separator: str = "\n",
        **settings: Any,
    ) -> None:
        if not best_of >= 1:
            raise ConfigError(f"best_of must be at least 1, got {best_of}")
        self.best_of = best_of
        self.separator = separator
        self.scorer = StepValue(model, tokenizer, segmenter=segmenter, separator=separator, **settings)

    @classmethod
    def from_policy(cls, policy: Any, **settings: Any) -> Self:
        """Begin from a copy of a policy's weights; the policy itself is left alone."""
        import copy

        own = copy.copy(policy)
        own.model, own.value_head = copy.deepcopy(policy.model), None
        own.model.requires_grad_(True)
        return cls(own, **settings)

    @property
    def segmenter(self) -> Segmenter:
        """How trajectories are cut."""
        return self.scorer.segmenter

    @property
    def report(self) -> HeadFit | None:
        """What the last :meth:`fit` did."""
        return self.scorer.report

    def fit(self, prefixes: Sequence[Any], q_soft: Sequence[float] | Tensor, **options: Any) -> Self:
        """Train on soft labels of prefixes.

        Args:
            prefixes: see the class; in any order. Prefixes of one solution are read in one forward pass.
            q_soft: one share of successes for each, in [0, 1]; NaN where nothing is known.
            options: of :meth:`guerdon.reward_models.StepHead.fit_places` (``lr``, ``epochs``, ``batch_size``, ...).

        Raises:
            DataError: another number of labels, one outside [0, 1], or no label at all.
        """
        labels = torch.as_tensor(q_soft, dtype=torch.float64)
        if labels.shape != (len(prefixes),):
            raise DataError(f"q_soft has shape {tuple(labels.shape)} for {len(prefixes)} prefixes; give one for each")
        known = [k for k in range(len(prefixes)) if not bool(labels[k].isnan())]
        if not known:
            raise DataError("there is nothing to train on: no prefix has a value")
        places, order = _merged([self._prefix_ids(prefixes[k]) for k in known])
        self.scorer.fit_places(places, labels[torch.tensor([known[i] for i in order])], **options)
        return self

    def values(self, steps: Any, outcomes: Sequence[float | None] | float | None = None) -> Any:
        """``[S + 1]`` values of a solution: of the prompt, and after each step.

        Args:
            steps: one solution, or a sequence of them; see the class.
            outcomes: of each, where it can be checked: then it takes the place of the last value. None (or NaN) where it
                cannot.

        Returns:
            One tensor for one solution, else a list.
        """
        if _single(steps):
            return self.values([steps], [outcomes])[0]  # type: ignore[list-item]
        places = [self._solution(s, k) for k, s in enumerate(steps)]
        flat = self.scorer.read(places)
        out = [best_of_k_value(v, self.best_of) for v in torch.split(flat, [len(p.at) for p in places])]
        if outcomes is not None:
            ends = [outcomes] * len(out) if isinstance(outcomes, int | float) else list(outcomes)
            if len(ends) != len(out):
                raise DataError(f"{len(ends)} outcomes for {len(out)} solutions; give one for each, None where unknown")
            for values, end in zip(out, ends, strict=True):
                if end is not None and end == end and len(values) > 1:
                    values[-1] = float(end)
        return out

    def advantages(self, steps: Any, outcomes: Sequence[float | None] | float | None = None) -> Any:
        """``[S]`` progress of each step of a solution: its value less the one before. Arguments as in :meth:`values`."""
        values = self.values(steps, outcomes)
        return progress(values) if isinstance(values, Tensor) else [progress(v) for v in values]

    def step_scores(self, trajectories: Sequence[Trajectory], segmenter: Segmenter | None = None) -> list[Tensor]:
        """Advantages of trajectories: the interface that all step scorers share."""
        rows = self.scorer.prefix_values(trajectories, segmenter)
        return [progress(best_of_k_value(row, self.best_of)) for row in rows]

    def token_rewards(self, trajectories: Sequence[Trajectory], segmenter: Segmenter | None = None) -> list[Tensor]:
        """Each step's advantage on its last token, 0 elsewhere.

        In a return-to-go their sum cancels to a baseline; see :class:`guerdon.training.PavCredit`.
        """
        return at_step_ends(self.step_scores(trajectories, segmenter), trajectories, segmenter or self.segmenter)

    def prefix_values(self, prefixes: Sequence[Any]) -> Tensor:
        """``[P]`` values of prefixes, in order."""
        if not prefixes:
            return torch.zeros(0)
        places = [Places(ids, (len(ids) - 1,)) for ids in map(self._prefix_ids, prefixes)]
        return best_of_k_value(self.scorer.read(places), self.best_of)

    def state_dict(self) -> dict[str, Any]:
        """Weights."""
        return self.scorer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Take over weights; raises CheckpointError where they do not fit."""
        self.scorer.load_state_dict(state)

    def _prefix_ids(self, prefix: Any) -> tuple[int, ...]:
        if isinstance(prefix, Trajectory):
            ids = (*prefix.prompt_ids, *response_ids(prefix))
        elif hasattr(prefix, "prompt_ids") and hasattr(prefix, "ids"):
            ids = (*prefix.prompt_ids, *prefix.ids)
        elif isinstance(prefix, str):
            ids = tuple(self._text_ids(prefix))
        elif isinstance(prefix, tuple | list) and len(prefix) == 2:
            ids = (*self._prompt_ids(prefix[0]), *self._text_ids(prefix[1]))
        else:
            raise DataError(f"a prefix is a Prefix, a trajectory, a text, or (prompt, text), got {prefix!r}")
        if not ids:
            raise DataError("a prefix without a single token has no value: give its prompt")
        return ids

    def _prompt_ids(self, prompt: Any) -> list[int]:
        return self.scorer.policy.render([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)

    def _text_ids(self, text: str) -> list[int]:
        pieces = [p for p in text.split(self.separator) if p.strip()]
        return [i for piece in pieces for i in self._step_ids(piece)]

    def _step_ids(self, text: str) -> list[int]:
        policy = self.scorer.policy
        return [*policy.encode(text.rstrip()), *policy.encode(self.separator)]

    def _solution(self, solution: Any, number: int) -> Places:
        if isinstance(solution, Trajectory):
            return self.scorer.places([solution], start=True)[0]
        if not (isinstance(solution, tuple | list) and len(solution) == 2) or isinstance(solution[1], str):
            raise DataError(f"solution {number} must be a trajectory or (prompt, [step, ...]), got {solution!r}")
        prompt, steps = solution
        ids = self._prompt_ids(prompt)
        at = [len(ids) - 1]
        for step in steps:
            ids += self._step_ids(step)
            at.append(len(ids) - 1)
        return Places(tuple(ids), tuple(at))


def _single(steps: Any) -> bool:
    """One solution rather than a sequence: a trajectory, or a prompt (text or chat messages) and texts."""
    if isinstance(steps, Trajectory):
        return True
    if not (isinstance(steps, tuple | list) and len(steps) == 2):
        return False
    prompt, texts = steps
    messages = isinstance(prompt, str) or (
        isinstance(prompt, tuple | list) and len(prompt) > 0 and all(hasattr(m, "keys") for m in prompt)
    )
    return messages and isinstance(texts, tuple | list) and all(isinstance(t, str) for t in texts)


def _merged(sequences: Sequence[tuple[int, ...]]) -> tuple[list[Places], list[int]]:
    """Put sequences that begin one another together; and the number of the sequence that each position reads."""
    order = sorted(range(len(sequences)), key=lambda k: sequences[k])
    chains: list[list[int]] = []
    for k in reversed(order):
        # In sorted order a sequence is followed at once by one that it begins, if there is any.
        longest = sequences[chains[-1][0]] if chains else ()
        if chains and longest[: len(sequences[k])] == sequences[k]:
            chains[-1].append(k)
        else:
            chains.append([k])
    places = [Places(sequences[c[0]], tuple(len(sequences[k]) - 1 for k in c)) for c in chains]
    return places, [k for chain in chains for k in chain]
