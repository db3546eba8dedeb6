r"""Two layers, the second of which reads groups of the first: Laplacian and adjoints.

In each of N groups, g units of the first layer, :math:`h`, and M of the second, :math:`z`, make

.. math:: u = a \cdot \sigma(h) + c \cdot \sigma(z), \qquad z = K\, \sigma'(h) + d.

Where the gradients of the first are rows :math:`w_j` with Gram matrix :math:`G`, those of the
second are :math:`q_m = \sum_j K_{mj} \sigma''(h_j)\, w_j`, and

.. math:: \frac{\partial u}{\partial h} = a \odot \sigma'(h) + \sigma''(h) \odot e, \qquad
          e = K^T (c \odot \sigma'(z)),

.. math:: \Delta u = r \cdot \big(a \odot \sigma''(h) + \sigma'''(h) \odot e\big)
                     + \sum_m c_m \sigma''(z_m) \|q_m\|^2, \qquad
          \|q_m\|^2 = \sum_{jk} K_{mj} K_{mk} G_{jk}\, \sigma''(h_j) \sigma''(h_k),

with :math:`r_j = G_{jj}`: a form of g×g numbers for each unit, whatever the dimension of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nflows_mongeampere.potentials.activations import Activation

# where all places have the same Gram matrix
EVERYWHERE = (slice(None),)


class Units(NamedTuple):
    r"""What two layers are made of. Places are dimensions of any number between units and points.

    Attributes:
        amplitude: a, shape (N, g, places, 1).
        lengths: r, shape (N, g, places, 1).
        hidden_amplitude: c, shape (N, M, places, 1).
        hidden_offset: d, shape (N, M, places, 1).
        weight: K, shape (N, M, g).
        forms: :math:`K_{mj} K_{mk} G_{jk}`, shape (N, M g, g), for each run of places whose Gram
            matrix is the same: shape (runs, N, M g, g).
    """

    amplitude: Tensor
    lengths: Tensor
    hidden_amplitude: Tensor
    hidden_offset: Tensor
    weight: Tensor
    forms: Tensor


class Gradients(NamedTuple):
    """Those of a loss to :class:`Units`, to be added to; None for what is not asked for."""

    amplitude: Tensor | None
    lengths: Tensor | None
    hidden_amplitude: Tensor | None
    hidden_offset: Tensor | None
    weight: Tensor | None
    forms: Tensor | None


class Evaluation(NamedTuple):
    r"""What the way back needs: derivatives of both layers, e, and what multiplies c.

    Attributes:
        p, second, steepness: :math:`\sigma'`, :math:`\sigma''` and :math:`\sigma''' / \sigma''` of
            the first layer, shape (N, g, places, B).
        pull: e, shape (N, g, places, B).
        y, curvature: first and second derivative of the second layer, shape (N, M, places, B).
        squares: :math:`\|q\|^2`, shape (N, M, places, B).
    """

    p: Tensor
    second: Tensor
    steepness: Tensor
    pull: Tensor
    y: Tensor
    curvature: Tensor
    squares: Tensor


def gram_forms(weight: Tensor, gram: Tensor) -> Tensor:
    r"""The forms :math:`K_{mj} K_{mk} G_{jk}`, shape (..., M g, g), of (..., M, g), (..., g, g)."""
    forms = weight[..., :, None] * weight[..., None, :] * gram[..., None, :, :]
    return forms.flatten(-3, -2)


def evaluate(
    units: Units,
    h: Tensor,
    sigma: Activation,
    runs: Sequence[slice] = EVERYWHERE,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Evaluation]:
    r""":math:`\partial u / \partial h`, shape (N, g, places, B), and :math:`\Delta u`, (B,).

    Args:
        units: the two layers.
        h: of the first layer, shape (N, g, places, B).
        sigma: the activation.
        runs: of places, one for each matrix of forms.
        in_place: whether h may be written over, where autograd does not look.
    """
    a, r, c, d, weight, forms = units
    p = sigma.first(h, out=h if in_place else None)
    second = sigma.second(p)
    steepness = sigma.steepness(p)
    reads = _run_by_run(forms, second, runs).unflatten(1, weight.shape[1:])
    squares = (reads * second[:, None]).sum(2)
    z = _product(weight, p) + d
    y = sigma.first(z, out=z if in_place else None)
    curvature = sigma.second(y)
    pull = _product(weight.mT, c * y)
    push = (a * p).addcmul(second, pull)
    bend = second * torch.addcmul(a, steepness, pull)
    laplacian = _total(r * bend) + _total(c * curvature * squares)
    return push, laplacian, Evaluation(p, second, steepness, pull, y, curvature, squares)


def pull_back(
    units: Units,
    evaluation: Evaluation,
    sigma: Activation,
    of_push: Tensor,
    of_l: Tensor,
    gradients: Gradients,
    runs: Sequence[slice] = EVERYWHERE,
) -> Tensor:
    """The adjoint of h, from those of what :func:`evaluate` gives; adds to the gradients."""
    a, r, c, _, weight, forms = units
    p, second, steepness, pull, y, curvature, squares = evaluation
    thinning = r * of_l
    of_pull = torch.addcmul(of_push, steepness, thinning).mul_(second)
    of_read, thinned = _product(weight, of_pull), squares * of_l
    of_z = sigma.steepness(y).mul_(thinned).add_(of_read).mul_(curvature).mul_(c)
    if gradients.weight is not None:
        gradients.weight.baddbmm_(of_z.flatten(2), p.flatten(2).mT)
        gradients.weight.baddbmm_((c * y).flatten(2), of_pull.flatten(2).mT)
    if gradients.hidden_amplitude is not None:
        of_c = of_read.mul_(y).addcmul_(curvature, thinned)
        gradients.hidden_amplitude.add_(of_c.sum(-1, keepdim=True))
    if gradients.hidden_offset is not None:
        gradients.hidden_offset.add_(of_z.sum(-1, keepdim=True))

    of_squares = (c * curvature).mul_(of_l)
    pairs = (of_squares[:, :, None] * second[:, None]).flatten(1, 2)
    # the forms are symmetric
    of_second = _run_by_run(forms.mT, pairs, runs).mul_(2)
    if gradients.forms is not None:
        for run, of_form in zip(runs, gradients.forms, strict=True):
            rows, columns = pairs[..., run, :].flatten(2), second[..., run, :].flatten(2)
            of_form.baddbmm_(rows, columns.mT)
    if gradients.amplitude is not None:
        of_a = (p * of_push).addcmul_(second, thinning)
        gradients.amplitude.add_(of_a.sum(-1, keepdim=True))
    if gradients.lengths is not None:
        bend = torch.addcmul(a, steepness, pull).mul_(second)
        gradients.lengths.add_((bend @ of_l)[..., None])

    of_second.addcmul_(a, thinning).addcmul_(pull, of_push)
    of_h = _product(weight.mT, of_z).addcmul_(a, of_push)
    of_h.addcmul_(steepness, of_second).mul_(second)
    return of_h.addcmul_(sigma.fourth(p), thinning.mul_(pull))


def _run_by_run(weights: Tensor, units: Tensor, runs: Sequence[slice]) -> Tensor:
    """Products of each run of places with a matrix of its own."""
    products = [
        _product(weight, units[..., run, :]) for run, weight in zip(runs, weights, strict=True)
    ]
    return products[0] if len(products) == 1 else torch.cat(products, -2)


def _product(weight: Tensor, units: Tensor) -> Tensor:
    """The product of each group with its units: (N, M, g) times (N, g, places, B)."""
    product: Tensor = (weight @ units.flatten(2)).unflatten(2, units.shape[2:])
    return product


def _total(terms: Tensor) -> Tensor:
    """The sum over all but the points."""
    return terms.flatten(0, -2).sum(0)
