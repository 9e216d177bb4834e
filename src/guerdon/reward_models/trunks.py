"""What a scalar reward model reads a prompt and its response with: a language model's trunk, a GRU, or given features.

An item is a :class:`~guerdon.types.Trajectory`, or a pair ``(prompt, response)``: the prompt text, chat messages or
token ids, the response text or token ids. A trunk ``prepare``s items once, and maps prepared items to ``[B, width]``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from guerdon.errors import ConfigError, DataError
from guerdon.types import Trajectory, response_ids, response_text

__all__ = ["EncoderFeatures", "FeatureTrunk", "GruTrunk", "Item", "PolicyTrunk", "Trunk"]

Item = Trajectory | tuple[Any, Any]


class Trunk(nn.Module):
    """Base of trunks.

    Attributes:
        width: of the states.
        kind: under which :meth:`save` files it.
    """

    width: int
    kind: str

    def prepare(self, items: Sequence[Any]) -> list[Any]:
        """Read items once; what comes back is what ``forward`` takes."""
        raise NotImplementedError

    def size(self, prepared: Any) -> int:
        """Positions that a prepared item takes in a batch."""
        return 1

    def forward(self, prepared: Sequence[Any]) -> Tensor:
        """``[B, width]`` states, in order; gradients flow."""
        raise NotImplementedError

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the weights into ``folder``; returns what :func:`load_trunk` needs besides."""
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "trunk.safetensors")
        return {"kind": self.kind}


class _TokenTrunk(Trunk):
    """Base: items as token ids, prompt and response in one row, read at the response's last token."""

    def __init__(self, policy: Any, by: Literal["tokens", "text"]) -> None:
        super().__init__()
        if by not in ("tokens", "text"):
            raise ConfigError(f"by must be 'tokens' or 'text', got {by!r}")
        self.by = by
        # Not a module: its weights are registered by whoever uses them.
        self._policy = [policy]

    @property
    def policy(self) -> Any:
        """Whose tokenizer (and, for :class:`PolicyTrunk`, model) reads."""
        return self._policy[0]

    def prepare(self, items: Sequence[Item]) -> list[tuple[int, ...]]:
        """Token ids of prompt and response of each item.

        Raises:
            DataError: an empty response (there is no last token to read), no prompt, more tokens than the context
                holds, or, with ``by="tokens"``, ids of another tokenizer.
        """
        from guerdon.reward_models.implicit import check_tokenizer

        trajectories = [self._read(item) for item in items]
        if self.by == "tokens":
            check_tokenizer(self.policy, trajectories)
        return [self._ids(t) for t in trajectories]

    def _read(self, item: Item) -> Trajectory:
        from guerdon.reward_models.text import text_trajectory

        if isinstance(item, Trajectory):
            if self.by == "tokens":
                return item
            return text_trajectory(self.policy, item.task.prompt, response_text(item), id=item.task.id)
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"an item is a trajectory or a pair (prompt, response), got {type(item).__name__}")
        return text_trajectory(self.policy, *item)

    def _ids(self, item: Trajectory) -> tuple[int, ...]:
        if any(turn.text and not turn.token_ids for turn in item.turns):
            raise DataError(f"a turn of task {item.task.id!r} carries no token ids; read its text with by='text'")
        response = response_ids(item)
        if not response:
            raise DataError(f"the response to task {item.task.id!r} is empty: there is no last token to score it at")
        if not item.prompt_ids:
            raise DataError(
                f"the trajectory of task {item.task.id!r} carries no prompt ids; read its text with by='text'"
            )
        ids = (*item.prompt_ids, *response)
        if len(ids) > self.policy.max_context:
            raise DataError(
                f"prompt and response of task {item.task.id!r} have {len(ids)} tokens, more than the "
                f"{self.policy.max_context} that {self.policy.name!r} takes"
            )
        return ids

    def size(self, prepared: tuple[int, ...]) -> int:
        return len(prepared)


class PolicyTrunk(_TokenTrunk):
    """The last hidden state of a causal language model at the response's last token.

    Args:
        policy: its weights are copied, so that training the reward model leaves the policy alone.
        train: whether the trunk is trained with the head; False trains the head alone.
        by: ``"tokens"`` reads trajectories by the ids that were sampled (the tokenizer must be the policy's own), ``"text"``
            tokenises their text anew.
        shared: take the weights themselves instead of a copy.
    """

    kind = "policy"

    def __init__(
        self, policy: Any, *, train: bool = True, by: Literal["tokens", "text"] = "tokens", shared: bool = False
    ) -> None:
        from guerdon.policies.logprobs import trunk_and_head

        own = policy
        if not shared:
            own = copy.copy(policy)
            own.model = policy.merged().model if policy.adapted else copy.deepcopy(policy.model)
            own.value_head = None
        super().__init__(own, by)
        self.model = trunk_and_head(own.model)[0]
        self.width = int(own.model.config.get_text_config().hidden_size)
        if not shared:
            self.model.requires_grad_(train)

    def forward(self, prepared: Sequence[tuple[int, ...]]) -> Tensor:
        from guerdon.reward_models.reader import Places, read_states

        out: list[Tensor] = []
        index: list[Tensor] = []
        places = [Places(tuple(ids), (len(ids) - 1,)) for ids in prepared]
        # Batches are cut by whoever calls; one pass here.
        limit = max((len(ids) for ids in prepared), default=1) * max(1, len(prepared))
        for states, where in read_states(self.policy, places, max_tokens=limit):
            out.append(states)
            index.append(where)
        if not out:
            return torch.zeros(0, self.width, device=self.policy.device)
        return torch.cat(out)[torch.argsort(torch.cat(index)).to(out[0].device)]

    def save(self, folder: Path) -> dict[str, Any]:
        self.policy.save(folder / "policy")
        return {"kind": self.kind, "by": self.by}


class GruTrunk(_TokenTrunk):
    """A small GRU over token embeddings, from scratch; its state at the response's last token.

    Args:
        policy: whose tokenizer reads; nothing else of it is used.
        width: of embeddings and state.
        seed: of the weights.
        by: as for :class:`PolicyTrunk`.
    """

    kind = "gru"

    def __init__(
        self, policy: Any, *, width: int = 64, seed: int = 0, by: Literal["tokens", "text"] = "tokens"
    ) -> None:
        super().__init__(policy, by)
        if width < 1:
            raise ConfigError(f"width must be at least 1, got {width}")
        self.width = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(len(policy.tokenizer), width)
            self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, prepared: Sequence[tuple[int, ...]]) -> Tensor:
        if not prepared:
            return torch.zeros(0, self.width)
        lengths = torch.tensor([len(ids) for ids in prepared])
        ids = torch.zeros((len(prepared), int(lengths.max())), dtype=torch.long)
        for b, row in enumerate(prepared):
            ids[b, : len(row)] = torch.tensor(row)
        device = self.embed.weight.device
        # What lies behind the last token comes after it in time, so padding on the right changes nothing.
        states, _ = self.gru(self.embed(ids.to(device)))
        return states[torch.arange(len(prepared), device=device), (lengths - 1).to(device)]

    def save(self, folder: Path) -> dict[str, Any]:
        return {**super().save(folder), "width": self.width, "by": self.by}


class FeatureTrunk(Trunk):
    """Given features of each item, and a small network on them.

    Args:
        features: from a list of items to ``[B, inputs]`` numbers, for example a frozen sentence encoder's embeddings. Items
            may then be of any type.
        inputs: number of features.
        hidden: widths of the layers (ReLU between them); none is a linear model.
        seed: of the weights.
    """

    kind = "features"

    def __init__(
        self,
        features: Callable[[Sequence[Any]], Any],
        inputs: int,
        *,
        hidden: Sequence[int] = (64,),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if inputs < 1 or any(h < 1 for h in hidden):
            raise ConfigError(f"inputs and hidden must be at least 1, got {inputs} and {tuple(hidden)}")
        self.features, self.inputs, self.hidden = features, inputs, tuple(hidden)
        sizes = [inputs, *hidden]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for a, b in pairwise(sizes):
                layers += [nn.Linear(a, b), nn.ReLU()]
            self.layers = nn.Sequential(*layers)
        self.width = sizes[-1]

    def prepare(self, items: Sequence[Any]) -> list[np.ndarray]:
        rows = np.asarray(self.features(list(items)), dtype=np.float32) if len(items) else np.zeros((0, self.inputs))
        if rows.shape != (len(items), self.inputs):
            raise DataError(
                f"features returned shape {rows.shape} for {len(items)} items, ({len(items)}, {self.inputs}) is expected"
            )
        if not np.isfinite(rows).all():
            raise DataError(f"a feature of item {int(np.argwhere(~np.isfinite(rows))[0, 0])} is NaN or infinite")
        return list(rows)

    def forward(self, prepared: Sequence[np.ndarray]) -> Tensor:
        device = next((p.device for p in self.parameters()), None)
        if not len(prepared):
            return torch.zeros(0, self.width, device=device)
        return self.layers(torch.from_numpy(np.stack(prepared)).to(device))

    def save(self, folder: Path) -> dict[str, Any]:
        if self.hidden:
            super().save(folder)
        return {"kind": self.kind, "inputs": self.inputs, "hidden": list(self.hidden)}


class EncoderFeatures:
    """Features of an item from a frozen sentence encoder: the prompt's embedding, then the response's.

    Args:
        encoder: ``encode(texts) -> [n, width]``, for example :func:`guerdon.policies.load_encoder`'s.
        width: of its embeddings.

    Use it as ``FeatureTrunk(features, features.inputs)``.
    """

    def __init__(self, encoder: Any, width: int = 384) -> None:
        self.encoder, self.inputs = encoder, 2 * width

    def __call__(self, items: Sequence[Item]) -> np.ndarray:
        """``[B, 2 * width]``.

        Raises:
            DataError: an item is neither a trajectory nor a pair of texts, or its response is blank.
        """
        texts: list[str] = []
        for item in items:
            if isinstance(item, Trajectory):
                pair = ("\n".join(str(m.get("content", "")) for m in item.task.prompt), response_text(item))
            else:
                pair = item
            if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise DataError("an item is a trajectory or a pair of texts (prompt, response)")
            if not pair[1].strip():
                raise DataError("a response is blank: there is nothing to embed")
            texts += pair
        return np.asarray(self.encoder.encode(texts), dtype=np.float32).reshape(len(items), -1)


def load_trunk(folder: Path, meta: dict[str, Any], *, policy: Any = None, features: Any = None) -> Trunk:
    """Read a saved trunk; a GRU needs the ``policy`` whose tokenizer it reads with, features their function.

    Raises:
        ConfigError: what the trunk needs was not given.
    """
    from safetensors.torch import load_file

    if meta["kind"] == "policy":
        from guerdon.policies import Policy

        return PolicyTrunk(Policy.load(folder / "policy"), by=meta["by"], shared=True)
    trunk: Trunk
    if meta["kind"] == "gru":
        if policy is None:
            raise ConfigError("this reward model reads with a policy's tokenizer; give policy=")
        trunk = GruTrunk(policy, width=meta["width"], by=meta["by"])
    else:
        if features is None:
            raise ConfigError("this reward model reads given features; give features=, the function that makes them")
        trunk = FeatureTrunk(features, meta["inputs"], hidden=meta["hidden"])
    path = folder / "trunk.safetensors"
    if path.is_file():
        trunk.load_state_dict(load_file(path))
    return trunk


def batches(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of items of these sizes in batches of at most ``max_tokens`` positions, padding included, longest first."""
    out: list[list[int]] = []
    width = math.inf
    for k in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if not out or (len(out[-1]) + 1) * width > max_tokens:
            out.append([])
            width = sizes[k]
        out[-1].append(k)
    return out
