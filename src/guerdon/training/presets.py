"""What an algorithm's name stands for, and what the built-in parts need: plain data, read without torch.

| algorithm | credit | objective | aggregation | further | source |
|---|---|---|---|---|---|
| grpo | group_relative | ppo_clip | token | | Shao et al. 2024, arXiv 2402.03300 |
| dr_grpo | group_relative, not scaled | ppo_clip | constant | | Liu et al. 2025, arXiv 2503.20783 |
| dapo | group_relative | ppo_clip, 0.2 and 0.28 | token | dynamic sampling, overlong shape | Yu et al. 2025, arXiv 2503.14476 |
| gspo | group_relative | gspo, 3e-4 and 4e-4 | sequence | | Zheng et al. 2025, arXiv 2507.18071 |
| cispo | group_relative | cispo | token | | MiniMax 2025, arXiv 2506.13585 |
| rloo | leave_one_out | ppo_clip | constant | KL in the reward | Ahmadian et al. 2024, arXiv 2402.14740 |
| reinforce | reinforce | reinforce | constant | KL in the reward | Williams 1992 |
| reinforce++ | reinforce_plus_plus | ppo_clip | token | KL (k1) in the reward | Hu 2025, arXiv 2501.03262 |
| ppo | gae | ppo_clip | token | critic | Schulman et al. 2017, arXiv 1707.06347 |

``aggregation="constant"`` divides by the longest possible response (``max_tokens * max_turns``), so that it differs from
the papers' sum over tokens by a constant factor only. On the first optimiser step of a batch ``ppo_clip`` has the
gradient of REINFORCE, and a bounded one on later ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CREDIT_OF", "PRESETS", "TRAITS", "Traits", "fill"]

CREDIT_OF = {
    "grpo": "group_relative",
    "dr_grpo": "group_relative",
    "dapo": "group_relative",
    "gspo": "group_relative",
    "cispo": "group_relative",
    "rloo": "leave_one_out",
    "reinforce": "reinforce",
    "reinforce++": "reinforce_plus_plus",
    "ppo": "gae",
}
"""Credit rule of each algorithm."""

_REWARD_KL = {"kl_in": "reward", "kl_kind": "k1"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"scale": "none", "aggregation": "constant"},
    "dapo": {"clip_high": 0.28, "dynamic_sampling": 3, "shape": "overlong"},
    "gspo": {"objective": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence"},
    "cispo": {"objective": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "rloo": {"aggregation": "constant", **_REWARD_KL},
    "reinforce": {"objective": "reinforce", "aggregation": "constant", **_REWARD_KL},
    "reinforce++": {**_REWARD_KL},
    "ppo": {},
}
"""Settings that an algorithm sets unless they are given."""


@dataclass(frozen=True)
class Traits:
    """What a part needs, as far as it says.

    Args:
        name: of the part.
        needs: of ``"group"``, ``"critic"``, ``"steps"``, ``"tokens"``, ``"reference"``, ``"channels"``.
        kl_in_reward: a credit rule can subtract a KL penalty from the reward.
        settings: parameters of an objective.
        known: False for a callable that says nothing about itself.
        part: the credit rule, where it has conflicts of its own to report.
    """

    name: str
    needs: frozenset[str] = frozenset()
    kl_in_reward: bool = False
    settings: frozenset[str] = frozenset()
    known: bool = True
    part: Any = field(default=None, compare=False)

    @classmethod
    def of(cls, part: Any, name: str | None = None) -> Traits:
        """Traits of a credit rule or objective as it is."""
        label = name or str(getattr(part, "name", None) or getattr(part, "__name__", type(part).__name__))
        try:
            settings = frozenset(inspect.signature(part).parameters)
        except (TypeError, ValueError):
            settings = frozenset()
        return cls(
            label,
            frozenset(getattr(part, "needs", ())),
            bool(getattr(part, "kl_in_reward", False)),
            settings,
            hasattr(part, "needs"),
            part,
        )

    def conflicts(self, config: Any) -> Iterator[str]:
        """What the part itself has against the settings."""
        if hasattr(self.part, "conflicts"):
            yield from self.part.conflicts(config)


_GROUP, _CLIP = frozenset({"group"}), frozenset({"clip_low", "clip_high"})

TRAITS: Mapping[str, Mapping[str, Traits]] = {
    "credit": {
        "gae": Traits("gae", frozenset({"critic"}), kl_in_reward=True),
        "group_relative": Traits("group_relative", _GROUP),
        "leave_one_out": Traits("leave_one_out", _GROUP, kl_in_reward=True),
        "reinforce": Traits("reinforce", kl_in_reward=True),
        "reinforce_plus_plus": Traits("reinforce_plus_plus", kl_in_reward=True),
    },
    "objective": {
        "cispo": Traits("cispo", settings=_CLIP),
        "gspo": Traits("gspo", settings=_CLIP | {"sequence_ids", "mask"}),
        "ppo_clip": Traits("ppo_clip", settings=_CLIP | {"dual_clip"}),
        "reinforce": Traits("reinforce"),
    },
}
"""Traits of the parts that the presets name, so that reading a configuration of one imports nothing. A test holds
them against the parts themselves."""


def fill(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the algorithm sets and the user did not."""
    algorithm = values.get("algorithm", "grpo")
    preset = dict(PRESETS.get(algorithm, {})) if isinstance(algorithm, str) else {}
    if values.get("credit") is not None:
        preset.pop("scale", None)
    if values.get("objective") is not None:
        for name in ("clip_low", "clip_high"):
            preset.pop(name, None)
    if not values.get("kl_coef"):
        for name in _REWARD_KL:
            preset.pop(name, None)
    elif values.get("kl_in", "reward") != "reward":
        preset.pop("kl_kind", None)
    out = {**preset, **values}
    length = _longest(out)
    if preset.get("aggregation") == out.get("aggregation") == "constant" and length is not None:
        out.setdefault("aggregation_length", length)
    if length is not None and out.get("shape") is not None:
        shapes = out["shape"] if isinstance(out["shape"], list | tuple) else [out["shape"]]
        # A fifth of the longest response, as in the paper (4096 of 20480).
        overlong = {"name": "overlong", "max_len": length, "buffer": max(1, length // 5)}
        made = [overlong if isinstance(one, str) and one == "overlong" else one for one in shapes]
        out["shape"] = made if isinstance(out["shape"], list | tuple) else made[0]
    return out


def _longest(values: Mapping[str, Any]) -> int | None:
    """Policy tokens of the longest possible response; None where the settings are not numbers (yet)."""
    tokens, turns = values.get("max_tokens", 256), values.get("max_turns", 1)
    good = all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in (tokens, turns))
    return tokens * turns if good else None
