"""Episodes, progress, regret: hand-computed values, slow references, and every refusal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from guerdon.credit import (
    MARKERS,
    best_trace,
    cumulative_regret,
    episode_offsets,
    merge_episodes,
    normalized_regret,
    progress_bonus,
    split_episodes,
    termination_relative,
)
from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.evaluation import episode_report, mean_regret, success_at, tokens_to_reach
from guerdon.shaping import ProgressShapedReward
from guerdon.types import Score, StopReason, Task, Trajectory


def text(*paragraphs: str) -> str:
    return "\n\n".join(paragraphs)


def test_a_marker_opens_an_episode_once_the_current_one_has_three_paragraphs():
    thought = text("a", "b", "c", "Wait, no.", "d", "e", "Alternatively x", "f")
    assert split_episodes(thought) == [text("a", "b", "c"), text("Wait, no.", "d", "e"), text("Alternatively x", "f")]


def test_too_few_paragraphs_keep_the_episode_open():
    assert split_episodes(text("a", "Wait", "b", "But wait", "c")) == [text("a", "Wait", "b"), text("But wait", "c")]
    assert split_episodes(text("a", "b", "Wait")) == [text("a", "b", "Wait")]
    assert split_episodes(text("a", "Wait", "Wait"), min_paragraphs=1) == ["a", "Wait", "Wait"]


def test_only_the_beginning_of_a_paragraph_counts():
    assert split_episodes(text("a", "b", "c", "I said Wait", "d")) == [text("a", "b", "c", "I said Wait", "d")]
    assert len(split_episodes(text("a", "b", "c", "so\nWait, inside"))) == 1
    assert len(split_episodes(text("a", "b", "c", "wait, small"))) == 1, "case matters"


@pytest.mark.parametrize("marker", MARKERS)
def test_every_marker_works(marker):
    assert len(split_episodes(text("a", "b", "c", f"{marker} and so on"))) == 2


def test_the_last_episode_is_kept_and_no_marker_is_one_episode():
    assert split_episodes(text("a", "b", "c", "Wait")) == [text("a", "b", "c"), "Wait"]
    assert split_episodes("one line") == ["one line"]
    assert split_episodes("") == [] and split_episodes(" \n\n ") == []
    assert split_episodes("\n\na\n\nb\n\n") == ["a\n\nb"]


def test_blank_lines_may_hold_spaces_and_come_in_numbers():
    assert split_episodes("a\n \t\nb\n\n\n\nc\n\n  Wait\n\nd") == ["a\n \t\nb\n\n\n\nc", "Wait\n\nd"]
    assert split_episodes("a\r\n\r\nb\r\n\r\nc\r\n\r\nWait") == ["a\r\n\r\nb\r\n\r\nc", "Wait"]


def test_at_most_so_many_episodes_the_last_takes_the_rest():
    thought = text(*["a", "b", "c", "Wait 1", "d", "e", "Wait 2", "f", "g", "Wait 3"])
    assert len(split_episodes(thought)) == 4
    two = split_episodes(thought, max_episodes=2)
    assert len(two) == 2 and two[1].endswith("Wait 3") and text(*two) == thought
    assert split_episodes(thought, max_episodes=1) == [thought]


def test_offsets_cut_the_text_without_loss():
    thought = "  a\n\nb\n\nc\n\n\nWait\n\nd\n"
    ends = episode_offsets(thought)
    pieces = [thought[i:j] for i, j in zip([0, *ends], ends, strict=False)]
    assert "".join(pieces) == thought and [p.strip() for p in pieces] == split_episodes(thought)
    assert episode_offsets("") == []


def test_episodes_can_be_merged_in_groups():
    assert merge_episodes(["a", "b", "c", "d"], 3) == ["a\n\nb\n\nc", "d"]
    assert merge_episodes([], 5) == []
    with pytest.raises(ValueError, match="size"):
        merge_episodes(["a"], 0)


def test_split_refuses():
    for options, said in (({"min_paragraphs": 0}, "min_paragraphs"), ({"max_episodes": 0}, "max_episodes"),
                          ({"markers": ["Wait", ""]}, "empty marker")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            split_episodes("a", **options)


def test_progress_is_the_difference_of_neighbours():
    assert progress_bonus([0.25, 0.5, 0.5, 0.125]).tolist() == [0.25, 0.0, -0.375]
    out = progress_bonus(torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64, requires_grad=True))
    assert out.tolist() == [[1.0], [0.0]] and out.dtype == torch.float64 and not out.requires_grad
    assert progress_bonus([0.5]).shape == (0,)
    assert progress_bonus([0, 1]).tolist() == [1.0]
    for bad, said in (([], "J_0"), ([0.5, 1.2], "outside"), ([0.5, math.nan], "NaN"), ([-0.1, 0.0], "outside")):
        with pytest.raises(ValueError, match=said):
            progress_bonus(bad)


def test_cumulative_regret():
    assert cumulative_regret([0.25, 0.5]) == pytest.approx(1.25)
    assert cumulative_regret([0.25, 0.5], 0.75) == pytest.approx(0.75)
    assert cumulative_regret([0.25, 0.5], [0.5, 1.0]) == pytest.approx(0.75)
    assert cumulative_regret([]) == 0.0
    with pytest.raises(ValueError, match="best"):
        cumulative_regret([0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="outside"):
        cumulative_regret([1.5])


def test_regret_by_hand():
    # From (0, 0) to (10, 0.5): area 2.5; to (20, 1): 7.5; held to 40: 20. Together 30 of 40.
    assert normalized_regret([10, 20], [0.5, 1.0], 40) == pytest.approx(0.25)
    # Cut at 15, half way from 0.5 to 1: 2.5 + 5 * 0.625.
    assert normalized_regret([10, 20], [0.5, 1.0], 15) == pytest.approx(1 - (2.5 + 3.125) / 15)
    assert normalized_regret([10, 20], [0.5, 1.0], 5) == pytest.approx(1 - 0.5 * 5 * 0.25 / 5)
    assert normalized_regret([0], [1.0], 10) == 0.0
    assert normalized_regret([], [], 10) == 1.0
    assert normalized_regret([10], [0.0], 10) == 1.0
    assert normalized_regret([5, 5], [0.0, 1.0], 10) == pytest.approx(0.5), "a jump has no width"
    assert normalized_regret([10], [1.0], 10) == pytest.approx(0.5)
    assert isinstance(normalized_regret(np.array([10.0]), np.array([1.0]), 20), float)


def test_regret_against_a_fine_numerical_integral():
    rng = np.random.default_rng(0)
    for _ in range(20):
        k = int(rng.integers(1, 7))
        tokens, success = np.sort(rng.uniform(1, 100, k)), rng.random(k)
        budget = float(rng.uniform(5, 150))
        grid = np.linspace(0, budget, 200_001)
        area = np.trapezoid(np.interp(grid, [0, *tokens], [0, *success]), grid)
        assert normalized_regret(tokens, success, budget) == pytest.approx(1 - area / budget, abs=1e-5)


@pytest.mark.parametrize(
    "tokens, success, budget, said",
    [
        ([1, 2], [0.5], 10, "2 token counts"),
        ([2, 1], [0.5, 0.5], 10, "decreasing"),
        ([-1], [0.5], 10, "negative"),
        ([math.nan], [0.5], 10, "finite"),
        ([1], [1.5], 10, "success"),
        ([1], [math.nan], 10, "success"),
        ([1], [0.5], 0, "budget"),
        ([1], [0.5], math.inf, "budget"),
        ([1], [0.5], math.nan, "budget"),
    ],
)
def test_regret_refuses(tokens, success, budget, said):
    with pytest.raises(ValueError, match=said):
        normalized_regret(tokens, success, budget)


def test_the_best_trace_is_right_has_most_progress_and_ends_where_progress_does():
    j = [[0.1, 0.9, 0.9, 0.8], [0.5, 0.6], [0.0, 1.0], [0.2, 0.9, 0.5, 0.9]]
    assert best_trace(j, [True, True, False, True]) == (0, 1), "0.7 twice: the first of equals, cut at its first 0.9"
    assert best_trace(j, [False, True, False, False]) == (1, 1)
    assert best_trace(j, [False] * 4) is None
    assert best_trace([[0.5, 0.2]], [True]) == (0, 0), "no progress at all: no thought is kept"
    assert best_trace([], []) is None
    with pytest.raises(ValueError, match="verdicts"):
        best_trace(j, [True])


def test_rewards_against_answering_at_once():
    rewards = torch.tensor([1.0, 0.0, 1.5, 0.5, 2.0, 3.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    stopped = torch.tensor([False, False, True, True, False, False])
    out = termination_relative(rewards, group, stopped)
    assert out.tolist() == [0.0, -1.0, 0.5, -0.5, 0.0, 0.0] and out.dtype == torch.float64
    rewards[2] = math.nan
    valid = torch.tensor([True, True, False, True, True, True])
    assert termination_relative(rewards, group, stopped, valid).tolist() == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    assert termination_relative(torch.zeros(0), torch.zeros(0), torch.zeros(0)).shape == (0,)
    with pytest.raises(ValueError, match="terminated"):
        termination_relative(rewards, group, stopped[:3])


def test_the_shaped_reward_is_outcome_plus_weighted_progress():
    reward = ProgressShapedReward()
    assert reward(1.0, 0.25, 0.75) == 1.5
    assert reward(0.0, 0.75, 0.25) == -0.5, "negative progress is punished"
    assert reward(1, 0.5, 0.5) == 1.0
    assert reward(1.0, 0.25, 0.75, alpha=0.5) == 1.25 and ProgressShapedReward(2.0)(0.0, 0.0, 0.5) == 1.0
    j = torch.tensor([0.5, 0.0], dtype=torch.float64, requires_grad=True)
    out = reward(torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 0.5], dtype=torch.float64), j)
    assert out.tolist() == [1.5, -0.5] and out.dtype == torch.float64 and not out.requires_grad
    for bad in ((1.0, math.nan, 0.5), (1.0, 0.5, 1.5), (torch.ones(1), torch.ones(1), torch.full((1,), math.nan))):
        with pytest.raises(ValueError, match="0, 1"):
            reward(*bad)
    with pytest.raises(ValueError, match="shapes"):
        reward(torch.ones(2), torch.ones(2), torch.ones(1))
    with pytest.raises(ConfigError, match="alpha"):
        ProgressShapedReward(math.inf)
    with pytest.raises(ConfigError, match="alpha"):
        reward(1.0, 0.5, 0.5, alpha=math.nan)


def trajectories(n: int) -> list[Trajectory]:
    return [Trajectory(Task(f"t{k}", "x"), (), StopReason.DONE) for k in range(n)]


def test_the_shape_adds_the_bonus_and_says_what_it_was():
    shape = ProgressShapedReward(0.5).shape(lambda ts: [(0.25, 0.75), None, (0.5, 0.5), (math.nan, 0.5)])
    scores = [Score(1.0, parts={"a": 2.0}), Score(0.5), Score.invalid("no"), Score(1.0)]
    out = shape(trajectories(4), scores)
    assert out[0].value == 1.25
    assert out[0].parts == {"a": 2.0, "outcome": 1.0, "progress": 0.5, "j_before": 0.25, "j_after": 0.75}
    assert out[1] is scores[1] and out[2] is scores[2]
    assert not out[3].valid and "not known" in out[3].reason
    with pytest.raises(RewardError, match="1 values"):
        ProgressShapedReward().shape(lambda ts: [None])(trajectories(2), scores[:2])


def test_evaluation_averages_over_traces_and_then_over_problems():
    a, b, c = ([10], [1.0]), ([10], [0.0]), ([20], [1.0])
    assert mean_regret([[a, b], [c]], 20) == pytest.approx(((0.25 + 1.0) / 2 + 0.5) / 2)
    assert success_at([[a, b], [c]], 10) == pytest.approx((0.5 + 0.5) / 2)
    assert success_at([[a]], 5) == pytest.approx(0.5) and success_at([[a]], 1000) == 1.0
    assert tokens_to_reach([[c]], 0.5, limit=40, points=41) == pytest.approx(10.0)
    assert tokens_to_reach([[b]], 0.5, limit=40) == math.inf
    for bad in ([], [[a], []]):
        with pytest.raises(DataError, match="at least one"):
            mean_regret(bad, 10)


def test_the_report_shows_which_episodes_made_no_progress():
    report = episode_report([[0.0, 0.5, 0.5], [0.5, 1.0, 0.75, 0.75]], tokens=[10, 20])
    assert report.episodes == 2.5 and report.counts == (2, 2, 1)
    assert report.progress == pytest.approx((0.5, -0.125, 0.0))
    assert report.idle == pytest.approx(3 / 5) and report.tokens == 15
    alone = episode_report([[0.5]])
    assert alone.episodes == 0 and alone.progress == () and math.isnan(alone.idle) and math.isnan(alone.tokens)
    with pytest.raises(DataError, match="token counts"):
        episode_report([[0.5]], [1, 2])
    with pytest.raises(DataError):
        episode_report([])
