"""A refusal or a death in an engine's process becomes the worker's last line."""

from __future__ import annotations

import logging
import logging.config
from typing import TYPE_CHECKING

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from kvtransfer.refusal import TEXT_MAX, Causes, Unserved, carried, one_line, tell, tell_deaths

if TYPE_CHECKING:
    from collections.abc import Iterator

CORE = "vllm.v1.engine.core"
VLLMS_OWN = {
    "version": 1,
    "disable_existing_loggers": False,
    "loggers": {"vllm": {"level": "INFO", "handlers": [], "propagate": False}},
}
"""Logging as vLLM configures it in each of its processes, as far as it matters here."""


@pytest.fixture
def causes() -> Iterator[Causes]:
    causes = Causes()
    yield causes
    causes.close()


def test_a_refusal_is_told_in_its_own_words_and_raised_on(causes: Causes) -> None:
    with pytest.raises(Unserved), carried():
        raise Unserved("windows are not served: use --this")
    cause = causes.first()
    assert cause is not None
    assert (cause.text, cause.unserved) == ("windows are not served: use --this", True)


def test_other_errors_are_not_carried_as_refusals(causes: Causes) -> None:
    with pytest.raises(KeyError), carried():
        raise KeyError("x")
    assert causes.first() is None


def test_a_refusal_goes_before_the_failures_around_it_and_else_the_first_counts(
    causes: Causes,
) -> None:
    tell(RuntimeError("one"))
    tell(RuntimeError("two"))
    first = causes.first()
    assert first is not None
    assert first.text == "RuntimeError: one"
    tell(Unserved("three"))
    refusal = causes.first()
    assert refusal is not None
    assert refusal.text == "three"


def test_without_a_worker_nothing_is_told() -> None:
    tell(RuntimeError("one"))  # In a process of vLLM's that somebody else started.


def test_nothing_is_told_once_the_file_is_gone(causes: Causes) -> None:
    causes.close()
    tell(RuntimeError("late"))


def die(message: str) -> None:
    try:
        raise MemoryError("no room")
    except MemoryError:
        logging.getLogger(CORE).exception(message)


def test_the_death_of_an_engine_s_process_is_told_though_vllm_configures_logging_anew(
    causes: Causes,
) -> None:
    tell_deaths()
    tell_deaths()
    logging.config.dictConfig(VLLMS_OWN)
    die("Invocation of a method failed")
    assert causes.first() is None
    die("EngineCore failed to start.")
    cause = causes.first()
    assert cause is not None
    assert (cause.text, cause.unserved) == ("MemoryError: no room", False)


class Model(BaseModel):
    length: int

    @field_validator("length")
    @classmethod
    def _short(cls, value: int) -> int:
        if value > 9:
            raise ValueError("too long:\n  at most 9")
        return value


def test_one_line_has_no_line_break_whatever_the_exception_says() -> None:
    with pytest.raises(ValidationError) as invalid:
        Model(length=10)
    assert one_line(invalid.value) == "length: too long: at most 9"
    assert one_line(OSError("a\n b")) == "OSError: a b"
    assert len(one_line(OSError("a" * 5000))) == TEXT_MAX
    assert one_line(AssertionError()) == "AssertionError"


def test_an_exception_without_words_says_where_it_was_raised() -> None:
    with pytest.raises(AssertionError) as failed:
        assert_nothing()
    assert "AssertionError in assert_nothing (" in one_line(failed.value)


def assert_nothing() -> None:
    raise AssertionError
