"""The admin's key, out of its file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from workers.keys import KeyFileBad

if TYPE_CHECKING:
    from pathlib import Path

_LENGTH_MIN, _LENGTH_MAX = 16, 4096
_OTHERS: Final = 0o007


def read_admin_key(file: Path) -> str:
    """The key in `file`, one line. Raises `KeyFileBad`, also when everybody may read it."""
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            content = opened.read(_LENGTH_MAX + 2)
    except OSError as error:
        raise KeyFileBad(f"key file {file}: {error.strerror}") from None
    if mode & _OTHERS:
        raise KeyFileBad(
            f"key file {file}: its mode {mode & 0o777:04o} is open to all: chmod o= it"
        )
    key = content.decode("ascii", "replace").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise KeyFileBad(f"key file {file}: want one line of ASCII without spaces")
    if not _LENGTH_MIN <= len(key) <= _LENGTH_MAX:
        raise KeyFileBad(f"key file {file}: want {_LENGTH_MIN} to {_LENGTH_MAX} characters")
    return key
