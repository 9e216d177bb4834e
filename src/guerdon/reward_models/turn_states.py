"""Turns as vectors, each from what came before it and its own text: through a policy, an encoder, or given features.

Every class here maps trajectories to one state per turn. ``prepare`` reads a trajectory once, ``count`` says how many
turns it has, and calling the module gives the states of several, one after the other, ``[sum T_i, width]``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from guerdon.errors import DataError
from guerdon.rewards.grounding import policy_turns
from guerdon.types import Segmenter, Trajectory, response_ids

__all__ = ["EncodedTurns", "PolicyTurns", "TurnFeatures"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of prompt and response, and the position of each step's last token among them."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]


class PolicyTurns(nn.Module):
    """The hidden state (or the vocabulary logits) at the last token of each turn, from a copy of a policy's trunk.

    Args:
        policy: copied; adapters are folded in.
        logits: give the vocabulary logits instead of the hidden states.
        train: whether :meth:`trainable` yields the trunk.
        max_tokens: longer sequences lose the beginning of their prompt.
    """

    def __init__(self, policy: Any, *, logits: bool, train: bool, max_tokens: int) -> None:
        super().__init__()
        from guerdon.policies.logprobs import trunk_and_head

        model = policy.merged().model if policy.adapted else copy.deepcopy(policy.model)
        trunk, head = trunk_and_head(model)
        self.trunk = trunk
        self.vocabulary = head if logits else None
        self._train = train
        self._max_tokens = min(max_tokens, policy.max_context)
        self._decode = policy.decode
        weight: Any = head.weight
        self._size = int(weight.shape[0])
        self.width = self._size if logits else int(model.config.get_text_config().hidden_size)
        self.requires_grad_(False)

    def trainable(self) -> Iterator[nn.Parameter]:
        """What a fit may change."""
        return self.parameters() if self._train else iter(())

    def prepare(self, trajectory: Trajectory, segmenter: Segmenter | None = None) -> Tokens:
        """Token ids and step ends, the prompt cut on the left where it is too long.

        Raises:
            DataError: no trajectory, no token ids, an id that the policy does not know, or a response that is too
                long by itself.
        """
        if not isinstance(trajectory, Trajectory):
            raise DataError(f"an estimator over a policy reads trajectories, got {type(trajectory).__name__}")
        where = f"task {trajectory.task.id!r}"
        spans = (segmenter or Segmenter("turns")).spans(trajectory)
        if not spans and policy_turns(trajectory):
            raise DataError(f"{where} has text but no token ids; sample with an engine that records them")
        # What stands behind the last turn (its observation) is never read.
        response = response_ids(trajectory)[: spans[-1].stop if spans else 0]
        if response and not trajectory.prompt_ids:
            raise DataError(f"{where} has no prompt_ids, so its first turn would be read without the task")
        ids = [*trajectory.prompt_ids, *response]
        if ids and max(ids) >= self._size:
            raise DataError(f"{where} has token id {max(ids)}, the policy knows {self._size}; it has another tokenizer")
        if len(response) > self._max_tokens:
            raise DataError(
                f"{where} has a response of {len(response)} tokens, more than max_tokens={self._max_tokens}"
            )
        cut = max(0, len(ids) - self._max_tokens)
        base = len(trajectory.prompt_ids) - cut
        return Tokens(tuple(ids[cut:]), tuple(base + span.stop - 1 for span in spans))

    def count(self, prepared: Tokens) -> int:
        """Number of steps."""
        return len(prepared.ends)

    def forward(self, prepared: Sequence[Tokens]) -> Tensor:
        """States ``[sum T_i, width]``; rows are padded on the right, which nothing before attends to."""
        device = next(self.trunk.parameters()).device
        rows = [p for p in prepared if p.ends]
        if not rows:
            return torch.zeros(0, self.width, device=device)
        ids = torch.zeros(len(rows), max(len(p.ids) for p in rows), dtype=torch.long)
        for r, row in enumerate(rows):
            ids[r, : len(row.ids)] = torch.tensor(row.ids)
        owner = torch.tensor([r for r, row in enumerate(rows) for _ in row.ends], device=device)
        ends = torch.tensor([e for row in rows for e in row.ends], device=device)
        output = self.trunk(input_ids=ids.to(device), use_cache=False)
        states = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        chosen = states[owner, ends]
        return chosen if self.vocabulary is None else self.vocabulary(chosen)


class TurnFeatures(nn.Module):
    """Given feature vectors, one per turn, and a memory that runs over them.

    Args:
        width_in: of the features.
        memory: ``"gru"`` or ``"none"``.
        hidden: width of the recurrent network.
    """

    def __init__(self, width_in: int, *, memory: Literal["gru", "none"], hidden: int) -> None:
        super().__init__()
        self._width_in = width_in
        self.memory = nn.GRU(width_in, hidden, batch_first=True) if memory == "gru" else None
        self.width = hidden if memory == "gru" else width_in

    def trainable(self) -> Iterator[nn.Parameter]:
        """What a fit may change."""
        return self.parameters()

    def prepare(self, trajectory: Any, segmenter: Segmenter | None = None) -> Tensor:
        """Features ``[T, d]`` as float32.

        Raises:
            DataError: another shape, a value that is not finite, or steps other than turns.
        """
        _turns_only(segmenter)
        try:
            rows = isinstance(trajectory, list | tuple) and len(trajectory) > 0 and isinstance(trajectory[0], Tensor)
            features = torch.stack(list(trajectory)) if rows else torch.as_tensor(trajectory)
            features = features.detach().to(torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"features [T, {self._width_in}] are expected, got {type(trajectory).__name__}") from error
        if features.numel() == 0:
            return torch.zeros(0, self._width_in)
        if features.ndim != 2 or features.shape[1] != self._width_in:
            raise DataError(f"features must be [T, {self._width_in}], got {tuple(features.shape)}")
        if not bool(torch.isfinite(features).all()):
            raise DataError("a feature is NaN or infinite")
        return features

    def count(self, prepared: Tensor) -> int:
        """Number of turns."""
        return len(prepared)

    def forward(self, prepared: Sequence[Tensor]) -> Tensor:
        """States ``[sum T_i, width]``; the memory runs forward only, so padding on the right is never seen."""
        rows = [p for p in prepared if len(p)]
        device = next(self.parameters(), torch.zeros(0)).device
        if not rows:
            return torch.zeros(0, self.width, device=device)
        if self.memory is None:
            return torch.cat(rows).to(device)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        states = self.memory(padded)[0]
        return torch.cat([states[r, : len(row)] for r, row in enumerate(rows)])


class EncodedTurns(TurnFeatures):
    """Sentence embeddings of each turn with the observation that it answers, and a memory that runs over them.

    Args:
        encoder: has ``encode(texts) -> [n, d]``; frozen.
        memory, hidden: see :class:`TurnFeatures`.
    """

    def __init__(self, encoder: Any, *, memory: Literal["gru", "none"], hidden: int) -> None:
        width = int(torch.as_tensor(encoder.encode([""])).shape[1])
        super().__init__(width, memory=memory, hidden=hidden)
        self._encoder = encoder

    def prepare(self, trajectory: Any, segmenter: Segmenter | None = None) -> Tensor:
        """Embeddings ``[T, d]`` of "observation before the turn, turn"; before the first turn stands the task.

        Raises:
            DataError: no trajectory, or steps other than turns.
        """
        _turns_only(segmenter)
        if not isinstance(trajectory, Trajectory):
            raise DataError(f"an estimator over an encoder reads trajectories, got {type(trajectory).__name__}")
        texts = []
        before, previous = trajectory.task.question, -1
        for k in policy_turns(trajectory):
            between = "".join(t.text for t in trajectory.turns[previous + 1 : k] if t.speaker == "environment")
            before = between if previous >= 0 else before + between
            texts.append(f"{before.strip()}\n{trajectory.turns[k].text.strip()}")
            previous = k
        if not texts:
            return super().prepare([])
        return super().prepare(torch.as_tensor(self._encoder.encode(texts)))


def _turns_only(segmenter: Segmenter | None) -> None:
    if segmenter is not None and segmenter.by != "turns":
        raise DataError(f"this estimator values whole turns, not steps by {segmenter.by!r}; give it a policy instead")
