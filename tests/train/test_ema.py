"""Averages of the parameters: how long they are, where they lie, what a run leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax import checkpoint, sharding
from pixsigma_jax.train.ema import Ema, label
from pixsigma_jax.train.step import TrainState
from tests.train import runs


def make(*values, kind="exponential", unit="updates", offload=False, batch_size=4):
  return Ema(
    kind=kind, values=values, unit=unit, offload=offload, batch_size=batch_size
  )


def averages_of(ema, path):
  """After each update, of one parameter that takes these values one after the other."""
  averages = ema.init({"w": jnp.float32(path[0])})
  update = jax.jit(ema.update)
  found = []
  for number, value in enumerate(path[1:], 1):
    averages = update(averages, {"w": jnp.float32(value)}, jnp.int32(number))
    found.append([float(average["w"]) for average in averages])
  return np.array(found)


def random_path(length):
  return np.random.default_rng(0).normal(size=length + 1)


def test_several_decays_are_averages_side_by_side():
  path, decays = random_path(5), (0.9, 0.5, 0.0)
  found = averages_of(make(*decays), path)
  for column, decay in enumerate(decays):
    expected = path[0]
    for row, value in enumerate(path[1:]):
      expected = decay * expected + (1 - decay) * value
      np.testing.assert_allclose(found[row, column], expected, rtol=2e-6, atol=1e-7)


def test_a_long_average_neither_leaks_nor_grows():
  """A decay and its complement, each rounded, sum to 1 - 2e-8: 10,000 times that."""
  ema, steps = make(0.9999), 20_000
  path = 1 + 0.1 * np.random.default_rng(0).normal(size=(steps, 64))
  path = path.astype(np.float32)

  def step(averages, value):
    return ema.update(averages, {"w": value}, jnp.int32(1)), None

  (found,), _ = jax.lax.scan(step, ema.init({"w": jnp.ones(64)}), path)
  expected = np.ones(64)
  for value in np.float64(path):
    expected += 1e-4 * (value - expected)
  # Roundings of 20,000 updates, which cancel; the leak is 1.4e-4.
  assert abs((found["w"] - expected).mean()) < 5e-6


def test_what_stands_still_is_its_own_average_to_the_bit():
  still = {"w": jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)}
  for ema in (make(0.9999), make(1e5, unit="images"), make(0.1, kind="power")):
    (average,) = jax.jit(ema.update)(ema.init(still), still, jnp.int32(7))
    np.testing.assert_array_equal(average["w"], still["w"])


def test_a_half_life_in_images_is_the_same_at_any_batch_size():
  # 0 until the first update, 1 from then on: after one half-life it is half way.
  for batch_size in (1, 4, 16):
    path = np.append(0.0, np.ones(64 // batch_size))
    ema = make(64.0, 32.0, unit="images", batch_size=batch_size)
    # 64 products, rounded each.
    np.testing.assert_allclose(averages_of(ema, path)[-1], [0.5, 0.75], rtol=1e-5)


def test_a_power_function_average_weighs_each_update_by_its_share_of_a_power():
  """Karras et al. 2024, equation 121: ∫ τ^γ over each update, in float64."""
  path, gamma = random_path(40), 6.94
  expected = np.diff(np.arange(41.0) ** (gamma + 1)) @ path[1:] / 40 ** (gamma + 1)
  # The paper's table: σ_rel 0.10 is γ 6.94 (to the digits given).
  found = averages_of(make(0.1, kind="power"), path)[-1, 0]
  np.testing.assert_allclose(found, expected, rtol=2e-3)
  # The parameters before the first update do not count.
  path[0] = 1e6
  np.testing.assert_allclose(averages_of(make(0.1, kind="power"), path)[-1, 0], found)


def test_the_millionth_update_still_counts_as_it_should():
  """In float32, where 1 - (1 - 1/t)^(γ + 1) would have two digits left."""
  t, gamma = 2_000_000, 6.937
  share = make(0.1, kind="power")._share(0.1, jnp.int32(t))
  np.testing.assert_allclose(share, (gamma + 1) / t, rtol=1e-4)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kind": "cosine"}, "Unknown ema.kind 'cosine'; choose 'exponential' or 'power'"),
    ({"unit": "steps"}, "Unknown ema.unit 'steps'; choose 'updates' or 'images'"),
    ({"values": ()}, "at least one average"),
    ({"values": (0.9, 0.9)}, r"values=\(0.9, 0.9\) must .* none twice"),
    ({"values": (1.0,)}, "decay 1.0 must be at least 0 and below 1"),
    ({"values": (0.9,), "unit": "images"}, "half-life 0.9 must be at least one image"),
    ({"kind": "power", "values": (0.3,)}, "σ_rel=0.3 .* below 0.2887"),
    ({"kind": "power", "values": (0.1,), "unit": "images"}, "set ema.unit='updates'"),
  ],
)
def test_averages_that_are_none_are_refused(fields, message):
  fields = {"kind": "exponential", "values": (0.9,), "unit": "updates"} | fields
  with pytest.raises(ValueError, match=message):
    Ema(**fields, offload=False, batch_size=1)


def test_a_value_is_written_in_paths_as_it_is_written_in_a_config():
  assert [label(v) for v in (0.9999, 0.05, 500000.0)] == ["0.9999", "0.05", "500000"]


# -------------------------------------------------------------- in the host's memory


def placed(ema):
  mesh = sharding.make_mesh(data=1, fsdp=8, context=1)
  params = {"kernel": jnp.arange(16.0).reshape(8, 2)}
  state = TrainState(
    step=jnp.int32(0),
    params=params,
    ema_params=ema.init(params),
    opt_state=(),
    null_caption=(),
    guard=(),
    key=(),
  )
  return state, ema.places(state.shardings(mesh))


def test_offloaded_averages_lie_in_the_hosts_memory_and_are_the_same():
  found = {}
  for offload in (False, True):
    ema = make(0.5, 0.75, offload=offload)
    state, places = placed(ema)

    def step(state, batch, ema=ema):
      params = jax.tree.map(jnp.square, state.params)
      averages = ema.update(state.ema_params, params, state.step + 1)
      return state.replace(ema_params=averages), {}

    step = jax.jit(ema.fetched_for(step), out_shardings=(places, {}), donate_argnums=0)
    state, _ = step(jax.device_put(state, places), {})
    averages = state.ema_params
    kinds = {a.sharding.memory_kind for a in jax.tree.leaves(averages)}
    assert kinds == {"pinned_host" if offload else "device"}
    assert averages[0]["kernel"].sharding.spec == places.params["kernel"].spec
    used = ema.for_use(averages)
    assert used["kernel"].sharding.memory_kind == "device"
    found[offload] = [np.asarray(a["kernel"]) for a in (*averages, used)]
  np.testing.assert_array_equal(found[True], found[False])


def test_devices_that_reach_no_memory_of_the_host_are_named(monkeypatch):
  monkeypatch.setattr("pixsigma_jax.train.ema.HOST_MEMORY", "attic")
  with pytest.raises(ValueError, match=r"needs memory of kind 'attic', and .* has dev"):
    placed(make(0.5, offload=True))


# ------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def power(data, tmp_path_factory):
  """A run that keeps two power-function averages in the host's memory."""
  workdir = tmp_path_factory.mktemp("runs") / "power"
  runs.train(averaging(data), workdir)
  return workdir


def averaging(data, **changes):
  fields = {
    "ema.kind": "power",
    "ema.values": (0.05, 0.1),
    "ema.offload": True,
    "total_steps": 4,
    "checkpoint.snapshot_every": 2,
    "log.sample_every": 4,
    "log.prompts": ("a red seven",),
    "guards.bad_step": "skip",
  }
  return runs.low(data, **(fields | changes))


def test_a_run_leaves_snapshots_of_every_average_which_say_what_they_are(power):
  state = runs.arrays(power, 4)
  for number, (folder, value) in enumerate(
    [(power, 0.05), (power / "ema" / "0.1", 0.1)]
  ):
    assert runs.steps(folder, "snapshots") == [2, 4]
    snapshot = runs.arrays(folder, 4, "snapshots")
    average = runs.part(state, f"ema_params/{number}")
    runs.assert_same(runs.part(snapshot, "params"), average)
    found = checkpoint.read_snapshot(folder)  # as --checkpoint reads it
    assert (found.step, found.metadata.provenance[-1]["ema"]) == (
      4,
      {"kind": "power", "value": value, "unit": "updates", "step": 4},
    )
  assert (power / "samples" / "00000004.png").exists()


def test_a_run_with_offloaded_averages_goes_on_to_the_same_bits(data, power, tmp_path):
  runs.train(averaging(data, total_steps=2), tmp_path)
  # Offloaded or not is no matter of the state.
  runs.train(averaging(data, **{"ema.offload": False}), tmp_path)
  runs.assert_same(runs.arrays(tmp_path, 4), runs.arrays(power, 4))


def test_a_run_does_not_go_on_with_other_averages(data, power):
  message = r"holds other averages .*ema.values: \[0.05, 0.1\] → \(?\[?0.05, 0.2"
  with pytest.raises(ValueError, match=message):
    runs.train(averaging(data, **{"ema.values": (0.05, 0.2)}), power)
  lion = averaging(data)
  with lion.unlocked():
    lion.optimizer.name = "lion"
    del lion.optimizer.eps
  with pytest.raises(ValueError, match=r"optimizer.name: 'adamw' → 'lion'"):
    runs.train(lion, power)
