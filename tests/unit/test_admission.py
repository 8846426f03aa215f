"""The queue's laws: turns, shares, patience; and the tenants' buckets."""

from __future__ import annotations

import os
from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.admission import PATIENCE_S, QUANTUM_TOKENS, Entry, Queue
from router.core.limits import TENANTS_MAX, Buckets, Limits

EXAMPLES = int(os.environ.get("SEEDS", "200"))
"""`make sim` asks for more."""
_TENANTS = "abc"


def entry(
    name: str, tenant: str = "a", tokens: int = 100, priority: int = 0,
    deadline_at: float = 100.0, at: float = 0.0,
) -> Entry:  # fmt: skip
    return Entry(deadline_at, at, name, tenant, priority, tokens, at + 300)


def queue(*entries: Entry, shares: dict[str, float] | None = None) -> Queue:
    q = Queue(shares)
    for each in entries:
        q.push(each, each.arrived_at)
    return q


def turns(q: Queue, now: float = 0.0) -> list[str]:
    """All of them, each let in at its turn."""
    found = []
    while first := q.next((), now):
        q.grant(first.request_id, now)
        found.append(first.request_id)
    return found


def at_rest(q: Queue) -> bool:
    return not (len(q) or q.tokens or q._waiting or q._clocks or q._blocked_since)


def test_lower_priorities_first_and_then_earlier_deadlines() -> None:
    q = queue(
        entry("late", deadline_at=9), entry("soon", deadline_at=5, at=1),
        entry("urgent", priority=-1, deadline_at=50), entry("idle", priority=3, deadline_at=1),
    )  # fmt: skip
    assert turns(q) == ["urgent", "soon", "late", "idle"]


_ASKS = st.lists(
    st.tuples(st.sampled_from(_TENANTS), st.integers(1, 20_000), st.floats(0, 1000)),
    min_size=1, max_size=60,
)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(_ASKS, st.tuples(*[st.floats(0.5, 8.0)] * 3))
def test_no_tenant_that_waits_falls_behind_its_share(
    asks: list[tuple[str, int, float]], weights: tuple[float, float, float]
) -> None:
    """By more than a quantum and a request, whatever deadlines the others bring."""
    shares = dict(zip(_TENANTS, weights, strict=True))
    entries = [
        entry(str(n), tenant, tokens, deadline_at=deadline)
        for n, (tenant, tokens, deadline) in enumerate(asks)
    ]
    q, had = queue(*entries, shares=shares), dict.fromkeys(_TENANTS, 0.0)
    waiting = Counter(e.tenant for e in entries)
    most = max(e.tokens / shares[e.tenant] for e in entries)
    while first := q.next((), 0.0):
        q.grant(first.request_id, 0.0)
        had[first.tenant] += first.tokens / shares[first.tenant]
        waiting[first.tenant] -= 1
        for tenant in _TENANTS:
            if waiting[tenant]:
                ahead = had[first.tenant] - had[tenant]
                assert ahead <= QUANTUM_TOKENS + most + 1e-6
    assert at_rest(q)


def test_shares_are_held_for_as_long_as_both_wait() -> None:
    q = queue(
        *(entry(f"a{n}", "a", 1000, deadline_at=n) for n in range(400)),
        *(entry(f"b{n}", "b", 1000, deadline_at=900 + n) for n in range(400)),
        shares={"b": 3.0},
    )
    first = Counter(name[0] for name in turns(q)[:400])
    assert 280 <= first["b"] <= 310


def test_who_comes_back_starts_where_the_others_are() -> None:
    q = queue(*(entry(f"a{n}", "a", 5000) for n in range(20)))
    for n in range(10):
        q.grant(f"a{n}", 0.0)
    q.push(entry("b0", "b", 5000), 0.0)
    for n in range(1, 10):
        q.push(entry(f"b{n}", "b", 5000), 0.0)
    first = Counter(name[0] for name in turns(q)[:10])
    assert min(first["a"], first["b"]) >= 3, "and takes no turns for the time that it was away"


def test_the_queue_is_work_conserving_until_patience_ends() -> None:
    q = queue(entry("large", tokens=10_000, deadline_at=1), entry("small", deadline_at=2))
    first = q.next((), 0.0)
    assert first is not None
    assert first.request_id == "large"
    q.no_room("large", 0.0)
    second = q.next({"large"}, 0.0)
    assert second is not None
    assert second.request_id == "small"
    assert q.kept_for(PATIENCE_S - 0.1) is None
    q.push(entry("urgent", priority=-5, deadline_at=0.5, at=1.0), 1.0)
    kept, turn = q.kept_for(PATIENCE_S), q.next((), PATIENCE_S)
    assert kept is not None
    assert turn is kept
    assert kept.request_id == "large", "before any priority"


_DOINGS = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "turn", "no room", "leave", "expire"]),
        st.integers(0, 30), st.sampled_from(_TENANTS), st.integers(-1, 1), st.floats(0, 50),
    ),
    max_size=80,
)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(_DOINGS)
def test_whatever_happens_the_accounts_return_to_zero(
    doings: list[tuple[str, int, str, int, float]],
) -> None:
    q, now, live = Queue(), 0.0, dict[str, Entry]()
    for kind, number, tenant, priority, passes_s in doings:
        name, now = str(number), now + passes_s
        match kind:
            case "push":
                live.setdefault(name, entry(name, tenant, 10 + number, priority, now + 9, now))
                q.push(live[name], now)
            case "turn":
                if first := q.next((), now):
                    assert q.grant(first.request_id, now) is first
                    del live[first.request_id]
            case "no room":
                if first := q.next((), now):
                    q.no_room(first.request_id, now)
            case "leave":
                assert (q.remove(name, now) is None) == (live.pop(name, None) is None)
            case _:
                for late in q.expired(now):
                    q.remove(late.request_id, now)
                    del live[late.request_id]
        assert len(q) == len(live)
        assert q.tokens == sum(e.tokens for e in live.values())
        assert all(now < e.expires_at for e in live.values()) or kind != "expire"
    for name in list(live):
        q.remove(name, now)
    assert at_rest(q)


def test_the_wait_is_foretold_by_the_pace_of_the_queue() -> None:
    q = queue(*(entry(f"r{n}", tokens=100) for n in range(100)))
    assert q.wait_s(0, 0.0) == 0.0, "nothing is known yet"
    for n in range(50):
        q.grant(f"r{n}", n * 0.1 + 0.1)
    assert 4.5 < q.wait_s(0, 5.0) < 5.5
    assert q.wait_s(-1, 5.0) == 0.0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), min_size=1, max_size=60))
def test_a_tenant_is_charged_no_more_than_its_rate_its_burst_and_one_request(
    asks: list[tuple[int, float]],
) -> None:
    limits = Limits(tenant_tokens_per_s=1000, tenant_burst_s=2)
    buckets, now, charged = Buckets(limits), 0.0, 0
    for tokens, passes_s in asks:
        now += passes_s
        wait_s = buckets.wait_s("t", now)
        if not wait_s:
            buckets.charge("t", tokens, now)
            charged += tokens
            assert charged <= 2000 + 1000 * now + 5000
        else:
            assert buckets.wait_s("t", now + wait_s + 1e-3) == 0.0, "as Retry-After says"
        assert buckets.wait_s("another", now) == 0.0


def test_without_a_rate_nobody_is_counted_and_with_one_not_everybody() -> None:
    free, bound = Buckets(Limits()), Buckets(Limits(tenant_tokens_per_s=1))
    for n in range(TENANTS_MAX + 10):
        free.charge(str(n), 10**9, 0.0)
        bound.charge(str(n), 5, 0.0)
    assert not free._levels
    assert free.wait_s("1", 0.0) == 0.0
    assert len(bound._levels) == TENANTS_MAX


def test_no_queue_grows_while_less_comes_than_goes() -> None:
    q, counts, longest = Queue(), defaultdict(int), 0
    for n in range(5000):
        now = n * 0.01
        if n % 5 < 4:
            q.push(entry(f"r{n}", _TENANTS[n % 3], 1 + n % 97, deadline_at=now + 300, at=now), now)
        if first := q.next((), now):
            q.grant(first.request_id, now)
            counts[first.tenant] += 1
        longest = max(longest, len(q))
    assert longest <= 2
    assert len(counts) == 3
