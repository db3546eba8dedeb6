"""Integration of the equations of motion by torchdyn's solvers, and its gradients."""

from nflows_mongeampere.integration.errors import IntegrationError
from nflows_mongeampere.integration.integrator import SENSITIVITIES, Integrator, Solve

__all__ = ["SENSITIVITIES", "IntegrationError", "Integrator", "Solve"]
