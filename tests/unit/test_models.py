"""Models: named, converted and told apart."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.local import models
from deploy.local.gguf_to_hf import UnsupportedGguf, hf_name, model_config, unpermute
from workers.digests import model_digest, tokenizer_digest
from workers.models import ModelMissing, is_prepared, prepared_folder, resolve_model

if TYPE_CHECKING:
    from pathlib import Path

FIELDS: dict[str, Any] = {
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.rope.freq_base": 100_000.0,
    "llama.vocab_size": 49_152,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
}


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k, in its own words."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


@given(heads=st.integers(1, 6), pairs=st.integers(1, 8), hidden=st.integers(1, 5))
def test_unpermute_undoes_llama_cpps_order(heads: int, pairs: int, hidden: int) -> None:
    rows = heads * pairs * 2
    weight = np.arange(rows * hidden, dtype=np.float32).reshape(rows, hidden)
    assert np.array_equal(unpermute(permute(weight, heads), heads), weight)


def test_unpermute_is_not_the_identity() -> None:
    weight = np.arange(8, dtype=np.float32).reshape(8, 1)
    assert unpermute(weight, 1).ravel().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize(
    ("gguf", "hugging_face"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
        ("blk.7.ffn_norm.weight", "model.layers.7.post_attention_layernorm.weight"),
    ],
)
def test_a_tensor_has_its_hugging_face_name(gguf: str, hugging_face: str) -> None:
    assert hf_name(gguf) == hugging_face


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "rope_freqs.weight", ""])
def test_an_unknown_tensor_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedGguf, match=repr(name)):
        hf_name(name)


def test_config_keeps_the_models_shape() -> None:
    config = model_config(FIELDS, tied=True)
    assert (config["head_dim"], config["num_key_value_heads"]) == (64, 3)
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True


def save(folder: Path, *, weights: bytes = bytes(range(256)) * 64, **config: Any) -> Path:
    """A model folder with one safetensors file, its header as the format wants it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    shape = {"w": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}
    header = json.dumps(shape).encode()
    content = len(header).to_bytes(8, "little") + header + weights
    (folder / "model.safetensors").write_bytes(content)
    return folder


def test_the_same_model_in_two_folders_has_one_digest(tmp_path: Path) -> None:
    one = save(tmp_path / "one", transformers_version="5.0", _name_or_path="x")
    two = save(tmp_path / "two", transformers_version="5.1", _name_or_path="y")
    assert model_digest(one) == model_digest(two)
    assert tokenizer_digest(one) == tokenizer_digest(two)


def test_another_configuration_is_another_model(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one"), save(tmp_path / "two", hidden_size=16)
    assert model_digest(one) != model_digest(two)


@pytest.mark.parametrize("at", [0, 1, 8_000, 16_383])
def test_a_changed_weight_is_another_model(tmp_path: Path, at: int) -> None:
    weights = bytearray(bytes(range(256)) * 64)
    weights[at] ^= 1
    one, two = save(tmp_path / "one"), save(tmp_path / "two", weights=bytes(weights))
    assert model_digest(one) != model_digest(two)


def test_a_shorter_weight_file_is_another_model(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one"), save(tmp_path / "two")
    file = two / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert model_digest(one) != model_digest(two)


def test_a_file_cut_off_in_its_header_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "one") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ModelMissing, match=r"truncated"):
        model_digest(tmp_path / "one")


def test_a_tokenizer_differs_by_its_vocabulary_not_by_its_chat_template(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one"), save(tmp_path / "two")
    (one / "tokenizer_config.json").write_text('{"chat_template": "a", "eos_token": "</s>"}')
    (two / "tokenizer_config.json").write_text('{"chat_template": "b", "eos_token": "</s>"}')
    assert tokenizer_digest(one) == tokenizer_digest(two)
    (two / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}}')
    assert tokenizer_digest(one) != tokenizer_digest(two)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    folder = save(tmp_path / "one")
    (folder / missing).unlink()
    digest = tokenizer_digest if missing.startswith("tokenizer") else model_digest
    kind = {"config.json": "config.json", "model.safetensors": "weights"}.get(missing, "tokenizer")
    with pytest.raises(ModelMissing, match=kind):
        digest(folder)


def test_a_local_folder_is_itself_and_a_hub_name_passes(tmp_path: Path) -> None:
    folder = save(tmp_path / "one")
    assert resolve_model(str(folder)) == str(folder.resolve())
    assert resolve_model("some-org/some-model") == "some-org/some-model"


@pytest.mark.parametrize("name", ["./gone", "/no/such/folder", "~/no-such-model", ""])
def test_a_path_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ModelMissing, match=r"does not exist|is empty"):
        resolve_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match=r"config\.json"):
        resolve_model(str(tmp_path))


def test_an_unprepared_model_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelMissing, match="tandem models prepare smollm2-135m"):
        resolve_model("smollm2-135m")


def test_a_failed_conversion_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_gguf: Path, folder: Path, _progress: object) -> None:
        (folder / "config.json").write_text("{}")
        raise UnsupportedGguf("tensor 'strange'")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "convert", fail)
    assert models.main(["prepare", "smollm2-135m"]) == 1
    assert "tensor 'strange'" in capsys.readouterr().err
    assert not is_prepared("smollm2-135m")
    assert list(prepared_folder("smollm2-135m").parent.iterdir()) == []
