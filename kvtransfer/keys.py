"""Key files of ZeroMQ's CURVE: one Z85 key a line, and nothing else."""

from __future__ import annotations

import os
import re
import struct
from typing import TYPE_CHECKING, Final

from zmq.utils import z85

if TYPE_CHECKING:
    from pathlib import Path

_Z85: Final = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_FILE_BYTES_MAX: Final = 64 * 1024


class KeyFileBad(Exception):
    """A key file can't be used; the message names it, says why, and never has its content."""


def read_secret(file: Path) -> bytes:
    """The secret key in `file`, Z85. Raises `KeyFileBad`, also when others may read it."""
    keys = _keys(file, forbidden=0o007, remedy="chmod o= it, and make new keys if it was so before")
    if len(keys) > 1:
        raise KeyFileBad(f"key file {file}: want one secret key, it has {len(keys)} lines")
    return keys[0]


def read_public(file: Path) -> tuple[bytes, ...]:
    """The public keys in `file`, Z85. Raises `KeyFileBad`, also when others may write it."""
    return _keys(file, forbidden=0o002, remedy="chmod o-w it")


def read_key_file(file: Path, *, forbidden: int, remedy: str) -> bytes:
    """The content of a key file of any kind, at most 64 KiB.

    Raises `KeyFileBad`, also when the file's mode has a bit of `forbidden`; `remedy` is what to do.
    """
    try:
        with file.open("rb") as opened:
            # Of the file that is read, and not of what the name may stand for by then.
            mode = os.fstat(opened.fileno()).st_mode
            content = opened.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise KeyFileBad(f"key file {file}: {error.strerror}") from None
    if mode & forbidden:
        raise KeyFileBad(f"key file {file}: its mode {mode & 0o777:04o} is open to all: {remedy}")
    if len(content) > _FILE_BYTES_MAX:
        raise KeyFileBad(f"key file {file}: more than {_FILE_BYTES_MAX} bytes")
    return content


def _keys(file: Path, *, forbidden: int, remedy: str) -> tuple[bytes, ...]:
    content = read_key_file(file, forbidden=forbidden, remedy=remedy)
    keys = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not keys:
        raise KeyFileBad(f"key file {file}: it is empty")
    for number, key in enumerate(keys, 1):
        if not _is_key(key):
            raise KeyFileBad(f"key file {file}: line {number} is no key: want 40 Z85 characters")
    return keys


def _is_key(key: bytes) -> bool:
    if not _Z85.fullmatch(key):
        return False
    try:
        z85.decode(key)
    except struct.error:  # Five characters above 2^32 - 1.
        return False
    return True
