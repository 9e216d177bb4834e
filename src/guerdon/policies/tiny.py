"""Policies of a million parameters, made from a configuration and a seed in a second.

They are real Llama models with a real byte-level BPE tokenizer, so that everything that works on them
works on a model of any size. Tests, smoke scales and the demo use them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

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
    init: Literal["random", "recall"] = "random",
    rope_theta: float | None = None,
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
        init: ``"recall"`` starts from weights that already look back and look up (see :func:`_recall`), as every
            pretrained model does; two layers and two or three heads at least. The rest stays random.
        rope_theta: base of the rotary frequencies; 10,000, and 1,000,000 with ``init="recall"``.
        seed: of the weights. The global random state is left alone.

    Raises:
        ConfigError: sizes that do not fit together.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if init not in ("random", "recall"):
        raise ConfigError(f"init must be 'random' or 'recall', got {init!r}")
    if init == "recall" and (layers < 2 or heads not in (2, 3) or hidden % 3 or hidden // heads < 48):
        raise ConfigError(
            "init='recall' needs two layers, two or three heads of at least 48 dimensions and a hidden size that is a "
            f"multiple of 3 (192 with 2 heads, say), got layers={layers}, heads={heads}, hidden={hidden}"
        )
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
        rope_parameters={
            "rope_type": "default",
            "rope_theta": rope_theta or (1_000_000.0 if init == "recall" else 10_000.0),
        },
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
        if init == "recall":
            _recall(model)
    model.eval()
    policy = Policy(model, tokenizer, name=name)
    return policy.add_value_head() if value_head else policy


_EMBEDDING, _NORM = 0.5, 0.3
_BACK, _MATCH, _COPY = 6.0, 18.0, 2.0


@torch.no_grad()
def _recall(model: Any) -> None:
    """Overwrite some random weights by a circuit that finds what followed a token before, and says it.

    The residual stream has three thirds. The first holds a token's own embedding. Head k of layer 0 looks k + 1
    positions back, through its biases and the fast rotary dimensions alone, and writes what it finds into the
    following third. Head 0 of layer 1 compares a token with the token before each earlier position, in the slow
    rotary dimensions, which distance hardly turns, and adds the token that stands there to the first third, from
    which the tied output reads. These are the induction heads of Olsson et al. 2022 ("In-context Learning and
    Induction Heads"), which large models grow early in pretraining; that initial weights with structure spare small
    models the wait is known from Trockman and Kolter 2023 ("Mimetic Initialization").

    Why the defaults of Llama would not do: with a base of 10,000 and heads of 32 dimensions, rotation by distance
    leaves some ten dimensions in which contents can be compared over a prompt's length; and a final norm of gain 1
    over embeddings of length 1 takes hundreds of steps to become sure of any token.
    """
    trunk, config = model.model, model.config
    heads, width = config.num_attention_heads, config.hidden_size // 3
    size = config.hidden_size // heads
    theta = float(config.rope_parameters["rope_theta"])
    # Rotary dimensions i and i + size / 2 turn together, by this angle per position.
    turn = theta ** -(torch.arange(0, size, 2).float() / size)
    trunk.norm.weight.fill_(_NORM)
    trunk.embed_tokens.weight.normal_(0.0, _EMBEDDING)
    trunk.embed_tokens.weight[:, width:] *= 0.1

    look, copied = trunk.layers[0].self_attn, torch.eye(width)
    fast = (turn >= 0.2).float()
    amplitude = (_BACK / ((1 - turn.cos()) * fast).sum() * size**0.5) ** 0.5
    for back in (1, 2):
        rows = slice((back - 1) * size, back * size)
        look.q_proj.bias[rows] = amplitude * torch.cat([fast, torch.zeros_like(fast)])
        look.k_proj.bias[rows] = amplitude * torch.cat([fast * (back * turn).cos(), fast * (back * turn).sin()])
        look.q_proj.weight[rows] *= 0.3
        look.k_proj.weight[rows] *= 0.3
        look.v_proj.weight[rows] = 0.0
        look.v_proj.weight[rows][:width, :width] = copied
        look.o_proj.weight[:, rows] = 0.0
        look.o_proj.weight[back * width : (back + 1) * width, rows][:, :width] = _EMBEDDING * copied

    match = trunk.layers[1].self_attn
    slow = torch.nonzero(turn < 0.006)[:, 0].tolist()
    dims = slow + [i + size // 2 for i in slow]
    scale = (_MATCH * size**0.5 / len(dims)) ** 0.5
    match.q_proj.weight[:size] *= 0.1
    match.k_proj.weight[:size] *= 0.1
    for direction, dim in zip(torch.linalg.qr(torch.randn(width, width))[0], dims, strict=False):
        match.q_proj.weight[dim] = 0.0
        match.k_proj.weight[dim] = 0.0
        match.q_proj.weight[dim, :width] = scale * direction
        match.k_proj.weight[dim, width : 2 * width] = scale * direction
    match.v_proj.weight[:size] = 0.0
    match.v_proj.weight[:width, :width] = copied
    match.o_proj.weight[:, :size] = 0.0
    match.o_proj.weight[:width, :width] = _COPY * _EMBEDDING * copied
