"""The update: forward passes for what the streams need, then minibatches of optimiser steps over the streams.

Nothing here knows how trajectories were sampled or scored, nor which algorithm made the streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from guerdon.training.batching import Microbatch, attention_share, microbatches
from guerdon.training.config import OnlineConfig
from guerdon.training.distributed import ALONE, World
from guerdon.training.losses import Objective, Slice, policy_terms, value_term
from guerdon.training.optimise import Optimiser, TrainingError, require_finite
from guerdon.training.recompute import recomputing
from guerdon.training.streams import Experience, Streams, normalise
from guerdon.training.timing import Phases
from guerdon.training.weights import restore_policy, write_policy

if TYPE_CHECKING:
    from guerdon.policies import Policy
    from guerdon.training.sharded import ShardedPolicy

__all__ = ["Learner"]


class Learner:
    """Holds what is trained, and moves it by streams.

    Args:
        policy: trained in place.
        config: settings of the update.
        critic: the policy itself (its value head shares the trunk), another policy with a value head, or None.
        reference: policy that the KL is measured to, or None.
        objective: in place of the configuration's.
        world: the processes that share the work.
    """

    def __init__(
        self,
        policy: Policy,
        config: OnlineConfig,
        *,
        critic: Policy | None = None,
        reference: Policy | None = None,
        objective: Any = None,
        world: World = ALONE,
    ) -> None:
        self.policy = policy
        self._world = world
        self._sharded: ShardedPolicy | None = None
        if config.distributed.strategy == "shard" and world.size > 1:
            from guerdon.training.sharded import ShardedPolicy

            self._sharded = ShardedPolicy(policy)
        trained = policy if self._sharded is None else self._sharded.twin
        self.critic = critic
        self.reference = reference
        self._config = config
        self._shared = critic is policy
        self.objective = Objective.of(config, objective)
        self._attention = attention_share(policy)
        sets = {"policy": trained.trainable_parameters()}
        if self._shared:
            head = list(trained.value_head.parameters())
            sets = {"policy": [p for p in sets["policy"] if all(p is not h for h in head)], "critic": head}
        elif critic is not None:
            sets["critic"] = critic.trainable_parameters()
        # Those of sharded weights are added up by the backward pass itself.
        replicated = [name for name in sets if self._sharded is None or (name == "critic" and not self._shared)]
        self._replicated = [p for name in replicated for p in sets[name]]
        lr = config.optimiser.critic_lr or config.optimiser.lr
        self.optimiser = Optimiser(sets, config.optimiser, {"critic": lr})
        self._current = False

    # Before the update ------------------------------------------------------------------------------------------------

    def prepare(self, experience: Experience, phases: Phases) -> dict[str, float]:
        """Fill in the old log-probabilities, the reference's and the values, as far as the settings need them.

        Returns:
            How far the trainer's log-probabilities are from the sampler's, where they were computed here.
        """
        self._current = self._config.old_logprobs == "recomputed" and self._once(experience)
        recomputed = self._config.old_logprobs == "recomputed" and not self._current
        needed = recomputed or self.critic is not None or self.reference is not None
        need = experience.credit if self.critic is not None else experience.action
        mismatch: dict[str, float] = {}
        parts: list[Microbatch] = []
        kept = np.flatnonzero(experience.kept)
        if needed and len(kept):
            with phases("batching"):
                parts = self._microbatches(experience, self._mine(experience, kept), need)
        if recomputed or self._shared:
            logprobs, values = self._forward(self.policy, parts, len(need), phases, values=self._shared)
            action = torch.from_numpy(experience.action)
            mismatch = _mismatch(logprobs[action] - experience.sampled[action])
            experience.values = values
            if recomputed:
                experience.old = logprobs
        if self.critic is not None and not self._shared:
            experience.values = self._forward(self.critic, parts, len(need), phases, values=True)[1]
        if self.reference is not None:
            experience.reference = self._forward(self.reference, parts, len(need), phases)[0]
        if experience.old is None:
            experience.old = experience.sampled
        return mismatch

    def _once(self, experience: Experience) -> bool:
        """Whether the old log-probabilities are those of the one forward pass that learns: no extra pass is needed then."""
        config = self._config
        whole = config.minibatch_size is None or config.minibatch_size >= len(experience)
        penalised = self.reference is not None and config.kl_in == "reward"
        return config.epochs == 1 and whole and config.importance_cap is None and not penalised

    @torch.no_grad()
    def _forward(
        self, policy: Policy, parts: Sequence[Microbatch], n: int, phases: Phases, *, values: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and values of the needed tokens, laid out flat; 0 elsewhere."""
        policy.model.eval()
        logprobs_N = torch.zeros(n)
        values_N = torch.zeros(n) if values else None
        with phases("prepare"), self._world.together():
            for part in self._passes(policy, parts):
                out = self._scored(policy, part.batch, temperature=self._config.temperature, values=values)
                logprobs_N[part.flat] = out.logprobs.float().cpu()
                if values_N is not None:
                    values_N[part.flat] = out.values.float().cpu()
        for found in (logprobs_N, values_N):
            if found is not None and self._world.size > 1:
                # Each token was computed by one process and is 0 in the others.
                found.copy_(self._world.add(found.to(policy.device)))
        return logprobs_N, values_N

    def _mine(self, experience: Experience, chosen: np.ndarray) -> np.ndarray:
        """This process's share of the chosen trajectories."""
        return self._world.share(chosen, experience.group, np.diff(experience.offsets))

    def _scored(self, policy: Policy, batch: Any, **options: Any) -> Any:
        """Log-probabilities of a batch under the policy that is trained, or another."""
        from guerdon.policies import token_logprobs

        if self._sharded is not None and policy is self.policy:
            return self._sharded(batch, **options)
        return token_logprobs(policy, batch, **options)

    def _passes(self, policy: Policy, parts: Sequence[Microbatch], *, learning: bool = False) -> Iterator[Microbatch]:
        """The micro-batches of this process; with sharded weights, then as many idle passes as others need more."""
        if self._sharded is None or policy is not self.policy:
            yield from parts
            return
        most = self._world.most(len(parts))
        yield from parts
        for _ in range(most - len(parts)):
            self._sharded.idle(learning=learning)

    def _microbatches(self, experience: Experience, chosen: np.ndarray, need: np.ndarray) -> list[Microbatch]:
        """Micro-batches of the chosen trajectories, with indices into the step's flat layout."""
        if not len(chosen):
            return []
        items = experience.items
        index = np.concatenate([np.arange(experience.offsets[b], experience.offsets[b + 1]) for b in chosen])
        parts = microbatches(
            [items[b] for b in chosen],
            need[index],
            groups=experience.group[chosen].tolist(),
            max_tokens=self._config.max_tokens_per_microbatch,
            # A shared prompt's attention is laid out for one pass, and a recomputed layer is passed twice.
            share_prompt=self._config.share_prompt and not self._config.gradient_checkpointing,
            device=self.policy.device,
            attention=self._attention,
        )
        whole = torch.from_numpy(index)
        return [replace(part, flat=whole[part.flat]) for part in parts]

    # The update -------------------------------------------------------------------------------------------------------

    def update(
        self,
        experience: Experience,
        streams: Streams,
        mismatch: dict[str, float],
        *,
        step: int,
        total: int,
        phases: Phases,
    ) -> dict[str, Any]:
        """Take the optimiser steps of one batch of trajectories.

        Args:
            experience, streams: of the batch; see :mod:`guerdon.training.streams`.
            mismatch: what :meth:`prepare` returned; measured in the first minibatch if empty.
            step, total: position in the run, for schedules, shuffling and messages.
            phases: where the seconds go.

        Returns:
            Metrics: losses, KL, clip fraction, gradient norms, mismatch, learning rate.

        Raises:
            TrainingError: a stream, loss or gradient is not finite; the weights are as before the
                minibatch that the message names.
        """
        config = self._config
        check_streams(streams, experience, where=f"step {step + 1}")
        sums: dict[str, float] = {}
        norms: dict[str, list[float]] = {}
        steps = skipped = tokens = 0
        scale = config.optimiser.scale(step, total)
        entropy_coef = config.entropy_at(step)
        self.policy.model.eval()
        for epoch in range(config.epochs):
            for k, chosen in enumerate(self._minibatches(experience, step, epoch)):
                where = f"step {step + 1}, epoch {epoch + 1}, minibatch {k + 1}"
                with phases("batching"):
                    terms = self._weights(experience, streams, chosen, entropy_coef)
                    compute = chosen[experience.kept[chosen] & ~streams.skip[chosen]]
                    need = torch.stack(list(terms.values())).ne(0).any(0).numpy()
                    # Decided on what all processes know, so that all go on or none does.
                    if not need[np.isin(experience.trajectory, compute)].any():
                        skipped += 1
                        continue
                    parts = self._microbatches(experience, self._mine(experience, compute), need)
                self.optimiser.zero_grad()
                trained = self.policy if self._sharded is None else self._sharded.twin
                with recomputing(trained.model, config.gradient_checkpointing), self._world.together():
                    differences = [
                        self._backward(part, experience, streams, terms, entropy_coef, sums, where, phases)
                        for part in self._passes(self.policy, parts, learning=True)
                    ]
                if not mismatch and steps == 0:
                    # Before the first optimiser step the trainer's weights are the sampler's.
                    mismatch = _mismatch(self._world.join(torch.cat([torch.zeros(0), *differences])))
                with phases("exchange"):
                    self._world.add_gradients(self._replicated)
                with phases("optimiser"):
                    for name, norm in self.optimiser.step(scale, where=where).items():
                        norms.setdefault(name, []).append(norm)
                steps += 1
                tokens += sum(len(part.flat) for part in parts)
        totals = self._world.add_numbers({**sums, "n/learned": tokens})
        tokens = int(totals.pop("n/learned"))
        sums = totals
        row: dict[str, Any] = {key: value / max(steps, 1) for key, value in sums.items() if not key.startswith("n/")}
        counted = max(sums.get("n/tokens", 0.0), 1.0)
        row["clip_fraction"] = sums.get("n/clipped", 0.0) / counted
        row["kl_old"] = sums.get("n/kl_old", 0.0) / counted
        row |= {f"grad_norm/{name}": float(np.mean(values)) for name, values in norms.items()}
        row |= {f"mismatch/{name}": value for name, value in mismatch.items()}
        row |= {
            "lr": config.optimiser.lr * scale,
            "entropy_coef": entropy_coef,
            "update/steps": steps,
            "update/skipped": skipped,
            "update/tokens": tokens,
        }
        return row

    def _minibatches(self, experience: Experience, step: int, epoch: int) -> list[np.ndarray]:
        """Trajectories of each optimiser step of one pass: groups stay together, their order is shuffled."""
        rows = np.arange(len(experience))
        if experience.excluded is not None:
            rows = rows[~experience.excluded]
        n = len(rows)
        size = self._config.minibatch_size or n
        if size >= n:
            return [rows]
        generator = np.random.default_rng([self._config.seed & 0xFFFFFFFF, step, epoch])
        rank = generator.permutation(int(experience.group.max()) + 1)
        order = rows[np.lexsort((generator.random(n), rank[experience.group[rows]]))]
        return [order[start : start + size] for start in range(0, n, size)]

    def _weights(
        self, experience: Experience, streams: Streams, chosen: np.ndarray, entropy_coef: float
    ) -> dict[str, Tensor]:
        """Token weights of each active term, normalised over the minibatch; 0 outside it.

        A skipped trajectory is left out of the entropy, KL and value terms and their counts. In the policy
        term its gradient is zero anyway, so it is only counted.
        """
        config = self._config
        inside = np.zeros(len(experience), dtype=bool)
        inside[chosen] = True
        owner = torch.from_numpy(experience.trajectory)
        member = torch.from_numpy(inside)[owner]
        computed = torch.from_numpy(inside & ~streams.skip)[owner]

        def weights(stream: Tensor, where: Tensor) -> Tensor:
            return normalise(stream * where, owner, config.aggregation, config.aggregation_length)

        terms = {"policy": weights(streams.policy, member) * computed}
        if entropy_coef > 0:
            terms["entropy"] = weights(streams.entropy, computed)
        if self.reference is not None and config.kl_in == "loss":
            terms["kl"] = weights(streams.kl, computed)
        if streams.value is not None:
            terms["value"] = weights(streams.value, computed)
        return terms

    def _backward(
        self,
        part: Microbatch,
        experience: Experience,
        streams: Streams,
        terms: Mapping[str, Tensor],
        entropy_coef: float,
        sums: dict[str, float],
        where: str,
        phases: Phases,
    ) -> Tensor:
        """Add one micro-batch's gradient; return trainer minus sampler log-probabilities of its action tokens."""
        config = self._config
        device = self.policy.device
        flat = part.flat

        def at(stream: Tensor) -> Tensor:
            return stream[flat].to(device)

        def maybe(stream: Tensor | None, wanted: bool = True) -> Tensor | None:
            return at(stream) if wanted and stream is not None else None

        assert experience.old is not None
        cut = Slice(
            old=at(experience.old),
            advantage=at(streams.advantage),
            sampled=at(experience.sampled),
            policy=at(terms["policy"]),
            entropy=maybe(terms.get("entropy")),
            kl=maybe(terms.get("kl")),
            value=maybe(terms.get("value")),
            reference=maybe(experience.reference, "kl" in terms or "reference_logprobs" in self.objective.reads),
            sequence=maybe(torch.from_numpy(experience.trajectory), "sequence_ids" in self.objective.reads),
            target=maybe(streams.target),
            values=maybe(experience.values),
        )
        with phases("forward"):
            out = self._scored(
                self.policy,
                part.batch,
                temperature=config.temperature,
                entropy="entropy" in terms,
                values=self._shared,
            )
            if self._current:
                cut = replace(cut, old=out.logprobs.detach().float())
            loss, stats = policy_terms(out.logprobs.float(), out.entropy, cut, config, entropy_coef, self.objective)
            values = out.values
            if self.critic is not None and not self._shared:
                values = self._scored(self.critic, part.batch, values=True).values
            if cut.value is not None and values is not None:
                value_loss = value_term(values.float(), cut, config)
                stats["loss/value"] = value_loss.detach()
                # A separate critic has no weights in common with the policy, so one sum serves both.
                loss = loss + config.value_coef * value_loss if self._shared else loss + value_loss
            stats["loss"] = loss.detach()
            numbers = dict(zip(stats, torch.stack([s.float() for s in stats.values()]).tolist(), strict=True))
        bad = [name for name, value in numbers.items() if not np.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{where}: {', '.join(bad)} is not finite; this minibatch changed no weight. "
                "Lower the learning rate or look at the step's rewards and log-probabilities"
            )
        for name, value in numbers.items():
            sums[name] = sums.get(name, 0.0) + value
        with phases("backward"):
            loss.backward()
        learned = cut.policy != 0
        return (out.logprobs.detach().float() - cut.sampled)[learned].cpu()

    # State ------------------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Bring the policy that samples up to date with the one that learned; every process must call it."""
        if self._sharded is not None:
            self._sharded.publish()

    def gather(self) -> None:
        """Make what :meth:`write` writes whole; every process must call it before one of them writes."""
        if self._sharded is not None:
            self._state = self.optimiser.state_dict()

    def write(self, folder: Path) -> dict[str, Any]:
        """Weights into ``folder``; returns the optimiser's state."""
        write_policy(self.policy, folder / "policy")
        if self.critic is not None and not self._shared:
            write_policy(self.critic, folder / "critic")
        return {"optimiser": self.optimiser.state_dict() if self._sharded is None else self._state}

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`write` wrote."""
        restore_policy(self.policy, folder / "policy")
        if self._sharded is not None:
            self._sharded.adopt()
        if self.critic is not None and not self._shared:
            restore_policy(self.critic, folder / "critic")
        self.optimiser.load_state_dict(state["optimiser"])


def check_streams(streams: Streams, experience: Experience, *, where: str) -> None:
    """Refuse to learn from a stream that is not finite, by name, before any weight moves.

    Raises:
        TrainingError: names the first such stream.
    """
    action = torch.from_numpy(experience.action)
    named = {
        "sampling log-probability": experience.sampled,
        "old log-probability": experience.old,
        "reference log-probability": experience.reference,
        "value": experience.values,
        "advantage": streams.advantage,
        "value target": streams.target,
        "policy weight": streams.policy,
        "entropy weight": streams.entropy,
        "KL weight": streams.kl,
    }
    for what, stream in named.items():
        if stream is not None:
            require_finite(stream[action], where=where, what=f"the {what} stream", advice="no weight was changed")


def _mismatch(difference: Tensor) -> dict[str, float]:
    """Absolute difference between trainer and sampler log-probabilities: mean and largest."""
    if not len(difference):
        return {}
    size = difference.abs()
    return {"mean": float(size.mean()), "max": float(size.max())}
