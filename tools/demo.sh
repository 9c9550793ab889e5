#!/usr/bin/env bash
# Fuses a trained network and shows that not one answer changed, from a bare clone on: bash tools/demo.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

OUT="out/demo"
mkdir -p "$OUT"
set -x
"$VENV/bin/reparam" fuse examples/digits.safetensors --arch examples.digits:build --input 1x1x8x8 --out "$OUT/"
"$VENV/bin/python" tools/check_digits.py "$OUT"
