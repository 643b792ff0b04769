"""A run that trains an adapter: what moves, what stays, what it leaves."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import lora
from pixsigma_jax import checkpoint, tree
from pixsigma_jax.convert.lora import note_of_lora, read_lora
from pixsigma_jax.data import mixture
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.train.program import make_program
from pixsigma_jax.train.tensors import view
from pixsigma_jax.transforms import merge_lora
from pixsigma_jax.transforms.lora import Lora
from tests.train import runs

ADAPTER = {
  "adapter.rank": 3,
  "adapter.alpha": 6.0,
  "adapter.targets": ("attention/", "mlp/in"),
  "total_steps": 4,
  "checkpoint.snapshot_every": 2,
  # Large enough that the change is more than roundings.
  "ema.values": (0.5,),
}


def config_of(data, parent, **changes):
  changes = {name.replace("__", "."): value for name, value in changes.items()}
  return runs.low(data, **{"init.parent": str(parent), **ADAPTER, **changes})


@pytest.fixture(scope="module")
def adapted(data, done, tmp_path_factory):
  """The workdir of a run of four steps on the run `done`."""
  workdir = tmp_path_factory.mktemp("runs") / "adapted"
  runs.train(config_of(data, done), workdir)
  return workdir


def targeted(name):
  return name.endswith("kernel") and ("attention/" in name or "mlp/in" in name)


def params(workdir, step):
  return runs.part(runs.arrays(workdir, step, "snapshots"), "params")


def test_only_the_adapter_moves(adapted, done):
  parent = params(done, 6)
  runs.assert_same(params(adapted, 0), parent)
  for step in (2, 4):
    after = params(adapted, step)
    assert after.keys() == parent.keys()
    for name, array in parent.items():
      assert np.array_equal(after[name], array) != targeted(name), name
  with pytest.raises(AssertionError):
    runs.assert_same(params(adapted, 2), params(adapted, 4))


def test_a_checkpoint_holds_the_adapter_alone(adapted):
  state = runs.arrays(adapted, 4)
  assert not [name for name in state if name.startswith("frozen/")]
  for part in ("params", "ema_params/0"):
    names = runs.part(state, part)
    assert {name.rsplit("/", 1)[1] for name in names} == {"down", "up"}
  trained = sum(array.size for array in runs.part(state, "params").values())
  moments = sum(array.size for array in runs.part(state, "opt_state").values())
  assert moments < 2 * trained + 8  # AdamW's two, and counts


def test_a_snapshot_is_the_parent_with_the_averaged_adapter_in_it(adapted, done):
  average = runs.part(runs.arrays(adapted, 4), "ema_params/0")
  before, after = params(done, 6), params(adapted, 4)
  for name in filter(targeted, before):
    module = name.removesuffix("kernel")
    change = 2.0 * average[module + "down"] @ average[module + "up"]
    # Of one compiled program against another.
    np.testing.assert_allclose(after[name], before[name] + change, rtol=0, atol=1e-6)


def test_the_adapter_by_itself_makes_the_snapshot_of_the_parent(adapted, done):
  assert runs.steps(adapted, "adapters") == [2, 4]
  snapshot = checkpoint.read_snapshot(done)
  for step in (2, 4):
    for file in ("", "pytorch_lora_weights.safetensors"):
      adapter = read_lora(adapted / "adapters" / str(step) / file, snapshot.config)
      _, after = merge_lora(snapshot.config, snapshot.params, adapter=adapter)
      for name, array in params(adapted, step).items():
        have = runs.named(after)[name]
        np.testing.assert_allclose(have, array, rtol=0, atol=1e-6, err_msg=name)


def test_the_first_loss_is_that_of_the_parent(adapted, data, done, tmp_path):
  # At rate 0, so that the parent's is what it is without any training.
  config = config_of(data, done, adapter__rank=0, total_steps=2)
  runs.train(config, tmp_path)
  first = [runs.metrics(workdir)[0] for workdir in (adapted, tmp_path)]
  for name in ("loss", "mse", "vb", "decile_loss"):
    assert first[0][name] == first[1][name]  # to the bit: nothing is added


def test_a_resumed_run_is_the_same_to_the_bit(adapted, data, done, tmp_path):
  workdir = tmp_path / "run"
  runs.train(config_of(data, done, total_steps=2), workdir)
  runs.train(config_of(data, done), workdir)
  for what in ("checkpoints", "snapshots"):
    runs.assert_same(runs.arrays(workdir, 4, what), runs.arrays(adapted, 4, what))
  assert runs.measured(workdir) == runs.measured(adapted)
  have, want = (w / "adapters" / "4" for w in (workdir, adapted))
  config = "adapter_config.json"
  assert (have / config).read_bytes() == (want / config).read_bytes()
  # But for the note on which run it is of.
  tensors = [load_file(f / "adapter_model.safetensors") for f in (have, want)]
  assert tensors[0].keys() == tensors[1].keys()
  for name, tensor in tensors[0].items():
    np.testing.assert_array_equal(tensor, tensors[1][name], err_msg=name)
  notes = [note_of_lora(f) for f in (have, want)]
  base = checkpoint.read_snapshot(done).with_fingerprint().fingerprint
  for note, run in zip(notes, (workdir, adapted), strict=True):
    history = checkpoint.read_metadata(run).history
    assert note == {"base": base, "run": history.run, "step": 4}


def test_what_an_adapter_changes_may_be_split_over_devices(
  adapted, data, done, tmp_path
):
  config = config_of(
    data, done, mesh__data=1, mesh__fsdp=4, adapter__dora=True, total_steps=2
  )
  runs.train(config, tmp_path / "split", devices=4)
  config = config_of(data, done, adapter__dora=True, total_steps=2)
  runs.train(config, tmp_path / "whole")
  have, want = (params(tmp_path / name, 2) for name in ("split", "whole"))
  moved = max(np.abs(want[n] - a).max() for n, a in params(done, 6).items())
  for name, array in want.items():
    # Sums in another order; where AdamW's moments are near zero it magnifies them.
    np.testing.assert_allclose(have[name], array, rtol=0, atol=0.01 * moved)
  settings = tmp_path / "split" / "adapters" / "2" / "adapter_config.json"
  assert json.loads(settings.read_text())["use_dora"] is True


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"adapter__rank": 4}, r"another adapter.*adapter\.rank: 3 → 4"),
    ({"adapter__dora": True}, r"adapter\.dora: False → True"),
    ({"adapter__rank": 0}, r"adapter\.rank: 3 → 0"),
    ({"init__parent": "OTHER"}, r"parent\.step: 6 → 3 .*the parent was .*Give what"),
    ({"init__parent": "RETRAINED"}, r"parent\.params: '\w+' → '\w+' .*parent was "),
    (
      {"init__transforms": ({"name": "interpolate_pe", "base_size": 4},)},
      r"init\.transforms: ",
    ),
  ],
)
def test_a_run_goes_on_with_its_own_adapter_and_parent_alone(
  changes, message, adapted, data, done, tmp_path
):
  other = tmp_path / "other"
  shutil.copytree(done / "snapshots" / "6", other / "snapshots" / "3")
  # Of the same stage and step, by its metadata the same model.
  retrained = tmp_path / "retrained"
  parent = checkpoint.read_snapshot(done)
  checkpoint.save_snapshot(
    retrained,
    6,
    params=jax.tree.map(lambda leaf: leaf * (1 + 2**-23), parent.params),
    null_caption=parent.null_caption,
    metadata=parent.metadata,
  )
  parents = {"OTHER": str(other), "RETRAINED": str(retrained)}
  changes = {
    k: parents.get(v, v) if k == "init__parent" else v for k, v in changes.items()
  }
  with pytest.raises(ValueError, match=message):
    runs.train(config_of(data, done, total_steps=5, **changes), adapted)


def test_a_parent_that_has_moved_is_the_same_and_an_old_checkpoint_does_not_say(
  adapted, data, done, tmp_path, caplog
):
  workdir, moved = tmp_path / "run", tmp_path / "moved"
  shutil.copytree(adapted, workdir)
  shutil.copytree(done / "snapshots", moved / "snapshots")
  shutil.rmtree(workdir / "checkpoints" / "4")
  path = workdir / "checkpoints" / "2" / "metadata" / "metadata"
  fields = json.loads(path.read_text())
  assert fields["provenance"][-1]["parent"].pop("params")
  runs.train(config_of(data, str(moved)), workdir)
  runs.assert_same(runs.arrays(workdir, 4), runs.arrays(adapted, 4))
  assert not [line for line in caplog.messages if "of an earlier version" in line]

  shutil.rmtree(workdir / "checkpoints" / "4")
  path.write_text(json.dumps(fields))
  runs.train(config_of(data, str(moved)), workdir)
  runs.assert_same(runs.arrays(workdir, 4), runs.arrays(adapted, 4))
  assert [line for line in caplog.messages if "of an earlier version" in line]


def test_adapters_of_steps_that_a_run_went_back_from_are_not_its_own(
  adapted, data, done, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(adapted, workdir)
  shutil.rmtree(workdir / "checkpoints" / "4")
  before = params(adapted, 4)
  config = config_of(data, done, data__long_caption_ratio=0.0)
  runs.train(config, workdir)
  assert (
    runs.steps(workdir, "adapters") == runs.steps(workdir, "snapshots")[1:] == [2, 4]
  )
  snapshot = checkpoint.read_snapshot(done)
  adapter = read_lora(workdir / "adapters" / "4", snapshot.config)
  _, after = merge_lora(snapshot.config, snapshot.params, adapter=adapter)
  for name, array in params(workdir, 4).items():
    np.testing.assert_allclose(runs.named(after)[name], array, rtol=0, atol=1e-6)
  (aside,) = (workdir / "abandoned").iterdir()
  runs.assert_same(params(aside, 4), before)
  assert runs.steps(aside, "adapters") == [4]


def test_an_adapter_without_a_parent_is_refused(data, tmp_path):
  message = r"adapter\.rank=3 trains a change of a parent, and config\.init\.parent is"
  with pytest.raises(ValueError, match=message):
    runs.train(config_of(data, ""), tmp_path)


def test_after_a_bad_step_the_parent_is_still_there(data, done, tmp_path, monkeypatch):
  """A rollback restores a state that was saved without it."""
  dataset = runs.poisoned(open_dataset(data), {runs.example_of(4)})
  monkeypatch.setattr(mixture, "open_dataset", lambda _: dataset)
  runs.train(config_of(data, done, guards__bad_step="rollback"), tmp_path)
  assert runs.metrics(tmp_path)[-1]["rollbacks"] == 1
  # What was made after it is of a branch of its own.
  history = checkpoint.read_metadata(tmp_path).history
  assert [after for _, after in history.branches] == [2]
  after, parent = params(tmp_path, 4), params(done, 6)
  for name, array in parent.items():
    assert np.array_equal(after[name], array) != targeted(name), name


def test_a_run_compiles_the_merging_of_its_adapter_once(monkeypatch):
  traced, merged = [], Lora.merged

  def counted(self, *trees):
    traced.append(self)
    return merged(self, *trees)

  monkeypatch.setattr(Lora, "merged", counted)
  config = config_of("", "parent").to_dict()
  program = make_program(config, mesh=None, scaling_factor=1.0)
  program_state = program.abstract_state().replace(key=None)
  state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), program_state)
  traced.clear()
  for _ in range(3):
    program.model_of(state)
  assert len(traced) == 1


def test_every_map_of_a_stack_is_a_tensor_of_its_own_to_an_optimizer():
  leaf = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
  for name in ("down", "up"):
    seen = view(f"blocks_00_01/attention/qkv/{name}")
    assert seen.stacked
    assert seen.into(leaf).shape == (6, 4, 5)
    np.testing.assert_array_equal(seen.back(seen.into(leaf), leaf), leaf)
  assert view("blocks_00_01/attention/out/down").into(leaf[:, 0]).shape == (2, 4, 5)


def test_an_adapters_state_of_full_size_is_a_fortieth_of_the_models():
  config = lora.get_config().to_dict()
  program = make_program(config, mesh=None, scaling_factor=0.13)
  state = program.abstract_state()
  assert tree.size(state.params) == 13_418_496
  assert tree.size(state.frozen) == 610_856_096
  # Adapter, EMA and two moments; the null caption of 300 tokens; six counters.
  saved = state.replace(frozen=None, key=None)
  assert tree.size(saved) == 4 * 13_418_496 + 300 * 4096 + 6
