#!/usr/bin/env bash
# Lint and all tests, as CI runs them: installs once. Arguments go to pytest: scripts/test.sh tests/test_shards.py -k seek
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-dev.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# two processes, each test file in one of them: its fixtures train models. `-n 0` for a debugger
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
