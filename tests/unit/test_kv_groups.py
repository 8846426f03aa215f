"""KV groups in the handoff: windows, states, unlike layers, and blocks that groups share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.connecting import Reach
from kvtransfer.core.geometry import refusal, routes
from kvtransfer.core.manifest import chain
from kvtransfer.core.pulling import Pull, Timeouts
from kvtransfer.orders import Order
from kvtransfer.protocol import NULL_BLOCK, Blocks, Group, Layout, Opened

BLOCKS = 40


def layout_of(groups: list[Group], segments: list[int], **others: Any) -> Layout:
    plain = Layout("c", "u8", 1, 0, 1, by_head=False, by_token=False, groups=groups,
                   segments=segments)  # fmt: skip
    return msgspec.structs.replace(plain, **others)


FULL = Group("full_attention", 0, 8, [0, 1])
SLIDING = Group("sliding_window", 16, 16, [0, 1])
STATE = Group("mamba", 0, 4096, [2])
HYBRID = layout_of([FULL, SLIDING, STATE], [64, 96, 32])


# ------------------------------------------------------------ columns


def test_a_column_is_whole_blocks_of_every_group_and_a_state_is_not_counted() -> None:
    assert HYBRID.column_tokens == 16
    assert HYBRID.slots == [[0, 1], [0, 1], [0, 1], [2]]


def test_a_model_of_states_alone_has_columns_of_their_blocks() -> None:
    assert layout_of([STATE], [1, 1, 32]).column_tokens == 4096


# ------------------------------------------------------------ geometry


@dataclass
class Cache:
    """One side's memory: an array a segment, of shape (blocks, bytes)."""

    layout: Layout
    empty: int

    def __post_init__(self) -> None:
        self.arrays = [np.full((BLOCKS, size), self.empty) for size in self.layout.segments]

    def write(self, columns: list[list[int]]) -> None:
        """Name what each block holds: its column, slot, segment and byte."""
        for number, column in enumerate(columns):
            for slot, segments in enumerate(self.layout.slots):
                for n in segments:
                    if column[slot] != NULL_BLOCK:
                        self.arrays[n][column[slot]] = held(number, slot, n, self.arrays[n])

    def units(self, unit_bytes: int) -> np.ndarray:
        return np.concatenate([a.reshape(-1, unit_bytes) for a in self.arrays])


def held(column: int, slot: int, segment: int, array: np.ndarray) -> np.ndarray:
    return np.arange(array.shape[1]) + 1000 * (segment + 100 * (slot + 100 * column))


@st.composite
def handoffs(draw: Any) -> tuple[Layout, list[list[int]], list[list[int]], int]:
    """A layout, both sides' columns with nulls in the same places, and the first to be read."""
    sizes = draw(st.lists(st.sampled_from([16, 24, 64, 96]), min_size=1, max_size=4))
    groups = [
        Group(
            "mamba" if draw(st.booleans()) else "full_attention", 0,
            draw(st.sampled_from([4, 8, 16])),
            draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=3, unique=True)),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]  # fmt: skip
    layout = layout_of(groups, sizes)
    count = draw(st.integers(1, 3))
    places = count * len(layout.slots)
    nulls = draw(st.lists(st.booleans(), min_size=places, max_size=places))
    sides = []
    for _ in range(2):
        ids = iter(draw(st.permutations(range(1, BLOCKS))))
        flat = [NULL_BLOCK if null else next(ids) for null in nulls]
        width = len(layout.slots)
        sides.append([flat[i : i + width] for i in range(0, places, width)])
    return layout, sides[0], sides[1], draw(st.integers(0, count - 1))


@given(handoffs())
def test_every_layer_of_every_group_lands_where_it_belongs(handoff: Any) -> None:
    layout, ours, theirs, begin = handoff
    sender, receiver = Cache(layout, -2), Cache(layout, -1)
    sender.write(theirs)
    (route,) = routes(layout, layout, 0)
    bound = route.bound(BLOCKS, BLOCKS)
    here, there = bound.units(range(begin, len(ours)), ours, theirs)
    local = receiver.units(bound.unit_bytes)
    local[here] = sender.units(bound.unit_bytes)[there]
    at = 0
    for n, array in enumerate(receiver.arrays):
        units = array.size // bound.unit_bytes
        receiver.arrays[n] = local[at : at + units].reshape(array.shape)
        at += units
    written = set()
    for number in range(begin, len(ours)):
        for slot, segments in enumerate(layout.slots):
            for n in segments:
                block = ours[number][slot]
                if block != NULL_BLOCK:
                    written.add((n, block))
                    expected = held(number, slot, n, receiver.arrays[n])
                    assert (receiver.arrays[n][block] == expected).all()
    for n, array in enumerate(receiver.arrays):
        for block in range(BLOCKS):
            assert (n, block) in written or (array[block] == -1).all(), "nothing else is touched"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": [FULL, STATE]}, ["groups differ", "1 x mamba", "2 x sliding_window"]),
        (
            {"groups": [FULL, msgspec.structs.replace(SLIDING, window=32), STATE]},
            ["window 16", "window 32"],
        ),
        ({"segments": [64, 64, 32]}, ["[32, 64, 96] bytes", "[32, 64]"]),
        ({"ranks": 2}, ["unlike layers", "1 ranks", "2"]),
        (
            {"groups": [FULL, msgspec.structs.replace(SLIDING, block_tokens=32), STATE]},
            ["unlike layers", "blocks of 16", "blocks of 32"],
        ),
    ],
)
def test_unlike_groups_are_refused_naming_both_sides(change: Any, words: list[str]) -> None:
    reason = refusal(HYBRID, msgspec.structs.replace(HYBRID, **change))
    assert reason is not None
    assert all(word in reason for word in words), reason


NUMBERS = st.one_of(st.integers(-3, 20), st.integers(-(2**40), 2**40))


@given(
    st.lists(
        st.builds(
            Group, st.sampled_from(["mamba", "full_attention", "?"]), NUMBERS, NUMBERS,
            st.lists(NUMBERS, max_size=4),
        ),
        max_size=4,
    ),
    st.lists(NUMBERS, max_size=4),
    NUMBERS, NUMBERS, NUMBERS,
)  # fmt: skip
def test_a_peer_s_layout_is_refused_or_fits_whatever_its_numbers(
    groups: list[Group], segments: list[int], heads: int, ranks: int, head_bytes: int
) -> None:
    theirs = Layout("c", "u8", heads, head_bytes, ranks, by_head=True, by_token=True,
                    groups=groups, segments=segments)  # fmt: skip
    for pair in ((theirs, HYBRID), (HYBRID, theirs), (theirs, theirs)):
        if refusal(*pair) is None and ranks < 100:
            routes(*pair, 0)


# ------------------------------------------------------------ the pull


def reach_of(layout: Layout) -> Reach:
    opened = Opened(1, "e", layout, 10.0, "off", [])
    return Reach(opened, stride_tokens=layout.column_tokens, same_columns=True)


def order_of(columns: list[list[int]], tokens: int, cached: int = 0) -> Order:
    return Order("r", "h", "e", "", list(range(tokens)), None, None, "m", "t", cached, columns)


WINDOWED = layout_of([SLIDING], [64, 96])
OURS = [[NULL_BLOCK], [NULL_BLOCK], [5], [6]]


def test_reading_begins_where_the_first_window_does() -> None:
    reach = reach_of(WINDOWED)
    assert reach.wanted(order_of(OURS, 60)).begin == 2
    assert reach.wanted(order_of([[5], [6], [7], [8]], 60, cached=16)).begin == 1


def pulled(theirs: list[list[int]], ours: list[list[int]] = OURS) -> Pull:
    order = order_of(ours, 60)
    pull = Pull(Timeouts(), asked_at=0.0)
    pull.opened(reach_of(WINDOWED).wanted(order), 0.0)
    pull.held(0.0, 0.0)
    links = chain(order.token_ids, 16, salt=None, lora=None)
    pull.blocks(Blocks("h", 0, 0, theirs, links, []), 1.0)
    return pull


def test_blocks_before_the_window_are_neither_needed_nor_read() -> None:
    pull = pulled([[NULL_BLOCK], [9], [7], [8]])
    assert pull.error is None, "what stands before our window is the sender's own business"
    assert pull.next_read(9, 1.0) == (1, range(2, 4))


@pytest.mark.parametrize("theirs", [[[1], [2], [NULL_BLOCK], [8]], [[1], [2], [7], []]])
def test_a_needed_block_that_the_sender_has_not_ends_the_pull(theirs: list[list[int]]) -> None:
    pull = pulled(theirs)
    assert pull.next_read(9, 1.0) is None
    assert pull.error is not None
    assert "column" in pull.error


def test_a_block_that_only_the_sender_keeps_ends_the_pull() -> None:
    pull = pulled([[1], [2], [7], [8]], [[NULL_BLOCK], [NULL_BLOCK], [NULL_BLOCK], [6]])
    assert pull.error is None, "it stands before our window"
    hybrid = reach_of(HYBRID)
    ours, theirs = [[1, 2, 3, 0]], [[1, 2, 3, 4]]
    order = order_of(ours, 16)
    pull = Pull(Timeouts(), asked_at=0.0)
    pull.opened(hybrid.wanted(order), 0.0)
    links = chain(order.token_ids, 16, salt=None, lora=None)
    pull.blocks(Blocks("h", 0, 0, theirs, links, []), 1.0)
    assert pull.error == (
        "column 0 keeps other blocks: sender has [1, 2, 3, 4], receiver needs [0, 1, 2] of 4"
    )
