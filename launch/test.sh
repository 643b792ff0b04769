#!/usr/bin/env bash
# Runs the test suite, on a fresh machine too: bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

make_venv dev
cd "$root"
# A worker a core, half of the tests in order to each of two, so that files stay together;
# whoever has ended takes over from the others.
exec "$python" -m pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal "$@"
