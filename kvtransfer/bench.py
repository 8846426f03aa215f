"""`make bench-handoff`, first part: each transport beside memcpy, NIXL bare, and two sockets."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kvtransfer import bench_sides as sides
from kvtransfer.bench_sides import MIB, Contender, Job
from kvtransfer.bench_tables import print_all, print_load
from kvtransfer.checksums import Mode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START_S: Final = 90
TURN_S: Final = 120
GROUP_S_MAX: Final = 50.0
"""No further round of a group after that; on a busy machine there are then fewer than asked for."""

JOBS: Final = (
    Job("1 MiB", 1 * MIB, 16),
    Job("16 MiB", 16 * MIB, 4),
    Job("64 MiB", 64 * MIB, 2),
    Job("256 MiB", 256 * MIB, 1),
    Job("1,024 x 32 KiB", 32 * MIB, 3, scattered=True),
)
WHOLE_32: Final = Job("32 MiB", 32 * MIB, 3)
"""What memcpy does for the scattered job: the same bytes in one piece."""
ROUND_TRIP: Final = Job("4 KiB", sides.SMALL_UNIT, 100, small=True)

MEMCPY: Final = Contender("memcpy", "memcpy")
UCX: Final = "ucx:UcxTransport"
GROUPS: Final[dict[str, tuple[Contender, ...]]] = {
    "shared memory": (
        MEMCPY,
        Contender("ucx", UCX),
        Contender("NIXL bare", "nixl", {"progress_thread": False}),
    ),
    "sockets": (
        MEMCPY,
        Contender("tcp", "tcp:TcpTransport"),
        Contender("two sockets", "sockets"),
        Contender("collective", "collective:CollectiveTransport"),
        Contender("UCX over TCP bare", "nixl", {"progress_thread": True}, {"UCX_TLS": "tcp"}),
    ),
    "ucx, other ways": (
        MEMCPY,
        Contender("ucx", UCX),
        Contender("ucx, small pages", UCX, huge=False),
        Contender("ucx, NIXL's thread", UCX, {"progress_thread": True}),
    ),
}
"""Who takes turns with whom. A group's memory is all there at once: half a GiB a contender."""


class Pair:
    """A contender's two processes, stopped whenever it is not their turn: some of them spin."""

    def __init__(self, contender: Contender) -> None:
        """Raises `sides.Missing`."""
        self.name = contender.name
        self._processes: list[Any] = []
        self._sender = self._start(sides.send, contender)
        description = self._hear(self._sender, START_S)
        if isinstance(description, str):
            raise sides.Missing(description)
        self._reader = self._start(sides.read, contender, description)
        self._hear(self._reader, START_S)
        self._sender.send("pages")
        self.huge_bytes, self.advise_s = self._hear(self._sender, START_S)
        self._signal(signal.SIGSTOP)

    def turn(self, job: Job) -> tuple[list[float], float, float]:
        """Seconds of each read; CPU seconds of reader and of sender over all of them."""
        with self._awake():
            before = self._ask(self._sender, "cpu")
            seconds, reader_s = self._ask(self._reader, job)
            return seconds, reader_s, self._ask(self._sender, "cpu") - before

    def sums(self, mode: Mode) -> float:
        """Seconds that the reader needs for the sums of all its memory."""
        with self._awake():
            return float(self._ask(self._reader, mode))

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        yield
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            os.kill(process.pid, number)

    def _start(self, what: Any, *arguments: Any) -> Any:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=what, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        return ours

    def _ask(self, pipe: Any, word: Any) -> Any:
        pipe.send(word)
        return self._hear(pipe, TURN_S)

    def _hear(self, pipe: Any, seconds: float) -> Any:
        try:
            if pipe.poll(seconds):
                return pipe.recv()
            reason = f"{self.name} does not answer"
        except EOFError:
            reason = f"{self.name} has ended"
        self.end()
        raise sides.Missing(reason)


def measure(group: Sequence[Contender], rounds: int) -> dict[str, Any]:
    """Every contender's figures; one that can't run has only its `missing`."""
    found: dict[str, Any] = {}
    pairs: list[Pair] = []
    try:
        for contender in group:
            try:
                pairs.append(Pair(contender))
            except sides.Missing as missing:
                found[contender.name] = {"missing": str(missing)}
        taken: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        until = time.monotonic() + GROUP_S_MAX
        for done in range(rounds):
            if done and time.monotonic() > until:
                break
            for job in (*JOBS, ROUND_TRIP):
                for pair in pairs:
                    as_done = _as_done_by(pair.name, job)
                    taken[pair.name][job.name].append(pair.turn(as_done))
            for pair in pairs:
                if pair.name == "ucx":
                    for mode in (Mode.SAMPLED, Mode.FULL):
                        taken[pair.name][mode.value].append(pair.sums(mode))
        for pair in pairs:
            found[pair.name] = _figures(taken[pair.name]) | {
                "huge_share": pair.huge_bytes / sides.TOTAL,
                "advise_s_per_gib": pair.advise_s * (1 << 30) / sides.TOTAL,
            }
    finally:
        for pair in pairs:
            pair.end()
    return found


def _as_done_by(name: str, job: Job) -> Job:
    """memcpy copies whole runs only."""
    return WHOLE_32 if name == MEMCPY.name and job.scattered else job


def _figures(taken: dict[str, list[Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"gb_per_s": {}, "round_gb_per_s": {}, "cpu_s_per_gb": {}}
    for job in JOBS:
        turns = taken[job.name]
        seconds = [s for turn in turns for s in turn[0]]
        found["gb_per_s"][job.name] = job.size / statistics.median(seconds) / 1e9
        found["round_gb_per_s"][job.name] = [
            job.size / statistics.median(turn[0]) / 1e9 for turn in turns
        ]
        moved = job.size * (len(seconds) + len(turns)) / 1e9  # One a turn is not timed.
        found["cpu_s_per_gb"][job.name] = [sum(t[i] for t in turns) / moved for i in (1, 2)]
    trips = [s for turn in taken[ROUND_TRIP.name] for s in turn[0]]
    found["round_trip_us"] = statistics.median(trips) * 1e6
    for mode in (Mode.SAMPLED, Mode.FULL):
        if mode.value in taken:
            found[f"{mode.value}_s"] = statistics.median(taken[mode.value])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvtransfer.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every figure there")
    given = parser.parse_args()
    began, load = time.monotonic(), os.getloadavg()[0]
    found = {name: measure(group, given.rounds) for name, group in GROUPS.items()}
    targets = print_all(found)
    print_load(load)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "seconds": time.monotonic() - began,
            "rounds_max": given.rounds,
            "cores": os.cpu_count(),
            "load_before": load,
            "groups": found,
            "targets": targets,
        }
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


if __name__ == "__main__":
    main()
