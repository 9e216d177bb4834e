"""A planted subsequence: the exact testbed for credit. Every value is known by dynamic programming.

A sequence of ``length`` symbols succeeds where a hidden pattern occurs in it in order (gaps allowed). What matters of a
prefix is its length ``t`` and how much of the pattern it has matched, ``j``; policies are tables over these, and a whole
batch of problems (one hidden pattern each) is computed at once. NumPy, float64.

Source: after the didactic problem of Setlur et al. 2024 (arXiv 2410.08146), section 3.
"""

from __future__ import annotations

import numpy as np

from guerdon.errors import ConfigError

__all__ = ["PlantedSubsequence"]


class PlantedSubsequence:
    """``P`` problems of one size.

    Args:
        patterns: ``[P, m]`` hidden symbols, each in 0 .. ``vocabulary - 1``.
        vocabulary: number of symbols A.
        length: symbols of a sequence T, at least m.
    """

    def __init__(self, patterns: np.ndarray, vocabulary: int, length: int) -> None:
        patterns = np.asarray(patterns)
        if patterns.ndim != 2 or not 1 <= patterns.shape[1] <= length:
            raise ConfigError(f"patterns must be [P, m] with 1 <= m <= length={length}, got {patterns.shape}")
        if vocabulary < 2 or patterns.min() < 0 or patterns.max() >= vocabulary:
            raise ConfigError(f"symbols must lie in 0 .. vocabulary - 1, vocabulary={vocabulary} at least 2")
        self.patterns, self.vocabulary, self.length = patterns, vocabulary, length
        problems, m = patterns.shape
        # [P, m + 1, A]: does this symbol match the next one of the pattern?
        self.matches = np.zeros((problems, m + 1, vocabulary), dtype=bool)
        np.put_along_axis(self.matches[:, :m], patterns[:, :, None], True, 2)

    @classmethod
    def draw(cls, problems: int, vocabulary: int, length: int, m: int, rng: np.random.Generator) -> PlantedSubsequence:
        """Problems with random patterns."""
        return cls(rng.integers(0, vocabulary, (problems, m)), vocabulary, length)

    def __len__(self) -> int:
        return len(self.patterns)

    def values(self, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chances of success under a policy.

        Args:
            policy: ``[P, T, m + 1, A]`` probabilities.

        Returns:
            ``V [P, T + 1, m + 1]`` of states and ``Q [P, T, m + 1, A]`` of actions in them.
        """
        problems, length, states, _ = policy.shape
        value = np.zeros((problems, length + 1, states))
        value[:, length, -1] = 1.0
        action = np.empty_like(policy)
        for t in range(length - 1, -1, -1):
            onwards = np.concatenate([value[:, t + 1, 1:], value[:, t + 1, -1:]], 1)
            action[:, t] = np.where(self.matches, onwards[..., None], value[:, t + 1, :, None])
            value[:, t] = (policy[:, t] * action[:, t]).sum(-1)
        return value, action

    def occupancy(self, policy: np.ndarray) -> np.ndarray:
        """``[P, T, m + 1]`` chance that a sequence of the policy has matched j symbols after t."""
        problems, length, states, _ = policy.shape
        chance = np.zeros((problems, length, states))
        chance[:, 0, 0] = 1.0
        for t in range(length - 1):
            hit = chance[:, t] * (policy[:, t] * self.matches).sum(-1)
            chance[:, t + 1] = chance[:, t] - hit
            chance[:, t + 1, 1:] += hit[:, :-1]
        return chance

    def sample(self, policy: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``n`` sequences of each problem: actions ``[P, n, T]``, matched before each ``[P, n, T]``, success ``[P, n]``."""
        problems, length, states, symbols = policy.shape
        rows = np.arange(problems)[:, None]
        matched = np.zeros((problems, n), dtype=np.int64)
        actions = np.empty((problems, n, length), dtype=np.int64)
        before = np.empty_like(actions)
        for t in range(length):
            edges = policy[rows, t, matched].cumsum(-1)
            chosen = np.minimum((rng.random((problems, n, 1)) > edges).sum(-1), symbols - 1)
            actions[:, :, t], before[:, :, t] = chosen, matched
            matched = matched + self.matches[rows, matched, chosen]
        return actions, before, matched == states - 1
