"""An answer beside the reference's: equal, a tie, or wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

TIE = 1e-3
"""Logprobs as close as this may change places: sums of floats depend on their order. With random
weights two tokens are at times so close."""


class Verdict(StrEnum):
    EQUAL = "equal"
    TIE = "tie"
    """Another token where the reference's own best two were a tie; beyond it texts differ."""
    WRONG = "wrong"
    FAILED = "failed"
    """No answer."""


@dataclass(frozen=True, slots=True)
class Truth:
    """The reference's answer, token by token."""

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]
    """How far the token was ahead of the next best."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The router's answer, and its record of it."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    cached_tokens: int = 0
    """As the usage says."""
    record: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    verdict: Verdict
    why: str = ""

    @property
    def right(self) -> bool:
        return self.verdict in (Verdict.EQUAL, Verdict.TIE)


def judge(answer: Answer, truth: Truth, tolerance: float = TIE) -> Judged:
    """Tokens are compared up to a tie, logprobs up to where tokens part.

    `answer` may be shorter than `truth`, never empty. `tolerance` is of logprobs, and of what
    counts as a tie.
    """
    if answer.error is not None:
        return Judged(Verdict.FAILED, answer.error)
    count = len(answer.tokens)
    if not 0 < count <= len(truth.tokens):
        return Judged(Verdict.WRONG, f"{count} tokens of {len(truth.tokens)}")
    pairs = zip(answer.tokens, truth.tokens, strict=False)
    parted = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), count)
    off = max(
        (
            abs(ours - theirs)
            for ours, theirs in zip(
                (answer.logprobs or [])[:parted], truth.logprobs[:parted], strict=False
            )
        ),
        default=0.0,
    )
    if off > tolerance:
        return Judged(Verdict.WRONG, f"logprobs differ by {off:.1e} before token {parted}")
    if parted == count:
        return Judged(Verdict.EQUAL)
    if truth.gaps[parted] <= tolerance:
        return Judged(Verdict.TIE, f"token {parted}, ahead by {truth.gaps[parted]:.1e}")
    return Judged(Verdict.WRONG, f"token {parted} of {count}, ahead by {truth.gaps[parted]:.1e}")
