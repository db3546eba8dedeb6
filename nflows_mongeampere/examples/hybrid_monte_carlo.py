"""Hybrid Monte Carlo of fields on a lattice, many chains at once, to compare flows with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from nflows_mongeampere.variational import Estimate

# Trajectories of this length, in as many steps as keep the acceptance above the rate.
LENGTH, ACCEPTANCE = 1.5, 0.8

# A field this large is the leapfrog's, which steps too far.
RUNAWAY = 1e3


class HybridMonteCarlo:
    r"""Chains that follow Hamilton's equations of an action with random momenta.

    .. math:: \dot\phi = p, \qquad \dot p = -\partial S / \partial \phi

    by the leapfrog method, each trajectory accepted with probability
    :math:`\min(1, e^{-\Delta H})`. Duane, Kennedy, Pendleton and Roweth, Phys. Lett. B 195, 216
    (1987).

    Args:
        target: an object with ``log_prob``, :math:`-S`, and the number of its ``sites``.
        chains: how many run side by side.
        warm_up: trajectories before the first that counts; their steps are chosen in these.
        seed: of everything that is random.
        between: an update of all fields, shape (B, D), that keeps their distribution, after each
            trajectory: :func:`flip_clusters`, say.

    Attributes:
        acceptance: of the last trajectories that were measured.
    """

    def __init__(
        self,
        target: Any,
        chains: int = 200,
        warm_up: int = 300,
        seed: int = 0,
        between: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        self._target, self._generator = target, torch.Generator().manual_seed(seed)
        self._between = between
        self._phi = 0.3 * self._normal(chains, target.sites)
        self._steps, self.acceptance = 12, math.nan
        for number in range(warm_up):
            rate = self._trajectory()
            if number < warm_up // 2 and number % 5 == 4:
                if rate < ACCEPTANCE:
                    self._steps = math.ceil(1.3 * self._steps)
                elif rate > 0.95 and self._steps > 3:
                    self._steps -= 1

    def measure(
        self, observables: Callable[[Tensor], Tensor], trajectories: int = 300
    ) -> list[Estimate]:
        """Means along all chains, with errors from the spread between chains.

        Args:
            observables: of fields (B, D), shape (B, K).
            trajectories: of each chain.
        """
        total, accepted = torch.zeros(()), 0.0
        for _ in range(trajectories):
            accepted += self._trajectory() / trajectories
            total = total + observables(self._phi).double() / trajectories
        self.acceptance = accepted
        errors = total.std(0) / math.sqrt(len(total))
        return [
            Estimate(*pair) for pair in zip(total.mean(0).tolist(), errors.tolist(), strict=True)
        ]

    def _trajectory(self) -> float:
        phi, momentum = self._phi, self._normal(*self._phi.shape)
        # lengths that differ keep modes from coming round to where they were
        length = LENGTH * (0.75 + 0.5 * float(torch.rand((), generator=self._generator)))
        dt = length / self._steps
        log_prob, force = self._force(phi)
        before = log_prob - momentum.square().sum(1) / 2
        kept = torch.ones(len(phi), dtype=torch.bool)
        for _ in range(self._steps):
            momentum = momentum + dt / 2 * force
            moved = phi + dt * momentum
            kept &= moved.abs().amax(1) < RUNAWAY
            phi = torch.where(kept[:, None], moved, phi)
            log_prob, force = self._force(phi)
            momentum = momentum + dt / 2 * force
        change = log_prob - momentum.square().sum(1) / 2 - before
        accepted = kept & (torch.rand(len(phi), generator=self._generator) < change.exp())
        self._phi = torch.where(accepted[:, None], phi, self._phi)
        if self._between is not None:
            self._phi = self._between(self._phi, self._generator)
        return float(accepted.double().mean())

    def _force(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        phi = phi.detach().requires_grad_()
        with torch.enable_grad():
            log_prob = self._target.log_prob(phi)
        return log_prob.detach(), torch.autograd.grad(log_prob.sum(), phi)[0]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def flip_clusters(phi: Tensor, generator: torch.Generator) -> Tensor:
    r"""Flip clusters of the signs of φ⁴ fields on periodic square lattices.

    The signs are spins of an Ising model with couplings :math:`2 |\phi_x \phi_y|`, which the
    clusters of Swendsen and Wang update: neighbours of one sign belong together with probability
    :math:`1 - e^{-4 \phi_x \phi_y}`, and each cluster takes either sign. Hybrid Monte Carlo alone
    takes hundreds of trajectories to turn a field of 64 sites a side. Brower and Tamayo,
    Phys. Rev. Lett. 62, 1087 (1989).

    Args:
        phi: fields with :math:`\ln \pi = 2 \sum \phi_x \phi_y + \ldots`, shape (B, L²).
        generator: of what is random.
    """
    length = math.isqrt(phi.shape[1])
    fields, sites = phi.view(-1, length, length), torch.arange(phi.numel()).view(-1, length, length)
    ends: list[tuple[Tensor, Tensor]] = []
    for axis in (1, 2):
        stick = -torch.expm1(-4 * fields * fields.roll(-1, axis))  # negative for unlike signs
        bonds = torch.rand(stick.shape, generator=generator) < stick
        ends.append((sites[bonds], sites.roll(-1, axis)[bonds]))
    heads, tails = (torch.cat(part).numpy() for part in zip(*ends, strict=True))
    shape = (phi.numel(), phi.numel())
    graph = coo_array((np.ones(len(heads), np.int8), (heads, tails)), shape)
    count, cluster = connected_components(graph, directed=False)
    signs = 2 * torch.randint(2, (count,), generator=generator) - 1
    return phi * signs[torch.from_numpy(cluster).long()].view_as(phi)
