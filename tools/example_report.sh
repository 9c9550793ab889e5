#!/usr/bin/env bash
# Writes docs/example_report.html: the report of the network in examples/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

mkdir -p out/demo
# One thread: what else runs on the machine disturbs it least.
OMP_NUM_THREADS=1 "$VENV/bin/reparam" fuse examples/digits.safetensors --arch examples.digits:build --input 1x1x8x8 \
    --out out/demo/ --bench-seconds 10 --report docs/example_report.html
