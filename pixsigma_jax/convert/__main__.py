"""Converts a model between this package, the official repository and diffusers.

  python -m pixsigma_jax.convert --from=pixart --to=orbax SRC DST --release=sigma-1024
  python -m pixsigma_jax.convert --from=orbax --to=diffusers SRC DST --verify

SRC and DST are a .pth file for `pixart`, the transformer's folder for `diffusers`, a
workdir or snapshot for `orbax`. Nothing that exists is overwritten. The frozen networks
are folders of `diffusers` or of ours, `orbax`, and an autoencoder of `ldm` is one file:

  python -m pixsigma_jax.convert --model=vae --from=ldm --to=diffusers SRC DST
  python -m pixsigma_jax.convert --model=t5 --from=diffusers --to=orbax SRC DST
"""

import pathlib

from absl import flags, logging

from pixsigma_jax import command
from pixsigma_jax.convert import model, t5, vae, verify
from pixsigma_jax.convert.released import RELEASES

_KINDS = {"transformer": model.FORMATS, "vae": vae.LAYOUTS, "t5": t5.FORMATS}
_FORMATS = list(dict.fromkeys([*model.FORMATS, *vae.LAYOUTS]))
_MODEL = flags.DEFINE_enum("model", "transformer", list(_KINDS), "Which network.")
_FROM = flags.DEFINE_enum("from", None, _FORMATS, "Format of SRC.", required=True)
_TO = flags.DEFINE_enum("to", None, _FORMATS, "Format of DST.", required=True)
_RELEASE = flags.DEFINE_enum(
  "release",
  None,
  list(RELEASES),
  "Which published model SRC is, or was fine-tuned from: sets the five flags below.",
)
_BASE_SIZE = flags.DEFINE_integer(
  "base_size", None, "Token grid side of the training resolution: 64 for 1024 pixels."
)
_PE_INTERPOLATION = flags.DEFINE_float(
  "pe_interpolation", None, "Scale of the positions: 2 for 1024 pixels."
)
_CAPTION_LENGTH = flags.DEFINE_integer(
  "caption_length", None, "Tokens of a caption: 300 for Σ, 120 for α."
)
_SCALING_FACTOR = flags.DEFINE_float(
  "scaling_factor", None, "Of the latents: 0.13025 for SDXL's VAE, 0.18215 for SD's."
)
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Attention heads: 16 for XL/2.")
_EMA = flags.DEFINE_bool("ema", False, "Take the EMA weights of a .pth that has both.")
_VERIFY = flags.DEFINE_bool(
  "verify",
  False,
  "Run SRC and DST on the same inputs and print how far apart they are.",
)


def main(arguments: list[str]) -> None:
  """Entry point; flags are parsed."""
  source, target = map(pathlib.Path, arguments)
  if _FROM.value == _TO.value:
    raise ValueError(f"--from and --to are both {_FROM.value}: there is nothing to do.")
  for form in (_FROM.value, _TO.value):
    if form not in _KINDS[_MODEL.value]:
      raise ValueError(
        f"--model={_MODEL.value} has no format {form!r}, only "
        f"{', '.join(_KINDS[_MODEL.value])}."
      )
  if _MODEL.value == "t5":
    t5.convert_text_encoder(
      source, target, from_format=_FROM.value, to_format=_TO.value
    )
    print(target)
    return
  if _MODEL.value == "vae":
    vae.convert_autoencoder(
      source,
      target,
      from_layout=_FROM.value,
      to_layout=_TO.value,
      scaling_factor=_SCALING_FACTOR.value,
    )
    print(target)
    return
  given = model.Given(
    base_size=_BASE_SIZE.value,
    pe_interpolation=_PE_INTERPOLATION.value,
    caption_length=_CAPTION_LENGTH.value,
    scaling_factor=_SCALING_FACTOR.value,
    num_heads=_NUM_HEADS.value,
  )
  if _RELEASE.value is not None:
    given = given.of_release(RELEASES[_RELEASE.value])
  model.check_target(target, _TO.value)
  converted = model.read(source, _FROM.value, given, ema=_EMA.value)
  logging.info("Read %s: %s.", source, converted.summary())
  model.write(target, _TO.value, converted)
  print(target)
  if _VERIFY.value:
    _verify(source, target, converted)


def _verify(source: pathlib.Path, target: pathlib.Path, converted: model.Model) -> None:
  inputs = verify.fixed_inputs(converted.config)
  logging.info("Running %s and %s on the same inputs.", source, target)
  traces = [
    model.run(path, form, converted, inputs, ema=_EMA.value and form == _FROM.value)
    for path, form in ((source, _FROM.value), (target, _TO.value))
  ]
  differences = verify.compare(*traces)
  print(f"{'':10}{'largest difference':>20}{'of the largest number':>24}")
  for place, absolute, relative in differences:
    print(f"{place:10}{absolute:20.2e}{relative:24.2e}")
  worst = max(differences, key=lambda difference: difference.relative)
  # A difference that is not a number is not below the tolerance either.
  if not worst.relative <= verify.TOLERANCE:
    raise ValueError(
      f"{source} and {target} are not the same network: at {worst.place} they differ "
      f"by {worst.relative:.2e} of the largest number, and {verify.TOLERANCE:.0e} is "
      "what float32 explains. Please report it, with the names of both files."
    )
  print(f"The same network: everywhere within {verify.TOLERANCE:.0e}.")


if __name__ == "__main__":
  command.run(main, positional=("SRC", "DST"))
