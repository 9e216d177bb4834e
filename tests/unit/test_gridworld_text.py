"""The text grid world: rules, exact distances against a search over all states, episodes, tasks, the noisy player."""

from __future__ import annotations

import asyncio
import random
from collections import deque

import pytest

from guerdon.environments.gridworld_text import (
    ACTIONS,
    NOTHING,
    GridWorld,
    Layout,
    ReachGoal,
    State,
    TextGrid,
    act,
    demonstration,
    describe,
    expert_action,
    grid_tasks,
    grid_words,
    layout_of,
    noisy_expert,
    random_layout,
    rejected_actions,
)
from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.types import StopReason, Task, Trajectory

#  S . # .      x = 0..3, the wall is column 2, its door at (2, 1)
#  K . D G
LAYOUT = Layout(4, 2, door=(2, 1), key=(0, 1), start=(0, 0), goal=(3, 1))
SOLUTION = ["go south", "take key", "go east", "open door", "go east", "go east"]


def searched(layout: Layout, state: State) -> int:
    """Fewest actions to the goal by breadth-first search over states."""
    queue, seen = deque([(state, 0)]), {state}
    while queue:
        now, steps = queue.popleft()
        if now.at == layout.goal:
            return steps
        for action in ACTIONS:
            after = act(layout, now, action)
            if after is not None and after not in seen:
                seen.add(after)
                queue.append((after, steps + 1))
    raise AssertionError("unreachable")


def reachable(layout: Layout) -> list[State]:
    queue, seen = deque([layout.initial]), {layout.initial}
    while queue:
        now = queue.popleft()
        for action in ACTIONS:
            after = act(layout, now, action)
            if after is not None and after not in seen:
                seen.add(after)
                queue.append(after)
    return list(seen)


def test_a_shortest_way_scores_one_and_its_potential_rises_to_one():
    game = TextGrid(LAYOUT)
    text, info = game.reset()
    assert text == "key south. door south east." and info["remaining"] == 6 and info["potential"] == 0.0
    rewards, goals, potentials = [], [], []
    for action in SOLUTION:
        text, reward, terminated, truncated, info = game.step(action)
        rewards.append(reward)
        goals.append(info["sub_goal"])
        potentials.append(info["potential"])
    assert rewards == [0, 0, 0, 0, 0, 1.0] and terminated and not truncated
    assert goals == [None, "key", None, "door", None, "goal"]
    assert potentials == pytest.approx([k / 6 for k in range(1, 7)])
    assert text == "You reach the goal."
    with pytest.raises(DataError, match="over"):
        game.step("go west")


@pytest.mark.parametrize(
    "action", ["go north", "go west", "take key", "open door", "drop key", "fly", "", "take north"]
)
def test_what_has_no_effect_is_rejected_costs_a_step_and_changes_nothing(action):
    game = TextGrid(LAYOUT)
    text, reward, terminated, truncated, info = game.step(action)
    assert text == f"{NOTHING} key south. door south east."
    assert (reward, terminated, truncated, info["executed"], info["sub_goal"]) == (0.0, False, False, False, None)
    assert game.state == LAYOUT.initial and game.steps == 1


def test_case_and_spaces_do_not_matter():
    assert act(LAYOUT, LAYOUT.initial, "  GO   South\n") == State((0, 1), (0, 1), False, False)


def test_the_door_needs_the_carried_key_and_the_cell_before_it():
    at_door = State((1, 1), (0, 1), False, False)
    assert act(LAYOUT, at_door, "open door") is None
    assert act(LAYOUT, at_door, "go east") is None, "a closed door is a wall"
    carrying = State((1, 1), (1, 1), True, False)
    opened = act(LAYOUT, carrying, "open door")
    assert opened == State((1, 1), (1, 1), True, True)
    assert act(LAYOUT, opened, "open door") is None
    assert act(LAYOUT, opened, "go east").at == (2, 1)


def test_dropping_the_key_undoes_progress_and_taking_it_again_is_a_sub_goal_again():
    game = TextGrid(LAYOUT)
    for action in ("go south", "take key", "go east"):
        game.step(action)
    before = game.layout.potential(game.state)
    assert game.step("drop key")[4]["potential"] < before
    assert game.step("take key")[4]["sub_goal"] == "key"
    assert game.step("open door")[4]["sub_goal"] == "door"
    game.step("drop key")
    assert game.step("take key")[4]["sub_goal"] is None, "behind an open door the key serves nothing"


def test_the_limit_cuts_off_and_reaching_the_goal_on_the_last_step_does_not():
    game = TextGrid(LAYOUT, max_steps=2)
    assert game.step("go south")[3] is False
    assert game.step("go south")[2:4] == (False, True)
    game = TextGrid(LAYOUT, max_steps=6)
    for action in SOLUTION[:-1]:
        game.step(action)
    assert game.step("go east")[1:4] == (1.0, True, False)


def test_remaining_is_exact_in_every_reachable_state():
    rng = random.Random(0)
    layouts = [LAYOUT, *(random_layout(rng, width=5, height=3, shortest=(6, 12)) for _ in range(6))]
    for layout in layouts:
        for state in reachable(layout):
            assert layout.remaining(state) == searched(layout, state), (layout, state)


def test_the_expert_takes_a_shortest_way():
    rng = random.Random(1)
    for _ in range(20):
        layout = random_layout(rng)
        state, steps = layout.initial, 0
        while state.at != layout.goal:
            state = act(layout, state, expert_action(layout, state))
            steps += 1
        assert steps == layout.remaining(layout.initial)
        with pytest.raises(DataError):
            expert_action(layout, state)


def test_noise_of_the_player():
    rng = random.Random(2)
    assert noisy_expert(LAYOUT, rng, invalid=0, wander=0) == SOLUTION
    nonsense = noisy_expert(LAYOUT, rng, invalid=1, wander=0, max_steps=50)
    assert len(nonsense) == 50 and set(nonsense) <= set(rejected_actions(LAYOUT, LAYOUT.initial))
    clumsy = noisy_expert(LAYOUT, rng, invalid=0, wander=0, fumble=1, max_steps=5)
    assert clumsy[0] == "go south" and all(
        act(LAYOUT, State((0, 1), (0, 1), False, False), a) is None for a in clumsy[1:]
    )
    game, rejected, said = TextGrid(LAYOUT, max_steps=10**6), 0, 0
    for action in noisy_expert(LAYOUT, random.Random(3), invalid=0.3, wander=0, max_steps=10**6) * 1:
        rejected += not game.step(action)[4]["executed"]
        said += 1
    assert said - rejected == len(SOLUTION)
    for name in ("invalid", "wander", "fumble"):
        with pytest.raises(ConfigError, match=name):
            noisy_expert(LAYOUT, rng, **{name: 1.5})


def test_views():
    carrying = State((1, 1), (1, 1), True, False)
    assert describe(LAYOUT, carrying) == "key carried. door here."
    assert describe(LAYOUT, State((0, 0), (0, 0), True, True)) == "door open. goal south east."
    assert describe(LAYOUT, State((3, 0), (0, 0), True, True)) == "door open. goal south."
    assert describe(LAYOUT, LAYOUT.initial, "coordinates") == "you 0 0. door 2 1. goal 3 1. key 0 1. door closed."
    assert describe(LAYOUT, carrying, "coordinates") == "you 1 1. door 2 1. goal 3 1. key carried. door closed."


def test_layouts_and_games_refuse_nonsense():
    with pytest.raises(DataError, match="outside"):
        Layout(4, 2, door=(2, 2), key=(0, 1), start=(0, 0), goal=(3, 1))
    with pytest.raises(DataError, match="east of it"):
        Layout(4, 2, door=(2, 1), key=(3, 1), start=(0, 0), goal=(3, 1))
    with pytest.raises(ConfigError, match="max_steps"):
        TextGrid(LAYOUT, max_steps=0)
    with pytest.raises(ConfigError, match="view"):
        TextGrid(LAYOUT, view="map")
    with pytest.raises(ConfigError, match="3 by 1"):
        random_layout(random.Random(0), width=2)
    with pytest.raises(ConfigError, match="shortest way"):
        random_layout(random.Random(0), width=3, height=1, shortest=(50, 60))


def play(task: Task, actions: list[str], **options):
    episode = GridWorld(**options).start(task, seed=0, group=0, member=0)
    seen = [asyncio.run(episode.step(a)) for a in actions]
    return episode, seen


def test_an_episode_reports_the_ground_truth_of_every_action():
    task = Task("t", "go", "goal", {"layout": LAYOUT})
    episode, seen = play(task, ["take key", *SOLUTION])
    assert episode.prompt == task.prompt
    assert [o.done for o in seen] == [False] * 6 + [True] and seen[-1].stop is StopReason.DONE
    assert seen[0].text == f"\n{NOTHING} key south. door south east.\n" and seen[0].meta["executed"] is False
    usage, info = episode.result()
    assert usage.calls == 0
    assert info["success"] and info["steps"] == 7
    assert info["executed"] == (False, *[True] * 6)
    assert info["sub_goals"] == (None, None, "key", None, "door", None, "goal")
    assert info["potential"] == pytest.approx([0, 0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    _, seen = play(task, ["go north"] * 3, max_steps=3)
    assert seen[-1].done and seen[-1].stop is StopReason.MAX_TURNS


def test_tasks_are_repeatable_and_carry_plain_layouts():
    tasks = grid_tasks(5, seed=3)
    assert [t.id for t in tasks] == [f"grid-3-{k}" for k in range(5)] and tasks == grid_tasks(5, seed=3)
    assert tasks != grid_tasks(5, seed=4)
    for task in tasks:
        layout = layout_of(task)
        assert isinstance(task.meta["layout"], dict) and 8 <= layout.remaining(layout.initial) <= 12
        assert describe(layout, layout.initial) in task.question
    with pytest.raises(DataError, match="layout"):
        GridWorld().start(Task("x", "go"), seed=0, group=0, member=0)


def test_the_reward_reads_the_episodes_report():
    def trajectory(**info):
        return Trajectory(Task("t", "go"), (), StopReason.DONE, info=info)

    score = ReachGoal()([trajectory(success=True, executed=(True, False, True, True))])[0]
    assert score.value == 1.0 and score.parts["executed"] == 0.75
    assert ReachGoal()([trajectory(success=False)])[0].value == 0.0
    with pytest.raises(RewardError, match="GridWorld"):
        ReachGoal()([trajectory()])


def test_every_word_is_one_token():
    from guerdon.policies import train_bpe

    words = grid_words()
    tokenizer = train_bpe(["\n"], vocab_size=258 + len(words), atoms=(), words=words)
    for action in ACTIONS:
        assert len(tokenizer.encode(action, add_special_tokens=False)) == 2
    task = grid_tasks(1)[0]
    ids = tokenizer.encode(task.question, add_special_tokens=False)
    assert tokenizer.decode(ids) == task.question and len(ids) < 12


def test_a_demonstration_is_what_the_environment_would_have_said():
    class Characters:
        def encode(self, text):
            return [ord(c) for c in text]

        def render(self, messages):
            return self.encode(messages[-1]["content"])

    task = Task("t", "go", "goal", {"layout": LAYOUT})
    prompt, response, mask = demonstration(Characters(), task, SOLUTION)
    _, seen = play(task, SOLUTION)
    said = "".join(a + o.text for a, o in zip(SOLUTION, seen, strict=True))
    assert "".join(map(chr, prompt)) == "go" and "".join(map(chr, response)) == said
    assert "".join(chr(i) for i, m in zip(response, mask, strict=True) if m) == "".join(SOLUTION)
