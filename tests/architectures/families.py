"""The table of model families: what each row starts, and what is expected of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.architectures.models import LAYERS, WINDOW
from tests.architectures.prompts import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Equal:
    """Served, and every answer is one aggregated engine's."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A worker does not start; the last line that it writes says why."""

    line: str
    """A regular expression."""
    summary: str
    """For people."""


@dataclass(frozen=True, slots=True)
class NotHere:
    """Plain vLLM does not serve it on such a processor: there is nothing to compare with."""

    reason: str
    error: str
    """A regular expression: what plain vLLM's own log says."""
    runs_with: str | None = None
    """A processor's flag with which it does run; None where no processor is enough."""

    @property
    def runs(self) -> bool:
        """Whether this machine's processor is one that can."""
        if self.runs_with is None:
            return False
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return flags is not None and self.runs_with in flags[1].split()


Expected = Equal | Refused | NotHere
Options = dict[str, Any]
"""Fields of a `Family`."""


@dataclass(frozen=True, slots=True)
class Family:
    """One row. Flags are vLLM's own, in addition to those of every engine here."""

    name: str
    model: str
    """One of `MODELS`."""
    kv: str
    """What its KV cache is made of, in words."""
    expected: Expected = field(default_factory=Equal)
    given: str = ""
    """What is special about it, for people: in Markdown."""
    flags: tuple[str, ...] = ()
    prefill_flags: tuple[str, ...] = ()
    decode_flags: tuple[str, ...] = ()
    block: int | None = BLOCK
    """Tokens a block; None where vLLM must choose."""
    reference: dict[str, Any] = field(default_factory=dict)
    """Engine arguments of the reference, beside those of every reference."""
    change: str | None = None
    """One of the zygote's `CHANGES`, made in every engine of the group."""
    bytes_max: Callable[[int], int] | None = None
    """Bytes that a handoff of a prompt of so many tokens may move; None where nothing is saved."""
    caches: bool = True
    """Whether its engines keep a prefix cache."""
    batch_tolerance: float = 1e-3
    """How far logprobs may be from the reference's where prompts are computed together."""
    needs: str | None = None
    """A module that vLLM needs for it, which not every environment has."""
    images: bool = False
    """Whether `test_images` asks it with images."""
    seen: bool = False
    """Whether what is expected has been seen to come true; the table in docs/models.md says so."""
    short: bool = False
    """Whether it is in `make test` too."""


HEAD_BYTES = 2 * 2 * 32 * 4
"""Of one layer of the tiny models for one token: K and V of two heads of 32 floats."""


def sliding(layers_full: int, layers_sliding: int) -> Callable[[int], int]:
    """The most that a model with `layers_sliding` layers of `WINDOW` needs for its next token."""

    def bytes_max(tokens: int) -> int:
        blocks = -(-tokens // BLOCK)
        # A window begins inside a block, and the block that is being filled comes on top.
        inside = min(blocks, WINDOW // BLOCK + 1)
        return (blocks * layers_full + inside * layers_sliding) * BLOCK * HEAD_BYTES

    return bytes_max


NO_HYBRID: Options = {
    "flags": ("--disable-hybrid-kv-cache-manager",),
    "given": "`--disable-hybrid-kv-cache-manager`",
}
NGRAM = (
    "--speculative-config",
    '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}',
)

ENCODES = Refused("Whisper|encoder", "an encoder beside its decoder")
POOLS = Refused("pool|generat", "it generates nothing")

FAMILIES: tuple[Family, ...] = (
    Family("llama", "llama", "full attention", short=True),
    Family("qwen2", "qwen2", "full attention"),
    Family("qwen3", "qwen3", "full attention"),
    Family("qwen3-moe", "qwen3-moe", "full attention"),
    Family("mixtral", "mixtral", "full attention"),
    Family("phi3", "phi3", "full attention"),
    Family("gpt2", "gpt2", "full attention"),
    Family("opt", "opt", "full attention"),
    Family(
        "mistral", "mistral", "sliding window, one group",
        bytes_max=sliding(0, LAYERS), short=True,
    ),
    Family(
        "gemma3-sliding", "gemma3-sliding", "sliding window, one group",
        bytes_max=sliding(0, LAYERS),
    ),
    Family("gemma2", "gemma2", "sliding and full groups", bytes_max=sliding(2, 2)),
    Family(
        "gemma3", "gemma3", "sliding and full groups", bytes_max=sliding(2, 4), short=True
    ),
    Family("gpt-oss", "gpt-oss", "sliding and full groups, sinks", bytes_max=sliding(2, 2)),
    Family("llama4", "llama4", "chunked local and full groups"),
    Family(
        "gemma4", "gemma4", "sliding and full groups, unlike head sizes", short=True
    ),
    Family("gemma2 no hybrid", "gemma2", "full attention for all layers", **NO_HYBRID),
    Family("gemma3 no hybrid", "gemma3", "full attention for all layers", **NO_HYBRID),
    Family("gpt-oss no hybrid", "gpt-oss", "full attention for all layers", **NO_HYBRID),
    Family("llama4 no hybrid", "llama4", "full attention for all layers", **NO_HYBRID),
    Family("gemma4 no hybrid", "gemma4", "full attention, unlike head sizes", **NO_HYBRID),
    Family("deepseek-v2", "deepseek-v2", "latent (MLA)"),
    Family(
        "deepseek-v3.2", "deepseek-v3.2", "latent (MLA), sparse",
        NotHere("vLLM has no sparse attention there", "Sparse Attention is not supported on CPU"),
        seen=True,
    ),
    Family("mamba2", "mamba2", "Mamba states", block=None, caches=False),
    Family("granite4", "granite4", "Mamba states and full attention", block=None, caches=False),
    Family(
        "jamba", "jamba", "Mamba-1 states and full attention",
        NotHere("vLLM's CPU build has no scan of Mamba-1", "no attribute 'selective_scan_fwd'"),
        block=None, seen=True,
    ),
    Family(
        "llama, larger blocks", "llama", "full attention", given="blocks larger than the kernels'",
        block=128, change="kernel blocks of 32",
    ),
    Family("llama, ngram", "llama", "full attention", flags=NGRAM, given="ngram speculation"),
    Family(
        "llama, ngram decode", "llama", "full attention", decode_flags=NGRAM,
        given="ngram speculation, decode workers alone",
    ),
    Family(
        "llama, fp8 KV", "llama", "full attention", given="`--kv-cache-dtype fp8`",
        flags=("--kv-cache-dtype", "fp8"),
        reference={"kv_cache_dtype": "fp8"},
        expected=NotHere(
            "it needs AVX-512 or AMX", "FP8 KV cache on CPU requires x86", runs_with="avx512f"
        ),
        seen=True,
    ),
    Family(
        "qwen2-vl", "qwen2-vl", "full attention", needs="torchvision", images=True
    ),
    Family("whisper", "whisper", "cross attention", ENCODES),
    Family("bert", "bert", "none", POOLS),
    Family(
        "llama, pooling", "llama", "full attention", POOLS, flags=("--runner", "pooling"),
        given="`--runner pooling`", short=True,
    ),
)  # fmt: skip


def expecting(kind: type[Expected]) -> list[Family]:
    """Rows of which that is expected."""
    return [f for f in FAMILIES if isinstance(f.expected, kind)]
