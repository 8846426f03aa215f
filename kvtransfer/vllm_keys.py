"""The key pair of the handoff, as a process of vLLM's is told of it: by its file's name.

vLLM prints its whole configuration at the start, so the key itself may not be in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtransfer.curve import Pair

if TYPE_CHECKING:
    from collections.abc import Callable


def keys_of(extra: Callable[[str, Any], Any]) -> Pair | None:
    """`extra`: the connector's own configuration. Raises `KeyFileBad`."""
    file: str = extra("curve_secret_file", "")
    return Pair.read(Path(file)) if file else None
