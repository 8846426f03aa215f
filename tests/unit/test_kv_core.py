"""The handoff's pure core: whose KV a handle holds, and how one side's blocks become another's."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.core.geometry import Unlike, heads_of, refusal, routes
from kvtransfer.core.manifest import Expectation, chain, mismatch, other_column
from kvtransfer.core.pulling import AskFollow, Pull, Timeouts, Wanted
from kvtransfer.protocol import (
    LINK_BYTES,
    VERSION,
    Blocks,
    Group,
    Layout,
    Manifest,
    Sealed,
    TicketUnreadable,
    decode_ticket,
    encode_ticket,
)

TOKENS = st.lists(st.integers(0, 200_000), min_size=1, max_size=40)
LINKS = chain(range(20), 16, salt=None, lora=None)
WANTED = Expectation(20, LINKS, "m", "t")
GOOD = Manifest(20, 2, LINKS[-LINK_BYTES:], "m", "t", None)


def layout_of(ranks: int = 1, block_tokens: int = 16, layers: int = 2, **others: object) -> Layout:
    """A layout of one group of full attention, four heads of 8 bytes a token."""
    size = max(1, 4 // ranks) * block_tokens * 8
    group = Group("full_attention", 0, block_tokens, list(range(layers)))
    plain = Layout(
        "c", "float32", kv_heads=4, head_token_bytes=8, ranks=ranks, by_head=True, by_token=True,
        groups=[group], segments=[size] * layers,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **others)


LAYOUT = layout_of()


# ------------------------------------------------------------ manifest


@given(TOKENS, TOKENS, st.sampled_from([1, 4, 16]))
def test_equal_tails_mean_equal_prompts(one: list[int], two: list[int], block: int) -> None:
    tails = [chain(t, block, salt=None, lora=None)[-LINK_BYTES:] for t in (one, two)]
    assert (tails[0] == tails[1]) == (one == two)


@given(TOKENS, TOKENS)
def test_prompts_share_links_as_far_as_they_share_blocks(one: list[int], two: list[int]) -> None:
    links = [chain(t, 4, salt=None, lora=None) for t in (one, two)]
    for block in range(min(len(one), len(two)) // 4):
        at = slice(block * LINK_BYTES, (block + 1) * LINK_BYTES)
        same = one[: (block + 1) * 4] == two[: (block + 1) * 4]
        assert (links[0][at] == links[1][at]) == same


def test_salt_adapter_and_block_size_are_part_of_the_chain() -> None:
    tails = {
        chain([1, 2, 3], block, salt=salt, lora=lora)[-LINK_BYTES:]
        for block in (2, 16)
        for salt in (None, "", "a")
        for lora in (None, "", "a")
    }
    assert len(tails) == 18


def test_a_whole_match_is_used() -> None:
    assert mismatch(GOOD, WANTED) is None
    assert other_column(LINKS, 0, WANTED) is None
    assert other_column(LINKS[LINK_BYTES:], 1, WANTED) is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_digest": "other"}, "model digest"),
        ({"tokenizer_digest": "other"}, "tokenizer digest"),
        ({"num_tokens": 21}, "token count"),
        ({"columns": 1}, "column count"),
        ({"chain": b"d" * 16}, "prompt chain"),
    ],
)
def test_anything_else_is_refused_by_name(change: dict[str, object], what: str) -> None:
    reason = mismatch(msgspec.structs.replace(GOOD, **change), WANTED)
    assert reason is not None
    assert reason.startswith(what)


@given(st.binary(max_size=80), st.integers(0, 3))
def test_only_the_prompts_own_links_are_its_blocks(links: bytes, first: int) -> None:
    own = LINKS[first * LINK_BYTES :][: len(links)]
    assert (other_column(links, first, WANTED) is None) == (links == own)


# ------------------------------------------------------------ tickets


@given(st.binary(max_size=60))
def test_no_bytes_but_a_ticket_are_read_as_one(content: bytes) -> None:
    with pytest.raises(TicketUnreadable):
        decode_ticket(content)


def test_another_version_is_refused_before_anything_else_is_read() -> None:
    with pytest.raises(TicketUnreadable, match=f"version 99, this receiver of {VERSION}"):
        decode_ticket(msgspec.msgpack.encode([99, {"nothing": "known"}]))


def test_a_ticket_comes_back_as_it_was() -> None:
    ticket = decode_ticket(encode_ticket("e", "h", "tcp://a:1"))
    assert (ticket.epoch, ticket.handle, ticket.endpoint) == ("e", "h", "tcp://a:1")


# ------------------------------------------------------------ geometry


def memory(layout: Layout, rank: int, blocks: int) -> np.ndarray:
    """Words that name what they hold: layer, head, and which token of which block; units apart."""
    held = heads_of(layout, rank)
    shape = (len(layout.segments), blocks, held.count, layout.column_tokens)
    words = np.zeros(shape, dtype=np.int64)
    for layer, block, head, token in itertools.product(*(range(n) for n in shape)):
        words[layer, block, head, token] = (
            ((layer * 100 + block) * 100 + held.first + head) * 100 + token
        )  # fmt: skip
    return words


@given(
    ranks=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    sizes=st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8])),
    tokens=st.integers(1, 30),
    cached_blocks=st.integers(0, 2),
    seed=st.randoms(use_true_random=False),
)
def test_every_token_of_every_head_lands_where_it_belongs(
    ranks: tuple[int, int], sizes: tuple[int, int], tokens: int, cached_blocks: int, seed: object
) -> None:
    sender, receiver = layout_of(ranks[0], sizes[0]), layout_of(ranks[1], sizes[1])
    theirs = list(range(1, 21))
    seed.shuffle(theirs)  # type: ignore[attr-defined]
    ours = list(range(1, 21))
    seed.shuffle(ours)  # type: ignore[attr-defined]
    cached = min(cached_blocks * sizes[1], (tokens - 1) // sizes[1] * sizes[1])
    for rank in range(receiver.ranks):
        local = np.full_like(memory(receiver, rank, 21), -1)
        for route in routes(sender, receiver, rank):
            bound = route.bound(21, 21)
            stride = route.stride_tokens
            wanted = range(cached // stride, -(-tokens // stride))
            here, there = bound.units(wanted, [[b] for b in ours], [[b] for b in theirs])
            words = route.unit_bytes // LAYOUT.head_token_bytes
            remote = memory(sender, route.sender_rank, 21).reshape(-1, words)
            local.reshape(-1, words)[here] = remote[there]
        held = heads_of(receiver, rank)
        for layer, head, token in itertools.product(
            range(2), range(held.count), range(cached, tokens)
        ):
            block, at = theirs[token // sizes[0]], token % sizes[0]
            expected = ((layer * 100 + block) * 100 + held.first + head) * 100 + at
            got = local[layer, ours[token // sizes[1]], head, token % sizes[1]]
            assert got == expected
        for block in ours[: cached // sizes[1]]:
            assert (local[:, block] == -1).all(), "what is cached is not touched"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"content": "other"}, ["content", "c", "other"]),
        ({"dtype": "bfloat16"}, ["float32", "bfloat16"]),
        ({"layers": 3}, ["groups", "2 x full_attention", "3 x full_attention"]),
        ({"ranks": 3}, ["4 KV heads", "3 ranks"]),
        ({"block_tokens": 24}, ["16 tokens", "24"]),
    ],
)
def test_what_does_not_fit_is_refused_naming_both(
    change: dict[str, object], words: list[str]
) -> None:
    other = layout_of(**change)  # type: ignore[arg-type]
    reason = refusal(LAYOUT, other)
    assert reason is not None
    assert all(w in reason for w in words)
    with pytest.raises(Unlike):
        routes(LAYOUT, other, 0)


def test_a_layout_that_keeps_nothing_apart_must_be_equal() -> None:
    whole = layout_of(by_head=False, by_token=False)
    assert refusal(whole, whole) is None
    split = layout_of(ranks=2, by_head=False, by_token=False)
    assert "ranks must be equal" in (refusal(whole, split) or "")
    smaller = layout_of(block_tokens=8, by_head=False, by_token=False)
    assert "blocks must be equal" in (refusal(whole, smaller) or "")


def pull_of(tokens: int) -> tuple[Pull, bytes]:
    """One that follows, over blocks of 4 tokens, and the prompt's chain."""
    links = chain(list(range(tokens)), 4, salt=None, lora=None)
    pull = Pull(Timeouts(), asked_at=0.0)
    blocks = len(links) // LINK_BYTES
    pull.opened(Wanted(Expectation(tokens, links, "m", "t"), 1, 0, blocks, 10.0), 0.0)
    pull.held(0.0, 0.0)
    return pull, links


@pytest.mark.parametrize("of_links", [0, 1, 3])
def test_a_block_without_a_link_of_its_own_is_never_read(of_links: int) -> None:
    pull, links = pull_of(16)
    pull.blocks(Blocks("h", 0, 0, [[7], [8]], links[: of_links * LINK_BYTES], []), 1.0)
    assert pull.next_read(9, 1.0) is None
    assert pull.error is not None


def test_news_of_no_blocks_changes_nothing() -> None:
    pull, links = pull_of(8)
    pull.blocks(Blocks("h", 9, 0, [], b"", []), 1.0)
    pull.blocks(Blocks("h", 0, 0, [[7], [8]], links, []), 1.0)
    assert pull.next_read(9, 1.0) == (1, range(2)), "generation 9 was none"


def test_a_seal_vouches_for_no_block_of_an_earlier_generation() -> None:
    pull, links = pull_of(8)
    pull.blocks(Blocks("h", 0, 0, [[7], [8]], links, []), 1.0)
    number, _ = pull.next_read(9, 1.0) or (0, None)
    pull.read_done(number, 1.0)
    manifest = Manifest(8, 2, links[-LINK_BYTES:], "m", "t", None)
    assert pull.seal(Sealed("h", 1, manifest), 1.0) == [AskFollow()]
    assert not pull.ended
