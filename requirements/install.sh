#!/bin/sh
# Installs the pinned packages into a Python environment: install.sh PYTHON [runtime|dev|gpu]
# Nothing is resolved (README.md here says why); hashes are checked for all but PyTorch.
set -eu
python=$1
what=${2:-dev}
here=$(cd "$(dirname "$0")" && pwd)

torch="torch==2.13.0+cpu"
torch_index=https://download.pytorch.org/whl/cpu

pip() {
    "$python" -m pip --disable-pip-version-check --no-input "$@"
}

if [ "$what" = gpu ]; then
    # vLLM's own build and the CUDA that it names; PyTorch's CUDA build needs no index of its own.
    pip install -qq --no-deps --require-hashes -r "$here/gpu.lock"
    exit
fi
if ! "$python" -c "
from importlib.metadata import version
raise SystemExit(version('torch') != '${torch#torch==}')" 2>/dev/null; then
    # CPU builds have their own local version, which PyPI can't hold; a configured index may.
    if ! pip install -qq --no-deps "$torch" 2>/dev/null; then
        echo "$torch is not among what pip is configured to find; trying PyTorch's own index"
        pip install -qq --no-deps --index-url "$torch_index" "$torch"
    fi
fi
pip install -qq --no-deps --require-hashes -r "$here/runtime.lock"
if [ "$what" = dev ]; then
    pip install -qq --no-deps --require-hashes -r "$here/dev.lock"
fi
