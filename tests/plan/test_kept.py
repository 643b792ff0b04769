"""What the paper's stages take, against the numbers that `benchmarks.keep_plans` kept.

A change that needs more memory, arithmetic or communication fails here. If it is meant
to: `python -m benchmarks.keep_plans`, and say so in the commit.
"""

import json

import jax
import pytest

from benchmarks import keep_plans

KEPT = json.loads(keep_plans.KEPT.read_text(encoding="utf-8"))
grown = keep_plans.grown


@pytest.mark.parametrize("name", keep_plans.STAGES)
def test_a_stage_of_full_size_takes_no_more_than_it_did(name):
  assert grown(keep_plans.analytic(name), KEPT["stages"][name]["full size"]) == {}


@pytest.mark.parametrize("name", keep_plans.STAGES)
def test_a_stage_compiled_in_miniature_takes_no_more_than_it_did(name, libtpu):
  if libtpu != KEPT["libtpu"]:
    pytest.skip(f"kept of what libtpu {KEPT['libtpu']} makes, and this is {libtpu}")
  with jax.default_matmul_precision(None):  # as it is outside the suite
    have, _ = keep_plans.compiled(keep_plans.miniature(name))
  assert grown(have, KEPT["stages"][name]["miniature"]) == {}


def test_growth_beyond_what_is_allowed_is_named():
  assert grown({"bytes": 103.1, "flops": 1.0}, {"bytes": 100.0, "flops": 2.0}) == {
    "bytes": (100.0, 103.1)
  }


@pytest.fixture
def compiles_to(monkeypatch):
  """What compiling is to find of every stage, and in how many seconds."""

  def compile_to(numbers, seconds):
    monkeypatch.setattr(keep_plans, "full_size", lambda name: name)
    monkeypatch.setattr(keep_plans, "compiled", lambda stage: (numbers[stage], seconds))
    monkeypatch.setattr(keep_plans.metadata, "version", lambda _: KEPT["libtpu"])

  return compile_to


def test_the_check_at_full_size_passes_what_was_kept(compiles_to, capsys):
  numbers = {name: KEPT["stages"][name]["compiled"] for name in keep_plans.STAGES}
  compiles_to(numbers, 60.0)
  keep_plans.check(KEPT)
  assert "stage_4k: 60 s of compiling" in capsys.readouterr().out


def test_the_check_names_what_has_grown_and_what_took_too_long(compiles_to):
  numbers = {name: KEPT["stages"][name]["compiled"] for name in keep_plans.STAGES}
  more = {**numbers["stage_4k"], "bytes sent": 1.1 * numbers["stage_4k"]["bytes sent"]}
  compiles_to({**numbers, "stage_4k": more}, 60.0)
  with pytest.raises(ValueError, match=r"^stage_4k has .* bytes sent, and had [^;]*\."):
    keep_plans.check(KEPT)
  compiles_to(numbers, keep_plans.BUDGET + 1)
  with pytest.raises(ValueError, match=r"compiling stage_1k took 901 s of 900; "):
    keep_plans.check(KEPT)


def test_of_another_libtpu_only_the_time_is_compared(compiles_to, capsys):
  numbers = {name: {"bytes": 1.0} for name in keep_plans.STAGES}
  compiles_to(numbers, 60.0)
  keep_plans.check({**KEPT, "libtpu": "0.0.1"})
  assert "Kept of what libtpu 0.0.1 makes" in capsys.readouterr().out
  compiles_to(numbers, keep_plans.BUDGET + 1)
  with pytest.raises(ValueError, match=r"compiling stage_4k took"):
    keep_plans.check({**KEPT, "libtpu": "0.0.1"})


def test_what_is_counted_must_have_been_kept():
  with pytest.raises(ValueError, match=r"Kept are a, found a, b: python -m"):
    grown({"a": 1.0, "b": 1.0}, {"a": 1.0})
