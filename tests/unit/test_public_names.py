"""Every public name can be imported from its package, and no module hides one."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import guerdon

PACKAGES = [
    m.name
    for m in pkgutil.walk_packages(guerdon.__path__, "guerdon.")
    if m.ispkg and not m.name.endswith(("cli", "papers"))
]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names(package: str) -> None:
    module = importlib.import_module(package)
    hidden = {m.name for m in pkgutil.iter_modules(module.__path__)}
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
        home = getattr(module, "_HOME", {})
        assert name not in hidden or name not in home, f"{package}.{name} is a module and a public name"


def test_registered_parts_exist() -> None:
    from guerdon.parts import CREDIT, ENVIRONMENTS, OBJECTIVES, REWARDS, SHAPES

    for registry in (CREDIT, ENVIRONMENTS, OBJECTIVES, REWARDS, SHAPES):
        for name in registry:
            assert callable(registry[name]), name


def test_importing_guerdon_is_light() -> None:
    code = "import sys, guerdon; assert not {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
