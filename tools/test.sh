#!/usr/bin/env bash
# Runs the tests, from a bare clone on: bash tools/test.sh [pytest's arguments, paths relative to the repository; -n 0 for one process]
# Tests stay in their order, since those of a file share what they fused; a process that is done takes over from another.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$VENV/bin/python" -m pytest -q -n auto --dist worksteal "$@"
