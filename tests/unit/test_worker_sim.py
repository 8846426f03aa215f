"""The simulated engine's own laws: its accounts, its leases, and its pulls."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.api import Delta, Finish, Generate, Phase
from workers.engines.sim import sim_settings
from workers.engines.sim_blocks import BlockPool, Handoffs
from workers.engines.sim_model import SimModel
from workers.engines.sim_settings import SimSettings

SMALL = SimSettings(blocks_total=12, block_tokens=4, chunk_tokens=8, lease_s=5.0, max_model_len=40)


class Bench:
    """Engines that share a clock and their handoffs."""

    def __init__(self, config: SimSettings = SMALL, *names: str) -> None:
        self.now = 0.0
        self.handoffs = Handoffs(only_here=True)
        self.engines: dict[str, SimModel] = {}
        for name in names or ("p", "d"):
            self.handoffs.join(name, config.lease_s)
            self.engines[name] = SimModel(config, name, self.handoffs)

    def step(self, name: str) -> list[Delta]:
        engine = self.engines[name]
        self.now += engine.begin(self.now)
        return engine.finish(self.now)

    def finish_all(self, name: str) -> list[Delta]:
        deltas = []
        # Long enough to outwait a lease in naps: a full pool may have to.
        until = self.now + 100 * SMALL.lease_s
        while self.now < until:
            if not self.engines[name].busy:
                return deltas
            deltas += self.step(name)
        raise AssertionError("the engine never became idle")

    def prefill(self, prompt: list[int], request_id: str = "r/p") -> bytes:
        self.engines["p"].submit(Generate(request_id, Phase.PREFILL, prompt, 1, b""))
        last = self.finish_all("p")[-1]
        assert (last.finish, last.token_ids) == (Finish.PREFILLED, [])
        assert last.ticket is not None
        return last.ticket

    def decode(self, prompt: list[int], ticket: bytes | None, outputs: int = 4) -> list[Delta]:
        phase = Phase.BOTH if ticket is None else Phase.DECODE
        self.engines["d"].submit(Generate("r", phase, prompt, outputs, b"", ticket))
        return self.finish_all("d")

    def free(self, name: str) -> tuple[int, int]:
        load = self.engines[name].load(self.now)
        return load.blocks_free, load.leases_open


def tokens(deltas: list[Delta]) -> list[int]:
    return [t for d in deltas for t in d.token_ids]


PROMPT = list(range(1, 12))


def test_a_pull_brings_the_same_tokens_as_computing() -> None:
    bench = Bench()
    pulled = bench.decode(PROMPT, bench.prefill(PROMPT))
    assert tokens(pulled) == tokens(Bench().decode(PROMPT, None))
    assert pulled[0].kv_failed is None
    assert pulled[0].kv_tokens == len(PROMPT)
    assert pulled[0].kv_bytes == 3 * SMALL.block_tokens * SMALL.token_bytes
    assert pulled[0].kv_s > 0
    assert bench.free("p") == (12, 0)
    assert bench.free("d") == (12, 0)


def test_a_pull_is_sooner_than_computing() -> None:
    pulled, computed = Bench(), Bench()
    ticket = pulled.prefill(PROMPT)
    since = pulled.now
    pulled.decode(PROMPT, ticket, outputs=1)
    computed.decode(PROMPT, None, outputs=1)
    assert pulled.now - since < computed.now


def test_a_lease_keeps_its_blocks_until_it_is_released_or_ends() -> None:
    bench = Bench()
    ticket = bench.prefill(PROMPT)
    assert bench.free("p") == (9, 1)
    for _ in range(2):  # Repeated is harmless.
        bench.engines["p"].release([ticket], bench.now)
        assert bench.free("p") == (12, 0)
    bench.prefill(PROMPT, "s/p")
    bench.now += SMALL.lease_s
    assert bench.free("p") == (12, 0)


@pytest.mark.parametrize("how", ["expired", "released", "dead", "garbage", "another prompt"])
def test_a_ticket_that_is_no_good_is_told_and_computed_instead(how: str) -> None:
    bench = Bench()
    ticket = bench.prefill([*PROMPT[:-1], 99] if how == "another prompt" else PROMPT)
    if how == "expired":
        bench.now += SMALL.lease_s
    elif how == "released":
        bench.engines["p"].release([ticket], bench.now)
    elif how == "dead":
        bench.handoffs.leave("p")
    elif how == "garbage":
        ticket = b"no ticket"
    deltas = bench.decode(PROMPT, ticket)
    assert deltas[0].kv_failed
    assert deltas[0].kv_tokens == 0
    assert tokens(deltas) == tokens(Bench().decode(PROMPT, None))
    assert bench.free("d") == (12, 0)


def test_a_lease_that_ends_during_the_pull_makes_the_pull_worthless() -> None:
    bench = Bench()
    ticket = bench.prefill(PROMPT)
    bench.engines["d"].submit(Generate("r", Phase.DECODE, PROMPT, 4, b"", ticket))
    bench.step("d")
    bench.engines["p"].release([ticket], bench.now)
    deltas = bench.finish_all("d")
    assert deltas[0].kv_failed == "the lease has ended"
    assert tokens(deltas) == tokens(Bench().decode(PROMPT, None))


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("pulls", [False, True])
def test_an_abort_at_any_moment_frees_the_blocks(steps: int, pulls: bool) -> None:
    bench = Bench()
    ticket = bench.prefill(PROMPT) if pulls else None
    phase = Phase.DECODE if pulls else Phase.BOTH
    bench.engines["d"].submit(Generate("r", phase, PROMPT, 20, b"", ticket))
    for _ in range(steps):
        bench.step("d")
    assert (bench.free("d")[0] < SMALL.blocks_total) == (steps > 0)
    bench.engines["d"].abort(["r"])
    assert bench.free("d") == (12, 0)
    assert bench.finish_all("d") == []


def test_going_on_from_tokens_already_sent_says_the_same() -> None:
    whole = tokens(Bench().decode(PROMPT, None, outputs=8))
    rest = tokens(Bench().decode(PROMPT + whole[:3], None, outputs=5))
    assert whole[3:] == rest


def test_preempted_requests_still_say_what_they_would_alone() -> None:
    prompts = [[i + 1] * 8 for i in range(4)]
    alone = [tokens(Bench().decode(p, None, outputs=16)) for p in prompts]
    bench = Bench()
    for i, prompt in enumerate(prompts):
        bench.engines["d"].submit(Generate(f"r{i}", Phase.BOTH, prompt, 16, b""))
    deltas = bench.finish_all("d")
    for i, expected in enumerate(alone):
        assert tokens([d for d in deltas if d.request_id == f"r{i}"]) == expected
    assert bench.free("d") == (12, 0)


def test_a_full_memory_preempts_nobody_whose_kv_is_still_arriving() -> None:
    slow = SimSettings(blocks_total=12, block_tokens=4, pull_bytes_per_s=1e6, lease_s=60.0)
    bench = Bench(slow)
    ticket = bench.prefill(PROMPT)
    bench.engines["d"].submit(Generate("old", Phase.BOTH, [7] * 31, 12, b""))
    deltas = bench.step("d")
    bench.engines["d"].submit(Generate("r", Phase.DECODE, PROMPT, 1, b"", ticket))
    deltas += bench.finish_all("d")
    assert [d.kv_failed for d in deltas if d.request_id == "r"] == [None]
    assert bench.free("p") == (12, 0), "its lease was released, not left to end"
    assert tokens([d for d in deltas if d.request_id == "old"]) == tokens(
        Bench(slow).decode([7] * 31, None, outputs=12)
    )


def test_what_can_never_fit_is_invalid() -> None:
    bench = Bench(SimSettings(blocks_total=4, block_tokens=4, max_model_len=400))
    (delta,) = bench.decode(PROMPT, None, outputs=20)
    assert delta.finish is Finish.INVALID
    assert "KV blocks" in (delta.error or "")


def test_a_more_urgent_request_runs_first() -> None:
    bench = Bench(SimSettings(running_max=1))
    for name, priority in (("a", 0), ("late", 5), ("urgent", -5)):
        bench.engines["d"].submit(
            Generate(name, Phase.BOTH, PROMPT, 1, b"", priority=priority)
        )  # fmt: skip
    order = [d.request_id for d in bench.finish_all("d")]
    assert order == ["urgent", "a", "late"]


def test_a_salt_keeps_prompts_apart() -> None:
    bench = Bench()
    bench.decode(PROMPT, None)
    bench.engines["d"].submit(Generate("s", Phase.BOTH, PROMPT, 1, b"", cache_salt="x"))
    assert bench.finish_all("d")[0].cached_tokens == 0


def test_the_cache_evicts_the_least_recent_block_first() -> None:
    pool = BlockPool(2)
    for block in (1, 2):
        assert pool.take((), 1)
        assert pool.publish(block)
        pool.give_back([block], 0)
    assert (pool.cached([1]), pool.cached([2]), pool.free) == (1, 1, 2)
    assert pool.take((), 1)
    assert (pool.cached([1]), pool.cached([2]), pool.free) == (0, 1, 1)
    assert not pool.take([2], 1), "a cached block counts once it is owned"


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.integers(1, 20), st.integers(1, 12)),
            st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
            st.tuples(st.just("step"), st.sampled_from([0, 1]), st.just(0)),
            st.tuples(st.just("wait"), st.integers(1, 6), st.just(0)),
        ),
        max_size=60,
    )
)
def test_whatever_happens_every_block_comes_back(events: list[tuple[str, int, int]]) -> None:
    bench, asked, tickets = Bench(), 0, [b""]
    for what, a, b in events:
        if what == "ask":
            prompt = list(range(1, a + 1))
            phase = [Phase.PREFILL, Phase.DECODE, Phase.BOTH][b % 3]
            name = "p" if phase is Phase.PREFILL else "d"
            ticket = tickets[-1] if phase is Phase.DECODE else None
            bench.engines[name].submit(Generate(str(asked), phase, prompt, b, b"", ticket))
            asked += 1
        elif what == "abort":
            for engine in bench.engines.values():
                engine.abort([str(a)])
        elif what == "step":
            found = bench.step("pd"[a])
            tickets += [d.ticket for d in found if d.ticket]
        else:
            bench.now += a
        for name in "pd":
            assert 0 <= bench.free(name)[0] <= SMALL.blocks_total
    for name in "pd":
        bench.finish_all(name)
    bench.now += SMALL.lease_s
    assert bench.free("p") == bench.free("d") == (12, 0)


def test_a_bad_flag_stops_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert sim_settings(["--sim-instant", "--sim-blocks", "9"]).blocks_total == 9
    for flags in (["--sim-blocks", "0"], ["--dtype", "float32"], ["--sim-step-ms", "x"]):
        with pytest.raises(SystemExit) as stop:
            sim_settings(flags)
        assert stop.value.code == 2
        assert flags[0] in capsys.readouterr().err
