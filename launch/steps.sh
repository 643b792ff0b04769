# What the launch scripts for pods share: options, and steps that are shown before they
# are done. Sourced, never run:
#
#   source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
#   name='' slices=1                     # and what they are if nobody says
#   options name slices -- "$@"          # sets them, $dry_run, and $train: after --
#   need name                            # not empty
#   step "Make a pod" gcloud … "$name"   # prints; does it unless --dry_run
#
# shellcheck shell=bash

# shellcheck disable=SC2034  # of those who source this
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=
train=()

die() {
  echo "Error: $*" >&2
  exit 1
}

options() {
  local _known=" dry_run " _word _key # unlike any option
  while [[ $1 != -- ]]; do
    _known+="$1 "
    shift
  done
  shift
  while (($#)); do
    _word=$1
    shift
    _key=${_word#--}
    _key=${_key%%=*}
    case $_word in
      --)
        train=("$@")
        return
        ;;
      --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        exit
        ;;
      --dry_run) dry_run=true ;;
      --*=*)
        [[ $_known == *" $_key "* ]] || die "There is no --$_key; the options are$_known(--help tells more)."
        printf -v "$_key" %s "${_word#*=}"
        ;;
      *) die "$_word is no --NAME=VALUE. What is meant for the training comes after --." ;;
    esac
  done
}

need() {
  local _key
  for _key; do
    [[ -n ${!_key} ]] || die "--$_key=… is missing (--help tells more)."
  done
  ((${#train[@]})) || die "What to train is missing: end the command in -- --config=FILE --workdir=DIR"
}

# Words as a shell reads them, plain ones as they are.
quoted() {
  local word text=
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      text+=" $word"
    else
      text+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  echo "${text# }"
}

show() {
  echo "── $1"
  echo "   $(quoted "${@:2}")"
}

step() {
  show "$@"
  [[ -n $dry_run ]] || "${@:2}"
}

# The code of the last try decides whether there is another one: a job that was
# told to stop (by SIGINT or SIGTERM, 130 and 143) or that has ended is left alone.
try_again() {
  local tries=$1 pause=$2 code
  shift 2
  while true; do
    code=0
    "$@" || code=$?
    [[ -z $dry_run ]] || return 0
    case $code in
      0 | 130 | 143) return $code ;;
    esac
    ((tries-- > 0)) || return $code
    echo "── Ended with code $code; goes on from its newest checkpoint in $pause s"
    sleep "$pause"
  done
}
