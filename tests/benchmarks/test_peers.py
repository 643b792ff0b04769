"""The comparison with torch: every case runs on both sides, small and on a CPU."""

import subprocess
import sys

import pytest

from benchmarks.peer_cases import SETS, Case, take_turn

# A small one of every kind, and what is special about any.
CASES = [
  Case(kind="forward", pixels=64, layers=2),
  Case(kind="train", pixels=64, layers=2, batch=2, ratio=4, remat=True),
  Case(kind="sample", pixels=64, layers=2),
  Case(kind="decode", pixels=64),
]


def test_no_case_is_of_another_kind():
  assert {case.kind for cases in SETS.values() for case in cases} == {
    *(case.kind for case in CASES),
    "encode",  # 0.4 billion parameters are too many here
  }


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
@pytest.mark.parametrize("side", ["ours", "torch"])
def test_it_runs(side, case):
  turn = take_turn(side, case, "float32", machine="cpu", runs=1, threads=2)
  assert len(turn.seconds) == 1
  assert min(turn.seconds) > 0
  assert turn.device == "cpu"


def test_jax_without_the_gpu_is_not_timed_in_its_place():
  with pytest.raises(ValueError, match=r"computes on cpu, not on gpu.*\[gpu\]"):
    take_turn("ours", CASES[0], "bfloat16", machine="gpu", runs=1, threads=2)


def test_a_case_that_does_not_exist_is_named():
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.peers", "--set=gpu", "--only=sample 8192"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert "no sample 8192 in sample 512, sample 1024" in done.stderr
