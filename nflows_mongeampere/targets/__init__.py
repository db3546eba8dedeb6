"""Densities of lattice fields, as targets of normflows and of variational training."""

from nflows_mongeampere.targets.action import LatticeAction
from nflows_mongeampere.targets.ising import CRITICAL_TEMPERATURE, Ising
from nflows_mongeampere.targets.phi4 import Phi4

__all__ = ["CRITICAL_TEMPERATURE", "Ising", "LatticeAction", "Phi4"]
