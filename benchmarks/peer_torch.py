"""The cases of `benchmarks.peers` on diffusers and transformers."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import (
  PixArtTransformer2DModel,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import (
  DPMSolverMultistepScheduler,
)
from torch.nn import functional

from benchmarks.peer_cases import GUIDANCE, STEPS, T5_LAYERS, Case
from pixsigma_jax.convert.pixart import diffusers_config


def prepare(
  case: Case, dtype: str, *, machine: str, compiled: bool, threads: int
) -> Callable[[], Any]:
  """What runs a case once, and waits for it.

  Args:
    machine: cpu or gpu.
    compiled: whether torch.compile has the networks.
    threads: on a CPU.
  """
  torch.set_num_threads(threads)
  place = torch.device("cuda" if machine == "gpu" else "cpu")
  kinds = {
    "forward": _forward,
    "train": _train,
    "sample": _sample,
    "decode": _decode,
    "encode": _encode,
  }
  ready = torch.compile if compiled else lambda model: model
  with place:
    run = kinds[case.kind](case, getattr(torch, dtype), ready)

  def wait() -> None:
    run()
    if place.type == "cuda":
      torch.cuda.synchronize()

  return wait


def device(machine: str) -> tuple[str, int]:
  """The kind of device, and the bytes that have been used of it at most."""
  if machine == "cpu":
    return "cpu", 0
  return torch.cuda.get_device_name(), torch.cuda.max_memory_reserved()


def _drawn(model: Any, dtype: torch.dtype) -> Any:
  """The model with random weights."""
  model = model.to(dtype)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0, 0.02)
  return model


class CompressedAttention(AttnProcessor2_0):
  """diffusers' own, with keys and values merged 2×2 as PixArt-Σ does it.

  diffusers has no compression; the layers are those of the reference, a strided
  convolution a channel and a norm, which keys and values share.
  """

  def __init__(self, width: int, ratio: int):
    super().__init__()
    self.stride = round(ratio**0.5)
    shape = {"kernel_size": self.stride, "stride": self.stride, "groups": width}
    self.merge = torch.nn.Conv2d(width, width, **shape)
    self.norm = torch.nn.LayerNorm(width)

  def __call__(self, attn: Any, hidden_states: Any, **_: Any) -> Any:
    """Attention of `[b n d]`, a square of tokens, to its merged self."""
    b, n, width = hidden_states.shape
    side = round(n**0.5)

    def merged(x: Any) -> Any:
      x = x.transpose(1, 2).reshape(b, width, side, side)
      return self.norm(self.merge(x).flatten(2).transpose(1, 2))

    def heads(x: Any) -> Any:
      return x.reshape(b, -1, attn.heads, width // attn.heads).transpose(1, 2)

    query, key, value = (
      layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    out = functional.scaled_dot_product_attention(
      heads(query), heads(merged(key)), heads(merged(value))
    )
    return attn.to_out[0](out.transpose(1, 2).reshape(b, n, width))


def _transformer(case: Case, dtype: torch.dtype) -> Any:
  config = case.model
  model: Any = PixArtTransformer2DModel.from_config(diffusers_config(config))
  for layer in config.kv_compression.layers:
    attention = model.transformer_blocks[layer].attn1
    processor = CompressedAttention(config.width, case.ratio)
    attention.set_processor(processor)
    # The blocks find their parameters through modules, and a processor is none.
    attention.merge, attention.norm_merged = processor.merge, processor.norm
  return _drawn(model, dtype)


def _inputs(case: Case, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
  config, side = case.model, case.pixels // 8
  captions = case.batch, config.caption_length
  latents = torch.randn((case.batch, config.in_channels, side, side), dtype=dtype)
  return latents, {
    "encoder_hidden_states": torch.randn(*captions, config.caption_width, dtype=dtype),
    "timestep": torch.full((case.batch,), 500.0),
    "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    "encoder_attention_mask": torch.ones(captions),
    "return_dict": False,
  }


def _without_gradient(model: Any, *args: Any, **kwargs: Any) -> Callable[[], Any]:
  def run() -> None:
    with torch.inference_mode():
      model(*args, **kwargs)

  return run


def _forward(case: Case, dtype: torch.dtype, ready: Any) -> Callable[[], Any]:
  latents, conditions = _inputs(case, dtype)
  return _without_gradient(
    ready(_transformer(case, dtype).eval()), latents, **conditions
  )


def _train(case: Case, dtype: torch.dtype, ready: Any) -> Callable[[], Any]:
  network = _transformer(case, torch.float32)
  if case.remat:
    network.enable_gradient_checkpointing()
  model = ready(network.train())
  optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
  latents, conditions = _inputs(case, torch.float32)

  def run() -> None:
    mixed = torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32)
    with mixed:
      noise = model(latents, **conditions)[0].chunk(2, dim=1)[0]
    functional.mse_loss(noise.float(), latents).backward()
    optimizer.step()
    optimizer.zero_grad()

  return run


def _vae() -> Any:
  config: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
  }
  return AutoencoderKL(**config)


def _sample(case: Case, dtype: torch.dtype, ready: Any) -> Callable[[], Any]:
  vae = _drawn(_vae(), dtype).eval()
  if case.pixels > 2048:
    vae.enable_tiling()
  # Networks are left out that only prompts need: these come as embeddings.
  parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
  with torch.device("cpu"):  # NumPy reads its tables
    parts["scheduler"] = DPMSolverMultistepScheduler()
  pipeline: Any = PixArtSigmaPipeline(
    **parts,
    vae=vae,
    transformer=_transformer(case, dtype).eval(),
  )
  pipeline.set_progress_bar_config(disable=True)
  pipeline.transformer = ready(pipeline.transformer)
  vae.decode = ready(vae.decode)
  _, conditions = _inputs(case, dtype)
  embeddings, mask = (
    conditions[name] for name in ("encoder_hidden_states", "encoder_attention_mask")
  )
  return lambda: pipeline(
    prompt=None,
    negative_prompt=None,
    prompt_embeds=embeddings,
    prompt_attention_mask=mask,
    negative_prompt_embeds=embeddings,
    negative_prompt_attention_mask=mask,
    height=case.pixels,
    width=case.pixels,
    num_inference_steps=STEPS,
    guidance_scale=GUIDANCE,
    use_resolution_binning=False,
  )


def _decode(case: Case, dtype: torch.dtype, ready: Any) -> Callable[[], Any]:
  decoder = ready(_drawn(_vae().decoder, dtype).eval())
  side = case.pixels // 8
  return _without_gradient(
    decoder, torch.randn((case.batch, 4, side, side), dtype=dtype)
  )


def _encode(case: Case, dtype: torch.dtype, ready: Any) -> Callable[[], Any]:
  config = transformers.T5Config(
    d_model=4096,
    num_layers=T5_LAYERS,
    num_heads=64,
    d_kv=64,
    d_ff=10240,
    vocab_size=32128,
    feed_forward_proj="gated-gelu",
  )
  model = ready(_drawn(transformers.T5EncoderModel(config), dtype).eval())
  ids = torch.ones((case.batch, 300), dtype=torch.long)
  return _without_gradient(model, input_ids=ids, attention_mask=torch.ones_like(ids))
