"""What users read of a captured turn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from kv_agent.vllm_plugin.text import TurnDecoder, readable_text

MODEL = Path(__file__).resolve().parents[3] / "examples" / "models" / "recall"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("<|user|>What is red?<|end|><|assistant|>The ball.<|end|>", "What is red?\nThe ball."),
        ("<|pad|><|pad|><|user|>Hi<|end|>", "Hi"),
        ("no markers at all", "no markers at all"),
        ("<|user|>two\nlines<|end|>", "two\nlines"),
        ("<|user|>  spaces around  <|end|>   <|assistant|>", "spaces around"),
        ("<|user|>Grüße, 世界 🎈<|end|>", "Grüße, 世界 🎈"),
        ("<|user|><|end|>", ""),
        ("", ""),
    ],
)
def test_special_tokens_become_single_line_breaks(tokenizer: Any, text: str, readable: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert readable_text(tokenizer, token_ids) == readable


def test_a_turn_cut_inside_a_character_is_still_read(tokenizer: Any) -> None:
    token_ids = tokenizer.encode("a ball 🎈", add_special_tokens=False)
    for end in range(len(token_ids)):
        assert readable_text(tokenizer, token_ids[:end]).startswith("a ball"[:end])


def model_config(**changes: Any) -> Any:
    defaults = {
        "tokenizer": str(MODEL),
        "tokenizer_revision": None,
        "trust_remote_code": False,
        "skip_tokenizer_init": False,
    }
    return SimpleNamespace(**(defaults | changes))


def test_the_decoder_loads_the_engine_s_tokenizer(tokenizer: Any) -> None:
    decode = TurnDecoder(model_config())
    token_ids = tokenizer.encode("<|user|>Hello<|end|>", add_special_tokens=False)
    assert decode(tuple(token_ids)) == "Hello"


def test_an_engine_without_tokenizer_stores_no_text() -> None:
    assert TurnDecoder(model_config(skip_tokenizer_init=True, tokenizer="nowhere"))((1, 2)) == ""


def test_a_tokenizer_that_does_not_load_costs_the_text_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decode = TurnDecoder(model_config(tokenizer=str(tmp_path)))
    assert [decode((1, 2)), decode((3,))] == ["", ""]
    assert len([one for one in caplog.records if one.name.startswith("kv_agent")]) == 1
