"""A process's settings out of its flags and its environment."""

from __future__ import annotations

import argparse
import difflib
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings

# For routers, which may not import it from there.
from kvtransfer.refusal import one_line as one_line  # noqa: PLC0414

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.fields import FieldInfo

Settings = TypeVar("Settings", bound=BaseSettings)


def _in_a_folder(file: Path) -> Path:
    if not file.name:
        raise ValueError("want a file's name")
    if not file.parent.is_dir():
        raise ValueError(f"its folder {str(file.parent)!r} does not exist")
    return file


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
MessageBytes = Annotated[int, Field(ge=1048576, le=1073741824)]
Text = Annotated[str, Field(min_length=1)]
FileToWrite = Annotated[Path, AfterValidator(_in_a_folder)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and not the usage before it: in a pod's log the line is what counts."""
        self.exit(2, f"{self.prog}: {message}\n")


def read_settings(
    kind: type[Settings], argv: Sequence[str], *, prog: str, description: str
) -> tuple[Settings, list[str]]:
    """The settings, and the flags that are none of theirs, in their order.

    A flag wins over its variable. What is wrong with either ends the process with one line and
    status 2, as argparse does.
    """
    prefix = kind.model_config["env_prefix"]
    parser = _Parser(
        prog=prog,
        description=f"{description} Instead of a flag its variable may be set; the flag wins.",
        # A flag that is not given must not be there: its variable comes next.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in kind.model_fields.items():
        told = _help(variable(prefix, name), field)
        # Such a flag may stand alone.
        alone: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        parser.add_argument(flag(name), metavar=_metavar(name, field), help=told, **alone)
    given, rest = parser.parse_known_args(argv)
    if wrong := _unread(prefix, kind):
        parser.error(wrong)
    try:
        return kind(**vars(given)), rest
    except ValidationError as error:
        parser.error("; ".join(_told(detail, prefix, vars(given)) for detail in error.errors()))


def config_apart(flags: Sequence[str]) -> list[str]:
    """vLLM's flags, with the file of `--config=file` as an argument of its own.

    In one argument vLLM 0.32 takes it and reads nothing, without a word.
    """
    apart: list[str] = []
    for given in flags:
        name, equals, file = given.partition("=")
        apart += ["--config", file] if equals and name == "--config" else [given]
    return apart


def flag(name: str) -> str:
    """A field's flag: `lease_s` is `--lease-s`."""
    return "--" + name.replace("_", "-")


def variable(prefix: str, name: str) -> str:
    """A field's environment variable: `lease_s` is `WORKER_LEASE_S`."""
    return f"{prefix}{name.upper()}"


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field may have; none for one that is no choice."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return tuple(member.value for member in kind)
    return ()


def _metavar(name: str, field: FieldInfo) -> str:
    words = ",".join(choices(field))
    return f"{{{words}}}" if words else name.rsplit("_", 1)[-1].upper()


def default_text(field: FieldInfo) -> str:
    """A field's default as one would write it; `needed` or `none` where there is none."""
    if field.is_required():
        return "needed"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def _help(variable: str, field: FieldInfo) -> str:
    default = default_text(field)
    default = default if field.is_required() else f"default {default}"
    return f"{field.description} ({default}; {variable})".replace("%", "%%")


def _unread(prefix: str, kind: type[BaseSettings]) -> str | None:
    """Of the variables with our prefix, those that nothing reads: a typo must not pass unseen."""
    known = {variable(prefix, name) for name in kind.model_fields}
    told = []
    for name in sorted(os.environ):
        if not name.upper().startswith(prefix) or name.upper() in known:
            continue
        hint = "".join(
            f", did you mean {near}?" for near in difflib.get_close_matches(name.upper(), known, 1)
        )
        if name.endswith(("_SERVICE_HOST", "_SERVICE_PORT")):
            hint = ", Kubernetes sets it for a service: set enableServiceLinks: false in the pod"
        told.append(f"{name} is set, but no such setting exists{hint}")
    return "; ".join(told) or None


def _told(detail: Any, prefix: str, given: dict[str, Any]) -> str:
    message: str = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not detail["loc"]:
        return message
    name = detail["loc"][0]
    if detail["type"] == "missing":
        return f"needs {flag(name)} or {variable(prefix, name)}"
    origin = flag(name) if name in given else variable(prefix, name)
    return f"{origin} {detail['input']!r}: {message}"
