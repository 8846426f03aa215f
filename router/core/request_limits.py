"""How large a request may be, by field: checked on its JSON before anything else looks at it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec

_encode: Final = msgspec.json.Encoder().encode
_PROMPTS: Final = ("prompt", "items", "documents", "queries", "text_1", "text_2")
_CONVERSATIONS: Final = ("messages", "input")
_STRINGS: Final = (
    ("stop", "stops_max"), ("stop_sequences", "stops_max"), ("bad_words", "bad_words_max"),
)  # fmt: skip
_REQUEST_ID: Final = re.compile(r"[!-~]{1,128}")
_TOKENS: Final = ("logit_bias", "allowed_token_ids", "stop_token_ids", "logprob_token_ids")
_GRAMMARS: Final = (
    "structured_outputs", "response_format", "text", "output_config", "output_format",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Each is a setting of the router's, by the same name; docs/settings.md says what for."""

    json_depth_max: int = 64
    json_values_max: int = 20_000
    entries_max: int = 3_000
    token_ids_max: int = 131_072
    text_chars_max: int = 600_000
    prompts_max: int = 128
    sequences_max: int = 128
    messages_max: int = 3_000
    tools_max: int = 256
    input_items_max: int = 256
    stops_max: int = 32
    stop_chars_max: int = 256
    bad_words_max: int = 256
    logit_bias_max: int = 1_024
    grammar_bytes_max: int = 65_536
    grammar_s: float = 5
    preparing_max: int = 1_024


class OverLimit(Exception):
    """A field is larger than it may be; the message names it, and the setting."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def _over(field: str, found: str, limits: RequestLimits, setting: str) -> OverLimit:
    most, flag = getattr(limits, setting), setting.replace("_", "-")
    return OverLimit(field, f"{found}; at most {most} are served here (--{flag})")


def check_request_id(value: Any, field: str) -> None:
    """Refuse what can't be a request's name, in logs and at `/tandem`. Raises `OverLimit`."""
    if isinstance(value, str) and not _REQUEST_ID.fullmatch(value):
        raise OverLimit(field, "want 1 to 128 visible ASCII characters")


def check_json_size(raw: bytes, limits: RequestLimits) -> None:
    """Refuse what would take long to parse. Raises `OverLimit`.

    Each value but the first of a list or an object has a comma before it, and each list or object
    a bracket. Those in strings count here too, so a body of text is counted again without them.
    """
    most = limits.json_values_max
    if _marks(raw) <= most + limits.token_ids_max:
        return
    # Without escaped characters each quote begins or ends a string.
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = plain.count(b'"') // 2
    if strings > 2 * most:  # An object's keys are strings, too.
        raise _over("body", f"it has {strings} strings", limits, "json_values_max")
    values = sum(_marks(part) for part in plain.split(b'"')[::2])
    if values > most + limits.token_ids_max:
        raise OverLimit(
            "body",
            f"it has {values} values; at most {most} and {limits.token_ids_max} token ids are "
            "served here (--json-values-max, --token-ids-max)",
        )


def _marks(raw: bytes) -> int:
    return len(raw) - len(raw.translate(None, b",[{"))


def check_request(body: dict[str, Any], limits: RequestLimits) -> None:
    """Refuse what is larger than it may be. Raises `OverLimit`; what isn't valid is left as is."""
    check_request_id(body.get("request_id"), "request_id")
    prompts = _check_prompts(body, limits)
    for fields, at in ((body, ""), (body.get("sampling_params"), "sampling_params.")):
        if isinstance(fields, dict):
            _check_sequences(fields, at, prompts, limits)
            _check_lists(fields, at, limits)
    _check_tree(body, limits)
    for fields, at in ((body, ""), (body.get("sampling_params"), "sampling_params.")):
        if isinstance(fields, dict):
            _check_grammars(fields, at, limits)


@dataclass(slots=True)
class _Found:
    values: int = 0
    tokens: int = 0
    chars: int = 0


def _check_tree(body: dict[str, Any], limits: RequestLimits) -> None:
    """Nesting, and how much there is of each kind of value, in whatever field."""
    found, depth = _Found(), 0
    level: list[Any] = [body]
    while level:
        depth += 1
        if depth > limits.json_depth_max:
            raise _over("body", f"it is nested {depth} deep", limits, "json_depth_max")
        below: list[Any] = []
        for container in level:
            if len(container) > limits.entries_max and not _is_numbers(container):
                _at_most(len(container), "entries in one list", "body", limits, "entries_max")
            if type(container) is dict:
                _count_object(container, found, below)
            else:
                _count_list(container, found, below)
        level = below
        _at_most(found.values, "values", "body", limits, "json_values_max")
        _at_most(found.tokens, "token ids", "body", limits, "token_ids_max")
        _at_most(found.chars, "characters of text", "body", limits, "text_chars_max")


def _is_numbers(container: Any) -> bool:
    return type(container) is list and set(map(type, container)) <= {int, float}


def _count_object(container: dict[str, Any], found: _Found, below: list[Any]) -> None:
    found.values += len(container)
    for key, value in container.items():
        found.chars += len(key)
        kind = type(value)
        if kind is dict or kind is list:
            below.append(value)
        elif kind is str and not _is_media(key, value):
            found.chars += len(value)


def _count_list(container: list[Any], found: _Found, below: list[Any]) -> None:
    """Numbers in lists are token ids, or as cheap."""
    numbers = chars = 0
    for value in container:
        kind = type(value)
        if kind is int or kind is float:
            numbers += 1
        elif kind is dict or kind is list:
            below.append(value)
        elif kind is str:
            chars += len(value)
    found.tokens += numbers
    found.values += len(container) - numbers
    found.chars += chars


def _is_media(key: str, value: str) -> bool:
    """Images and the like are no text: they come as a data URL, or under a name of their own."""
    return key == "data" or (key.endswith("url") and value.startswith("data:"))


def _check_prompts(body: dict[str, Any], limits: RequestLimits) -> int:
    """How many prompts there are."""
    count = 1
    for field in _PROMPTS:
        given = body.get(field)
        if isinstance(given, list) and not (given and isinstance(given[0], int)):
            _at_most(len(given), "entries", field, limits, "prompts_max")
            count = max(count, len(given))
    for field in _CONVERSATIONS:
        given = body.get(field)
        if not isinstance(given, list):
            continue
        batch = [each for each in given if isinstance(each, list)]
        if batch:
            _at_most(len(given), "conversations", field, limits, "prompts_max")
            count = max(count, len(given))
        messages = [m for m in given if not isinstance(m, list)]
        messages += [m for each in batch for m in each]
        parts = [m.get("content") for m in messages if isinstance(m, dict)]
        found = len(messages) + sum(len(p) for p in parts if isinstance(p, list))
        _at_most(found, "messages and parts of messages", field, limits, "messages_max")
        if field == "input":
            _at_most(len(given), "items", field, limits, "input_items_max")
    if isinstance(tools := body.get("tools"), list):
        _at_most(len(tools), "tools", "tools", limits, "tools_max")
    return count


def _check_sequences(fields: dict[str, Any], at: str, prompts: int, limits: RequestLimits) -> None:
    for field in ("n", "best_of"):
        sequences = prompts * _number(fields.get(field))
        if sequences > limits.sequences_max:
            wanted = f"{sequences} sequences are wanted"
            raise _over(f"{at}{field}", wanted, limits, "sequences_max")


def _number(value: Any) -> int:
    """As pydantic would read it; what is no number it will refuse."""
    try:
        return int(float(value)) if isinstance(value, int | float | str) else 1
    except (ValueError, OverflowError):
        return 1


def _check_lists(fields: dict[str, Any], at: str, limits: RequestLimits) -> None:
    for field, setting in _STRINGS:
        given = fields.get(field)
        strings = [given] if isinstance(given, str) else given
        if not isinstance(strings, list):
            continue
        _at_most(len(strings), "strings", f"{at}{field}", limits, setting)
        longest = max((len(s) for s in strings if isinstance(s, str)), default=0)
        _at_most(longest, "characters in a string", f"{at}{field}", limits, "stop_chars_max")
    for field in _TOKENS:
        given = fields.get(field)
        if isinstance(given, dict | list):
            _at_most(len(given), "entries", f"{at}{field}", limits, "logit_bias_max")


def _check_grammars(fields: dict[str, Any], at: str, limits: RequestLimits) -> None:
    for field in _GRAMMARS:
        given = fields.get(field)
        if given is not None and not (field == "text" and isinstance(given, str)):
            size = len(_encode(given))
            _at_most(size, "bytes", f"{at}{field}", limits, "grammar_bytes_max")


def _at_most(found: int, what: str, field: str, limits: RequestLimits, setting: str) -> None:
    if found > getattr(limits, setting):
        raise _over(field, f"it has {found} {what}", limits, setting)
