"""How many replicas a role is asked to have: read and written through RBG's scaling adapters."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import TYPE_CHECKING, Final

import msgspec

from controller.api import Lost, NoAnswer, ask

if TYPE_CHECKING:
    from collections.abc import Callable

    from controller.access import Access
    from controller.api import Answer

ANSWER_S: Final = 5.0
GAP_S: Final = 0.1
"""Least time between the beginnings of two requests."""
RETRY_AFTER_S_MAX: Final = 60.0
MERGE_PATCH: Final = "application/merge-patch+json"


class Failure(StrEnum):
    """Why a scale could not be read or written: a closed set, for a metric's label."""

    UNREACHABLE = "unreachable"
    SILENT = "silent"
    BROKEN_OFF = "broken_off"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    MISSING = "missing"
    CONFLICT = "conflict"
    INVALID = "invalid"
    THROTTLED = "throttled"
    REFUSED = "refused"
    MALFORMED = "malformed"
    NO_LEADER = "no_leader"
    """We led no more when it was to be written: nothing was sent."""


_BY_LOSS: Final = {
    Lost.UNREACHABLE: Failure.UNREACHABLE,
    Lost.SILENT: Failure.SILENT,
    Lost.BROKEN_OFF: Failure.BROKEN_OFF,
    Lost.NOT_SENT: Failure.NO_LEADER,
}
_BY_STATUS: Final = {
    401: Failure.UNAUTHORIZED,
    403: Failure.FORBIDDEN,
    404: Failure.MISSING,
    409: Failure.CONFLICT,
    422: Failure.INVALID,
    429: Failure.THROTTLED,
}


class ScaleFailed(Exception):
    """It was not read or not written; of a request without an answer the latter is not known."""

    def __init__(self, role: str, failure: Failure, reason: str) -> None:
        super().__init__(f"{role}: {reason}")
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Scale:
    """Of one role."""

    wanted: int
    """Replicas that it is asked to have."""
    present: int
    """That it has, ready or not, as its adapter last counted them."""


class Scales:
    """Those of one group. One request at a time, `GAP_S` apart; none before a `Retry-After`."""

    def __init__(self, access: Access, group: str, *, gap_s: float = GAP_S) -> None:
        self._access = access
        self._group = group
        self._gap_s = gap_s
        self._next_at = self._not_before = -inf
        self._one_at_a_time = asyncio.Lock()

    async def read(self, role: str) -> Scale:
        """Raises `ScaleFailed`."""
        return await self._ask(role, None, lambda: inf)

    async def write(
        self, role: str, replicas: int, left_s: Callable[[], float] = lambda: inf
    ) -> Scale:
        """Ask for so many, while `left_s` says that some time is left. Raises `ScaleFailed`."""
        return await self._ask(role, replicas, left_s)

    async def _ask(self, role: str, replicas: int | None, left_s: Callable[[], float]) -> Scale:
        loop = asyncio.get_running_loop()
        async with self._one_at_a_time:
            await asyncio.sleep(max(0.0, self._next_at - loop.time()))
            now = loop.time()
            if now < self._not_before:
                more_s = self._not_before - now
                reason = f"the API server wants to be left alone for {more_s:.0f} s more"
                raise ScaleFailed(role, Failure.THROTTLED, reason)
            if left_s() <= 0:
                raise ScaleFailed(role, Failure.NO_LEADER, "the lead ended before it was sent")
            self._next_at = now + self._gap_s
            answer = await self._exchange(role, replicas, left_s)
            if answer.retry_after_s is not None:
                wait_s = min(answer.retry_after_s, RETRY_AFTER_S_MAX)
                self._not_before = loop.time() + wait_s
        return _read(role, answer)

    async def _exchange(
        self, role: str, replicas: int | None, left_s: Callable[[], float]
    ) -> Answer:
        path = (
            f"/apis/workloads.x-k8s.io/v1alpha2/namespaces/{self._access.namespace}"
            f"/rolebasedgroupscalingadapters/{self._group}-{role}/scale"
        )
        change = None if replicas is None else (MERGE_PATCH, {"spec": {"replicas": replicas}})
        method = "PATCH" if change else "GET"
        try:
            return await ask(
                self._access, method, path, change,
                within_s=min(ANSWER_S, left_s()), still=lambda: left_s() > 0,
            )  # fmt: skip
        except NoAnswer as error:
            raise ScaleFailed(role, _BY_LOSS[error.kind], str(error)) from error


class _Count(msgspec.Struct):
    replicas: int = 0


class _Scale(msgspec.Struct):
    spec: _Count
    status: _Count = msgspec.field(default_factory=_Count)


class _Status(msgspec.Struct):
    message: str = ""


_SCALE: Final = msgspec.json.Decoder(_Scale)
_STATUS: Final = msgspec.json.Decoder(_Status)


def _read(role: str, answer: Answer) -> Scale:
    if answer.status == 200:
        try:
            found = _SCALE.decode(answer.body)
        except msgspec.DecodeError as error:
            raise ScaleFailed(role, Failure.MALFORMED, str(error)) from error
        return Scale(found.spec.replicas, found.status.replicas)
    try:
        said = _STATUS.decode(answer.body).message
    except msgspec.DecodeError:
        said = ""
    failure = _BY_STATUS.get(answer.status, Failure.REFUSED)
    raise ScaleFailed(role, failure, f"HTTP {answer.status} {said}".strip())
