"""One file a reconstruction: how the surviving weights are repaired. See `compress.methods`."""

from compress.methods import Reconstruction
from compress.reconstruction.admm import ADMM
from compress.reconstruction.alps import ALPS
from compress.reconstruction.apt import APT
from compress.reconstruction.bias import BIAS
from compress.reconstruction.dsnot import DSNOT
from compress.reconstruction.none import NONE
from compress.reconstruction.r2_dsnot import R2_DSNOT
from compress.reconstruction.refit import REFIT
from compress.reconstruction.sparsegpt import SPARSEGPT
from compress.reconstruction.swaps import SWAPS

RECONSTRUCTIONS: dict[str, Reconstruction] = {
    method.name: method for method in (NONE, BIAS, SPARSEGPT, APT, DSNOT, R2_DSNOT, SWAPS, REFIT, ADMM, ALPS)
}

__all__ = ["ADMM", "ALPS", "APT", "BIAS", "DSNOT", "NONE", "R2_DSNOT", "RECONSTRUCTIONS", "REFIT", "SPARSEGPT", "SWAPS"]
