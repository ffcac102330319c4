"""The text of a captured turn, decoded where the engine runs so that every memory can be read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

logger = logging.getLogger(__name__)


class TurnDecoder:
    """Token ids to readable text: special tokens become line breaks. Loads its tokenizer on first use."""

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config
        self._tokenizer: Any = None
        self._broken = False

    def __call__(self, token_ids: Sequence[int]) -> str:
        config = self._model_config
        if config.skip_tokenizer_init or self._broken:
            return ""
        if self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    config.tokenizer,
                    revision=config.tokenizer_revision,
                    trust_remote_code=config.trust_remote_code,
                )
            except (OSError, ValueError) as err:
                logger.warning(
                    "memories are stored without their text, the tokenizer does not load: %s",
                    err,
                    extra={"event": "text_missing"},
                )
                self._broken = True
                return ""
        return readable_text(self._tokenizer, token_ids)


def readable_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Decode, with runs of special tokens as single line breaks."""
    special = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special.update(i for i, token in added.items() if getattr(token, "special", False))
    lines: list[list[int]] = [[]]
    for token_id in token_ids:
        if token_id in special:
            lines.append([])
        else:
            lines[-1].append(token_id)
    texts = (str(tokenizer.decode(line)).strip() for line in lines if line)
    return "\n".join(text for text in texts if text)
