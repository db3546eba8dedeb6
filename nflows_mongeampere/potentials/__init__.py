"""Scalar potentials: value, gradient, Laplacian."""

from nflows_mongeampere.potentials.autograd import AutogradPotential
from nflows_mongeampere.potentials.base import Potential
from nflows_mongeampere.potentials.convolutional import ConvolutionalPotential
from nflows_mongeampere.potentials.deep import DeepPotential
from nflows_mongeampere.potentials.deep_convolutional import DeepConvolutionalPotential
from nflows_mongeampere.potentials.grouped import GroupedPotential
from nflows_mongeampere.potentials.lattice import LatticePotential
from nflows_mongeampere.potentials.pixelwise import PixelwisePotential
from nflows_mongeampere.potentials.ridge import RidgePotential
from nflows_mongeampere.potentials.symmetrized import SymmetrizedPotential

__all__ = [
    "AutogradPotential",
    "ConvolutionalPotential",
    "DeepConvolutionalPotential",
    "DeepPotential",
    "GroupedPotential",
    "LatticePotential",
    "PixelwisePotential",
    "Potential",
    "RidgePotential",
    "SymmetrizedPotential",
]
