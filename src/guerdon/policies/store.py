"""From a name to a policy: built-in small models, hub ids, folders, GGUF files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from guerdon.errors import CheckpointError, ConfigError, MissingDependency, ModelNotFound, nearest
from guerdon.policies.lora import LoraSpec, add_lora
from guerdon.policies.policy import Policy, quiet
from guerdon.registry import registry

__all__ = ["load_policy", "load_saved", "resolve_device", "resolve_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

POLICIES = registry(
    "policy",
    {"tiny": "guerdon.policies.tiny:tiny_policy", "smollm2": "guerdon.policies.smollm2:load_smollm2"},
)


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is the GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``"auto"`` is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slower."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def load_policy(
    ref: str | Path,
    *,
    lora: LoraSpec | None = None,
    value_head: bool = False,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    seed: int = 0,
) -> Policy:
    """Load a language model as a policy.

    Args:
        ref: a registered name (``tiny``, ``smollm2``), a folder, a ``.gguf`` file, or a hub id.
        lora: add adapters; only they will be trained.
        value_head: add a value head, if there is none.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        seed: of whatever has to be initialised.

    Raises:
        ModelNotFound: nothing loadable has this name here.
        CheckpointError: a folder or file is there but broken.
    """
    where = resolve_device(device)
    number = resolve_dtype(dtype, where)
    text = str(ref)
    path = Path(text).expanduser()
    if text == "tiny":
        policy: Policy = POLICIES["tiny"](seed=seed)
    elif text in POLICIES:
        policy = POLICIES[text]()
    elif path.suffix == ".gguf":
        policy = _from_gguf(path)
    elif path.is_dir():
        policy = Policy.load(path, device="cpu", dtype="float32" if dtype == "auto" else dtype)
    elif path.exists():
        raise ModelNotFound(f"policy {text!r} is a file; give a folder, a .gguf file, a hub id, or one of {', '.join(POLICIES)}")
    else:
        policy = _from_hub(text)
    policy.model.to(device=where, dtype=number)
    if policy.value_head is not None:
        policy.value_head.to(where)
    if lora is not None:
        if policy.adapted:
            raise ConfigError(f"policy {text!r} already carries adapters; load it without lora, or merge it first")
        policy = Policy(
            add_lora(policy.model, lora, seed=seed), policy.tokenizer, name=policy.name,
            value_head=policy.value_head, max_context=policy.max_context, base=text,
        )
    policy.model.eval()
    return policy.add_value_head() if value_head else policy


def load_saved(cls: type[Policy], folder: Path, *, device: str | torch.device, dtype: str) -> Policy:
    """Read a folder in transformers' format, with Guerdon's additions where it has them."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give one that holds a saved policy")
    meta_path = folder / "guerdon.json"
    try:
        meta: dict[str, Any] = json.loads(meta_path.read_text(encoding="utf-8")) if meta_path.is_file() else {}
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{meta_path} is not JSON: {error}") from error
    where = resolve_device(device)
    number = resolve_dtype(meta.get("dtype", dtype) if dtype == "auto" else dtype, where)
    try:
        with quiet():
            model, tokenizer = _read(folder, meta)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no readable model: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:
        # safetensors raises a type of its own for damaged files.
        if type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"{folder} holds a damaged weights file: {error}") from error
    model.to(device=where, dtype=number)
    model.eval()
    policy = cls(
        model, tokenizer, name=meta.get("name", folder.name), max_context=meta.get("max_context"), base=meta.get("base")
    )
    head = folder / "value_head.safetensors"
    if head.is_file():
        from safetensors.torch import load_file

        policy.add_value_head()
        assert policy.value_head is not None
        policy.value_head.load_state_dict(load_file(head))
    return policy


def _read(folder: Path, meta: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if meta.get("adapted"):
        from peft import PeftModel

        if not meta.get("base"):
            raise CheckpointError(f"{folder} holds adapters but not the name of their base model; load the base and add them by hand")
        base = load_policy(meta["base"], device="cpu", dtype="float32")
        return PeftModel.from_pretrained(base.model, folder, is_trainable=True), tokenizer
    return _causal(folder, local_files_only=True), tokenizer


def _causal(ref: str | Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(ref, output_loading_info=True, **options)
    if report["missing_keys"]:
        raise ValueError(f"weights are missing: {sorted(report['missing_keys'])[:3]}")
    return model


def _from_hub(ref: str) -> Policy:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(ref)
        model = _causal(ref)
    except (OSError, ValueError) as error:
        hint = nearest(ref, POLICIES) or "; give a folder or a .gguf file if you have the model"
        raise ModelNotFound(
            f"policy {ref!r} is neither built in ({', '.join(POLICIES)}) nor a folder here, and the model hub did not give it{hint}"
        ) from error
    return Policy(model, tokenizer, name=ref)


def _from_gguf(path: Path) -> Policy:
    if not path.is_file():
        raise ModelNotFound(f"{path} does not exist; give the path of a .gguf file")
    model, tokenizer = read_gguf(path)
    return Policy(model, tokenizer, name=path.stem)


def _plain(model: Any) -> Any:
    """The same weights in a model that does not consider itself quantised, so that it can be saved and trained."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain.to(model.dtype)


def read_gguf(path: Path) -> tuple[Any, Any]:
    """Dequantise a GGUF file to a float32 model, with its tokenizer.

    Raises:
        MissingDependency: the gguf package is absent.
        CheckpointError: the file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependency("reading a .gguf file needs the gguf package: pip install 'guerdon[gguf]'") from error
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = _plain(_causal(path.parent, gguf_file=path.name, dtype=torch.float32))
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF model: {' '.join(str(error).split())[:200]}") from error
    return model, tokenizer
