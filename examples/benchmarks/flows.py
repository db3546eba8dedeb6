r"""The flows that the benchmarks compare, from five libraries, behind one interface.

To add a flow, add a line to :data:`FLOWS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any, TypeVar

import normflows
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow, MaskedAutoregressiveFlow, SimpleRealNVP
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    ActNorm,
    CompositeTransform,
    LULinear,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    PiecewiseRationalQuadraticCouplingTransform,
    ReversePermutation,
    Transform,
)
from torch import Tensor, nn

from nflows_mongeampere import (
    AutogradPotential,
    Bumps,
    DeepPotential,
    MongeAmpereCouplingTransform,
    MongeAmpereTransform,
    PixelwisePotential,
    RidgePotential,
)
from nflows_mongeampere.convergence import converged
from nflows_mongeampere.models import transports
from ot_flow import OTFlowPotential

# the widest data whose trace is exact in the test; wider ones leave it to Hutchinson's estimate
EXACT_FEATURES = 64
BINS, TAIL_BOUND = 8, 5.0

# features of the widest data whose coupling layers draw whole potentials
FEW = 8

Setting = TypeVar("Setting")


def standard_normal(z: Tensor) -> Tensor:
    """The log-density of rows of noise, shape (B,)."""
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


class Model(nn.Module):
    """What the benchmarks ask of a flow with a standard normal base, whatever its library.

    Attributes:
        features: D.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of each row, shape (B,)."""
        raise NotImplementedError

    def training_loss(self, x: Tensor) -> Tensor:
        """What is minimised on a batch: the likelihood, with the penalties that belong to it."""
        return -self.log_prob(x).mean()

    def sample(self, count: int) -> Tensor:
        """Samples, shape (count, D)."""
        return self.to_data(torch.randn(count, self.features))

    def to_noise(self, x: Tensor) -> Tensor:
        """Data to noise, shape (B, D)."""
        raise NotImplementedError

    def to_data(self, z: Tensor) -> Tensor:
        """Noise to data, shape (B, D)."""
        raise NotImplementedError

    def settle(self, points: Tensor) -> None:
        """Choose an accuracy at which the figures are those of the flow, not of its solver."""

    @property
    def evaluations(self) -> int:
        """How often the last call evaluated the velocity; 1 for flows that have none."""
        return 1


class Nflows(Model):
    """Transforms of nflows, ours among them, from data to noise."""

    def __init__(self, features: int, *transforms: Transform) -> None:
        super().__init__(features)
        self.flow = Flow(CompositeTransform(list(transforms)), StandardNormal([features]))

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob: Tensor = self.flow.log_prob(x)
        return log_prob

    def to_noise(self, x: Tensor) -> Tensor:
        noise: Tensor = self.flow.transform_to_noise(x)
        return noise

    def to_data(self, z: Tensor) -> Tensor:
        data: Tensor = self.flow._transform.inverse(z)[0]
        return data

    @torch.no_grad()
    def settle(self, points: Tensor) -> None:
        """Exact Laplacians where they are affordable; steps that halving would not change."""
        flows = transports(self)
        for module in self.modules():
            if isinstance(module, AutogradPotential) and points.shape[1] <= EXACT_FEATURES:
                module.laplacian_method = "exact"
        if not flows:
            return
        tolerance = max(1e-3, 2.5e-5 * points.shape[1])
        found = converged(self, lambda: self.log_prob(points).mean(), tolerance)
        for flow in flows:
            flow.steps *= found.factor

    @property
    def evaluations(self) -> int:
        return sum(flow.integrator.evaluations for flow in transports(self)) or 1


class OTFlow(Nflows):
    r"""OT-Flow with its own penalties, in the units of the likelihood.

    .. math:: \langle -\ln p(x) \rangle + \alpha_1 \int_0^1 \tfrac12 \|\nabla\Phi\|^2 d\tau
              + \alpha_2 \int_0^1 |\partial_\tau\Phi - \tfrac12 \|\nabla\Phi\|^2| d\tau

    Args:
        features: D.
        hidden: width of the potential.
        steps: of the classical Runge-Kutta method, which also takes the integrals.
        transport: :math:`\alpha_1`.
        residual: :math:`\alpha_2`.
    """

    def __init__(
        self, features: int, hidden: int, *, steps: int, transport: float, residual: float
    ) -> None:
        potential = OTFlowPotential(features, hidden)
        super().__init__(features, MongeAmpereTransform(potential, steps=steps))
        self.potential, self.weights = potential, (transport, residual)

    def training_loss(self, x: Tensor) -> Tensor:
        with self.potential.recording() as rates:
            loss = super().training_loss(x)
        steps = len(rates) // 4
        stages = loss.new_tensor([1 / 6, 1 / 3, 1 / 3, 1 / 6]).repeat(steps) / steps
        return loss + loss.new_tensor(self.weights) @ (stages @ torch.stack(rates))


class Normflows(Model):
    """Flows of normflows, from noise to data."""

    def __init__(self, features: int, *flows: normflows.flows.Flow) -> None:
        super().__init__(features)
        base = normflows.distributions.DiagGaussian(features, trainable=False)
        self.flow = normflows.NormalizingFlow(base, list(flows))

    def log_prob(self, x: Tensor) -> Tensor:
        if self.training:  # as normflows' examples do; without Lipschitz networks it does nothing
            normflows.utils.update_lipschitz(self.flow, 5)
        # the residual flow marks its input for autograd and keeps a graph, whatever the mode
        log_prob: Tensor = self.flow.log_prob(x.clone())
        return log_prob if torch.is_grad_enabled() else log_prob.detach()

    def to_noise(self, x: Tensor) -> Tensor:
        noise: Tensor = self.flow.inverse(x.clone())
        return noise.detach()

    def to_data(self, z: Tensor) -> Tensor:
        data: Tensor = self.flow(z.clone())
        return data.detach()


class Zuko(Model):
    """zuko's continuous flow, with its own adaptive solver and adjoint."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__(features)
        try:
            from zuko.flows import CNF  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                "this flow is zuko's, which is missing; install it with: "
                'pip install "nflows-mongeampere[examples]"'
            ) from error
        exact = features <= 2
        self.flow = CNF(features, hidden_features=(hidden, hidden), exact=exact)
        self._evaluations = 0
        self.flow.transform.ode.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self._evaluations += 1

    def _distribution(self) -> Any:
        self._evaluations = 0
        return self.flow()

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob: Tensor = self._distribution().log_prob(x)
        return log_prob

    def to_noise(self, x: Tensor) -> Tensor:
        noise: Tensor = self._distribution().transform(x)
        return noise

    def to_data(self, z: Tensor) -> Tensor:
        data: Tensor = self._distribution().transform.inv(z)
        return data

    def settle(self, points: Tensor) -> None:
        """The exact trace where it is affordable; zuko's tolerances are tight as they are."""
        self.flow.transform.exact = points.shape[1] <= EXACT_FEATURES

    @property
    def evaluations(self) -> int:
        return self._evaluations


class Torchflows(Model):
    r"""torchflows' OT-Flow, with the published steps and penalties.

    The divergence of its library is that of its velocity only as long as all of the outer weights
    are one, and its integrals of the penalties run backwards in time, which makes them rewards
    (1.2.1). It is trained with that divergence, with the penalties as published, and judged by the
    divergence of its velocity.

    Args:
        features: D.
        hidden: width of the potential.
        steps: of the classical Runge-Kutta method, in training.
        transport: :math:`\alpha_1`, as of :class:`OTFlow`.
        residual: :math:`\alpha_2`.
    """

    def __init__(
        self, features: int, hidden: int, *, steps: int, transport: float, residual: float
    ) -> None:
        super().__init__(features)
        try:
            from torchflows.bijections.continuous.otflow import (  # type: ignore[import-untyped]
                OTFlowBijection,
            )
        except ImportError as error:
            raise ImportError(
                "this flow is torchflows', which is missing; install it with: "
                'pip install "nflows-mongeampere[examples]"'
            ) from error
        penalties = {"reg_transport_coef": transport, "reg_hjb_coef": residual}
        settings = {"hidden_size": hidden, **penalties}
        self.flow = OTFlowBijection((features,), time_derivative_kwargs=settings)
        self.steps = steps

    def _to_noise(
        self, x: Tensor, *, penalties: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Noise, the log-density, and the integrals of the penalties."""
        options = {"step_size": 1 / self.steps}
        z, log_det, *costs = self.flow.forward(x, return_aux=penalties, options=options)
        return z, standard_normal(z) + log_det, costs

    def log_prob(self, x: Tensor) -> Tensor:
        return self._to_noise(x.clone())[1]

    def training_loss(self, x: Tensor) -> Tensor:
        _, log_prob, costs = self._to_noise(x.clone(), penalties=True)
        penalty: Tensor = self.flow.regularization(*(-cost for cost in costs))
        return penalty - log_prob.mean()

    def to_noise(self, x: Tensor) -> Tensor:
        return self._to_noise(x.clone())[0]

    def to_data(self, z: Tensor) -> Tensor:
        options = {"step_size": 1 / self.steps}
        data: Tensor = self.flow.inverse(z.clone(), options=options)[0]
        return data

    def settle(self, points: Tensor) -> None:
        """The divergence of its velocity, and many steps."""
        potential = self.flow.f.time_deriv

        def divergence(s: Tensor, **_: Tensor) -> Tensor:
            with torch.enable_grad():
                s = s.detach().requires_grad_()
                slope = potential.gradient(s)[0]
                rows = [
                    torch.autograd.grad(slope[:, i].sum(), s, retain_graph=True)[0][:, i]
                    for i in range(self.features)
                ]
            return -torch.stack(rows).sum(0)

        potential.compute_divergence = divergence
        self.steps *= 8

    @property
    def evaluations(self) -> int:
        return 4 * self.steps


class Torchdyn(Model):
    """torchdyn's continuous flow with one of its trace estimators, as in torchdyn's tutorial.

    Args:
        features: D.
        hidden: width of the two hidden layers.
        exact: ``autograd_trace``, or ``hutch_trace`` with normal probes.
    """

    def __init__(self, features: int, hidden: int, *, exact: bool) -> None:
        super().__init__(features)
        from torchdyn.core import NeuralODE  # imports slowly
        from torchdyn.models import CNF, autograd_trace, hutch_trace
        from torchdyn.nn import DepthCat

        self._exact_trace = autograd_trace
        velocity = nn.Sequential(
            *(DepthCat(1), nn.Linear(features + 1, hidden), nn.Softplus()),
            *(DepthCat(1), nn.Linear(hidden + 1, hidden), nn.Softplus()),
            *(DepthCat(1), nn.Linear(hidden + 1, features)),
        )
        probes = torch.distributions.MultivariateNormal(torch.zeros(features), torch.eye(features))
        self._flow = CNF(velocity, autograd_trace if exact else hutch_trace, probes)
        with redirect_stdout(StringIO()):  # it tells that it wraps its own CNF
            self._ode = NeuralODE(
                self._flow, solver="dopri5", sensitivity="autograd", atol=1e-4, rtol=1e-4
            )

    def _solve(self, x: Tensor, start: float, stop: float) -> tuple[Tensor, Tensor]:
        r"""The points at ``stop``, and :math:`-\int \nabla \cdot f\, dt` on the way."""
        self._ode.vf.nfe = 0
        state = torch.cat([x.new_zeros(len(x), 1), x], dim=1)
        _, states = self._ode(state, torch.tensor([start, stop]))
        return states[-1][:, 1:], states[-1][:, 0]

    def log_prob(self, x: Tensor) -> Tensor:
        z, minus_trace = self._solve(x, 0.0, 1.0)
        return standard_normal(z) - minus_trace

    def to_noise(self, x: Tensor) -> Tensor:
        return self._solve(x, 0.0, 1.0)[0]

    def to_data(self, z: Tensor) -> Tensor:
        return self._solve(z, 1.0, 0.0)[0]

    def settle(self, points: Tensor) -> None:
        """The exact trace where it is affordable, and a tighter tolerance."""
        self._ode.atol = self._ode.rtol = 1e-5
        if points.shape[1] <= EXACT_FEATURES:
            self._flow.trace_estimator = self._exact_trace

    @property
    def evaluations(self) -> int:
        return int(self._ode.vf.nfe)


def ridge(features: int, hidden: int, *, transforms: int = 1, moving: bool = False) -> Nflows:
    """Monge-Ampère flows with ridge potentials, in a row.

    Ridges start as sharp as the data need: thin shapes in the plane, whitened pixels in images.
    """
    flows = []
    for _ in range(transforms):
        potential = RidgePotential(features, hidden // transforms, time_dependent=moving)
        with torch.no_grad():
            if features == 2:
                for parameter in (potential.weight, potential.bias):
                    assert parameter is not None
                    parameter.mul_(6.0)
            else:
                axes = min(features, len(potential.weight))
                potential.weight[:axes] = torch.eye(features)[:axes]
        steps = 4 if features <= EXACT_FEATURES else 3
        flows.append(MongeAmpereTransform(potential, time=1.0, steps=max(2, steps // transforms)))
    return Nflows(features, *flows)


def deep(features: int, hidden: int) -> Nflows:
    """A Monge-Ampère flow with a potential of three hidden layers."""
    return Nflows(features, MongeAmpereTransform(DeepPotential(features, [hidden] * 3), steps=4))


def coupling(features: int, hidden: int) -> Nflows:
    """Coupling layers, each of which moves half of the features in what a network says of the rest.

    Where rows are endless the network draws all of the potential, see :func:`drawn_coupling`. Of
    many features there are few images: the network draws the offsets of ridges alone, and forgets
    half of its units in training, because it is what learns by heart.
    """
    if features <= FEW:
        return drawn_coupling(features, hidden)

    def network(passing: int, outputs: int) -> nn.Module:
        first = [nn.Linear(passing, 64), nn.SiLU(), nn.Dropout(0.5)]
        return nn.Sequential(*first, nn.Linear(64, outputs), nn.SiLU())

    layers = []
    for mask in halves(features):
        moving = int(mask.sum())
        potential = RidgePotential(moving, hidden, context_features=64)
        potential.initialize(torch.randn(500, moving))
        layers.append(MongeAmpereCouplingTransform(mask, network, potential, steps=2))
    return Nflows(features, *layers)


def drawn_coupling(features: int, hidden: int) -> Nflows:
    """Coupling layers whose networks draw a potential of its own for each feature that moves.

    Networks and ridges start sharp. Of more than two features they have a layer more.
    """
    width, maps = (64, 12) if features == 2 else (128, 16)

    def network(passing: int, outputs: int) -> nn.Module:
        inner = [] if features == 2 else [nn.Linear(width, width), nn.SiLU()]
        return nn.Sequential(
            Bumps(passing, width, sharpness=3.0 if features == 2 else 1.0),
            *(*inner, nn.Linear(width, outputs), nn.SiLU()),
        )

    layers = []
    for mask in halves(features):
        moving = int(mask.sum())
        potential = PixelwisePotential((1, 1, moving), hidden, context_channels=maps, stiffness=8.0)
        potential.initialize(torch.randn(500, moving), sharpness=5.0)
        layers.append(MongeAmpereCouplingTransform(mask, network, potential, steps=2))
    return Nflows(features, *layers)


def halves(features: int) -> list[Tensor]:
    """Which features move in each of four layers: every second one, then every second pair."""
    places = torch.arange(features)
    pairs = 2 if features > 2 else 1
    return [(places // size % 2 == i % 2).int() for i, size in enumerate((1, 1, pairs, pairs))]


class Potential(nn.Module):
    r"""A small network :math:`u(x, t)`, which starts at zero."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features + 1, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.outer = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(self.inner(torch.cat([x, t.expand(len(x), 1)], dim=1)))
        # a residual layer, so that the potential is no shallower function for being deeper
        h = h + torch.tanh(self.middle(h))
        potential: Tensor = self.outer(h).squeeze(1)
        return potential


def network(features: int, hidden: int) -> Nflows:
    """A Monge-Ampère flow whose potential is a small network, differentiated by autograd."""
    laplacian = "exact" if features <= 2 else "hutchinson"
    potential = AutogradPotential(Potential(features, hidden), laplacian=laplacian)
    return Nflows(features, MongeAmpereTransform(potential, steps=4))


# of the published trainings: steps, and the weights of the transport cost and the residual for each
# unit of likelihood, up to so many features (toys, POWER, GAS, HEPMASS, MINIBOONE, BSDS300)
OT_FLOW = {
    2: (8, 1 / 100, 5 / 100),
    6: (10, 1 / 500, 5 / 500),
    8: (10, 1 / 1200, 40 / 1200),
    21: (12, 1 / 500, 40 / 500),
    43: (6, 1 / 100, 15 / 100),
    64: (14, 1 / 2000, 800 / 2000),
}


def ot_flow(kind: type[OTFlow] | type[Torchflows], features: int, hidden: int) -> Model:
    """OT-Flow as published for the data with the next number of features."""
    steps, transport, residual = smallest(OT_FLOW, features)
    return kind(features, hidden, steps=steps, transport=transport, residual=residual)


def behind_linear(build: Callable[[int, int], Nflows]) -> Callable[[int, int], Nflows]:
    """A flow of nflows behind a trained linear layer, as its users have it: LU, or scales alone.

    The scales of nflows' coupling layers are at most 1.001: alone they cannot widen narrow data.
    """

    def behind(features: int, hidden: int) -> Nflows:
        front = LULinear(features) if features <= EXACT_FEATURES else ActNorm(features)
        return Nflows(features, front, build(features, hidden).flow._transform)

    return behind


def realnvp(features: int, hidden: int) -> Nflows:
    """Affine coupling layers of nflows."""
    layers = 8 if features == 2 else 5
    return Nflows(features, SimpleRealNVP(features, hidden, layers, 2)._transform)


def maf(features: int, hidden: int) -> Nflows:
    """Affine autoregressive layers of nflows."""
    return Nflows(features, MaskedAutoregressiveFlow(features, hidden, 5, 2)._transform)


def spline_coupling(features: int, hidden: int) -> Nflows:
    """Rational-quadratic coupling layers of nflows."""
    layers: list[Transform] = []
    for i in range(6 if features == 2 else 4):
        layers.append(
            PiecewiseRationalQuadraticCouplingTransform(
                (torch.arange(features) % 2 == i % 2).int(),
                lambda inputs, outputs: ResidualNet(inputs, outputs, hidden, num_blocks=2),
                num_bins=BINS,
                tails="linear",
                tail_bound=TAIL_BOUND,
            )
        )
    return Nflows(features, *layers)


def spline_autoregressive(features: int, hidden: int) -> Nflows:
    """Rational-quadratic autoregressive layers of nflows."""
    layers: list[Transform] = []
    for _ in range(4 if features == 2 else 2):
        layers += [
            ReversePermutation(features),
            MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                features,
                hidden,
                num_bins=BINS,
                tails="linear",
                tail_bound=TAIL_BOUND,
                num_blocks=2,
            ),
        ]
    return Nflows(features, *layers)


def normflows_realnvp(features: int, hidden: int) -> Model:
    """Affine coupling blocks of normflows, as in its README."""
    flows = []
    for _ in range(16 if features == 2 else 6):
        # the first part is the larger one
        sizes = [(features + 1) // 2, hidden, hidden, features // 2 * 2]
        network = normflows.nets.MLP(sizes, init_zeros=True)
        flows.append(normflows.flows.AffineCouplingBlock(network))
        flows.append(normflows.flows.Permute(features, mode="swap"))
    return Normflows(features, *flows)


def normflows_residual(features: int, hidden: int) -> Model:
    """Invertible residual blocks of normflows, as in its example of them."""
    flows = []
    for _ in range(8 if features == 2 else 4):
        sizes = [features, hidden, hidden, features]
        network = normflows.nets.LipschitzMLP(sizes, lipschitz_const=0.9, init_zeros=True)
        flows.append(normflows.flows.Residual(network, reduce_memory=True))
        flows.append(normflows.flows.ActNorm(features))
    return Normflows(features, *flows)


def normflows_spline(features: int, hidden: int) -> Model:
    """Rational-quadratic coupling and linear blocks of normflows, in turns as in its example."""
    flows = []
    for _ in range(4 if features <= EXACT_FEATURES else 3):
        flows.append(
            normflows.flows.CoupledRationalQuadraticSpline(
                features, 2, hidden, num_bins=BINS, tail_bound=TAIL_BOUND
            )
        )
        flows.append(normflows.flows.LULinearPermute(features))
    return Normflows(features, *flows)


def smallest(settings: Mapping[int, Setting], features: int) -> Setting:
    """The setting for the smallest number of features that is no smaller than this one."""
    return settings[min(size for size in settings if size >= features)]


@dataclass(frozen=True)
class Architecture:
    """A flow to compare.

    Attributes:
        title: how tables call it.
        build: makes it from the number of features and the width of its hidden layers.
        widths: of the hidden layers, for data of up to so many features; beyond, the flow cannot be
            trained within minutes.
        least: the fewest features that it is meant for.
    """

    title: str
    build: Callable[[int, int], Model]
    widths: Mapping[int, int]
    least: int = 1

    def fits(self, features: int) -> bool:
        """Whether it can be trained on data of so many features."""
        return self.least <= features <= max(self.widths)

    def make(self, features: int) -> Model:
        """The flow at the size of the comparison."""
        return self.build(features, smallest(self.widths, features))


NETWORKS = {2: 64, 64: 128, 784: 512}
RIDGES = {2: 128, 64: 512, 784: 1024}


FLOWS = {
    "ridge": Architecture("Monge-Ampère", ridge, RIDGES),
    "moving": Architecture("Monge-Ampère, time-dependent", partial(ridge, moving=True), RIDGES),
    "stacked": Architecture("Monge-Ampère, two in a row", partial(ridge, transforms=2), RIDGES),
    "deep": Architecture("Monge-Ampère, deep", deep, {8: 32}),
    "coupling": Architecture(
        "Monge-Ampère coupling",
        behind_linear(coupling),
        {2: 24, FEW: 32, 64: 128, 784: 512},
        least=2,
    ),
    "network": Architecture("Monge-Ampère, network", network, NETWORKS),
    "ot-flow": Architecture("OT-Flow", partial(ot_flow, OTFlow), {2: 32, 64: 64}),
    "torchflows": Architecture("torchflows OT-Flow", partial(ot_flow, Torchflows), {2: 32}),
    "realnvp": Architecture("nflows RealNVP", behind_linear(realnvp), NETWORKS),
    "maf": Architecture("nflows MAF", behind_linear(maf), NETWORKS),
    "spline-coupling": Architecture("nflows RQ coupling", behind_linear(spline_coupling), NETWORKS),
    "spline-autoregressive": Architecture(
        "nflows RQ autoregressive", behind_linear(spline_autoregressive), NETWORKS
    ),
    "normflows-realnvp": Architecture("normflows real NVP", normflows_realnvp, NETWORKS),
    "normflows-residual": Architecture("normflows residual", normflows_residual, NETWORKS),
    "normflows-spline": Architecture("normflows neural spline", normflows_spline, NETWORKS),
    "zuko": Architecture("zuko CNF", Zuko, NETWORKS),
    "torchdyn-hutchinson": Architecture(
        "torchdyn CNF, Hutchinson", partial(Torchdyn, exact=False), NETWORKS
    ),
    "torchdyn-exact": Architecture(
        "torchdyn CNF, exact trace", partial(Torchdyn, exact=True), {2: 64, 64: 128}
    ),
}
