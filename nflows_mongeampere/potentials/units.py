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


class Room:
    """Tensors that are written over again and again: fresh memory costs more than the arithmetic.

    Those that are taken stay as they are until the room is cleared.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._tensors: dict[torch.Size, list[Tensor]] = {}
        self._taken: dict[torch.Size, int] = {}

    def clear(self) -> None:
        self._taken = dict.fromkeys(self._tensors, 0)

    def take(self, shape: torch.Size) -> Tensor:
        """A tensor of some shape, with any numbers in it."""
        tensors, taken = self._tensors.setdefault(shape, []), self._taken.get(shape, 0)
        if taken == len(tensors):
            tensors.append(self._like.new_empty(shape))
        self._taken[shape] = taken + 1
        return tensors[taken]


def evaluate(
    units: Units,
    h: Tensor,
    sigma: Activation,
    runs: Sequence[slice] = EVERYWHERE,
    room: Room | None = None,
) -> tuple[Tensor, Tensor, Evaluation]:
    r""":math:`\partial u / \partial h`, shape (N, g, places, B), and :math:`\Delta u`, (B,).

    Args:
        units: the two layers.
        h: of the first layer, shape (N, g, places, B); written over where there is room.
        sigma: the activation.
        runs: of places, one for each matrix of forms.
        room: for what is made on the way, where autograd does not look.
    """

    def new(shape: torch.Size) -> Tensor | None:
        return None if room is None else room.take(shape)

    def over(written: Tensor) -> Tensor | None:
        return None if room is None else written

    a, r, c, d, weight, forms = units
    first = h.shape
    hidden = torch.Size((*weight.shape[:2], *first[2:]))
    p = sigma.first(h, out=over(h))
    second, steepness = sigma.second(p, out=new(first)), sigma.steepness(p, out=new(first))
    reads = _run_by_run(forms, second, runs, room).unflatten(1, weight.shape[1:])
    reads = torch.mul(reads, second[:, None], out=over(reads))
    squares = torch.sum(reads, 2, out=new(hidden))
    z = _product(weight, p, new(hidden))
    z = torch.add(z, d, out=over(z))
    y = sigma.first(z, out=over(z))
    curvature = sigma.second(y, out=new(hidden))
    pull = _product(weight.mT, torch.mul(c, y, out=new(hidden)), new(first))
    push = torch.mul(a, p, out=new(first))
    push = torch.addcmul(push, second, pull, out=over(push))
    bend = torch.addcmul(a, steepness, pull, out=new(first))
    bend = torch.mul(bend, second, out=over(bend))
    thinned = torch.mul(curvature, squares, out=new(hidden))
    thinned = torch.mul(thinned, c, out=over(thinned))
    laplacian = r.flatten() @ bend.flatten(0, -2) + thinned.flatten(0, -2).sum(0)
    return push, laplacian, Evaluation(p, second, steepness, pull, y, curvature, squares)


def pull_back(
    units: Units,
    evaluation: Evaluation,
    sigma: Activation,
    of_push: Tensor,
    of_l: Tensor,
    gradients: Gradients,
    room: Room,
    runs: Sequence[slice] = EVERYWHERE,
) -> Tensor:
    """The adjoint of h, from those of what :func:`evaluate` gives; adds to the gradients."""
    a, r, c, _, weight, forms = units
    p, second, steepness, pull, y, curvature, squares = evaluation
    thinning, of_pull, spare, of_h = (room.take(p.shape) for _ in range(4))
    of_read, thinned, of_z, of_squares = (room.take(y.shape) for _ in range(4))
    torch.mul(r, of_l, out=thinning)
    torch.addcmul(of_push, steepness, thinning, out=of_pull).mul_(second)
    _product(weight, of_pull, of_read)
    torch.mul(squares, of_l, out=thinned)
    sigma.steepness(y, out=of_z).mul_(thinned).add_(of_read).mul_(curvature).mul_(c)
    if gradients.hidden_amplitude is not None:
        of_c = of_read.mul_(y).addcmul_(curvature, thinned)
        gradients.hidden_amplitude.add_(of_c.sum(-1, keepdim=True))
    if gradients.hidden_offset is not None:
        gradients.hidden_offset.add_(of_z.sum(-1, keepdim=True))
    if gradients.weight is not None:
        pushed = torch.mul(c, y, out=thinned)
        gradients.weight.baddbmm_(of_z.flatten(2), p.flatten(2).mT)
        gradients.weight.baddbmm_(pushed.flatten(2), of_pull.flatten(2).mT)
    if gradients.lengths is not None:
        bend = torch.addcmul(a, steepness, pull, out=spare).mul_(second)
        gradients.lengths.add_((bend @ of_l)[..., None])
    if gradients.amplitude is not None:
        of_a = torch.mul(p, of_push, out=spare).addcmul_(second, thinning)
        gradients.amplitude.add_(of_a.sum(-1, keepdim=True))

    torch.mul(curvature, c, out=of_squares).mul_(of_l)
    pairs = room.take(torch.Size((*weight.shape, *p.shape[2:])))
    pairs = torch.mul(of_squares[:, :, None], second[:, None], out=pairs).flatten(1, 2)
    # the forms are symmetric
    of_second = _run_by_run(forms.mT, pairs, runs, room).mul_(2)
    of_second.addcmul_(a, thinning).addcmul_(pull, of_push)
    if gradients.forms is not None:
        for run, of_form in zip(runs, gradients.forms, strict=True):
            rows, columns = pairs[..., run, :].flatten(2), second[..., run, :].flatten(2)
            of_form.baddbmm_(rows, columns.mT)
    _product(weight.mT, of_z, of_h).addcmul_(a, of_push)
    of_h.addcmul_(steepness, of_second).mul_(second)
    return of_h.addcmul_(sigma.fourth(p), thinning.mul_(pull))


def _run_by_run(weights: Tensor, units: Tensor, runs: Sequence[slice], room: Room | None) -> Tensor:
    """Products of each run of places with a matrix of its own."""
    pieces = [units[..., run, :] for run in runs]
    shape = torch.Size((*weights.shape[1:3], *units.shape[2:]))
    out = None if room is None else room.take(shape)
    if len(pieces) == 1:
        return _product(weights[0], units, out)
    products = [_product(*pair) for pair in zip(weights, pieces, strict=True)]
    return torch.cat(products, -2, out=out)


def _product(weight: Tensor, units: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of each group with its units: (N, M, g) times (N, g, places, B)."""
    if out is not None:
        torch.bmm(weight, units.flatten(2), out=out.flatten(2))
        return out
    product: Tensor = (weight @ units.flatten(2)).unflatten(2, units.shape[2:])
    return product
