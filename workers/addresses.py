"""Where a process can be reached, told to whoever started it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write_addresses(
    file: Path, *, channel: str | None, http: str, admin: str | None = None
) -> None:
    """`{"pid", "channel", "http"}` as JSON, renamed into place so that no reader sees a part.

    `admin`: the address of a router's own routes, where they have one.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}")
    content = {"pid": os.getpid(), "channel": channel, "http": http}
    if admin is not None:
        content["admin"] = admin
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(file)
