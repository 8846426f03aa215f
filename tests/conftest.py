"""For all tiers: no test fails because its machine is busy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("busy machines", deadline=None)
settings.load_profile("busy machines")
