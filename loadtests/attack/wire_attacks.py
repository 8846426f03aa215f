"""Strangers at the workers' token channel and at a prefill worker's handoff port."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from loadtests.attack.frames import Dealer, encode, evil_frames, generate, nested, push_frame
from loadtests.attack.registry import attack
from loadtests.attack.scene import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loadtests.attack.registry import Tally
    from loadtests.attack.scene import Scene

HANDOFF_VERSION = 3
_HUGE, _HELD = 400 << 20, 32 << 20


@asynccontextmanager
async def _peers(*addresses: str) -> AsyncIterator[list[Dealer]]:
    opened = [Dealer(address) for address in addresses]
    try:
        yield opened
    finally:
        await asyncio.sleep(0.3)
        for dealer in opened:
            dealer.close()


async def hello_of(address: str) -> list[object] | None:
    """Greet as a router does; the worker's own hello, None where it does not answer."""
    async with _peers(address) as (dealer,):
        for protocol in range(1, 32):
            dealer.send(encode(["RouterHello", protocol, "stranger", None, None]))
            while answer := await dealer.receive(0.5):
                fields: list[object] = msgspec.msgpack.decode(answer, type=list)
                if fields[0] == "WorkerHello":
                    return fields
                if fields[0] == "Refused":
                    break
    return None


@asynccontextmanager
async def _router(scene: Scene, name: str) -> AsyncIterator[Dealer]:
    """A router that the last worker has let in. Raises AssertionError where it does not."""
    address = scene.workers[-1].channel
    hello = await hello_of(address)
    assert hello is not None, "the worker answers no router"
    async with _peers(address) as (dealer,):
        dealer.send(encode(["RouterHello", hello[1], name, None, None]))
        yield dealer


async def _open_answered(scene: Scene) -> bool:
    """Whether the handoff port answers an `Open`; to another version it says that too."""
    async with _peers(scene.handoff.channel) as (dealer,):
        for _ in range(3):
            dealer.send(encode(["Open", 1, 99, None, 0]))
            if await dealer.receive(1.0):
                return True
    return False


async def _all_live(scene: Scene, tally: Tally) -> None:
    """Every process runs, every worker says that it is live, and the handoff port answers."""
    scene.check()
    async with scene.session() as session:
        for worker in scene.workers:
            for path in ("/livez", "/readyz"):
                status, _ = await ask(session, tally, f"{worker.http}{path}", "GET")
                tally.expect(status == 200, f"{worker.name}{path}: {status}")
    tally.expect(await _open_answered(scene), "the handoff port answers nobody any more")


@attack("nested-frames", "msgpack nested deeply, to workers and the handoff port", short=True)
async def nested_frames(scene: Scene, tally: Tally) -> None:
    addresses = [w.channel for w in scene.workers]
    async with _peers(*addresses) as dealers:
        for dealer in dealers:
            for frame in evil_frames("Generate"):
                dealer.send(frame)
                dealer.send(frame, frame)
    async with _peers(scene.handoff.channel) as (dealer,):
        for tag in ("Open", "Follow", "Renew", "Release"):
            for frame in evil_frames(tag):
                dealer.send(frame)
    await asyncio.sleep(0.5)
    await _all_live(scene, tally)


@attack("nested-tickets", "tickets nested deeply, from a router that has said hello", short=True)
async def nested_tickets(scene: Scene, tally: Tally) -> None:
    async with _router(scene, "stranger") as dealer:
        for n, depth in enumerate((10, 1000, 100_000)):
            for ticket in (nested(depth), b"\x94\x03" + nested(depth), b"\x91\xaatandem-sim"):
                dealer.send(generate(f"evil-{n}-{len(ticket)}", "decode", 40, ticket))
                dealer.send(encode(["Release", [ticket]]))
        await asyncio.sleep(0.5)
    await _all_live(scene, tally)


async def _huge(tally: Tally, address: str, who: str) -> None:
    taken = await push_frame(address, _HUGE)
    tally.saw("taken" if taken >= _HUGE else "closed")
    tally.expect(taken < _HUGE, f"{who} took {taken >> 20} MiB of a frame from a stranger")


@attack(
    "huge-frame",
    "one frame of 400 MB from a stranger, to a worker and the handoff port",
    limit_s=60,
)
async def huge_frame(scene: Scene, tally: Tally) -> None:
    await _huge(tally, scene.workers[0].channel, "a worker")
    await _huge(tally, scene.handoff.channel, "the handoff port")
    await _all_live(scene, tally)


@attack("held-frames", "16 strangers at a worker with 31 MiB each of a frame that never ends")
async def held_frames(scene: Scene, tally: Tally) -> None:
    address = scene.workers[0].channel
    taken = await asyncio.gather(*(push_frame(address, _HELD, hold_s=4.0) for _ in range(16)))
    tally.notes.append(f"{sum(taken) >> 20} MiB taken")
    await _all_live(scene, tally)


@attack("malformed-flood", "20,000 malformed frames: log lines are limited", short=True)
async def malformed_flood(scene: Scene, tally: Tally) -> None:
    targets = [scene.workers[0], scene.handoff]
    before = [part.log.stat().st_size for part in targets]
    async with _peers(*(part.channel for part in targets)) as dealers:
        for dealer in dealers:
            for _ in range(20_000):
                dealer.send(os.urandom(24))
        await asyncio.sleep(3)
    for part, was in zip(targets, before, strict=True):
        wrote = part.log.stat().st_size - was
        tally.notes.append(f"{part.name} logged {wrote >> 10} KiB")
        tally.expect(wrote < 64 << 10, f"{part.name} logged {wrote >> 10} KiB of malformed frames")
    await _all_live(scene, tally)


@attack("generate-flood", "5,000 prompts from one router at once, to one worker", limit_s=60)
async def generate_flood(scene: Scene, tally: Tally) -> None:
    async with _router(scene, "flooding") as dealer:
        for n in range(5000):
            dealer.send(generate(f"flood-{os.getpid()}-{n}", "both", 200))
        await asyncio.sleep(4)
    await asyncio.sleep(6)  # Until it is found silent.
    await _all_live(scene, tally)


@attack(
    "open-close", "2,000 connections to a worker and the handoff port that end at once", short=True
)
async def open_close(scene: Scene, tally: Tally) -> None:
    for part in (scene.workers[0], scene.handoff):
        host, _, port = part.channel.removeprefix("tcp://").rpartition(":")
        for n in range(1000):
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                tally.saw("closed")
                continue
            writer.write(os.urandom(n % 80))
            writer.close()
    await _all_live(scene, tally)
