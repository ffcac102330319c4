"""What makes KV interchangeable: model weights, shapes, dtypes, rotary embedding and tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kv_agent.chunks import Fingerprint
from kv_agent.errors import UnsupportedModelError

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
TOKENIZER_PATTERNS = ("tokenizer.json", "*.model", "vocab.*", "merges.txt", "tokenizer_config.json")

# What a model's configuration says about its KV beside shapes; named one by one, because the full
# configuration changes with the version of transformers that reads it.
CONFIG_PARTS = ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act", "rms_norm_eps")

# Weight files up to this size are hashed whole; of larger ones, evenly spread windows and the size.
WHOLE_FILE_BYTES = 64 << 20
WINDOW_BYTES = 1 << 20
NUM_WINDOWS = 16


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and contents; big files are sampled in ``NUM_WINDOWS`` windows."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= WHOLE_FILE_BYTES:
                while block := file.read(WINDOW_BYTES):
                    digest.update(block)
                continue
            for window in range(NUM_WINDOWS):
                file.seek(window * (size - WINDOW_BYTES) // (NUM_WINDOWS - 1))
                digest.update(file.read(WINDOW_BYTES))
    return digest.hexdigest()


def fingerprint_details(vllm_config: Any) -> dict[str, Any]:
    """Everything that must be equal for KV to be interchangeable, as JSON-able values.

    The model's name is left out on purpose: the same weights under another path are the same model.
    Raises :class:`UnsupportedModelError` when the weights or the tokenizer cannot be identified.
    """
    model = vllm_config.model_config
    text = model.hf_text_config
    model_dir = _snapshot_dir(model.model, model.revision)
    tokenizer_dir = _snapshot_dir(model.tokenizer, model.tokenizer_revision)
    return {
        "weights": hash_files(_existing(model_dir, WEIGHT_PATTERNS, "weights")),
        "tokenizer": hash_files(_existing(tokenizer_dir, TOKENIZER_PATTERNS, "tokenizer")),
        "architectures": list(model.hf_config.architectures or ()),
        "dtype": str(model.dtype),
        "kv_dtype": vllm_config.cache_config.cache_dtype,
        "quantization": model.quantization,
        "layers": model.get_num_layers(vllm_config.parallel_config),
        "kv_heads": model.get_total_num_kv_heads(),
        "head_dim": model.get_head_size(),
        "config": {name: getattr(text, name, None) for name in CONFIG_PARTS},
        "rope": getattr(text, "rope_parameters", None),
    }


def fingerprint_of(details: Mapping[str, Any]) -> Fingerprint:
    """128-bit digest of the details."""
    canonical = json.dumps(details, sort_keys=True, separators=(",", ":"), default=str)
    return Fingerprint(hashlib.blake2b(canonical.encode(), digest_size=16, person=b"model").hexdigest())


def _existing(folder: Path, patterns: Iterable[str], what: str) -> list[Path]:
    files = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    if not files:
        raise UnsupportedModelError(
            f"kv_agent cannot identify the model's {what}: no such files in {folder}; serve the model from a "
            "local folder or a downloaded snapshot"
        )
    return files


def _snapshot_dir(name: str, revision: str | None) -> Path:
    """The folder of a model's files: itself, or its downloaded snapshot."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return Path(name)
