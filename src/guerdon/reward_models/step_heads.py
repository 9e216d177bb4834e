"""Step scorers with a head on a causal language model: two classes (right or wrong), or a value.

Both read the state at a step's last token, so they know the prompt and the solution up to the step's end.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guerdon.errors import CheckpointError, ConfigError, DataError, TrainingError
from guerdon.reward_models.reader import Places, places_of_steps, read_states
from guerdon.reward_models.steps import at_step_ends
from guerdon.types import Segmenter, Trajectory

__all__ = ["HeadFit", "StepClassifier", "StepHead", "StepValue"]

StepLabels = Sequence[Sequence[float | bool | None]] | Sequence[Tensor]


@dataclass(frozen=True)
class HeadFit:
    """What a call of ``fit`` did.

    Args:
        losses: mean loss of each optimiser step, before it.
        labelled: number of labelled places.
        seconds: wall-clock time.
    """

    losses: tuple[float, ...]
    labelled: int
    seconds: float


class StepHead:
    """A causal model and a head that is read at step ends; base of :class:`StepClassifier` and :class:`StepValue`.

    Args:
        model: a :class:`~guerdon.policies.Policy` (trained in place; see :meth:`from_policy`), or a transformers or
            peft model with ``tokenizer``.
        tokenizer: of the model; None for a policy.
        segmenter: how steps are cut; lines by default.
        layers: of the head: 1 is linear, 2 puts a hidden layer with ReLU before it (as released PRMs have).
        by: ``"tokens"`` reads trajectories by their sampled ids and refuses those of another tokenizer; ``"text"``
            tokenises their text anew. See :func:`~guerdon.reward_models.reader.places_of_steps`.
        separator: after each step, with ``by="text"``.
        max_tokens_per_microbatch: positions of one forward pass; changes memory and speed only.
        seed: of the head's weights.
    """

    outputs = 1

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        segmenter: Segmenter | None = None,
        layers: int = 1,
        by: Literal["tokens", "text"] = "tokens",
        separator: str = "\n",
        max_tokens_per_microbatch: int = 16_384,
        seed: int = 0,
    ) -> None:
        from guerdon.policies import Policy
        from guerdon.policies.logprobs import trunk_and_head

        if layers not in (1, 2):
            raise ConfigError(f"layers must be 1 or 2, got {layers}")
        if by not in ("tokens", "text"):
            raise ConfigError(f"by must be 'tokens' or 'text', got {by!r}")
        if max_tokens_per_microbatch < 1:
            raise ConfigError(f"max_tokens_per_microbatch must be at least 1, got {max_tokens_per_microbatch}")
        if not isinstance(model, Policy):
            if tokenizer is None:
                raise ConfigError("the model comes without a tokenizer; give tokenizer=, or a guerdon.policies.Policy")
            model = Policy(model, tokenizer, name="step-scorer")
        trunk_and_head(model.model)
        self.policy = model
        self.segmenter = segmenter or Segmenter("lines")
        self.by, self.separator = by, separator
        self._max_tokens = max_tokens_per_microbatch
        config = model.model.config.get_text_config()
        width = int(getattr(config, "hidden_size", None) or config.n_embd)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(width, self.outputs)
            # From zero: an untrained scorer says the same about everything.
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.head = last if layers == 1 else nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)
        self.head.to(model.device)
        self.report: HeadFit | None = None

    @classmethod
    def from_policy(cls, policy: Any, **settings: Any) -> Self:
        """Begin from a copy of a policy's weights; the policy itself is left alone."""
        own = copy.copy(policy)
        own.model, own.value_head = copy.deepcopy(policy.model), None
        own.model.requires_grad_(True)
        return cls(own, **settings)

    # Scoring ----------------------------------------------------------------------------------------------------------

    def step_scores(self, trajectories: Sequence[Trajectory], segmenter: Segmenter | None = None) -> list[Tensor]:
        """One ``[S]`` float32 tensor per trajectory: the score at the end of each step."""
        return self._split(self.places(trajectories, segmenter))

    def token_rewards(self, trajectories: Sequence[Trajectory], segmenter: Segmenter | None = None) -> list[Tensor]:
        """One ``[T]`` tensor per trajectory: each step's score on its last token, 0 elsewhere."""
        scores = self.step_scores(trajectories, segmenter)
        return at_step_ends(scores, trajectories, segmenter or self.segmenter)

    def prefix_values(self, trajectories: Sequence[Trajectory], segmenter: Segmenter | None = None) -> list[Tensor]:
        """One ``[S + 1]`` tensor per trajectory: the score at the prompt's end, and at the end of each step."""
        return self._split(self.places(trajectories, segmenter, start=True))

    def read(self, places: Sequence[Places]) -> Tensor:
        """Scores at given places, flat in their order, without gradient."""
        out = torch.zeros(sum(len(p.at) for p in places))
        self.policy.model.eval()
        self.head.eval()
        with torch.no_grad():
            for states, index in read_states(self.policy, places, max_tokens=self._max_tokens):
                out[index] = self._score(self._outputs(states)).float().cpu()
        return out

    def places(
        self, trajectories: Sequence[Trajectory], segmenter: Segmenter | None = None, *, start: bool = False
    ) -> list[Places]:
        """Where trajectories are read; ``start`` adds the prompt's end."""
        return places_of_steps(
            self.policy, trajectories, segmenter or self.segmenter, by=self.by, separator=self.separator, start=start
        )

    # Training ---------------------------------------------------------------------------------------------------------

    def fit(
        self,
        trajectories: Sequence[Trajectory],
        labels: StepLabels,
        *,
        segmenter: Segmenter | None = None,
        **options: Any,
    ) -> Self:
        """Train on labels per step; what was done stands in :attr:`report`.

        Args:
            trajectories: cut by the segmenter.
            labels: for each trajectory one label per step: 0 or 1, a share in [0, 1] (a soft label stays soft), or
                None (or NaN) where there is none, which leaves the step out of the loss.
            segmenter: in place of the scorer's own.
            options: of :meth:`fit_places`.

        Raises:
            DataError: another number of labels than of steps, labels outside [0, 1], or no label at all.
        """
        if len(labels) != len(trajectories):
            raise DataError(f"labels of {len(labels)} trajectories for {len(trajectories)}; give one list for each")
        places = self.places(trajectories, segmenter)
        flat: list[float] = []
        for place, row, trajectory in zip(places, labels, trajectories, strict=True):
            values = [float("nan") if x is None else float(x) for x in row]
            if len(values) != len(place.at):
                raise DataError(
                    f"{len(values)} labels for the {len(place.at)} steps of task {trajectory.task.id!r}; give one per "
                    "step, None for a step without label"
                )
            flat += values
        return self.fit_places(places, torch.tensor(flat, dtype=torch.float64), **options)

    def fit_places(
        self,
        places: Sequence[Places],
        targets: Tensor,
        *,
        lr: float = 1e-6,
        epochs: int = 1,
        batch_size: int = 128,
        head_only: bool = False,
        weight_decay: float = 0.0,
        grad_clip: float | None = 1.0,
        seed: int = 0,
    ) -> Self:
        """Train on one target per place; :meth:`fit` ends here.

        Args:
            places: sequences, each with the positions at which it is read.
            targets: ``[n]`` flat in the order of the positions, in [0, 1]; NaN has no target.
            lr: of AdamW, constant. The default is that of a 7 B model; a few million parameters want about 1e-3.
            epochs: passes over the data.
            batch_size: sequences of one optimiser step; its loss is the mean over their labelled positions.
            head_only: train the head alone, as a first stage does.
            weight_decay: of AdamW.
            grad_clip: largest norm of the gradient.
            seed: of the order of the sequences.

        Raises:
            TrainingError: a loss is not finite; the weights are as before that step.
        """
        began = time.perf_counter()
        if epochs < 1 or batch_size < 1 or not lr > 0:
            raise ConfigError(f"epochs, batch_size and lr must be positive, got {epochs}, {batch_size} and {lr}")
        counts = [len(p.at) for p in places]
        if targets.shape != (sum(counts),):
            raise DataError(f"targets have shape {tuple(targets.shape)} for {sum(counts)} places; give one for each")
        wanted = ~targets.isnan()
        self._check_targets(targets[wanted])
        starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        busy = [k for k in range(len(places)) if bool(wanted[starts[k] : starts[k + 1]].any())]
        if not busy:
            raise DataError("there is nothing to train on: no step has a label")
        parameters = [p for p in self.head.parameters() if p.requires_grad]
        if not head_only:
            parameters += [p for p in self.policy.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        self.policy.model.eval()  # dropout would blur what is read; models of this kind are trained without
        losses: list[float] = []
        for epoch in range(epochs):
            order = np.random.default_rng([seed & 0xFFFFFFFF, epoch]).permutation(len(busy))
            for begin in range(0, len(order), batch_size):
                rows = [busy[i] for i in order[begin : begin + batch_size]]
                flat = torch.from_numpy(np.concatenate([np.arange(starts[k], starts[k + 1]) for k in rows]))
                losses.append(
                    self._step([places[k] for k in rows], targets[flat], optimiser, parameters, head_only, grad_clip)
                )
        self.report = HeadFit(tuple(losses), int(wanted.sum()), time.perf_counter() - began)
        return self

    def _step(
        self,
        places: Sequence[Places],
        targets: Tensor,
        optimiser: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        head_only: bool,
        grad_clip: float | None,
    ) -> float:
        optimiser.zero_grad(set_to_none=True)
        wanted = ~targets.isnan()
        total, n = 0.0, int(wanted.sum())
        for states, index in read_states(self.policy, places, max_tokens=self._max_tokens):
            chosen = wanted[index]
            if not bool(chosen.any()):
                continue
            states = states[chosen.to(states.device)]
            if head_only:
                states = states.detach()
            outputs = self._outputs(states)
            loss = self._loss(outputs, targets[index][chosen].to(outputs.device, outputs.dtype)).sum() / n
            total += float(loss.detach())
            loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not (np.isfinite(total) and bool(torch.isfinite(norm))):
            optimiser.zero_grad(set_to_none=True)
            raise TrainingError(
                f"loss {total} or gradient norm {float(norm)} of the step scorer is not finite; no weight was changed. "
                "Lower the learning rate"
            )
        if grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        optimiser.step()
        return total

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Weights of model and head."""
        model = {f"model.{n}": p.detach().clone() for n, p in self.policy.model.named_parameters()}
        return model | {f"head.{n}": p.detach().clone() for n, p in self.head.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over weights.

        Raises:
            CheckpointError: they belong to another architecture.
        """
        own = {f"model.{n}": p for n, p in self.policy.model.named_parameters()}
        own |= {f"head.{n}": p for n, p in self.head.named_parameters()}
        odd = sorted(own.keys() ^ state.keys())
        odd += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
        if odd:
            raise CheckpointError(f"{len(odd)} saved tensors do not fit the step scorer, first {odd[0]!r}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    # What the heads differ in -----------------------------------------------------------------------------------------

    def _outputs(self, states: Tensor) -> Tensor:
        dtype = next(self.head.parameters()).dtype
        return self.head(states.to(dtype))

    def _score(self, outputs: Tensor) -> Tensor:
        raise NotImplementedError

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_targets(self, targets: Tensor) -> None:
        bad = ~((targets >= 0) & (targets <= 1))
        if bool(bad.any()):
            raise DataError(f"labels must be between 0 and 1, got {float(targets[bad][0])}")

    def _split(self, places: Sequence[Places]) -> list[Tensor]:
        return list(torch.split(self.read(places), [len(p.at) for p in places])) if places else []


class StepClassifier(StepHead):
    """Is the step right? Two classes, cross entropy on hard or soft labels.

    Args:
        output: ``"probability"``: the softmax of the class "right", in (0, 1); ``"signed"``: that of "right" minus that
            of "wrong", in (-1, 1), as PURE has it.
        loss: ``"ce"`` (cross entropy, with a soft label as the target's probability) or ``"mse"`` (squared error of the
            probability of "right").
        model, tokenizer, settings: of :class:`StepHead`.

    Source: Lightman et al. 2023 (PRM800K); head and reading as in Zhang et al. 2025 (arXiv 2501.07301) and Cheng et al.
    2025 (arXiv 2504.15275).
    """

    outputs = 2

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        output: Literal["probability", "signed"] = "probability",
        loss: Literal["ce", "mse"] = "ce",
        **settings: Any,
    ) -> None:
        if output not in ("probability", "signed"):
            raise ConfigError(f"output must be 'probability' or 'signed', got {output!r}")
        if loss not in ("ce", "mse"):
            raise ConfigError(f"loss must be 'ce' or 'mse', got {loss!r}")
        super().__init__(model, tokenizer, **settings)
        self.output, self.loss = output, loss

    def _score(self, outputs: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        return p[:, 1] if self.output == "probability" else p[:, 1] - p[:, 0]

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logp = outputs.log_softmax(-1)
        if self.loss == "ce":
            return -(targets * logp[:, 1] + (1 - targets) * logp[:, 0])
        return (logp[:, 1].exp() - targets) ** 2


class StepValue(StepHead):
    """What is the prefix worth? One number, trained on shares of successful continuations (or on outcomes).

    Args:
        loss: ``"ce"``: a logistic output in (0, 1) and cross entropy with the soft label; ``"mse"``: an unbounded
            output and squared error. Scores are never clipped.
        model, tokenizer, settings: of :class:`StepHead`.

    Source: soft-label cross entropy as in Setlur et al. 2024 (arXiv 2410.08146) and Luo et al. 2024 (arXiv 2406.06592);
    squared error as in Yu et al. 2023 (arXiv 2311.09724).
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, loss: Literal["ce", "mse"] = "ce", **settings: Any
    ) -> None:
        if loss not in ("ce", "mse"):
            raise ConfigError(f"loss must be 'ce' or 'mse', got {loss!r}")
        super().__init__(model, tokenizer, **settings)
        self.loss = loss

    def _score(self, outputs: Tensor) -> Tensor:
        value = outputs.squeeze(-1)
        return value.sigmoid() if self.loss == "ce" else value

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        value = outputs.squeeze(-1)
        if self.loss == "ce":
            return F.binary_cross_entropy_with_logits(value, targets, reduction="none")
        return (value - targets) ** 2

    def _check_targets(self, targets: Tensor) -> None:
        if self.loss == "ce":
            super()._check_targets(targets)
        elif not bool(torch.isfinite(targets).all()):
            raise DataError("targets must be finite; NaN stands for a place without target")
