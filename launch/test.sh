#!/usr/bin/env bash
# Runs the test suite, on a fresh machine too: bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

make_venv dev
cd "$root"
# A worker a core, whole files to each: a file's tests share what they have compiled.
exec "$python" -m pytest --numprocesses=logical --maxprocesses=8 --dist=loadfile "$@"
