# Sourced by the other scripts: a virtual environment in .venv, made or updated where needed.
# Sets PYTHON and puts the environment first in PATH. QNA_TIMM_PYTHON picks the interpreter that
# makes it, QNA_TIMM_VENV another folder, QNA_TIMM_EXTRAS the extras to install.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -m "${QNA_TIMM_VENV:-.venv}")
extras=${QNA_TIMM_EXTRAS:-dev}
PYTHON=$venv/bin/python

# The installation is good while the files that describe it, those it compiles, and their folder
# are the same; 'dev' holds the other extras.
stamp=$(cat setup.* pyproject.toml qna_timm/ops/native/{*.cpp,*.h,*/*.h} <(realpath setup.cfg) | cksum)
if [ ! -x "$PYTHON" ] || ! grep -qsx -e "$stamp $extras" -e "$stamp dev" "$venv/.qna_timm"; then
    base=${QNA_TIMM_PYTHON:-}
    if [ -z "$base" ]; then
        for name in python3 python3.13 python3.12 python3.11 python3.10; do
            if command -v "$name" >/dev/null 2>&1 &&
                "$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
                base=$name
                break
            fi
        done
    fi
    if [ -z "$base" ]; then
        echo "no Python 3.10 to 3.13 with venv and ensurepip found; name one with QNA_TIMM_PYTHON=/path/to/python3" >&2
        exit 2
    fi
    echo "installing qna_timm[$extras] into $venv (once; downloads PyTorch)"
    [ -x "$PYTHON" ] || "$base" -m venv "$venv"
    # modules are compiled where they are first imported; all of them at once took 50 s more here
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[$extras]"
    echo "$stamp $extras" >"$venv/.qna_timm"
fi
export PYTHON PATH="$venv/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE # or every process compiles PyTorch again, where it is not compiled yet
# Threads that wait by spinning take the processors from the ones they wait for as soon as anything
# else runs: a training step on two busy cores took 7.1 s so, and 0.6 s with sleeping threads.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
