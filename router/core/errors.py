"""The router's expected errors: a class holds the policy, the raise site adds the facts."""

from __future__ import annotations

from typing import ClassVar


class RouterError(Exception):
    """An error that a client may see.

    `status` is HTTP's, `code` is stable for programs (docs/errors.md), `retryable` says whether
    the same request may succeed later; then `retry_after_s` is sent as `Retry-After`.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    retry_after_s: ClassVar[int] = 1


class NoWorkers(RouterError):
    """Nobody is there who could serve the request; nothing has been started."""

    status, code, retryable, retry_after_s = 503, "no_workers", True, 2

    def __init__(self, role: str, *, known: int) -> None:
        super().__init__(f"no {role} worker is ready ({known} known); try again shortly")


class Overloaded(RouterError):
    """The router holds as many requests as it may; nothing has been started."""

    status, code, retryable = 503, "overloaded", True

    def __init__(self, *, live: int) -> None:
        super().__init__(f"the router already holds {live} requests; try again shortly")


class WorkerLost(RouterError):
    """The worker that was generating is gone, and the stream can't go on."""

    status, code, retryable = 503, "worker_lost", True

    def __init__(self, worker_id: str, *, reason: str, tokens_sent: int) -> None:
        super().__init__(f"worker {worker_id} was lost after {tokens_sent} tokens: {reason}")


class WorkerFailed(RouterError):
    """The worker reported that it could not finish the request."""

    status, code, retryable = 500, "worker_failed", False

    def __init__(self, worker_id: str, *, reason: str) -> None:
        super().__init__(f"worker {worker_id} failed the request: {reason}")


class RequestInvalid(RouterError):
    """The worker found the request itself wrong."""

    status, code = 400, "invalid_request"

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)


class TimedOut(RouterError):
    """The request made no progress for too long."""

    status, code, retryable = 504, "timed_out", True

    def __init__(self, *, waited_s: float) -> None:
        super().__init__(f"no progress in {waited_s:.0f} s")
