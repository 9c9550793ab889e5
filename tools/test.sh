#!/usr/bin/env bash
# Runs the tests, from a bare clone on: bash tools/test.sh [pytest's arguments, paths relative to the repository; -n 0 for one process]
# A file's tests run in one process, since they share what they fused.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$VENV/bin/python" -m pytest -q -n auto --dist loadfile "$@"
