#!/usr/bin/env bash
# The 2.6B train step on one GPU (H100, H200 or alike), alone and beside PyTorch. Takes one to two hours.
#
#   bash benchmarks/gpu.sh             install into .venv-gpu and .venv-gpu-peer, measure, print tables; see out/gpu
#   bash benchmarks/gpu.sh --smoke     the same at a tiny size, also without a GPU
#
# Needed: Python 3.11 or newer, a C compiler, the NVIDIA driver 580 or newer. JAX and PyTorch bring their own CUDA
# libraries, each into an environment of its own. Where both are there already, nothing is installed:
#
#   PYTHON=ours/bin/python PEER_PYTHON=theirs/bin/python bash benchmarks/gpu.sh
#
# Other arguments go to benchmarks/gpu.py (--help lists them).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "gpu.sh: $*" >&2
    exit 1
}

smoke=
for argument in "$@"; do
    [[ $argument == --smoke ]] && smoke=1
done

if [[ -z $smoke ]]; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) ||
        fail "found no NVIDIA driver (nvidia-smi does not run); --smoke works without one"
    [[ ${driver%%.*} -ge 580 ]] ||
        fail "the NVIDIA driver is $driver, but CUDA 13 needs 580 or newer: update it, or name environments with PYTHON and PEER_PYTHON"
fi

# environment FOLDER EXTRA: an environment with this package and one of its extras.
environment() {
    local folder=$1 extra=$2
    if [[ ! -f $folder/installed || setup.py -nt $folder/installed ]]; then
        echo "Installing .[$extra] into $folder (several GB the first time)" >&2
        "${BASE_PYTHON:-python3}" -m venv "$folder"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
        touch "$folder/installed"
    fi
    echo "$folder/bin/python"
}

if [[ -z ${PYTHON:-} ]]; then
    if [[ -n $smoke ]]; then
        PYTHON=$(environment .venv-gpu-smoke bench)
        PEER_PYTHON=$PYTHON
    else
        PYTHON=$(environment .venv-gpu cuda)
        PEER_PYTHON=$(environment .venv-gpu-peer bench)
    fi
fi

if [[ -z $smoke ]]; then
    "$PYTHON" -c 'import jax; jax.devices("gpu")' 2>/dev/null || fail "JAX in $PYTHON finds no GPU"
    "${PEER_PYTHON:-$PYTHON}" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "PyTorch in ${PEER_PYTHON:-$PYTHON} finds no GPU: it may be the build for CPUs"
fi

exec "$PYTHON" -m benchmarks.gpu --peer-python "${PEER_PYTHON:-$PYTHON}" "$@"
