"""Names to parts: lazy, extensible, and helpful when a name is wrong."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

import guerdon.registry as module
from guerdon.errors import ConfigError, UnknownName
from guerdon.registry import Registry


def test_a_builtin_is_imported_when_it_is_asked_for() -> None:
    sys.modules.pop("colorsys", None)
    parts = Registry("thing", {"rgb": "colorsys:rgb_to_hsv"})
    assert list(parts) == ["rgb"] and parts.path("rgb") == "colorsys:rgb_to_hsv" and "rgb" in parts
    assert "colorsys" not in sys.modules
    assert parts.create("rgb", 0.0, 0.0, 1.0) == (pytest.approx(2 / 3), 1.0, 1.0)


def test_an_unknown_name_is_told_what_is_near() -> None:
    parts = Registry("reward", {"exact_match": "guerdon.rewards:ExactMatch"})
    with pytest.raises(UnknownName, match=r"unknown reward 'exact_mach'.*exact_match"):
        parts["exact_mach"]
    assert "exact_mach" not in parts


def test_a_name_is_given_once() -> None:
    parts = Registry("thing")

    @parts.register("one")
    def one() -> int:
        return 1

    assert parts.create("one") == 1 and len(parts) == 1
    assert parts.register("one", one) is one  # the same part again is no conflict
    with pytest.raises(ConfigError, match="'one' is already registered"):
        parts.register("one", "colorsys:rgb_to_hsv")


def test_other_packages_add_parts_and_cannot_replace_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("theirs", "colorsys:hsv_to_rgb", "guerdon.thing"),
        EntryPoint("ours", "colorsys:hsv_to_rgb", "guerdon.thing"),
    ]
    monkeypatch.setattr(module, "entry_points", lambda group: points if group == "guerdon.thing" else [])
    parts = Registry("thing", {"ours": "colorsys:rgb_to_hsv"})
    assert list(parts) == ["ours", "theirs"]
    assert parts["theirs"].__name__ == "hsv_to_rgb" and parts["ours"].__name__ == "rgb_to_hsv"


def test_every_builtin_name_leads_somewhere() -> None:
    import guerdon.policies
    import guerdon.rewards
    import guerdon.routing  # noqa: F401 - they fill the registries

    for kind, parts in module.KINDS.items():
        for name in parts:
            assert parts[name] is not None, (kind, name)
