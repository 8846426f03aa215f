"""What a request needs and what one worker of each role really does, as learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from controller.core.demand import Observed

KEPT_S: Final = 600.0
"""Means hang on about so many seconds."""
QUEUED: Final = 0.5
"""Of the TTFT objective: with so many seconds of prompts queued at both ends of an interval,
prefill never was idle."""
YIELD: Final = 0.7, 1.2
"""Least and most of a prefill worker's own speed that a group gets of it: less for what waits for
KV blocks or splits badly, more where decode workers compute prompts too."""
YIELD_KEPT: Final = 0.9
"""At each look that says something of it."""
YIELD_BACK_S: Final = 1800.0
"""What no look confirms comes back to 1 in about so many seconds."""
KV_FULL: Final = 0.9
"""Of the decode workers' KV blocks, what may be in use: the rest is for what grows."""
ITL_SHARE: Final = 0.85
"""Of the ITL objective, the mean to aim at: half of the requests are slower than the mean."""
STREAMS_LEAST: Final = 1.0
PACE_LEAST: Final = 1e-3
"""Tokens a second: less is no engine's."""
PRIOR_REQUESTS: Final = 20.0
"""That what is believed of them is worth."""


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of workers and requests until they have shown themselves."""

    prompt_tokens: float = 1000.0
    """Of a request, that no cache has."""
    output_tokens: float = 256.0
    prefill_tokens_per_s: float = 8000.0
    """Of one prefill worker."""
    itl_s: float = 0.02
    """Of a decode worker with one stream."""
    itl_stream_s: float = 5e-4
    """More of each further one."""
    streams: float = 64.0
    """That a decode worker's KV blocks hold."""


class Line:
    """y = a + b x by least squares, no part below zero, that forgets and begins with a prior.

    The prior is two samples of weight one: at x = 1 and where `far` is.
    """

    def __init__(self, a: float, b: float, far: float) -> None:
        self.a, self.b = a, b
        self._sums = [0.0] * 5
        for x in (1.0, far):
            self._add(x, a + b * x, 1.0)

    def learn(self, x: float, y: float, kept: float) -> None:
        """`kept`: of what is known, from 0 to 1."""
        self._sums = [s * kept for s in self._sums]
        self._add(x, y, 1.0)
        n, sx, sy, sxx, sxy = self._sums
        spread = n * sxx - sx * sx
        if spread > 1e-3 * n * sxx:
            self.b = max(0.0, (n * sxy - sx * sy) / spread)
        # Samples of one x say nothing of the slope: the line is moved as it is.
        self.a = (sy - self.b * sx) / n
        if self.a < 0:
            self.a, self.b = 0.0, sxy / sxx

    def x_of(self, y: float, most: float) -> float:
        """Where the line has so much; `most` at most."""
        if self.a >= y:
            return 0.0
        return most if self.b * most <= y - self.a else (y - self.a) / self.b

    def _add(self, x: float, y: float, weight: float) -> None:
        for at, value in enumerate((1.0, x, y, x * x, x * y)):
            self._sums[at] += weight * value


class Capacity:
    """A request's tokens, and a worker's."""

    def __init__(self, prior: Prior, ttft_s: float, itl_s: float) -> None:
        """With the objectives."""
        self._queued_s, self._itl_objective_s = QUEUED * ttft_s, itl_s
        self.prefill_pace = prior.prefill_tokens_per_s
        """Tokens a second of a prefill worker that is busy."""
        self.prefill_yield = 1.0
        self.itl = Line(prior.itl_s, prior.itl_stream_s, max(2.0, prior.streams))
        """By streams on a worker."""
        self._kv_a_stream = KV_FULL / prior.streams
        came, prompt = PRIOR_REQUESTS, PRIOR_REQUESTS * prior.prompt_tokens
        self._sums = (came, prompt, prompt, came * prior.output_tokens)
        """Requests that came, their uncached prompt tokens, those computed, those generated."""

    # ------------------------------------------------------------ what sizing asks

    @property
    def prompt_tokens(self) -> float:
        """Of a request, that no cache had."""
        came, prompt, _, _ = self._sums
        return max(1.0, prompt / came)

    @property
    def output_share(self) -> float:
        """Tokens generated for each prompt token computed: the ratio of the two halves' work."""
        _, _, computed, generated = self._sums
        return generated / max(1.0, computed)

    @property
    def prefill_tokens_per_s(self) -> float:
        """That one more prefill worker brings."""
        return self.prefill_pace * self.prefill_yield

    @property
    def streams(self) -> float:
        """That one decode worker carries within the ITL objective and its KV blocks."""
        by_kv = KV_FULL / self._kv_a_stream
        by_itl = self.itl.x_of(ITL_SHARE * self._itl_objective_s, by_kv)
        return max(STREAMS_LEAST, min(by_kv, by_itl))

    @property
    def decode_tokens_per_s(self) -> float:
        """That one decode worker generates with as many streams."""
        streams = self.streams
        return streams / (self.itl.a + self.itl.b * streams)

    def queue_s(self, seen: Observed) -> float:
        """Until the prefill workers there are have computed what is queued."""
        return seen.queued_tokens / (max(1, seen.ready.prefill) * self.prefill_tokens_per_s)

    # ------------------------------------------------------------ learning

    def learn(self, before: Observed, now: Observed) -> None:
        """From one observation to the next, no more than a look or two later."""
        seconds = now.at - before.at
        if now.prefill_tokens_per_s > PACE_LEAST:
            self.prefill_pace = now.prefill_tokens_per_s
        # A quiet night forgets nothing of what requests are like.
        kept = max(0.0, 1 - seconds / KEPT_S) if now.requests > before.requests else 1.0
        came, prompt, computed, generated = self._sums
        self._sums = (
            came * kept + now.requests - before.requests,
            prompt * kept + now.prompt_tokens - before.prompt_tokens,
            computed * kept + now.computed_tokens - before.computed_tokens,
            generated * kept + now.output_tokens - before.output_tokens,
        )
        if before.ready == now.ready:
            self._learn_prefill(before, now, seconds)
            self._learn_decode(before, now, seconds)

    def _learn_prefill(self, before: Observed, now: Observed, seconds: float) -> None:
        done = (now.computed_tokens - before.computed_tokens) / seconds / max(1, now.ready.prefill)
        share = done / self.prefill_pace
        low, high = YIELD
        saturated = min(self.queue_s(before), self.queue_s(now)) > self._queued_s
        if saturated or share > self.prefill_yield:
            # It was never idle, and this is what it does; or it does more than was believed.
            share = min(high, max(low, share))
            self.prefill_yield = YIELD_KEPT * self.prefill_yield + (1 - YIELD_KEPT) * share
        else:
            self.prefill_yield += (1 - self.prefill_yield) * min(1.0, seconds / YIELD_BACK_S)

    def _learn_decode(self, before: Observed, now: Observed, seconds: float) -> None:
        streams = (before.running + now.running) / 2 / max(1, now.ready.decode)
        out = (now.output_tokens - before.output_tokens) / seconds / max(1, now.ready.decode)
        if streams < STREAMS_LEAST or out <= 0:
            return
        # Little's law: streams = tokens a second, times the time that each waits for its next.
        kept = max(0.0, 1 - seconds / KEPT_S)
        self.itl.learn(streams, streams / out, kept)
        share = (before.kv_share + now.kv_share) / 2
        if share > 0:
            self._kv_a_stream += 5 * (1 - kept) * (share / streams - self._kv_a_stream)
