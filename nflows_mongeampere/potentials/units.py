r"""Two layers, the second of which reads groups of the first: Laplacian and adjoints.

In each of N groups, g units of the first layer, :math:`h`, and g of the second, :math:`z`, make

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

from typing import NamedTuple

from torch import Tensor

from nflows_mongeampere.potentials.activations import Activation


class Units(NamedTuple):
    r"""What two layers are made of. Places are dimensions of any number between units and points.

    Attributes:
        amplitude: a, shape (N, g, places, 1).
        lengths: r, shape (N, g, places, 1).
        hidden_amplitude: c, shape (N, g, places, 1).
        hidden_offset: d, shape (N, g, places, 1).
        weight: K, shape (N, g, g).
        forms: :math:`K_{mj} K_{mk} G_{jk}`, shape (N, g, g g); without G where ``overlap`` has it.
        overlap: G, shape (N, g, g, places, 1), where it differs from place to place, or None.
    """

    amplitude: Tensor
    lengths: Tensor
    hidden_amplitude: Tensor
    hidden_offset: Tensor
    weight: Tensor
    forms: Tensor
    overlap: Tensor | None


class Gradients(NamedTuple):
    """Of a loss to each tensor of :class:`Units`, to be added to, or None where it is not asked."""

    amplitude: Tensor | None
    lengths: Tensor | None
    hidden_amplitude: Tensor | None
    hidden_offset: Tensor | None
    weight: Tensor | None
    forms: Tensor | None
    overlap: Tensor | None


class Evaluation(NamedTuple):
    r"""What the way back needs: derivatives of both layers, e, and what multiplies r and c.

    Attributes:
        p, second, third: derivatives of the first layer, shape (N, g, places, B).
        pull: e.
        bend: :math:`a \odot \sigma''(h) + \sigma'''(h) \odot e`.
        y, curvature: first and second derivative of the second layer.
        squares: :math:`\|q\|^2`.
    """

    p: Tensor
    second: Tensor
    third: Tensor
    pull: Tensor
    bend: Tensor
    y: Tensor
    curvature: Tensor
    squares: Tensor


def evaluate(
    units: Units, h: Tensor, sigma: Activation, in_place: bool = False
) -> tuple[Tensor, Tensor, Evaluation]:
    r""":math:`\partial u / \partial h`, shape (N, g, places, B), and :math:`\Delta u`, (B,).

    Args:
        units: the two layers.
        h: of the first layer, shape (N, g, places, B).
        sigma: the activation.
        in_place: whether h may be written over, where autograd does not look.
    """
    a, r, c, d, weight, forms, overlap = units
    p = sigma.first(h, out=h if in_place else None)
    second = sigma.second(p)
    third = second * sigma.steepness(p)
    squares = _product(forms, _pairs(second, overlap).flatten(1, 2))
    z = _product(weight, p) + d
    y = sigma.first(z, out=z if in_place else None)
    curvature = sigma.second(y)
    pull = _product(weight.mT, c * y)
    push = (a * p).addcmul(second, pull)
    bend = (a * second).addcmul(third, pull)
    laplacian = (r * bend).addcmul(c * curvature, squares).flatten(0, -2).sum(0)
    return push, laplacian, Evaluation(p, second, third, pull, bend, y, curvature, squares)


def pull_back(
    units: Units,
    evaluation: Evaluation,
    sigma: Activation,
    of_push: Tensor,
    of_l: Tensor,
    gradients: Gradients,
) -> Tensor:
    """The adjoint of h, from those of what :func:`evaluate` gives; adds to the gradients."""
    a, r, c, _, weight, forms, overlap = units
    p, second, third, pull, bend, y, curvature, squares = evaluation
    thinning = r * of_l
    of_pull = (second * of_push).addcmul_(third, thinning)
    of_read, of_thinned = _product(weight, of_pull), squares * of_l
    of_z = (c * of_read).addcmul_(c * of_thinned, sigma.steepness(y)).mul_(curvature)
    of_squares = (c * curvature).mul_(of_l)
    of_products = _product(forms.mT, of_squares).unflatten(1, (second.shape[1], -1))
    seen = of_products if overlap is None else of_products * overlap
    of_second = (seen * second[:, None]).sum(2).mul_(2)
    of_second.addcmul_(a, thinning).addcmul_(pull, of_push)
    of_p = _product(weight.mT, of_z).addcmul_(a, of_push)
    of_h = (second * of_p).addcmul_(third, of_second)
    of_h.addcmul_(sigma.fourth(p), pull * thinning)

    if gradients.amplitude is not None:
        gradients.amplitude.add_((p * of_push).addcmul_(second, thinning).sum(-1, keepdim=True))
    if gradients.lengths is not None:
        gradients.lengths.add_((bend * of_l).sum(-1, keepdim=True))
    if gradients.hidden_amplitude is not None:
        of_c = (y * of_read).addcmul_(curvature, of_thinned)
        gradients.hidden_amplitude.add_(of_c.sum(-1, keepdim=True))
    if gradients.hidden_offset is not None:
        gradients.hidden_offset.add_(of_z.sum(-1, keepdim=True))
    if gradients.weight is not None:
        gradients.weight.baddbmm_(of_z.flatten(2), p.flatten(2).mT)
        gradients.weight.baddbmm_((c * y).flatten(2), of_pull.flatten(2).mT)
    if gradients.forms is not None:
        products = _pairs(second, overlap).flatten(1, 2)
        gradients.forms.baddbmm_(of_squares.flatten(2), products.flatten(2).mT)
    if gradients.overlap is not None:
        gradients.overlap.add_((of_products * _pairs(second, None)).sum(-1, keepdim=True))
    return of_h


def _pairs(second: Tensor, overlap: Tensor | None) -> Tensor:
    """Products of all pairs of units of a group, (N, g, g, places, B)."""
    pairs = second[:, :, None] * second[:, None]
    return pairs if overlap is None else pairs * overlap


def _product(weight: Tensor, units: Tensor) -> Tensor:
    """The product of each group with its units: (N, m, g) times (N, g, places, B)."""
    product: Tensor = (weight @ units.flatten(2)).unflatten(2, units.shape[2:])
    return product
