"""A household in a grid, played in words: take the key, open the door, reach the goal. Reward only at the end.

Two rooms lie side by side, parted by a wall with one locked door. Key and start are in the west room, the goal is in
the east room. What the player can do is said in two words (``go north``, ``take key``, ``drop key``, ``open door``);
every other text, and every action that has no effect where it is said, is answered with "Nothing happens." and costs
a step. The shortest way is known in closed form, so sub-goals and an exact potential come for free: ground truth for
methods that have to find out which step was worth something.

:class:`TextGrid` speaks Gymnasium's words (``reset``, ``step``), :class:`GridWorld` is the same as an environment of
the rollout loop, :func:`grid_tasks` makes tasks, :class:`ReachGoal` is the sparse reward.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from guerdon.errors import ConfigError, DataError
from guerdon.rewards import Reward
from guerdon.rollout.protocol import Observation
from guerdon.types import Message, Score, StopReason, Task, Trajectory, Usage

__all__ = [
    "ACTIONS",
    "NOTHING",
    "GridEpisode",
    "GridWorld",
    "Layout",
    "ReachGoal",
    "State",
    "TextGrid",
    "demonstration",
    "expert_action",
    "grid_tasks",
    "grid_words",
    "noisy_expert",
    "random_layout",
    "rejected_actions",
]

Cell = tuple[int, int]
View = Literal["compass", "coordinates"]

STEPS: Mapping[str, Cell] = {"north": (0, -1), "south": (0, 1), "east": (1, 0), "west": (-1, 0)}
ACTIONS = (*(f"go {d}" for d in STEPS), "take key", "drop key", "open door")
"""Everything that can ever have an effect."""

VERBS = ("go", "take", "drop", "open")
NOUNS = (*STEPS, "key", "door")
NOTHING = "Nothing happens."
"""How the environment says that it rejected an action."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is at the start; cells are ``(x, y)``, x to the east, y to the south, from 0.

    Args:
        width, height: of the whole grid.
        door: its cell; the wall is the door's column.
        key, start: cells west of the wall.
        goal: a cell east of it.

    Raises:
        DataError: something lies outside the grid or in the wrong room.
    """

    width: int
    height: int
    door: Cell
    key: Cell
    start: Cell
    goal: Cell

    def __post_init__(self) -> None:
        for name in ("door", "key", "start", "goal"):
            cell = tuple(getattr(self, name))
            object.__setattr__(self, name, cell)
            if not (len(cell) == 2 and 0 <= cell[0] < self.width and 0 <= cell[1] < self.height):
                raise DataError(f"{name} {cell} lies outside the {self.width} by {self.height} grid")
        if not (self.key[0] < self.door[0] and self.start[0] < self.door[0] < self.goal[0]):
            raise DataError(
                f"key and start must lie west of the wall at x = {self.door[0]} and the goal east of it, "
                f"got key {self.key}, start {self.start}, goal {self.goal}"
            )

    @property
    def initial(self) -> State:
        """The state in which every episode begins."""
        return State(self.start, self.key, False, False)

    @property
    def threshold(self) -> Cell:
        """The cell from which the door can be opened."""
        return self.door[0] - 1, self.door[1]

    def free(self, cell: Cell, *, door_open: bool) -> bool:
        """Whether the player may stand there."""
        if not (0 <= cell[0] < self.width and 0 <= cell[1] < self.height):
            return False
        return cell[0] != self.door[0] or (cell == self.door and door_open)

    def distance(self, a: Cell, b: Cell) -> int:
        """Fewest moves from ``a`` to ``b``, the door being open."""
        side_a, side_b = a[0] - self.door[0], b[0] - self.door[0]
        if side_a * side_b < 0:
            return _manhattan(a, self.door) + _manhattan(self.door, b)
        return _manhattan(a, b)  # rooms are rectangles

    def remaining(self, state: State) -> int:
        """Fewest actions from ``state`` to the goal; exact."""
        if state.door_open:
            return self.distance(state.at, self.goal)
        behind = 1 + self.distance(self.threshold, self.goal)
        if state.carrying:
            return self.distance(state.at, self.threshold) + behind
        return self.distance(state.at, state.key) + 1 + self.distance(state.key, self.threshold) + behind

    def potential(self, state: State) -> float:
        """Share of the shortest way that is done: 0 at the start, 1 at the goal, negative further off."""
        return 1.0 - self.remaining(state) / max(1, self.remaining(self.initial))


@dataclass(frozen=True, slots=True)
class State:
    """What can change: the player's cell, the key's (where it lies, or the player's), and two facts."""

    at: Cell
    key: Cell
    carrying: bool
    door_open: bool


def act(layout: Layout, state: State, action: str) -> State | None:
    """The state after ``action``; None where it is rejected (no such action, or no effect here).

    Case and surrounding or repeated whitespace are ignored.
    """
    verb, _, noun = " ".join(action.lower().split()).partition(" ")
    if verb == "go" and noun in STEPS:
        to = state.at[0] + STEPS[noun][0], state.at[1] + STEPS[noun][1]
        if not layout.free(to, door_open=state.door_open):
            return None
        return replace(state, at=to, key=to if state.carrying else state.key)
    if (verb, noun) == ("take", "key") and not state.carrying and state.at == state.key:
        return replace(state, carrying=True)
    if (verb, noun) == ("drop", "key") and state.carrying:
        return replace(state, carrying=False)
    if (verb, noun) == ("open", "door") and state.carrying and not state.door_open and state.at == layout.threshold:
        return replace(state, door_open=True)
    return None


def sub_goal(before: State, after: State, layout: Layout) -> str | None:
    """The sub-goal that this step reached: ``"key"`` (picked up), ``"door"`` (opened) or ``"goal"``."""
    if after.at == layout.goal:
        return "goal"
    if after.door_open and not before.door_open:
        return "door"
    # Once the door is open the key serves nothing.
    return "key" if after.carrying and not before.carrying and not after.door_open else None


def expert_action(layout: Layout, state: State) -> str:
    """An action of a shortest way (the first in the order of :data:`ACTIONS`)."""
    now = layout.remaining(state)
    for action in ACTIONS:
        after = act(layout, state, action)
        if after is not None and layout.remaining(after) < now:
            return action
    raise DataError("the goal is reached, there is nothing left to do")


def rejected_actions(layout: Layout, state: State) -> list[str]:
    """All verb-noun pairs that the environment would reject here."""
    pairs = (f"{verb} {noun}" for verb, noun in product(VERBS, NOUNS))
    return [pair for pair in pairs if act(layout, state, pair) is None]


def noisy_expert(
    layout: Layout,
    rng: random.Random,
    *,
    invalid: float = 0.3,
    wander: float = 0.2,
    fumble: float | None = None,
    max_steps: int = 20,
) -> list[str]:
    """Actions of an unreliable player, up to the goal or the limit.

    Args:
        layout: what is played.
        rng: of the noise.
        invalid: probability of a verb-noun pair that is rejected where it is said.
        wander: probability, otherwise, of a random action that is executed instead of the expert's.
        fumble: in place of ``invalid`` where the expert would not walk but handle something (key, door).
        max_steps: limit.

    Raises:
        ConfigError: a probability outside [0, 1].
    """
    fumble = invalid if fumble is None else fumble
    for name, p in (("invalid", invalid), ("wander", wander), ("fumble", fumble)):
        if not 0 <= p <= 1:
            raise ConfigError(f"{name} must be in [0, 1], got {p}")
    state = layout.initial
    out: list[str] = []
    while state.at != layout.goal and len(out) < max_steps:
        best = expert_action(layout, state)
        if rng.random() < (invalid if best.startswith("go ") else fumble):
            action = rng.choice(rejected_actions(layout, state))
        elif rng.random() < wander:
            action = rng.choice([a for a in ACTIONS if act(layout, state, a) is not None])
        else:
            action = best
        out.append(action)
        state = act(layout, state, action) or state
    return out


def demonstration(
    policy: Any, task: Task, actions: Sequence[str], *, max_steps: int = 20, view: View = "compass"
) -> tuple[list[int], list[int], list[int]]:
    """A played game as ``(prompt_ids, response_ids, mask)`` for :class:`guerdon.training.SftTrainer`.

    Args:
        policy: has ``render`` and ``encode``.
        task: of :func:`grid_tasks`.
        actions: what is said; only these tokens are learned.
        max_steps, view: as in :class:`GridWorld`.
    """
    game = TextGrid(layout_of(task), max_steps=max_steps, view=view)
    response: list[int] = []
    mask: list[int] = []
    for action in actions:
        said, answer = policy.encode(action), policy.encode(f"\n{game.step(action)[0]}\n")
        response += [*said, *answer]
        mask += [1] * len(said) + [0] * len(answer)
    return policy.render(task.prompt), response, mask


def random_layout(
    rng: random.Random, *, width: int = 6, height: int = 4, shortest: tuple[int, int] = (8, 12)
) -> Layout:
    """A layout whose shortest way has between ``shortest[0]`` and ``shortest[1]`` actions.

    Raises:
        ConfigError: the grid is smaller than 3 by 1, or no such layout was found in a thousand draws.
    """
    if width < 3 or height < 1:
        raise ConfigError(f"the grid must be at least 3 by 1, got {width} by {height}")
    for _ in range(1000):
        wall = rng.randrange(1, width - 1)
        west = list(product(range(wall), range(height)))
        key, start = rng.sample(west, 2) if len(west) > 1 else (west[0], west[0])
        goal = rng.randrange(wall + 1, width), rng.randrange(height)
        layout = Layout(width, height, (wall, rng.randrange(height)), key, start, goal)
        if shortest[0] <= layout.remaining(layout.initial) <= shortest[1]:
            return layout
    raise ConfigError(f"no {width} by {height} grid has a shortest way of {shortest[0]} to {shortest[1]} actions")


def describe(layout: Layout, state: State, view: View = "compass") -> str:
    """What the player sees. ``"compass"`` points along shortest ways, ``"coordinates"`` gives all cells."""
    if view == "coordinates":
        cells = {"you": state.at, "door": layout.door, "goal": layout.goal}
        if not state.carrying:
            cells["key"] = state.key
        text = " ".join(f"{name} {x} {y}." for name, (x, y) in cells.items())
        return f"{text} {'key carried. ' if state.carrying else ''}door {'open' if state.door_open else 'closed'}."
    if state.door_open:
        west = state.at[0] < layout.door[0]
        return f"door open. goal {_compass(state.at, layout.door if west else layout.goal)}."
    door = f"door {_compass(state.at, layout.threshold)}."
    if state.carrying:
        return f"key carried. {door}"
    return f"key {_compass(state.at, state.key)}. {door}"


class TextGrid:
    """One game, in Gymnasium's words.

    Args:
        layout: what is played.
        max_steps: actions, rejected ones included, after which the game is cut off.
        view: see :func:`describe`.
    """

    def __init__(self, layout: Layout, *, max_steps: int = 20, view: View = "compass") -> None:
        if max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, got {max_steps}")
        if view not in ("compass", "coordinates"):
            raise ConfigError(f"view must be 'compass' or 'coordinates', got {view!r}")
        self.layout, self.max_steps, self.view = layout, max_steps, view
        self.reset()

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """Begin anew; ``seed`` is ignored, nothing here is random."""
        self.state = self.layout.initial
        self.steps = 0
        return describe(self.layout, self.state, self.view), self._info(True, None)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one action.

        Returns:
            observation, reward (1.0 on reaching the goal, else 0.0), terminated, truncated, and info:
            ``executed``, ``sub_goal`` (or None), ``remaining`` (fewest actions to the goal), ``potential``.

        Raises:
            DataError: the game is over.
        """
        if self.over:
            raise DataError("the game is over; call reset() first")
        before = self.state
        after = act(self.layout, before, action)
        self.state = after or before
        self.steps += 1
        reached = None if after is None else sub_goal(before, after, self.layout)
        terminated = reached == "goal"
        text = f"{NOTHING} " if after is None else ""
        text += "You reach the goal." if terminated else describe(self.layout, self.state, self.view)
        truncated = not terminated and self.steps >= self.max_steps
        return text, float(terminated), terminated, truncated, self._info(after is not None, reached)

    @property
    def over(self) -> bool:
        """Whether the goal is reached or the limit."""
        return self.state.at == self.layout.goal or self.steps >= self.max_steps

    def _info(self, executed: bool, reached: str | None) -> dict[str, Any]:
        return {
            "executed": executed,
            "sub_goal": reached,
            "remaining": self.layout.remaining(self.state),
            "potential": self.layout.potential(self.state),
        }


class GridEpisode:
    """One game as an episode of the rollout loop; each policy turn is one action.

    ``Trajectory.info`` then holds ``success``, ``steps``, and per action ``executed`` and ``sub_goals``, and
    ``potential`` at the start and after each action. The same facts stand in the ``meta`` of each observation.
    """

    def __init__(self, task: Task, *, max_steps: int, view: View) -> None:
        self._task = task
        self._game = TextGrid(layout_of(task), max_steps=max_steps, view=view)
        self._executed: list[bool] = []
        self._sub_goals: list[str | None] = []
        self._potential = [self._game.layout.potential(self._game.state)]
        self._success = False

    @property
    def prompt(self) -> Sequence[Message]:
        """What to do, and what the player sees first."""
        return self._task.prompt

    async def step(self, action: str) -> Observation:
        """Play the text of one policy turn."""
        text, _, terminated, truncated, info = self._game.step(action)
        self._executed.append(info["executed"])
        self._sub_goals.append(info["sub_goal"])
        self._potential.append(info["potential"])
        self._success = terminated
        stop = StopReason.DONE if terminated else StopReason.MAX_TURNS if truncated else None
        return Observation(f"\n{text}\n", done=stop is not None, stop=stop, meta=info)

    def result(self) -> tuple[Usage, Mapping[str, Any]]:
        """Nothing is spent; the ground truth of the game."""
        return Usage(), {
            "success": self._success,
            "steps": len(self._executed),
            "executed": tuple(self._executed),
            "sub_goals": tuple(self._sub_goals),
            "potential": tuple(self._potential),
        }


class GridWorld:
    """The environment: plays tasks of :func:`grid_tasks`.

    Args:
        max_steps: actions after which a game is cut off.
        view: what observations tell; make the tasks with the same one.
    """

    def __init__(self, *, max_steps: int = 20, view: View = "compass") -> None:
        self.max_steps, self.view = max_steps, view

    def start(self, task: Task, *, seed: int, group: int, member: int) -> GridEpisode:
        """Begin ``task``; the game is deterministic, so the seeds are not used.

        Raises:
            DataError: the task carries no layout.
        """
        return GridEpisode(task, max_steps=self.max_steps, view=self.view)


class ReachGoal(Reward):
    """1 where the goal was reached, else 0; the parts say what share of the actions was executed."""

    range = (0.0, 1.0)

    def score_one(self, trajectory: Trajectory) -> Score:
        """Read the episode's own report; a trajectory without one has no honest score."""
        if "success" not in trajectory.info:
            return Score.invalid(f"task {trajectory.task.id!r}: info has no 'success'; was it played in GridWorld?")
        executed = trajectory.info.get("executed") or ()
        share = sum(executed) / len(executed) if executed else 0.0
        return Score(float(trajectory.info["success"]), parts={"executed": share})


INSTRUCTION = "Fetch the key, open the door, go to the goal."


def grid_tasks(
    n: int,
    *,
    seed: int = 0,
    width: int = 6,
    height: int = 4,
    shortest: tuple[int, int] = (8, 12),
    view: View = "compass",
) -> list[Task]:
    """``n`` tasks with random layouts (which may repeat); ``meta["layout"]`` holds plain numbers."""
    rng = random.Random(seed)
    out = []
    for k in range(n):
        layout = random_layout(rng, width=width, height=height, shortest=shortest)
        prompt = f"{INSTRUCTION} {describe(layout, layout.initial, view)}"
        out.append(Task(f"grid-{seed}-{k}", prompt, "goal", {"layout": asdict(layout)}))
    return out


def layout_of(task: Task) -> Layout:
    """The layout that a task carries.

    Raises:
        DataError: it carries none.
    """
    given = task.meta.get("layout")
    if isinstance(given, Layout):
        return given
    try:
        return Layout(**given)  # type: ignore[arg-type]
    except TypeError:
        raise DataError(f"task {task.id!r} carries no layout in meta['layout']; make tasks with grid_tasks()") from None


def grid_words() -> tuple[str, ...]:
    """Words of this world as a tiny tokenizer wants them: one token each (see ``train_bpe(..., words=...)``)."""
    spaced = (f" {word}" for word in (*NOUNS, "goal", "carried", "open", "here"))
    return tuple(dict.fromkeys((INSTRUCTION, NOTHING, "You reach the goal.", *spaced, "key", "door", *VERBS)))


def _manhattan(a: Cell, b: Cell) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _compass(a: Cell, b: Cell) -> str:
    vertical = "south" if b[1] > a[1] else "north" if b[1] < a[1] else ""
    horizontal = "east" if b[0] > a[0] else "west" if b[0] < a[0] else ""
    return " ".join(filter(None, (vertical, horizontal))) or "here"
