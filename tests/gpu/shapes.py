"""Models by their shape alone: a configuration, SmolLM2's tokenizer, and weights made on the spot.

vLLM's own dummy weights are so small that no token depends on what stands in the KV cache: with
them a wrong cache would show nothing. So where answers are compared the weights are random, and
large enough that attention matters.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 49_152
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
             "merges.txt", "chat_template.jinja")  # fmt: skip
BUNDLED = "tandem_tokenizer"
"""The tokenizer's folder in a bundle."""
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY,
    "max_position_embeddings": 32_768, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    config: dict[str, Any]
    tiny: dict[str, Any]
    """The shape that a dry run has in its place."""

    def write(self, folder: Path, *, dry: bool) -> Path:
        """A model's folder, without weights."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config | (self.tiny if dry else {})
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        source = tokenizer_folder()
        for name in TOKENIZER:
            if (source / name).exists():
                shutil.copy(source / name, folder / name)
        return folder


def write_weights(folder: Path, device: str) -> None:
    """Random weights for the configuration in this folder; seconds for 2 GiB.

    Scaled so that attention scores have a deviation of about 3: with hidden size `h`, weights of
    deviation `s` and normed inputs it is `h s^2`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.initializer_range = (3.0 / config.hidden_size) ** 0.5
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to("cpu").save_pretrained(folder, max_shard_size="1GB")
    del model
    if device != "cpu":
        torch.cuda.empty_cache()  # The engines are other processes.


def _llama(layers: int, hidden: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        **_LLAMA, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": hidden // heads, "intermediate_size": inner, **more,
    }  # fmt: skip


_TINY = {
    "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 256, "max_position_embeddings": 2048,
}  # fmt: skip

SHAPES = {
    "llama-1b": Shape(_llama(16, 2048, 32, 8192), _TINY),
    "llama-8b": Shape(_llama(32, 4096, 32, 14_336), _TINY),
    "window": Shape(
        _llama(16, 2048, 32, 8192, model_type="mistral", architectures=["MistralForCausalLM"],
               sliding_window=1024),
        {**_TINY, "sliding_window": 64},
    ),
    "mla": Shape(
        _llama(
            12, 2048, 16, 8192, model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"],
            num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128, head_dim=64, n_routed_experts=8,
            n_shared_experts=1, first_k_dense_replace=12, moe_layer_freq=1,
            moe_intermediate_size=1024, num_experts_per_tok=2, attention_bias=False,
        ),
        {
            "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4,
            "num_key_value_heads": 4, "intermediate_size": 256, "kv_lora_rank": 512,
            "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32, "head_dim": 64,
            "first_k_dense_replace": 2, "max_position_embeddings": 2048,
        },
    ),
}  # fmt: skip


def tokenizer_folder() -> Path:
    """Where SmolLM2's tokenizer is: unpacked from a bundle, or as a prepared model."""
    for folder in map(Path, sys.path):
        if (folder / BUNDLED / TOKENIZER[0]).is_file():
            return folder / BUNDLED
    from workers.models import resolve_model

    return Path(resolve_model("smollm2-135m"))
