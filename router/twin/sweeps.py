"""What is measured of real workers: prompts alone, sequences that generate, and handoffs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise, product
from time import perf_counter
from typing import TYPE_CHECKING

from router.twin.probe import ProbeFailed
from workers.api import Abort, Finish, Generate, Phase, Release, Role, make_ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from router.twin.probe import Call, Line, Probe
    from workers.api import Batch, Delta, Step

Row = tuple[float, float, float, float, float]
"""What a rate each explains: steps, prompt tokens, pairs that attention looks at, sequences that
generate, tokens before those."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """How much is measured; the defaults take a small CPU engine some minutes."""

    prompts: tuple[int, ...] = (16, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3000)
    repeats: int = 3
    batches: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 16)
    contexts: tuple[int, ...] = (64, 512, 1500)
    contexts_sum: int = 6000
    """At most so many tokens before all sequences of a batch. Each beginning is computed anew: one
    that is shared would be read from memory once."""
    outputs: int = 24
    handoffs: tuple[int, ...] = (64, 256, 512, 1024, 2048)
    beside: tuple[int, ...] = (1, 4)
    """Sequences that generate on one worker while the other computes prompts."""
    beside_prompts: tuple[int, ...] = (256, 512, 1024)
    seed: int = 0
    """Of the prompts: those of a former sweep are in the workers' caches."""


@dataclass(slots=True)
class Samples:
    """Of one worker's steps."""

    rows: list[Row] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, row: Row, seconds: float) -> None:
        self.rows.append(row)
        self.seconds.append(seconds)


class Sweeper:
    """Asks, one thing after the other. `params` encodes for the engine a number of tokens."""

    def __init__(self, probe: Probe, sweep: Sweep, params: Callable[[int], bytes]) -> None:
        self._probe = probe
        self._sweep = sweep
        self._params = params
        self._rng = random.Random(f"sweep/{sweep.seed}")

    # ------------------------------------------------------------ prompts

    def prompts(self, line: Line) -> tuple[Samples, int]:
        """Each alone, from the asking to the answer; and the tokens that one step takes at most.

        Raises `ProbeFailed`.
        """
        if not line.hello.step_tokens:
            raise ProbeFailed(f"{line.hello.worker_id} does not tell how much a step computes")
        self._prompt_s(line, 32)  # The first of all connects, and compiles.
        took: list[tuple[int, int, float]] = []
        fitting = [tokens for tokens in self._sweep.prompts if self._fits(line, tokens)]
        for tokens, _ in product(fitting, range(self._sweep.repeats)):
            seconds = self._prompt_s(line, tokens)
            took.append((tokens, self._last_step(line).prefill_tokens, seconds))
        chunk = line.hello.step_tokens
        if any((tokens - 1) % chunk + 1 != last for tokens, last, _ in took):
            raise ProbeFailed(
                f"{line.hello.worker_id} computes at most {chunk} tokens a step, and the steps of "
                "long prompts do not add up to that: is it busy otherwise?"
            )
        samples = Samples()
        for tokens, _, seconds in took:
            pairs = tokens * (tokens + 1) / 2
            samples.add((-(-tokens // chunk), tokens, pairs, 0, 0), seconds)
        return samples, chunk

    def _fits(self, line: Line, tokens: int) -> bool:
        most = min(line.hello.max_model_len - 1, line.hello.blocks_total * line.hello.block_tokens)
        return tokens < most - self._sweep.outputs

    def _prompt_s(self, line: Line, tokens: int) -> float:
        call, ticket = self._ask(line, self._fresh(tokens), 1)
        self._probe.wait([call])
        if line.hello.role is Role.PREFILL:
            line.say(Release([t for t in (ticket, call.deltas[-1][1].ticket) if t is not None]))
        return call.first_at - call.sent_at

    def _last_step(self, line: Line) -> Step:
        step = line.batches[-1][1].load.step
        if step is None:
            raise ProbeFailed(f"{line.hello.worker_id} does not tell what its steps computed")
        return step

    # ------------------------------------------------------------ generating

    def decodes(self, line: Line) -> Samples:
        """Steps of so many sequences with so much before them, from one to the next."""
        samples = Samples()
        for context, count in product(self._sweep.contexts, self._sweep.batches):
            room = line.hello.blocks_total * line.hello.block_tokens
            if count * (context + line.hello.block_tokens + self._sweep.outputs) > room:
                continue
            if count > 1 and count * context > self._sweep.contexts_sum:
                continue
            seen = len(line.batches)
            calls = [
                self._ask(line, self._fresh(context), self._sweep.outputs)[0] for _ in range(count)
            ]
            self._probe.wait(calls)
            _steps_of(line.batches[seen:], count, samples)
        return samples

    # ------------------------------------------------------------ handoff

    def handoffs(self, prefill: Line, decode: Line) -> list[tuple[int, float, float]]:
        """(tokens, from the prefill's answer to the decode worker's, its next token): seconds."""
        found = []
        self._handoff(prefill, decode, 64)  # The first between two connects them.
        for tokens, _ in product(self._sweep.handoffs, range(self._sweep.repeats)):
            if self._fits(decode, tokens):
                found.append(self._handoff(prefill, decode, tokens))
        return found

    def _handoff(self, prefill: Line, decode: Line, tokens: int) -> tuple[int, float, float]:
        """As the router does it: the decode worker is asked when the last step is told."""
        prompt = self._fresh(tokens)
        asked: list[Call] = []
        first, ticket = self._ask(prefill, prompt, 4)

        def told(call: Call, delta: Delta) -> None:
            found = ticket or delta.ticket
            due = delta.last_step or delta.finish is Finish.PREFILLED
            if call is first and due and found is not None and not asked:
                # Both halves of a handoff must be told the same about the relayed token.
                asked.append(self._ask(decode, prompt, 4, found, relay=ticket is not None)[0])

        self._probe.wait([first], told)
        if not asked:
            raise ProbeFailed(f"{prefill.hello.worker_id} finished a prompt and gave no ticket")
        self._probe.wait(asked)
        call = asked[0]
        answer = next(d for _, d in call.deltas if d.token_ids)
        if answer.kv_failed is not None:
            raise ProbeFailed(f"the handoff failed: {answer.kv_failed}")
        ats = [at for at, d in call.deltas if d.token_ids]
        gaps = sorted(b - a for a, b in pairwise(ats))
        return tokens, max(0.0, ats[0] - first.deltas[-1][0]), gaps[len(gaps) // 2]

    # ------------------------------------------------------------ at the same time

    def beside(self, prefill: Line, decode: Line, chunk: int) -> tuple[Samples, Samples]:
        """One computes prompts, with nothing in between, while the other generates: the steps of
        each. `chunk`: most tokens of a step of the first.
        """
        prompts, steps = Samples(), Samples()
        for count in self._sweep.beside:
            seen, outputs = len(decode.batches), 20 * self._sweep.outputs
            calls = [self._ask(decode, self._fresh(64), outputs)[0] for _ in range(count)]
            while len(decode.batches) < seen + 2:  # They have begun.
                self._probe.listen(0.2)
            begun, seen = perf_counter(), len(decode.batches)
            for tokens, _ in product(self._sweep.beside_prompts, range(self._sweep.repeats)):
                if self._fits(prefill, tokens) and not any(call.over for call in calls):
                    pairs = tokens * (tokens + 1) / 2
                    row = (-(-tokens // chunk), tokens, pairs, 0, 0)
                    prompts.add(row, self._prompt_s(prefill, tokens))
            ended = perf_counter()
            decode.say(Abort([call.request_id for call in calls]))
            among = [(at, batch) for at, batch in decode.batches[seen:] if begun < at < ended]
            self._probe.forget(calls)
            _steps_of(among, count, steps)
        return prompts, steps

    # ------------------------------------------------------------ asking

    def _ask(
        self,
        line: Line,
        prompt: list[int],
        outputs: int,
        ticket: bytes | None = None,
        *,
        relay: bool = False,
    ) -> tuple[Call, bytes | None]:
        """And the ticket, where the router makes it. `ticket`: of the handoff that it ends."""
        name, phase = self._probe.name(), Phase.BOTH if ticket is None else Phase.DECODE
        if line.hello.role is Role.PREFILL:
            phase, ticket = Phase.PREFILL, make_ticket(line.hello, name)
            # With a relayed token a prefill worker computes the whole prompt, else all but one.
            relay = ticket is not None
        generate = Generate(
            name, phase, prompt, outputs, self._params(outputs), ticket, relay=relay
        )
        return self._probe.ask(line, generate), ticket

    def _fresh(self, tokens: int) -> list[int]:
        """Ids from the middle of any vocabulary, which no cache has seen."""
        return [self._rng.randrange(1000, 30_000) for _ in range(tokens)]


def _steps_of(batches: Sequence[tuple[float, Batch]], count: int, samples: Samples) -> None:
    """From one step to the next, where `count` sequences generate and nothing else is done."""
    for (before, was), (at, batch) in pairwise(batches):
        step = batch.load.step
        steady = batch.load.steps == was.load.steps + 1
        if steady and step and step.decodes == count and not step.prefill_tokens:
            samples.add((1, 0, 0, count, step.context_tokens), at - before)
