"""Attention over dialogues whose questions share the facts but do not see each other.

A sequence is F shared tokens followed by N slots of L tokens, each slot holding some questions. A general
mask would make every token meet every other; here the shared tokens meet themselves and each slot meets the
shared tokens and itself.

B sequences, H query heads in groups of G per KV head (K), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "shared_facts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the parts of a batch's sequences stand.

    Shared tokens past ``lengths_B`` are padding; ``owners_BNL`` numbers the question that each token of a
    slot belongs to (-1: padding).
    """

    num_shared: int
    lengths_B: Tensor
    owners_BNL: Tensor

    def to(self, device: torch.device) -> Layout:
        return Layout(
            num_shared=self.num_shared,
            lengths_B=self.lengths_B.to(device, non_blocking=True),
            owners_BNL=self.owners_BNL.to(device, non_blocking=True),
        )


def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: Layout, scale: float) -> Tensor:
    """Softmax attention under the layout -> [B, H, T, D]; what padding yields is finite and meaningless."""
    B, H, _, D = q_BHTD.shape
    K, F = k_BKTD.shape[1], layout.num_shared
    _, N, L = layout.owners_BNL.shape
    G = H // K
    q_BHTD = q_BHTD * scale
    kf_BKFD, vf_BKFD = k_BKTD[:, :, :F], v_BKTD[:, :, :F]
    q_BKXD = q_BHTD[:, :, :F].reshape(B, K, G * F, D)
    is_later_FF = torch.ones(F, F, dtype=torch.bool, device=q_BHTD.device).triu(1)
    scores = (q_BKXD @ kf_BKFD.transpose(-1, -2)).view(B, K, G, F, F) + _barring(is_later_FF, q_BHTD)
    weights = torch.softmax(scores, dim=-1).view(B, K, G * F, F)
    shared_BHFD = (weights.to(v_BKTD.dtype) @ vf_BKFD).view(B, H, F, D)
    if N == 0:
        return shared_BHFD
    q_BKXD = q_BHTD[:, :, F:].reshape(B, K, G * N * L, D)
    on_facts = (q_BKXD @ kf_BKFD.transpose(-1, -2)).view(B, K, G, N, L, F)
    is_padding_BF = torch.arange(F, device=q_BHTD.device) >= layout.lengths_B[:, None]
    on_facts = on_facts + _barring(is_padding_BF, q_BHTD)[:, None, None, None, None]
    k_BK1NLD = k_BKTD[:, :, F:].reshape(B, K, 1, N, L, D)
    v_BK1NLD = v_BKTD[:, :, F:].reshape(B, K, 1, N, L, D)
    q_BKGNLD = q_BKXD.view(B, K, G, N, L, D)
    is_foreign_BNLL = layout.owners_BNL.unsqueeze(-1) != layout.owners_BNL.unsqueeze(-2)
    is_later_LL = torch.ones(L, L, dtype=torch.bool, device=q_BHTD.device).triu(1)
    barring_BNLL = _barring(is_foreign_BNLL | is_later_LL, q_BHTD)
    on_own = q_BKGNLD @ k_BK1NLD.transpose(-1, -2) + barring_BNLL[:, None, None]
    weights = torch.softmax(torch.cat([on_facts, on_own], dim=-1), dim=-1).to(v_BKTD.dtype)
    from_facts = weights[..., :F].reshape(B, K, G * N * L, F) @ vf_BKFD
    from_own = weights[..., F:] @ v_BK1NLD
    asked_BHYD = (from_facts.view_as(from_own) + from_own).view(B, H, N * L, D)
    return torch.cat([shared_BHFD, asked_BHYD], dim=2)


def _barring(is_barred: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(is_barred, dtype=like.dtype).masked_fill(is_barred, -torch.inf)


def _interface(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout,
    **_: object,
) -> tuple[Tensor, None]:
    """The call that transformers' models make; ``layout`` is passed through their ``forward``."""
    return attend(query, key, value, layout, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, _interface)
