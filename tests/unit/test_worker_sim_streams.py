"""The simulated engine under handles that a router made up: followed, relayed, given up."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.protocol import encode_ticket
from tests.unit.test_worker_sim import PROMPT, SMALL, Bench, tokens
from workers.api import Delta, Finish, Generate, Phase
from workers.engines.sim import SimEngine
from workers.engines.sim_blocks import Handoffs
from workers.engines.sim_settings import SimSettings

TICKET = encode_ticket("p", "r/p", "sim")
ALL_FREE = (SMALL.blocks_total, 0)


class Streams(Bench):
    """A prefill and a decode worker, and their router's tickets."""

    def ask_prefill(self, outputs: int = 4, *, relay: bool = False) -> None:
        self.engines["p"].submit(
            Generate("r/p", Phase.PREFILL, PROMPT, outputs, b"", TICKET, relay)
        )  # fmt: skip

    def ask_decode(self, ticket: bytes = TICKET, request_id: str = "r") -> None:
        self.engines["d"].submit(Generate(request_id, Phase.DECODE, PROMPT, 4, b"", ticket))

    def look(self, times: int = 3) -> list[Delta]:
        return [delta for _ in range(times) for delta in self.step("d")]

    def handles(self) -> int:
        book = self.handoffs.book("p")
        assert book is not None
        return len(book._live)


@pytest.fixture
def bench() -> Streams:
    return Streams()


EXPECTED = tokens(Bench().decode(PROMPT, None))


def failed(deltas: list[Delta]) -> str:
    """Why the pull failed; the prompt was computed all the same."""
    assert tokens(deltas) == EXPECTED
    assert deltas[0].kv_tokens == 0
    return deltas[0].kv_failed or ""


@pytest.mark.parametrize("decode_first", [True, False])
def test_a_prompt_is_kept_under_the_routers_handle(bench: Streams, *, decode_first: bool) -> None:
    bench.ask_prefill()
    if decode_first:
        bench.ask_decode()
        assert bench.look() == []
        assert bench.free("d") == (9, 0), "reserved before there is anything to read"
    last = bench.finish_all("p")[-1]
    assert (last.finish, last.ticket, last.token_ids) == (Finish.PREFILLED, None, [])
    assert bench.free("p") == (9, 1)
    if not decode_first:
        bench.ask_decode()
    deltas = bench.finish_all("d")
    assert tokens(deltas) == EXPECTED
    assert (deltas[0].kv_failed, deltas[0].kv_tokens) == (None, len(PROMPT))
    assert bench.free("p") == bench.free("d") == ALL_FREE
    assert bench.handles() == 0


def test_what_was_reserved_before_has_only_the_last_chunk_left_to_read(bench: Streams) -> None:
    bench.ask_decode()
    bench.look()
    bench.ask_prefill()
    bench.finish_all("p")
    early = bench.finish_all("d")[0]
    late_bench = Streams()
    late_bench.ask_prefill()
    late_bench.finish_all("p")
    late_bench.ask_decode()
    late = late_bench.finish_all("d")[0]
    assert early.kv_s < late.kv_s
    assert early.kv_bytes == late.kv_bytes


def test_the_relayed_token_is_the_decode_workers_first(bench: Streams) -> None:
    bench.ask_prefill(relay=True)
    bench.ask_decode()
    relayed = bench.finish_all("p")[-1]
    assert (relayed.finish, relayed.token_ids) == (Finish.PREFILLED, EXPECTED[:1])
    assert tokens(bench.finish_all("d")) == EXPECTED


def test_a_first_token_that_is_the_last_leaves_nothing_to_hand_off(bench: Streams) -> None:
    bench.ask_decode()
    bench.look()
    bench.ask_prefill(1, relay=True)
    last = bench.finish_all("p")[-1]
    assert (last.finish, last.token_ids) == (Finish.LENGTH, EXPECTED[:1])
    assert bench.free("p") == ALL_FREE
    assert failed(bench.finish_all("d")) == "its first token was its last"


@pytest.mark.parametrize(("chunk", "told"), [(4, [False, True, False]), (8, [True, False])])
def test_the_last_step_is_told_once_at_the_end_of_the_one_before(
    chunk: int, told: list[bool]
) -> None:
    bench = Streams(SimSettings(chunk_tokens=chunk))
    bench.ask_prefill()
    steps = [bench.step("p") for _ in told]
    assert [any(d.last_step for d in deltas) for deltas in steps] == told
    assert [d.finish for d in steps[-1]] == [Finish.PREFILLED]
    (early,) = [d for deltas in steps for d in deltas if d.last_step]
    assert early == Delta("r/p", [], last_step=True)


def test_a_prompt_of_one_step_and_one_with_a_ticket_of_its_own_are_never_in_their_last() -> None:
    one_step = Streams(SimSettings(chunk_tokens=len(PROMPT)))
    one_step.ask_prefill()
    assert [d.finish for d in one_step.finish_all("p")] == [Finish.PREFILLED]
    own = Streams()
    own.engines["p"].submit(Generate("r/p", Phase.PREFILL, PROMPT, 4, b""))
    assert [d.finish for d in own.finish_all("p")] == [Finish.PREFILLED]


def test_an_aborted_prefill_is_told_to_whoever_follows(bench: Streams) -> None:
    bench.ask_prefill()
    bench.ask_decode()
    bench.step("p")
    bench.look()
    bench.engines["p"].abort(["r/p"])
    assert failed(bench.finish_all("d")) == "the prefill was aborted"
    assert bench.free("p") == ALL_FREE
    assert bench.handles() == 0


def test_a_preempted_prefill_is_kept_once_it_is_computed_after_all() -> None:
    bench = Streams(SimSettings(blocks_total=4, block_tokens=4, chunk_tokens=8))
    bench.engines["p"].submit(Generate("u", Phase.BOTH, [7] * 3, 5, b"", priority=-1))
    bench.step("p")
    bench.ask_prefill()
    bench.ask_decode()
    deltas = [*bench.step("p"), *bench.look()]
    assert [d.request_id for d in deltas if d.last_step] == ["r/p"]
    deltas += bench.step("p")
    assert bench.engines["p"].load(bench.now).waiting == 1, "preempted, for the other's fifth token"
    deltas += bench.finish_all("p")
    assert bench.free("p") == (1, 1)
    assert sum(d.last_step for d in deltas) == 1
    pulled = bench.finish_all("d")
    assert (tokens(pulled), pulled[0].kv_failed) == (EXPECTED, None)


@pytest.mark.parametrize("when", ["awaited", "sealed"])
@pytest.mark.parametrize("back", [True, False])
def test_a_sender_that_leaves_or_restarts_ends_the_wait(
    bench: Streams, when: str, *, back: bool
) -> None:
    bench.ask_prefill()
    bench.ask_decode()
    bench.look()
    if when == "sealed":
        bench.finish_all("p")
        bench.look(1)
    bench.handoffs.leave("p")
    if back:
        bench.handoffs.join("p.2", SMALL.lease_s)
    assert failed(bench.finish_all("d")) == "sender of epoch p is gone"


def test_a_prompt_that_never_comes_is_awaited_for_one_lease(bench: Streams) -> None:
    bench.ask_decode()
    since = bench.now
    assert failed(bench.finish_all("d")) == "its prompt never came"
    assert SMALL.lease_s <= bench.now - since < SMALL.lease_s + 1.0
    bench.ask_prefill()  # And if it does come then, nothing is kept for nobody.
    assert bench.finish_all("p")[-1].finish is Finish.PREFILLED
    assert bench.free("p") == ALL_FREE


def test_a_queued_prompt_is_awaited_for_longer_than_a_lease(bench: Streams) -> None:
    bench.ask_prefill()
    bench.ask_decode()
    bench.look()
    bench.now += 3 * SMALL.lease_s
    assert bench.look() == []
    bench.finish_all("p")
    assert bench.finish_all("d")[0].kv_failed is None


def test_a_lease_that_nobody_reads_ends_by_itself(bench: Streams) -> None:
    bench.ask_prefill()
    bench.finish_all("p")
    bench.now += SMALL.lease_s
    assert bench.free("p") == ALL_FREE
    bench.ask_decode()
    assert failed(bench.finish_all("d")) == "the lease has ended"


def test_a_lease_that_ends_during_the_read_makes_it_worthless(bench: Streams) -> None:
    bench.ask_prefill()
    bench.finish_all("p")
    bench.ask_decode()
    bench.look(1)
    bench.now += SMALL.lease_s
    assert failed(bench.finish_all("d")) == "the lease has ended"


@pytest.mark.parametrize("sealed", [True, False])
def test_a_release_ends_what_nobody_follows(bench: Streams, *, sealed: bool) -> None:
    bench.ask_prefill()
    if sealed:
        bench.finish_all("p")
    for _ in range(2):  # Repeated is harmless.
        bench.engines["p"].release([TICKET], bench.now)
    bench.finish_all("p")
    assert bench.free("p") == ALL_FREE
    bench.ask_decode()
    assert failed(bench.finish_all("d")) == "released"


@pytest.mark.parametrize("sealed", [True, False])
def test_a_release_does_not_end_what_somebody_reads(bench: Streams, *, sealed: bool) -> None:
    bench.ask_prefill()
    bench.ask_decode()
    bench.look()
    if sealed:
        bench.finish_all("p")
        bench.look(1)
    bench.engines["p"].release([TICKET], bench.now)
    bench.finish_all("p")
    assert bench.free("p") == (9, 1)
    assert bench.finish_all("d")[0].kv_failed is None
    assert bench.free("p") == ALL_FREE


@pytest.mark.parametrize("sealed", [True, False])
def test_an_aborted_pull_lets_the_blocks_go(bench: Streams, *, sealed: bool) -> None:
    bench.ask_prefill()
    bench.ask_decode()
    bench.look()
    if sealed:
        bench.finish_all("p")
        bench.look(1)
    bench.engines["d"].abort(["r"])
    bench.finish_all("p")
    assert bench.free("p") == bench.free("d") == ALL_FREE
    assert bench.handles() == 0


def test_another_prompt_s_kv_is_not_used(bench: Streams) -> None:
    other = Generate("r/p", Phase.PREFILL, [*PROMPT[:-1], 99], 4, b"", TICKET)
    bench.engines["p"].submit(other)
    bench.finish_all("p")
    bench.ask_decode()
    assert failed(bench.finish_all("d")) == "the ticket is of another prompt"
    assert bench.free("p") == ALL_FREE


def test_a_second_follower_does_not_free_the_blocks_under_the_first(bench: Streams) -> None:
    bench.ask_prefill()
    bench.ask_decode()
    bench.ask_decode(request_id="again")
    deltas = bench.look()
    bench.finish_all("p")
    deltas += bench.finish_all("d")
    mine, other = ([d for d in deltas if d.request_id == r] for r in ("r", "again"))
    assert mine[0].kv_failed is None
    assert "another receiver follows it" in failed(other)


def test_only_an_engine_that_shares_its_process_says_that_it_streams() -> None:
    streams = SimSettings(streams=True)
    said = [
        asyncio.run(SimEngine(config, "e", handoffs).start()).handoff_endpoint
        for config, handoffs in (
            (streams, Handoffs()), (streams, None), (SimSettings(), Handoffs()),
        )
    ]  # fmt: skip
    assert said == ["sim", "", ""]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.sampled_from(["prefill", "decode", "abort", "release"]), st.integers(0, 7)
            ),
            st.tuples(st.just("step"), st.integers(0, 1)),
            st.tuples(st.just("wait"), st.integers(1, 6)),
        ),
        max_size=60,
    )
)
def test_whatever_happens_nothing_stays_reserved_or_kept(events: list[tuple[str, int]]) -> None:
    bench, asked = Streams(), set[tuple[str, int]]()
    for what, n in events:
        ticket, prompt = encode_ticket("p", f"{n}/p", "sim"), list(range(1, 3 * n + 2))
        if what in ("prefill", "decode") and (what, n) not in asked:
            asked.add((what, n))
            if what == "prefill":
                generate = Generate(f"{n}/p", Phase.PREFILL, prompt, 1 + n % 3, b"", ticket, n > 3)
            else:
                generate = Generate(str(n), Phase.DECODE, prompt, 4, b"", ticket)
            bench.engines[what[0]].submit(generate)
        elif what == "abort":
            for engine in bench.engines.values():
                engine.abort([str(n), f"{n}/p"])
        elif what == "release":
            bench.engines["p"].release([ticket], bench.now)
        elif what == "step":
            bench.step("pd"[n])
        elif what == "wait":
            bench.now += n
        for name in "pd":
            assert 0 <= bench.free(name)[0] <= SMALL.blocks_total
    for name in "pdp":
        bench.finish_all(name)
    bench.now += SMALL.lease_s
    assert bench.free("p") == bench.free("d") == ALL_FREE
    assert bench.handles() == 0
