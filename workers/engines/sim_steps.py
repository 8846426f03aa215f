"""What a simulated step computes, and how long that takes."""

from __future__ import annotations

import math
import zlib
from statistics import NormalDist
from typing import TYPE_CHECKING, Final, Protocol

from workers.api import Step
from workers.engines.sim_settings import besides_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.engines.sim_settings import SimSettings


_NORMAL: Final = NormalDist()


class Running(Protocol):
    """A request in a step, as far as its time goes."""

    computed: int
    outputs: int


def step_of(
    plan: Sequence[tuple[Running, int]], settings: SimSettings, number: int = 0
) -> Step | None:
    """Of requests, each with the tokens that the step computes of it; None for none.

    `number`: the engine's steps so far, by which its noise is drawn.
    """
    if not plan:
        return None
    s = settings
    tokens = attended = decodes = context = 0
    for run, count in plan:
        if count > 1 or not run.outputs:
            tokens += count
            attended += count * run.computed + count * (count + 1) // 2
        else:
            decodes += 1
            context += run.computed
    seconds = s.step_s + tokens / s.prefill_tokens_per_s + attended * s.pair_s
    seconds += decodes * s.stream_s + context * s.context_token_s
    if not tokens:
        seconds = max(0.0, seconds + besides_s(s.batch_s, decodes))
    if s.noise:
        seconds *= _noisy(s.noise, number, tokens + context)
    return Step(
        0.0 if s.instant else seconds,
        prefill_tokens=tokens,
        prefill_pairs=attended,
        decodes=decodes,
        context_tokens=context,
    )


def _noisy(deviation: float, number: int, size: int) -> float:
    """Log-normal, mean 1, and the same whenever the same step is taken."""
    drawn = zlib.crc32(number.to_bytes(8, "little") + size.to_bytes(8, "little"))
    return math.exp(deviation * _NORMAL.inv_cdf((drawn + 0.5) / (1 << 32)) - deviation**2 / 2)


def lasting_s(step: Step, count: int, settings: SimSettings) -> float:
    """Seconds of so many steps from this one on, which but generate: each has one token more
    before each of its sequences."""
    more_s = step.decodes * settings.context_token_s
    return count * step.seconds + more_s * (count * (count - 1) / 2)


def steps_within(step: Step, seconds: float, settings: SimSettings) -> int:
    """How many such steps end by then; 0 for none."""
    more_s, first_s = step.decodes * settings.context_token_s, step.seconds
    if seconds < first_s or first_s <= 0:
        return 0
    half = first_s - more_s / 2  # more/2 n^2 + half n = seconds, and no difference of equals.
    return max(1, int(2 * seconds / (half + math.sqrt(half * half + 2 * more_s * seconds))))
