"""Learning rates step by step, and each optimizer against its own origin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pixsigma_jax import sharding, tree
from pixsigma_jax.train.optimizer import (
  group_factor,
  make_optimizer,
  make_schedule,
  rate_in_words,
)

ADAMW = {
  "name": "adamw",
  "b1": 0.9,
  "b2": 0.99,
  # Large, so that it matters whether it stands under the root.
  "eps": 0.03,
  "weight_decay": 0.1,
  "clip_norm": 1.0,
  "groups": (),
}


def rates(total_steps=10, **fields):
  fields = {"learning_rate": 0.5, "schedule": "constant", "warmup_steps": 0} | fields
  fields = {"scale_rule": "none", "batch_size": 8} | fields
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
    ValueError,
    match=r"optimizer\.name 'sgd'; choose one of 'adamw', 'came', 'adafactor'",
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
    learning_rate=0.3,
    scale_rule="none",
    schedule="cosine",
    warmup_steps=1,
    total_steps=4,
    batch_size=1,
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


@pytest.mark.parametrize(
  ("rule", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)]
)
def test_a_rate_for_a_batch_of_256_is_scaled_by_its_rule(rule, factor):
  found = rates(scale_rule=rule, batch_size=1024, warmup_steps=1)
  np.testing.assert_allclose(found[1:], 0.5 * factor, rtol=1e-6)
  # The official code's: 2e-5 becomes 4e-5 at a batch of 1024.
  words = rate_in_words(2e-5, rule=rule, batch_size=1024)
  assert f"rate {2e-5 * factor:.4g}: the config's 2e-05 by the rule {rule!r}" in words
  assert "batch 1024, base batch 256" in words


def test_an_unknown_rule_is_named_with_the_known():
  with pytest.raises(ValueError, match="scale_rule 'auto'; choose one of 'none', 'sq"):
    rates(scale_rule="auto")


# --------------------------------------------------------------- those of optax

# A leaf of every kind that a network has, in a stack of two layers and outside.
SHAPES = {
  "blocks_00_01": {
    "attention": {
      "qkv": {"kernel": (2, 3, 8, 16), "bias": (2, 3, 16)},
      "kv_compressor": {"kernel": (2, 2, 2, 16)},
    },
    "mlp": {"in": {"kernel": (2, 16, 24), "bias": (2, 24)}},
    "scale_shift_table": (2, 6, 16),
  },
  "out": {"kernel": (16, 8), "bias": (8,)},
  "patch_embedding": {"kernel": (2, 2, 4, 16)},
}


def draws(seed=0):
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(draw.normal(size=shape), jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


ADAFACTOR = {
  "b1": 0.9,
  "decay_rate": 0.8,
  "eps": 1e-30,
  "clip_threshold": 0.5,
  "min_size_to_factor": 8,
  "scale_by_parameter": True,
}
LION = {"b1": 0.9, "b2": 0.99}
MUON = {
  "beta": 0.95,
  "nesterov": True,
  "newton_schulz_steps": 5,
  "consistent_rms": 0.2,
  "eps": 1e-8,
  "adam_b1": 0.9,
  "adam_b2": 0.99,
}
FIELDS = {"adafactor": ADAFACTOR, "lion": LION, "muon": MUON}
RATE = 0.01


def ours(name, **changes):
  fields = {"weight_decay": 0.0, "clip_norm": 1e9, "groups": ()}
  return make_optimizer(
    lambda step: RATE, name=name, **{**fields, **FIELDS[name], **changes}
  )


def theirs(name):
  if name == "lion":
    return optax.lion(RATE, b1=0.9, b2=0.99, weight_decay=0.0)
  if name == "adafactor":
    return optax.adafactor(
      RATE, min_dim_size_to_factor=8, clipping_threshold=0.5, momentum=0.9
    )
  return optax.contrib.muon(RATE, consistent_rms=0.2, adam_b2=0.99)


def official(params):
  """Every tensor of a network by itself, as torch has them but for transposition."""
  tensors = {}
  for name, leaf in tree.named_leaves(params).items():
    leaf = np.asarray(leaf)
    layers = enumerate(leaf) if name.startswith("blocks_") else [("", leaf)]
    tensors |= {f"{name}/{i}": jnp.asarray(layer) for i, layer in layers}
  return tensors


def optax_on(tensors, fused):
  """Their layout of a leaf's tensor: q, k and v as one, or each by itself."""
  found = {}
  for key, x in tensors.items():
    if "/qkv/" in key and fused:
      found[key] = jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)
    elif "/qkv/" in key:
      found |= {f"{key}/{i}": part for i, part in enumerate(x)}
    else:
      found[key] = x
  return found


def is_hidden(key):
  return key.startswith("blocks_") and "/kernel/" in key and "compressor" not in key


@pytest.mark.parametrize("name", FIELDS)
def test_each_tensor_of_a_stack_is_updated_as_optax_updates_it_alone(name):
  params = draws()
  tx = ours(name)
  state, peers = tx.init(params), {}
  update = jax.jit(tx.update)
  fused = name == "adafactor"
  begun = optax_on(official(params), fused)
  peer = theirs(name)
  if name == "muon":  # Adam wherever optax would take any matrix for Muon's
    adam = optax.adamw(RATE, b2=0.99, eps=1e-8, weight_decay=0.0, nesterov=True)
    peer = optax.partition(
      {True: peer, False: adam}, lambda tree: {key: is_hidden(key) for key in tree}
    )
  peers = peer.init(begun)
  peer_update = jax.jit(peer.update)
  for number in range(3):
    gradients = draws(number + 1)
    moved, state = update(gradients, state, params)
    expected, peers = peer_update(optax_on(official(gradients), fused), peers, begun)
    found = optax_on(official(moved), fused)
    for key, value in expected.items():
      # Sums in another order; Muon multiplies matrices fifteen times.
      np.testing.assert_allclose(
        found[key], value, rtol=2e-4, atol=2e-4 * RATE, err_msg=key
      )


@pytest.mark.parametrize("name", FIELDS)
def test_weight_decay_is_decoupled_in_every_optimizer(name):
  params = draws()
  gradients = draws(1)

  def first(weight_decay):
    tx = ours(name, weight_decay=weight_decay)
    return jax.jit(tx.update)(gradients, tx.init(params), params)[0]

  jax.tree.map(
    # Of numbers around the rate, a rounding of float32.
    lambda a, b, p: np.testing.assert_allclose(a - b, -RATE * 0.1 * p, atol=1e-7),
    first(0.1),
    first(0.0),
    params,
  )


@pytest.mark.parametrize("name", FIELDS)
def test_every_state_has_its_place_on_a_mesh(name):
  mesh = sharding.make_mesh(data=1, fsdp=8, context=1)
  params = draws()
  state = jax.eval_shape(ours(name).init, params)
  places = tree.named_leaves(sharding.state_shardings(state, mesh, params))
  # What is as large as its parameter is split as it is.
  split = {n for n, place in places.items() if "mlp/in/kernel" in n and any(place.spec)}
  assert len(split) == 1


# ---------------------------------------------------------------------- groups


def groups_step(*groups, name="adamw", params=None, scale=1.0, clip_norm=1e9):
  fields = FIELDS.get(name, {"b1": 0.9, "b2": 0.99, "eps": 0.03})
  tx = make_optimizer(
    lambda step: RATE,
    name=name,
    weight_decay=0.1,
    clip_norm=clip_norm,
    groups=groups,
    **fields,
  )
  params = draws() if params is None else params
  gradients = jax.tree.map(lambda x: scale * x, draws(1))
  state = tx.init(params)
  updates, _ = jax.jit(tx.update)(gradients, state, params)
  return tree.named_leaves(updates), state


def test_a_factor_multiplies_the_rate_of_its_leaves_and_the_first_match_counts():
  plain, state = groups_step()
  scaled, other = groups_step(("attention/qkv", 0.5), ("attention", 3.0), ("^out", 1))
  assert jax.tree.structure(state) == jax.tree.structure(other)
  for name, update in plain.items():
    factor = 0.5 if "attention/qkv" in name else 3.0 if "attention" in name else 1.0
    np.testing.assert_allclose(scaled[name], factor * update, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_what_is_frozen_neither_moves_nor_decays_nor_has_a_state(name):
  _, whole = groups_step(name=name)
  updates, state = groups_step((r"^blocks_.*mlp", 0.0), name=name)
  frozen = {n for n in updates if "/mlp/" in n}
  assert {n for n, update in updates.items() if not np.any(update)} == frozen
  assert not any("mlp" in n for n in tree.named_leaves(state))
  assert tree.size(state) < tree.size(whole)


def test_the_norm_that_is_clipped_is_of_what_is_trained():
  # Alone, the head's gradient is shorter than the clip; with the blocks' it is not.
  head = draws(1)["out"]
  length = float(optax.tree.norm(head)) * 1.01
  frozen, _ = groups_step(("^(?!out)", 0.0), clip_norm=length)
  alone, _ = groups_step(("^(?!out)", 0.0))
  np.testing.assert_array_equal(frozen["out/kernel"], alone["out/kernel"])
  clipped, _ = groups_step(clip_norm=length)
  assert (clipped["out/kernel"] != alone["out/kernel"]).any()


@pytest.mark.parametrize(
  ("groups", "message"),
  [
    ([("attention/qvk", 0.1)], r"no parameter has 'attention/qvk' .* Near are .*qkv"),
    ([("out", -1.0)], r"\('out', -1.0\) must be a pattern and a factor"),
    ([("out", 1.0, 2.0)], "must be a pattern and a factor"),
    ([("out(", 1.0)], r"'out\(' is no regular expression"),
    ([("", 0.0)], "freeze every parameter"),
  ],
)
def test_groups_that_are_none_are_refused(groups, message):
  with pytest.raises(ValueError, match=message):
    groups_step(*groups)


def test_a_factor_is_asked_by_name():
  factor = group_factor([("qkv", 0.0), ("", 2.0)])
  assert [factor("blocks_00_27/attention/qkv/bias"), factor("out/bias")] == [0, 2]
