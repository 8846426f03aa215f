"""The router's expected errors: a class holds the policy, the raise site adds the facts."""

from __future__ import annotations

from math import ceil
from typing import ClassVar, Final

RETRY_AFTER_S_MAX: Final = 3600


class RouterError(Exception):
    """An error that a client may see.

    `status` is HTTP's, `code` is stable for programs (docs/errors.md), `retryable` says whether
    the same request may succeed later; then `retry_after_s` is sent as `Retry-After`.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    retry_after_s: int = 1


class NoWorkers(RouterError):
    """Nobody is there who could serve the request; nothing has been started."""

    status, code, retryable, retry_after_s = 503, "no_workers", True, 2

    def __init__(self, role: str, *, known: int) -> None:
        super().__init__(f"no {role} worker is ready ({known} known); try again shortly")


class Overloaded(RouterError):
    """The router holds as much as it may; nothing has been started."""

    status, code, retryable = 503, "overloaded", True

    def __init__(self, *, holds: str) -> None:
        super().__init__(f"the router already holds {holds}; try again shortly")


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


class RequestTooLarge(RouterError):
    """No worker takes a message as large as this request."""

    status, code = 413, "request_too_large"

    def __init__(self, *, bytes_: int, bytes_max: int) -> None:
        super().__init__(
            f"the request has {bytes_} bytes with its images and the like; workers take "
            f"{bytes_max} (--message-bytes-max)"
        )


class TimedOut(RouterError):
    """The request made no progress for too long."""

    status, code, retryable = 504, "timed_out", True

    def __init__(self, *, waited_s: float) -> None:
        super().__init__(f"no progress in {waited_s:.0f} s")


class _Refused(RouterError):
    """Nothing has been started; when to try again was computed."""

    retryable = True

    def __init__(self, message: str, *, retry_s: float) -> None:
        self.retry_after_s = min(RETRY_AFTER_S_MAX, max(1, ceil(retry_s)))
        super().__init__(f"{message}; try again in {self.retry_after_s} s")


class NoCapacity(_Refused):
    """Workers are there, and none has room for it now: it waits."""

    status, code = 503, "no_capacity"

    def __init__(self, *, tokens: int) -> None:
        super().__init__(f"no worker has room for {tokens} tokens now", retry_s=1)


class QueueFull(_Refused):
    """As many requests wait as may."""

    status, code = 503, "queue_full"

    def __init__(self, *, waiting: int, retry_s: float) -> None:
        super().__init__(f"{waiting} requests wait already", retry_s=retry_s)


class WaitedTooLong(_Refused):
    """Its turn did not come in time."""

    status, code = 503, "queue_timeout"

    def __init__(self, *, waited_s: float, retry_s: float) -> None:
        super().__init__(f"no worker had room in {waited_s:.0f} s", retry_s=retry_s)


class ObjectiveOutOfReach(_Refused):
    """Its first token would come later than it is of use."""

    status, code = 503, "objective_out_of_reach"

    def __init__(self, *, expected_s: float, objective_s: float) -> None:
        super().__init__(
            f"the first token would take {expected_s:.2f} s, the objective is {objective_s:.2f} s",
            retry_s=expected_s - objective_s,
        )


class TenantOverRate(_Refused):
    """The tenant has had its tokens for now."""

    status, code = 429, "tenant_over_rate"

    def __init__(self, *, retry_s: float) -> None:
        super().__init__("this tenant is over its token rate", retry_s=retry_s)


class PreparingFull(RouterError):
    """As much waits to be rendered, tokenized or checked as may; nothing has been started."""

    status, code, retryable, retry_after_s = 503, "preparing_full", True, 1

    def __init__(self, *, waiting: int) -> None:
        super().__init__(f"{waiting} prompts wait to be tokenized already; try again shortly")


class GrammarTooSlow(RouterError):
    """The request's grammar, schema or regular expression takes too long to be looked at."""

    status, code = 400, "grammar_too_slow"

    def __init__(self, *, seconds: float) -> None:
        super().__init__(
            f"structured_outputs: not compiled in {seconds:g} s (--grammar-s); send a simpler one"
        )


class KeyNotKnown(RouterError):
    """The request has no key, or none that this router knows."""

    status, code = 401, "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "a valid API key is needed: Authorization: Bearer KEY, or x-api-key, or api-key"
        )


class AdminKeyNeeded(RouterError):
    """The route tells of the router itself, and so of all tenants."""

    status, code = 403, "admin_key_needed"

    def __init__(self, *, configured: bool) -> None:
        how = "it is not a client's" if configured else "set --admin-key-file, or --admin-port"
        super().__init__(f"this route needs the admin key: {how}")


class TenantNotAllowed(RouterError):
    """A client names a tenant, and its key has one already."""

    status, code = 403, "tenant_not_allowed"

    def __init__(self) -> None:
        super().__init__(
            "X-Tandem-Tenant: the key says whose the request is; the header needs the admin key "
            "or --trust-tenant-header"
        )
