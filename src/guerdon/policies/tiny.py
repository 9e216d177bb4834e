"""Policies of a million parameters, made from a configuration and a seed in a second.

They are real Llama models with a real byte-level BPE tokenizer, so that everything that works on them
works on a model of any size. Tests, smoke scales and the demo use them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from guerdon.errors import ConfigError
from guerdon.policies.policy import Policy

__all__ = ["ATOMS", "TINY_TEMPLATE", "tiny_policy", "train_bpe"]

ATOMS = tuple(f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/"))
"""The control tags of the routing protocol, each a single token in a tiny vocabulary."""

TINY_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: what is the capital of Peru? Answer: Lima.",
    "0 1 2 3 4 5 6 7 8 9 10 + - * / = ( ) [ ] { } , . ; : ! ?",
)


def train_bpe(
    texts: Iterable[str], vocab_size: int = 1024, *, atoms: Sequence[str] = ATOMS, words: Sequence[str] = ()
) -> Any:
    """Train a byte-level BPE tokenizer; every Unicode text survives encoding and decoding.

    Args:
        texts: what the merges are learned from.
        vocab_size: at most so many entries, the 256 bytes and the special tokens included.
        atoms: strings that are always one token, wherever they stand.
        words: further such strings (frequent words that a tiny model should not have to spell).

    Raises:
        ConfigError: ``vocab_size`` does not even hold the bytes and the special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>"]
    fixed = [*dict.fromkeys((*atoms, *words))]
    least = 256 + len(special) + len(fixed)
    if vocab_size < least:
        raise ConfigError(
            f"vocab_size must be at least {least} "
            f"(256 bytes, {len(special)} special tokens, {len(fixed)} atoms), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(fixed),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Atoms are ordinary added tokens, not special ones: decoding with special tokens skipped keeps them.
    tokenizer.add_tokens([AddedToken(a, normalized=False, special=False) for a in fixed])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = TINY_TEMPLATE
    return fast


def tiny_policy(
    tokenizer: Any = None,
    *,
    texts: Iterable[str] | None = None,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    intermediate: int | None = None,
    vocab_size: int = 1024,
    max_context: int = 1024,
    value_head: bool = False,
    init_std: float = 0.06,
    seed: int = 0,
    name: str = "tiny",
) -> Policy:
    """Make a small Llama with random weights.

    Args:
        tokenizer: a fast tokenizer; by default one is trained on ``texts``.
        texts: for the tokenizer; a few built-in lines by default.
        hidden, layers, heads, intermediate: of the Llama; ``intermediate`` defaults to ``3 * hidden``.
        vocab_size: of a tokenizer trained here.
        max_context: most positions.
        value_head: add one.
        init_std: of the initial weights. The usual 0.02 suits widths of a thousand; at a width of a hundred
            it leaves attention flat for hundreds of steps.
        seed: of the weights. The global random state is left alone.

    Raises:
        ConfigError: sizes that do not fit together.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden % heads or (hidden // heads) % 2:
        raise ConfigError(
            f"hidden must be a multiple of heads with an even quotient, got hidden={hidden}, heads={heads}"
        )
    if tokenizer is None:
        tokenizer = train_bpe(list(texts) if texts is not None else _TEXTS, vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate or 3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_context,
        initializer_range=init_std,
        # Without biases a head can only look one position back once all embeddings share a direction: slow to learn.
        attention_bias=True,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.eval()
    policy = Policy(model, tokenizer, name=name)
    return policy.add_value_head() if value_head else policy
