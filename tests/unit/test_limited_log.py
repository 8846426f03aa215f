"""Log lines that peers cause: a budget for each message, and the count of what was left out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvtransfer.limited_log import MESSAGES_MAX, TEXT_MAX, LimitedLog

if TYPE_CHECKING:
    import pytest

LOG = logging.getLogger("limited")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_flood_of_one_message_is_so_many_lines_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limited = LimitedLog(LOG, 3, clock)
    for _ in range(1000):
        limited.warning("malformed", {"error": "x"})
    assert len(caplog.records) == 3
    limited.warning("another", {})
    assert len(caplog.records) == 4, "each message has its own budget"
    clock.now += 61
    limited.warning("malformed", {"error": "x"})
    assert vars(caplog.records[-1])["left_out"] == 997
    limited.warning("malformed", {"error": "x"})
    assert "left_out" not in vars(caplog.records[-1])


def test_peers_own_words_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    LimitedLog(LOG).warning("malformed", {"error": "x" * 100_000})
    assert len(vars(caplog.records[0])["error"]) == TEXT_MAX


def test_messages_that_are_counted_are_bounded() -> None:
    limited = LimitedLog(LOG)
    for number in range(3 * MESSAGES_MAX):
        limited.warning(f"message {number}", {})
    assert len(limited._windows) == MESSAGES_MAX
