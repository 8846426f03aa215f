"""Why an engine can't serve: told by its processes, read by the worker that started them."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

CAUSES_FILE: Final = "TANDEM_CAUSES_FILE"
"""The environment variable with the file's name: each process of the engine inherits it, whether
it is forked or spawned."""
TEXT_MAX: Final = 1000
"""Characters of one cause."""
_FATAL: Final = {
    "vllm.v1.engine.core": "EngineCore ",
    "vllm.v1.executor.multiproc_executor": "WorkerProc ",
}
"""Loggers of vLLM's that report the death of their own process, and how those messages begin."""


class Unserved(ValueError):
    """This engine can't be served: the message names the property or the flag, and what to do.

    Raised in the worker's process it is its last line. Raised in one of the engine's processes it
    becomes that by `carried`.
    """


@dataclass(frozen=True, slots=True)
class Cause:
    """One process's reason to die."""

    text: str
    """One line. An `Unserved`'s own words, or another exception's type and words."""
    unserved: bool
    """It was a refusal, and not a failure."""


def one_line(error: BaseException) -> str:
    """An exception's words without line breaks, at most `TEXT_MAX` characters; its type before
    them, unless it is an `Unserved` or the words stand for themselves (pydantic's)."""
    if isinstance(error, ValidationError):
        told = [
            ".".join(map(str, e["loc"])) + ": " * bool(e["loc"]) + e["msg"] for e in error.errors()
        ]
        text = "; ".join(told).replace("Value error, ", "")
    elif isinstance(error, Unserved):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else _place(error)
    return " ".join(text.split())[:TEXT_MAX]


def _place(error: BaseException) -> str:
    """For an exception without words, such as an assertion's: where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].name} ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return type(error).__name__ + where


# ------------------------------------------------------------ in the engine's processes


def tell(error: BaseException) -> None:
    """Leave a cause for the worker. Does nothing in a process that no worker of ours started."""
    path = os.environ.get(CAUSES_FILE)
    if not path:
        return
    line = json.dumps([one_line(error), isinstance(error, Unserved)]) + "\n"
    try:
        # One write of an appended line: those of several ranks do not mix.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as trouble:
        log.warning("cause not told", extra={"file": path, "reason": str(trouble)})


@contextmanager
def carried() -> Iterator[None]:
    """Carry an `Unserved` that is raised inside to the worker, and go on raising it."""
    try:
        yield
    except Unserved as refusal:
        tell(refusal)
        raise


class _Teller(logging.Filter):
    """Tells the exception with which vLLM reports the death of the process, and lets all pass.

    A filter, since vLLM configures logging anew in each process, which takes handlers away.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and str(record.msg).startswith(_FATAL[record.name]):
            tell(error)
        return True


def tell_deaths() -> None:
    """From now on tell what this process dies of, as vLLM logs it. Calling it again is harmless."""
    for name in _FATAL:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Teller) for known in logger.filters):
            logger.addFilter(_Teller())


# ------------------------------------------------------------ in the worker's process


class Causes:
    """Causes that the engine's processes tell. One at a time; `close` removes the file."""

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="tandem-causes-")
        os.close(descriptor)
        self._path = Path(name)
        os.environ[CAUSES_FILE] = name

    def first(self) -> Cause | None:
        """A refusal if there is one, else the first told: later ones follow from it."""
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            text, unserved = json.loads(line)
            found.append(Cause(text, unserved))
        return next((c for c in found if c.unserved), found[0] if found else None)

    def close(self) -> None:
        os.environ.pop(CAUSES_FILE, None)
        self._path.unlink(missing_ok=True)
