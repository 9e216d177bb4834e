"""A process reward model that is trained on outcomes alone: rewards are log-ratios of a model to its reference.

The outcome reward of a response is ``beta * sum_t log[pi(y_t) / ref(y_t)]``. Trained to tell right responses from
wrong ones, its partial sums are values of prefixes, and their differences rewards of steps and tokens: see
:mod:`guerdon.credit.implicit`.

Source: Yuan et al. 2024 (arXiv 2412.01981).
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.credit.implicit import implicit_rewards, reduce_steps
from guerdon.errors import CheckpointError, ConfigError, DataError, TrainingError
from guerdon.objectives.implicit import implicit_ce, implicit_dpo, implicit_kto, implicit_nca
from guerdon.reward_models.logratio import Loss, Responses, accumulate, logprobs
from guerdon.reward_models.ranking import first_error
from guerdon.reward_models.text import joined_steps, text_trajectories
from guerdon.types import Segmenter, Span, Trajectory, step_spans

__all__ = ["FitReport", "ImplicitPRM", "check_labels", "check_tokenizer", "implicit_rewards"]

LossName = Literal["ce", "dpo", "kto", "nca"]
Mode = Literal["difference", "cumulative"]
LOSSES = ("ce", "dpo", "kto", "nca")


@dataclass(frozen=True)
class FitReport:
    """What a call of :meth:`ImplicitPRM.fit` did.

    Args:
        losses: mean loss of each optimiser step, before it.
        examples: responses (ce, kto) or pairs (dpo, nca) of one epoch.
        skipped_prompts: prompts without both a right and a wrong response (dpo, nca).
        prompts: all prompts.
        seconds: wall-clock time.
    """

    losses: tuple[float, ...]
    examples: int
    skipped_prompts: int
    prompts: int
    seconds: float


class ImplicitPRM:
    """Learns from response labels, scores responses, steps and tokens.

    Wherever ``prompts, responses`` are asked for, trajectories may be given in place of ``prompts``: their token ids
    are used as sampled, and only the policy's tokens count. A prompt is text (one user message), chat messages, or
    token ids; a response is text (the end token is put behind it) or token ids.

    Args:
        model: causal language model to be trained (transformers, peft, or a :class:`~guerdon.policies.Policy`). Dropout
            stays off throughout: rewards are differences of log-probabilities, and noise would drown them.
        ref_model: the model as it was before training, in an object of its own; it is frozen. ``None`` copies ``model``
            as it is now.
        tokenizer: of both; may be ``None`` for a policy.
        beta: factor of the log-ratio, in training and in every reward.
        loss: ``"ce"`` and ``"kto"`` take responses one by one, whatever labels a prompt's responses have; ``"dpo"`` and
            ``"nca"`` take every pair of a right and a wrong response to one prompt.
        segmenter: cuts responses into steps; blank lines by default.
        max_tokens_per_microbatch: positions of one forward pass; changes memory and speed only.

    Raises:
        ConfigError: the reference is the model itself (all rewards would stay 0), another tokenizer or vocabulary, or
            a setting out of range.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        tokenizer: Any = None,
        beta: float = 0.05,
        loss: LossName = "ce",
        *,
        segmenter: Segmenter | None = None,
        max_tokens_per_microbatch: int = 16_384,
    ) -> None:
        if not 0 < beta < float("inf"):
            raise ConfigError(f"beta must be positive and finite, got {beta}")
        if loss not in LOSSES:
            raise ConfigError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if max_tokens_per_microbatch < 1:
            raise ConfigError(f"max_tokens_per_microbatch must be at least 1, got {max_tokens_per_microbatch}")
        self.policy = _policy(model, tokenizer, "model")
        self.tokenizer = self.policy.tokenizer
        self.reference = _frozen(self.policy) if ref_model is None else _policy(ref_model, self.tokenizer, "ref_model")
        _check_reference(self.policy, self.reference)
        self.reference.model.requires_grad_(False)
        self.beta = float(beta)
        self.loss: LossName = loss
        self.segmenter = segmenter or Segmenter("blank_lines")
        self.report: FitReport | None = None
        self._max_tokens = max_tokens_per_microbatch

    @classmethod
    def from_policy(cls, policy: Any, **settings: Any) -> Any:
        """Begin from a policy, which is left alone: model and reference are copies of it as it is now."""
        trained = copy.copy(policy)
        trained.model = copy.deepcopy(policy.model)
        trained.value_head = None
        return cls(trained, None, None, **settings)

    # Scoring ----------------------------------------------------------------------------------------------------------

    def token_rewards(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any] | None = None,
        *,
        beta: float | None = None,
        use_reference: bool = True,
    ) -> list[Tensor]:
        """``beta`` times the log-ratio of every response token, one ``[T]`` tensor per response.

        Args:
            prompts, responses: see the class. Environment tokens of trajectories get 0.
            beta: in place of the model's own. The released evaluation uses 0.001 to 0.005, which matters only where
                scores pass a sigmoid or a fixed threshold.
            use_reference: False leaves the reference out (its log-probabilities count as 0), which saves half the work.
                A variant for models trained with ``"dpo"``, never the default.

        Raises:
            DataError: text that cannot be tokenised as asked, or trajectories of another tokenizer.
        """
        made = Responses.from_trajectories(self._trajectories(prompts, responses))
        return made.split(self._token_rewards(made, beta, use_reference))

    def step_rewards(
        self,
        prompts: Sequence[Any],
        steps: Sequence[Sequence[str]] | None = None,
        mode: Mode = "difference",
        *,
        separator: str = "\n\n",
        prefix: str = "",
        segmenter: Segmenter | None = None,
        beta: float | None = None,
        use_reference: bool = True,
    ) -> list[Tensor]:
        """Reward of every step, one ``[S]`` tensor per response.

        Args:
            prompts: see the class.
            steps: texts of each response's steps; they are joined to one response. Left out where ``prompts`` are
                trajectories, which a segmenter cuts.
            mode: ``"difference"`` gives ``q_k - q_{k-1}`` (the steps sum to the response's reward), ``"cumulative"``
                gives the prefix values ``q_k``.
            separator: between steps; its tokens belong to the step that it closes.
            prefix: before each step, ``{k}`` being its number; the released evaluation has ``"Step {k}: "``.
            segmenter: of trajectories; default the model's.
            beta, use_reference: as in :meth:`token_rewards`.

        Returns:
            A response without tokens has no steps. A step whose text shares all its tokens with its neighbours adds 0.
        """
        if mode not in ("difference", "cumulative"):
            raise ConfigError(f"mode must be 'difference' or 'cumulative', got {mode!r}")
        if steps is None:
            trajectories = self._trajectories(prompts, None)
            spans = [step_spans(t, segmenter or self.segmenter) for t in trajectories]
        else:
            if len(steps) != len(prompts):
                raise DataError(f"steps of {len(steps)} responses for {len(prompts)} prompts; give one list per prompt")
            made = [
                joined_steps(self.policy, p, s, separator=separator, prefix=prefix, id=f"text-{k}")
                for k, (p, s) in enumerate(zip(prompts, steps, strict=True))
            ]
            trajectories, spans = [t for t, _ in made], [s for _, s in made]
        responses = Responses.from_trajectories(trajectories)
        rewards = responses.split(self._token_rewards(responses, beta, use_reference))
        return [_steps(r, s, mode) for r, s in zip(rewards, spans, strict=True)]

    def score(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any] | None = None,
        reduce: Literal["min", "sum", "mean"] = "min",
        *,
        mode: Mode = "difference",
        segmenter: Segmenter | None = None,
        beta: float | None = None,
        use_reference: bool = True,
    ) -> Tensor:
        """One score per response, ``[B]``: its worst step (default), or the sum or mean of its steps.

        Args:
            prompts, responses: see the class; a segmenter cuts them into steps.
            reduce: ``"sum"`` of differences is the outcome reward ``r(y)``.
            mode, beta, use_reference: as in :meth:`step_rewards`.
            segmenter: default the model's. A response without separators is one step.

        Returns:
            Scores; 0 for an empty response.
        """
        trajectories = self._trajectories(prompts, responses)
        steps = self.step_rewards(trajectories, mode=mode, segmenter=segmenter, beta=beta, use_reference=use_reference)
        return reduce_steps(steps, reduce)

    def first_errors(
        self,
        prompts: Sequence[Any],
        steps: Sequence[Sequence[str]] | None = None,
        threshold: float = 0.5,
        *,
        beta: float | None = None,
        **options: Any,
    ) -> list[int]:
        """Index of the first wrong step of each response, -1 where none is found.

        A step is wrong where ``sigmoid(q_k) < threshold``, q being the cumulative value at its end. Choose the
        threshold on other data: :func:`guerdon.reward_models.fit_threshold`.

        Args:
            prompts, steps, beta, options: of :meth:`step_rewards`.
            threshold: in [0, 1].
        """
        rows = self.step_rewards(prompts, steps, "cumulative", beta=beta, **options)
        return [first_error(torch.sigmoid(q), threshold) for q in rows]

    def step_scores(self, trajectories: Sequence[Trajectory], segmenter: Segmenter | None = None) -> list[Tensor]:
        """:meth:`step_rewards` of trajectories: the interface that all step scorers share."""
        return self.step_rewards(trajectories, segmenter=segmenter)

    # Training ---------------------------------------------------------------------------------------------------------

    def fit(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any] | None = None,
        labels: Sequence[Any] | Tensor | None = None,
        *,
        lr: float = 5e-7,
        epochs: int = 1,
        batch_size: int = 64,
        max_length: int = 8192,
        grad_clip: float | None = 1.0,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> ImplicitPRM:
        """Train on response labels; what was done stands in :attr:`report`.

        Args:
            prompts, responses: see the class.
            labels: 1 for a right response, 0 for a wrong one.
            lr: of AdamW, constant. The default is that of an 8 B model; a few million parameters want about 1e-4.
            epochs: passes over the data.
            batch_size: responses (ce, kto) or pairs (dpo, nca) of one optimiser step.
            max_length: most tokens of a prompt with its response; longer ones are refused, since a cut response has
                another label.
            grad_clip: largest norm of the gradient.
            weight_decay: of AdamW.
            seed: of the order of the examples.

        Raises:
            DataError: labels that are not 0 or 1 or of another number, nothing to learn from (for dpo and nca: no
                prompt with both a right and a wrong response), or a response that is too long.
            TrainingError: a loss or gradient is not finite; the weights are as before that step.
        """
        started = time.perf_counter()
        if epochs < 1 or batch_size < 1 or not lr > 0:
            raise ConfigError(f"epochs, batch_size and lr must be positive, got {epochs}, {batch_size} and {lr}")
        made = Responses.from_trajectories(self._trajectories(prompts, responses))
        targets = check_labels(labels, len(made))
        if not int(made.counts.sum()):
            raise DataError("there is nothing to train on: no response has a token")
        for k, (prompt, response) in enumerate(made.items):
            if len(prompt) + len(response) > max_length:
                raise DataError(
                    f"response {k} has {len(prompt) + len(response)} tokens with its prompt, more than max_length="
                    f"{max_length}; leave it out or raise max_length"
                )
        examples, skipped, total = self._examples(made, targets)
        optimiser = self._optimiser(lr, weight_decay)
        reference_N = self._reference(made)
        losses: list[float] = []
        for epoch in range(epochs):
            order = np.random.default_rng([seed & 0xFFFFFFFF, epoch]).permutation(len(examples))
            for start in range(0, len(order), batch_size):
                chosen = examples[torch.from_numpy(order[start : start + batch_size])]
                rows, place = chosen.unique(return_inverse=True)
                part = made.select(rows)
                loss, separable = self._loss(part, targets[rows], place)
                value, _ = self._update(
                    optimiser, part, reference_N[made.flat(rows)], loss, separable, grad_clip,
                    where=f"epoch {epoch + 1}, step {len(losses) + 1}",
                )  # fmt: skip
                losses.append(value)
        self.report = FitReport(tuple(losses), len(examples), skipped, total, time.perf_counter() - started)
        if skipped:
            warnings.warn(
                f"{skipped} of {total} prompts have no pair of a right and a wrong response and were skipped; "
                "loss='ce' learns from them too",
                stacklevel=2,
            )
        return self

    def state_dict(self) -> dict[str, Any]:
        """Trained weights, and what they are valid for."""
        from guerdon.policies.policy import fingerprint

        return {
            "weights": {n: p.detach().clone() for n, p in self._trained().items()},
            "reference": fingerprint(self.reference.model),
            "beta": self.beta,
            "loss": self.loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over weights.

        Raises:
            CheckpointError: they belong to another reference, beta, loss, or architecture.
        """
        mine = self.state_dict()
        for key in ("reference", "beta", "loss"):
            if state[key] != mine[key]:
                raise CheckpointError(
                    f"the saved implicit reward model has {key} {state[key]!r}, this one {mine[key]!r}; "
                    "make it from the same checkpoint with the same settings"
                )
        trained, saved = self._trained(), state["weights"]
        odd = sorted(trained.keys() ^ saved.keys())
        odd += [n for n in trained.keys() & saved.keys() if trained[n].shape != saved[n].shape]
        if odd:
            raise CheckpointError(f"{len(odd)} saved tensors do not fit the reward model, first {odd[0]!r}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    # Parts ------------------------------------------------------------------------------------------------------------

    def _trajectories(self, prompts: Sequence[Any], responses: Sequence[Any] | None) -> list[Trajectory]:
        if responses is not None:
            return text_trajectories(self.policy, prompts, responses)
        trajectories = list(prompts)
        for t in trajectories:
            if not isinstance(t, Trajectory):
                raise DataError(f"without responses, trajectories are expected, got {type(t).__name__}")
        check_tokenizer(self.policy, trajectories)
        return trajectories

    def _token_rewards(self, responses: Responses, beta: float | None = None, use_reference: bool = True) -> Tensor:
        if beta is not None and not 0 < beta < float("inf"):
            raise ConfigError(f"beta must be positive and finite, got {beta}")
        chosen = logprobs(self.policy, responses, max_tokens=self._max_tokens)
        if use_reference:
            chosen = chosen - self._reference(responses)
        return (self.beta if beta is None else beta) * chosen

    def _reference(self, responses: Responses) -> Tensor:
        return logprobs(self.reference, responses, max_tokens=self._max_tokens)

    def _examples(self, responses: Responses, labels: Tensor) -> tuple[Tensor, int, int]:
        """Rows ``[n]``, or pairs ``[n, 2]`` of a right and a wrong row; prompts skipped, and all prompts."""
        prompts: dict[tuple[int, ...], list[int]] = {}
        for b, (prompt, _) in enumerate(responses.items):
            prompts.setdefault(prompt, []).append(b)
        if self.loss in ("ce", "kto"):
            # A response without tokens has reward 0 whatever the weights are.
            return torch.nonzero(responses.counts).squeeze(1), 0, len(prompts)
        pairs: list[tuple[int, int]] = []
        skipped = 0
        for rows in prompts.values():
            right = [b for b in rows if labels[b] == 1]
            wrong = [b for b in rows if labels[b] == 0]
            skipped += not (right and wrong)
            pairs += [(w, l) for w in right for l in wrong]
        if not pairs:
            raise DataError(
                f"loss={self.loss!r} needs a prompt with both a right and a wrong response, and none of the "
                f"{len(prompts)} prompts has; sample more responses, or use loss='ce'"
            )
        return torch.tensor(pairs), skipped, len(prompts)

    def _loss(self, responses: Responses, labels: Tensor, place: Tensor) -> tuple[Loss, bool]:
        """The mean loss of a batch, and whether each response's share depends on its own reward alone.

        ``place`` holds for each example its row, or its two rows, within ``responses``.
        """
        n = len(place)
        if self.loss in ("dpo", "nca"):
            function = implicit_dpo if self.loss == "dpo" else implicit_nca
            return lambda rewards, rows: function(rewards[place[:, 0]], rewards[place[:, 1]]).sum() / n, False
        if self.loss == "ce":
            return lambda rewards, rows: implicit_ce(rewards[rows], labels[rows], soft=True).sum() / n, True
        z0 = self._reference_point(responses)
        return lambda rewards, rows: implicit_kto(rewards[rows], labels[rows], z0).sum() / n, True

    def _reference_point(self, responses: Responses) -> float:
        """KTO's z0: mean reward of each prompt with the response to another prompt of the batch, at least 0.

        0 where the batch holds one prompt, as there is no such response.
        """
        items, masks = [], []
        split = responses.split(responses.mask)
        for b, (prompt, _) in enumerate(responses.items):
            # The nearest one before, so that each response serves about once.
            other = next((o for o in range(b - 1, b - len(responses), -1) if responses.items[o][0] != prompt), None)
            if other is None:
                continue
            response = responses.items[other][1]
            if len(prompt) + len(response) <= self.policy.max_context:
                items.append((prompt, response))
                masks.append(split[other].tolist())
        if not items:
            return 0.0
        mixed = Responses.of(items, masks)
        return max(0.0, float(self._token_rewards(mixed).sum()) / len(items))

    def _update(
        self,
        optimiser: torch.optim.Optimizer,
        responses: Responses,
        reference_N: Tensor,
        loss: Loss,
        separable: bool,
        grad_clip: float | None,
        *,
        where: str,
    ) -> tuple[float, Tensor]:
        """One optimiser step; the loss and the log-ratios of each token, both before it."""
        optimiser.zero_grad(set_to_none=True)
        value, ratio_N = accumulate(
            self.policy, responses, reference_N, self.beta, loss, separable=separable, max_tokens=self._max_tokens
        )
        parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters]) if parameters else torch.zeros(())
        if not (np.isfinite(value) and bool(torch.isfinite(norm))):
            optimiser.zero_grad(set_to_none=True)
            raise TrainingError(
                f"{where} of the implicit reward model: loss {value} or gradient norm {float(norm)} is not finite; "
                "no weight was changed. Lower its learning rate"
            )
        if grad_clip is not None and float(norm) > grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return value, ratio_N

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.policy.model.named_parameters() if p.requires_grad}

    def _optimiser(self, lr: float, weight_decay: float) -> torch.optim.AdamW:
        parameters = list(self._trained().values())
        if not parameters:
            raise ConfigError("the model has no parameter that requires a gradient; thaw it, or give it adapters")
        fused = {p.device.type for p in parameters} <= {"cpu", "cuda"}
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


def check_labels(labels: Any, n: int, *, soft: bool = False) -> Tensor:
    """Labels as float64 ``[n]``.

    Raises:
        DataError: missing, of another number, or not 0 or 1 (``soft``: not between).
    """
    if labels is None:
        raise DataError("labels are missing; give one per response, 1 for right and 0 for wrong")
    try:
        out = torch.as_tensor(labels, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels must be numbers, one per response: {error}") from None
    if out.shape != (n,):
        raise DataError(f"labels have shape {tuple(out.shape)} for {n} responses; give one per response")
    bad = ~((out >= 0) & (out <= 1)) if soft else ~((out == 0) | (out == 1))
    if bool(bad.any()):
        k = int(torch.nonzero(bad)[0])
        allowed = "between 0 and 1" if soft else "0 or 1"
        raise DataError(f"label {k} is {out[k].item()}; labels must be {allowed}")
    return out


def check_tokenizer(policy: Any, trajectories: Sequence[Trajectory]) -> None:
    """Refuse trajectories whose token ids mean something else to ``policy``.

    Every id must be one of the vocabulary; of the first trajectory with text, the ids must also spell that text.

    Raises:
        DataError: names the task.
    """
    size = _vocabulary(policy)
    special = policy.control_tokens
    compared = False
    for t in trajectories:
        highest = max((i for turn in t.turns for i in turn.token_ids), default=-1)
        if highest >= size:
            raise DataError(
                f"token id {highest} of task {t.task.id!r} is outside the vocabulary of {size} of {policy.name!r}; "
                "the trajectory was written with another tokenizer: score its text"
            )
        for turn in () if compared else t.turns:
            if turn.speaker == "policy" and turn.text and turn.token_ids:
                compared = True
                spelled, text = policy.decode(turn.token_ids), turn.text
                for token in (*special, "\ufffd"):
                    spelled, text = spelled.replace(token, ""), text.replace(token, "")
                if spelled.strip() != text.strip():
                    raise DataError(
                        f"the token ids of task {t.task.id!r} do not spell its text with the tokenizer of "
                        f"{policy.name!r}; it was written with another tokenizer: score its text"
                    )
                break


def _steps(rewards_T: Tensor, spans: Sequence[Span], mode: Mode) -> Tensor:
    q = torch.cat([rewards_T.new_zeros(1), rewards_T.cumsum(0)])
    stops = q[[s.stop for s in spans]]
    return stops - q[[s.start for s in spans]] if mode == "difference" else stops


def _policy(model: Any, tokenizer: Any, name: str) -> Any:
    from guerdon.policies import Policy

    if not isinstance(model, Policy):
        if tokenizer is None:
            raise ConfigError(f"{name} comes without a tokenizer; give tokenizer=, or a guerdon.policies.Policy")
        made = Policy(model, tokenizer, name=name)
        if _vocabulary(made) < len(tokenizer):
            raise ConfigError(
                f"{name} has {_vocabulary(made)} embeddings for the {len(tokenizer)} entries of the tokenizer; "
                "give the tokenizer that it was trained with"
            )
        return made
    if tokenizer is not None and tokenizer is not model.tokenizer and _words(tokenizer) != _words(model.tokenizer):
        raise ConfigError(f"{name} has another tokenizer; model and reference must share one")
    return model


def _words(tokenizer: Any) -> dict[str, int]:
    return dict(tokenizer.get_vocab())


def _vocabulary(policy: Any) -> int:
    return int(policy.model.get_input_embeddings().weight.shape[0])


def _frozen(policy: Any) -> Any:
    """A frozen copy of a policy as it is, adapters folded in."""
    if not policy.adapted:
        return policy.reference()
    frozen = policy.merged()
    frozen.value_head = None
    frozen.model.requires_grad_(False)
    frozen.model.eval()
    return frozen


def _check_reference(policy: Any, reference: Any) -> None:
    trained = {p.data_ptr() for p in policy.model.parameters() if p.requires_grad}
    if reference.model is policy.model or any(p.data_ptr() in trained for p in reference.model.parameters()):
        raise ConfigError(
            "the reference shares trained weights with the model, so every reward would stay 0; "
            "give a frozen copy, or ref_model=None to have one made"
        )
    if _vocabulary(policy) != _vocabulary(reference):
        raise ConfigError(
            f"model and reference have vocabularies of {_vocabulary(policy)} and {_vocabulary(reference)}; "
            "they must share the tokenizer"
        )
