"""The two real models that come from PyPI: SmolLM2-135M-Instruct and the minilm encoder."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from guerdon.errors import MissingDependency, ModelNotFound
from guerdon.policies import Encoder, LoraSpec, Policy, load_encoder, load_policy, make_batches, token_logprobs

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm2() -> Policy:
    try:
        return load_policy("smollm2", device="cpu")
    except (ModelNotFound, MissingDependency) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    try:
        return load_encoder("minilm", device="cpu")
    except MissingDependency as error:
        pytest.skip(str(error))


def test_greedy_text_is_sensible(smollm2: Policy) -> None:
    ids = smollm2.render([{"role": "user", "content": "What is the capital of France?"}])
    assert smollm2.decode(ids).endswith("<|im_start|>assistant\n")
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(smollm2.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert "Paris" in smollm2.decode(ids)
    assert smollm2.tokenizer.eos_token == "<|im_end|>"
    assert smollm2.max_context == 8192


def test_odd_text_round_trips(smollm2: Policy) -> None:
    text = "naïve café 日本語 🏳️‍🌈 <search> a:b </search>"
    assert smollm2.decode(smollm2.encode(text)) == text


def test_it_loads_in_seconds_from_the_cache(smollm2: Policy) -> None:
    start = time.process_time()
    load_policy("smollm2", device="cpu")
    assert time.process_time() - start < 10


def test_shared_prompts_are_exact_on_a_real_model_with_adapters(smollm2: Policy) -> None:
    policy = load_policy("smollm2", lora=LoraSpec(r=4), device="cpu")
    prompt = policy.render([{"role": "user", "content": "Name a river."}])
    items = [(prompt, policy.encode(text)) for text in ("The Nile.", "The Amazon River, in South America.", "Rhine")]
    (together,) = make_batches(items, groups=[0, 0, 0], max_tokens=1000)
    with torch.no_grad():
        ours = token_logprobs(policy, together).logprobs
        for k, (p, r) in enumerate(items):
            logits = smollm2.model(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1]
            expected = logits.double().log_softmax(-1).gather(-1, torch.tensor(r)[:, None])[:, 0]
            torch.testing.assert_close(ours[together.trajectory == k].double(), expected, atol=1e-3, rtol=1e-3)
        base = token_logprobs(policy.reference(), together).logprobs
    torch.testing.assert_close(base, ours, atol=1e-4, rtol=1e-4)


def test_embeddings_are_normalised_ordered_and_mean_something(encoder: Encoder) -> None:
    texts = [
        "What is the capital of France?",
        "Which city is France's seat of government?",
        "How do I boil an egg?",
        "x " * 3000,
        "",
    ]
    found = encoder.encode(texts)
    assert found.shape == (5, 384) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    assert found[0] @ found[1] > 0.6 > 0.3 > found[0] @ found[2]
    # Batching by length must not change a row.
    for k in (0, 2, 4):
        np.testing.assert_allclose(encoder.encode([texts[k]])[0], found[k], atol=1e-5)


def test_embeddings_agree_with_sentence_transformers(encoder: Encoder) -> None:
    reference = pytest.importorskip("sentence_transformers")
    from guerdon.policies.encoder import _minilm_folder

    texts = ["What is the capital of Peru?", "y " * 400]
    folder = _minilm_folder()
    assert Path(folder).is_dir()
    expected = reference.SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)
