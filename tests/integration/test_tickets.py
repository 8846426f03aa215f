"""Whatever is wrong with a ticket, the answer is right and the reason is told."""

from __future__ import annotations

import socket
import time
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from kvtransfer.protocol import decode_ticket
from tests.asking import (
    ANSWER_S,
    BLOCK,
    LEASE_S,
    await_free,
    blocks,
    complete,
    metrics,
    random_prompt,
)
from tests.integration.damage import damaged
from tests.integration.wire import Wire
from workers.api import Delta, Finish, Phase, make_ticket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploy.local.group import LocalGroup

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(400),
    # Torch warns of its own deprecations while vLLM's codec imports it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPT = random_prompt(140, seed=1)
OTHER_PROMPT = random_prompt(140, seed=2)
TOKENS = 6
RUN = uuid.uuid4().hex


def spoiled(ticket: bytes, how: str) -> bytes:
    """The ticket with one thing wrong."""
    good = decode_ticket(ticket)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    changes: dict[str, dict[str, Any]] = {
        "version": {"version": good.version + 1},
        "epoch": {"epoch": "another"},
        "handle": {"handle": "0" * len(good.handle)},
        "endpoint": {"endpoint": nobody},
    }
    return msgspec.msgpack.encode(msgspec.structs.replace(good, **changes[how]))


def own(salt: str) -> str:
    """Never another run's: a salt's KV stays in the workers' caches."""
    return f"{salt} {RUN}"


def params(salt: str, **sampling: Any) -> bytes:
    """Greedy unless told otherwise, `TOKENS` of them, in the engine's own encoding."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from workers.vllm_codec import encode_request

    return encode_request(
        EngineCoreRequest(
            request_id="",
            prompt_token_ids=[],
            mm_features=None,
            sampling_params=SamplingParams(
                max_tokens=TOKENS,
                ignore_eos=True,
                detokenize=False,
                **{"temperature": 0.0, **sampling},
            ),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=salt,
            data_parallel_rank=None,
        )
    )


class Pair:
    """A prefill and a decode worker, spoken to directly."""

    def __init__(self, prefill: Wire, decode: Wire) -> None:
        self.prefill, self.decode = prefill, decode

    def ticket(self, prompt: list[int], salt: str) -> bytes:
        """Of a prefill that is done."""
        ticket = make_ticket(self.prefill.hello, uuid.uuid4().hex)
        assert ticket is not None
        asked = self.prefill.generate(
            Phase.PREFILL, prompt, max_tokens=TOKENS, params=params(own(salt)),
            cache_salt=own(salt), ticket=ticket,
        )  # fmt: skip
        deltas = self.prefill.deltas(asked)
        assert deltas[-1].finish is Finish.PREFILLED, deltas
        assert tokens_of(deltas) == [], "not asked to relay"
        return ticket

    def decoded(self, salt: str, ticket: bytes) -> list[Delta]:
        """`PROMPT`'s continuation, from a ticket that may be worth nothing."""
        asked = self.decode.generate(
            Phase.DECODE, PROMPT, max_tokens=TOKENS, params=params(own(salt)),
            ticket=ticket, cache_salt=own(salt),
        )  # fmt: skip
        return self.decode.deltas(asked)


@pytest.fixture
def pair(group: LocalGroup) -> Iterator[Pair]:
    channels = [group.worker(name).channel for name in ("prefill-0", "decode-0")]
    with ExitStack() as wires:
        yield Pair(*[wires.enter_context(Wire(channel)) for channel in channels])


@pytest.fixture(scope="module")
def right(aggregated: str) -> list[int]:
    """What one engine says to `PROMPT`."""
    body = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = complete(aggregated, prompt=PROMPT, **body).json()
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def assert_computed_here(deltas: list[Delta], right: list[int], why: str) -> None:
    assert tokens_of(deltas) == right
    assert deltas[-1].finish is Finish.LENGTH
    reasons = [d.kv_failed for d in deltas if d.kv_failed is not None]
    assert len(reasons) == 1, "the reason is told once"
    assert why in reasons[0]
    assert sum(d.kv_bytes for d in deltas) == 0


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("version", "ticket is of version"),
        ("handle", "its prompt never came"),
        ("epoch", "the handle of another"),
    ],
)
def test_a_ticket_with_one_thing_wrong_is_not_believed(
    pair: Pair, right: list[int], how: str, why: str
) -> None:
    ticket = pair.ticket(PROMPT, salt=how)
    assert_computed_here(pair.decoded(how, spoiled(ticket, how)), right, why)


def test_after_a_ticket_that_cost_the_sender_s_connection_the_next_one_is_read(
    pair: Pair, right: list[int]
) -> None:
    how = "epoch"
    bad = spoiled(pair.ticket(PROMPT, salt=f"{how}, first"), how)
    assert pair.decoded(f"{how}, first", bad)[0].kv_failed is not None
    deltas = pair.decoded(f"{how}, next", pair.ticket(PROMPT, salt=f"{how}, next"))
    assert tokens_of(deltas) == right
    assert deltas[0].kv_failed is None
    assert deltas[0].kv_bytes == -(-len(PROMPT) // BLOCK) * pair.prefill.hello.block_bytes


@pytest.mark.parametrize("content", [b"", b"\x90", b"\x91\xa1\xff", bytes(1000)])
def test_bytes_that_are_no_ticket_are_told_as_such(
    pair: Pair, right: list[int], content: bytes
) -> None:
    deltas = pair.decoded(f"garbage {content[:9].hex()}", content)
    assert_computed_here(deltas, right, "ticket is")


@pytest.mark.parametrize(
    ("prompt", "salt"), [(OTHER_PROMPT, "mine"), (PROMPT, "another's")], ids=["prompt", "salt"]
)
def test_another_s_ticket_brings_no_kv(
    pair: Pair, right: list[int], prompt: list[int], salt: str
) -> None:
    ticket = pair.ticket(prompt, salt)
    assert_computed_here(pair.decoded("mine", ticket), right, "prompt chain differs")


def test_a_ticket_to_nobody_is_given_up_within_the_connect_timeout(
    pair: Pair, right: list[int]
) -> None:
    ticket = spoiled(pair.ticket(PROMPT, salt="nobody"), "endpoint")
    asked_at = time.monotonic()
    deltas = pair.decoded("nobody", ticket)
    assert_computed_here(deltas, right, "did not answer")
    assert ANSWER_S <= time.monotonic() - asked_at < ANSWER_S + 5


def test_a_request_aborted_while_it_waits_for_its_sender_gives_its_blocks_back(
    group: LocalGroup, pair: Pair
) -> None:
    salt = own("aborted")
    asked = pair.decode.generate(
        Phase.DECODE, PROMPT, max_tokens=TOKENS, params=params(salt), cache_salt=salt,
        ticket=spoiled(pair.ticket(PROMPT, salt="aborted"), "endpoint"),
    )  # fmt: skip
    await_blocks(group, held=True, seconds=ANSWER_S)
    pair.decode.abort(asked)
    await_blocks(group, held=False, seconds=ANSWER_S + 5)


def await_blocks(group: LocalGroup, *, held: bool, seconds: float) -> None:
    """Until the decode worker holds some, or none."""
    until = time.monotonic() + seconds
    while True:
        free, total, _ = blocks(group)["decode-0"]
        if (free < total) is held:
            return
        assert time.monotonic() < until, (free, total)
        time.sleep(0.1)


def test_a_released_ticket_is_worth_nothing(
    group: LocalGroup, pair: Pair, right: list[int]
) -> None:
    ticket = pair.ticket(PROMPT, salt="released")
    open_before = blocks(group)["prefill-0"][2]
    pair.prefill.release(ticket)
    until = time.monotonic() + 5
    while blocks(group)["prefill-0"][2] >= open_before:
        assert time.monotonic() < until, "the lease is still open"
        time.sleep(0.05)
    deltas = pair.decoded("released", ticket)
    assert_computed_here(deltas, right, "released")


def test_a_ticket_is_good_once(pair: Pair, right: list[int]) -> None:
    ticket = pair.ticket(PROMPT, salt="twice")
    assert pair.decoded("twice", ticket)[0].kv_failed is None
    # The decode worker's own cache has all whole blocks now; what is left is not to be had.
    assert_computed_here(pair.decoded("twice", ticket), right, "released")


def test_an_unread_ticket_expires_and_all_it_held_is_free(
    group: LocalGroup, pair: Pair, right: list[int]
) -> None:
    ticket = pair.ticket(PROMPT, salt="expired")
    assert blocks(group)["prefill-0"][2] >= 1
    # So do those that the tests above left unread.
    await_free(group, LEASE_S + 3)
    assert_computed_here(pair.decoded("expired", ticket), right, "the lease has ended")
    await_free(group, 3)


def test_a_block_that_is_damaged_at_the_sender_is_never_used(
    group: LocalGroup, pair: Pair, right: list[int]
) -> None:
    """In its memory, from outside, after its checksum and before the read."""
    refused = 'tandem_worker_kv_mismatches_total{transport="ucx"}'
    before = metrics(group, "decode-0").get(refused, 0)
    ticket = pair.ticket(PROMPT, salt="damaged")
    with damaged(pair.prefill.hello):
        deltas = pair.decoded("damaged", ticket)
    assert_computed_here(deltas, right, "checksum of column 0 differs")
    assert metrics(group, "decode-0")[refused] == before + 1
    # Nothing of it stayed in the decode worker's own cache.
    again = pair.decoded("damaged", pair.ticket(PROMPT, salt="damaged"))
    assert tokens_of(again) == right


def test_a_decode_worker_may_be_asked_before_its_prompt_is(pair: Pair, right: list[int]) -> None:
    salt, ticket = "early", make_ticket(pair.prefill.hello, uuid.uuid4().hex)
    asked = pair.decode.generate(
        Phase.DECODE, PROMPT, max_tokens=TOKENS, params=params(own(salt)),
        ticket=ticket, cache_salt=own(salt), relay=True,
    )  # fmt: skip
    time.sleep(1)
    prefilled = pair.prefill.generate(
        Phase.PREFILL, PROMPT, max_tokens=TOKENS, params=params(own(salt)),
        ticket=ticket, cache_salt=own(salt), relay=True,
    )  # fmt: skip
    assert tokens_of(pair.prefill.deltas(prefilled)) == right[:1]
    deltas = pair.decode.deltas(asked)
    assert tokens_of(deltas) == right, "the relayed token is repeated, first of all"
    assert deltas[0].kv_failed is None


def test_without_a_readable_ticket_nothing_is_prefilled(pair: Pair) -> None:
    asked = pair.prefill.generate(
        Phase.PREFILL, PROMPT, max_tokens=TOKENS, params=params("x"), ticket=b"noise"
    )
    (delta,) = pair.prefill.deltas(asked)
    assert delta.finish is Finish.INVALID
    assert "ticket is" in (delta.error or "")


def test_a_seeded_prompt_longer_than_a_step_is_computed_by_the_decode_worker(
    pair: Pair, aggregated: str
) -> None:
    """In pieces, of which vLLM's own CPU engine dies (`workers.engines.vllm_worker_process`)."""
    prompt = random_prompt(300, seed=3)
    seeded = {"temperature": 0.9, "seed": 7}
    asked = pair.decode.generate(
        Phase.BOTH, prompt, max_tokens=TOKENS, params=params(own("seeded"), **seeded),
        cache_salt=own("seeded"),
    )  # fmt: skip
    body = {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True, **seeded}
    answer = complete(aggregated, prompt=prompt, **body).json()
    assert tokens_of(pair.decode.deltas(asked)) == answer["choices"][0]["token_ids"]
