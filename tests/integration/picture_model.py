"""A Qwen2-VL of random weights, made on the spot: small, and it looks at pictures."""

from __future__ import annotations

import base64
import io
import json
import shutil
from typing import TYPE_CHECKING, Any

from deploy.local.models import prepare

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER_OF = "smollm2-135m"
SPECIAL = {
    12: "<|image_pad|>", 14: "<|vision_start|>", 15: "<|vision_end|>", 16: "<|video_pad|>",
}  # fmt: skip
"""Qwen2-VL's tokens, at ids that the borrowed tokenizer has for special tokens of its own."""
PLACEHOLDER = 12
PATCH = 14
"""Pixels. Two by two patches become one token."""

_TEXT = {
    "vocab_size": 49_152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    # Large, so that attention matters: with the defaults a wrong cache changes no token.
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
}  # fmt: skip
_VISION = {
    "depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": PATCH,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "mlp_ratio": 2,
}  # fmt: skip
_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "rescale_factor": 1 / 255, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2,
    "min_pixels": 3136, "max_pixels": 200_704, "resample": 3,
}  # fmt: skip
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(folder: Path) -> None:
    """Weights, tokenizer, chat template and image processor, as Hugging Face lays them out."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={**_TEXT, "model_type": "qwen2_vl_text"}, vision_config=dict(_VISION),
        image_token_id=12, video_token_id=16, vision_start_token_id=14, vision_end_token_id=15,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).to(torch.float32).eval()
    for name, weight in model.named_parameters():
        if "visual" in name and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(_IMAGES))
    _tokenizer(prepare(TOKENIZER_OF), folder)


def _tokenizer(source: Path, folder: Path) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for added in tokenizer["added_tokens"]:
        if added["id"] in SPECIAL:
            vocabulary.pop(added["content"], None)
            added["content"] = SPECIAL[added["id"]]
            vocabulary[added["content"]] = added["id"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(source / "tokenizer_config.json", folder)
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        settings.pop(name, None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _TEMPLATE}
    path.write_text(json.dumps(settings))


def picture(seed: int, width: int = 84, height: int = 84) -> str:
    """A data URL of a PNG: one random colour for each patch, so that no two seeds look alike."""
    import numpy as np
    from PIL import Image

    shape = (height // PATCH, width // PATCH, 3)
    colours = np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(colours.repeat(PATCH, 0).repeat(PATCH, 1)).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
