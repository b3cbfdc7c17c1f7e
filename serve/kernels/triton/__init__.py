"""The backend for GPUs that `serve.kernels.cuda` does not cover: kernels in Triton, which knows no sparse tensor cores."""
