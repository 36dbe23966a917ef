#!/usr/bin/env bash
# From a fresh clone to a model that answers: installs once, then runs scripts/quickstart.py. Works from any folder.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-prep.txt
exec "$PYTHON" scripts/quickstart.py "$@"
