# Sourced by the other scripts: sets $PYTHON to an interpreter that has what they need, making .venv when none does.
# Re-run at any time; it costs a second once all is installed.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

TORCH=2.13.0 # what constraints.txt pins; any torch >= 2.6 that is already there is used as it is

find_python() {
  local name
  for name in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
    if "$name" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: no Python 3.11, 3.12 or 3.13 found: install one, or name it: PYTHON=/path/to/python $0" >&2
  return 1
}

install_torch() {
  # The plain name would pull gigabytes of CUDA libraries. "+cpu" can only match the CPU build, whatever index has it;
  # what torch itself needs comes with the requirements, from the usual index.
  if [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
    "$PYTHON" -m pip install -qq --retries 1 --no-deps "torch==$TORCH+cpu" \
      --extra-index-url https://download.pytorch.org/whl/cpu
  else
    "$PYTHON" -m pip install -qq "torch==$TORCH"
  fi
}

torch_version() { # from its metadata: importing it would need what is only about to be installed
  "$PYTHON" -c 'from importlib.metadata import version; print(version("torch"))'
}

install() { # install FILE: its requirements, in the versions CI tests, unless they are there
  local stamp
  # the environment in use, if someone activated one; else the clone's own
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    PYTHON="$VIRTUAL_ENV/bin/python"
  else
    if ! .venv/bin/python -c 'import pip' 2>/dev/null; then # absent, or half-made
      echo "making     .venv"
      "$(find_python)" -m venv --clear .venv
    fi
    PYTHON="$ROOT/.venv/bin/python"
  fi
  stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.perennial-$(cat "$1" requirements*.txt constraints.txt | cksum | tr ' ' -)"
  if [ ! -e "$stamp" ]; then
    echo "installing what $1 names (once, some minutes)"
    torch_version >/dev/null 2>&1 || install_torch
    # a torch that was there already stays, whatever version is pinned
    echo "torch==$(torch_version)" >"$stamp.pins"
    grep -v '^torch==' constraints.txt >>"$stamp.pins"
    "$PYTHON" -m pip install -qq -r "$1" -c "$stamp.pins"
    rm "$stamp.pins"
    touch "$stamp"
  fi
}
