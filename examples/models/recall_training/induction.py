"""Start with an induction head: copying what followed the same token before.

Recall needs it for every value of more than one token, and training from random weights finds it late, if
at all. It takes two heads (Olsson et al., 2022): one of the first layer tells each token its predecessor,
one of the second layer attends to where the predecessor is the current token and copies what stands there.

C width, D head size, P pairs of rotary dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

_COMMON = 1.0  # part of every embedding, so that a head can attend by place alone
_NUM_FAST = 8  # rotary pairs that tell neighbours apart
_SLOWEST_TURN = 1.0  # radians over the longest context at which a pair still compares content
_LONGEST = 2048
_PLACE_LOGIT = 6.0
_MATCH_LOGIT = 14.0
_COPY_GAIN = 8.0
_PREDECESSOR_GAIN = 3.0
_NORMED_PLACE = 4.0  # where q/k norms bound the logits
_NORMED_MATCH = 2.0


def plant_induction_head(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Overwrites one KV head's worth of the first two layers, and one dimension of the embeddings."""
    config = model.config
    size, width = config.head_dim, config.hidden_size
    frequencies_P = model.model.rotary_emb.inv_freq.float()
    slow_P = (frequencies_P * _LONGEST < _SLOWEST_TURN).nonzero().flatten()
    code_dims = torch.cat([slow_P, slow_P + size // 2])
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 0] = _COMMON
        scale = (embeddings**2).mean(-1).sqrt().mean()  # what RMSNorm divides by
        read_CC, write_CC = (_orthonormal(width, generator) for _ in range(2))
        read_CC[:, 0] = write_CC[:, 0] = 0  # what all tokens have in common tells nothing
        first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn

        for layer in model.model.layers:  # nothing else disturbs them at first
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()

        place_D = torch.zeros(size)
        place_D[:_NUM_FAST] = (_PLACE_LOGIT * size**0.5) ** 0.5 * scale / _COMMON
        first.k_proj.weight[:size] = 0
        first.k_proj.weight[:size, 0] = place_D
        first.q_proj.weight[:size] = 0
        first.q_proj.weight[:size, 0] = _turned(place_D, -frequencies_P)
        first.v_proj.weight[:size] = read_CC[:size]
        first.o_proj.weight[:, :size] = _PREDECESSOR_GAIN * scale * write_CC[:size].T

        if hasattr(first, "q_norm"):
            first.q_norm.weight[place_D > 0] = _NORMED_PLACE
            first.q_norm.weight[(place_D > 0).nonzero() + size // 2] = _NORMED_PLACE
            second.q_norm.weight[code_dims] = _NORMED_MATCH

        num = len(code_dims)
        strength = (_MATCH_LOGIT * size**0.5 * width / num) ** 0.5 * scale
        second.k_proj.weight[:size] = 0
        second.k_proj.weight[code_dims] = strength * write_CC[:num]
        second.q_proj.weight[:size] = 0
        second.q_proj.weight[code_dims] = strength * read_CC[:num]
        second.v_proj.weight[:size] = read_CC[-size:]
        second.o_proj.weight[:, :size] = _COPY_GAIN * scale * read_CC[-size:].T


def _turned(vector_D: Tensor, angles_P: Tensor) -> Tensor:
    """RoPE by ``angles_P``, halves layout."""
    half = len(angles_P)
    one, two = vector_D[:half], vector_D[half:]
    cos, sin = angles_P.cos(), angles_P.sin()
    return torch.cat([one * cos - two * sin, two * cos + one * sin])


def _orthonormal(width: int, generator: torch.Generator) -> Tensor:
    matrix, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return matrix
