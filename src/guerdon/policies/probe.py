"""What a model's architecture allows, found out by trying it once on a few tokens.

Architectures scale, cap and mask in ways that no list keeps up with. So instead of trusting attributes, the
fast paths of :mod:`guerdon.policies.logprobs` are compared with the model's own plain forward pass.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from guerdon.errors import EngineError

if TYPE_CHECKING:
    from guerdon.policies.direct import DirectTrunk
    from guerdon.policies.packing import TokenBatch

__all__ = ["check_direct", "check_head", "sharing"]

Sharing = Literal["tree", "mask"]
Run = Callable[[Any, "TokenBatch", Sharing], Tensor]

_direct: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
_checked: weakref.WeakSet[Any] = weakref.WeakSet()
_sharing: weakref.WeakKeyDictionary[Any, dict[str, Sharing]] = weakref.WeakKeyDictionary()

# Root mean square of the difference over that of the values. What is wrong by design differs by far more.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}


def check_head(base: Any, logits_of: Callable[[Tensor], Tensor], run: Callable[[Tensor], Tensor]) -> None:
    """Make sure, once per model, that trunk and head apart give the model's own logits.

    Args:
        base: the causal language model, adapters unwrapped.
        logits_of: hidden states to logits, as log-probabilities are computed.
        run: token ids ``[1, T]`` to hidden states.

    Raises:
        EngineError: they differ.
    """
    if base in _checked:
        return
    with _quietly(base) as device:
        ids = _tokens(base, 8, device)[None]
        ours = logits_of(run(ids)[0])
        theirs = base(input_ids=ids, use_cache=False).logits[0].float()
    if not _close(ours, theirs, next(base.parameters()).dtype):
        raise EngineError(
            f"{type(base).__name__} does something to its logits between head and softmax that is not supported; "
            "use another architecture"
        )
    _checked.add(base)


def sharing(base: Any, run: Run) -> Sharing:
    """How several responses to one prompt can share a row of this model: by blocks, or by a dense mask.

    Args:
        base: the causal language model, adapters unwrapped.
        run: model, batch and way to hidden states ``[R * T, hidden]``.

    Raises:
        EngineError: it cannot be done; each response needs a row of its own.
    """
    # Checkpointed layers run again in the backward pass, where only what was passed as an argument is at hand.
    recomputes = any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
    sdpa = getattr(base.config, "_attn_implementation", None) == "sdpa"
    state = f"{sdpa} {recomputes}"
    known = _sharing.setdefault(base, {})
    if state not in known:
        ways: tuple[Sharing, ...] = ("tree", "mask") if sdpa and not recomputes else ("mask",)
        works = next((way for way in ways if _same(base, run, way)), None)
        if works is None:
            raise EngineError(
                f"{type(base).__name__} cannot compute several responses to one prompt in one row; "
                "use share_prompt=False"
            )
        known[state] = works
    return known[state]


def check_direct(base: Any, trunk: DirectTrunk) -> bool:
    """Whether the trunk written out gives the model's own hidden states; tried once per model."""
    if base not in _direct:
        from guerdon.policies.direct import grouped_sdpa

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            one, two, three = (x.transpose(0, 1)[None] for x in (q, k, v))
            return grouped_sdpa(one, two, three, None, causal=True, scaling=trunk.scaling)[0].transpose(0, 1).flatten(1)

        with _quietly(base) as device:
            ids = _tokens(base, 24, device)
            ours = trunk(ids, torch.arange(len(ids), device=device), attend)
            theirs = base.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        _direct[base] = _close(ours, theirs, theirs.dtype)
    return _direct[base]


def _same(base: Any, run: Run, way: Sharing) -> bool:
    """Whether responses in one row come out as each in a row of its own. Long and short ones, so that a
    position taken from the place in the row, or a look at a sibling, shows."""
    from guerdon.policies.packing import make_batches

    with _quietly(base) as device:
        ids = _tokens(base, 33, device).tolist()
        prompt = ids[:9]
        items = [(prompt, ids[9:21]), (prompt, ids[21:24]), (prompt, ids[24:33])]
        (together,) = make_batches(items, groups=[0, 0, 0], max_tokens=1 << 16)
        (apart,) = make_batches(items, groups=None, max_tokens=1 << 16)
        together, apart = together.to(device), apart.to(device)
        try:
            ours = run(base, together, way)[together.source]
        except (EngineError, NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError):
            # The architecture does not take what this way passes; that is an answer.
            return False
        theirs = run(base, apart, way)[apart.source]
    order = [torch.argsort(b.trajectory * 100 + b.position) for b in (together, apart)]
    return _close(ours[order[0]].float(), theirs[order[1]].float(), next(base.parameters()).dtype)


def _close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    if ours.shape != theirs.shape:
        return False
    if not bool(theirs.isfinite().all()):
        # Diverged weights tell nothing about the architecture; whoever reads the loss will see them.
        return True
    difference = (ours - theirs).square().mean().sqrt()
    return bool(difference <= _TOLERANCE.get(dtype, 0.05) * theirs.square().mean().sqrt() + 1e-6)


def _tokens(base: Any, count: int, device: torch.device) -> Tensor:
    """Ordinary token ids; the first few of a vocabulary are often special."""
    vocabulary = base.get_input_embeddings().weight.shape[0]
    return (torch.arange(count, device=device) * 7 + vocabulary // 2) % vocabulary


@contextlib.contextmanager
def _quietly(base: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; the modules' modes are as before afterwards."""
    training = [m for m in base.modules() if m.training]
    base.eval()
    try:
        with torch.no_grad():
            yield next(base.parameters()).device
    finally:
        for module in training:
            module.training = True
