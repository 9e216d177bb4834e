"""One run on several processes: each samples and learns its share, and all take the same step.

Every process draws the same tasks, holds the same policy and computes the same streams. What is divided is what costs:
sampling (by task) and the forward and backward passes (by group, balanced by tokens). Gradients are added up before
clipping, and loss terms are normalised over the whole minibatch beforehand, so a run on many processes learns what the
same run on one learns, up to rounding. Rewards and callbacks run in the first process alone, because they may have
state, cost money, or write files; their results are sent to the others.

The processes are started from outside, by ``torchrun`` or ``accelerate launch``; without them there is one.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from guerdon.errors import ConfigError, GuerdonError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from guerdon.training.config import DistributedConfig

__all__ = ["ALONE", "ProcessWorld", "World", "make_world", "shares"]

T = TypeVar("T")


class World:
    """The processes of a run; this class is one process alone, for which all of it is trivial.

    Attributes:
        rank, size: number of this process, and of how many.
        main: whether this one scores, writes and reports.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that scores, writes and reports."""
        return self.rank == 0

    def each(self, items: Sequence[Any], work: Callable[[list[Any]], list[T]]) -> list[T]:
        """Apply ``work`` to this process's share of ``items``; all processes get all results, in order."""
        return work(list(items))

    def once(self, work: Callable[[], T]) -> T:
        """Let the first process do it; all processes get the result, or the error."""
        return work()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block with an error in every process as soon as one of them has one."""
        yield

    def share(self, chosen: np.ndarray, group: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """This process's part of the trajectories ``chosen``; see :func:`shares`."""
        return chosen

    def add(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        return tensor

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum each gradient over the processes; one that no process has stays away."""

    def add_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Sum named numbers over the processes; a name need not be known to all."""
        return dict(numbers)

    def join(self, tensor: Tensor) -> Tensor:
        """Concatenate the processes' tensors ``[n]`` of any lengths."""
        return tensor

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return number

    def wait(self) -> None:
        """Go on when all processes have come here."""

    def close(self) -> None:
        """Leave the group. Idempotent."""


ALONE = World()
"""One process."""


class ProcessWorld(World):
    """The group that ``torchrun`` or ``accelerate launch`` has started, joined through accelerate.

    On a CPU the processes talk by gloo, on GPUs by NCCL; small objects always go by gloo.
    """

    def __init__(self) -> None:
        import torch
        from accelerate import PartialState
        from torch import distributed

        self._owns = not distributed.is_initialized()
        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.size = state.process_index, state.num_processes
        self.device = state.device
        self._all = distributed
        # Tensors on GPUs and pickled objects need groups of different kinds.
        self._objects = distributed.new_group(backend="gloo") if distributed.get_backend() != "gloo" else None
        self._open = True

    def each(self, items: Sequence[Any], work: Callable[[list[Any]], list[T]]) -> list[T]:
        numbers = list(range(self.rank, len(items), self.size))
        with self.together():
            mine = list(zip(numbers, work([items[k] for k in numbers]) if numbers else [], strict=True))
        found = dict(pair for part in self._gather(mine) for pair in part)
        return [found[k] for k in range(len(items))]

    def once(self, work: Callable[[], T]) -> T:
        result: list[Any] = [None]
        error: BaseException | None = None
        if self.main:
            try:
                result = [(True, work())]
            except Exception as raised:  # noqa: BLE001 - the others wait for a word, whatever went wrong
                error, result = raised, [(False, _portable(raised))]
        self._all.broadcast_object_list(result, src=0, group=self._objects)
        done, value = result[0]
        if error is not None:
            raise error
        if not done:
            raise value
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # noqa: BLE001 - raised again below, once all know
            error = raised
        states = self._gather(None if error is None else _portable(error))
        if error is not None:
            raise error
        for rank, other in enumerate(states):
            if other is not None:
                raise TrainingError(f"process {rank} of {self.size} failed: {other}") from other

    def share(self, chosen: np.ndarray, group: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return shares(chosen, group, tokens, self.size)[self.rank]

    def add(self, tensor: Tensor) -> Tensor:
        self._all.all_reduce(tensor)
        return tensor

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        import torch

        if not parameters:
            return
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self.device)
        self._all.all_reduce(there, op=self._all.ReduceOp.MAX)
        for parameter, anywhere in zip(parameters, there.tolist(), strict=True):
            if not anywhere:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(
            [p.grad for p, anywhere in zip(parameters, there.tolist(), strict=True) if anywhere and p.grad is not None]
        ):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            self._all.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def add_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        total: dict[str, float] = {}
        for part in self._gather(dict(numbers)):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def join(self, tensor: Tensor) -> Tensor:
        import torch

        return torch.cat(self._gather(tensor.cpu()))

    def most(self, number: int) -> int:
        return max(self._gather(number))

    def wait(self) -> None:
        self._all.barrier(group=self._objects)

    def close(self) -> None:
        if self._open and self._owns:
            self._all.destroy_process_group()
        self._open = False

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._all.all_gather_object(values, value, group=self._objects)
        return values


def make_world(config: DistributedConfig) -> World:
    """The processes that this one was started with.

    Raises:
        ConfigError: the settings ask for something that several processes cannot have.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        if config.strategy == "shard":
            raise ConfigError(
                "distributed.strategy='shard' divides the weights among processes, and there is one; "
                "start with torchrun or accelerate launch, or choose 'replicate'"
            )
        return ALONE
    if config.samplers or config.reward_workers:
        raise ConfigError(
            "distributed.samplers and reward_workers are Ray's and have one trainer; start a single process, "
            "or set both to 0"
        )
    return ProcessWorld()


def shares(chosen: np.ndarray, group: np.ndarray, tokens: np.ndarray, size: int) -> list[np.ndarray]:
    """Divide trajectories among processes: whole groups, so that prompts stay shared, balanced by tokens.

    Args:
        chosen: [n] numbers of trajectories.
        group, tokens: [B] group and size of every trajectory.
        size: processes.

    Returns:
        for each process its part of ``chosen``, in order. The same in every process. Groups are cut where there are
        fewer of them than processes.
    """
    key = group[chosen] if len(np.unique(group[chosen])) >= size else np.arange(len(chosen))
    _, units = np.unique(key, return_inverse=True)
    weight = np.bincount(units, weights=tokens[chosen].astype(np.float64))
    load = np.zeros(size)
    owner = np.zeros(len(weight), dtype=np.int64)
    for unit in np.argsort(-weight, kind="stable"):
        owner[unit] = int(np.argmin(load))
        load[owner[unit]] += weight[unit]
    return [chosen[owner[units] == rank] for rank in range(size)]


def _buckets(gradients: Sequence[Tensor], limit: int = 1 << 24) -> Iterator[list[Tensor]]:
    """Gradients of one type and device in bundles of about ``limit`` entries: few messages, little extra memory."""
    bundle: list[Tensor] = []
    for gradient in gradients:
        full = sum(g.numel() for g in bundle) + gradient.numel() > limit
        if bundle and (full or bundle[0].dtype != gradient.dtype):
            yield bundle
            bundle = []
        bundle.append(gradient)
    if bundle:
        yield bundle


def _portable(error: Exception) -> Exception:
    """The error itself where another process can read it, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - exceptions of strangers need not survive pickling
        return GuerdonError(f"{type(error).__name__}: {error}")
    return error
