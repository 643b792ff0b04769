#!/usr/bin/env bash
# Runs the test suite, on a fresh machine too: bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

make_venv dev
cd "$root"
exec "$python" -m pytest "$@"
