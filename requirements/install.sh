#!/bin/sh
# Installs the pinned packages into a Python environment: install.sh PYTHON [runtime|dev|gpu]
# Nothing is resolved (README.md here says why); hashes are checked for all but PyTorch.
set -eu
python=$1
what=${2:-dev}
here=$(cd "$(dirname "$0")" && pwd)

torch="torch==2.13.0+cpu"
torchvision="torchvision==0.28.0+cpu"  # The release that is built against that PyTorch.
torch_index=https://download.pytorch.org/whl/cpu

pip() {
    "$python" -m pip --disable-pip-version-check --no-input "$@"
}

if [ "$what" = gpu ]; then
    # vLLM's own build and the CUDA that it names; PyTorch's CUDA build needs no index of its own.
    pip install -qq --no-deps --require-hashes -r "$here/gpu.lock"
    exit
fi

installed() {  # installed NAME==VERSION
    "$python" -c "
from importlib.metadata import version
raise SystemExit(version('${1%%==*}') != '${1#*==}')" 2>/dev/null
}

# CPU builds have their own local version, which PyPI can't hold; a configured index may.
cpu_build() {  # cpu_build NAME==VERSION [more arguments for PyTorch's own index]
    requirement=$1; shift
    installed "$requirement" && return
    pip install -qq --no-deps "$requirement" 2>/dev/null && return
    echo "$requirement is not among what pip is configured to find; trying PyTorch's own index"
    pip install -qq --no-deps --index-url "$torch_index" "$@" "$requirement"
}

torchvision_from_pypi() {
    echo "$torchvision can't be had here: taking PyPI's, without its compiled operators"
    pinned=$(mktemp)
    awk '/^[^ ]/ { keep = /^torchvision==/ } keep' "$here/gpu.lock" > "$pinned"
    pip install -qq --no-deps --require-hashes -r "$pinned"
    rm "$pinned"
}

cpu_build "$torch"
pip install -qq --no-deps --require-hashes -r "$here/runtime.lock"
pypis=${torchvision%+cpu}
if ! installed "$pypis"; then
    cpu_build "$torchvision" --retries 1 --timeout 15 2>/dev/null || torchvision_from_pypi
fi
if installed "$pypis"; then "$python" "$here/torchvision_without_operators.py"; fi
"$python" -W ignore -c "import torchvision"  # Where this fails, no model's code can be imported.
if [ "$what" = dev ]; then
    pip install -qq --no-deps --require-hashes -r "$here/dev.lock"
fi
