"""The networks of scores, in ours and in torch, and as TPU's compiler makes them."""

import dataclasses
import importlib
import io
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from PIL import Image

from pixsigma_jax.evaluate.scorers import inception as inception_scorer
from pixsigma_jax.models import clip, inception
from pixsigma_jax.models.clip import ClipConfig, TowerConfig
from pixsigma_jax.plan import memory, topology
from pixsigma_jax.plan.compilation import compile_lowered

PASSES = 6  # of bfloat16 that a product in float32 is made of


def clip_config(
  image: tuple[int, int, int], text: tuple[int, int, int], patch: int, size: int
) -> ClipConfig:
  """OpenAI's CLIP of `width, layers, heads` of both towers."""
  towers = [
    TowerConfig(width=w, num_layers=n, num_heads=heads, hidden=4 * w)
    for w, n, heads in (image, text)
  ]
  return ClipConfig(
    image=towers[0],
    text=towers[1],
    projection=text[0],
    image_size=size,
    patch_size=patch,
    vocabulary=49408,
    max_length=77,
  )


@dataclasses.dataclass(frozen=True)
class Network:
  """A tower of CLIP, or Inception-v3 in torchvision's variant if there is no config."""

  config: ClipConfig | None = None
  tower: Literal["image", "text"] = "image"

  def params(self) -> Any:
    """Shapes of the parameters."""
    if self.config is None:
      return inception.abstract_inception_params("torchvision")
    return clip.abstract_clip_params(self.config, self.tower)

  def inputs(self, batch: int) -> jax.ShapeDtypeStruct:
    """Shape of a batch, as the program takes it."""
    if self.config is None:
      return jax.ShapeDtypeStruct((batch, inception.SIZE, inception.SIZE, 3), "float32")
    if self.tower == "text":
      return jax.ShapeDtypeStruct((batch, self.config.max_length), "int32")
    size = self.config.image_size
    return jax.ShapeDtypeStruct((batch, size, size, 3), "uint8")

  def lower(self, params: Any, inputs: Any) -> Any:
    """The scorers' program, lowered."""
    if self.config is None:
      return inception_scorer._features.lower(params, inputs, variant="torchvision")
    return clip._embed.lower(
      params, inputs, which=self.tower, config=self.config, dtype=jnp.float32
    )


_B32 = clip_config((768, 12, 12), (512, 12, 8), 32, 224)
_L14 = clip_config((1024, 24, 16), (768, 12, 12), 14, 224)
NETWORKS = {
  "Inception-v3": Network(),
  "CLIP-B/32": Network(_B32),
  "CLIP-L/14": Network(_L14),
  "CLIP-L/14 texts": Network(_L14, "text"),
  "CLIP-L/14-336": Network(dataclasses.replace(_L14, image_size=336)),
}


def _drawn(shapes: Any) -> Any:
  """Random parameters by which activations neither grow nor vanish."""
  random = np.random.default_rng(0)

  def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    if leaf.ndim < 2:
      return np.ones(leaf.shape, np.float32)
    scale = np.prod(leaf.shape[:-1]) ** -0.5
    return random.standard_normal(leaf.shape, np.float32) * np.float32(scale)

  return jax.tree.map(draw, shapes)


def inputs_of(network: Network, batch: int) -> np.ndarray:
  """Pixels, or ids of texts."""
  shape = network.inputs(batch)
  random = np.random.default_rng(0)
  return random.integers(0, 256, shape.shape).astype(shape.dtype)


def of_ours(network: Network, inputs: np.ndarray) -> Callable[[], Any]:
  """What takes a batch from pixels to features on this side, as scorers do."""
  params = jax.device_put(_drawn(network.params()))
  run = network.lower(params, inputs).compile()
  return lambda: jax.block_until_ready(run(params, inputs))


def of_torch(network: Network, inputs: np.ndarray) -> Callable[[], Any] | None:
  """The same in torch, pixels normalised on both sides; None without torchvision."""
  import torch
  import transformers

  config = network.config
  given = torch.from_numpy(inputs)
  if config is None:
    # Its compiled operators do not fit every torch, and no network here has any.
    sys.modules.setdefault(
      "torchvision._meta_registrations", types.ModuleType("torchvision._none")
    )
    try:
      models = importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
      if error.name != "torchvision":
        raise
      return None
    model = models.Inception3(aux_logits=True, init_weights=False).eval()

    def prepared() -> Any:
      return given.permute(0, 3, 1, 2) / 127.5 - 1

  elif network.tower == "text":
    text = transformers.CLIPTextConfig(
      **_sizes(config.text), projection_dim=config.projection
    )
    model = transformers.CLIPTextModelWithProjection(text).eval()

    def prepared() -> Any:
      return given.long()

  else:
    vision = transformers.CLIPVisionConfig(
      **_sizes(config.image),
      projection_dim=config.projection,
      image_size=config.image_size,
      patch_size=config.patch_size,
    )
    model = transformers.CLIPVisionModelWithProjection(vision).eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in (clip.MEAN, clip.STD))

    def prepared() -> Any:
      return (given.permute(0, 3, 1, 2) / 255 - mean) / std

  def run() -> Any:
    with torch.inference_mode():
      return model(prepared())

  return run


def _sizes(tower: TowerConfig) -> dict[str, Any]:
  return {
    "hidden_size": tower.width,
    "num_hidden_layers": tower.num_layers,
    "num_attention_heads": tower.num_heads,
    "intermediate_size": tower.hidden,
  }


def rates(network: Network, batch: int, *, rounds: int, runs: int) -> list[list[float]]:
  """Images a second of ours and of torch, run by run; none where a side cannot run."""
  inputs = inputs_of(network, batch)
  sides = [of_ours(network, inputs), of_torch(network, inputs)]
  found: list[list[float]] = [[], []]
  for turn in range(rounds + 1):
    for side, own in zip(sides, found, strict=True):
      if side is None:
        continue
      for _ in range(runs if turn else 1):
        began = time.perf_counter()
        side()
        if turn:  # the first one warms up
          own.append(batch / (time.perf_counter() - began))
  return found


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A network's program for one chip.

  Attributes:
    flops: of one image, a multiplication and an addition being two.
    parameters, total: bytes, of the weights and in use at once.
    roofline: seconds of a batch at the chip's peaks of arithmetic and of memory.
    cycles: seconds of a batch by the compiler's own cycles; None if it has none.
  """

  flops: float
  parameters: int
  total: int
  roofline: float
  cycles: float | None


def compiled_for(network: Network, batch: int, machines: topology.Topology) -> Compiled:
  """Compiles a network's program for the first chip of `machines`.

  Raises:
    ValueError: see `topology.devices`.
  """
  place = SingleDeviceSharding(topology.devices(machines)[0])

  def on_chip(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

  params, inputs = network.params(), network.inputs(batch)
  counted: Any = network.lower(params, inputs).cost_analysis()
  lowered = network.lower(jax.tree.map(on_chip, params), on_chip(inputs))
  program, compilation = compile_lowered(lowered, machines)
  touched: Mapping[str, float] = program.cost_analysis()
  chip = machines.chip
  return Compiled(
    flops=counted["flops"] / batch,
    parameters=sum(4 * leaf.size for leaf in jax.tree.leaves(params)),
    total=memory.in_use(program),
    roofline=max(
      PASSES * counted["flops"] / chip.flops,
      touched["bytes accessed"] / chip.bandwidth,
    ),
    cycles=compilation.static_seconds(machines),
  )


def host_rates(side: int = 1024, seconds: float = 3.0) -> dict[str, float]:
  """Images a second of one core, from a PNG of a photograph to a network's pixels."""
  from skimage import data

  file = io.BytesIO()
  Image.fromarray(data.astronaut()).resize((side, side)).save(file, format="PNG")

  def decoded() -> Image.Image:
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")

  steps: dict[str, Callable[[], Any]] = {
    "decode": decoded,
    "decode, fid": lambda: inception.resize_tensorflow(np.asarray(decoded())),
    "decode, CLIP": lambda: clip.preprocess(decoded(), 224),
  }
  found = {}
  for name, step in steps.items():
    began, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - began) < seconds:
      step()
      count += 1
    found[name] = count / taken
  return found
