"""Stop strings, applied to text whose generation the server does not control."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopCutter", "cut_at"]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """``text`` before the stop string that is complete first, as a model that generates it would stop."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text


class StopCutter:
    """Cuts a text that arrives in pieces before the first stop string.

    What could still become a stop string is held back, so nothing of one is ever shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.done = False
        self._held = ""

    def feed(self, piece: str) -> str:
        """Return what may be shown now."""
        if self.done:
            return ""
        text = self._held + piece
        shown = cut_at(text, self.stops)
        if len(shown) < len(text):
            self.done, self._held = True, ""
            return shown
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, once the text is complete."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
