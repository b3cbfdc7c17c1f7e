"""One file a reconstruction: how the surviving weights are repaired. See `compress.methods`."""

from compress.methods import Reconstruction
from compress.reconstruction.apt import APT
from compress.reconstruction.none import NONE
from compress.reconstruction.sparsegpt import SPARSEGPT

RECONSTRUCTIONS: dict[str, Reconstruction] = {method.name: method for method in (NONE, SPARSEGPT, APT)}

__all__ = ["APT", "NONE", "RECONSTRUCTIONS", "SPARSEGPT"]
