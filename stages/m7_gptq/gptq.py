"""GPTQ for one weight matrix (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023). Line numbers are those of the paper's algorithm 1."""

import torch

from common.errors import UserError
from common.models.quantized_weight import QuantizedWeight
from stages.m7_gptq.grid import Grid, assemble, fit_grid
from stages.m7_gptq.settings import Settings

BLOCK = 128
"""Columns whose errors are gathered before they are passed on to all later ones, in one matrix product (the paper's B:
"lazy batch updates"). A group is a part of a block or a whole number of blocks, so that all weights of a group are up
to date when it begins."""


class Hessian:
    """`2 X^T X / rows`, float32 [in, in], of all inputs X [rows, in] that a layer has been shown.

    It is the second derivative of the layer's squared output error, the same for each output: which is why all rows of
    a weight, and all weights behind the same input, are quantised in one go.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.matrix = torch.zeros(in_features, in_features, device=device)
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """x [rows, in]; a mean over all rows so far, so that the numbers do not grow with the calibration text."""
        x = x.float()
        self.rows += x.shape[0]
        self.matrix.addmm_(x.T, x, beta=1 - x.shape[0] / self.rows, alpha=2 / self.rows)


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, settings: Settings, bias: torch.Tensor | None = None
) -> tuple[QuantizedWeight, float]:
    """Quantise a weight [out, in] such that its outputs, not its weights, change least.

    hessian [in, in] as `Hessian` gathers it. Returns the quantised weight and its loss: the mean squared error that
    the outputs have on the calibration text, as the algorithm adds it up on its way. `UserError` for a Hessian that is
    not finite or cannot be inverted.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise UserError("the calibration gave activations that are not finite (NaN or infinity): check the weights")
    columns = weight.float().T.clone()  # [in, out]: one input's weights side by side
    importance = hessian.diagonal().clone()

    # Act-order: the inputs with the largest activations first, while there are most others to make good their errors.
    order = importance.argsort(descending=True) if settings.desc_act else None
    if order is not None:
        columns, hessian, importance = columns[order], hessian[order][:, order], importance[order]

    factor = inverse_factor(hessian, settings.damping)
    dead = importance == 0  # inputs that are always 0: their weights do not matter, and should not widen a grid
    columns[dead] = 0

    size = columns.shape[0]
    group = settings.group_of(size)
    grids: list[Grid] = []
    codes = torch.empty_like(columns)  # line 1: Q
    loss = torch.zeros(columns.shape[1], device=columns.device)
    for start in range(0, size, BLOCK):  # line 4
        end = min(start + BLOCK, size)
        errors = torch.empty_like(columns[start:end])  # line 2: E
        for i in range(start, end):  # line 5
            if i % group == 0:  # a group begins: its grid comes from the weights as they are by now
                part = slice(i, min(i + group, size))
                grids.append(fit_grid(columns[part], settings, importance[part]))
            codes[i] = grids[-1].codes(columns[i])  # line 6
            error = (columns[i] - grids[-1].values(codes[i])) / factor[i, i]  # line 7
            columns[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)  # line 8, without the column itself
            errors[i - start] = error
        loss += errors.square().sum(0)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)  # line 10

    g_idx = None
    if order is not None:
        position = order.argsort()  # where each input ended up
        codes, g_idx = codes[position], (position // group).to(torch.int32)
    return assemble(codes, grids, g_idx, settings, bias), float(loss.mean()) / 2


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Line 3: the upper triangular Cholesky factor of the damped Hessian's inverse, [in, in].

    Row i of it, from the diagonal on, is what the paper's equation 3 needs of the inverse when the inputs before i are
    fixed already: one factorisation instead of an update of the inverse at every step (its section 3, step 3).
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * hessian.diagonal().mean()
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise UserError("the Hessian is not positive definite: give more calibration text, or more damping")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
