"""Redistribution, fusing and placing of turn rewards, and the grounding signal: hand-computed values and failures."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.credit import (
    exact_redistribution,
    fuse,
    place_on_turn_ends,
    redistribute,
    turn_ends,
    uniform_redistribution,
)
from guerdon.errors import ConfigError, RewardError
from guerdon.rewards import Grounding, grounding_signal
from guerdon.types import StopReason, Task, Trajectory, Turn


class Fixed:
    """An estimator that says what it is told."""

    def __init__(self, *rows):
        self.rows = list(rows)

    def contributions(self, trajectory):
        return self.rows[trajectory]


def dialogue(*said: tuple[str, str], prompt_ids=(1,), **info) -> Trajectory:
    """Turns from (speaker, text); each word is a token."""
    turns = []
    for speaker, text in said:
        ids = tuple(range(10, 10 + len(text.split())))
        logprobs = (0.0,) * len(ids) if speaker == "policy" else None
        turns.append(Turn(speaker, text, ids, logprobs))
    return Trajectory(Task("t", "go"), tuple(turns), StopReason.DONE, prompt_ids=prompt_ids, info=info)


def test_redistribute_gives_the_estimators_values():
    rows = [torch.tensor([0.2, -0.1, 0.5]), torch.tensor([]), torch.tensor([1.0], requires_grad=True)]
    out = redistribute(Fixed(*rows), [0, 1, 2])
    assert [o.tolist() for o in out] == [pytest.approx([0.2, -0.1, 0.5]), [], [1.0]]
    assert not out[2].requires_grad


def test_exact_redistribution_spreads_the_error_evenly():
    out = redistribute(Fixed(torch.tensor([0.2, -0.1, 0.5], dtype=torch.float64)), [0], exact=True, returns=[1.0])
    # The sum is 0.6, so each turn gets 0.4 / 3 more.
    assert out[0].tolist() == pytest.approx([1 / 3, 0.1 / 3, 1.9 / 3]) and out[0].dtype == torch.float64
    assert exact_redistribution(torch.zeros(0), 1.0).tolist() == []
    assert uniform_redistribution(1.0, 4).tolist() == [0.25] * 4
    assert uniform_redistribution(0.0, 2, dtype=torch.float64).dtype == torch.float64


def test_exact_redistribution_reads_a_return_that_the_trajectory_carries():
    class Half:
        def contributions(self, trajectory):
            return torch.tensor([0.5, 0.5])

    assert redistribute(Half(), [dialogue(**{"return": 0.0})], exact=True)[0].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="returns="):
        redistribute(Half(), [dialogue()], exact=True)


def test_redistribute_refuses_what_is_no_split():
    with pytest.raises(ValueError, match="2 returns for 1"):
        redistribute(Fixed(torch.ones(2)), [0], exact=True, returns=[1.0, 0.0])
    with pytest.raises(ValueError, match="finite"):
        redistribute(Fixed(torch.tensor([0.1, math.nan])), [0])
    with pytest.raises(ValueError, match=r"\[T\]"):
        redistribute(Fixed(torch.ones(2, 2)), [0])
    with pytest.raises(ValueError, match="return must be finite"):
        exact_redistribution(torch.ones(2), math.nan)


def test_fuse_is_alpha_c_plus_beta_g():
    assert fuse([0.2, -0.4], [1, 0]).tolist() == pytest.approx([0.7, -0.4])
    assert fuse(torch.tensor([0.2, -0.4]), torch.tensor([True, False])).tolist() == pytest.approx([0.7, -0.4])
    out = fuse(torch.tensor([1.0, 2.0], dtype=torch.float64), [1.0, 1.0], alpha=0.5, beta=2.0)
    assert out.tolist() == [2.5, 3.0] and out.dtype == torch.float64
    assert fuse([], []).shape == (0,)
    assert fuse(torch.tensor([1, 2]), torch.tensor([0, 1])).tolist() == [1.0, 2.5], "integers become floats"


@pytest.mark.parametrize(
    "c, g, options, said",
    [
        ([0.1], [1, 0], {}, "one shape"),
        ([math.nan], [1], {}, "NaN"),
        ([math.inf], [1], {}, "infinite"),
        ([0.1], [2], {}, "0, 1"),
        ([0.1], [math.nan], {}, "0, 1"),
        ([0.1], [1], {"beta": math.nan}, "finite"),
        ([0.1], [1], {"alpha": math.inf}, "finite"),
    ],
)
def test_fuse_refuses(c, g, options, said):
    with pytest.raises(ValueError, match=said):
        fuse(c, g, **options)


MASK = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])


def test_turn_ends_are_where_the_mask_falls_and_the_last_masked_token():
    assert [e.tolist() for e in turn_ends(MASK)] == [[2, 4], [0, 6], []]
    assert turn_ends(torch.tensor([True]))[0].tolist() == [0]
    assert turn_ends(torch.zeros(0))[0].tolist() == []
    assert turn_ends(torch.zeros(2, 0))[1].tolist() == []


def test_neighbouring_turns_are_told_apart_by_their_index():
    mask, index = torch.tensor([1, 1, 1, 0, 1]), torch.tensor([0, 0, 1, -1, 2])
    assert turn_ends(mask)[0].tolist() == [2, 4]
    assert turn_ends(mask, index)[0].tolist() == [1, 2, 4]
    assert place_on_turn_ends([1.0, 2.0, 3.0], mask, turn_index=index).tolist() == [0, 1, 2, 0, 3]


def test_rewards_stand_on_the_last_token_of_their_own_turn():
    out = place_on_turn_ends([[0.5, -1.0], [2.0, 3.0], []], MASK)
    assert out.tolist() == [[0, 0, 0.5, 0, -1.0, 0, 0], [2.0, 0, 0, 0, 0, 0, 3.0], [0] * 7]
    ragged = place_on_turn_ends([torch.tensor([0.5, -1.0], dtype=torch.float64), torch.ones(2), torch.ones(0)], MASK)
    assert ragged.dtype == torch.float64 and ragged.shape == MASK.shape
    assert place_on_turn_ends(torch.tensor([7.0, 8.0]), MASK[0]).tolist() == [0, 0, 7, 0, 8, 0, 0]
    assert place_on_turn_ends([7.0, 8.0], MASK[:1]).tolist() == [[0, 0, 7, 0, 8, 0, 0]]
    assert place_on_turn_ends([[7.0, 8.0]], MASK[:1]).tolist() == [[0, 0, 7, 0, 8, 0, 0]]
    assert place_on_turn_ends(torch.tensor([[7.0, 8.0]]), MASK[0]).tolist() == [0, 0, 7, 0, 8, 0, 0]
    assert place_on_turn_ends([], MASK[2]).tolist() == [0] * 7


def test_padded_rewards_may_hold_zeros_and_nan_behind_the_turns_and_nothing_else():
    out = place_on_turn_ends(torch.tensor([[0.5, 1.0, 0.0], [2.0, 3.0, math.nan], [0.0, 0.0, 0.0]]), MASK)
    assert out.sum(1).tolist() == [1.5, 5.0, 0.0] and bool(torch.isfinite(out).all())
    with pytest.raises(ValueError, match="row 0"):
        place_on_turn_ends(torch.tensor([[0.5, 1.0, 9.0], [2.0, 3.0, 0.0], [0.0, 0.0, 0.0]]), MASK)


def test_place_on_turn_ends_refuses_another_number_of_rewards():
    with pytest.raises(ValueError, match="row 1 has rewards"):
        place_on_turn_ends([[1.0, 2.0], [1.0], []], MASK)
    with pytest.raises(ValueError, match="2 rows"):
        place_on_turn_ends([[1.0, 2.0], [1.0, 2.0]], MASK)
    with pytest.raises(ValueError, match="NaN"):
        place_on_turn_ends([[1.0, math.nan], [1.0, 2.0], []], MASK)
    with pytest.raises(ValueError, match=r"\[L\]"):
        turn_ends(torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match="turn_index"):
        turn_ends(MASK, torch.zeros(3, 6))


AGENT = dialogue(
    ("policy", "take door"),
    ("environment", "Nothing happens."),
    ("policy", "go north"),
    ("environment", "You see a key."),
    ("policy", "Nothing happens. take key"),
    ("environment", "Taken."),
    ("policy", "fly"),
    ("environment", "Nothing happens."),
)


def test_an_action_is_judged_by_the_observation_behind_it():
    assert grounding_signal(AGENT) == [0.0, 1.0, 1.0, 1.0], "the last one counts as executed, as in the paper's code"
    assert grounding_signal(AGENT, last=None) == [0.0, 1.0, 1.0, 0.0]
    assert grounding_signal(AGENT, last=0.5)[-1] == 0.5
    assert grounding_signal(AGENT, ["invalid", "see a key"], last=None) == [1.0, 0.0, 1.0, 1.0]
    assert grounding_signal(AGENT, lambda turn: turn.text == "Taken.", last=None) == [1.0, 1.0, 0.0, 1.0]


def test_grounding_at_the_edges():
    assert grounding_signal(dialogue()) == []
    assert grounding_signal(dialogue(("environment", "Nothing happens."))) == []
    assert grounding_signal(dialogue(("environment", "Nothing happens."), ("policy", "go")), last=None) == [1.0]
    silent = dialogue(("policy", "a"), ("policy", "b"), ("environment", "Nothing happens."), ("policy", "c"))
    assert grounding_signal(silent, last=None) == [1.0, 0.0, 1.0]
    two = dialogue(("policy", "a"), ("environment", "Nothing happens."), ("environment", "Well."), ("policy", "b"))
    assert grounding_signal(two, last=None) == [0.0, 1.0]
    for bad in ("", [], ["x", ""]):
        with pytest.raises(ConfigError, match="phrase"):
            grounding_signal(AGENT, bad)


def test_turns_without_tokens_are_no_turns_unless_there_are_no_tokens_at_all():
    empty = Trajectory(Task("t", "go"), (Turn("policy", ""), Turn("policy", "x", (3,), (0.0,))), StopReason.DONE)
    assert grounding_signal(empty) == [1.0]
    text = Trajectory(
        Task("t", "go"),
        (Turn("policy", "x"), Turn("environment", "Nothing happens."), Turn("policy", "")),
        StopReason.DONE,
    )
    assert grounding_signal(text, last=None) == [0.0]


def test_grounding_as_a_reward_has_steps():
    score = Grounding()([AGENT])[0]
    assert score.value == 0.5 and score.steps == (0.0, 1.0, 1.0, 0.0)
    assert [(s.start, s.stop) for s in score.step_spans] == [(0, 2), (4, 6), (10, 14), (15, 16)]
    assert Grounding(last=1.0)([AGENT])[0].value == 0.75
    with pytest.raises(RewardError, match="no turn"):
        Grounding()([dialogue(("environment", "hello"))])
    text = Trajectory(Task("t", "go"), (Turn("policy", "x"),), StopReason.DONE)
    assert Grounding()([text])[0].steps is None
