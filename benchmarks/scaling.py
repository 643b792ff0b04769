"""What a train step takes, by the tokens of an image and by the number of chips.

  python -m benchmarks.scaling --output=docs/images/scaling.png

Plan's analytic model, of XL/2 in the paper's stages: nothing is compiled, nothing was
measured. Tokens: of an image on one of 64 TPU v5e, with and without compression. Chips:
a step of stage_1k and of stage_4k at their batch on 4 to 1024 TPU v5e, beyond 256 in
slices of 256.
"""

import dataclasses
from typing import Any

import jax
import matplotlib.pyplot as plt
from absl import flags

from benchmarks.stages import CONFIGS, compressed
from pixsigma_jax import command
from pixsigma_jax.plan import topology
from pixsigma_jax.plan.roofline import step_time
from pixsigma_jax.plan.stage import Stage, stage_on

_OUTPUT = flags.DEFINE_string("output", None, "Image to write.", required=True)

BY_CHIPS = ("1k", "4k")
SLICES = (("2x2", 1), ("4x4", 1), ("8x8", 1), ("16x16", 1), ("16x16", 2), ("16x16", 4))


@dataclasses.dataclass(frozen=True)
class Point:
  """A stage by the model.

  Attributes:
    flops: that an image needs, forward and backward.
    bytes: read and written in memory for an image.
    seconds: of a step.
    seconds_an_image: of one chip.
    mfu: share of all chips' peak.
  """

  flops: float
  bytes: float
  seconds: float
  seconds_an_image: float
  mfu: float


def point(stage: Stage) -> Point:
  """What the model says of it."""
  time, machines = step_time(stage), stage.topology
  batch = stage.config["batch_size"]
  touched = sum(part.bytes for part in time.parts.values()) * machines.count
  return Point(
    time.needed / batch,
    touched / batch,
    time.seconds,
    time.seconds * machines.count / batch,
    time.needed / (time.seconds * machines.count * machines.chip.peak(stage.dtype)),
  )


def by_tokens() -> dict[int, dict[int, Point]]:
  """Ratio of compression → pixels a side → point."""
  machines = topology.parse("v5e:8x8", 1)
  points: dict[int, dict[int, Point]] = {}
  for ratio in (1, 4):
    for get_config in CONFIGS.values():
      stage = compressed(get_config(), ratio, "auto", machines)
      pixels = 16 * stage.model.base_size
      points.setdefault(ratio, {})[pixels] = point(stage)
  return points


def by_chips() -> dict[str, dict[int, Point]]:
  """Stage → chips → point, where its batch can be laid over them."""
  points: dict[str, dict[int, Point]] = {}
  for name in BY_CHIPS:
    config, state = CONFIGS[name]().to_dict(), None
    for shape, slices in SLICES:
      machines = topology.parse(f"v5e:{shape}", slices)
      stage = stage_on(config, machines, state)
      state = stage.state
      points.setdefault(config["stage"], {})[machines.chips] = point(stage)
  return points


def main(_: list[str]) -> None:
  """Prints both tables and draws them."""
  jax.config.update("jax_platforms", "cpu")
  tokens, chips = by_tokens(), by_chips()
  print("pixels | tokens | ratio | TFLOP an image | GB an image | s an image and chip")
  for ratio, points in tokens.items():
    for pixels, p in points.items():
      numbers = f"{p.flops / 1e12:.4g} | {p.bytes / 1e9:.4g} | {p.seconds_an_image:.3g}"
      print(f"{pixels} | {(pixels // 16) ** 2} | {ratio} | {numbers}")
  print("stage | chips | s a step | images a second | MFU")
  for name, points in chips.items():
    for count, p in points.items():
      rate = count / p.seconds_an_image
      print(f"{name} | {count} | {p.seconds:.3g} | {rate:.3g} | {p.mfu:.1%}")
  _draw(tokens, chips)


def _draw(tokens: dict[int, Any], chips: dict[str, Any]) -> None:
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
  for ratio, points in tokens.items():
    sides = [(pixels // 16) ** 2 for pixels in points]
    label = "no compression" if ratio == 1 else f"{ratio}:1 in layers 14 to 27"
    left.loglog(sides, [p.seconds_an_image for p in points.values()], "o-", label=label)
  left.set(xlabel="tokens", ylabel="seconds an image and TPU v5e", title="a train step")
  for name, points in chips.items():
    rates = [count / p.seconds_an_image for count, p in points.items()]
    [line] = right.loglog(list(points), rates, "o-", label=name)
    first = min(points)
    ideal = [rates[0] * count / first for count in points]
    right.loglog(list(points), ideal, ":", color=line.get_color())
  right.set(xlabel="TPU v5e", ylabel="images a second", title="dotted: in proportion")
  for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.legend()
  figure.savefig(_OUTPUT.value, dpi=100)


if __name__ == "__main__":
  command.run(main)
