"""Which folder a model's name stands for on this machine."""

from __future__ import annotations

import os
from pathlib import Path

PREPARED = ("smollm2-135m",)
"""Names that `tandem models prepare` makes folders for."""

_LOOKS_LIKE_A_PATH = ("/", "./", "../", "~")


class ModelMissing(Exception):
    """A model that should be on this machine is not; the message says what to do about it."""


def prepared_folder(name: str) -> Path:
    """Where `tandem models prepare <name>` puts a model, whether or not it is there yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tandem" / "models" / name


def is_prepared(name: str) -> bool:
    """Whether the folder is there: it is renamed into place, so it is whole if it exists."""
    return (prepared_folder(name) / "config.json").is_file()


def resolve_model(name: str) -> str:
    """The path of a prepared or local model; any other name unchanged, for the Hugging Face hub.

    Raises `ModelMissing` for a prepared name without its folder, and for a local path that does
    not exist or holds no model.
    """
    if name in PREPARED:
        if not is_prepared(name):
            raise ModelMissing(
                f"model {name!r} is not prepared on this machine; run: tandem models prepare {name}"
            )
        return str(prepared_folder(name))
    if not name:
        raise ModelMissing("the model's name is empty")
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / config).is_file() for config in ("config.json", "params.json")):
            raise ModelMissing(f"model folder {name!r} has no config.json")
        return str(path.resolve())
    if path.is_file():
        return str(path.resolve())
    if name.startswith(_LOOKS_LIKE_A_PATH):
        raise ModelMissing(f"model folder {name!r} does not exist")
    return name
