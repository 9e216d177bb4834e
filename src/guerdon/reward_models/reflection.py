"""A policy's own judgement of its reasoning: log-probabilities of a reference behind each trace, and the reward of them.

All traces of all groups are scored together: one batched pass of the scoring policy, cut only by memory.

Source: Xu et al. 2025, "Direct Reasoning Optimization" (arXiv 2506.13351, first version). Which policy scores, the weight of
the length term and the form of the masked reasoning are open there; they are arguments here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError, Progress, Reward
from guerdon.shaping.reflection import R3Filter, ReasoningReflection, outcome_length_reward
from guerdon.types import Group, Score, Trajectory

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["Reflection", "ReflectionReward", "reference_logprobs", "score_reference", "score_references"]

_CHUNK_LOGITS = 1 << 23


@torch.no_grad()
def score_references(
    model: Any,
    items: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    hidden: Sequence[tuple[int, int] | None] | None = None,
    max_tokens: int = 16_384,
    pad_id: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """Log-probability and rank of each reference token behind its context, for many contexts in one batched pass.

    The vocabulary is only computed where a reference token is predicted. Equal items are computed once, so that their
    values are equal to the last bit.

    Args:
        model: a causal language model; position j predicts token j + 1.
        items: ``(context, reference)`` token ids, at least one each.
        hidden: for each item a half-open span of its context that nothing attends to, or None.
        max_tokens: positions of one forward pass, padding included.
        pad_id: fills rows on the right; its value never matters.

    Returns:
        For each item ``[T]`` float32 log-probabilities and ``[T]`` int64 ranks (1: no token is more likely), on the CPU.

    Raises:
        DataError: an empty reference or context, or a hidden span outside its context.
    """
    from guerdon.policies.logprobs import logits_of, trunk_and_head

    spans = [None] * len(items) if hidden is None else list(hidden)
    if len(spans) != len(items):
        raise DataError(f"hidden has {len(spans)} entries for {len(items)} items")
    keys = [(tuple(c), tuple(r), s) for (c, r), s in zip(items, spans, strict=True)]
    for context, reference, span in keys:
        if not reference:
            raise DataError("the reference has no tokens; nothing can be predicted")
        if not context:
            raise DataError("a context has no tokens; the first reference token needs one before it")
        if span is not None and not 0 <= span[0] <= span[1] < len(context):
            raise DataError(f"the hidden span {span} must lie within the context, before its last token")
    distinct = sorted(dict.fromkeys(keys), key=lambda k: len(k[0]) + len(k[1]), reverse=True)
    trunk, head = trunk_and_head(model)
    device = next(model.parameters()).device
    size = max(1, _CHUNK_LOGITS // (int(getattr(head, "out_features", 0)) or 32_768))
    found: dict[Any, tuple[Tensor, Tensor]] = {}
    was = model.training
    model.eval()
    try:
        start = 0
        while start < len(distinct):
            width = len(distinct[start][0]) + len(distinct[start][1])
            part = distinct[start : start + max(1, max_tokens // width)]
            start += len(part)
            states = _states(trunk, part, width, pad_id, device)
            wanted = torch.tensor([t for _, reference, _ in part for t in reference], device=device)
            logprobs, ranks = [], []
            for k in range(0, len(wanted), size):
                table = logits_of(model, states[k : k + size]).float()
                own = table.gather(1, wanted[k : k + size, None])
                logprobs.append((own[:, 0] - table.logsumexp(1)).cpu())
                ranks.append((1 + (table > own).sum(1)).cpu())
            lengths = [len(reference) for _, reference, _ in part]
            columns = zip(torch.cat(logprobs).split(lengths), torch.cat(ranks).split(lengths), strict=True)
            found.update(zip(part, columns, strict=True))
    finally:
        model.train(was)
    return [found[key] for key in keys]


def _states(trunk: Any, rows: Sequence[Any], width: int, pad_id: int, device: torch.device) -> Tensor:
    """Hidden states that predict the references, one row behind the other."""
    ids = torch.tensor([[*c, *r] + [pad_id] * (width - len(c) - len(r)) for c, r, _ in rows], device=device)
    mask = None
    if any(span is not None for *_, span in rows):
        # Right padding needs no mask: nothing that counts comes after it.
        mask = torch.ones_like(ids)
        for k, (_, _, span) in enumerate(rows):
            if span is not None:
                mask[k, span[0] : span[1]] = 0
    out = trunk(input_ids=ids, attention_mask=mask, use_cache=False)
    states = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
    places = [k * width + len(c) - 1 + j for k, (c, r, _) in enumerate(rows) for j in range(len(r))]
    return states.reshape(-1, states.shape[-1])[torch.tensor(places, device=device)]


def score_reference(
    model: Any,
    contexts: Sequence[Sequence[int]],
    reference: Sequence[int],
    batch_size: int | None = None,
    *,
    pad_id: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`score_references` with one reference behind every context.

    Args:
        model, pad_id: see there.
        contexts: ``G`` lists of token ids, each at least one.
        reference: ``T`` token ids, the same behind every context.
        batch_size: contexts of one forward pass at most; None leaves it to memory.

    Returns:
        ``[G, T]`` float32 log-probabilities, and ``[G, T]`` int64 ranks (1: no token is more likely).
    """
    if not len(contexts):
        raise DataError("there are no contexts to score a reference behind; give at least one")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    size = batch_size or len(contexts)
    rows = []
    for start in range(0, len(contexts), size):
        rows += score_references(model, [(c, reference) for c in contexts[start : start + size]], pad_id=pad_id)
    return torch.stack([L for L, _ in rows]), torch.stack([r for _, r in rows])


def reference_logprobs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | str,
    reasonings: Sequence[str],
    reference: str,
    batch_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """:func:`score_reference` on texts.

    Args:
        model, tokenizer: of the scoring policy.
        prompts: of each trace (or one for all), as the model reads them.
        reasonings: ``G`` traces up to and including the end-of-reasoning marker and any fixed prefix of the outcome.
        reference: the reference outcome. It is tokenised by itself, so that its tokens are the same behind every trace.
        batch_size: traces of one forward pass.
    """
    if isinstance(prompts, str):
        prompts = [prompts] * len(reasonings)
    if len(prompts) != len(reasonings):
        raise ConfigError(f"{len(prompts)} prompts for {len(reasonings)} reasonings")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    contexts = [encode(p + r) for p, r in zip(prompts, reasonings, strict=True)]
    return score_reference(model, contexts, encode(reference), batch_size)


@dataclass(frozen=True, slots=True)
class Reflection:
    """What the scoring policy says about the traces of one task.

    Args:
        members: ``G`` places of the traces in the batch.
        valid: ``[G]`` bool, the reasoning ends.
        L: ``[G, T]`` float32 log-probabilities of the reference; NaN for traces that are not valid.
        ranks: ``[G, T]`` int64 ranks of its tokens; 0 for traces that are not valid.
        M: ``[T]`` float32 behind masked reasoning, or ``[G, T]`` where the masked context differs by trace; None where
            no trace is valid or it was not asked for.
        outcome: ``[G]`` tokens of each outcome; NaN where the reasoning does not end.
    """

    members: tuple[int, ...]
    valid: Tensor
    L: Tensor
    ranks: Tensor
    M: Tensor | None
    outcome: np.ndarray


class ReflectionReward(Reward):
    """``lambda_r3 * R3 + lambda_len * r_len`` within each group of trajectories of one task.

    The tokens that were sampled are the tokens that are scored: a trace is read up to and including the end mark, and the
    reference, tokenised by itself, stands behind it in place of the outcome. No gradient flows.

    Args:
        policy: the scoring policy. The one that is trained makes it synced; ``policy.reference()`` makes it frozen.
        reflection: how R3 is computed.
        start, end: marks around the reasoning; ``start=""`` where the prompt ends with it. A trace without the end mark
            gets an invalid score, which ``on_error="drop"`` leaves out of loss and group statistics.
        prefix: fixed text between the end mark and the outcome.
        lambda_r3: weight of R3.
        lambda_len: weight of the length term. ``"match"`` gives both terms the same mean deviation within groups on the
            first batch in which both vary, and keeps that weight (it is part of :meth:`state_dict`); before, it is 1.
        beta_len: slope of the length term.
        masked: what the baseline reads: ``"empty"`` reasoning, or the trace with its tokens ``"hidden"`` from attention.
        refresh: score with a copy of ``policy`` that lags behind and is renewed every so many training steps; None scores
            with ``policy`` itself.
        encode_outcome: text of an outcome to its number of tokens; by default the sampled tokens are counted, without
            special ones.
        max_tokens: positions of one forward pass.

    The reference is ``task.reference``, a text. Parts: ``r3``, ``length``.
    """

    gives = frozenset({"outcome"})

    def __init__(
        self,
        policy: Policy,
        reflection: ReasoningReflection | None = None,
        *,
        start: str = "<think>",
        end: str = "</think>",
        prefix: str = "",
        lambda_r3: float = 1.0,
        lambda_len: float | Literal["match"] = "match",
        beta_len: float = 1.0,
        masked: Literal["empty", "hidden"] = "empty",
        refresh: int | None = None,
        encode_outcome: Callable[[str], int] | None = None,
        max_tokens: int = 16_384,
        name: str | None = None,
        on_error: OnError = "drop",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if not end:
            raise ConfigError("end must not be empty: it tells where the reasoning ends")
        if masked not in ("empty", "hidden"):
            raise ConfigError(f"masked must be 'empty' or 'hidden', got {masked!r}")
        if refresh is not None and refresh < 1:
            raise ConfigError(f"refresh must be a number of steps of at least 1, or None, got {refresh!r}")
        numbers = {
            "lambda_r3": lambda_r3,
            "lambda_len": 1.0 if lambda_len == "match" else lambda_len,
            "beta_len": beta_len,
        }
        for key, value in numbers.items():
            if isinstance(value, bool | str) or not 0 <= value < math.inf:
                raise ConfigError(f"{key} must be finite and at least 0, got {value!r}")
        self.policy, self.reflection = policy, reflection or ReasoningReflection()
        self.start, self.end, self.prefix = start, end, prefix
        self.lambda_r3, self.beta_len = float(lambda_r3), float(beta_len)
        self.lambda_len: float | None = None if lambda_len == "match" else float(lambda_len)
        self.masked, self.refresh, self.max_tokens = masked, refresh, max_tokens
        self._count = encode_outcome
        self._lagged: Any = None
        self._special = frozenset(policy.tokenizer.all_special_ids)

    def score(self, trajectories: Sequence[Trajectory], progress: Progress | None = None) -> list[Score]:
        """Score all groups of a batch together.

        Raises:
            ConfigError: a task has no reference text.
        """
        out = [Score.invalid("the reasoning does not end (no end mark)")] * len(trajectories)
        rows: list[tuple[int, float, float]] = []
        spreads: list[tuple[float, float]] = []
        for one in self.reflect(trajectories, progress, baseline=self.reflection.baseline is not None):
            chosen = [k for k, ok in enumerate(one.valid.tolist()) if ok]
            if len(chosen) < 2:
                for k in chosen:
                    out[one.members[k]] = Score.invalid("fewer than two traces of the group have an end of reasoning")
                continue
            r3 = self.reflection(one.L, one.M, one.valid)[chosen].numpy()
            length = outcome_length_reward(one.outcome[chosen], one.L.shape[1], self.beta_len)
            spreads.append((float(r3.std()), float(length.std())))
            rows += zip([one.members[k] for k in chosen], r3.tolist(), length.tolist(), strict=True)
        weight = self._weight(spreads)
        for k, r3_k, length_k in rows:
            out[k] = Score(self.lambda_r3 * r3_k + weight * length_k, parts={"r3": r3_k, "length": length_k})
        return out

    def reflect(
        self, trajectories: Sequence[Trajectory], progress: Progress | None = None, *, baseline: bool = True
    ) -> list[Reflection]:
        """Log-probabilities of the reference behind every trace, by task, in the order of first appearance.

        Raises:
            ConfigError: a task has no reference text, or its reference has no tokens.
        """
        groups: dict[str, list[int]] = {}
        for k, t in enumerate(trajectories):
            groups.setdefault(t.task.id, []).append(k)
        split = [self._split(t) for t in trajectories]
        references = {}
        for name, index in groups.items():
            gold = trajectories[index[0]].task.reference
            ids = self.policy.encode(gold) if isinstance(gold, str) and gold.strip() else []
            if not ids:
                raise ConfigError(f"task {name!r} has no reference text; give one as task.reference (a string)")
            references[name] = ids
        items: list[tuple[Sequence[int], Sequence[int]]] = []
        hidden: list[tuple[int, int] | None] = []
        places: dict[Any, int] = {}

        def ask(key: Any, context: Sequence[int], name: str, span: tuple[int, int] | None = None) -> None:
            places[key] = len(items)
            items.append((context, references[name]))
            hidden.append(span)

        for name, index in groups.items():
            for k in index:
                part = split[k]
                if part is None:
                    continue
                ask(k, part.context, name)
                if baseline and self.masked == "hidden":
                    ask(("masked", k), part.context, name, part.reasoning)
                elif baseline and ("masked", name) not in places:
                    empty = self.policy.encode(f"{self.start}{self.end}{self.prefix}")
                    ask(("masked", name), [*part.context[: part.prompt], *empty], name)
        found = score_references(self._model(progress), items, hidden=hidden, max_tokens=self.max_tokens)
        return [self._table(index, split, found, places, name, len(references[name])) for name, index in groups.items()]

    def select(self, groups: Sequence[Group], filter: R3Filter, previous: Sequence[str] = ()) -> np.ndarray:
        """Indices of the groups whose tasks can be learned from, by traces of the current policy; see :class:`R3Filter`.

        Args:
            groups: one per task, of several trajectories each (16 or 32 in the paper).
            filter: how they are chosen.
            previous: ids of the tasks that were trained on before, some of which are carried along.
        """
        found = self.reflect([t for g in groups for t in g.trajectories], baseline=False)
        return filter.select(
            [one.L for one in found],
            [one.ranks for one in found],
            [g.task.id for g in groups],
            previous,
            [one.valid for one in found],
        )

    def state_dict(self) -> dict[str, Any]:
        """The weight of the length term, and the weights of a copy that lags behind."""
        state: dict[str, Any] = {"lambda_len": self.lambda_len}
        if self._lagged is not None:
            state["lagged"] = self._lagged[0].state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.lambda_len = state.get("lambda_len", self.lambda_len)
        if "lagged" in state:
            self._lagged = (_copy(self.policy.model), None)
            self._lagged[0].load_state_dict(state["lagged"])

    def _weight(self, spreads: Sequence[tuple[float, float]]) -> float:
        """The weight of the length term; fitted where it is to be and can be."""
        if self.lambda_len is None and spreads:
            r3, length = np.mean(spreads, 0)
            if r3 > 0 and length > 0:
                self.lambda_len = float(self.lambda_r3 * r3 / length)
        return 1.0 if self.lambda_len is None else self.lambda_len

    def _model(self, progress: Progress | None) -> Any:
        """The model that scores now."""
        if self.refresh is None:
            return self.policy.model
        due = progress is not None and progress.step % self.refresh == 0
        if self._lagged is None or (due and progress is not None and self._lagged[1] != progress.step):
            self._lagged = (_copy(self.policy.model), None if progress is None else progress.step)
        return self._lagged[0]

    def _table(
        self, index: Sequence[int], split: Sequence[Any], found: Any, places: Mapping[Any, int], name: str, width: int
    ) -> Reflection:
        L = torch.full((len(index), width), math.nan)
        ranks = torch.zeros((len(index), width), dtype=torch.int64)
        M: Tensor | None = None
        for row, k in enumerate(index):
            if split[k] is None:
                continue
            L[row], ranks[row] = found[places[k]]
            if ("masked", k) in places:
                M = torch.zeros_like(L) if M is None else M
                M[row] = found[places["masked", k]][0]
        if ("masked", name) in places:
            M = found[places["masked", name]][0]
        valid = torch.tensor([split[k] is not None for k in index])
        outcome = np.array([math.nan if split[k] is None else split[k].outcome for k in index])
        return Reflection(tuple(index), valid, L, ranks, M, outcome)

    def _split(self, trajectory: Trajectory) -> _Split | None:
        """Context and outcome of a trace; None where its reasoning does not end."""
        ids = list(trajectory.prompt_ids) or self.policy.render(trajectory.task.prompt)
        prompt, prefix = len(ids), self.policy.encode(self.prefix) if self.prefix else []
        context: list[int] | None = None
        reasoning, outcome = (prompt, prompt), 0
        for turn in trajectory.turns:
            said = list(turn.token_ids) or self.policy.encode(turn.text)
            if context is not None:
                outcome += self._length(said, turn.text) if turn.speaker == "policy" else 0
                continue
            if turn.speaker != "policy" or self.end not in turn.text:
                ids += said
                continue
            text = turn.text[: turn.text.index(self.end) + len(self.end)]
            rest = turn.text[len(text) :]
            stop = self._tokens_to_end(said)
            trace = said[:stop] if self.policy.decode(said[:stop]).endswith(self.end) else self.policy.encode(text)
            context = [*ids, *trace, *prefix]
            begin = (
                prompt + len(self.policy.encode(self.start)) if self.start and text.startswith(self.start) else prompt
            )
            finish = len(ids) + len(trace) - len(self.policy.encode(self.end))
            reasoning = (begin, max(begin, finish))
            if self._count is not None or self.prefix:
                outcome = self._length(
                    self.policy.encode(rest.removeprefix(self.prefix)), rest.removeprefix(self.prefix)
                )
            else:
                outcome = self._length(said[stop:], rest)
        return None if context is None else _Split(context, prompt, reasoning, outcome)

    def _length(self, ids: Sequence[int], text: str) -> int:
        return self._count(text) if self._count is not None else sum(t not in self._special for t in ids)

    def _tokens_to_end(self, ids: Sequence[int]) -> int:
        """Fewest tokens whose text holds the end mark."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.end in self.policy.decode(ids[:middle]) else (middle + 1, high)
        return high


@dataclass(frozen=True, slots=True)
class _Split:
    """Token ids up to where the outcome begins, how many are prompt, which are reasoning, and the outcome's length."""

    context: list[int]
    prompt: int
    reasoning: tuple[int, int]
    outcome: int


def _copy(model: Any) -> Any:
    return copy.deepcopy(model).requires_grad_(False).eval()
