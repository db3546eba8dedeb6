"""The Monge-Ampère flow for nflows and normflows, integrated by torchdyn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nflows_mongeampere.accuracy import AccuracyWarning, ErrorEstimate, StepChoice
from nflows_mongeampere.costs import TransportCosts
from nflows_mongeampere.coupling import Bumps, MongeAmpereCouplingTransform
from nflows_mongeampere.groups import Group
from nflows_mongeampere.integration import IntegrationError, Integrator
from nflows_mongeampere.models import refined, transport_costs
from nflows_mongeampere.potentials import (
    AutogradPotential,
    ConvolutionalPotential,
    DeepConvolutionalPotential,
    DeepPotential,
    GroupedPotential,
    LatticePotential,
    PixelwisePotential,
    Potential,
    RidgePotential,
    SymmetrizedPotential,
)
from nflows_mongeampere.transform import MongeAmpereTransform
from nflows_mongeampere.transport import Trajectory
from nflows_mongeampere.version import __version__

if TYPE_CHECKING:
    from nflows_mongeampere.flow import MongeAmpereFlow

__all__ = [
    "AccuracyWarning",
    "AutogradPotential",
    "Bumps",
    "ConvolutionalPotential",
    "DeepConvolutionalPotential",
    "DeepPotential",
    "ErrorEstimate",
    "Group",
    "GroupedPotential",
    "IntegrationError",
    "Integrator",
    "LatticePotential",
    "MongeAmpereCouplingTransform",
    "MongeAmpereFlow",
    "MongeAmpereTransform",
    "PixelwisePotential",
    "Potential",
    "RidgePotential",
    "StepChoice",
    "SymmetrizedPotential",
    "Trajectory",
    "TransportCosts",
    "__version__",
    "refined",
    "transport_costs",
]


def __getattr__(name: str) -> Any:
    """Import :class:`MongeAmpereFlow` where it is first used: nflows' flows load Matplotlib."""
    if name == "MongeAmpereFlow":
        from nflows_mongeampere.flow import MongeAmpereFlow

        return MongeAmpereFlow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
