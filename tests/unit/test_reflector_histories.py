"""A watch's view ends equal to the server's, whatever happened on the way."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.apiserver.history import History

SEED = os.environ.get("SEED")
SEEDS = int(os.environ.get("SEEDS", "1" if SEED else "120"))
FIRST = int(SEED or 0)
PIECE = 500


@pytest.mark.parametrize("start", range(FIRST, FIRST + SEEDS, PIECE))
def test_a_watch_ends_with_the_servers_set_and_asks_less_than_once_a_second(start: int) -> None:
    for seed in range(start, min(start + PIECE, FIRST + SEEDS)):
        History(seed).run()


def test_histories_have_every_fault() -> None:
    seen: Counter[str] = Counter()
    for seed in range(100):
        history = History(seed)
        history.run()
        seen += history.seen
    rare = [
        "410 as a status", "410 as an event", "clean end", "half open", "silent", "cut", "page",
        "HTTP 401", "HTTP 429", "HTTP 500", "down", "unreachable", "garbage", "error event",
        "expired in the stream", "more pages", "list", "ends early", "hangs", "stalls", "HTTP 422",
        "page expired", "broken snapshot",
    ]  # fmt: skip
    assert [what for what in rare if not seen[what]] == []
