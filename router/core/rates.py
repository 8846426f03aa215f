"""How fast one worker is, learnt from what its steps and pulls took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from router.core.least_squares import LeastSquares

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.api import Step

STEP_PRIOR: Final = (1e-2, 1e-4, 1e-9, 1e-4, 1e-8)
"""Seconds a step, a prompt token, a pair of one and a token that it attends to, a sequence that
generates, a token before it: of no worker in particular. The first steps outweigh it."""
PULL_PRIOR: Final = (2e-3, 1e-9)
"""Seconds a pull, and a byte."""
CHUNK_TOKENS_PRIOR: Final = 2048
"""vLLM's default for most prompt tokens in a step."""


class Rates:
    """One worker's. `step` has a rate for each of `STEP_PRIOR`, `pull` for `PULL_PRIOR`."""

    __slots__ = ("_chunk_tokens", "context_tokens", "pull", "step")
    step: LeastSquares
    pull: LeastSquares
    context_tokens: float
    """Before each sequence that generated in the last step that had any; 0 before one had."""
    _chunk_tokens: int

    def __init__(self, like: Sequence[Rates] = ()) -> None:
        """`like`: workers of its kind, whose mean it is taken for until it has shown itself."""
        self.step = _like([r.step for r in like if r.step.samples], STEP_PRIOR)
        self.pull = _like([r.pull for r in like if r.pull.samples], PULL_PRIOR)
        self.context_tokens = 0.0
        self._chunk_tokens = max((r._chunk_tokens for r in like), default=0)

    @property
    def chunk_tokens(self) -> int:
        """Most prompt tokens that a step takes."""
        return self._chunk_tokens or CHUNK_TOKENS_PRIOR

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens of steps as full as any; 0 before a step was seen."""
        if not self.step.samples:
            return 0.0
        step_s, token_s = self.step.rates[:2]
        return 1 / max(1e-9, step_s / self.chunk_tokens + token_s)

    def stepped(self, step: Step, *, prefill_left: bool) -> None:
        """`prefill_left`: prompt tokens were queued beyond this step, so it was as full as any."""
        self.step.learn(
            (1.0, step.prefill_tokens, step.prefill_pairs, step.decodes, step.context_tokens),
            step.seconds,
        )
        if step.decodes:
            self.context_tokens = step.context_tokens / step.decodes
        if prefill_left and step.prefill_tokens > self._chunk_tokens:
            self._chunk_tokens = step.prefill_tokens

    def pulled(self, size: int, seconds: float) -> None:
        """A read of so many bytes by this worker is over."""
        self.pull.learn((1.0, size), seconds)


def _like(learnt: list[LeastSquares], prior: tuple[float, ...]) -> LeastSquares:
    """Of each rate the mean, zero too: else a new worker seems dearer than busy ones whose streams
    were found to cost nothing, and is never tried."""
    if not learnt:
        return LeastSquares(prior)
    means = [sum(each) / len(learnt) for each in zip(*(one.rates for one in learnt), strict=True)]
    return LeastSquares([m or p for m, p in zip(means, prior, strict=True)], means)
