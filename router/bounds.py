"""The bounds on requests and connections, out of the router's settings."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from router.connection import ConnectionLimits
from router.core.request_limits import RequestLimits

if TYPE_CHECKING:
    from router.settings import RouterSettings


def request_limits(settings: RouterSettings) -> RequestLimits:
    """By field."""
    return RequestLimits(**{f.name: getattr(settings, f.name) for f in fields(RequestLimits)})


def connection_limits(settings: RouterSettings) -> ConnectionLimits:
    """By connection."""
    return ConnectionLimits(**{f.name: getattr(settings, f.name) for f in fields(ConnectionLimits)})
