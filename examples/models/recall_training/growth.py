"""A deeper model that begins as a trained shallower one (block expansion, Wu et al., LLaMA Pro, 2024)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def grow_from(shallow: PreTrainedModel, deep: PreTrainedModel) -> None:
    """Overwrites ``deep`` so that it computes what ``shallow`` computes.

    Behind each of the last layers stands a copy of it that adds nothing as yet: training only has to find
    a use for it. All else about the two must be equal, and no layer is copied twice.
    """
    old, new = shallow.model.layers, deep.model.layers
    num_added = len(new) - len(old)
    if not 0 <= num_added <= len(old):
        raise ValueError(f"{len(old)} layers can grow to at most {2 * len(old)}, not {len(new)}")
    with torch.no_grad():
        deep.model.embed_tokens.load_state_dict(shallow.model.embed_tokens.state_dict())
        deep.model.norm.load_state_dict(shallow.model.norm.state_dict())
        at = 0
        for number, layer in enumerate(old):
            new[at].load_state_dict(layer.state_dict())
            at += 1
            if number >= len(old) - num_added:
                new[at].load_state_dict(layer.state_dict())
                new[at].self_attn.o_proj.weight.zero_()
                new[at].mlp.down_proj.weight.zero_()
                at += 1
