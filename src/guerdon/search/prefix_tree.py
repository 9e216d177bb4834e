"""One tree of prefixes with rollout statistics: for process labels, tree search, and progress rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from guerdon.errors import DataError
from guerdon.search.prefix_values import Estimate
from guerdon.search.prefixes import Prefix

__all__ = ["Edge", "Node", "PrefixTree"]


@dataclass(eq=False)
class Node:
    """A prefix, and what is known about it.

    Args:
        prefix: from the prompt on.
        parent: the node that it extends; None at the root.
        depth: number of edges from the root (an edge may hold several steps).

    Attributes:
        children: in the order in which they were added.
        visits: how often a search passed through it.
        total: sum of what was backed up through it.
        estimate: Monte Carlo successes and rollouts from here.
        value: what a value model says, or what a search has made of it; NaN where nothing has.
        meta: a search's own notes.
    """

    prefix: Prefix
    parent: Node | None = None
    depth: int = 0
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    estimate: Estimate = Estimate()
    value: float = math.nan
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean of what was backed up (Q); NaN before the first visit."""
        return self.total / self.visits if self.visits else math.nan

    @property
    def step(self) -> str:
        """Text of the edge that leads here."""
        return self.prefix.text[len(self.parent.prefix.text) :] if self.parent is not None else ""

    @property
    def ended(self) -> bool:
        """The solution ends here."""
        return self.prefix.ended

    @property
    def path(self) -> list[Node]:
        """From the root to this node, both included."""
        node: Node | None = self
        out: list[Node] = []
        while node is not None:
            out.append(node)
            node = node.parent
        return out[::-1]


@dataclass(frozen=True, slots=True)
class Edge:
    """A labelled example: the step that leads from ``parent`` to ``prefix``, and the value after it.

    Args:
        parent, prefix: before and after the step.
        step: its text.
        value: share of successes after it (its soft label).
        n: rollouts behind it; 1 for a verified end.
    """

    parent: Prefix
    prefix: Prefix
    step: str
    value: float
    n: int

    @property
    def hard(self) -> bool:
        """The hard label: any success."""
        return self.value > 0


class PrefixTree:
    """Prefixes of solutions to one task; a prefix occurs once, however it is reached.

    Args:
        root: usually the empty prefix.
    """

    def __init__(self, root: Prefix) -> None:
        self.root = Node(root)
        self._nodes: dict[Any, Node] = {root.key: self.root}

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        """All nodes, in the order in which they were added."""
        return iter(list(self._nodes.values()))

    def __contains__(self, prefix: Prefix) -> bool:
        return prefix.key in self._nodes

    def get(self, prefix: Prefix) -> Node | None:
        """The node of a prefix, or None."""
        return self._nodes.get(prefix.key)

    def add(self, parent: Node, prefix: Prefix) -> Node:
        """The child of ``parent`` with this prefix; the node that is there already, where the prefix is known.

        Raises:
            DataError: the prefix does not extend the parent's, or the parent is not in this tree.
        """
        if self._nodes.get(parent.prefix.key) is not parent:
            raise DataError("the parent is no node of this tree")
        known = self._nodes.get(prefix.key)
        if known is not None:
            return known
        above = parent.prefix
        longer = len(prefix) > len(above) or (len(prefix) == len(above) and prefix.ended and not above.ended)
        if prefix.task.id != above.task.id or prefix.ids[: len(above)] != above.ids or not longer:
            raise DataError(f"a child must extend its parent's prefix; task {prefix.task.id!r}, {prefix.text!r}")
        node = Node(prefix, parent, parent.depth + 1)
        parent.children.append(node)
        self._nodes[prefix.key] = node
        return node

    def backpropagate(self, node: Node, value: float) -> None:
        """Count a visit with this value at the node and at everything above it."""
        for each in node.path:
            each.visits += 1
            each.total += value

    def leaves(self) -> list[Node]:
        """Nodes without children."""
        return [node for node in self._nodes.values() if not node.children]

    def best_child(self, node: Node, score: Callable[[Node], float]) -> Node:
        """The child of the greatest score; the earliest one where several have it.

        Raises:
            DataError: the node has no child.
        """
        if not node.children:
            raise DataError("the node has no child to choose from")
        return max(node.children, key=score)

    def examples(self) -> list[Edge]:
        """Every edge whose end has an estimate, in the order in which the nodes were added."""
        return [
            Edge(node.parent.prefix, node.prefix, node.step, node.estimate.value, node.estimate.n)
            for node in self._nodes.values()
            if node.parent is not None and node.estimate.n
        ]
