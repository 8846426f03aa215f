"""The index is what the workers' caches hold, whatever is lost on the way."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.blocks import links
from router.core.cache_view import CacheView
from router.core.caches import ASK_INTERVAL_S, JUDGED_MIN, Caches, Foretold
from router.core.prefix_index import PrefixIndex
from workers.api import KvCleared, KvRemoved, KvSnapshot, KvStored, Role
from workers.cache_mirror import EVENT_TOKENS_KEPT, EVENTS_KEPT, PART_TOKENS, CacheMirror
from workers.engines.base import Cleared, Removed, Stored

SIZE = 4


def blocks_of(prompt: list[int]) -> list[tuple[int, ...]]:
    """An engine's own keys: all tokens up to a full block's end."""
    return [tuple(prompt[:end]) for end in range(SIZE, len(prompt) + 1, SIZE)]


class Engine:
    """A cache and its mirror."""

    def __init__(self) -> None:
        self.cache: dict[Any, None] = {}
        self.mirror = CacheMirror()

    def store(self, prompt: list[int], salt: str | None = None) -> None:
        """As vLLM tells it: from the first block that is not there, all to the end in one."""
        keys = [(salt, block) for block in blocks_of(prompt)]
        first = next((i for i, key in enumerate(keys) if key not in self.cache), len(keys))
        new = keys[first:]
        if new:
            self.cache |= dict.fromkeys(new)
            parent = keys[first - 1] if first else None
            tokens = prompt[first * SIZE : len(keys) * SIZE]
            self.mirror.apply([Stored(list(new), parent, tokens, salt)])

    def evict(self, index: int) -> None:
        if self.cache:
            key = list(self.cache)[index % len(self.cache)]
            del self.cache[key]
            self.mirror.apply([Removed([key])])

    def clear(self) -> None:
        self.cache.clear()
        self.mirror.apply([Cleared()])

    def has(self, prompt: list[int], salt: str | None = None) -> int:
        """Leading blocks that can be reused: all but the one that ends with the last token."""
        count = 0
        for block in blocks_of(prompt[:-1]):
            if (salt, block) not in self.cache:
                break
            count += 1
        return count


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=17)
salts = st.sampled_from([None, "mine"])
acts = st.one_of(
    st.tuples(st.just("store"), tokens, salts),
    st.tuples(st.just("evict"), st.integers(0, 50)),
    st.tuples(st.just("clear")),
    st.tuples(st.just("tell"), st.sampled_from(["whole", "lost"])),
)


@given(st.lists(acts, max_size=40), st.lists(tokens, min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_at_rest_the_index_is_the_caches(
    done: list[tuple[Any, ...]], prompts: list[list[int]]
) -> None:
    """Batches may be lost; a gap asks for a snapshot, whose parts may be lost as well."""
    index, engine = PrefixIndex(), Engine()
    other = CacheView("other", SIZE, index)
    assert other.snapshot(KvSnapshot(0, 0, True, [KvStored([7], -1, [0, 0, 0, 0])]))
    view = CacheView("w", SIZE, index)
    told, asked = 0, True
    for act, *rest in done:
        if act != "tell":
            getattr(engine, act)(*rest)
            continue
        if asked:
            parts = list(engine.mirror.snapshot())
            asked = rest == ["lost"] or not all(view.snapshot(part) for part in parts)
            told = engine.mirror.seq
            continue
        changes = engine.mirror.since(told)
        assert changes is not None
        if changes and rest != ["lost"]:
            asked = not view.events(told, changes)
        told = engine.mirror.seq
    changes = engine.mirror.since(told) or []
    if asked or not view.events(told, [*changes, KvRemoved([])]):
        assert all(view.snapshot(part) for part in engine.mirror.snapshot())
    assert len(view) == len(engine.cache)
    stored = [act[1] for act in done if act[0] == "store"]
    for salt in (None, "mine"):
        for prompt in [*prompts, *stored]:
            found = index.cached(links(prompt, SIZE, salt))
            assert found.get("w", 0) == engine.has(prompt, salt)
            alone = salt is None and prompt[:4] == [0, 0, 0, 0] and len(prompt) > 4
            assert found.get("other", 0) == int(alone)
    view.forget()
    other.forget()
    assert len(index) == index.held == 0


@given(st.dictionaries(st.integers(0, 40), st.integers(0, 12), max_size=12), st.integers(1, 12))
@settings(deadline=None)
def test_each_worker_is_found_with_what_it_has(has: dict[int, int], wanted: int) -> None:
    prompt = list(range(12 * SIZE + 1))
    every, index = list(links(prompt, SIZE)), PrefixIndex()
    for worker, count in has.items():
        for link in every[:count]:
            index.add(f"w{worker}", link)
    for link in every[5:]:  # A hole in front: it is of no use.
        index.add("holes", link)
    expected = {f"w{w}": min(count, wanted) for w, count in has.items() if count}
    assert index.cached(every[:wanted]) == expected


def test_a_slot_that_is_used_again_brings_nothing_of_its_former_owner() -> None:
    index = PrefixIndex()
    (link, *_) = links(list(range(9)), SIZE)
    index.add("old", link)
    index.drop("old", [link])
    index.add("new", b"something else")
    assert index.cached([link]) == {}


def test_slots_are_used_again_and_never_by_two() -> None:
    index = PrefixIndex()
    for name in ("a", "b", "c"):
        index.add(name, b"x")
    index.drop("a", [b"x"])
    index.drop("c", [b"x"])
    for name in ("d", "e", "f"):
        index.add(name, b"y")
    assert index.cached([b"x"]) == {"b": 1}
    assert index.cached([b"y"]) == {"d": 1, "e": 1, "f": 1}


def test_equal_tokens_under_another_salt_or_adapter_are_other_blocks() -> None:
    prompt = list(range(9))
    seen = {tuple(links(prompt, SIZE, *who)) for who in [(None, None), ("a", None), (None, "a")]}
    assert len(seen) == 3


def test_the_block_that_ends_with_the_last_token_is_never_reused() -> None:
    assert [len(list(links([1] * n, SIZE))) for n in (1, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]


def test_beyond_its_bound_the_index_counts_and_does_not_grow() -> None:
    index = PrefixIndex(blocks_max=2)
    for name in (b"a", b"b", b"c"):
        index.add("w", name)
    assert (len(index), index.overflowed_total) == (2, 1)
    index.add("v", b"a")
    assert index.cached([b"a", b"c"]) == {"w": 1, "v": 1}
    index.remove("w", b"c")
    index.drop("w", [b"a", b"b", b"c"])
    assert index.cached([b"a"]) == {"v": 1}


def test_who_is_too_far_behind_is_told_so() -> None:
    mirror = CacheMirror()
    for number in range(EVENTS_KEPT + 1):
        mirror.apply([Stored([number], None, [number] * SIZE)])
    assert mirror.since(0) is None
    assert len(mirror.since(1) or []) == EVENTS_KEPT
    assert mirror.since(mirror.seq) == []


def test_changes_kept_for_slow_routers_are_bounded_in_tokens_too() -> None:
    mirror, size = CacheMirror(), EVENT_TOKENS_KEPT // 4
    for number in range(6):
        mirror.apply([Stored([number], None, [number] * size)])
    assert mirror.since(1) is None
    assert len(mirror.since(2) or []) == 4


def test_a_large_cache_is_told_in_bounded_parts() -> None:
    mirror = CacheMirror()
    for number in range(5):
        mirror.apply([Stored([number], None, [number] * PART_TOKENS)])
    parts = list(mirror.snapshot())
    assert [part.part for part in parts] == [0, 1, 2, 3, 4]
    assert [part.last for part in parts] == [False] * 4 + [True]
    assert all(len(part.events) == 1 for part in parts)


@given(
    st.lists(acts.filter(lambda act: act[0] != "tell"), min_size=2, max_size=40),
    st.integers(0, 40),
    st.integers(1, 4),
)
@settings(deadline=None)
def test_a_snapshot_is_of_one_moment_and_what_changes_meanwhile_follows(
    done: list[tuple[Any, ...]], before: int, pace: int
) -> None:
    """One part is taken at every `pace`th change."""
    engine, index = Engine(), PrefixIndex()
    view = CacheView("w", SIZE, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.cache_mirror.PART_TOKENS", 2 * SIZE)
        for act, *rest in done[:before]:
            getattr(engine, act)(*rest)
        seq, parts = engine.mirror.seq, engine.mirror.snapshot()
        for number, (act, *rest) in enumerate(done[before:]):
            getattr(engine, act)(*rest)
            if number % pace == 0 and (part := next(parts, None)):
                assert view.snapshot(part)
        assert all(view.snapshot(part) for part in parts)
    changes = engine.mirror.since(seq)
    assert changes is not None
    assert view.events(seq, changes)
    assert len(view) == len(engine.cache)
    for act, *rest in done:
        if act == "store":
            prompt, salt = rest
            assert index.cached(links(prompt, SIZE, salt)).get("w", 0) == engine.has(prompt, salt)


def test_a_long_prompt_is_told_in_bounded_parts_and_few_events() -> None:
    engine, index = Engine(), PrefixIndex()
    prompt = [n % 7 for n in range(2 * PART_TOKENS + 1)]
    keys = list(range(2 * PART_TOKENS // SIZE))
    engine.mirror.apply([Stored(list(keys), None, prompt[:-1])])
    parts = list(engine.mirror.snapshot())
    assert [len(part.events) for part in parts] == [1, 1]
    view = CacheView("w", SIZE, index)
    assert all(view.snapshot(part) for part in parts)
    assert index.cached(links(prompt, SIZE)) == {"w": len(keys)}


@pytest.mark.parametrize(
    "nonsense",
    [
        KvStored([1], 99, [0] * SIZE),
        KvStored([1], -1, [0] * (SIZE - 1)),
        KvStored([1, 1], -1, [0] * 2 * SIZE),
        KvRemoved([99]),
    ],
)
def test_what_does_not_follow_is_not_believed(nonsense: Any) -> None:
    index = PrefixIndex()
    view = CacheView("w", SIZE, index)
    assert view.snapshot(KvSnapshot(3, 0, True, [KvStored([0], -1, [0] * SIZE)]))
    assert not view.events(3, [nonsense])
    assert not view.in_step
    assert len(index) == 0


def test_a_snapshot_with_a_part_missing_is_asked_for_again() -> None:
    view = CacheView("w", SIZE, PrefixIndex())
    assert view.snapshot(KvSnapshot(3, 0, False, [KvStored([0], -1, [0] * SIZE)]))
    assert not view.snapshot(KvSnapshot(3, 2, True, []))
    assert len(view) == 0


# ------------------------------------------------------------ all of them


@pytest.fixture
def caches() -> Caches:
    from tests.unit.test_dispatch import hello

    made = Caches()
    made.join(hello("w", Role.DECODE), 0.0)
    made.snapshot("w", KvSnapshot(0, 0, True, []), 0.0)
    return made


def test_an_index_that_is_often_wrong_is_asked_for_anew_and_counted(caches: Caches) -> None:
    wrong = Foretold(0, [5] * 100)
    answers = [caches.judge("w", wrong, 90, ASK_INTERVAL_S + n) for n in range(JUDGED_MIN)]
    assert answers == [False] * (JUDGED_MIN - 1) + [True]
    assert (caches.disbelieved_total, caches.in_step) == (1, 0)
    assert caches.error_tokens_total == 90 * JUDGED_MIN
    caches.snapshot("w", KvSnapshot(0, 0, True, []), 30.0)
    assert caches.in_step == 1
    assert not caches.judge("w", wrong, 90, 40.0), "it begins anew"


def test_an_index_that_is_right_is_believed(caches: Caches) -> None:
    for n in range(500):
        assert not caches.judge("w", Foretold(50, [5] * 100), 50 + n % 10, 10.0 + n)
    assert caches.disbelieved_total == 0


def test_equal_prompts_at_once_are_no_fault_of_the_index(caches: Caches) -> None:
    """All were placed before the first was computed; the worker has told of its blocks since."""
    prompt = list(range(161))
    assert not caches.events("w", 0, [KvStored(list(range(10)), -1, prompt[:160])], 6.0)
    for _ in range(2 * JUDGED_MIN):
        assert not caches.judge("w", Foretold(0, prompt), 160, 7.0)
    assert (caches.disbelieved_total, caches.in_step) == (0, 1)
    assert caches.error_tokens_total == 160 * 2 * JUDGED_MIN, "counted all the same"


def test_what_was_promised_and_not_there_is_a_fault_whatever_was_told_since(
    caches: Caches,
) -> None:
    prompt = list(range(161))
    assert not caches.events("w", 0, [KvStored(list(range(10)), -1, prompt[:160])], 6.0)
    for n in range(JUDGED_MIN):
        caches.judge("w", Foretold(160, prompt), 0, 7.0 + n)
    assert (caches.disbelieved_total, caches.in_step) == (1, 0)


def test_a_cache_that_does_not_fit_is_left_out_whole_until_it_does() -> None:
    from tests.unit.test_dispatch import hello

    caches, prompt = Caches(held_max=100), list(range(80 * 16))
    stored = KvStored(list(range(80)), -1, prompt)
    for name in ("a", "b"):
        caches.join(msgspec.structs.replace(hello(name, Role.DECODE), blocks_total=100), 0.0)
        assert not caches.snapshot(name, KvSnapshot(0, 0, False, [stored]), 0.0)
    assert (caches.held, caches.left_out_total) == (80, 1)
    assert not caches.snapshot("b", KvSnapshot(0, 1, True, []), 9.0), "the rest of what had no room"
    assert caches.cached_tokens(prompt, None, None) == {"a": 79 * 16}
    assert not caches.snapshot("a", KvSnapshot(0, 1, True, []), 9.0)
    assert caches.overdue(10.0) == []
    caches.leave("a")
    assert caches.held == 0
    assert caches.overdue(20.0) == ["b"]
    assert not caches.snapshot("b", KvSnapshot(0, 0, True, [stored]), 20.0)
    assert caches.cached_tokens(prompt, None, None) == {"b": 79 * 16}


def test_a_gap_is_asked_about_once_in_a_while_and_not_forgotten(caches: Caches) -> None:
    assert not caches.events("w", 5, [KvCleared()], 1.0), "it was asked a second ago"
    assert caches.overdue(2.0) == []
    assert caches.overdue(ASK_INTERVAL_S) == ["w"]
    assert caches.overdue(ASK_INTERVAL_S + 1) == []
    assert caches.overdue(2 * ASK_INTERVAL_S) == ["w"]
