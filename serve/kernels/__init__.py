"""One function, `sparse24_linear`, over several backends, and the choice between them, with its reason."""

from serve.kernels.dispatch import BACKENDS, Backend, Choice, able, choose, sparse24_linear

__all__ = ["BACKENDS", "Backend", "Choice", "able", "choose", "sparse24_linear"]
