"""The cases of `benchmarks.peers` on this package."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peer_cases import GUIDANCE, STEPS, T5_LAYERS, Case
from pixsigma_jax.models import t5, vae
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import (
  PixArt,
  PixArtConfig,
  abstract_params,
  inference_params,
  laid_out,
)
from pixsigma_jax.sample import Pipeline
from pixsigma_jax.sample.encoders import RememberedCaptions


def prepare(case: Case, dtype: str, *, machine: str) -> Callable[[], Any]:
  """What runs a case once, and waits for it.

  Args:
    machine: cpu or gpu.

  Raises:
    ValueError: JAX computes on another.
  """
  if jax.default_backend() != machine:
    raise ValueError(
      f"JAX computes on {jax.default_backend()}, not on {machine}: for a GPU "
      'pip install -e ".[gpu]", for a CPU set JAX_PLATFORMS=cpu.'
    )
  kinds = {
    "forward": _forward,
    "train": _train,
    "sample": _sample,
    "decode": _decode,
    "encode": _encode,
  }
  return kinds[case.kind](case, jnp.dtype(dtype))


def device(_: str) -> tuple[str, int]:
  """The kind of device, and the bytes that have been used of it at most."""
  first = jax.devices()[0]
  return first.device_kind, (first.memory_stats() or {}).get("peak_bytes_in_use", 0)


def _drawn(shapes: Any, dtype: Any = jnp.float32) -> Any:
  """Random arrays of those shapes."""
  numbers = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(np.float32)
  return jax.tree.map(
    lambda leaf: jnp.asarray(np.resize(numbers, leaf.shape), dtype), shapes
  )


def _compute(case: Case, dtype: Any) -> Compute:
  on_cpu = jax.default_backend() == "cpu"
  remat = "attention" if case.remat else "none"
  return Compute(dtype=dtype, attention="auto", remat=remat, unroll=on_cpu)


def _inputs(case: Case, config: PixArtConfig) -> tuple[Any, ...]:
  side, b = case.pixels // 8, case.batch
  captions = (b, config.caption_length)
  return (
    _drawn(jax.ShapeDtypeStruct((b, side, side, config.in_channels), jnp.float32)),
    jnp.full((b,), 500.0),
    _drawn(jax.ShapeDtypeStruct((*captions, config.caption_width), jnp.float32)),
    jnp.ones(captions, bool),
  )


def _forward(case: Case, dtype: Any) -> Callable[[], Any]:
  config = case.model
  model = PixArt(config, _compute(case, dtype))
  params = inference_params(_drawn(abstract_params(config)), model.compute)
  forward, inputs = jax.jit(model.apply), _inputs(case, config)
  return lambda: jax.block_until_ready(forward({"params": params}, *inputs))


def _train(case: Case, dtype: Any) -> Callable[[], Any]:
  config, optimizer = case.model, optax.adamw(1e-4)
  model, inputs = PixArt(config, _compute(case, dtype)), _inputs(case, config)

  def step(state: Any, inputs: Any) -> Any:
    params, moments = state

    def loss(params: Any) -> Any:
      apart = laid_out(params, model.compute)
      output: Any = model.apply({"params": apart}, *inputs)
      noise, _ = jnp.split(output, 2, axis=-1)
      return jnp.square(noise - inputs[0]).mean()

    updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
    return optax.apply_updates(params, updates), moments

  jitted = jax.jit(step, donate_argnums=0)
  params = _drawn(abstract_params(config))
  state = params, jax.jit(optimizer.init)(params)

  def run() -> None:
    nonlocal state
    state = jax.block_until_ready(jitted(state, inputs))

  return run


def _sample(case: Case, dtype: Any) -> Callable[[], Any]:
  config, vae_config = case.model, vae.VAEConfig()
  length, width = config.caption_length, config.caption_width
  compute = _compute(case, dtype)
  embeddings = np.resize(np.array([0.1, -0.2, 0.3], np.float32), (2, length, width))
  pipeline = Pipeline(
    config=config,
    params=inference_params(_drawn(abstract_params(config)), compute),
    null_caption=None,
    autoencoder=vae.KLAutoencoder(
      config=vae_config,
      params=_drawn(vae.abstract_params(vae_config)),
      scaling_factor=0.13025,
      dtype=dtype,
    ),
    text_encoder=RememberedCaptions(
      {"name": "t5", "width": width},
      ["", "a red fox"],
      embeddings,
      np.ones((2, length), bool),
    ),
    resolution=case.pixels,
    compute=compute,
  )
  return lambda: pipeline(
    "a red fox",
    num_inference_steps=STEPS,
    guidance_scale=GUIDANCE,
    use_resolution_binning=False,
  )


def _decode(case: Case, dtype: Any) -> Callable[[], Any]:
  config, side = vae.VAEConfig(), case.pixels // 8
  params = _drawn(vae.abstract_params(config)["decoder"])
  latents = _drawn(jax.ShapeDtypeStruct((case.batch, side, side, 4), jnp.float32))
  network = vae.Decoder(config, dtype)
  return lambda: jax.block_until_ready(vae.run(params, latents, network=network))


def _encode(case: Case, dtype: Any) -> Callable[[], Any]:
  config = t5.T5Config(
    width=4096,
    num_layers=T5_LAYERS,
    num_heads=64,
    head_width=64,
    hidden=10240,
    vocabulary=32128,
  )
  params = _drawn(t5.abstract_t5_params(config), dtype)
  encode = jax.jit(t5.T5Encoder(config, dtype).apply)
  ids, mask = jnp.ones((case.batch, 300), jnp.int32), jnp.ones((case.batch, 300), bool)
  return lambda: jax.block_until_ready(encode({"params": params}, ids, mask))
