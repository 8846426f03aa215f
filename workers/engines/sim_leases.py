"""Which finished prompts' blocks a simulated sender keeps, and until when."""

from __future__ import annotations


class Leases:
    """Handles with their deadlines. Single use: a handle that ended never comes back."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._until: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def grant(self, handle: str, now: float) -> None:
        """Keep from now on. A handle that is kept already is our own mistake."""
        assert handle not in self._until, f"handle {handle} was granted twice"
        self._until[handle] = now + self.lease_s

    def renew(self, handle: str, now: float) -> float | None:
        """Keep for another whole lease; seconds left before, or None when it has ended."""
        left = self._left(handle, now)
        if left is not None:
            self._until[handle] = now + self.lease_s
        return left

    def release(self, handle: str, now: float) -> float | None:
        """End it; seconds that were left, or None when it had ended before.

        One past its deadline is not ended here but by `expire`, which alone reports it.
        """
        left = self._left(handle, now)
        if left is not None:
            del self._until[handle]
        return left

    def expire(self, now: float) -> list[str]:
        """Handles whose time is over; they have ended with this call."""
        over = [h for h, until in self._until.items() if until <= now]
        for handle in over:
            del self._until[handle]
        return over

    def _left(self, handle: str, now: float) -> float | None:
        until = self._until.get(handle)
        return None if until is None or until <= now else until - now
