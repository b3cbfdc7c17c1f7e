"""The kernels for NVIDIA GPUs, compiled at first use by NVRTC, which CUDA builds of torch bring along.

``src/sparse24.cu`` is the kernels, `layout` the order in which they read a weight, `plan` how they are cut for a device,
`compiler` and `cache` make cubins, `driver` loads and launches them, `backend` is what the rest of halve calls.
"""
