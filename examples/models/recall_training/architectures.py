"""Two small models of different families that vLLM serves as they are."""

from __future__ import annotations

from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from examples.models.recall_training import attention

MAX_POSITIONS = 4096


def build_model(
    family: str, tokenizer: PreTrainedTokenizerFast, *, layers: int, width: int, mlp: int
) -> PreTrainedModel:
    """An untrained model with tied embeddings."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "head_dim": 64,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": attention.NAME,
        "initializer_range": width**-0.5,
    }
    model: PreTrainedModel
    match family:
        case "llama":
            model = LlamaForCausalLM(
                LlamaConfig(
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
                    **shared,
                )
            )
        case "qwen3":
            model = Qwen3ForCausalLM(
                Qwen3Config(
                    num_attention_heads=6,
                    num_key_value_heads=2,
                    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
                    **shared,
                )
            )
        case _:
            raise ValueError(f"unknown family {family!r}")
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model
