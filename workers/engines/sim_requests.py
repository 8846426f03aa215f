"""One request as the simulated engine holds it."""

from __future__ import annotations

import sys
import zlib
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from workers.api import Phase, marks, within
from workers.engines.base import Stored

if TYPE_CHECKING:
    from workers.api import Generate
    from workers.engines.sim_handoff import Pull
    from workers.engines.sim_settings import SimSettings

_TOP_BYTE = slice(3, None, 4) if sys.byteorder == "little" else slice(0, None, 4)


@dataclass(slots=True)
class Run:
    """`length` counts known tokens (prompt and output), `computed` those with KV."""

    generate: Generate
    arrived: int
    output_max: int
    checksum: int
    hashes: list[int]
    """Of the prompt's full blocks."""
    length: int
    computed: int = 0
    outputs: int = 0
    shared: list[int] = field(default_factory=list)
    fresh: int = 0
    cached: int | None = None
    """Prompt tokens found in the cache at the first admission."""
    handle: str | None = None
    """The router's, under which this prompt will be kept."""
    told: bool = False
    """That its last step is near."""
    pull: Pull | None = None
    pulled: tuple[int, int, float] = (0, 0, 0.0)
    """Tokens, bytes, seconds."""
    pull_error: str | None = None

    @property
    def computes(self) -> bool:
        """The prompt, here: none of it awaits another's, and no token is out."""
        return not self.outputs and self.pull is None

    @property
    def next_generates(self) -> bool:
        """What its next step computes is one token that it generated, and brings another."""
        return self.outputs > 0 and self.length - self.computed == 1

    @property
    def order(self) -> tuple[int, int]:
        return self.generate.priority, self.arrived


def run_of(generate: Generate, arrived: int, settings: SimSettings) -> Run | str:
    """What is wrong with it instead."""
    prompt = generate.prompt_token_ids
    try:
        content = array("I", prompt).tobytes()
    except OverflowError:
        content = b"\xff" * 4
    if reason := _wrong(generate, content, settings):
        return reason
    salt = zlib.crc32(f"{generate.cache_salt}\0{generate.lora_name}".encode())
    hashes, link, size = [], salt, settings.block_tokens * 4
    ends = range(size, len(content) + 1, size)
    for end, mark in zip(ends, marks(generate.items, settings.block_tokens), strict=False):
        link = xxh3_64_intdigest(content[end - size : end] + mark, link)
        hashes.append(link)
    most = generate.max_tokens
    if generate.params.isdigit():  # Where it stops by itself; what a front sends is vLLM's.
        most = min(most, max(1, int(generate.params) - generate.generated))
    return Run(
        generate,
        arrived,
        output_max=min(most, settings.max_model_len - len(prompt)),
        checksum=zlib.crc32(content + next(marks(generate.items, max(1, len(prompt))))),
        hashes=hashes,
        length=len(prompt),
    )


def stored(run: Run, first: int, block_tokens: int) -> Stored:
    """The prompt's shared blocks from `first` on, as a change of the prefix cache."""
    asked, start, end = run.generate, first * block_tokens, len(run.shared) * block_tokens
    return Stored(
        list(run.shared[first:]),
        run.shared[first - 1] if first else None,
        asked.prompt_token_ids[start:end],
        asked.cache_salt,
        asked.lora_name,
        within(asked.items, start, end),
    )


def _wrong(generate: Generate, content: bytes, settings: SimSettings) -> str | None:
    s, prompt = settings, generate.prompt_token_ids
    if not prompt:
        return "the prompt is empty"
    if len(prompt) >= s.max_model_len:
        return f"the prompt has {len(prompt)} tokens, the model at most {s.max_model_len}"
    if not content[_TOP_BYTE].isascii():  # Some id is not below 2^31.
        return "a token id is outside the model's vocabulary"
    if generate.max_tokens < 1:
        return "max_tokens is below 1"
    if generate.lora_name is not None:
        return "LoRA adapters are not served yet"
    outputs = 0 if generate.phase is Phase.PREFILL else generate.max_tokens
    tokens = min(len(prompt) + outputs, s.max_model_len)
    if (needed := -(-tokens // s.block_tokens)) > s.blocks_total:
        return f"it may need {needed} KV blocks, the engine has {s.blocks_total}"
    return None
