"""How an engine constrains what it generates: what a router's front and its workers must share.

The front reads the thinking out of an answer and checks schemas; the worker's engine decides from
which token on a grammar binds, and when the thinking must end. With unlike flags the grammar binds
inside the thinking, or a budget that was accepted is not kept.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FLAGS: Final = (
    "--config",
    "--reasoning-parser",
    "--reasoning-parser-plugin",
    "--reasoning-config",
    "--structured-outputs-config",
)
"""vLLM's, for all processes of a group; the first is a file of such flags."""

_A_PATH: Final = "reasoning_parser_plugin"
"""Not compared: each process may have the file elsewhere. The parser's name is compared."""


def constraints(config: VllmConfig) -> str:
    """Settings that differ from vLLM's defaults, as `name=value` with commas between, in an order
    that is always the same. Empty for an engine without a parser and with all defaults."""
    told = {
        f"{kind}.{name}": value
        for kind, part in (
            ("structured-outputs-config", config.structured_outputs_config),
            ("reasoning-config", config.reasoning_config),
        )
        if part is not None
        for name, value in _told(part).items()
    }
    return ", ".join(f"--{name}={value}" for name, value in sorted(told.items()))


def _told(part: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(part):
        default = field.default
        if field.name.startswith("_") or field.name == _A_PATH:
            continue
        if (value := getattr(part, field.name)) != default:
            found[field.name] = value
    return found
