# The virtual environment that the launch scripts share. Sourced, never run:
#
#   source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"   # defines $root and $python
#   make_venv                                         # what the package needs
#   make_venv dev                                     # and what its tests need
#
# A moment when there is nothing to do; whole again after an interruption anywhere.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

# pip does not compile below, since most modules are never imported. Those that are,
# Python compiles once, if it may keep the result.
unset PYTHONDONTWRITEBYTECODE

die() {
  echo "$*" >&2
  exit 1
}

version_of() {
  "$1" -c 'import sys; print(*sys.version_info[:3], sep=".")' 2>/dev/null
}

check_python() {
  local hint="Name another one like this: PYTHON=python3.12 bash launch/…"
  command -v "$1" >/dev/null || die "There is no $1 here: install Python 3.11 or newer. $hint"
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$1 is Python $(version_of "$1"), and 3.11 or newer is needed. $hint"
  "$1" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$1 has no venv module (Debian and Ubuntu: apt install python3-venv). $hint"
}

make_venv() (
  extra=${1:-}
  cd "$root" || exit
  # Two commands started at once: the second waits. (macOS has no flock and must not.)
  exec 9>.venv.lock
  if command -v flock >/dev/null; then flock 9; fi

  # The marker lies outside .venv, where clearing .venv does not take it away.
  if [[ -e .venv.unfinished || -z $(version_of "$python") ]] ||
    [[ -n ${PYTHON:-} && $(version_of "$PYTHON") != "$(version_of "$python")" ]]; then
    check_python "${PYTHON:-python3}"
    echo "Making .venv with Python $(version_of "${PYTHON:-python3}")"
    touch .venv.unfinished || exit
    "${PYTHON:-python3}" -m venv --clear .venv || die "No virtual environment was made."
  fi

  wanted=$root$'\n'$(cat requirements.txt pyproject.toml constraints.txt)
  stamp=.venv/installed${extra:+-$extra}
  if [[ -e $stamp && $(<"$stamp") == "$wanted" ]]; then exit; fi

  echo "Installing into .venv (a minute or two)"
  touch .venv.unfinished || exit
  "$python" -m pip install --quiet --no-input --disable-pip-version-check \
    --no-compile --constraint constraints.txt --editable ".${extra:+[$extra]}" ||
    die "pip could not install the requirements. The same command tries again."
  for stamp in .venv/installed ${extra:+".venv/installed-$extra"}; do
    echo "$wanted" >"$stamp" || exit
  done
  rm .venv.unfinished
)
