"""Kernels beside the two large passes of Adam: the unit of parameters that are in the data's."""

from __future__ import annotations

import pytest
import torch

from flash_sae_dist.kernels import adam_scalars, reference, sparse_adam
from flash_sae_dist.kernels.reference import AdamOptions
from tests.kernels.test_sparse_adam import (
    DEVICE,
    Case,
    clone,
    flat,
    make_grads,
    make_rows,
    scalars_of,
)

UNIT = 2.0**-7


@pytest.mark.parametrize("unit", [1.0, UNIT, 0.3])
def test_vector_adam_in_a_unit(unit: float) -> None:
    want = [torch.randn(300, device=DEVICE) for _ in range(3)]
    want[2].abs_()
    grad, got, options = torch.randn(300, device=DEVICE), [t.clone() for t in want], AdamOptions()
    options = options._replace(eps=1e-2, unit=unit)
    reference.adam_vector_(*want, grad, scalars_of(4), options)
    adam_scalars.adam_vector_(*got, grad, scalars_of(4), options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_clipping_counts_biases_per_unit() -> None:
    b_dec, over_encoder = torch.randn(2, 300, device=DEVICE)
    squares, want, got = torch.tensor([0.5, 1.5], device=DEVICE), scalars_of(4), scalars_of(4)
    expected = reference.clip_(b_dec, over_encoder, squares, 0.5, want, 0.3)
    grad = adam_scalars.clip_(b_dec, over_encoder, squares, 0.5, got, 0.3)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, expected)
    norm = (2.0 + (0.3 * grad).square().sum()).sqrt()
    torch.testing.assert_close(got[2], 0.5 / (norm + 1e-6))


@pytest.mark.parametrize("M", [0, 3])
def test_a_step_in_a_unit_is_a_step_of_scaled_data(M: int) -> None:
    """b_enc goes with the data and its gradient against them; the matrices' stay."""
    case, count = Case(9, 40, 7, 2, M), torch.tensor(3.0, device=DEVICE)
    one, rows = AdamOptions(eps=1e-2), make_rows(case.F, case.D, torch.float32)
    grads = make_grads(case, 1)
    small = rows._replace(
        b_enc=rows.b_enc * UNIT,
        exp_avg=(rows.exp_avg[0], rows.exp_avg[1] / UNIT, rows.exp_avg[2]),
        exp_avg_sq=(rows.exp_avg_sq[0], rows.exp_avg_sq[1] / UNIT**2, rows.exp_avg_sq[2]),
    )
    # With x the centred rows shrink and the coefficients of the encoder grow.
    pairs = grads.pairs._replace(
        enc_coef=grads.pairs.enc_coef / UNIT, enc_rows=grads.pairs.enc_rows * UNIT
    )
    dense = grads.dense and grads.dense._replace(bias=grads.dense.bias / UNIT)
    scaled = grads._replace(pairs=pairs, dense=dense)
    for ops in (reference, sparse_adam):
        want, got = clone(rows), clone(small)
        options = one._replace(unit=UNIT)
        squares = [
            ops.encoder_squares(r, g, o)[0].sum()
            for r, g, o in ((want, grads, one), (got, scaled, options))
        ]
        torch.testing.assert_close(squares[1], squares[0])
        ops.adam_encoder_(want, grads, scalars_of(4), count, one)
        ops.adam_encoder_(got, scaled, scalars_of(4), count, options)
        got.b_enc.div_(UNIT)
        got.exp_avg[1].mul_(UNIT)
        got.exp_avg_sq[1].mul_(UNIT**2)
        for a, b in zip(flat(got), flat(want), strict=True):
            torch.testing.assert_close(a, b)
