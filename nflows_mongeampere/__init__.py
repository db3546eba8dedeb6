"""The Monge-Ampère flow for nflows and normflows, integrated by torchdyn."""

from nflows_mongeampere.flow import MongeAmpereFlow
from nflows_mongeampere.integration import IntegrationError, Integrator
from nflows_mongeampere.potentials import AutogradPotential, Potential, RidgePotential
from nflows_mongeampere.transform import MongeAmpereTransform
from nflows_mongeampere.transport import Trajectory
from nflows_mongeampere.version import __version__

__all__ = [
    "AutogradPotential",
    "IntegrationError",
    "Integrator",
    "MongeAmpereFlow",
    "MongeAmpereTransform",
    "Potential",
    "RidgePotential",
    "Trajectory",
    "__version__",
]
