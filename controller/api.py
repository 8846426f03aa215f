"""One request to the API server: an answer, or why there is none."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import httpx
import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from controller.access import Access

ANSWER_BYTES_MAX: Final = 1 << 20


class Lost(StrEnum):
    """Why there is no answer. Whether the request was carried out nobody knows."""

    UNREACHABLE = "unreachable"
    SILENT = "silent"
    BROKEN_OFF = "broken_off"
    NOT_SENT = "not_sent"
    """Whoever asks wants it no more: this one was not carried out."""


class NoAnswer(Exception):
    """A request was lost, or its answer."""

    def __init__(self, kind: Lost, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Answer:
    """Any status. `body` is its beginning."""

    status: int
    body: bytes
    retry_after_s: float | None


async def ask(
    access: Access,
    method: str,
    path: str,
    content: tuple[str, Any] | None = None,
    *,
    within_s: float,
    still: Callable[[], bool] = lambda: True,
) -> Answer:
    """`content` is its type and what JSON is made of. Raises `NoAnswer`.

    `still` is asked once the connection stands, just before anything is sent: a process may have
    been stopped for long on the way there.
    """

    async def before_sending(event: str, _: Any) -> None:
        if event.endswith("send_request_headers.started") and not still():
            raise NoAnswer(Lost.NOT_SENT, "it was too late to send it")

    body = msgspec.json.encode(content[1]) if content else None
    headers = {"Content-Type": content[0]} if content else {}
    try:
        async with asyncio.timeout(within_s):
            async with (
                access.client() as client,
                client.stream(
                    method,
                    path,
                    content=body,
                    headers=headers,
                    extensions={"trace": before_sending},
                ) as response,
            ):
                said = await beginning(response, ANSWER_BYTES_MAX)
                return Answer(response.status_code, said, retry_after_s(response))
    except TimeoutError:
        raise NoAnswer(Lost.SILENT, "nothing came in time") from None
    except (httpx.ConnectError, OSError) as error:
        raise NoAnswer(Lost.UNREACHABLE, f"{type(error).__name__}: {error}") from error
    except httpx.HTTPError as error:
        raise NoAnswer(Lost.BROKEN_OFF, f"{type(error).__name__}: {error}") from error


async def beginning(response: httpx.Response, bytes_max: int) -> bytes:
    """So much of a body at most."""
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > bytes_max:
            break
    return body[:bytes_max]


def retry_after_s(response: httpx.Response) -> float | None:
    """Its Retry-After. A date would need a clock that agrees with the server's: then none."""
    given = response.headers.get("Retry-After", "")
    return float(given) if given.isdigit() else None
