"""GPUs that need not be here: what their makers say of them, and the roofline that an estimate is made of.

Figures are the ones of the data sheets: peak bytes a second of the memory, peak 16-bit operations a second of the tensor
cores without sparsity and with sums in float32, float32 operations a second without tensor cores, and bytes of memory. A
kernel reaches a part of them (`Roofline`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.errors import UsageError, did_you_mean
from serve.kernels.cuda.plan import MOST_PASSES, MOST_ROWS
from serve.measure.kernel_entries import Shape
from serve.support import bytes_refusal, capability_refusal


@dataclass(frozen=True)
class Gpu:
    """Attributes:
    bandwidth: bytes a second.
    flops: 16-bit operations a second of the tensor cores, dense.
    single: float32 operations a second, without tensor cores.
    memory: bytes.
    capability: the compute capability; sparse tensor cores came with 8.0.
    """

    name: str
    bandwidth: float
    flops: float
    single: float
    memory: float
    capability: tuple[int, int]

    @property
    def sparse(self) -> bool:
        """Whether it has sparse tensor cores; they do twice the dense operations a second on 2:4 weights."""
        return capability_refusal("cuda", self.capability) is None


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA T4 product page: 320 GB/s (an older data sheet has 300), 65 TFLOPS (float16; it has no bfloat16), 16 GB.
        Gpu("t4", 320e9, 65e12, 8.1e12, 16e9, (7, 5)),
        # NVIDIA V100 data sheet, SXM2: 900 GB/s, 125 TFLOPS (float16), 32 GB (there is one with 16).
        Gpu("v100", 900e9, 125e12, 15.7e12, 32e9, (7, 0)),
        # NVIDIA A10 data sheet: 600 GB/s, 125 TFLOPS (250 with sparsity), 24 GB.
        Gpu("a10", 600e9, 125e12, 31.2e12, 24e9, (8, 6)),
        # NVIDIA A30 data sheet: 933 GB/s, 165 TFLOPS, 24 GB.
        Gpu("a30", 933e9, 165e12, 10.3e12, 24e9, (8, 0)),
        # NVIDIA A100 data sheet: 312 TFLOPS (624 with sparsity); 1,555 GB/s with 40 GB, 2,039 GB/s as SXM with 80 GB.
        Gpu("a100-40gb", 1555e9, 312e12, 19.5e12, 40e9, (8, 0)),
        Gpu("a100", 2039e9, 312e12, 19.5e12, 80e9, (8, 0)),
        # NVIDIA L4 data sheet: 300 GB/s, 121 TFLOPS (242 with sparsity), 24 GB.
        Gpu("l4", 300e9, 121e12, 30.3e12, 24e9, (8, 9)),
        # NVIDIA L40S data sheet: 864 GB/s, 362 TFLOPS (733 with sparsity; in which sums it does not say), 48 GB.
        Gpu("l40s", 864e9, 362e12, 91.6e12, 48e9, (8, 9)),
        # NVIDIA Ampere GA102 whitepaper: 936 GB/s, 71 TFLOPS (142 with sparsity), 24 GB.
        Gpu("rtx3090", 936e9, 71e12, 35.6e12, 24e9, (8, 6)),
        # NVIDIA Ada whitepaper: 1,008 GB/s, 165.2 TFLOPS (330.4 with sparsity), 24 GB.
        Gpu("rtx4090", 1008e9, 165.2e12, 82.6e12, 24e9, (8, 9)),
        # NVIDIA RTX Blackwell whitepaper: 1,792 GB/s, 209.5 TFLOPS (419 with sparsity), 32 GB.
        Gpu("rtx5090", 1792e9, 209.5e12, 104.8e12, 32e9, (12, 0)),
        # NVIDIA H100 data sheet: SXM 3.35 TB/s and 1,979 TFLOPS with sparsity, PCIe 2 TB/s and 1,513; 80 GB.
        Gpu("h100", 3350e9, 989.5e12, 67e12, 80e9, (9, 0)),
        Gpu("h100-pcie", 2000e9, 756.5e12, 51e12, 80e9, (9, 0)),
        # NVIDIA H200 data sheet, SXM: 4.8 TB/s, 1,979 TFLOPS with sparsity, 141 GB.
        Gpu("h200", 4800e9, 989.5e12, 67e12, 141e9, (9, 0)),
        # NVIDIA Blackwell data sheet, HGX B200: 7.7 TB/s (DGX B200's has 64 for eight), 4,500 TFLOPS with sparsity, 180 GB.
        Gpu("b200", 7700e9, 2250e12, 75e12, 180e9, (10, 0)),
    )
}


def find(name: str) -> Gpu:
    """The GPU of a name, as ``H100``, ``RTX 4090`` or ``a100-40gb``.

    Raises:
        UsageError: it is not known.
    """
    plain = {key.replace("-", ""): gpu for key, gpu in GPUS.items()}
    wish = "".join(char for char in name.lower() if char.isalnum()).removeprefix("nvidia").removeprefix("geforce")
    if wish in plain:
        return plain[wish]
    raise UsageError(
        f"--device {name!r} is neither here nor known{did_you_mean(name.lower(), ['auto', 'cpu', 'cuda', *GPUS])}"
    )


@dataclass(frozen=True)
class Roofline:
    """How long a GPU takes: the longer of moving bytes and computing, each at a stated part of the peak.

    ``bandwidth_reached`` 0.85: cuBLAS moves bfloat16 weights at 0.81 to 0.88 of the peak when it decodes; halve's sparse kernel
    is taken to do so too, which was not measured yet. ``flops_reached`` 0.7: of a large product. The launches and what a CPU
    does between them are left out, as they are with CUDA graphs. ``values``: of what dtype packed ones are; None: as other numbers.
    ``quantizes_x``: whether x is rounded to that dtype, too. Tensor cores multiply bytes at twice the rate of 16-bit numbers, at least.
    """

    gpu: Gpu
    bandwidth_reached: float = 0.85
    flops_reached: float = 0.7
    values: torch.dtype | None = None
    quantizes_x: bool = False

    ASSUMPTIONS = (
        "kernels move bytes at 0.85 of the peak and compute at 0.7 of it, sparse ones like dense ones",
        f"halve reads a packed weight once for each {MOST_ROWS} rows of x; above {MOST_PASSES * MOST_ROWS} it expands it and "
        "multiplies densely, in bytes where x is rounded to 8 bits, too",
        "launches cost nothing, as with CUDA graphs; norms and activations are left out",
    )

    @property
    def multiplies_bytes(self) -> bool:
        """Whether many rows are multiplied as bytes there."""
        values = str(self.values).removeprefix("torch.")
        return self.quantizes_x and self.gpu.sparse and bytes_refusal(values, self.gpu.capability) is None

    def seconds(self, moved: float, operations: float, *, twice: bool = False) -> float:
        """For so many bytes and operations (counted as if dense); ``twice``: at that rate, of sparse weights or of bytes."""
        peak = self.gpu.flops * (2 if twice else 1)
        return max(moved / (self.gpu.bandwidth * self.bandwidth_reached), operations / (peak * self.flops_reached))

    def layer(self, shape: Shape, rows: int, itemsize: int, *, packed: bool) -> float:
        """Of one linear layer on ``rows`` rows of x, as halve runs it there: x and y are moved once, the weight as often as it is read."""
        dense_bytes = shape.n * shape.k * itemsize
        activations = rows * (shape.n + shape.k) * itemsize
        operations = 2 * rows * shape.n * shape.k
        if not packed:
            return self.seconds(dense_bytes + activations, operations)
        packed_bytes = shape.n * shape.k * ((self.values.itemsize if self.values else itemsize) / 2 + 1 / 8)
        if self.gpu.sparse and rows <= MOST_PASSES * MOST_ROWS:
            passes = -(-rows // MOST_ROWS)
            return self.seconds(passes * packed_bytes + activations, operations, twice=True)
        if self.multiplies_bytes:
            # x is read and written as bytes, the weight expanded to bytes, sums of 4 bytes are written, read, and become y.
            besides = (
                rows * shape.k * (itemsize + 1) + packed_bytes + shape.n * shape.k + rows * shape.n * (4 + itemsize)
            )
            product = self.seconds(rows * (shape.k + 4 * shape.n) + shape.n * shape.k, operations, twice=True)
            return self.seconds(besides, 0) + product
        expanding = self.seconds(packed_bytes + dense_bytes, 0)
        return expanding + self.seconds(dense_bytes + activations, operations)
