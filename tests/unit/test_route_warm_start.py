"""What the small router starts from: a prompt that it can look up in, weights that look up, scripts, exploration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.environments.worldfacts import NAMES, held_out_names
from guerdon.errors import ConfigError
from guerdon.policies import tiny_policy, train_bpe
from guerdon.routing.member import Member
from guerdon.routing.prompt import compact_prompt
from guerdon.routing.router_r1 import choice_weights
from guerdon.routing.testbed import WorldFactsTestbed
from guerdon.types import StopReason, Task, Trajectory, Turn, action_mask


@pytest.fixture(scope="module")
def testbed() -> WorldFactsTestbed:
    return WorldFactsTestbed("compact", seed=0)


@pytest.fixture(scope="module")
def policy(testbed: WorldFactsTestbed):
    torch.set_num_threads(1)
    return tiny_policy(
        train_bpe(["a b"], 8192, words=testbed.words), hidden=144, layers=3, heads=2, intermediate=64, init="recall"
    )


# -- prompt


def test_every_skill_stands_between_its_price_and_its_owner() -> None:
    members = [
        Member(name="nova-1", descriptor="economy , borders", input_price=0.0, output_price=3.0),
        Member(name="raven-2", descriptor="language", input_price=0.0, output_price=20.0),
    ]
    assert compact_prompt("currency of Peru", members) == (
        "- 3 economy nova-1 , 3 borders nova-1\n- 20 language raven-2\nQuestion: currency of Peru?"
    )
    assert compact_prompt("x", members, prices=False).startswith("- economy nova-1 , borders nova-1\n- language")


def test_names_of_members_are_single_tokens(policy) -> None:
    assert all(len(policy.encode(f" {name}")) == 1 for name in NAMES)


# -- initial weights


@torch.no_grad()
def attention(policy, ids: list[int]) -> list[torch.Tensor]:
    policy.model.set_attn_implementation("eager")
    try:
        return [a[0] for a in policy.model(torch.tensor([ids]), output_attentions=True).attentions]
    finally:
        policy.model.set_attn_implementation("sdpa")


def test_the_first_layer_looks_one_and_two_positions_back(policy) -> None:
    ids = np.random.default_rng(0).integers(300, policy.model.config.vocab_size, 60).tolist()
    first = attention(policy, ids)[0]
    for head, back in ((0, 1), (1, 2)):
        assert torch.diagonal(first[head], -back)[2:].min() > 0.9


def test_the_second_layer_finds_what_followed_the_same_token(policy) -> None:
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(20):
        pairs = rng.permutation(np.arange(300, policy.model.config.vocab_size))[:12].reshape(6, 2)
        k = int(rng.integers(6))
        ids = [*pairs.reshape(-1).tolist(), int(pairs[k, 0])]
        hits.append(float(attention(policy, ids)[1][0, -1, 2 * k + 1]))
    assert np.mean(hits) > 0.7, "a blind look gives 1/12"


@pytest.mark.parametrize("wrong", [{"layers": 1}, {"heads": 4}, {"hidden": 64}, {"init": "clever"}])
def test_weights_that_cannot_hold_the_circuit_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="init"):
        tiny_policy(**({"hidden": 144, "layers": 2, "heads": 2, "init": "recall"} | wrong))


def test_the_circuit_is_drawn_by_the_seed_and_random_weights_stay_as_they_were() -> None:
    make = lambda **o: tiny_policy(hidden=144, layers=2, heads=2, intermediate=32, **o).model.state_dict()  # noqa: E731
    a, b, c = make(init="recall", seed=1), make(init="recall", seed=1), make(init="recall", seed=2)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    plain = make(seed=1)
    assert torch.equal(plain["model.layers.1.mlp.up_proj.weight"], a["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(plain[name], a[name])


# -- scripts


def test_scripts_hold_drills_and_hide_reserved_names_from_rollouts(testbed: WorldFactsTestbed, policy) -> None:
    made = testbed.scripts(policy, 200, drills=0.25, seed=3)
    drills = [t for t in made if t.task.id == "drill"]
    assert len(made) == 200 and 25 <= len(drills) <= 75
    for trajectory in drills:
        cues = [t for t in trajectory.turns if t.speaker == "environment"]
        answers = [t for t in trajectory.turns if t.speaker == "policy"]
        assert len(cues) == len(answers) and all(len(t.token_ids) == 2 for t in answers)
        assert sum(action_mask(trajectory)) == 2 * len(answers), "only answers are learned"
    seen = {name for t in drills for name in NAMES if name in t.task.prompt[0]["content"]}
    assert seen & set(held_out_names())
    for trajectory in made:
        if trajectory.task.id != "drill":
            text = policy.decode(trajectory.prompt_ids) + "".join(t.text for t in trajectory.turns)
            assert not any(name in text for name in held_out_names())
    assert not any(t.task.id == "drill" for t in testbed.scripts(policy, 40, seed=3))


# -- exploration


def turn(speaker: str, *pieces: str) -> Turn:
    ends = tuple(np.cumsum([len(p) for p in pieces]).tolist())
    return Turn(speaker, "".join(pieces), tuple(range(len(pieces))), None, ends)  # type: ignore[arg-type]


def test_the_bonus_is_larger_where_a_member_is_chosen() -> None:
    trajectory = Trajectory(
        Task("t", "q", ["a"]),
        (
            turn("policy", "<think>", " a:b", "</think>", "<search>", " nova-1", " :", " capital", "</search>"),
            turn("environment", "<information>", "x", "</information>"),
            turn("policy", "<think>", "done", "</think>", "<answer>", "x", "</answer>"),
        ),
        StopReason.DONE,
        prompt_ids=(1,),
    )
    expected = [5.0] * 5 + [1.0] * 3 + [0.0] * 3 + [1.0] * 6
    assert choice_weights(trajectory, 4.0) == expected
    assert choice_weights(trajectory, 0.0) == [float(w > 0) for w in expected]
