"""Attention in parts is softmax attention under one mask, in values and in gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples.models.recall_training.attention import Layout, attend
from tests.unit.recall_training.plain import visible


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Heads and a layout, with a seed for the numbers."""

    layout: Layout
    kv_heads: int
    group: int
    head_size: int
    scale: float
    seed: int

    @property
    def is_real_BT(self) -> Tensor:
        """Tokens that are no padding: what padding yields is of no interest."""
        is_fact_BF = torch.arange(self.layout.num_shared) < self.layout.lengths_B[:, None]
        return torch.cat([is_fact_BF, self.layout.owners_BNL.flatten(1) >= 0], dim=1)

    def inputs(
        self, dtype: torch.dtype = torch.float32, *, is_leaf: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T = self.is_real_BT.shape
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(heads: int) -> Tensor:
            return (
                torch.randn(B, heads, T, self.head_size, generator=generator)
                .to(dtype)
                .requires_grad_(is_leaf)
            )

        return drawn(self.kv_heads * self.group), drawn(self.kv_heads), drawn(self.kv_heads)


def owners_of(sizes: list[list[int]], L: int) -> Tensor:
    """Questions of the given sizes, slot by slot and padded -> [N, L]."""
    owners_NL = torch.full((len(sizes), L), -1)
    number = 0
    for slot, held in enumerate(sizes):
        start = 0
        for size in held:
            owners_NL[slot, start : start + size] = number
            start, number = start + size, number + 1
    return owners_NL


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(min_value=1, max_value=9), min_size=1, max_size=3))
    L = draw(st.integers(min_value=1, max_value=8))
    N = draw(st.integers(min_value=0, max_value=3))
    questions = st.lists(st.integers(min_value=1, max_value=4), max_size=4).filter(
        lambda held: sum(held) <= L
    )
    owners = [owners_of(draw(st.lists(questions, min_size=N, max_size=N)), L) for _ in lengths]
    return Case(
        layout=Layout(
            num_shared=max(lengths) + draw(st.integers(min_value=0, max_value=2)),
            lengths_B=torch.tensor(lengths),
            owners_BNL=torch.stack(owners),
        ),
        kv_heads=draw(st.integers(min_value=1, max_value=3)),
        group=draw(st.integers(min_value=1, max_value=4)),
        head_size=draw(st.sampled_from([1, 2, 8])),
        scale=draw(st.sampled_from([0.125, 1.0, 3.0])),
        seed=draw(st.integers(min_value=0, max_value=2**31)),
    )


# Two rows of unlike lengths; slots with several questions, with one and with none.
TYPICAL = Case(
    layout=Layout(
        num_shared=8,
        lengths_B=torch.tensor([8, 5]),
        owners_BNL=torch.stack([owners_of([[3, 4], [5]], 8), owners_of([[2, 2, 3], []], 8)]),
    ),
    kv_heads=2,
    group=3,
    head_size=16,
    scale=0.5,
    seed=0,
)


def masked_softmax(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, case: Case) -> Tensor:
    """Every token meets every other, in double precision; padding sees what it likes."""
    k_BHTD, v_BHTD = (x.double().repeat_interleave(case.group, dim=1) for x in (k_BKTD, v_BKTD))
    scores_BHTT = torch.einsum("bhtd,bhsd->bhts", q_BHTD.double(), k_BHTD) * case.scale
    scores_BHTT = scores_BHTT.masked_fill(~visible(case.layout)[:, None], -torch.inf)
    return torch.einsum("bhts,bhsd->bhtd", torch.softmax(scores_BHTT, dim=-1), v_BHTD)


def real(x_BHTD: Tensor, case: Case) -> Tensor:
    return x_BHTD.transpose(1, 2)[case.is_real_BT]


def differs(case: Case, layout: Layout) -> Tensor:
    """Which tokens that are no padding get something else under the other layout -> [B, T]."""
    inputs = case.inputs()
    one, other = (attend(*inputs, kind, case.scale) for kind in (case.layout, layout))
    return ((one - other).abs().amax(dim=(1, 3)) > 1e-3) & case.is_real_BT


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_attention_is_masked_softmax(case: Case) -> None:
    inputs = case.inputs()
    found = attend(*inputs, case.layout, case.scale)
    assert found.shape == inputs[0].shape
    expected = masked_softmax(*inputs, case).float()
    torch.testing.assert_close(real(found, case), real(expected, case), atol=1e-5, rtol=1e-4)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_gradients_are_those_of_masked_softmax(case: Case) -> None:
    inputs = case.inputs(is_leaf=True)
    found = real(attend(*inputs, case.layout, case.scale), case)
    expected = real(masked_softmax(*inputs, case).float(), case)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for gradient, oracle in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(gradient, oracle, atol=2e-5, rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_padding_yields_finite_values_and_gradients(case: Case) -> None:
    inputs = case.inputs(is_leaf=True)
    found = attend(*inputs, case.layout, case.scale)
    assert found.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found.sum(), inputs))


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_nothing_real_depends_on_what_stands_in_padding(case: Case) -> None:
    q_BHTD, k_BKTD, v_BKTD = case.inputs()
    is_padding_B1T1 = ~case.is_real_BT[:, None, :, None]
    one = attend(q_BHTD, k_BKTD, v_BKTD, case.layout, case.scale)
    other = attend(
        torch.where(is_padding_B1T1, 50.0, q_BHTD),
        torch.where(is_padding_B1T1, 50.0, k_BKTD),
        torch.where(is_padding_B1T1, 50.0, v_BKTD),
        case.layout,
        case.scale,
    )
    torch.testing.assert_close(real(other, case), real(one, case), atol=1e-6, rtol=1e-5)


def test_the_typical_layout_is_seen_as_written_out() -> None:
    # The oracle's mask, for once compared with a drawing: # is seen, columns are tokens of the second row.
    drawing = [
        "#.......................",  # facts
        "##......................",
        "###.....................",
        "####....................",
        "#####...................",
        "#####...#...............",  # questions of 2, 2 and 3 tokens
        "#####...##..............",
        "#####.....#.............",
        "#####.....##............",
        "#####.......#...........",
        "#####.......##..........",
        "#####.......###.........",
    ]
    rows = visible(TYPICAL.layout)[1][TYPICAL.is_real_BT[1]].tolist()
    assert ["".join("#" if seen else "." for seen in row) for row in rows] == drawing


def test_wrong_lengths_change_what_questions_of_the_shortened_row_get() -> None:
    wrong = replace(TYPICAL.layout, lengths_B=torch.tensor([8, 8]))
    expected_BT = TYPICAL.is_real_BT & (torch.arange(24) >= 8) & torch.tensor([[False], [True]])
    assert torch.equal(differs(TYPICAL, wrong), expected_BT)


def test_wrong_owners_change_what_later_questions_of_a_slot_get() -> None:
    owners_BNL = TYPICAL.layout.owners_BNL
    wrong = replace(TYPICAL.layout, owners_BNL=torch.where(owners_BNL >= 0, 0, -1))
    is_later_BNL = owners_BNL > owners_BNL[:, :, :1]  # the first of each slot still sees itself alone
    expected_BT = torch.cat([torch.zeros(2, 8, dtype=torch.bool), is_later_BNL.flatten(1)], dim=1)
    assert expected_BT.sum() == 4 + 5
    assert torch.equal(differs(TYPICAL, wrong), expected_BT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_close(dtype: torch.dtype) -> None:
    inputs = TYPICAL.inputs(dtype)
    found = attend(*inputs, TYPICAL.layout, TYPICAL.scale)
    assert found.dtype == dtype
    expected = masked_softmax(*inputs, TYPICAL).to(dtype)
    torch.testing.assert_close(real(found, TYPICAL), real(expected, TYPICAL), atol=0.03, rtol=0.03)


def test_layout_moved_to_a_device_keeps_every_field() -> None:
    moved = TYPICAL.layout.to(torch.device("meta"))
    assert moved.num_shared == 8
    assert moved.lengths_B.is_meta
    assert moved.owners_BNL.is_meta
    stayed = TYPICAL.layout.to(torch.device("cpu"))
    assert all(getattr(stayed, name) is getattr(TYPICAL.layout, name) for name in stayed.__slots__)
