"""Images and their like are part of a prompt's identity, block by block."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvtransfer.core.items import Item, joined, marks, within
from kvtransfer.core.manifest import Expectation, chain, mismatch, other_column
from kvtransfer.protocol import LINK_BYTES, Manifest
from router.core.blocks import links
from router.core.cache_view import CacheView
from router.core.prefix_index import PrefixIndex
from workers.api import Generate, KvStored, Phase
from workers.cache_mirror import CacheMirror
from workers.engines.base import Removed, Stored
from workers.engines.sim_requests import Run, run_of, stored
from workers.engines.sim_settings import SimSettings

SIZE = 4
LENGTHS = {"a": 1, "b": 3, "c": 9}
"""By content: the same image is as long wherever it stands."""
PLACEHOLDER = 9

Prompt = tuple[list[int], list[Item], str | None, str | None]


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Text and items in turn, so small that two of them often begin alike."""
    tokens: list[int] = []
    items = []
    for part in draw(st.lists(st.sampled_from([*LENGTHS, 0, 1]), min_size=1, max_size=12)):
        if isinstance(part, str):
            items.append(Item(part, len(tokens), LENGTHS[part]))
            tokens += [PLACEHOLDER] * LENGTHS[part]
        else:
            tokens.append(part)
    salt, lora = draw(st.sampled_from([(None, None)] * 4 + [("s", None), (None, "s")]))
    return tokens, draw(st.permutations(items)), salt, lora


def seen(prompt: Prompt, end: int) -> object:
    """The prompt up to a token as the model sees it: places with a token, or a part of an item."""
    tokens, items, salt, lora = prompt
    places: list[object] = list(tokens)
    for item in items:
        for at in range(item.length):
            places[item.offset + at] = (item.identifier, at)
    return places[:end], salt, lora


def manifest_links(prompt: Prompt) -> list[bytes]:
    tokens, items, salt, lora = prompt
    whole = chain(tokens, SIZE, salt=salt, lora=lora, items=items)
    return [whole[at : at + LINK_BYTES] for at in range(0, len(whole), LINK_BYTES)]


# An item where the other prompt has its placeholders, another item, or the same one elsewhere.
@example(([9] * 5, [Item("a", 0, 1)], None, None), ([9] * 5, [], None, None))
@example(([9] * 5, [Item("a", 0, 1)], None, None), ([9] * 5, [Item("a", 1, 1)], None, None))
@example(([9] * 9, [Item("c", 0, 9)], None, None), ([9] * 9, [Item("c", 0, 9)], "s", None))
@given(prompts(), prompts())
def test_links_are_equal_exactly_where_all_that_is_seen_so_far_is(one: Prompt, two: Prompt) -> None:
    ends = range(SIZE, min(len(one[0]), len(two[0])) + 1, SIZE)
    same = [seen(one, end) == seen(two, end) for end in ends]
    told = [manifest_links(each) for each in (one, two)]
    assert [a == b for a, b in zip(*told, strict=False)][: len(same)] == same
    index = [
        list(links(tokens, SIZE, salt, lora, items)) for tokens, items, salt, lora in (one, two)
    ]
    found = [a == b for a, b in zip(*index, strict=False)]
    assert found == same[: len(found)]


@given(prompts(), prompts())
def test_equal_tails_mean_equal_prompts_and_items(one: Prompt, two: Prompt) -> None:
    """The last block too, which is seldom full."""
    alike = seen(one, len(one[0])) == seen(two, len(two[0]))
    assert (manifest_links(one)[-1] == manifest_links(two)[-1]) == alike


@pytest.mark.parametrize("size", [1, 4, 16])
def test_text_before_its_first_item_has_the_links_of_text_alone(size: int) -> None:
    tokens, items = [7] * 56, [Item("a", 32, 4)]
    before = 32 // size
    assert list(links(tokens, size, items=items))[:before] == list(links(tokens, size))[:before]
    assert list(links(tokens, size, items=items))[before:] != list(links(tokens, size))[before:]
    whole = [chain(tokens, size, salt=None, lora=None, items=i) for i in (items, ())]
    assert whole[0][: before * LINK_BYTES] == whole[1][: before * LINK_BYTES]
    assert whole[0][-LINK_BYTES:] != whole[1][-LINK_BYTES:]


def test_a_receiver_with_another_image_refuses_the_kv() -> None:
    tokens = [9] * 20
    cat, dog = ((Item(name, 2, 9),) for name in ("cat", "dog"))
    theirs = chain(tokens, 16, salt=None, lora=None, items=cat)
    wanted = Expectation(20, chain(tokens, 16, salt=None, lora=None, items=dog), "m", "t")
    manifest = Manifest(20, 2, theirs[-LINK_BYTES:], "m", "t", None)
    assert "prompt chain differs" in (mismatch(manifest, wanted) or "")
    assert "prompt chain differs at column 0" in (other_column(theirs, 0, wanted) or "")


# ------------------------------------------------------------ told by caches


def test_a_change_known_in_part_tells_the_rest_with_its_items() -> None:
    mirror, cat = CacheMirror(), Item("cat", 1, 9)
    mirror.apply([Stored(["1"], None, [9] * SIZE, items=within([cat], 0, SIZE))])
    mirror.apply([Stored(["1", "2", "3"], None, [9] * 3 * SIZE, items=(cat,))])
    (_, rest) = mirror.since(0) or ()
    assert rest == KvStored([1, 2], 0, [9] * 2 * SIZE, items=(Item("cat", 1 - SIZE, 9),))


def test_simulated_blocks_are_of_one_image() -> None:
    def run(*items: Item) -> Run:
        generate = Generate("r", Phase.BOTH, [9] * 64, 1, b"", items=items)
        made = run_of(generate, 0, SimSettings(block_tokens=16))
        assert isinstance(made, Run)
        return made

    cat, again, dog = run(Item("cat", 20, 9)), run(Item("cat", 20, 9)), run(Item("dog", 20, 9))
    assert (cat.hashes, cat.checksum) == (again.hashes, again.checksum)
    assert cat.checksum != dog.checksum, "or one would be pulled for the other"
    assert [a == b for a, b in zip(cat.hashes, dog.hashes, strict=True)] == [True, *[False] * 3]
    cat.shared = cat.hashes[:3]
    assert stored(cat, 1, 16).items == (Item("cat", 4, 9),)


@given(prompts(), st.integers(0, 9), st.integers(1, 9))
def test_blocks_of_a_prompt_show_its_items_wherever_they_are_cut(
    prompt: Prompt, first: int, blocks: int
) -> None:
    items = prompt[1]
    parts = [within(items, at * SIZE, (at + 1) * SIZE) for at in range(first, first + blocks)]
    whole = list(islice(marks(items, SIZE), first, first + blocks))
    assert list(islice(marks(joined(parts, SIZE), SIZE), blocks)) == whole
    rest = within(items, first * SIZE, (first + blocks) * SIZE)
    assert list(islice(marks(rest, SIZE), blocks)) == whole


def keys_of(prompt: Prompt) -> list[object]:
    """An engine's own: of each full block, all that it has seen."""
    return [repr(seen(prompt, end)) for end in range(SIZE, len(prompt[0]) + 1, SIZE)]


@given(st.lists(st.tuples(prompts(), st.integers(0, 20)), max_size=8), prompts(), st.booleans())
def test_the_index_finds_a_prompt_with_items_exactly_where_it_is(
    stored: list[tuple[Prompt, int]], asked: Prompt, at_once: bool
) -> None:
    """By changes as they come, or all of it in parts afterwards; some blocks evicted meanwhile."""
    mirror, index, cache = CacheMirror(), PrefixIndex(), dict[object, None]()
    view = CacheView("w", SIZE, index)
    if at_once:
        assert all(view.snapshot(part) for part in mirror.snapshot())
    for prompt, gone in stored:
        tokens, items, salt, lora = prompt
        keys = keys_of(prompt)
        first = next((at for at, key in enumerate(keys) if key not in cache), len(keys))
        if keys[first:]:
            start, end = first * SIZE, len(keys) * SIZE
            parent = keys[first - 1] if first else None
            news = within(items, start, end)
            change = Stored(list(keys[first:]), parent, tokens[start:end], salt, lora, news)
            cache |= dict.fromkeys(keys[first:])
            mirror.apply([change])
        if gone < len(cache):
            key = list(cache)[gone]
            del cache[key]
            mirror.apply([Removed([key])])
    if at_once:
        assert view.events(0, mirror.since(0) or [])
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("workers.cache_mirror.PART_TOKENS", 2 * SIZE)
            parts = list(mirror.snapshot())
        assert all(view.snapshot(part) for part in parts)
    for tokens, items, salt, lora in [asked, *(prompt for prompt, _ in stored)]:
        keys = keys_of((tokens[:-1], [], None, None))  # As many as can be reused.
        full = keys_of((tokens, items, salt, lora))[: len(keys)]
        has = next((at for at, key in enumerate(full) if key not in cache), len(full))
        assert index.cached(links(tokens, SIZE, salt, lora, items)).get("w", 0) == has
