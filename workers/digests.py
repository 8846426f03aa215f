"""Digests that tell whether two processes hold the same model and the same tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from workers.models import ModelMissing, resolve_model

SAMPLES_PER_FILE = 16
SAMPLE_BYTES = 4096
_HEADER_BYTES_MAX = 100 << 20
"""What safetensors itself allows."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
"""The first pattern that matches anything is the model's weights."""

_VOLATILE = frozenset({"_name_or_path", "transformers_version"})
"""Keys of config.json that change with who saved it."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def model_digest(model: str | Path) -> str:
    """32 hex digits over configuration, tensor names, shapes, dtypes, and sampled weights.

    `model` is anything that `resolve_model` takes. Reads config.json, the header and size of each
    weight file, and 16 windows of 4 KiB spread over each: milliseconds for a small model, about a
    thousand reads for one of 100 GB. It catches another model, revision, fine-tune, quantization,
    a missing shard and a truncated file. It does not catch a change confined to bytes between the
    windows: it guards against mistakes, not against forgery.

    Raises `ModelMissing` when the files are not on this machine.
    """
    folder = local_folder(model)
    digest = hashlib.sha256(b"tandem model 1")
    if folder.is_file():
        _add_weights(digest, folder)
        return digest.hexdigest()[:32]
    _add(digest, "config.json", _stable_json(folder / "config.json", _VOLATILE))
    files = next((found for p in _WEIGHTS if (found := sorted(folder.glob(p)))), None)
    if files is None:
        raise ModelMissing(f"model folder {str(folder)!r} has no weights ({', '.join(_WEIGHTS)})")
    for file in files:
        _add_weights(digest, file)
    return digest.hexdigest()[:32]


def tokenizer_digest(model: str | Path) -> str:
    """32 hex digits over what turns text into token ids and back.

    Whole files are read. The chat template is left out: rendering is the router's own business,
    and `--chat-template` may replace it there.

    Raises `ModelMissing` when the files are not on this machine.
    """
    folder = local_folder(model)
    digest = hashlib.sha256(b"tandem tokenizer 1")
    if folder.is_file():  # A GGUF file carries its tokenizer in its header.
        _add_weights(digest, folder)
        return digest.hexdigest()[:32]
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise ModelMissing(f"model folder {str(folder)!r} has no tokenizer")
    for file in files:
        _add(digest, file.name, file.read_bytes())
    config = folder / "tokenizer_config.json"
    if config.is_file():
        _add(digest, config.name, _stable_json(config, frozenset({"chat_template"}) | _VOLATILE))
    return digest.hexdigest()[:32]


def local_folder(model: str | Path) -> Path:
    """The folder (or single file) of a model, a hub name's being its snapshot in the local cache.

    Raises `ModelMissing`; never downloads.
    """
    name = resolve_model(str(model))
    path = Path(name)
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise ModelMissing(f"{name!r} is neither a local folder nor a hub name") from None
    if not isinstance(config, str):
        raise ModelMissing(
            f"model {name!r} is neither a local folder nor in the hub's local cache; "
            f"download it first, for example with: hf download {name}"
        )
    return Path(config).parent


def _add(digest: hashlib._Hash, name: str, content: bytes) -> None:
    # Lengths first, so that no two lists of files can run together to the same bytes.
    digest.update(f"{name}\0{len(content)}\0".encode())
    digest.update(content)


def _add_weights(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as f:
        start = 0
        if file.suffix == ".safetensors":
            start = 8 + int.from_bytes(f.read(8), "little")
            if start > min(size, _HEADER_BYTES_MAX):
                raise ModelMissing(f"weight file {str(file)!r} is truncated or no safetensors")
            _add(digest, file.name, f.read(start - 8))
        _add(digest, file.name, str(size).encode())
        last = max(start, size - SAMPLE_BYTES)
        for i in range(SAMPLES_PER_FILE):
            f.seek(start + (last - start) * i // (SAMPLES_PER_FILE - 1))
            digest.update(f.read(SAMPLE_BYTES))


def _stable_json(file: Path, without: frozenset[str]) -> bytes:
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelMissing(f"model folder {str(file.parent)!r} has no {file.name}") from None
    except ValueError as e:
        raise ModelMissing(f"{str(file)!r} is not JSON: {e}") from None
    kept = {k: v for k, v in content.items() if k not in without}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()
