"""The admin's key, out of its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.keys import KeyFileBad, read_key_file

if TYPE_CHECKING:
    from pathlib import Path

_LENGTH_MIN, _LENGTH_MAX = 16, 4096


def read_admin_key(file: Path) -> str:
    """The key in `file`, one line. Raises `KeyFileBad`, also when everybody may read it."""
    content = read_key_file(file, forbidden=0o007, remedy="chmod o= it")
    key = content.decode("ascii", "replace").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise KeyFileBad(f"key file {file}: want one line of ASCII without spaces")
    if not _LENGTH_MIN <= len(key) <= _LENGTH_MAX:
        raise KeyFileBad(f"key file {file}: want {_LENGTH_MIN} to {_LENGTH_MAX} characters")
    return key
