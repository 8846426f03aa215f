"""Processes on one event loop: each can be stopped, resumed and killed as by a signal."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any

from tests.virtual_time import VirtualLoop

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

_RUNNING: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Process:
    """Whose code runs is told from the context, which tasks and callbacks inherit.

    While a process is stopped nothing of it runs, and time goes on: its timers are late, what is
    sent to it waits. A child (an engine within its worker) stops with its parent.
    """

    def __init__(self, name: str, parent: Process | None = None) -> None:
        self.name = name
        self.stopped = False
        self.held: list[_Call] = []
        self._parent = parent
        self.context = contextvars.copy_context()
        self.context.run(_RUNNING.set, self)

    def enter(self) -> None:
        """What the calling task does from here on is this process's."""
        _RUNNING.set(self)

    def stop(self) -> None:
        self.stopped = True

    def resume(self) -> None:
        self.stopped = False
        held, self.held = self.held, []
        for call in held:
            call.again()

    def stopper(self) -> Process | None:
        """Itself or the ancestor that keeps it from running."""
        if self.stopped:
            return self
        return self._parent.stopper() if self._parent else None


class _Call:
    """One callback, which a stopped process puts aside and a resumed one makes up for."""

    __slots__ = ("_args", "_callback", "_context", "_loop", "_process", "handle")

    def __init__(
        self,
        loop: ProcessLoop,
        process: Process,
        context: contextvars.Context,
        work: tuple[Callable[..., Any], tuple[Any, ...]],
    ) -> None:
        self._loop = loop
        self._process = process
        self._context = context
        self._callback, self._args = work
        self.handle: asyncio.Handle

    def run(self) -> None:
        if self.handle.cancelled():
            return  # While it was put aside.
        stopper = self._process.stopper()
        if stopper is None:
            self._callback(*self._args)
        else:
            stopper.held.append(self)

    def again(self) -> None:
        self._loop.soon_ungated(self.run, self._context)


class ProcessLoop(VirtualLoop):
    """Virtual time, and a gate before every callback of a process."""

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        gated = self._gated(callback, args, context)
        if gated is None:
            return super().call_soon(callback, *args, context=context)
        gated.handle = super().call_soon(gated.run, context=gated._context)
        return gated.handle

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        gated = self._gated(callback, args, context)
        if gated is None:
            return super().call_at(when, callback, *args, context=context)
        handle = super().call_at(when, gated.run, context=gated._context)
        gated.handle = handle
        return handle

    def soon_ungated(self, callback: Callable[[], None], context: contextvars.Context) -> None:
        super().call_soon(callback, context=context)

    def _gated(
        self,
        callback: Callable[..., Any],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> _Call | None:
        process = _RUNNING.get() if context is None else context.get(_RUNNING)
        if process is None:
            return None
        context = contextvars.copy_context() if context is None else context
        return _Call(self, process, context, (callback, args))
