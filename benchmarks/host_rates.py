"""What a slice needs from each of its hosts at each stage: images, bytes, cores.

  python -m benchmarks.host_rates --records_per_cpu_second=RATE

RATE is what `benchmarks.records` measures ("batched", a CPU second). Images a second
follow from FLOPs alone: at the chips' whole peak, which nothing reaches, and at 40 % of
it. A host has four chips. What a stage's modelled step needs is in `plan`'s report.
"""

from absl import flags

from pixsigma_jax import command
from pixsigma_jax.models.pixart import VARIANTS
from pixsigma_jax.plan.host import CHIPS_A_HOST, STORED_TOKENS

_RATE = flags.DEFINE_float(
  "records_per_cpu_second", None, "Of 1K features, read and batched.", required=True
)

# Chips, and bfloat16 FLOP/s of one as the maker states them.
SLICES = {"v5e-256": (256, 197e12), "v5p-64": (32, 459e12)}
SHARE = 0.4
# Resolution, key/value compression R² and its layers: the stages of Table 4.
STAGES = [
  (256, 1, 0),
  (512, 1, 0),
  (1024, 1, 0),
  (1024, 4, 14),
  (2048, 4, 14),
  (4096, 4, 14),
]
CAPTION_TOKENS, CAPTION_WIDTH = 300, 4096
MEASURED_BYTES = 2 * (128 * 128 * 8 + STORED_TOKENS * CAPTION_WIDTH)  # at 1K


def forward_flops(resolution: int, ratio: int, compressed: int) -> float:
  """Of XL/2 for one image; 2 a multiplication and addition."""
  width, layers = VARIANTS["XL/2"]["width"], VARIANTS["XL/2"]["depth"]
  tokens = (resolution // 16) ** 2
  # qkv 3, two outputs 2, the query of cross-attention 1, the MLP 8.
  dense = 14 * width**2 * tokens + 2 * width**2 * CAPTION_TOKENS
  cross = 2 * tokens * CAPTION_TOKENS * width
  keys = (layers - compressed) * tokens + compressed * tokens / ratio
  return 2 * (layers * (dense + cross) + 2 * tokens * keys * width)


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  print(
    f"Images a second at {SHARE:.0%} of the peak (at all of it), MB a second with "
    "captions as embeddings (as text), and cores, of one host:"
  )
  print("| stage | " + " | ".join(SLICES) + " |")
  print("|---|" + "---|" * len(SLICES))
  for resolution, ratio, compressed in STAGES:
    moments = (resolution // 8) ** 2 * 8 * 2
    size = moments + STORED_TOKENS * CAPTION_WIDTH * 2
    cells = []
    for _chips, peak in SLICES.values():
      full = CHIPS_A_HOST * peak / (3 * forward_flops(resolution, ratio, compressed))
      rate = SHARE * full
      # Reading and batching is moving bytes.
      cores = rate * size / MEASURED_BYTES / _RATE.value
      cells.append(
        f"{rate:.3g} ({full:.3g}) images, {rate * size / 1e6:.3g} "
        f"({rate * moments / 1e6:.3g}) MB, {cores:.2g} cores"
      )
    name = f"{resolution}" + (f", compressed {ratio}:1" if compressed else "")
    print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
  command.run(main)
