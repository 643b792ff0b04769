"""Memory that plans are estimated to need, against what libtpu compiled them to need.

`benchmarks.keep_plans --memory` compiles them; nothing is compiled here.
"""

import dataclasses

import jax
import pytest

from benchmarks import keep_plans
from pixsigma_jax.plan import memory, topology
from pixsigma_jax.plan.plan import make_plan
from pixsigma_jax.plan.search import search

COMPILED = keep_plans.read_compiled()
# One that was refused had been cut short by the compiler's own recomputation.
WHOLE = [kept for kept in COMPILED if not kept.refused]
# What plans without a compiler are said to be good for, docs/plan.md: on one slice, and
# on several, where XLA sends while it computes, and not always begins as early.
TOLERANCE = {False: 0.05, True: 0.10}
SEARCHED = [("1k", "v5e:8x8"), ("2k", "v6e:2x2"), ("256", "v5e:2x4")]
_STATES = {}  # of a stage's model, optimizer, averages and adapter


def planned(kept):
  config = keep_plans.CONFIGS[kept.stage]()
  config.update_from_flattened_dict(dict(kept.changes))
  key = str([config[each] for each in ("model", "optimizer", "ema", "adapter")])
  laid = kept.planned(_STATES.get(key))
  _STATES[key] = laid.state
  return laid


@pytest.mark.parametrize("kept", WHOLE, ids=str)
def test_the_estimate_is_near_what_the_compiler_needs(kept):
  estimated = memory.estimate(planned(kept)).total
  assert estimated == pytest.approx(kept.bytes, rel=TOLERANCE[kept.slices > 1])


def test_plans_of_every_kind_are_compiled_and_most_not_fitted():
  assert len(WHOLE) >= 20
  assert {kept.stage for kept in WHOLE} >= {"256", "512", "1k", "2k", "4k"}
  kinds = {kept.topology.partition(":")[0] for kept in WHOLE}
  assert kinds >= {"v5e", "v5p", "v6e"}
  stages = [planned(kept) for kept in WHOLE]
  computes = [each.program.model.compute for each in stages]
  assert {each.remat for each in computes} >= {"none", "block", "attention"}
  assert {each.dtype.name for each in stages} == {"bfloat16", "float32"}
  assert any(each.sizes["context"] > 1 for each in stages)
  assert any(each.config["accumulation"] > 1 for each in stages)
  assert sum(not kept.fitted for kept in WHOLE) >= 10


@pytest.mark.parametrize("kept", [kept for kept in COMPILED if kept.refused], ids=str)
def test_what_the_compiler_refused_does_not_fit_by_the_estimate(kept):
  assert not make_plan(planned(kept), compiles=False).fits


@pytest.mark.parametrize(("name", "machines"), SEARCHED)
def test_a_search_prefers_what_the_compiler_could_fit(name, machines):
  config = keep_plans.CONFIGS[name]().to_dict()
  [best] = search(config, topology.parse(machines), compiles=False, count=1)
  fitted = [
    choice(planned(kept))
    for kept in WHOLE
    if (kept.stage, kept.topology, kept.slices) == (name, machines, 1)
  ]
  assert choice(best.stage) in fitted, "compile it: benchmarks/keep_plans.py"


def choice(laid):
  """What a search chooses, and what it takes as given."""
  compute = laid.program.model.compute
  given = laid.config["batch_size"], laid.dtype, laid.attention
  return *laid.sizes.items(), compute.remat, laid.config["accumulation"], *given


def test_plans_are_compiled_again_and_kept_one_by_one(tmp_path, monkeypatch, capsys):
  path, first = tmp_path / "compiled.jsonl", WHOLE[0]
  old = [dataclasses.replace(first, bytes=1, libtpu="0.0.1")] * 2
  plan = make_plan(planned(first), compiles=False)

  def compile_one(laid, compiles):
    assert compiles
    assert choice(laid) == choice(plan.stage)
    if path.exists():
      raise KeyboardInterrupt
    return plan

  monkeypatch.setattr(keep_plans, "make_plan", compile_one)
  monkeypatch.setattr(keep_plans.metadata, "version", lambda _: "0.0.2")
  with pytest.raises(KeyboardInterrupt):
    keep_plans.compile_again(old, path)
  again, untouched = keep_plans.read_compiled(path)
  assert untouched == old[1]
  assert (again.bytes, again.refused) == (plan.memory.total, False)
  assert (again.jax, again.libtpu) == (jax.__version__, "0.0.2")
  assert capsys.readouterr().out.splitlines()[-1].endswith("| +0.0% |")
