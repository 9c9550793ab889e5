# Sourced by the commands beside it: makes or reuses .venv in the repository and installs the package with every pin.
# Defines ROOT and VENV, and goes to ROOT.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
cd "$ROOT"

die() {
    printf '%s\n' "$1" >&2
    exit 2
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Prints the first Python on the path that is new enough; PYTHON=... chooses one.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10 or newer: set PYTHON to one, or unset it."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if new_enough "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    die "reparam needs Python 3.10 or newer and found none on the path: install one, or set PYTHON to where it is."
}

make_venv() {
    local python
    if [ ! -x "$VENV/bin/python" ]; then
        python="$(find_python)"
        "$python" -m venv "$VENV" || die "$python could not make $VENV: install its venv module (Debian: python3-venv)."
    fi
    new_enough "$VENV/bin/python" || die "$VENV holds a Python older than 3.10: remove that folder and run this again."
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null ||
        die "$VENV has no pip and could not make one: remove that folder and run this again."
}

# What decides the contents of .venv: when it is unchanged, nothing is installed.
stamp() {
    "$VENV/bin/python" - "$ROOT" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
parts = [sys.version.encode(), str(root).encode()]
parts += [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON
}

install() {
    local wanted quiet=()
    wanted="$(stamp)"
    if [ "$(cat "$VENV/.reparam-stamp" 2>/dev/null || true)" = "$wanted" ]; then
        return
    fi
    [ -t 1 ] || quiet=(--quiet)
    printf 'Installing into %s (the first time takes some minutes) ...\n' "$VENV" >&2
    "$VENV/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check \
        -e "$ROOT[dev]" -c "$ROOT/constraints.txt" >&2 ||
        die "The packages could not be installed into $VENV: pip's message above says why."
    printf '%s\n' "$wanted" >"$VENV/.reparam-stamp"
}

make_venv
install
