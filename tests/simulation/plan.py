"""What a seed means: the fleet, what clients ask and when they leave, and what goes wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import StrEnum

from router.ask import Ask, Reserve
from router.core.placement import Disaggregate
from workers.api import Role
from workers.engines.sim_settings import SimSettings

FIRST_FAULT_S = 2.0
MODEL = "model digest"
ROOMY_TOKENS = 5000


class Kind(StrEnum):
    """What can go wrong. `for_s` is how long, `who` a worker's or a router's name."""

    CRASH = "crash"
    """SIGKILL; its peers see the connection close. Back after `for_s` under a new epoch."""
    VANISH = "vanish"
    """As a crash, but of the machine: nothing tells its peers."""
    STOP = "stop"
    """SIGSTOP, and SIGCONT after `for_s`: its connections end when heartbeats do."""
    FREEZE = "freeze"
    """Its event loop is held up for `for_s`; ZeroMQ's own thread still answers heartbeats."""
    HANG = "hang"
    """The engine does not step; the rest of the worker is well."""
    FAIL = "fail"
    """The engine fails whatever it is given."""
    DRAIN = "drain"
    """SIGTERM with `limit_s` to finish; back after another `for_s`."""
    CUT = "cut"
    """All of its connections break."""
    STALL_TO_ROUTER = "stall to router"
    """What it says is late: views go stale."""
    STALL_TO_WORKER = "stall to worker"
    ROUTER_STOP = "router stop"
    ROUTER_FREEZE = "router freeze"
    ROUTER_DIES = "router dies"


@dataclass(frozen=True, slots=True)
class Fault:
    at: float
    kind: Kind
    who: str
    for_s: float
    limit_s: float = 0.0
    stays_away: bool = False


@dataclass(frozen=True, slots=True)
class Departure:
    """When the client goes: so many seconds after it asked, or with its k-th token."""

    after_s: float | None = None
    at_token: int | None = None
    """The front finds a stop string in this token: not the client's going, but `enough`."""


@dataclass(frozen=True, slots=True)
class Call:
    at: float
    router: str
    ask: Ask
    departure: Departure


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    worker_id: str
    role: Role
    settings: SimSettings
    model: str = MODEL
    """Its digest."""
    load_s: float = 0.0
    """How long its engine takes to load."""


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    latency_s: float
    workers: tuple[WorkerPlan, ...]
    routers: tuple[str, ...]
    calls: tuple[Call, ...]
    faults: tuple[Fault, ...]
    reserves: tuple[Reserve, ...]
    """Of each router."""
    disaggregate: Disaggregate = Disaggregate.ALWAYS

    @property
    def calm(self) -> bool:
        return not self.faults

    @property
    def lease_s(self) -> float:
        return self.workers[0].settings.lease_s

    @property
    def tokens_total(self) -> int:
        """Room of each worker."""
        s = self.workers[0].settings
        return s.blocks_total * s.block_tokens

    @property
    def quiet_at(self) -> float:
        """When the last call has come and the last fault is over."""
        ends = [f.at + f.for_s + f.limit_s for f in self.faults]
        return max([c.at for c in self.calls] + ends)

    def settings(self, worker_id: str) -> SimSettings:
        return next(w.settings for w in self.workers if w.worker_id == worker_id)

    def describe(self) -> str:
        roles = [
            f"{w.worker_id}({w.settings.blocks_total} blocks{', streams' * w.settings.streams})"
            for w in self.workers
        ]
        return (
            f"seed {self.seed}: {', '.join(roles)}; routers {', '.join(self.reserves)}, "
            f"apart {self.disaggregate}; "
            f"{len(self.calls)} requests, lease {self.lease_s:.1f} s, "
            f"latency {self.latency_s * 1000:.1f} ms; faults: "
            + ("; ".join(f"{f.at:.2f} s {f.kind} {f.who} for {f.for_s:.1f} s" for f in self.faults)
               or "none")
        )  # fmt: skip


def make_plan(seed: int) -> Plan:
    """Each part draws from a stream of its own, so that a change to one leaves the others."""
    workers = _fleet(_stream(seed, "fleet"), calm=_calm(seed))
    rng = _stream(seed, "traffic")
    routers = ("ra", "rb")[: rng.choice((1, 1, 2))]
    span_s = rng.uniform(8.0, 25.0)
    calls = _calls(rng, routers, span_s, workers[0].settings)
    faults: tuple[Fault, ...] = ()
    if not _calm(seed):
        faults = _faults(_stream(seed, "faults"), workers, routers, span_s)
    latency_s = _stream(seed, "network").choice((0.0002, 0.002, 0.02))
    plan = Plan(seed, latency_s, workers, routers, calls, faults, ())
    plan = _handing_off(_stream(seed, "streams"), plan)
    kind = _stream(seed, "placement").choice(list(Disaggregate))
    return replace(plan, disaggregate=kind)


def _handing_off(rng: random.Random, plan: Plan) -> Plan:
    """Most fleets hand off under their routers' handles, some in part, some not at all."""
    share = rng.choice((0.0, 0.5, 1.0, 1.0, 1.0, 1.0))
    workers = [
        replace(w, settings=replace(w.settings, streams=rng.random() < share))
        for w in plan.workers
    ]  # fmt: skip
    reserves = [rng.choice(list(Reserve)) for _ in plan.routers]
    if plan.calm and plan.tokens_total < ROOMY_TOKENS:
        # Prompts may wait for each other's blocks until a lease ends (docs/handoff.md), and in a
        # calm run none does.
        reserves = [Reserve.AT_LAST_STEP if r is Reserve.AT_DISPATCH else r for r in reserves]
    calls = [replace(c, ask=replace(c.ask, relay=rng.random() < 0.8)) for c in plan.calls]
    return replace(plan, workers=tuple(workers), reserves=tuple(reserves), calls=tuple(calls))


def _stream(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed}/{name}")


def _calm(seed: int) -> bool:
    """One seed in five has no faults: then nothing but what is asked too much may fail."""
    return _stream(seed, "calm").random() < 0.2


def _fleet(rng: random.Random, *, calm: bool) -> tuple[WorkerPlan, ...]:
    block_tokens = rng.choice((4, 16))
    base = SimSettings(
        # In a calm run no lease ends by itself: what is free at the end has been released.
        lease_s=1000.0 if calm else rng.uniform(2.0, 8.0),
        block_tokens=block_tokens,
        # From room for three long requests at most to room for all.
        blocks_total=rng.choice((700, 1200, 6000)) // block_tokens,
        chunk_tokens=rng.choice((64, 512)),
        running_max=rng.choice((3, 64)),
        max_model_len=512,
        pull_bytes_per_s=rng.choice((2e7, 5e9)),
    )
    kinds = [
        (Role.PREFILL, "p", (1, 2, 3)),
        (Role.DECODE, "d", (1, 2, 3)),
        (Role.MIXED, "m", (0, 0, 1)),
    ]
    workers = []
    for role, letter, counts in kinds:
        for number in range(rng.choice(counts)):
            slow = rng.choice((1, 1, 1, 4))
            pace = replace(
                base,
                step_s=rng.uniform(0.01, 0.04) * slow,
                prefill_tokens_per_s=rng.uniform(1000, 8000) / slow,
            )
            workers.append(WorkerPlan(f"{letter}{number}", role, pace))
    return tuple(workers)


def _calls(
    rng: random.Random, routers: tuple[str, ...], span_s: float, settings: SimSettings
) -> tuple[Call, ...]:
    prefixes = [_tokens(rng, rng.randint(8, 200)) for _ in range(3)]
    calls: list[Call] = []
    at = FIRST_FAULT_S - 1
    pace_s = span_s / rng.randint(20, 60)
    while at < span_s:
        at += rng.expovariate(1 / pace_s)
        for _ in range(rng.choice((1, 1, 1, 1, 6))):  # Some come in a crowd.
            prompt = [
                *(rng.choice(prefixes) if rng.random() < 0.6 else []),
                *_tokens(rng, rng.randint(1, 120)),
            ]
            outputs = 1 + int(rng.expovariate(1 / 25))
            if rng.random() < 0.06:
                outputs = rng.randint(200, 450)
            if rng.random() < 0.02:  # More than any engine of this fleet can ever hold.
                prompt = _tokens(rng, settings.max_model_len + rng.randint(0, 9))
            ask = Ask(
                request_id=f"{rng.choice(routers)}-{len(calls)}",
                prompt_token_ids=prompt,
                max_tokens=outputs,
                cache_salt=rng.choice((None, None, "salt")),
                priority=rng.choice((0, 0, 0, -1, 2)),
            )  # fmt: skip
            calls.append(Call(at, ask.request_id.split("-")[0], ask, _departure(rng, outputs)))
    return tuple(calls)


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(100, 32_000) for _ in range(count)]


def _departure(rng: random.Random, outputs: int) -> Departure:
    kind = rng.random()
    if kind < 0.2:
        return Departure(after_s=rng.choice((0.0, rng.uniform(0, 0.2), rng.uniform(0, 3))))
    if kind < 0.35:
        return Departure(at_token=rng.randint(1, outputs))
    return Departure()


def _faults(
    rng: random.Random, workers: tuple[WorkerPlan, ...], routers: tuple[str, ...], span_s: float
) -> tuple[Fault, ...]:
    kinds = rng.sample(list(Kind), rng.randint(1, 4))
    faults = []
    for _ in range(rng.choice((2, 4, 10))):
        kind = rng.choice(kinds)
        at = rng.uniform(FIRST_FAULT_S, span_s)
        who = rng.choice(workers).worker_id
        for_s = rng.choice((rng.uniform(0.05, 2.0), rng.uniform(4.0, 12.0)))
        limit_s, stays_away = 0.0, False
        match kind:
            case Kind.HANG:
                for_s = rng.choice((for_s, 250.0))  # Longer than three tries.
            case Kind.DRAIN:
                limit_s = rng.choice((0.2, 2.0, 10.0))
            case Kind.CRASH | Kind.VANISH:
                stays_away = rng.random() < 0.15
            case Kind.ROUTER_STOP | Kind.ROUTER_FREEZE:
                who = rng.choice(routers)
            case Kind.ROUTER_DIES:
                who = routers[-1]
                if len(routers) == 1:  # Somebody must be left to ask.
                    kind = Kind.ROUTER_STOP
        faults.append(Fault(at, kind, who, for_s, limit_s, stays_away))
    return tuple(sorted(faults, key=lambda f: f.at))
