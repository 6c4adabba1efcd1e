#!/usr/bin/env bash
# Runs benchmarks/gpu.py on a machine with an NVIDIA GPU, Python 3.12, jax, torch and transformers, but no network.
#
#   benchmarks/gpu.sh wheels       first, where there is a network: fills wheels/ (git-ignored) and data/cache
#   benchmarks/gpu.sh [OPTION...]  there: installs what is missing from wheels/ into a folder of its own, then runs
#                                  gpu.py with these options; results go to $OUT if set, else to gpu-benchmark/
#
# PYTHON  the interpreter (python3)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if [ "${1:-}" = wheels ]; then
    "$PYTHON" benchmarks/gpu_wheels.py fetch
    PYTHONPATH=$PWD "$PYTHON" -m jaxlm prepare tinyshakespeare
    exit
fi

for folder in "${JAXLM_DATA_DIR:-}" shared/data data data/cache; do
    [ -n "$folder" ] && [ -d "$folder/tinyshakespeare" ] && break
    folder=
done
if [ -z "$folder" ]; then
    echo "gpu.sh: error: no tinyshakespeare in \$JAXLM_DATA_DIR, shared/data or data/cache: bring data/cache along" >&2
    exit 2
fi
export JAXLM_DATA_DIR
JAXLM_DATA_DIR=$(realpath "$folder")

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site")
wheels=$("$PYTHON" benchmarks/gpu_wheels.py missing)
if [ -n "$wheels" ]; then
    mapfile -t files <<<"$wheels"
    "${pip[@]}" "${files[@]}"
fi
export PYTHONPATH=$site
if ! "$PYTHON" -c "import importlib.metadata; importlib.metadata.version('jaxlm')" 2>/dev/null; then
    "${pip[@]}" --find-links wheels .
fi
export PYTHONPATH=$PWD:$site
"$PYTHON" benchmarks/gpu.py "$@"
