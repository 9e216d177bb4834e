"""A policy: a causal language model, its tokenizer, and optionally a value head and adapters."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from guerdon.errors import CheckpointError, DataError
from guerdon.policies.heads import ValueHead
from guerdon.types import Message

__all__ = ["Policy"]

_FORMAT = 1


class Policy:
    """What is sampled from and trained.

    Args:
        model: a transformers causal language model, or a peft model around one.
        tokenizer: a Hugging Face fast tokenizer. One without a chat template gets a plain one: each
            message as ``<role>: <content>`` on its own lines, then ``assistant:``.
        name: for messages and metrics.
        value_head: maps the last hidden state to a value.
        max_context: most tokens of prompt and response; the model's own limit by default.
        base: id, folder or name of the base model where ``model`` carries adapters, so that a saved
            adapter can find its base again.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "policy",
        value_head: nn.Module | None = None,
        max_context: int | None = None,
        base: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.value_head = value_head
        self.base = base
        limit = getattr(model.config, "max_position_embeddings", None) or 32_768
        self.max_context = min(max_context or limit, limit)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not getattr(tokenizer, "chat_template", None):
            tokenizer.chat_template = PLAIN_TEMPLATE

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def adapted(self) -> bool:
        """Whether the model carries adapters."""
        return hasattr(self.model, "get_base_model")

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant to go on.

        Raises:
            DataError: it renders to nothing, or the model's chat template refuses it (an unknown role, ...).
        """
        from jinja2 import TemplateError

        if not messages:
            raise DataError("a conversation needs at least one message, got none")
        clean = [{key: _encodable(value) for key, value in m.items()} for m in messages]
        try:
            ids = self.tokenizer.apply_chat_template(
                clean, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise DataError(f"the chat template of {self.name!r} refuses the conversation: {error}") from error
        if not ids:
            raise DataError(f"the chat template of {self.name!r} renders the conversation to no tokens")
        return list(ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, nothing added. Lone surrogates, which no encoding has, count as ``?``."""
        return list(self.tokenizer.encode(_encodable(text), add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens kept."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Strings that the tokenizer turns into special ids (end of message, roles).

        Untrusted text must not hold them.
        """
        return tuple(str(t) for t in self.tokenizer.all_special_tokens)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that require a gradient, the value head's included."""
        head = list(self.value_head.parameters()) if self.value_head is not None else []
        return [p for p in [*self.model.parameters(), *head] if p.requires_grad]

    def add_value_head(self) -> Policy:
        """Give the policy a zero-initialised value head, and return it."""
        if self.value_head is None:
            config = self.model.config.get_text_config()
            hidden = int(getattr(config, "hidden_size", None) or config.n_embd)
            self.value_head = ValueHead(hidden).to(self.device)
        return self

    def reference(self) -> Policy:
        """A frozen copy of the policy as it is now.

        With adapters it is the base model, not a snapshot of the adapters: a model of its own without them,
        whose weights are the very tensors of this one. Nothing is copied, and nothing is switched off and on.
        """
        if self.adapted:
            model = copy.deepcopy(self.model, _shared(self.model)).unload()
        else:
            model = copy.deepcopy(self.model)
            model.requires_grad_(False)
        model.eval()
        return Policy(model, self.tokenizer, name=f"{self.name}-reference", max_context=self.max_context)

    def merged(self) -> Policy:
        """A copy whose adapters are folded into the weights; the policy itself where it has none."""
        if not self.adapted:
            return self
        model = copy.deepcopy(self.model).merge_and_unload()
        head = copy.deepcopy(self.value_head)
        return Policy(model, self.tokenizer, name=self.name, value_head=head, max_context=self.max_context)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write weights, tokenizer and value head to ``folder``, atomically; an older save there is replaced.

        Of a policy with adapters only these are written, next to the name and a fingerprint of the base model;
        a base that no name leads to is written too.

        Raises:
            CheckpointError: it cannot be written (for example: no space left); nothing is left behind.
        """
        target = Path(folder)
        temporary = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
        try:
            temporary.mkdir(parents=True)
            self._write(temporary)
            _publish(temporary, target)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(f"cannot write the policy to {target}: {reason}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        with quiet():
            self.model.save_pretrained(folder)
            if self.adapted and self.base is None:
                base = Policy(copy.deepcopy(self.model, _shared(self.model)).unload(), self.tokenizer, name=self.name)
                base.model.save_pretrained(folder / "base")
                self.tokenizer.save_pretrained(folder / "base")
        self.tokenizer.save_pretrained(folder)
        if self.value_head is not None:
            state = {k: v.contiguous() for k, v in self.value_head.state_dict().items()}
            save_file(state, folder / "value_head.safetensors")
        meta = {
            "format": _FORMAT,
            "name": self.name,
            "max_context": self.max_context,
            "adapted": self.adapted,
            "base": self.base,
            "base_fingerprint": fingerprint(self.model) if self.adapted else None,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        (folder / "guerdon.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, device: str | torch.device = "auto", dtype: str = "auto"
    ) -> Policy:
        """Read what :meth:`save` wrote; ``dtype="auto"`` keeps the number format it was saved in.

        Raises:
            CheckpointError: the folder is absent, incomplete or corrupt.
        """
        from guerdon.policies.store import load_saved

        return load_saved(cls, Path(folder), device=device, dtype=dtype)


def fingerprint(model: Any) -> str:
    """A short hash of a model's weights without adapters: of every tensor's name, shape and some of its entries."""
    digest = hashlib.sha256()
    found = {n.removeprefix("base_model.model.").replace(".base_layer.", "."): p for n, p in model.named_parameters()}
    for name in sorted(n for n in found if ".lora_" not in n):
        tensor = found[name].detach().reshape(-1)
        some = tensor[:: max(1, tensor.numel() // 256)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(found[name].shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _shared(model: Any) -> dict[int, Any]:
    """A memo for :func:`copy.deepcopy` with which modules are copied and tensors are not."""
    return {id(t): t for t in (*model.parameters(), *model.buffers())}


def _publish(temporary: Path, target: Path) -> None:
    """Put a finished folder in its place; on failure what was there stays."""
    mode = temporary.stat().st_mode & 0o666
    for path in temporary.rglob("*"):
        if path.is_file():
            # Some writers make private files whatever the umask says.
            path.chmod(mode)
    if not target.exists():
        os.replace(temporary, target)
        return
    retired = temporary.with_name(temporary.name + ".old")
    os.replace(target, retired)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(retired, target)
        raise
    shutil.rmtree(retired, ignore_errors=True)


PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars over ours, and leave its setting as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
