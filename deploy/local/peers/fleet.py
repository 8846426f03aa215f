"""What every side simulates, and the flags that say so to each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TOKEN_BYTES: Final = 23_040
PULL_GB_PER_S: Final = 5.0
"""Both as in workers/engines/sim_settings.py."""
_FASTEST: Final = "1000000"
"""Of Dynamo's mocker, whose 0 (no delays at all, by its help) takes 6 ms a token in 1.6.1."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """So many engines of each role, all alike."""

    prefill: int = 2
    decode: int = 2
    step_ms: float = 10.0
    prefill_tokens_per_s: float = 4000.0
    stream_us: float = 100.0
    blocks: int = 4096
    block_tokens: int = 16
    chunk_tokens: int = 2048
    running_max: int = 256
    max_model_len: int = 8192
    instant: bool = False
    """Nothing takes time: to measure what surrounds the engines."""

    def vllm_flags(self) -> list[str]:
        """Which fronts and routers that speak vLLM must have as the engines do."""
        return ["--max-model-len", str(self.max_model_len)]

    def sim_flags(self) -> list[str]:
        """Of `tandem worker --engine sim`, and of the simulated front."""
        return [
            "--sim-step-ms", f"{self.step_ms:g}",
            "--sim-prefill-tokens-per-s", f"{self.prefill_tokens_per_s:g}",
            "--sim-stream-us", f"{self.stream_us:g}",
            "--sim-blocks", str(self.blocks),
            "--block-size", str(self.block_tokens),
            "--max-num-batched-tokens", str(self.chunk_tokens),
            "--max-num-seqs", str(self.running_max),
            *self.vllm_flags(),
            *(["--sim-instant"] if self.instant else []),
        ]  # fmt: skip

    def mocker_flags(self, profile: str) -> list[str]:
        """Of Dynamo's mocker. `profile`: a file with `mocker_profile`."""
        return [
            "--num-gpu-blocks-override", str(self.blocks),
            "--block-size", str(self.block_tokens),
            "--max-num-batched-tokens", str(self.chunk_tokens),
            "--max-num-seqs", str(self.running_max),
            *self.vllm_flags(),
            "--kv-bytes-per-token", str(TOKEN_BYTES),
            *(
                ["--speedup-ratio", _FASTEST, "--kv-transfer-bandwidth", "0"]
                if self.instant
                else ["--planner-profile-data", profile,
                      "--kv-transfer-bandwidth", f"{PULL_GB_PER_S:g}"]
            ),
        ]  # fmt: skip

    def mocker_profile(self, points: int = 100) -> dict[str, Any]:
        """The engine's step time as the tables that Dynamo's mocker reads, in milliseconds.

        Its decode table is by KV tokens of all sequences and by their mean context, whose quotient
        is the number of sequences.
        """
        tokens = np.linspace(0, self.max_model_len, points)
        context = np.linspace(1, self.max_model_len, points)
        active = np.linspace(0, self.blocks * self.block_tokens, points)
        sequences = np.clip(active[:, None] / context[None, :], 1, self.running_max)
        return {
            "prefill_isl": tokens,
            "prefill_ttft_ms": self.step_ms + tokens / self.prefill_tokens_per_s * 1e3,
            "decode_active_kv_tokens": active,
            "decode_context_length": context,
            "decode_itl": self.step_ms + sequences * self.stream_us / 1e3,
        }


def shown(command: Sequence[str], names: Mapping[str, str]) -> str:
    """A command for people: what is of this machine under a name instead, as `names` say."""
    words = []
    for word in command:
        for what, name in names.items():
            word = word.replace(what, name)  # noqa: PLW2901
        words.append(word)
    return " ".join(words)
