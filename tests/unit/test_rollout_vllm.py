"""vLLM behind the engine protocol, as far as it can be tried without it: new weights on their way to its workers."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from guerdon.errors import EngineError, MissingDependency
from guerdon.policies import tiny_policy
from guerdon.rollout.vllm_weights import EXTENSION, TakesWeights


class Runner(TakesWeights):
    """A worker of vLLM with a model that keeps what it is given."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.model_runner = SimpleNamespace(
            model=SimpleNamespace(load_weights=lambda pairs: self.weights.update(pairs))
        )


class MadeUpVllm:
    """Its asynchronous engine, as far as weights go."""

    def __init__(self, workers: int) -> None:
        self.workers = [Runner() for _ in range(workers)]
        self.resets = 0
        self.model_config = SimpleNamespace(max_model_len=64)

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[int]:
        return [getattr(worker, method)(*args) for worker in self.workers]

    async def reset_prefix_cache(self) -> None:
        self.resets += 1


@pytest.fixture
def vllm(monkeypatch):
    """Modules with the names that the engine imports."""
    made = {"vllm": {"AsyncEngineArgs": dict, "SamplingParams": dict}, "vllm.v1": {}, "vllm.v1.engine": {}}
    made["vllm.sampling_params"] = {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=2)}
    made["vllm.v1.engine.async_llm"] = {"AsyncLLM": SimpleNamespace(from_engine_args=lambda arguments: arguments)}
    for name, content in made.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("workers", [1, 2])
async def test_every_worker_gets_the_new_weights(vllm, workers: int) -> None:
    from guerdon.rollout import VllmEngine

    policy = tiny_policy(hidden=16, layers=1, heads=2)
    inside = MadeUpVllm(workers)
    engine = VllmEngine("model", tokenizer=policy.tokenizer, engine=inside)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(1.0)
    await engine.update_weights(policy)
    names = {name for name, _ in policy.model.named_parameters()}
    for worker in inside.workers:
        assert set(worker.weights) == names
        for name, p in policy.model.named_parameters():
            torch.testing.assert_close(worker.weights[name], p.detach())
    assert inside.resets == 1


async def test_workers_that_took_nothing_are_an_error(vllm) -> None:
    from guerdon.rollout import VllmEngine

    policy = tiny_policy(hidden=16, layers=1, heads=2)
    inside = MadeUpVllm(0)
    with pytest.raises(EngineError, match="took"):
        await VllmEngine("model", tokenizer=policy.tokenizer, engine=inside).update_weights(policy)


def test_vllm_is_told_where_its_workers_learn_to_take_weights(vllm, monkeypatch) -> None:
    from guerdon.rollout import VllmEngine

    seen: dict[str, Any] = {}

    def started(arguments: dict[str, Any]) -> MadeUpVllm:
        seen.update(arguments)
        return MadeUpVllm(1)

    monkeypatch.setattr(sys.modules["vllm.v1.engine.async_llm"].AsyncLLM, "from_engine_args", started)
    VllmEngine("model", tokenizer=tiny_policy(hidden=16, layers=1, heads=2).tokenizer)
    assert seen["worker_extension_cls"] == EXTENSION == "guerdon.rollout.vllm_weights.TakesWeights"


def test_without_vllm_the_error_says_what_to_install(monkeypatch) -> None:
    from guerdon.training.engines import make_engine

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependency, match=r"guerdon\[vllm\]"):
        make_engine(tiny_policy(hidden=16, layers=1, heads=2), kind="vllm")
