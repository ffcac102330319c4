"""Two models have one fingerprint exactly when their KV is interchangeable."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from kv_agent.errors import UnsupportedModelError
from kv_agent.vllm_plugin import fingerprint
from kv_agent.vllm_plugin.fingerprint import fingerprint_details, fingerprint_of, hash_files

# -- files ------------------------------------------------------------------------------------------


def write(folder: Path, **contents: bytes) -> list[Path]:
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def test_equal_files_have_one_hash_wherever_they_are(tmp_path: Path) -> None:
    one = write(tmp_path / "one", a=b"first", b=b"second")
    other = write(tmp_path / "elsewhere" / "deep", a=b"first", b=b"second")
    assert hash_files(one) == hash_files(reversed(other))


@pytest.mark.parametrize(
    "contents",
    [
        {"a": b"First", "b": b"second"},
        {"a": b"first", "b": b"second."},
        {"a": b"firs", "b": b"tsecond"},
        {"a": b"second", "b": b"first"},
        {"a": b"first", "c": b"second"},
        {"a": b"first"},
        {"a": b"first", "b": b"second", "c": b""},
    ],
)
def test_another_content_name_or_size_has_another_hash(tmp_path: Path, contents: dict[str, bytes]) -> None:
    good = write(tmp_path / "good", a=b"first", b=b"second")
    assert hash_files(write(tmp_path / "other", **contents)) != hash_files(good)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of more than 64 bytes are sampled in 4 windows of 8 bytes."""
    monkeypatch.setattr(fingerprint, "WHOLE_FILE_BYTES", 64)
    monkeypatch.setattr(fingerprint, "WINDOW_BYTES", 8)
    monkeypatch.setattr(fingerprint, "NUM_WINDOWS", 4)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("size", [65, 100, 400])
def test_a_big_file_is_sampled_from_its_first_to_its_last_byte(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    whole = hash_files(write(tmp_path / "whole", a=data))
    seen = [
        hash_files(write(tmp_path / "changed", a=flipped(data, position))) != whole
        for position in range(size)
    ]
    assert sum(seen) == min(size, 4 * 8)
    assert seen[0]
    assert seen[-1]
    first_unseen_run = max(len(run) for run in "".join(".X"[s] for s in seen).split("X"))
    assert first_unseen_run <= (size - 4 * 8) // 3 + 1  # evenly spread
    assert hash_files(write(tmp_path / "longer", a=data + b"\0")) != whole


@pytest.mark.usefixtures("sampled")
def test_a_file_up_to_the_limit_is_read_whole(tmp_path: Path) -> None:
    data = bytes(64)
    whole = hash_files(write(tmp_path / "whole", a=data))
    for position in range(64):
        assert hash_files(write(tmp_path / "changed", a=flipped(data, position))) != whole


# -- models -----------------------------------------------------------------------------------------


def model_folder(folder: Path) -> Path:
    write(
        folder,
        **{
            "model.safetensors": b"weights",
            "tokenizer.json": b"{}",
            "tokenizer_config.json": b"{}",
            "README.md": b"hello",
        },
    )
    return folder


def vllm_config(folder: Path) -> Any:
    hf_config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder),
            revision=None,
            tokenizer=str(folder),
            tokenizer_revision=None,
            hf_config=hf_config,
            hf_text_config=hf_config,
            dtype="torch.bfloat16",
            quantization=None,
            get_num_layers=lambda parallel: 4,
            get_total_num_kv_heads=lambda: 2,
            get_head_size=lambda: 16,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(),
    )


def fingerprint_from(config: Any) -> str:
    return fingerprint_of(fingerprint_details(config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


def test_the_model_s_folder_does_not_matter(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a copy of it"
    shutil.copytree(folder, copy)
    assert fingerprint_from(vllm_config(copy)) == fingerprint_from(vllm_config(folder))


def test_the_fingerprint_is_128_bits_in_hexadecimal(folder: Path) -> None:
    assert len(bytes.fromhex(fingerprint_from(vllm_config(folder)))) == 16


def test_files_that_are_no_weights_nor_tokenizer_do_not_matter(folder: Path) -> None:
    before = fingerprint_from(vllm_config(folder))
    write(folder, **{"README.md": b"other", "generation_config.json": b"{}"})
    assert fingerprint_from(vllm_config(folder)) == before


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "pytorch_model.bin", "merges.txt"],
)
def test_other_weights_or_another_tokenizer_are_another_model(folder: Path, name: str) -> None:
    before = fingerprint_from(vllm_config(folder))
    write(folder, **{name: b"changed"})
    assert fingerprint_from(vllm_config(folder)) != before


def dtype(config: Any) -> None:
    config.model_config.dtype = "torch.float16"


def kv_dtype(config: Any) -> None:
    config.cache_config.cache_dtype = "bfloat16"


def quantization(config: Any) -> None:
    config.model_config.quantization = "awq"


def layers(config: Any) -> None:
    config.model_config.get_num_layers = lambda parallel: 5


def kv_heads(config: Any) -> None:
    config.model_config.get_total_num_kv_heads = lambda: 4


def head_dim(config: Any) -> None:
    config.model_config.get_head_size = lambda: 32


def rope_base(config: Any) -> None:
    text = config.model_config.hf_text_config
    text.rope_parameters = {**text.rope_parameters, "rope_theta": 500_000.0}


def rope_type(config: Any) -> None:
    text = config.model_config.hf_text_config
    text.rope_parameters = {**text.rope_parameters, "rope_type": "linear", "factor": 2.0}


def architecture(config: Any) -> None:
    config.model_config.hf_config.architectures = ["MistralForCausalLM"]


def norm_epsilon(config: Any) -> None:
    """From config.json or ``hf_overrides``; no file of weights knows it."""
    config.model_config.hf_text_config.rms_norm_eps *= 10


def activation(config: Any) -> None:
    config.model_config.hf_text_config.hidden_act = "gelu"


@pytest.mark.parametrize(
    "change",
    [
        dtype,
        kv_dtype,
        quantization,
        layers,
        kv_heads,
        head_dim,
        rope_base,
        rope_type,
        architecture,
        norm_epsilon,
        activation,
    ],
    ids=lambda change: change.__name__,
)
def test_whatever_changes_kv_changes_the_fingerprint(folder: Path, change: Callable[[Any], None]) -> None:
    config = vllm_config(folder)
    before = fingerprint_from(config)
    change(config)
    assert fingerprint_from(config) != before


def test_the_tokenizer_may_come_from_another_folder(folder: Path, tmp_path: Path) -> None:
    config = vllm_config(folder)
    before = fingerprint_from(config)
    (other,) = {path.parent for path in write(tmp_path / "tokenizer", **{"tokenizer.json": b"{'a': 1}"})}
    config.model_config.tokenizer = str(other)
    assert fingerprint_from(config) != before


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["model.safetensors"], "identify the model's weights"),
        (["tokenizer.json", "tokenizer_config.json"], "identify the model's tokenizer"),
    ],
)
def test_a_model_that_cannot_be_identified_is_refused(folder: Path, missing: list[str], message: str) -> None:
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(UnsupportedModelError, match=message):
        fingerprint_details(vllm_config(folder))


@pytest.mark.parametrize("name", ["nobody/was-never-downloaded", "no/such/folder/model.gguf"])
def test_a_model_that_is_neither_folder_nor_snapshot_is_refused(folder: Path, name: str) -> None:
    config = vllm_config(folder)
    config.model_config.model = name
    with pytest.raises(UnsupportedModelError, match="identify the model's weights"):
        fingerprint_details(config)
