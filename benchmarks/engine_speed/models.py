"""A model of a real model's size: how long something takes does not depend on what the weights are."""

from __future__ import annotations

import shutil
from pathlib import Path

RECALL_MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "recall"
VOCABULARY = 3328  # of the bundled tokenizer, which goes with the model
TOKEN_BYTES = 24 * 2 * 2 * 64 * 2  # of KV


def make_qwen(folder: Path) -> Path:
    """Qwen2.5-0.5B's shape with random bfloat16 weights and a small vocabulary, made once -> ``folder``.

    24 layers with 14 heads of 64, two KV heads, hidden size 896, intermediate size 4,864.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if (folder / "config.json").exists():
        return folder
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(RECALL_MODEL / name, folder)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
