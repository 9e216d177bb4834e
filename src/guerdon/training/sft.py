"""Supervised fine-tuning on given responses: the warm start before reinforcement learning.

The loss is the mean negative log-probability of policy tokens; environment tokens are context only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from guerdon.errors import DataError
from guerdon.training.batching import Microbatch, attention_share, microbatches
from guerdon.training.callbacks import Callback
from guerdon.training.config import SftConfig
from guerdon.training.data import batch_indices, digest, steps_per_epoch
from guerdon.training.loop import Run
from guerdon.training.optimise import Optimiser, TrainingError
from guerdon.training.timing import Phases
from guerdon.training.weights import restore_policy, write_policy
from guerdon.types import Trajectory, action_mask, response_ids

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["Example", "SftTrainer", "examples"]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, a response, and which response tokens are learned.

    Args:
        prompt_ids: token ids of the rendered prompt (at least one).
        response_ids: token ids of the response, environment tokens included.
        mask: 1 where a token is learned, one entry per response token.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    mask: tuple[int, ...]


def examples(
    data: Iterable[Trajectory | Example | tuple[Sequence[int], Sequence[int], Sequence[int]]],
) -> list[Example]:
    """Bring trajectories and ``(prompt_ids, response_ids, mask)`` triples into one form.

    Raises:
        DataError: no data, a response without a learned token, an empty prompt, or a mask of another length.
    """
    out: list[Example] = []
    for k, item in enumerate(data):
        if isinstance(item, Trajectory):
            triple = (item.prompt_ids, tuple(response_ids(item)), tuple(action_mask(item)))
        elif isinstance(item, Example):
            triple = (item.prompt_ids, item.response_ids, item.mask)
        else:
            prompt, response, mask = item
            triple = (tuple(prompt), tuple(response), tuple(int(m) for m in mask))
        if len(triple[1]) != len(triple[2]):
            raise DataError(f"example {k}: the mask has {len(triple[2])} entries for {len(triple[1])} response tokens")
        if not triple[0]:
            raise DataError(f"example {k}: the prompt has no tokens; the first response token needs one before it")
        if not any(triple[2]):
            raise DataError(f"example {k}: no response token is to be learned (its mask is all 0)")
        out.append(Example(*triple))
    if not out:
        raise DataError("there is nothing to train on: the data is empty")
    return out


class SftTrainer(Run):
    """Trains a policy to say given responses.

    Args:
        policy: a loaded policy; trained in place.
        data: trajectories or ``(prompt_ids, response_ids, mask)`` triples.
        config: settings.
        callbacks: see :mod:`guerdon.training.callbacks`.
        out: run folder for checkpoints and ``metrics.jsonl``; a second start with the same folder resumes.

    Raises:
        DataError: the data is empty or malformed, or an example exceeds the policy's context.
    """

    def __init__(
        self,
        policy: Policy,
        data: Iterable[Trajectory | Example | tuple[Sequence[int], Sequence[int], Sequence[int]]],
        config: SftConfig,
        *,
        callbacks: Sequence[Callback] = (),
        out: str | Path | None = None,
    ) -> None:
        self.policy = policy
        self._examples = examples(data)
        for k, example in enumerate(self._examples):
            length = len(example.prompt_ids) + len(example.response_ids)
            if length > policy.max_context:
                raise DataError(f"example {k} has {length} tokens, the policy's context holds {policy.max_context}")
        self._settings = config
        self._attention = attention_share(policy)
        epoch = steps_per_epoch(len(self._examples), config.batch_size, drop_last=False)
        self._optimiser = Optimiser({"policy": policy.trainable_parameters()}, config.optimiser)
        self._prompts: dict[tuple[int, ...], int] = {}
        for example in self._examples:
            self._prompts.setdefault(example.prompt_ids, len(self._prompts))
        super().__init__(
            config,
            total=config.steps or epoch * (config.epochs or 1),
            out=out,
            callbacks=callbacks,
            identity={
                "data": digest(
                    np.array((*e.prompt_ids, -1, *e.response_ids, -1, *e.mask), dtype=np.int64).tobytes()
                    for e in self._examples
                )
            },
            save_every=config.save_every,
            keep_last=config.keep_last,
        )

    def train_step(self) -> tuple[dict[str, Any], Any]:
        config = self._settings
        where = f"step {self.step + 1}"
        phases = Phases(self.policy.device)
        chosen = batch_indices(len(self._examples), config.batch_size, self.step, seed=config.seed, drop_last=False)
        batch = [self._examples[i] for i in chosen]
        with phases("batching"):
            mask = np.concatenate([np.asarray(e.mask, dtype=bool) for e in batch])
            parts = microbatches(
                [(e.prompt_ids, e.response_ids) for e in batch],
                mask,
                groups=[self._prompts[e.prompt_ids] for e in batch],
                max_tokens=config.max_tokens_per_microbatch,
                share_prompt=config.share_prompt,
                device=self.policy.device,
                attention=self._attention,
            )
        tokens = int(mask.sum())
        self.policy.model.train()
        self._optimiser.zero_grad()
        total = 0.0
        for part in parts:
            total += self._backward(part, tokens, where, phases)
        with phases("optimiser"):
            scale = config.optimiser.scale(self.step, self.total)
            norms = self._optimiser.step(scale, where=where)
        row = {
            "loss": total,
            "lr": config.optimiser.lr * scale,
            "grad_norm": norms["policy"],
            "tokens": tokens,
            "epoch": self.step / steps_per_epoch(len(self._examples), config.batch_size, drop_last=False),
            **phases.row(tokens={"forward": tokens, "backward": tokens}),
        }
        return row, None

    def _backward(self, part: Microbatch, tokens: int, where: str, phases: Phases) -> float:
        from guerdon.policies import token_logprobs

        with phases("forward"):
            logprobs = token_logprobs(self.policy, part.batch).logprobs
            loss = -logprobs.sum() / tokens
        value = float(loss.detach())
        if not np.isfinite(value):
            raise TrainingError(
                f"{where}: the loss is {value}; no weight was changed and no checkpoint was written. "
                "Lower the learning rate, or look for tokens that the policy gives no probability"
            )
        with phases("backward"):
            loss.backward()
        return value

    def write(self, folder: Path) -> dict[str, Any]:
        write_policy(self.policy, folder / "policy")
        return {"optimiser": self._optimiser.state_dict(), "torch": torch.get_rng_state()}

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        restore_policy(self.policy, folder / "policy")
        self._optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["torch"])
