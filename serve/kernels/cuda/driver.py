"""What is needed of the CUDA driver's C interface: load code, look at kernels, launch them.

By ctypes, because a launch has to take a few microseconds and these are six functions. Structures are those of ``cuda.h``.
Calls work on the context of the calling thread, which is torch's once torch has used the device in it. In a thread where it has not,
a launch is refused, and then made in the context in which the kernel was loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_int, c_uint, c_void_p
from functools import cache

_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NO_CONTEXT = (201, 400)  # CUDA_ERROR_INVALID_CONTEXT, and INVALID_HANDLE: another context is current than the kernel's


class DriverError(Exception):
    """The driver is not there, or refused; one line that says what."""


class _Cluster(Structure):
    _fields_ = (("x", c_uint), ("y", c_uint), ("z", c_uint))


class _AttributeValue(ctypes.Union):
    _fields_ = (("pad", c_char * 64), ("cluster", _Cluster), ("number", c_int))


class Attribute(Structure):
    """``CUlaunchAttribute``"""

    _fields_ = (("id", c_int), ("pad", c_char * 4), ("value", _AttributeValue))


class Config(Structure):
    """``CUlaunchConfig``"""

    _fields_ = (
        ("grid_x", c_uint),
        ("grid_y", c_uint),
        ("grid_z", c_uint),
        ("block_x", c_uint),
        ("block_y", c_uint),
        ("block_z", c_uint),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(Attribute)),
        ("attribute_count", c_uint),
    )


def config(grid: int, threads: int, shared_bytes: int, *, cluster: int = 1, overlap: bool = False) -> Config:
    """How to launch, without the stream.

    Args:
        cluster: blocks in a cluster.
        overlap: the kernel may begin before the one in front of it on the stream has ended (programmatic dependent
            launch); it has to wait by itself, as `sparse24.cu` does.
    """
    attributes = []
    if cluster > 1:
        attributes.append(Attribute(_CLUSTER_DIMENSION, b"", _AttributeValue(cluster=_Cluster(cluster, 1, 1))))
    if overlap:
        attributes.append(Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, b"", _AttributeValue(number=1)))
    array = (Attribute * len(attributes))(*attributes)
    return Config(grid, 1, 1, threads, 1, 1, shared_bytes, None, array, len(attributes))


class Driver:
    """The driver's library. `default` is the one to use; a test has one of its own."""

    def __init__(self, path: str) -> None:
        """Raises DriverError: there is no such library, or it is too old."""
        try:
            library = ctypes.CDLL(path)
            # The lock is kept: a launch takes less time than to give it away and get it back.
            self._launch = ctypes.PyDLL(path).cuLaunchKernelEx
            self._load, self._function = library.cuModuleLoadData, library.cuModuleGetFunction
            self._set, self._clusters = library.cuFuncSetAttribute, library.cuOccupancyMaxActiveClusters
            self._get_context, self._set_context = library.cuCtxGetCurrent, library.cuCtxSetCurrent
            self._name = library.cuGetErrorName
        except OSError as error:
            raise DriverError(f"the NVIDIA driver's library {path} cannot be loaded: {error}") from error
        except AttributeError as error:
            raise DriverError(f"the NVIDIA driver is too old (CUDA 11.8 is the first that does): {error}") from error
        self._launch.argtypes = (POINTER(Config), c_void_p, POINTER(c_void_p), c_void_p)
        self._load.argtypes = (POINTER(c_void_p), c_char_p)
        self._function.argtypes = (POINTER(c_void_p), c_void_p, c_char_p)
        self._set.argtypes = (c_void_p, c_int, c_int)
        self._clusters.argtypes = (POINTER(c_int), c_void_p, POINTER(Config))
        self._get_context.argtypes = (POINTER(c_void_p),)
        self._set_context.argtypes = (c_void_p,)
        self._name.argtypes = (c_int, POINTER(c_char_p))
        self._contexts: dict[int, c_void_p] = {}  # in which kernels were loaded

    def load(self, cubin: bytes, names: Sequence[str]) -> dict[str, int]:
        """The kernels with those names in some code. They stay loaded for the life of the process.

        Raises:
            DriverError: the code is not for this device, or there are no such kernels.
        """
        module, context = c_void_p(), c_void_p()
        self._check(self._get_context(byref(context)), "say which context is current")
        self._check(self._load(byref(module), cubin), "load the compiled kernels")
        kernels = {}
        for name in names:
            function = c_void_p()
            self._check(self._function(byref(function), module, name.encode()), f"find the kernel {name}")
            assert function.value is not None
            kernels[name] = function.value
            self._contexts[function.value] = context
        return kernels

    def allow_shared_bytes(self, kernel: int, shared_bytes: int) -> None:
        """Lets a kernel be launched with that much shared memory. Raises DriverError: the device has less."""
        refusal = self._set(kernel, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
        self._check(refusal, f"give a kernel {shared_bytes} bytes of shared memory")

    def clusters_at_once(self, kernel: int, how: Config) -> int:
        """How many such clusters the device runs at the same time; 0 where it does not take them."""
        found = c_int()
        return found.value if self._clusters(byref(found), kernel, byref(how)) == 0 else 0

    def launch(self, kernel: int, how: Config, stream: int, arguments: Structure) -> None:
        """Puts a kernel with one structure as its only parameter on a stream.

        Raises:
            DriverError: the driver refused.
        """
        # A copy, because another thread may launch the same at the same time; the driver is done with all of it on return.
        now = Config.from_buffer_copy(how)
        now.stream = stream
        pointers = (c_void_p * 1)(ctypes.addressof(arguments))
        refusal = self._launch(byref(now), kernel, pointers, None)
        if refusal in _NO_CONTEXT and self._set_context(self._contexts.get(kernel)) == 0:
            refusal = self._launch(byref(now), kernel, pointers, None)
        if refusal:
            self._check(refusal, "launch a kernel")

    def _check(self, refusal: int, doing: str) -> None:
        if refusal:
            name = c_char_p()
            known = self._name(refusal, byref(name)) == 0 and name.value is not None
            raise DriverError(
                f"the driver could not {doing}: {name.value.decode() if known and name.value else refusal}"
            )


@cache
def default() -> Driver:
    """The driver of this system. Raises DriverError."""
    return Driver("libcuda.so.1")
