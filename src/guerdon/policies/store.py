"""From a name to a policy: built-in small models, hub ids, folders, GGUF files."""

from __future__ import annotations

import copy
import inspect
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from guerdon.errors import CheckpointError, ConfigError, GuerdonError, MissingDependency, ModelNotFound, nearest
from guerdon.policies.lora import LoraSpec, add_lora
from guerdon.policies.policy import Policy, fingerprint, quiet
from guerdon.registry import registry

__all__ = ["load_policy", "load_saved", "read_gguf", "resolve_device", "resolve_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_REACH_SECONDS = 3.0

POLICIES = registry(
    "policy",
    {"tiny": "guerdon.policies.tiny:tiny_policy", "smollm2": "guerdon.policies.smollm2:load_smollm2"},
)
"""Names to factories; a factory may take ``seed``."""


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is the GPU where there is one, else the CPU.

    Raises:
        ConfigError: a device that is unknown or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {str(device)!r} cannot be used here; give auto, cpu, or a GPU that is there"
        ) from error
    return where


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
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``, of the base weights. Adapters and
            value head stay float32.
        seed: of whatever has to be initialised.

    Raises:
        ModelNotFound: nothing loadable has this name here.
        CheckpointError: a folder or file is there but broken.
        ConfigError: the device is not there, or adapters were asked of a model that has some.
    """
    where = resolve_device(device)
    number = resolve_dtype(dtype, where)
    text = str(ref)
    path = Path(text).expanduser()
    # A base model that its name alone brings back; tiny depends on a seed and a tokenizer as well.
    base: str | None = text
    if text in POLICIES:
        policy = _make(text, seed)
        if text == "tiny":
            base = None
    elif path.suffix == ".gguf":
        policy, base = _from_gguf(path), str(path.resolve())
    elif path.is_dir():
        policy, base = Policy.load(path, device="cpu", dtype=str(number).removeprefix("torch.")), str(path.resolve())
    elif path.exists():
        raise ModelNotFound(
            f"policy {text!r} is a file; give a folder, a .gguf file, a hub id, or one of {', '.join(POLICIES)}"
        )
    elif text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelNotFound(f"policy folder {text!r} does not exist{nearest(path.name, _siblings(path))}")
    else:
        policy = _from_hub(text, number)
    _place(policy, where, number)
    if lora is not None:
        if policy.adapted:
            raise ConfigError(f"policy {text!r} already carries adapters; load it without lora, or merge it first")
        policy = Policy(
            add_lora(policy.model, lora, seed=seed),
            policy.tokenizer,
            name=policy.name,
            value_head=policy.value_head,
            max_context=policy.max_context,
            base=base,
        )
    policy.model.eval()
    return policy.add_value_head() if value_head else policy


def load_saved(cls: type[Policy], folder: Path, *, device: str | torch.device, dtype: str) -> Policy:
    """Read a folder in transformers' format, with Guerdon's additions where it has them."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give one that holds a saved policy")
    meta_path = folder / "guerdon.json"
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8")) if meta_path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{meta_path} is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{meta_path} must hold an object, found {type(meta).__name__}")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CheckpointError(f"{folder} holds no model (config.json is missing)")
    where = resolve_device(device)
    number = resolve_dtype((meta.get("dtype") or dtype) if dtype == "auto" else dtype, where)
    try:
        with quiet():
            model, tokenizer = _read(folder, meta, number)
            policy = cls(
                model,
                tokenizer,
                name=meta.get("name", folder.name),
                max_context=meta.get("max_context"),
                base=meta.get("base"),
            )
            head = folder / "value_head.safetensors"
            if head.is_file():
                from safetensors.torch import load_file

                policy.add_value_head().value_head.load_state_dict(load_file(head))  # type: ignore[union-attr]
    except GuerdonError:
        raise
    except Exception as error:  # the readers' Rust parts raise bare Exception for damaged files
        raise CheckpointError(f"{folder} holds no readable model: {_one_line(error)}") from error
    _place(policy, where, number)
    model.eval()
    return policy


def _read(folder: Path, meta: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not (folder / "adapter_config.json").is_file():
        return _causal(folder, local_files_only=True, dtype=dtype), tokenizer
    from peft import PeftModel

    ref = folder / "base" if (folder / "base").is_dir() else meta.get("base")
    if not ref:
        raise CheckpointError(
            f"{folder} holds adapters but not the name of their base model; load the base and add them by hand"
        )
    # The fingerprint was taken in the number format of that time.
    saved = str(meta.get("dtype") or dtype).removeprefix("torch.")
    try:
        base = load_policy(ref, device="cpu", dtype=saved)
    except GuerdonError as error:
        raise CheckpointError(f"{folder} holds adapters for {str(ref)!r}, which cannot be loaded: {error}") from error
    known = meta.get("base_fingerprint")
    if known and fingerprint(base.model) != known:
        raise CheckpointError(
            f"{folder} holds adapters for {str(ref)!r}, whose weights are others now; "
            "restore the base model that they belong to"
        )
    _cast(base.model, dtype)
    return PeftModel.from_pretrained(base.model, folder, is_trainable=True), tokenizer


def _place(policy: Policy, device: torch.device, dtype: torch.dtype) -> None:
    policy.model.to(device)
    if not policy.adapted:
        _cast(policy.model, dtype)
    if policy.value_head is not None:
        policy.value_head.to(device)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Change the weights' number format, and leave buffers alone: rotary frequencies need float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _causal(ref: str | Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(ref, output_loading_info=True, **options)
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"weights are missing: {sorted(report['missing_keys'])[:3]}")
    return model


def _make(name: str, seed: int) -> Policy:
    factory = POLICIES[name]
    policy: Policy = factory(seed=seed) if "seed" in inspect.signature(factory).parameters else factory()
    return policy


def _from_hub(ref: str, dtype: torch.dtype) -> Policy:
    """A model from the local cache of the hub, else from the hub."""
    from transformers import AutoTokenizer

    for local in (True, False):
        if not local and not _hub_reachable():
            raise ModelNotFound(f"{_unknown(ref)}, and the model hub cannot be reached{_hint(ref)}")
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(ref, local_files_only=local)
                return Policy(_causal(ref, dtype=dtype, local_files_only=local), tokenizer, name=ref)
        except (OSError, ValueError) as error:
            if not local:
                raise ModelNotFound(
                    f"{_unknown(ref)}, and the model hub did not give it ({_one_line(error)}){_hint(ref)}"
                ) from error
    raise AssertionError("unreachable")


def _unknown(ref: str) -> str:
    return f"policy {ref!r} is neither built in ({', '.join(POLICIES)}) nor a folder here"


def _hint(ref: str) -> str:
    near = nearest(ref, [*POLICIES, *(str(p) for p in _siblings(Path(ref)))])
    return f"{near or ';'} give a path like ./{ref} to a folder or a .gguf file if you have the model"


def _siblings(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() and path.parent != Path(".") else []


def _hub_reachable() -> bool:
    """Whether a connection opens soon; the hub's own client would retry for a minute before it gives up."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if getproxies().get(endpoint.scheme or "https"):
        return True
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=_REACH_SECONDS).close()
    except OSError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


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
    except Exception as error:  # the reader trips over a damaged file wherever it happens to be
        raise CheckpointError(f"{path} is not a readable GGUF model: {_one_line(error)}") from error
    return model, tokenizer
