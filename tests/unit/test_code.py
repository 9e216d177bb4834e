"""Code by its tests: what passes, what fails, and what tries to cheat."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.rewards.code import CodeTests, TestSuite, equal_output, equal_value, extract_code, read_suite
from guerdon.sandbox import Limits
from guerdon.sandbox.codec import Unsupported, decode, encode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what the kernel enforces is Linux's")
SHORT = Limits(cpu_s=1, wall_s=8)


def value(completion: str, reference: object, **options) -> float:
    return CodeTests(limits=SHORT, **options).text(completion=completion, reference=reference).value


ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```"
ASSERTS = {
    "asserts": [
        "assert add(1, 2) == 3",
        "assert add(2, 2) == 5",
        "x = add(1, 1)\nassert add(x, 1) == 3",
        "try:\n    add(1, 'a')\n    assert False\nexcept TypeError:\n    pass",
    ],
    "names": ["add"],
}


def test_partial_credit_is_the_share_of_tests() -> None:
    assert value(ADD, ASSERTS) == 0.75
    assert value(ADD, ASSERTS, partial=False) == 0.0
    assert value("def f(x): return 2 * x", {"inputs": [[1], [2]], "outputs": [2, 5], "fn_name": "f"}) == 0.5
    assert value("print(int(input()) * 2)", [{"input": "2\n", "output": "4"}, {"input": "3", "output": "7"}]) == 0.5
    check = {"asserts": "def check(candidate):\n    assert candidate([3, 1]) == [1, 3]\ncheck(candidate)"}
    assert value("def f(xs): return sorted(xs)", {**check, "names": {"candidate": "f"}}) == 1.0
    method = [{"call": "Solution.m", "args": [1], "expected": 2}]
    assert value("class Solution:\n    def m(self, x): return x + 1", method) == 1.0


def test_the_last_fence_counts_and_prose_is_no_code() -> None:
    assert extract_code("```python\na\n```\nbetter:\n```python\nb\n```") == "b"
    assert extract_code("```\na = 1\n```") == "a = 1"
    assert extract_code("```sql\nSELECT 1\n```", "sql") == "SELECT 1"
    assert extract_code("x = 1") == "x = 1"
    assert extract_code("x = 1", bare=False) is None
    assert extract_code("") is None
    score = CodeTests(bare=False).text(completion="I cannot.", reference=[{"input": "", "output": ""}])
    assert score.value == 0.0 and score.parts["ran"] == 0.0


@pytest.mark.parametrize(
    "cheat",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "class E:\n    def __eq__(self, other): return True\ndef add(a, b): return E()",
        "class E(int):\n    def __eq__(self, other): return True\ndef add(a, b): return E()",
        "import builtins\nbuiltins.AssertionError = ValueError\ndef add(a, b): return 0",
        "import builtins\nbuiltins.all = lambda *a: True\nbuiltins.isinstance = lambda *a: True\ndef add(a, b): return 0",
        "import gc, sys\ndef add(a, b):\n    for o in gc.get_objects():\n        if isinstance(o, str) and 'assert add' in o: return eval(o.split('==')[1])\n    return None",
        "import inspect\ndef add(a, b):\n    return [f.code_context for f in inspect.stack()]",
        "import os\ndef add(a, b):\n    os.write(3, b'[true, 3]\\n' * 9)\n    os._exit(0)",
        "def add(a, b):\n    while True: pass",
        "def add(a, b): return add(a, b)",
        "add = 3",
        "\0",
        "def add(a, b):\n    return " + "(" * 500 + ")" * 500,
    ],
)
def test_cheating_earns_nothing(cheat: str) -> None:
    tests = {"asserts": ["assert add(1, 2) == 3 and add(5, 5) == 10"], "names": ["add"]}
    assert value(f"```python\n{cheat}\n```", tests) == 0.0
    assert value(ADD, tests) == 1.0


def test_early_output_of_a_program_that_fails_later_does_not_count() -> None:
    assert value("print(4)\nraise ValueError", [{"input": "", "output": "4"}]) == 0.0


@pytest.mark.parametrize(
    "reference",
    [
        None,
        "x == 1",
        [],
        {},
        {"tests": []},
        {"inputs": [1], "outputs": []},
        [{"input": "1"}],
        {"asserts": ["assert f()"]},
    ],
)
def test_a_task_without_readable_tests_is_an_error_and_never_a_zero(reference: object) -> None:
    with pytest.raises(DataError):
        read_suite(reference, "t1")
    with pytest.raises(RewardError, match="text"):
        value("print(1)", reference)


def test_outputs_and_values_are_compared_as_graders_do() -> None:
    assert equal_output("1 2 \n\n", "1 2") and not equal_output("1 2", "12") and not equal_output("1\n2", "1 2")
    assert equal_output("0.3333", "0.33333", 1e-3) and not equal_output("0.3333", "0.33333")
    assert not equal_output("nan", "1.0", 1e-3)
    assert equal_value((1, [2]), [1, (2,)]) and not equal_value(True, 1) and equal_value(1.0, 1)
    assert equal_value(math.nan, math.nan) and not equal_value("1", 1) and equal_value({1: [2.0]}, {1: (2,)})
    assert equal_value(0.1 + 0.2, 0.3, 1e-9) and not equal_value(0.1 + 0.2, 0.3)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="language"):
        CodeTests(language="rust")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tolerance"):
        CodeTests(tolerance=-1)


def test_a_suite_is_read_from_every_form() -> None:
    assert read_suite({"tests": [{"input": "1", "output": "2"}]}) == TestSuite(stdin=(("1", "2"),))
    assert len(read_suite({"inputs": ["1"], "outputs": ["2"]}).stdin) == 1
    assert read_suite({"call": "f", "args": [1], "expected": 2}).calls == (("f", (1,), {}, 2),)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)  # fmt: skip


@given(plain)
@settings(max_examples=200, deadline=None)
def test_plain_values_survive_the_way_through_json(value: object) -> None:
    import json

    assert decode(json.loads(json.dumps(encode(value)))) == value


@pytest.mark.parametrize("form", [{"x": 1}, {}, {"t": 1}, {"b": "zz"}, {"i": "q"}, {"c": []}, {"d": [[1]]}])
def test_forged_forms_are_refused(form: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(form)


def test_objects_have_no_plain_form() -> None:
    with pytest.raises(Unsupported):
        encode(object())
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(Unsupported, match="64 levels"):
        encode(deep)
