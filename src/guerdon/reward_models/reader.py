"""Reading a causal model's hidden states at chosen positions of given texts: the trunk of every step scorer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError, DataError
from guerdon.types import Segmenter, Trajectory, Turn, response_ids, step_spans

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["Places", "places_of_steps", "read_states"]


@dataclass(frozen=True, slots=True)
class Places:
    """A token sequence and the positions at which it is read.

    Args:
        ids: prompt and response.
        at: positions in ``ids``; what is read there has seen ``ids[: at + 1]`` and nothing else.
    """

    ids: tuple[int, ...]
    at: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(not 0 <= p < len(self.ids) for p in self.at):
            raise DataError(f"positions {self.at} must lie in a sequence of {len(self.ids)} tokens")


def places_of_steps(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    segmenter: Segmenter,
    *,
    by: Literal["tokens", "text"] = "tokens",
    separator: str = "\n",
    start: bool = False,
) -> list[Places]:
    """Where the steps of trajectories are read: at each step's last token.

    Args:
        policy: model and tokenizer of the scorer.
        trajectories: as sampled.
        segmenter: cuts them.
        by: ``"tokens"`` feeds the ids as they were sampled; ``"text"`` tokenises anew with the scorer's own tokenizer:
            the prompt, and each step's text without the blanks at its end, followed by ``separator``, at whose last
            token the step is read. Use it where policy and scorer have different tokenizers.
        separator: see ``by``.
        start: also read at the prompt's last token (the empty prefix), first.

    Raises:
        DataError: with ``"tokens"``, the ids belong to another tokenizer; no prompt ids; too long for the model.
    """
    from guerdon.reward_models.implicit import check_tokenizer

    if by not in ("tokens", "text"):
        raise ConfigError(f"by must be 'tokens' or 'text', got {by!r}")
    if by == "tokens":
        try:
            check_tokenizer(policy, trajectories)
        except DataError as error:
            raise DataError(f"{error} (the step scorer does with by='text')") from None
    out = []
    for trajectory in trajectories:
        made = (
            _by_tokens(trajectory, segmenter) if by == "tokens" else _by_text(policy, trajectory, segmenter, separator)
        )
        prompt, ids, at = made
        if start:
            if not prompt:
                raise DataError(f"the trajectory of task {trajectory.task.id!r} carries no prompt ids")
            at = [len(prompt) - 1, *at]
        if len(ids) > policy.max_context:
            raise DataError(
                f"the trajectory of task {trajectory.task.id!r} has {len(ids)} tokens with its prompt, more than the "
                f"{policy.max_context} that {policy.name!r} takes"
            )
        out.append(Places(tuple(ids), tuple(at)))
    return out


def _by_tokens(trajectory: Trajectory, segmenter: Segmenter) -> tuple[Sequence[int], list[int], list[int]]:
    prompt, response = trajectory.prompt_ids, response_ids(trajectory)
    if any(turn.speaker == "policy" and turn.text and not turn.token_ids for turn in trajectory.turns):
        raise DataError(
            f"a policy turn of task {trajectory.task.id!r} carries no token ids; score its text with by='text'"
        )
    if response and not prompt:
        raise DataError(f"the trajectory of task {trajectory.task.id!r} carries no prompt ids")
    ends = [len(prompt) + span.stop - 1 for span in step_spans(trajectory, segmenter)]
    return prompt, [*prompt, *response], ends


def _by_text(
    policy: Policy, trajectory: Trajectory, segmenter: Segmenter, separator: str
) -> tuple[Sequence[int], list[int], list[int]]:
    prompt = policy.render(trajectory.task.prompt)
    mark = policy.encode(separator)
    if not mark:
        raise ConfigError("separator must have at least one token")
    ids, at = list(prompt), []
    for turn in trajectory.turns:
        if turn.speaker == "environment":
            ids += policy.encode(turn.text)
            continue
        for text in step_texts(turn, segmenter):
            ids += policy.encode(text.rstrip())
            ids += mark
            at.append(len(ids) - 1)
    return prompt, ids, at


def step_texts(turn: Turn, segmenter: Segmenter) -> list[str]:
    """The texts of a policy turn's steps: one for each span that the segmenter makes of its tokens."""
    ends = segmenter.offsets(turn.text)
    if not turn.token_ids:
        return [turn.text[a:b] for a, b in pairwise([0, *ends])]
    spans = segmenter._turn_spans(turn)
    if len(spans) == 1:
        return [turn.text]
    assert turn.token_ends is not None
    cuts = [0, *(turn.token_ends[span.stop - 1] for span in spans[:-1]), len(turn.text)]
    return [turn.text[a:b] for a, b in pairwise(cuts)]


def read_states(
    policy: Policy, places: Sequence[Places], *, max_tokens: int = 16_384
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states at places, batch by batch.

    Args:
        policy: whose trunk runs, in whatever mode it is in; gradients flow unless disabled.
        places: what is read. A sequence without positions is skipped.
        max_tokens: positions of one forward pass, padding included.

    Yields:
        ``(states [n, hidden], index [n])``; ``index`` counts all positions of all places in order.
    """
    from guerdon.policies.logprobs import trunk_and_head

    trunk, _ = trunk_and_head(policy.model)
    starts = np.concatenate(([0], np.cumsum([len(p.at) for p in places], dtype=np.int64)))
    # What lies behind the last position that is read need not be computed.
    lengths = [max(p.at, default=-1) + 1 for p in places]
    order = sorted((k for k, n in enumerate(lengths) if n), key=lambda k: -lengths[k])
    begin = 0
    while begin < len(order):
        width = lengths[order[begin]]
        rows = order[begin : begin + max(1, max_tokens // width)]
        begin += len(rows)
        ids = np.zeros((len(rows), width), dtype=np.int64)
        flat, index = [], []
        for r, k in enumerate(rows):
            ids[r, : lengths[k]] = places[k].ids[: lengths[k]]
            flat.append(r * width + np.asarray(places[k].at, dtype=np.int64))
            index.append(starts[k] + np.arange(len(places[k].at)))
        # Padding on the right is behind everything that is read, so the causal pass is exact without a mask.
        made: Any = trunk(input_ids=torch.from_numpy(ids).to(policy.device), use_cache=False)
        hidden = made.last_hidden_state if hasattr(made, "last_hidden_state") else made[0]
        chosen = hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(np.concatenate(flat)).to(policy.device)]
        yield chosen, torch.from_numpy(np.concatenate(index))
