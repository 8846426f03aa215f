"""Look, decide, scale: what is done, what is told, and by whom, on virtual time."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from controller.core.demand import Decision, Observed, Size
from controller.loop import TELL_S, Loop, Parts
from controller.observe import Look, RoleNames
from controller.records import Kind
from controller.scale import Failure, Scale, ScaleFailed
from tests.virtual_time import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

LOOK_S = 15.0


@dataclass
class World:
    """Everything beside the loop: what it sees, what it is told to want, what it writes."""

    missing: str = ""
    wants: Size = field(default_factory=lambda: Size(1, 1))
    asked: dict[str, int] = field(default_factory=lambda: {"p": 1, "d": 1})
    leads: bool = True
    broken: set[str] = field(default_factory=set)
    """Roles whose scale can't be written."""
    takes_s: float = 0.0
    looks: list[float] = field(default_factory=list)
    written: list[tuple[str, int]] = field(default_factory=list)
    decided: int = 0

    @property
    def left_s(self) -> float:
        return 5.0 if self.leads else 0.0

    async def look(self) -> Look:
        now = asyncio.get_running_loop().time()
        self.looks.append(now)
        await asyncio.sleep(self.takes_s)
        if self.missing:
            return Look(None, self.missing)
        wanted = Size(self.asked["p"], self.asked["d"])
        nothing: dict[str, Any] = {f.name: 0.0 for f in fields(Observed)}
        return Look(Observed(**nothing | {"at": now, "wanted": wanted, "ready": wanted}))

    async def write(self, role: str, replicas: int, left_s: Callable[[], float]) -> Scale:
        assert left_s() == self.left_s
        if role in self.broken:
            raise ScaleFailed(role, Failure.FORBIDDEN, "HTTP 403 no")
        self.written.append((role, replicas))
        self.asked[role] = replicas
        return Scale(replicas, replicas)


class Decider:
    def __init__(self, world: World) -> None:
        self._world = world

    def look(self, seen: Observed) -> Decision:
        self._world.decided += 1
        return Decision(seen.at, self._world.wants, "because", {"x": 1.23456})


def a_loop(world: World, *, dry_run: bool = False) -> Loop:
    parts: Any = Parts(world, Decider(world), world, world, RoleNames("r", "p", "d"))  # type: ignore[arg-type]
    return Loop(parts, LOOK_S, dry_run=dry_run)


def play(loop: Loop, seconds: float, *then: tuple[float, Callable[[], object]]) -> None:
    """For so long; `then`: what happens when."""

    async def run() -> None:
        clock = asyncio.get_running_loop()
        for at, do in then:
            clock.call_at(at, do)
        task = asyncio.create_task(loop.run())
        await asyncio.sleep(seconds)
        task.cancel()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(run())


def kinds(loop: Loop) -> list[Kind]:
    return [record.kind for record in loop.records]


def test_what_should_change_is_written_once_and_no_more() -> None:
    world = World(wants=Size(3, 1))
    loop = a_loop(world)
    play(loop, 40.0)
    assert world.written == [("p", 3)]
    assert kinds(loop) == [Kind.SCALED, Kind.KEPT, Kind.KEPT]
    first = next(iter(loop.records))
    assert (first.prefill, first.decode) == ((1, 3), (1, 1))


def test_a_follower_decides_and_writes_nothing_until_it_leads() -> None:
    world = World(wants=Size(2, 5), leads=False)
    loop = a_loop(world)
    play(loop, 40.0, (20.0, lambda: setattr(world, "leads", True)))
    assert kinds(loop) == [Kind.FOLLOWED, Kind.FOLLOWED, Kind.SCALED]
    assert world.decided == 3
    assert world.written == [("p", 2), ("d", 5)]


def test_one_roles_failure_does_not_keep_the_other_from_what_it_needs() -> None:
    world = World(wants=Size(2, 2), broken={"p"})
    loop = a_loop(world)
    play(loop, 40.0, (20.0, world.broken.clear))
    assert world.written == [("d", 2), ("p", 2)]
    assert kinds(loop) == [Kind.FAILED, Kind.FAILED, Kind.SCALED]
    assert loop.failures == {"forbidden": 2}
    assert next(iter(loop.records)).trouble == "p: HTTP 403 no"


def test_where_not_all_is_seen_nothing_is_decided() -> None:
    world = World(wants=Size(2, 2), missing="no router is ready")
    loop = a_loop(world)
    play(loop, 40.0)
    assert (world.decided, world.written) == (0, [])
    assert kinds(loop) == [Kind.HELD] * 3
    assert loop.looked_at is None


def test_a_dry_run_writes_nothing() -> None:
    world = World(wants=Size(2, 2), leads=False)
    loop = a_loop(world, dry_run=True)
    play(loop, 40.0)
    assert world.written == []
    assert kinds(loop) == [Kind.DRY_RUN] * 3


def test_looks_that_took_too_long_are_not_made_up_for() -> None:
    world = World(takes_s=40.0)
    play(
        a_loop(world), 100.0, (1.0, lambda: setattr(world, "takes_s", 0.0))
    )  # The first look is under way.
    assert world.looks == [0.0, 40.0, 55.0, 70.0, 85.0]


def test_at_rest_the_log_has_a_line_a_minute_and_a_change_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    loop = a_loop(world)
    with caplog.at_level(logging.INFO, "controller.loop"):
        play(loop, 241.0, (130.0, lambda: setattr(world, "wants", Size(2, 1))))
    told = [(record.kind, record.prefill) for record in caplog.records]
    assert told == [
        ("kept", (1, 1)),  # 0
        ("kept", (1, 1)),  # 60
        ("kept", (1, 1)),  # 120
        ("scaled", (1, 2)),  # 135
        ("kept", (2, 2)),  # 150
        ("kept", (2, 2)),  # 210
    ]
    assert TELL_S == 60.0
    assert caplog.records[0].facts == {"x": 1.235}
