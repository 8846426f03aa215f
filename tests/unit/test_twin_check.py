"""What `make twin-check` learns of traffic: how much longer steps take in it, and their noise."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest

from deploy.local.twin_check import chats, foretold, plan_of, settled, slowed
from loadtests.replay import Outcome
from router.twin.calibrate import Calibrated, as_toml
from router.twin.fit import Fit
from router.twin.outcomes import GAP_GRAIN_S
from tests.unit.test_dispatch import hello
from workers.api import Role
from workers.engines.sim_settings import SimSettings

FRONT_MS = 12.0
KNOWN = SimSettings(
    prefill_tokens_per_s=700.0, step_s=0.03, pair_s=1e-7, stream_s=1e-3, context_token_s=3e-6,
    batch_s=(0.0, 3e-3, -1e-3), chunk_tokens=1024, streams=True,
)  # fmt: skip


def engines(prefill: float, decode: float, noise: float) -> list[Calibrated]:
    """Their steps take so many times as long as `KNOWN`."""
    found = []
    for role, factor in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        slow = replace(
            KNOWN,
            prefill_tokens_per_s=KNOWN.prefill_tokens_per_s / factor,
            **{name: getattr(KNOWN, name) * factor
               for name in ("step_s", "pair_s", "stream_s", "context_token_s")},
            batch_s=tuple(s * factor for s in KNOWN.batch_s),
            noise=noise if role is Role.DECODE else 0.0,
        )  # fmt: skip
        said = {n: v for n, v in asdict(slow).items() if n not in ("vocabulary", "instant")}
        found.append(Calibrated(hello(role, role), said, Fit([1.0], 0.0, 0.0, 1), 1.2))
    return found


@pytest.mark.parametrize(("prefill", "decode", "noise"), [(1.08, 1.05, 0.1), (0.93, 0.97, 0.03)])
def test_what_traffic_adds_is_found_whatever_was_calibrated(
    prefill: float, decode: float, noise: float
) -> None:
    real = plan_of(as_toml(engines(prefill, decode, noise), 0.2, FRONT_MS))
    some = chats(real, 0.5, 30, seed=random.Random(noise).getrandbits(16))
    outcomes = foretold(real, some).outcomes
    heard = [Outcome(ttft_s=outcomes.ttft_s(n)) for n in range(len(some))]
    heard[0].gaps_s = [gap * GAP_GRAIN_S for gap in outcomes.gaps.elements()]
    calibrated = plan_of(as_toml(engines(1.0, 1.0, 0.01), 0.2, FRONT_MS))
    factors = settled(calibrated, some, heard)
    assert factors[:2] == pytest.approx((prefill, decode), rel=0.02)
    found = slowed(calibrated, *factors)
    for known, real_worker in zip(found.workers, real.workers, strict=True):
        assert known.settings.step_s == pytest.approx(real_worker.settings.step_s, rel=0.02)
    decoding = next(w.settings for w in found.workers if w.role == Role.DECODE)
    assert decoding.noise == pytest.approx(noise, abs=0.03)


def test_who_is_not_slowed_may_still_slow_another() -> None:
    prefill, decode = engines(1.0, 1.0, 0.0)
    plan = plan_of(as_toml([replace(prefill, beside=1.0), decode], 0.2, FRONT_MS))
    assert [(w.host, w.beside) for w in plan.workers] == [("one", 1.0), ("one", 1.2)]
