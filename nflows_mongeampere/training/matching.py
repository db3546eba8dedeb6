"""Flow matching: a potential learns the velocity of a path from noise to data, without a solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nflows_mongeampere import validation
from nflows_mongeampere.training.objectives import Objective
from nflows_mongeampere.training.scores import layers_towards_data
from nflows_mongeampere.transport import Transport

PAIRS = ("independent", "optimal_transport")


class FlowMatching(Objective):
    r"""Fits the velocity of a flow to straight lines from noise to data, without solving it.

    Noise :math:`x_0` and data :math:`x_1` are paired, and with :math:`\tau` uniform on [0, 1]

    .. math:: L = \langle | T \nabla u(x_\tau, \tau T) - (x_1 - x_0) |^2 \rangle, \qquad
              x_\tau = (1 - \tau) x_0 + \tau x_1 + s \varepsilon,

    where T is the ``time`` of the flow. The minimum is the mean velocity of all pairs that pass
    through a point; it carries noise into data. A flow so trained has its exact log-density, by
    ``log_prob``, as any other.

    With independent pairs that velocity is a gradient, so that a potential can represent it
    (see the theory page). Optimal transport within a batch pairs near points: the
    paths hardly cross, and few steps will do.

    A batch is a tensor, or a pair of tensors, data and context. The Monge-Ampère flow has to be
    next to the base distribution, and its potential has to depend on time. Layers between it and
    the data, which standardise or whiten, map the data and are not trained: a loss in their outputs
    would be least where these are all the same.

    In training the loss is the L above, which is no likelihood; ``val_loss`` and ``test_loss`` are
    mean negative log-densities in nats, as those of :class:`MaximumLikelihood`, so that
    :class:`SolverGuard` and the choice of the best weights work alike. The keywords are those of
    :class:`Objective` without penalties.

    Lipman et al., `arXiv:2210.02747 <https://arxiv.org/abs/2210.02747>`_; pairs and noise as Tong
    et al. have them, `arXiv:2302.00482 <https://arxiv.org/abs/2302.00482>`_.

    Args:
        flow: a flow of nflows or a model of normflows.
        pairs: ``"independent"``, or ``"optimal_transport"``, by which the squared distance of the
            pairs of a batch is least (an assignment by SciPy; its time grows as the cube of the
            rows).
        sigma: s, the standard deviation of noise about the lines.

    Raises:
        TypeError: if the flow is none.
        ValueError: if the flow has no Monge-Ampère flow next to its base, or one that stands still
            in time, or an argument does not fit.

    Example:
        >>> from nflows_mongeampere import MongeAmpereFlow
        >>> flow = MongeAmpereFlow(2, 16, time_dependent=True)
        >>> objective = FlowMatching(flow, pairs="optimal_transport", steps=100)
        >>> objective.losses(torch.randn(8, 2)).shape
        torch.Size([8])
    """

    first_advice = "Look at the data first: standardise the columns"

    def __init__(
        self,
        flow: nn.Module,
        *,
        pairs: str = "independent",
        sigma: float = 0.0,
        **keywords: Any,
    ) -> None:
        super().__init__(flow, **keywords)
        self.pairs = validation.choice("pairs", pairs, PAIRS)
        self.sigma = validation.number("sigma", sigma, minimum=0)
        if self.kinetic > 0 or self.roughness > 0:
            raise ValueError(
                f"kinetic, roughness: got {self.kinetic:g} and {self.roughness:g}, but no path is "
                "followed whose costs they could weigh; leave them 0"
            )
        transport = self._layers()[0][0]
        if not isinstance(transport, Transport):
            raise ValueError(
                f"flow: got a {type(transport).__name__} next to the base distribution, expected "
                "a MongeAmpereTransform (nflows: the last transform; normflows: the first flow)"
            )
        if not transport.potential.time_dependent:
            raise ValueError(
                "flow: got a potential that does not depend on time, as the velocity of a path "
                "from noise to data does; build it with time_dependent=True"
            )

    def losses(self, batch: Any) -> Tensor:
        data, context = self._embedded(batch)
        (transport, _), *outer = self._layers()
        with torch.no_grad():
            for layer, forward in reversed(outer):
                data = (layer.inverse if forward else layer)(data, *context)[0]
            noise = self._noise(data)
            if self.pairs == "optimal_transport":
                noise = paired(noise, data, context)
            tau = torch.rand(len(data), dtype=data.dtype, device=data.device)
            part = tau.view(-1, *[1] * (data.dim() - 1))
            x = (1 - part) * noise + part * data + self.sigma * torch.randn_like(data)
        self.entries = data[0].numel()
        velocity = transport.potential.gradient(x, tau * transport.time, *context)
        miss: Tensor = transport.time * velocity - (data - noise)
        return miss.flatten(1).square().sum(1)

    def predict_step(self, batch: Any, index: int) -> Tensor:
        """The log-density of each row, shape (B,)."""
        flow: Any = self.flow
        log_prob: Tensor = flow.log_prob(*(batch if isinstance(batch, (list, tuple)) else [batch]))
        return log_prob

    def _row_losses(self, batch: Any) -> Tensor:
        return -self.predict_step(batch, 0)

    def _layers(self) -> list[tuple[Any, bool]]:
        """The layers from noise to data, and whether each is taken by its ``forward``."""
        return [*layers_towards_data(self.flow)]

    def _embedded(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """Data, and the context if there is one, as the layers see it."""
        if not isinstance(batch, (list, tuple)):
            return batch, []
        data, *context = batch
        embed = getattr(self.flow, "_embedding_net", None)
        return data, context if embed is None else [embed(part) for part in context]

    @torch.no_grad()
    def _noise(self, data: Tensor) -> Tensor:
        """As many rows of the base distribution."""
        flow: Any = self.flow
        if hasattr(flow, "_distribution"):
            noise: Tensor = flow._distribution.sample(len(data))
        else:
            noise = flow.q0(len(data))[0]
        if noise.shape != data.shape:
            raise ValueError(
                f"flow: its base gave noise of shape {tuple(noise.shape)} for data of shape "
                f"{tuple(data.shape)}"
            )
        return noise.to(data)


def paired(noise: Tensor, data: Tensor, context: Sequence[Tensor] = ()) -> Tensor:
    """The noise in the order in which its squared distance from the data is least.

    Raises:
        ValueError: for data under a context, which such pairs would leave with a noise of its own.
    """
    if context:
        raise ValueError(
            "pairs: got 'optimal_transport' and a context: the noise would depend on it, while a "
            "flow draws the same for all; use pairs='independent'"
        )
    cost = torch.cdist(data.flatten(1).double(), noise.flatten(1).double()).square()
    _, order = linear_sum_assignment(cost.cpu().numpy())
    return noise[torch.as_tensor(order, device=noise.device)]
