#!/usr/bin/env bash
# Lint and all tests, as CI runs them: installs once. Arguments go to pytest: scripts/test.sh tests/test_shards.py -k seek
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-dev.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
