"""A prefill and a decode engine of vLLM's in one process's care, asked as a router asks workers."""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtransfer.protocol import encode_ticket
from workers.api import Generate, Phase, Role
from workers.engines.vllm import VllmEngine
from workers.engines.vllm_config import vllm_config
from workers.server import Identity
from workers.vllm_codec import greedy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.api import Delta, Load
    from workers.engines.base import EngineFacts

ANSWER_S = 60.0


@dataclass
class Answer:
    """One request, as its client would have seen it."""

    asked_at: float
    tokens: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    """When each token came."""
    deltas: list[Delta] = field(default_factory=list)
    error: str | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def after_s(self, number: int) -> float:
        """From asking to the token of this number, from 0."""
        return self.at[number] - self.asked_at

    @property
    def pulled(self) -> Delta:
        """The decode worker's account of the transfer."""
        return next(d for d in self.deltas if d.kv_tokens or d.kv_failed)


class Engine:
    """One engine, and the answers that it owes."""

    def __init__(self, role: Role, model: str, flags: Sequence[str], transports: str = "") -> None:
        args = argparse.Namespace(
            model=model, role=role.value, host="127.0.0.1", lease_s=30.0, kv_connector="tandem",
            kv_transports=transports, kv_checksums="sampled", kv_answer_s=10.0, kv_read_s=20.0,
        )  # fmt: skip
        self.epoch = f"epoch-{role.value}-{time.time_ns()}"
        identity = Identity(role.value, self.epoch, role, model, "model", "tokenizer", 30.0)
        self.config = vllm_config(args, identity, list(flags))
        self.engine = VllmEngine(self.config)
        self.facts: EngineFacts
        self.hears: dict[str, Any] = {}
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.facts = await self.engine.start()
        self._running = asyncio.get_running_loop().create_task(self.engine.run(self._on_step))

    def _on_step(self, load: Load, deltas: Sequence[Delta]) -> None:
        self.engine.cache_changes()
        now = time.perf_counter()
        for delta in deltas:
            if hear := self.hears.get(delta.request_id):
                hear(delta, now)

    def check(self) -> None:
        """Raises what the engine died of."""
        if self._running is not None and self._running.done():
            self._running.result()
            raise RuntimeError("an engine has ended")

    def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
        self.engine.close()


class Fleet:
    """Prefill and decode; the latter is also the aggregated engine that answers are compared with.

    Under another cache salt nothing that was handed over is used for it.
    """

    def __init__(self, model: str, flags: Sequence[str], transports: str = "") -> None:
        self.prefill = Engine(Role.PREFILL, model, flags, transports)
        self.decode = Engine(Role.DECODE, model, flags, transports)
        self._count = 0

    async def start(self) -> None:
        async with asyncio.TaskGroup() as starting:
            starting.create_task(self.prefill.start())
            starting.create_task(self.decode.start())

    def close(self) -> None:
        for engine in (self.prefill, self.decode):
            engine.close()

    def aggregated(self, prompt: list[int], max_tokens: int, salt: str = "reference") -> Answer:
        """Ask the decode engine alone, from the first prompt token on."""
        answer = self._answer()
        asked = Generate(
            self._id("a"), Phase.BOTH, prompt, max_tokens, greedy(max_tokens), cache_salt=salt
        )
        self._submit(self.decode, asked, lambda delta, now: _take(answer, delta, now))
        return answer

    def apart(self, prompt: list[int], max_tokens: int, salt: str | None = None) -> Answer:
        """Prefill on one engine, decode on the other, the first token from the former."""
        answer, name = self._answer(), self._id("d")
        ticket = encode_ticket(self.prefill.epoch, name, self.prefill.facts.handoff_endpoint)
        asked = {
            phase: Generate(
                f"{name}-{phase.value}", phase, prompt, max_tokens, greedy(max_tokens), ticket,
                relay=True, cache_salt=salt,
            )
            for phase in (Phase.PREFILL, Phase.DECODE)
        }  # fmt: skip
        told = False

        def decode() -> None:
            nonlocal told
            if not told:
                told = True
                self._submit(self.decode, asked[Phase.DECODE], lambda d, now: _take(answer, d, now))

        def prefilled(delta: Delta, now: float) -> None:
            if delta.token_ids and not answer.tokens:
                answer.tokens, answer.at = list(delta.token_ids), [now]
            if delta.error:
                answer.error = delta.error
                answer.over.set()
            elif delta.last_step or delta.finish is not None:
                decode()

        self._submit(self.prefill, asked[Phase.PREFILL], prefilled)
        return answer

    async def wait(self, answers: Sequence[Answer]) -> None:
        """Until all are over. Raises when one fails, or an engine dies."""
        until = time.monotonic() + ANSWER_S
        for answer in answers:
            while not answer.over.is_set():
                self.prefill.check()
                self.decode.check()
                if time.monotonic() > until:
                    raise TimeoutError(f"no answer within {ANSWER_S:.0f} s")
                await asyncio.sleep(0.005)
            if answer.error:
                raise RuntimeError(answer.error)

    def _submit(self, engine: Engine, asked: Generate, hear: Any) -> None:
        engine.hears[asked.request_id] = hear
        engine.engine.submit(asked)

    def _answer(self) -> Answer:
        return Answer(time.perf_counter())

    def _id(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"


def _take(answer: Answer, delta: Delta, now: float) -> None:
    """A delta of the engine that decodes: it repeats a first token that came from the other."""
    answer.deltas.append(delta)
    had = sum(len(d.token_ids) for d in answer.deltas[:-1])
    for token in delta.token_ids:
        if had < len(answer.tokens):
            if answer.tokens[had] != token:
                answer.error = f"token {had} was {answer.tokens[had]} and is now {token}"
        else:
            answer.tokens.append(token)
            answer.at.append(now)
        had += 1
    if delta.error:
        answer.error = delta.error
    if delta.finish is not None:
        answer.over.set()
