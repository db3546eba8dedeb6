"""Fourier modes of fields on a lattice, in which translation-invariant Gaussians are diagonal."""

from __future__ import annotations

import math

import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from nflows_mongeampere import validation
from nflows_mongeampere.groups import BOUNDARIES, Group, axis_exchanges, mirrored, point_group
from nflows_mongeampere.invariants import Invariants


class LatticeModes(Transform):
    r"""Stretch each Fourier mode of fields on a periodic lattice, a transform of nflows.

    From data to noise it maps

    .. math:: \hat x_k \mapsto e^{-s_k} (\widehat{x - m})_k, \qquad
              \ln\left|\frac{dz}{dx}\right| = -\sum_k s_k,

    with one scale :math:`s_k` for each mode and one mean m for all sites; in a context c they are
    :math:`s_k + V_k \cdot c` and :math:`m + v \cdot c`. They are learned with the point group of
    the lattice: modes that a rotation or reflection exchanges have the same scale.
    Before a standard normal it makes the Gaussian whose modes have the variances :math:`e^{2 s_k}`,
    which is any Gaussian with the symmetries of the lattice: its covariance is circulant, and the
    Fourier transform diagonalises it. On an open lattice the modes are sine waves that vanish
    beyond the border, :math:`\prod_d \sin(\pi k_d i_d / (L_d + 1))`, as those of couplings between
    neighbours are.

    Reference: Gray, *Toeplitz and Circulant Matrices: A Review*, `doi:10.1561/0100000006
    <https://doi.org/10.1561/0100000006>`_, chapter 3.

    Args:
        log_scale: :math:`s` at the start, of the shape of the lattice, in the order of
            :func:`torch.fft.fftn`; what the group does not leave alone is averaged.
        mean: m at the start, or None for a mean that stays zero.
        group: which modes have the same scale; the point group of the lattice unless given, and the
            exchanges of axes of the same length for an open one. Modes k and -k of a periodic
            lattice always do, since fields are real.
        context_features: width of the context, or None.
        boundary: ``"periodic"`` or ``"open"``.

    Attributes:
        log_scale: s.
        mean: m, or None.
        context_weight: V, shape (E, L, M, ...), zero at the start, or None.
        context_mean: v, shape (E,), zero at the start, or None.

    Raises:
        TypeError: if ``log_scale`` is no tensor of floating-point numbers.
        ValueError: if it has no dimension.

    Example:
        >>> import torch
        >>> from nflows.distributions import StandardNormal
        >>> from nflows.flows import Flow
        >>> from nflows_mongeampere.modes import LatticeModes
        >>> modes = LatticeModes(torch.zeros(4, 4))
        >>> Flow(modes, StandardNormal([16])).log_prob(torch.zeros(2, 16)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        log_scale: Tensor,
        mean: float | None = None,
        group: Group | None = None,
        context_features: int | None = None,
        boundary: str = "periodic",
    ) -> None:
        super().__init__()
        fits = isinstance(log_scale, Tensor) and log_scale.is_floating_point()
        expected = "a floating-point tensor in the shape of the lattice, such as (L, M)"
        validation.kind("log_scale", log_scale, fits and log_scale.dim() > 0, expected)
        self.boundary = validation.choice("boundary", boundary, BOUNDARIES)
        sides = tuple(log_scale.shape)
        if group is None:
            group = point_group(sides) if boundary == "periodic" else axis_exchanges(sides)
        self.group = group
        self.log_scale = nn.Parameter(log_scale.detach().clone())
        # a wave may change its sign, and its scale does not
        elements = [*group.permutations]
        if boundary == "periodic":
            modes = torch.arange(math.prod(sides), device="cpu").reshape(sides)
            elements.append(mirrored(modes, range(len(sides))).flatten())
        invariants = Invariants(Group.generated_by(elements), sides)
        register_parametrization(self, "log_scale", invariants)
        self.mean: nn.Parameter | None = None
        self.context_mean: nn.Parameter | None = None
        self.context_weight: nn.Parameter | None = None
        if mean is not None:
            self.mean = nn.Parameter(log_scale.new_tensor(validation.number("mean", mean)))
        if context_features is not None:
            context_features = validation.integer("context_features", context_features)
            changes = log_scale.new_zeros(context_features, *log_scale.shape)
            self.context_weight = nn.Parameter(changes)
            register_parametrization(self, "context_weight", invariants)
            if mean is not None:
                self.context_mean = nn.Parameter(log_scale.new_zeros(context_features))
        self.context_features = context_features

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Data to noise.

        Args:
            inputs: fields, shape (B, ...) with a number for each site in each row, in C order.
            context: shape (B, E) where the scales depend on it; else ignored.

        Returns:
            Noise in the shape of ``inputs``, and :math:`\ln|dz/dx|` in nats, shape (B,).
        """
        log_scale, mean = self._of(inputs, context)
        centred = inputs if mean is None else inputs - mean.view(-1, *[1] * (inputs.dim() - 1))
        return self._stretch(centred, -log_scale)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Noise to data, with :math:`\ln|dx/dz|`; arguments as in :meth:`forward`."""
        log_scale, mean = self._of(inputs, context)
        outputs, logabsdet = self._stretch(inputs, log_scale)
        if mean is not None:
            outputs = outputs + mean.view(-1, *[1] * (inputs.dim() - 1))
        return outputs, logabsdet

    def _of(self, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scales of shape (1 or B, L, M, ...) and means of shape (1 or B,)."""
        log_scale, mean = self.log_scale[None], None if self.mean is None else self.mean[None]
        if self.context_weight is None:
            return log_scale, mean
        width = len(self.context_weight)
        context = validation.context(context, width, "inputs", inputs.shape[0], self.log_scale)
        log_scale = log_scale + torch.tensordot(context, self.context_weight, 1)
        if mean is not None and self.context_mean is not None:
            mean = mean + context @ self.context_mean
        return log_scale, mean

    def _stretch(self, inputs: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        sides = log_scale.shape[1:]
        if self.boundary == "open":
            modes = _sine(inputs.reshape(-1, *sides)) * log_scale.exp()
            outputs = _sine(modes).view_as(inputs)
            return outputs, log_scale.flatten(1).sum(1).expand(len(inputs))
        dims = tuple(range(-len(sides), 0))
        modes = torch.fft.rfftn(inputs.reshape(-1, *sides), dim=dims)
        modes = modes * log_scale.exp()[..., : modes.shape[-1]]
        outputs = torch.fft.irfftn(modes, s=sides, dim=dims).view_as(inputs)
        return outputs, log_scale.flatten(1).sum(1).expand(len(inputs))


def _sine(fields: Tensor) -> Tensor:
    """The sine transform of fields (B, L, M, ...) along each side, which is its own inverse."""
    for dimension, side in enumerate(fields.shape[1:], 1):
        place = torch.arange(1, side + 1, dtype=fields.dtype, device=fields.device)
        waves = math.sqrt(2 / (side + 1)) * (math.pi / (side + 1) * place[:, None] * place).sin()
        fields = torch.tensordot(fields, waves, ([dimension], [0])).movedim(-1, dimension)
    return fields
