"""Bounds that every attack is held to, in one place."""

from __future__ import annotations

from typing import Final

ITL_RATIO_MAX: Final = 3.0
"""The other streams' ITL p99 during an attack, as a multiple of the quiet one."""
ITL_FLOOR_S: Final = 0.03
"""A quiet p99 below this counts as this: on a busy machine less is scheduling."""
HOLD_S_MAX: Final = 1.0
"""The longest time in which the router answers no `/readyz`."""
MEMORY_RATIO_MAX: Final = 1.10
"""Memory after an attack, as a multiple of the memory before it."""
MEMORY_FLOOR_BYTES: Final = 16 << 20
"""Growth that is not judged: a small process's first use of a code path."""
PEAK_BYTES_MAX: Final = 256 << 20
"""Growth of one process while an attack runs."""
LOST_MAX: Final = 0
LOG_BYTES_A_REQUEST: Final = 2048
"""A finished request is a line of the router's log, and of the access log where there is one."""
LOG_BYTES_MAX: Final = 256 << 10
"""Bytes that one attack may have all processes log, beside a line a request."""
MAY_ANSWER_5XX: Final = frozenset({"501", "503"})
"""501: the route is served, what it asks for is not. 503: docs/errors.md has the codes."""
