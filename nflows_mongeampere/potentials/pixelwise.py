"""Pixelwise potentials: one potential of a few channels at every pixel, in a context of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.dynamics import (
    Dynamics,
    Field,
    FieldDynamics,
    Time,
    as_rows,
    start,
)
from nflows_mongeampere.potentials.activations import ACTIVATIONS, Activation
from nflows_mongeampere.potentials.base import ClosedFormPotential


class PixelwisePotential(ClosedFormPotential):
    r"""Ridges and a parabola at every pixel, whose coefficients depend on the pixel's context.

    .. math:: u(x; c) = \sum_i \Bigl[ \tfrac12 s_i \|x_i\|^2 + m_i \cdot x_i
              + \sum_{j=1}^{H} a_{ij}\, \sigma(h_{ij}) \Bigr], \qquad
              h_{ij} = w_j \cdot x_i + b_{ij}

    where :math:`i` runs over the pixels and :math:`x_i` are the C channels of one. Its context
    :math:`c_i`, one number from each of E maps, gives the coefficients of a pixel,

    .. math:: b_i = V c_i + b, \qquad m_i = M c_i + m, \qquad
              (a_i, s_i) = \frac{(\hat a_i, \hat s_i)}
              {1 + (\sum_j |\hat a_{ij}| \|w_j\|^2 + |\hat s_i|) / \Lambda}, \qquad
              \hat a_i = A c_i + a, \qquad \hat s_i = S \cdot c_i + s.

    No curvature of u exceeds :math:`\Lambda`: amplitudes that a network draws would else grow
    until the solver no longer follows. The Laplacian is
    :math:`\sum_i [C s_i + \sum_j a_{ij} \|w_j\|^2 \sigma''(h_{ij})]`.

    Pixels do not act on each other: a network that sees what is known already, such as other pixels
    or a coarser image, says through the context how each one moves
    (:class:`~nflows_mongeampere.MongeAmpereCouplingTransform`). The parabola alone is an affine
    coupling; ridges make the density of a pixel skew, or put it into two places.

    Amplitudes, drift and scale start at zero: a new flow is the identity map.

    Args:
        shape: (C, height, width) of one image; events may have this shape or be flattened.
        hidden_features: H, the number of ridges at each pixel.
        context_channels: E, the number of maps of the context, or None for the same potential at
            every pixel. A row of context has the shape (E, height, width), flattened.
        activation: ``"logcosh"``, :math:`\ln \cosh h`, or ``"softplus"``, :math:`\ln(1 + e^h)`.
        stiffness: :math:`\Lambda`, the bound of the curvature, in units of 1 / time. A solver of
            Runge and Kutta follows it well in steps of about 4 / :math:`\Lambda`.

    Attributes:
        weight: w, shape (H, C).
        bias: b, shape (H,).
        amplitude: :math:`\hat a` where the context is zero, shape (H,).
        drift: m, shape (C,).
        scale: :math:`\hat s` where the context is zero, shape ().
        context_weight: V, A, M and S one below the other, shape (2 H + C + 1, E), or None.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> import torch
        >>> potential = PixelwisePotential((1, 4, 4), 8, context_channels=3)
        >>> x, context = torch.randn(5, 1, 4, 4), torch.randn(5, 3 * 4 * 4)
        >>> potential(x, context=context).shape, potential.laplacian(x, context=context).shape
        (torch.Size([5]), torch.Size([5]))
    """

    features: int

    def __init__(
        self,
        shape: Sequence[int],
        hidden_features: int,
        *,
        context_channels: int | None = None,
        activation: str = "logcosh",
        stiffness: float = 10.0,
    ) -> None:
        super().__init__()
        self.shape = channels, height, width = validation.shape("shape", shape, 3)
        self.hidden_features = hidden = validation.integer("hidden_features", hidden_features)
        self.features = channels * height * width
        self.context_channels = validation.optional_integer("context_channels", context_channels)
        if context_channels is not None:
            self.context_features = context_channels * height * width
        self.activation = validation.choice("activation", activation, ACTIVATIONS)
        self.stiffness = validation.positive("stiffness", stiffness)
        self.weight = nn.Parameter(torch.empty(hidden, channels))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.amplitude = nn.Parameter(torch.empty(hidden))
        self.drift = nn.Parameter(torch.empty(channels))
        self.scale = nn.Parameter(torch.empty(()))
        self.context_weight = (
            None
            if context_channels is None
            else nn.Parameter(torch.empty(2 * hidden + channels + 1, context_channels))
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the ridges anew: unit vectors on average, all else zero but what moves offsets."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.shape[0]))
        nn.init.normal_(self.bias)
        for number in (self.amplitude, self.drift, self.scale):
            nn.init.zeros_(number)
        if self.context_weight is not None:
            nn.init.zeros_(self.context_weight)
            offsets = self.context_weight[: self.hidden_features]
            nn.init.normal_(offsets, std=1 / math.sqrt(offsets.shape[1]))

    @torch.no_grad()
    def initialize(self, data: Tensor, *, sharpness: float = 3.0) -> None:
        r"""Draw the ridges anew to suit data; all else stays as it is.

        Rows lie along the channels in turn, ``sharpness`` / s.d. of the data long, and bend at
        places that are spread evenly over the range of their channel.

        Args:
            data: images as the potential will meet them, shape (N, ...).
            sharpness: how much sharper than the data ridges start.

        Raises:
            TypeError, ValueError: for arguments that do not fit.
        """
        validation.batch("data", data, self.weight)
        if data.shape[1:].numel() != self.features:
            raise ValueError(
                f"data: got shape {tuple(data.shape)}, expected rows of {self.features} features"
            )
        channels = data.reshape(len(data), self.shape[0], -1).movedim(1, 0).flatten(1)
        low, high, spread = channels.amin(1), channels.amax(1), channels.std(1)
        if not bool((high > low).all()):
            raise ValueError(
                f"data: got the same number at all pixels of channel "
                f"{int((high > low).int().argmin())}, expected channels that vary"
            )
        number = torch.arange(self.hidden_features, device=data.device)
        channel, turn = number % self.shape[0], number // self.shape[0]
        share = (turn + 0.5) / math.ceil(self.hidden_features / self.shape[0])
        slope = validation.positive("sharpness", sharpness) / spread[channel]
        self.weight.zero_()
        self.weight[number, channel] = slope
        self.bias.copy_(-slope * (low[channel] + share * (high - low)[channel]))

    def dynamics(
        self, inputs: Tensor, context: Tensor | None, evaluations: int, costs: bool = False
    ) -> Dynamics:
        if costs:
            field: Field = self._gradient_and_laplacian
            return FieldDynamics(field, inputs, context, self, costs)
        return PixelwiseDynamics(self, inputs, context)

    def coefficients(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Offsets b_i, amplitudes a_i, drifts m_i and scales s_i.

        Shapes (H, P·B), (H, P·B), (C, P·B) and (1, P·B) for P pixels, or with a single column
        where there is no context.
        """
        constants = (self.bias, self.amplitude, self.drift, self.scale[None])
        total = torch.cat(constants)[:, None]
        if self.context_weight is not None and context is not None:
            maps = context.T.reshape(self.context_weight.shape[1], -1)
            total = torch.addmm(total, self.context_weight, maps)
        sizes = [len(constant) for constant in constants]
        offset, amplitude, drift, scale = total.split(sizes)
        lengths = self.weight.square().sum(1)[None]
        damping = 1 + (lengths @ amplitude.abs() + scale.abs()) / self.stiffness
        return offset, amplitude / damping, drift, scale / damping

    def _value(self, x: Tensor, t: Time | None, context: Tensor | None) -> Tensor:
        offset, amplitude, drift, scale = self.coefficients(context)
        points = x.flatten(1).T.reshape(self.shape[0], -1)
        sigma = ACTIVATIONS[self.activation].value(torch.addmm(offset, self.weight, points))
        parabola = 0.5 * scale * points.square().sum(0) + (drift * points).sum(0)
        return (parabola + (amplitude * sigma).sum(0)).view(-1, len(x)).sum(0)


class PixelwiseTensors(NamedTuple):
    """What the equations of motion are made of; N is the number of pixels of the batch, or 1.

    Attributes:
        weight: w, shape (H, C).
        lengths: the squared lengths of its rows, shape (1, H).
        offset: b, shape (H, N).
        amplitude: a, shape (H, N).
        drift: m, shape (C, N).
        scale: s, shape (1, N).
    """

    weight: Tensor
    lengths: Tensor
    offset: Tensor
    amplitude: Tensor
    drift: Tensor
    scale: Tensor


class PixelwiseDynamics(Dynamics):
    r"""The equations of motion of pixels that do not see each other: the state is [x; ℓ].

    .. math:: \dot x_i = W^T (a_i \odot \sigma'(h_i)) + s_i x_i + m_i, \qquad
              \dot\ell = \sum_i \bigl[ r \cdot (a_i \odot \sigma''(h_i)) + C s_i \bigr],
              \qquad h_i = W x_i + b_i.

    The Jacobian's product with an adjoint :math:`[\lambda; \lambda_\ell]` is
    :math:`W^T g_i + s_i \lambda_i` with :math:`g_i = a_i \odot (\sigma''(h_i) \odot W \lambda_i
    + \sigma^{(3)}(h_i) \odot r\, \lambda_\ell)`.
    """

    by_hand = True
    tensors: PixelwiseTensors

    def __init__(
        self, potential: PixelwisePotential, inputs: Tensor, context: Tensor | None
    ) -> None:
        self._activation: Activation = ACTIVATIONS[potential.activation]
        self._event_shape, self._channels = inputs.shape[1:], potential.shape[0]
        self.coordinates = potential.features
        self.state = start(inputs, 1)
        weight = potential.weight
        self.tensors = PixelwiseTensors(
            weight, weight.square().sum(1)[None], *potential.coefficients(context)
        )

    def rate(self, t: Time, state: Tensor) -> Tensor:
        weight, lengths, offset, amplitude, drift, scale = self.tensors
        x = self._pixels(state)
        p = self._activation.first(torch.addmm(offset, weight, x))
        velocity = torch.addcmul(drift, scale, x) + weight.T @ (amplitude * p)
        bend = lengths @ (amplitude * self._activation.second(p)) + self._channels * scale
        return self._columns(velocity, bend, state.shape[1])

    def stage(self, t: Time, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        weight, lengths, offset, amplitude, drift, scale = self.tensors
        x, (h, second, _, _) = self._pixels(state), self._room
        p = self._activation.first(torch.addmm(offset, weight, x, out=h), out=h)
        self._activation.second(p, out=second)
        velocity = torch.addcmul(drift, scale, x).addmm_(weight.T, p.mul_(amplitude))
        bend = torch.addmm(scale, lengths, second.mul_(amplitude), beta=self._channels)
        return self._columns(velocity, bend, state.shape[1]), (x,)

    def pullback(
        self,
        t: Time,
        kept: tuple[Tensor, ...],
        adjoint: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        (x,), activation = kept, self._activation
        weight, lengths, offset, amplitude, _, scale = self.tensors
        d_weight, d_lengths, d_offset, d_amplitude, d_drift, d_scale = gradients
        of_x, of_l = self._pixels(adjoint), None
        if len(adjoint) > self.coordinates:
            of_l = adjoint[self.coordinates :]
            if not self._single:  # the same for all pixels of an image
                of_l = of_l.expand(x.shape[1] // of_l.shape[1], -1).reshape(1, -1)
        h, second, force, bend = self._room
        p = activation.first(torch.addmm(offset, weight, x, out=h), out=h)
        torch.mm(weight, of_x, out=force)
        if d_amplitude is not None:
            _add(d_amplitude, force, p)
        bent = None if of_l is None else torch.mul(lengths.T, of_l, out=bend)
        activation.pull_back(p, force, bent, second)
        if of_l is not None and bent is not None:
            if d_amplitude is not None:
                _add(d_amplitude, bent, second)
            if d_lengths is not None:
                d_lengths.addmm_(of_l, second.mul_(amplitude).T)
        g = force.mul_(amplitude)
        if d_offset is not None:
            _add(d_offset, g)
        if d_weight is not None:
            d_weight.addmm_(p.mul_(amplitude), of_x.T).addmm_(g, x.T)
        if d_drift is not None:
            _add(d_drift, of_x)
        if d_scale is not None:
            along = of_x * x
            along = along if self._channels == 1 else along.sum(0, keepdim=True)
            _add(d_scale, along if of_l is None else along.add_(of_l, alpha=self._channels))
        back = torch.mul(scale, of_x).addmm_(weight.T, g)
        return back if self._single else back.view(self.coordinates, -1)

    def points(self, state: Tensor) -> Tensor:
        return as_rows(state[: self.coordinates], self._event_shape)

    @property
    def _single(self) -> bool:
        """Whether images are of one pixel, so that columns need not be rearranged."""
        return self.coordinates == self._channels

    def _pixels(self, columns: Tensor) -> Tensor:
        """The coordinates of images that are columns as those of pixels, shape (C, P·B)."""
        x = columns[: self.coordinates]
        return x if self._single else x.reshape(self._channels, -1)

    def _columns(self, velocity: Tensor, bend: Tensor, batch: int) -> Tensor:
        """What pixels do as what their images do, with the bends of a column added up."""
        if self._single:
            return torch.cat([velocity, bend.expand(1, batch)])
        laplacian = bend.expand(-1, velocity.shape[1]).reshape(-1, batch).sum(0, keepdim=True)
        return torch.cat([velocity.reshape(self.coordinates, batch), laplacian])

    @cached_property
    def _room(self) -> tuple[Tensor, ...]:
        """Room for what an evaluation makes of each ridge and pixel and does not keep."""
        pixels = self.coordinates // self._channels * self.state.shape[1]
        return self.state.new_empty(4, len(self.tensors.weight), pixels).unbind()


def _add(gradient: Tensor, factor: Tensor, other: Tensor | None = None) -> None:
    """Add products for each pixel to its own gradient, or to one that all share."""
    if gradient.shape[1] == factor.shape[1]:
        gradient.add_(factor) if other is None else gradient.addcmul_(factor, other)
    else:
        product = factor if other is None else factor * other
        gradient.add_(product.sum(1, keepdim=True))
