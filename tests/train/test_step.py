"""The step function: what a month-long run, and a pod, rely on."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pixsigma_jax import sharding
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.models import tokens
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt
from pixsigma_jax.train.ema import Ema
from pixsigma_jax.train.loss import make_loss
from pixsigma_jax.train.optimizer import make_optimizer, make_schedule
from pixsigma_jax.train.step import init_state, make_train_step
from tests.sample import models

B1, B2, EPS, DECAY, CLIP, EMA = 0.9, 0.99, 0.03, 0.1, 0.5, 0.8
NULL = jnp.zeros((2, 3))
TIMESTEPS = np.array([0, 99, 100, 450, 899, 999], np.int32)


def adamw(learning_rate, clip_norm=CLIP):
  return make_optimizer(
    learning_rate,
    name="adamw",
    b1=B1,
    b2=B2,
    eps=EPS,
    weight_decay=DECAY,
    clip_norm=clip_norm,
    groups=(),
  )


def linear_loss(params, null_caption, batch, key):
  """Linear in the parameters: every gradient is the batch's mean of x, by hand."""
  loss = batch["x"] @ params["w"] + params["b"][None]
  loss = loss[:, 0]
  parts = {"loss": loss, "mse": 2 * loss, "vb": -loss, "timesteps": batch["timesteps"]}
  return loss.mean(), parts


def noisy_loss(params, null_caption, batch, key):
  noisy = {**batch, "x": batch["x"] + jax.random.normal(key, batch["x"].shape)}
  return linear_loss(params, null_caption, noisy, key)


def start(key, tx):
  params = {"w": jnp.array([[0.5], [-2.0], [1.0]]), "b": jnp.array([0.3])}
  return init_state(params, NULL + 0, tx, ema(), key)


def batch_of(seed, scale=1.0):
  x = scale * np.random.default_rng(seed).normal(size=(6, 3)).astype(np.float32)
  replaced = jnp.zeros(len(x), bool)
  return {
    "x": jnp.asarray(x),
    "timesteps": jnp.asarray(TIMESTEPS),
    "replaced": replaced,
  }


def ema(*values, kind="exponential"):
  return Ema(
    kind=kind, values=values or (EMA,), unit="updates", offload=False, batch_size=6
  )


def unjitted(loss, tx, trained=lambda name: True, accumulation=1):
  return make_train_step(
    loss, tx, ema(), trained=trained, accumulation=accumulation, num_timesteps=1000
  )


def train_step(*arguments, **fields):
  return jax.jit(unjitted(*arguments, **fields))


def flat(params):
  return np.concatenate([params["w"][:, 0], params["b"]]).astype(np.float64)


def test_three_steps_equal_clipped_adamw_and_the_moving_average_by_hand(key):
  schedule = make_schedule(
    learning_rate=0.2,
    scale_rule="none",
    schedule="constant",
    warmup_steps=1,
    total_steps=9,
    batch_size=6,
  )
  tx = adamw(schedule)
  step, state = train_step(linear_loss, tx), start(key, tx)
  params = average = flat(state.params)
  m, v, norms = 0.0, 0.0, []

  # In float64, from the papers: Adam's algorithm 1 with decoupled decay.
  for t, scale in enumerate([1.0, 0.1, 2.0], 1):
    batch = batch_of(t, scale)
    gradient = np.append(np.mean(np.asarray(batch["x"], np.float64), axis=0), 1.0)
    norms.append(np.linalg.norm(gradient))
    clipped = gradient * min(1.0, CLIP / norms[-1])
    m, v = B1 * m + (1 - B1) * clipped, B2 * v + (1 - B2) * clipped**2
    direction = m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS) + DECAY * params
    update = -(0.0 if t == 1 else 0.2) * direction
    before, params = params, params + update
    average = EMA * average + (1 - EMA) * params

    state, metrics = step(state, batch)
    # In float32, 1 - 0.99^t is known to 6e-6.
    np.testing.assert_allclose(flat(state.params), params, rtol=1e-5)
    np.testing.assert_allclose(flat(state.ema_params[0]), average, rtol=1e-5)
    assert (state.step.dtype, int(state.step)) == (jnp.int32, t)
    measured = {
      "loss": np.mean(np.asarray(batch["x"]) @ before[:3] + before[3]),
      "norm/gradients": norms[-1],
      "norm/updates": np.linalg.norm(update),
      "norm/params": np.linalg.norm(params),
    }
    for name, value in measured.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
  assert max(norms) > CLIP  # or clipping would not have been seen


def test_tenths_of_the_timesteps_and_rows_sum_to_the_loss(key):
  tx = adamw(optax.constant_schedule(0.1))
  _, metrics = train_step(linear_loss, tx)(start(key, tx), batch_of(0))
  assert metrics["decile_count"].tolist() == [2, 1, 0, 0, 1, 0, 0, 0, 1, 1]
  by_row = metrics["example_loss"]
  assert by_row.shape == (6,)
  rows = [by_row[0] + by_row[1], by_row[2], by_row[3], by_row[4], by_row[5]]
  found = metrics["decile_loss"][jnp.array([0, 1, 4, 8, 9])]
  np.testing.assert_allclose(found, jnp.array(rows), rtol=1e-6)
  np.testing.assert_allclose(metrics["decile_loss"].sum() / 6, metrics["loss"], 1e-6)
  np.testing.assert_allclose(metrics["mse"], 2 * metrics["loss"], rtol=1e-6)
  np.testing.assert_allclose(metrics["vb"], -metrics["loss"], rtol=1e-6)


def test_every_step_draws_its_own_noise_from_the_same_key(key):
  tx = optax.sgd(0.0)  # frozen weights: only the noise can move the loss
  step, state, batch = train_step(noisy_loss, tx), start(key, tx), batch_of(0)
  losses = []
  for _ in range(3):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert len(set(losses)) == 3
  assert state.key == key
  np.testing.assert_array_equal(state.null_caption, NULL)


def test_a_step_is_a_function_of_its_number_not_of_the_way_there(key):
  tx = optax.sgd(0.0)
  step, batch = train_step(noisy_loss, tx), batch_of(0)
  state = start(key, tx)
  for _ in range(3):
    state, metrics = step(state, batch)
  _, jumped = step(start(key, tx).replace(step=jnp.int32(2)), batch)
  assert metrics["loss"] == jumped["loss"]  # to the bit: no tolerance


def test_a_fresh_state_can_be_given_away_and_averages_from_its_parameters(key):
  tx = adamw(optax.constant_schedule(0.1))
  state = start(key, tx)
  jax.tree.map(np.testing.assert_array_equal, state.ema_params, (state.params,))
  assert int(state.step) == 0
  step = unjitted(linear_loss, tx)
  # A buffer that the state held twice would be refused here.
  state, _ = jax.jit(step, donate_argnums=0)(state, batch_of(0))
  assert int(state.step) == 1


def test_what_is_frozen_has_no_gradient_and_does_not_count_in_the_norm(key):
  tx = make_optimizer(
    optax.constant_schedule(0.1),
    name="adamw",
    b1=B1,
    b2=B2,
    eps=EPS,
    weight_decay=DECAY,
    clip_norm=CLIP,
    groups=[("w", 0.0)],
  )
  state = start(key, tx)
  step = train_step(linear_loss, tx, trained=lambda name: name != "w")
  after, metrics = step(state, batch_of(0))
  np.testing.assert_array_equal(after.params["w"], state.params["w"])
  np.testing.assert_array_equal(after.ema_params[0]["w"], state.params["w"])
  assert after.params["b"] != state.params["b"]
  np.testing.assert_allclose(metrics["norm/gradients"], 1.0, rtol=1e-6)  # of b alone
  assert not any(leaf.shape == (3, 1) for leaf in jax.tree.leaves(state.opt_state))


# ------------------------------------------------------------------------ on a mesh

CONFIG = models.nano()
ROWS, LENGTH = 8, 16


def image_batch():
  """Mixed aspect ratios, so that padding and crossing windows are sharded too."""
  draw = np.random.default_rng(3)
  grids = [(4, 4), (2, 8), (4, 2), (6, 2)] * 2
  places = [tokens.coordinates(grid, CONFIG.window) for grid in grids]
  padded = [np.pad(p, ((0, LENGTH - len(p)), (0, 0))) for p in places]
  return {
    "latents": draw.normal(size=(ROWS, LENGTH, 12)).astype(np.float16),
    "coordinates": np.stack(padded),
    "grid": np.array(grids, np.int32),
    "caption_embeddings": draw.normal(size=(ROWS, 8, 16)).astype(np.float16),
    "caption_mask": np.arange(8)[None] < np.arange(1, 9)[:, None],
    "row": np.arange(ROWS, dtype=np.int32),
    "replaced": np.arange(ROWS) == 2,
  }


@functools.cache
def two_steps(data, fsdp, context, accumulation=1):
  """Losses, gradient norms and the state after two steps on a mesh."""
  devices = jax.devices()[: data * fsdp * context]
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, context=context, devices=devices)
  # An epsilon of 1 makes the update follow the gradient: with Adam's usual one, the
  # rounding error of a gradient that should be 0 would decide the sign of a step.
  tx = make_optimizer(
    optax.constant_schedule(0.5),
    name="adamw",
    b1=B1,
    b2=B2,
    eps=1.0,
    weight_decay=0.0,
    clip_norm=1.0,
    groups=(),
  )
  compute = Compute(dtype=jnp.float32, unroll=True, merge_rows=context == 1, mesh=mesh)
  loss = make_loss(
    PixArt(CONFIG, compute),
    linear_schedule(),
    scaling_factor=2.0,
    caption_dropout=0.5,
    snr_switch=False,
    min_snr_gamma=None,
    snr_shift=1.0,
    timestep_beta=None,
    timestep_range=(0, 999),
    frequency_weight=0.0,
    frequency_gamma=1.0,
    wavelet_offset=None,
  )
  null_caption = jnp.asarray(models.null_caption(CONFIG))
  state = init_state(
    models.random_params(CONFIG), null_caption, tx, ema(0.5), jax.random.key(0)
  )
  places = state.shardings(mesh)
  state = jax.device_put(state, places)
  batch = image_batch()
  batch_places = sharding.batch_shardings(batch, mesh)
  batch = sharding.global_batch(batch, batch_places)
  step = jax.jit(
    make_train_step(
      loss,
      tx,
      ema(0.5),
      trained=lambda name: True,
      accumulation=accumulation,
      num_timesteps=1000,
    ),
    in_shardings=(places, batch_places),
    out_shardings=(places, sharding.replicated(mesh)),
  )
  state, first = step(state, batch)
  state, second = step(state, batch)
  return state, [first, second]


@pytest.mark.parametrize(
  "mesh", [(2, 2, 2), (8, 1, 1), (1, 1, 8), (2, 2, 2, 2), (1, 1, 1, 4)], ids=str
)
def test_a_mesh_trains_as_one_device_does(mesh):
  state, metrics = two_steps(*mesh)
  alone, expected = two_steps(1, 1, 1)
  for found, wanted in zip(metrics, expected, strict=True):
    for name in ("loss", "norm/gradients", "example_loss", "decile_loss"):
      np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)
  for kind in ("params", "ema_params", "opt_state"):
    pairs = zip(
      jax.tree.leaves(getattr(state, kind)),
      jax.tree.leaves(getattr(alone, kind)),
      strict=True,
    )
    for ours, theirs in pairs:
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
  # Both steps moved it: a frozen model would agree with itself on any mesh.
  assert expected[0]["norm/updates"] > 1e-3
  assert metrics[0]["loss"] != metrics[1]["loss"]


def test_a_batch_taken_in_parts_moves_no_row_from_device_to_device():
  mesh = sharding.make_mesh(data=4, fsdp=2, context=1)
  batch = {
    "x": jnp.ones((32, 3)),
    "timesteps": jnp.zeros(32, jnp.int32),
    "replaced": jnp.zeros(32, bool),
  }
  tx = optax.sgd(0.1)
  state = start(jax.random.key(0), tx)
  step = jax.jit(
    unjitted(linear_loss, tx, accumulation=4),
    in_shardings=(sharding.replicated(mesh), sharding.batch_shardings(batch, mesh)),
  )
  program = step.lower(state, batch).compile().as_text()
  # A batch in parts of 4 rows a device would be exchanged between all of them.
  assert "all-to-all" not in program
  assert "collective-permute" not in program
  gathered = re.findall(r"= (\S+) all-gather\(", program)
  # Only each row's loss, for the metrics.
  assert not [shape for shape in gathered if ",3]" in shape]


def test_moments_and_average_are_sharded_as_their_parameters():
  state, _ = two_steps(2, 2, 2)
  for params in (state.params, state.ema_params[0], *state.opt_state[1][1:]):
    kernel = params["blocks_00_00"]["mlp"]["in"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(1, 24, 192)}
    bias = params["blocks_00_00"]["mlp"]["in"]["bias"]
    assert {s.data.shape for s in bias.addressable_shards} == {(1, 192)}
