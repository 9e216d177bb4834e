"""A policy: a causal language model, its tokenizer, and optionally a value head and adapters."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
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
        """Token ids of a conversation, ready for the assistant to go on."""
        ids = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if not ids:
            raise DataError("the conversation renders to no tokens; give at least one message")
        return list(ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens kept."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Strings that the tokenizer turns into special ids (end of message, roles); untrusted text must not hold them."""
        return tuple(str(t) for t in self.tokenizer.all_special_tokens)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that require a gradient, the value head's included."""
        head = list(self.value_head.parameters()) if self.value_head is not None else []
        return [p for p in [*self.model.parameters(), *head] if p.requires_grad]

    def add_value_head(self) -> Policy:
        """Give the policy a zero-initialised value head, and return it."""
        if self.value_head is None:
            config = self.model.config
            hidden = int(getattr(config, "hidden_size", None) or config.n_embd)
            self.value_head = ValueHead(hidden).to(self.device)
        return self

    def reference(self) -> Policy:
        """A frozen copy of the policy as it is now.

        With adapters it shares the base weights and takes the adapters off for its own forward passes, so
        it is the base model, not a snapshot of the adapters.
        """
        if self.adapted:
            model: Any = _WithoutAdapter(self.model)
        else:
            model = copy.deepcopy(self.model)
            model.requires_grad_(False)
            model.eval()
        return Policy(model, self.tokenizer, name=f"{self.name}-reference", max_context=self.max_context)

    def merged(self) -> Policy:
        """A copy whose adapters are folded into the weights."""
        if not self.adapted:
            return self
        model = copy.deepcopy(self.model).merge_and_unload()
        return Policy(model, self.tokenizer, name=self.name, value_head=self.value_head, max_context=self.max_context)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write weights (of adapters only, where there are any), tokenizer and value head to ``folder``, atomically.

        Raises:
            CheckpointError: it cannot be written (for example: no space left); nothing is left behind.
        """
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            with quiet():
                self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            if self.value_head is not None:
                from safetensors.torch import save_file

                save_file({k: v.contiguous() for k, v in self.value_head.state_dict().items()}, temporary / "value_head.safetensors")
            meta = {
                "format": _FORMAT, "name": self.name, "max_context": self.max_context, "base": self.base,
                "adapted": self.adapted, "dtype": str(self.dtype).removeprefix("torch."),
            }
            (temporary / "guerdon.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            if target.exists():
                retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
                os.replace(target, retired / "x")
                os.replace(temporary, target)
                shutil.rmtree(retired)
            else:
                os.replace(temporary, target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"cannot write the policy to {target}: {error.strerror or error}") from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str | torch.device = "auto", dtype: str = "auto") -> Policy:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: the folder is absent, incomplete or corrupt.
        """
        from guerdon.policies.store import load_saved

        return load_saved(cls, Path(folder), device=device, dtype=dtype)


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


class _WithoutAdapter(nn.Module):
    """A peft model seen with its adapters off. Parameters are shared, and frozen in the sense that no
    gradient is ever asked of this view."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)
        self.config = model.config

    def parameters(self, recurse: bool = True) -> Any:
        return self._model.parameters(recurse)

    def get_base_model(self) -> Any:
        return _BaseView(self._model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self._model.disable_adapter():
            return self._model(*args, **kwargs)


class _BaseView:
    """Base model of a peft model whose trunk runs with the adapters disabled."""

    base_model_prefix = "trunk"

    def __init__(self, model: Any) -> None:
        base = model.get_base_model()
        self._head = base.get_output_embeddings()
        self.trunk = _Trunk(model, getattr(base, base.base_model_prefix))

    def get_output_embeddings(self) -> Any:
        return self._head


class _Trunk:
    def __init__(self, model: Any, trunk: nn.Module) -> None:
        self._model, self._trunk = model, trunk

    def parameters(self) -> Any:
        return self._trunk.parameters()

    def __call__(self, **kwargs: Any) -> Any:
        with torch.no_grad(), self._model.disable_adapter():
            return self._trunk(**kwargs)
