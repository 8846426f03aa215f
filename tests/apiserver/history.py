"""One seeded history of a watch on virtual time: a session, a store, and everything that fails."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random
from typing import TYPE_CHECKING

from controller.core.patience import Patience
from controller.core.peers import Kind, Membership, RoleFacts, sightings
from controller.core.session import Failure, Session
from controller.core.slices import merge
from tests.apiserver.group import NAMESPACE, ROLE_LABEL, Group
from tests.apiserver.store import SLICES, Refusal, Store, Watcher, line, status

if TYPE_CHECKING:
    from collections.abc import Callable

LATENCY_MAX_S = 1.0
BOOKMARK_S = 60.0
FAULTY_S = 600.0
TROUBLE_MAX_S = 300.0
ROLES = {role: RoleFacts(7000) for role in ("prefill", "decode")}
_GAP = 1.0 - 1e-6


@dataclass
class Connection:
    """One request's way back."""

    watcher: Watcher | None = None
    open: bool = True
    mute: bool = False
    """Half open: nothing comes, not even an end."""
    last: float = 0.0
    """When its latest chunk arrives: one connection keeps its order."""
    ends_at: float = field(default=float("inf"))


class History:
    """`run` plays it. What a law forbids is an AssertionError with the seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = 0.0
        self.patience = Patience()
        self.store = Store(self.random.randint(1, 10**6))
        self.group = Group(self.store)
        self.others = Group(self.store, "another")
        self._page = self.random.choice([1, 2, 500])
        self.session = Session(
            self.group.selector, Random(seed + 1).uniform, self.patience, page=self._page
        )
        self.seen: Counter[str] = Counter()
        """What happened, to know that histories have it all."""
        self._server = self.random.choice(
            ["snapshots", "snapshots", "refuses them", "ignores them"]
        )
        self._membership = Membership()
        self._told: dict[str, Kind] = {}
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._sent_at: list[float] = []
        self._connection: Connection | None = None
        self._troubles: dict[str, float] = {}
        """Until when the server is how."""
        self._last_fault = 0.0
        self._versions: dict[tuple[tuple[str, str], ...], float] = {}
        """When each state of the group was replaced by the next; the current one: never."""
        self._current: tuple[tuple[str, str], ...] = ()

    # ------------------------------------------------------------ the story

    def run(self) -> None:
        self._note_state()
        self.store.listeners.append(self._on_written)
        for _ in range(self.random.randint(1, 6)):
            self.group.change(self.random)
        self._plan()
        end = FAULTY_S + TROUBLE_MAX_S + self.patience.stale_max_s + 70
        self._at(end, lambda: None)
        self._at(0.0, self._next)
        while self._later:
            self.now, _, do = heapq.heappop(self._later)
            if self.now > end:
                break
            do()
            self._check()
        self._check_end()

    def _plan(self) -> None:
        random = self.random
        for _ in range(random.randint(5, 60)):
            self._at(random.uniform(0, FAULTY_S + 60), partial(self.group.change, random))
        for _ in range(random.randint(0, 10)):
            self._at(random.uniform(0, FAULTY_S), partial(self.others.change, random))
        faults = [
            self._cut, self._mute, self._end, self._compact, self._expire, self._garble,
            self._error_event, partial(self._trouble, "down"), partial(self._trouble, "hangs"),
            partial(self._trouble, "unauthorized"), partial(self._trouble, "throttles"),
            partial(self._trouble, "fails"), partial(self._trouble, "ends early"),
            partial(self._trouble, "page"), partial(self._trouble, "stalls"),
        ]  # fmt: skip
        for _ in range(random.choice([0, 1, 3, 8, 20])):
            self._at(random.uniform(0, FAULTY_S), partial(self._fault, random.choice(faults)))

    def _fault(self, fault: Callable[[], None]) -> None:
        fault()
        self._last_fault = max(self._last_fault, self.now)

    def _at(self, at: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._later, (at, next(self._number), do))

    # ------------------------------------------------------------ the client's shell

    def _next(self) -> None:
        query = self.session.next(self.now)
        if query is None:
            self._at(self.session.next_at, self._next)
            return
        self._sent_at.append(self.now)
        self._connection = connection = Connection(last=self.now)
        self._await(connection)
        self._at(self.now + self._latency(), partial(self._serve, connection, query))

    def _await(self, connection: Connection) -> None:
        due = self.session.give_up_at

        def give_up() -> None:
            if connection.open and due == self.session.give_up_at:
                self.seen["silent"] += 1
                self._close(connection)
                self.session.failed(Failure.SILENT, "timed out", self.now)
                self._over()

        self._at(due, give_up)

    def _over(self) -> None:
        if self.session.done:
            if self._connection:
                self._close(self._connection)
            self._connection = None
            self._at(max(self.now, self.session.next_at), self._next)

    def _close(self, connection: Connection) -> None:
        connection.open = False
        connection.watcher = None

    def _arrive(self, connection: Connection, do: Callable[[], None]) -> None:
        """After some latency, in order, unless the connection is closed or mute by then."""

        def arrive() -> None:
            if connection.open and not connection.mute:
                do()
                if not self.session.done:
                    self._await(connection)
                self._over()

        connection.last = max(connection.last, self.now + self._latency())
        self._at(connection.last, arrive)

    def _latency(self) -> float:
        return self.random.random() ** 8 * LATENCY_MAX_S / 2

    # ------------------------------------------------------------ the server

    def _serve(self, connection: Connection, query: dict[str, str]) -> None:
        random, session = self.random, self.session
        if not connection.open or self._is("hangs"):
            return
        if self._is("down"):
            self._fails(connection, Failure.UNREACHABLE)
        elif self._is("unauthorized"):
            self._refuse(connection, Refusal(401, "Unauthorized", "Unauthorized"))
        elif self._is("throttles"):
            after_s = random.choice([None, 1.0, 10.0, 20.0])
            self._refuse(connection, Refusal(429, "TooManyRequests", "later"), after_s)
        elif self._is("fails"):
            code = random.choice([500, 502, 503, 504])
            self._refuse(connection, Refusal(code, "InternalError", "oh"))
        elif self._is("page"):
            self._arrive(connection, lambda: session.opened(self.now))
            self._body(connection, b"<html>\nSign in\n</html>")
        elif "watch" not in query:
            self._list(connection, query)
        elif self._server == "refuses them" and "sendInitialEvents" in query:
            self._refuse(connection, Refusal(422, "Invalid", "sendInitialEvents is forbidden"))
        else:
            self._watch(connection, query)

    def _list(self, connection: Connection, query: dict[str, str]) -> None:
        self.seen["more pages" if "continue" in query else "list"] += 1
        try:
            page = self.store.page(SLICES, NAMESPACE, query)
        except Refusal as refusal:
            self.seen["page expired"] += 1
            self._refuse(connection, refusal)
            return
        self._arrive(connection, lambda: self.session.opened(self.now))
        self._body(connection, json.dumps(page).encode())
        if self.now < FAULTY_S and self.random.random() < 0.1:
            self._fault(self._compact)

    def _watch(self, connection: Connection, query: dict[str, str]) -> None:
        if self._server == "ignores them":
            query = {k: v for k, v in query.items() if k != "sendInitialEvents"}
        try:
            watcher = Watcher(self.store, SLICES, NAMESPACE, query)
        except Refusal as refusal:
            as_event = self.random.random() < 0.5
            self.seen["410 as an event" if as_event else "410 as a status"] += 1
            if as_event:
                self._arrive(connection, lambda: self.session.opened(self.now))
                self._send(connection, line("ERROR", refusal.body))
            else:
                self._refuse(connection, refusal)
            return
        self._arrive(connection, lambda: self.session.opened(self.now))
        if self._is("stalls"):
            connection.mute = True
            return
        connection.watcher = watcher
        if "sendInitialEvents" in query and self.now < FAULTY_S and self.random.random() < 0.2:
            self._fault(partial(self._break_snapshot, connection, watcher.lines()))
            return
        self._flush(connection)
        lasts_s = 1.0 if self._is("ends early") else int(query["timeoutSeconds"])
        self._at(self.now + lasts_s, partial(self._end, connection))
        self._at(self.now + BOOKMARK_S, partial(self._bookmark, connection))

    def _flush(self, connection: Connection) -> None:
        if connection.watcher and (lines := connection.watcher.lines()):
            self._send(connection, b"".join(lines))

    def _bookmark(self, connection: Connection) -> None:
        if connection.watcher:
            self._flush(connection)
            self._send(connection, connection.watcher.bookmark())
            self._at(self.now + BOOKMARK_S, partial(self._bookmark, connection))

    def _send(self, connection: Connection, data: bytes) -> None:
        """In one piece, or torn anywhere."""
        cut = self.random.randrange(len(data)) if self.random.random() < 0.3 else 0
        for part in filter(None, (data[:cut], data[cut:])):
            self._arrive(connection, partial(self._feed, part))

    def _feed(self, part: bytes) -> None:
        if not self.session.done and self.session.feed(part, self.now):
            self._on_change()

    def _body(self, connection: Connection, data: bytes) -> None:
        self._send(connection, data)

        def end() -> None:
            if not self.session.done and self.session.ended(self.now):
                self._on_change()

        self._arrive(connection, end)

    def _refuse(
        self, connection: Connection, refusal: Refusal, after_s: float | None = None
    ) -> None:
        self.seen[f"HTTP {refusal.code}"] += 1
        body = json.dumps(refusal.body).encode()

        def arrive() -> None:
            self.session.refused(refusal.code, body, after_s, self.now)
            if after_s is not None:
                assert self.session.next_at >= self.now + after_s

        self._arrive(connection, arrive)

    def _fails(self, connection: Connection, failure: Failure) -> None:
        self.seen[failure] += 1
        self._arrive(connection, lambda: self.session.failed(failure, "gone", self.now))

    # ------------------------------------------------------------ what goes wrong

    def _is(self, trouble: str) -> bool:
        return self.now < self._troubles.get(trouble, 0.0)

    def _trouble(self, kind: str) -> None:
        until = self.now + self.random.choice([1.0, 5.0, 30.0, TROUBLE_MAX_S])
        self._troubles[kind] = max(self._troubles.get(kind, 0.0), until)
        self._last_fault = max(self._last_fault, until)
        self.seen[kind] += 1
        if kind == "down":
            self._cut()
            if self.random.random() < 0.7:
                self.store.compact()

    def _streaming(self) -> Connection | None:
        connection = self._connection
        return connection if connection and connection.watcher and not connection.mute else None

    def _cut(self) -> None:
        if connection := self._streaming():
            self.seen["cut"] += 1
            if self.random.random() < 0.5 and connection.watcher:
                half = connection.watcher.bookmark()
                self._arrive(connection, partial(self._feed, half[: len(half) // 2]))
            connection.watcher = None
            self._fails(connection, Failure.BROKEN_OFF)

    def _break_snapshot(self, connection: Connection, lines: list[bytes]) -> None:
        """Some of it comes, and what came may be deleted before the next one."""
        self.seen["broken snapshot"] += 1
        if part := b"".join(lines[: self.random.randrange(len(lines))]):
            self._send(connection, part)
        connection.watcher = None
        self._fails(connection, Failure.BROKEN_OFF)
        if self.random.random() < 0.5:
            self._at(self.now + LATENCY_MAX_S, partial(self.group.change, self.random))

    def _mute(self) -> None:
        if connection := self._streaming():
            self.seen["half open"] += 1
            connection.mute = True

    def _end(self, connection: Connection | None = None) -> None:
        connection = connection or self._streaming()
        if connection and connection.watcher:
            self.seen["clean end"] += 1
            self._flush(connection)
            connection.watcher = None

            def end() -> None:
                self.session.ended(self.now)

            self._arrive(connection, end)

    def _compact(self) -> None:
        self.seen["compaction"] += 1
        self.store.compact()
        self._end()

    def _last_words(self, data: bytes) -> None:
        if connection := self._streaming():
            self._flush(connection)
            self._send(connection, data)
            connection.watcher = None

    def _expire(self) -> None:
        self.seen["expired in the stream"] += 1
        self.store.compact()
        self._last_words(line("ERROR", status(410, "Expired", "too old resource version")))

    def _error_event(self) -> None:
        self.seen["error event"] += 1
        self._last_words(line("ERROR", status(500, "InternalError", "etcd has no leader")))

    def _garble(self) -> None:
        self.seen["garbage"] += 1
        bad = [
            b"{\n",
            b'{"type":"ADDED"}\n',
            b'{"type":"ADDED","object":{"metadata":7}}\n',
            b"\xff\n",
        ]
        self._last_words(self.random.choice(bad))

    # ------------------------------------------------------------ the laws

    def _on_written(self) -> None:
        self._note_state()
        if self._connection and not self._connection.mute:
            self._flush(self._connection)

    def _note_state(self) -> None:
        found = self.store.selected(SLICES, NAMESPACE, self.group.selector)
        state = tuple((s["metadata"]["name"], s["metadata"]["resourceVersion"]) for s in found)
        if state != self._current or not self._versions:
            self._versions[self._current] = self.now
            self._current = state
            self._versions[state] = float("inf")

    def _view(self) -> tuple[tuple[str, str], ...]:
        slices = self.session.slices or {}
        return tuple(sorted((n, s.metadata.resource_version) for n, s in slices.items()))

    def _on_change(self) -> None:
        assert self._view() in self._versions, f"seed {self.seed}: it never was like that"
        assert self.session.slices is not None
        found = sightings(merge(self.session.slices.values(), ROLE_LABEL), ROLES)
        self._tell(self._membership.observe(found, self.now))

    def _tell(self, changes: list) -> None:
        for change in changes:
            if change.kind is Kind.GONE:
                del self._told[change.peer.uid]
            else:
                self._told[change.peer.uid] = change.kind
        if (due := self._membership.due_at) is not None:
            self._at(due, lambda: self._tell(self._membership.tick(self.now)))

    def _check(self) -> None:
        session = self.session
        if session.slices is None:
            assert self.now < self._last_fault + self.patience.stale_max_s, f"seed {self.seed}"
            return
        superseded = self._versions[self._view()]
        if self.now >= self._last_fault + self.patience.stale_max_s:
            # Without faults only the pause between two watches, or between two pages.
            pauses = 1 if self._page == 500 else 20
            late_s = pauses * (2 * self.patience.gap_s + LATENCY_MAX_S)
            assert superseded >= self.now - late_s, f"seed {self.seed}: stale"
        assert session.heard_at is not None
        assert superseded >= session.heard_at - 2 * LATENCY_MAX_S, f"seed {self.seed}: boasts"

    def _check_end(self) -> None:
        assert self._view() == self._current, f"seed {self.seed}"
        gaps = [b - a for a, b in zip(self._sent_at, self._sent_at[1:], strict=False)]
        assert all(gap >= _GAP for gap in gaps), f"seed {self.seed}: {min(gaps)} s"
        wanted = self.store.selected(SLICES, NAMESPACE, self.group.selector)
        ready, there = set(), set()
        terminating = set()
        newest: dict[str, tuple[int, bool]] = {}
        for part in wanted:
            version = int(part["metadata"]["resourceVersion"])
            for endpoint in part["endpoints"] or ():
                uid, conditions = endpoint["targetRef"]["uid"], endpoint["conditions"]
                there.add(uid)
                if conditions["terminating"]:
                    terminating.add(uid)
                newest[uid] = max(newest.get(uid, (0, False)), (version, conditions["serving"]))
        ready = {uid for uid, (_, serving) in newest.items() if serving} - terminating
        assert set(self._told) == there, f"seed {self.seed}"
        assert {u for u, k in self._told.items() if k is Kind.READY} == ready, f"seed {self.seed}"
