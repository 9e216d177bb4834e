"""The in-memory dataset: checked on the way in, shuffled by epoch, resumable."""

from __future__ import annotations

import pytest

from guerdon.environments import Dataset
from guerdon.errors import CheckpointError, DataError
from guerdon.types import Task

TASKS = [Task(f"t{k}", f"question {k}", [str(k)]) for k in range(10)]


def test_it_is_a_sequence() -> None:
    data = Dataset(TASKS)
    assert len(data) == 10 and data[3] is TASKS[3] and data[-2:] == TASKS[-2:] and list(data) == TASKS


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    data = Dataset(TASKS, seed=1)
    assert sorted(data.order(0)) == sorted(data.order(1)) == list(range(10))
    assert data.order(0) != data.order(1) and data.order(0) == Dataset(TASKS, seed=1).order(0)
    assert data.order(0) != Dataset(TASKS, seed=2).order(0)


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4, 4), (25,), (0, 1, 24)])
def test_batches_of_any_size_walk_the_same_order(sizes: tuple[int, ...]) -> None:
    data = Dataset(TASKS)
    taken = [t.id for n in sizes for t in data.take(n)]
    expected = [TASKS[i].id for epoch in range(3) for i in data.order(epoch)]
    assert taken == expected[: sum(sizes)]


def test_a_resumed_dataset_goes_on_where_it_stopped() -> None:
    whole = Dataset(TASKS)
    expected = [t.id for t in whole.take(17)][13:]
    first = Dataset(TASKS)
    first.take(13)
    second = Dataset(TASKS)
    second.load_state_dict(first.state_dict())
    assert [t.id for t in second.take(4)] == expected


def test_a_position_of_other_data_is_refused() -> None:
    state = Dataset(TASKS).state_dict()
    with pytest.raises(CheckpointError, match="size 10, this dataset 9"):
        Dataset(TASKS[:9]).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed 0, this dataset 1"):
        Dataset(TASKS, seed=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "dataset is empty"),
        ([Task("a", "q", [])], "task 'a' has an empty list of gold answers"),
        ([Task("b", "q", ["x", " "])], "task 'b' has a missing or blank gold"),
        ([Task("c", "q", None)], "task 'c' has a missing or blank gold"),
        ([TASKS[0], TASKS[0]], "task id 't0' occurs twice"),
    ],
)
def test_bad_data_is_named(tasks: list[Task], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Dataset(tasks)
