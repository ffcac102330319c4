"""What attention sees of texts: un-rotated keys and queries of a transformers model, by layer.

L layers, T tokens, K KV heads, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_TOKENS_PER_BATCH = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One text: its token ids, and before RoPE its keys [L, T, K, D] and queries [L, T, H, D].

    ``queries`` is empty where none were asked for.
    """

    token_ids: list[int]
    keys: Tensor
    queries: Tensor


def encode(model: PreTrainedModel, texts: Sequence[list[int]], *, with_queries: bool = True) -> list[Encoded]:
    """Every text computed alone, as a turn captured at the start of a session."""
    seen: dict[tuple[str, int], Tensor] = {}
    hooks = [hook for index, layer in enumerate(model.model.layers) for hook in _watch(layer, index, seen)]
    found: list[Encoded | None] = [None] * len(texts)
    try:
        for batch in _batches(texts):
            encoded = _encode_batch(model, [texts[i] for i in batch], seen, with_queries)
            for at, one in zip(batch, encoded, strict=True):
                found[at] = one
    finally:
        for hook in hooks:
            hook.remove()
    return [encoded for encoded in found if encoded is not None]


def _batches(texts: Sequence[list[int]]) -> list[list[int]]:
    """Texts of like length together."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        if batches[-1] and (len(batches[-1]) + 1) * len(texts[index]) > _TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(index)
    return batches


def _encode_batch(
    model: PreTrainedModel,
    texts: Sequence[list[int]],
    seen: dict[tuple[str, int], Tensor],
    with_queries: bool,
) -> list[Encoded]:
    longest = max(len(ids) for ids in texts)
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in texts])
    # Padding stands behind the text, where causal attention does not see it.
    with torch.inference_mode():
        model.model(input_ids=ids_BT.to(model.device), use_cache=False)
    layers = range(model.config.num_hidden_layers)
    keys_LBTKD = torch.stack([seen["k", index] for index in layers])
    queries_LBTHD = torch.stack([seen["q", index] for index in layers])
    if not with_queries:
        queries_LBTHD = queries_LBTHD[:, :, :, :0]
    return [
        Encoded(
            token_ids=ids,
            keys=keys_LBTKD[:, b, : len(ids)].clone(),
            queries=queries_LBTHD[:, b, : len(ids)].clone(),
        )
        for b, ids in enumerate(texts)
    ]


def _watch(layer: Any, index: int, seen: dict[tuple[str, int], Tensor]) -> list[Any]:
    """Hooks on what RoPE is applied to: the projections, or the norms behind them where there are some."""
    attention = layer.self_attn
    hooks = []
    for name in ("k", "q"):
        module = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")

        def keep(_module: Any, _inputs: Any, output: Tensor, name: str = name) -> None:
            seen[name, index] = output.unflatten(-1, (-1, attention.head_dim)) if output.ndim == 3 else output

        hooks.append(module.register_forward_hook(keep))
    return hooks
