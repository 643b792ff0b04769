"""Learning rates step by step, and AdamW against its own paper's arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.train.optimizer import make_optimizer, make_schedule

ADAMW = {
  "name": "adamw",
  "b1": 0.9,
  "b2": 0.99,
  # Large, so that it matters whether it stands under the root.
  "eps": 0.03,
  "weight_decay": 0.1,
  "clip_norm": 1.0,
}


def rates(total_steps=10, **fields):
  fields = {"learning_rate": 0.5, "schedule": "constant", "warmup_steps": 0} | fields
  schedule = make_schedule(**fields, total_steps=total_steps)
  return np.array([float(schedule(step)) for step in range(total_steps + 1)])


def test_a_constant_rate_without_warm_up_is_whole_from_the_first_update():
  np.testing.assert_array_equal(rates(), 0.5)


def test_a_warm_up_rises_from_0_in_equal_steps_and_is_over_when_it_says():
  expected = [0.0, 0.125, 0.25, 0.375] + [0.5] * 7
  np.testing.assert_allclose(rates(warmup_steps=4), expected, rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_a_cosine_falls_from_the_full_rate_to_0_at_the_last_step(warmup_steps):
  found = rates(schedule="cosine", warmup_steps=warmup_steps)
  passed = np.arange(11 - warmup_steps) / (10 - warmup_steps)
  falling = 0.5 * (1 + np.cos(np.pi * passed)) / 2
  rising = 0.5 * np.arange(warmup_steps) / max(warmup_steps, 1)
  np.testing.assert_allclose(found, [*rising, *falling], rtol=1e-6, atol=1e-8)


def test_an_unknown_schedule_is_named_with_the_known():
  with pytest.raises(ValueError, match="'linear'; choose 'constant' or 'cosine'"):
    rates(schedule="linear")


@pytest.mark.parametrize("warmup_steps", [-1, 10, 11])
def test_a_warm_up_that_leaves_no_step_is_refused_with_both_numbers(warmup_steps):
  with pytest.raises(ValueError, match=f"warmup_steps={warmup_steps} .*total_steps=10"):
    rates(warmup_steps=warmup_steps)


def test_an_unknown_optimizer_is_named_with_the_known():
  with pytest.raises(
    ValueError, match=r"optimizer\.name 'sgd'; choose 'adamw' or 'came'"
  ):
    make_optimizer(lambda step: 1.0, **{**ADAMW, "name": "sgd"})


@pytest.mark.parametrize("clip_norm", [0.0, -1.0])
def test_a_norm_that_clips_everything_away_is_refused(clip_norm):
  with pytest.raises(ValueError, match=f"clip_norm={clip_norm} must be above 0"):
    make_optimizer(lambda step: 1.0, **{**ADAMW, "clip_norm": clip_norm})


def by_hand(params, gradients, learning_rates):
  """Decoupled weight decay regularization (2019), algorithm 2, after global clipping.

  Float64, one flat vector: a global norm knows no leaves.
  """
  m, v = np.zeros_like(params), np.zeros_like(params)
  for t, (gradient, rate) in enumerate(zip(gradients, learning_rates, strict=True), 1):
    gradient = gradient / max(1.0, np.linalg.norm(gradient) / ADAMW["clip_norm"])
    m = ADAMW["b1"] * m + (1 - ADAMW["b1"]) * gradient
    v = ADAMW["b2"] * v + (1 - ADAMW["b2"]) * gradient**2
    m_hat, v_hat = m / (1 - ADAMW["b1"] ** t), v / (1 - ADAMW["b2"] ** t)
    step = m_hat / (np.sqrt(v_hat) + ADAMW["eps"]) + ADAMW["weight_decay"] * params
    params = params - rate * step
  return params


def test_updates_are_those_of_the_paper_after_clipping_to_a_global_norm():
  draw = np.random.default_rng(0)
  flat = draw.normal(size=8)
  # The first and third are longer than the clip, the second is shorter.
  gradients = [scale * draw.normal(size=8) for scale in (2.0, 0.05, 1.0)]
  schedule = make_schedule(
    learning_rate=0.3, schedule="cosine", warmup_steps=1, total_steps=4
  )
  tx = make_optimizer(schedule, **ADAMW)

  def as_tree(vector):
    vector = jnp.asarray(vector, jnp.float32)
    return {"kernel": vector[:6].reshape(2, 3), "bias": vector[6:]}

  params = as_tree(flat)
  state = tx.init(params)
  for gradient in gradients:
    updates, state = tx.update(as_tree(gradient), state, params)
    params = jax.tree.map(jnp.add, params, updates)

  expected = by_hand(flat, gradients, [0.0, 0.3, 0.3 * (1 + np.cos(np.pi / 3)) / 2])
  found = np.concatenate([params["kernel"].ravel(), params["bias"]])
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)  # float32's own
  # Steps taken off the parameters, not left out: decay acts on biases as well.
  assert np.abs(found - flat).min() > 0
