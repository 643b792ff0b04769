"""Converts a model between this package, the official repository and diffusers.

  python -m pixsigma_jax.convert --from=pixart --to=orbax SRC DST --release=sigma-1024
  python -m pixsigma_jax.convert --from=orbax --to=diffusers SRC DST --verify

SRC and DST are a .pth file for `pixart`, the transformer's folder for `diffusers` (SRC
also one .safetensors), a workdir or snapshot for `orbax`. Nothing that exists is
overwritten. The frozen networks are folders of `diffusers` or of ours, `orbax`; an
autoencoder of `ldm` is one file, and so is a T5 of `comfyui`:

  python -m pixsigma_jax.convert --model=vae --from=ldm --to=diffusers SRC DST
  python -m pixsigma_jax.convert --model=t5 --from=diffusers --to=orbax SRC DST

A LoRA is a folder of `peft`, or one .safetensors of `diffusers` or `kohya`:

  python -m pixsigma_jax.convert --model=lora --from=peft --to=kohya SRC DST

A training config of the official repository becomes one of ours:

  python -m pixsigma_jax.convert --from=mmcv SRC.py DST.py --gpus=32 --images=18000000
"""

import pathlib

from absl import flags, logging

from pixsigma_jax import command
from pixsigma_jax.convert import lora, mmcv, model, t5, vae, verify
from pixsigma_jax.convert.source_flags import SourceFlags

_KINDS = {
  "transformer": model.FORMATS,
  "vae": vae.LAYOUTS,
  "t5": t5.FORMATS,
  "lora": lora.FORMATS,
}
_FORMATS = list(dict.fromkeys(form for forms in _KINDS.values() for form in forms))
_MODEL = flags.DEFINE_enum("model", "transformer", list(_KINDS), "Which network.")
_FROM = flags.DEFINE_enum(
  "from", None, [*_FORMATS, "mmcv"], "Format of SRC.", required=True
)
_TO = flags.DEFINE_enum("to", None, _FORMATS, "Format of DST; of a config, our own.")
_SOURCE = SourceFlags()
_GPUS = flags.DEFINE_integer(
  "gpus", None, "Of a config: GPUs that the official launcher would have had."
)
_IMAGES = flags.DEFINE_integer("images", None, "Of a config: images of the data.")
_VERIFY = flags.DEFINE_bool(
  "verify",
  False,
  "Run SRC and DST on the same inputs and print how far apart they are.",
)


def main(arguments: list[str]) -> None:
  """Entry point; flags are parsed."""
  source, target = map(pathlib.Path, arguments)
  if _FROM.value == "mmcv":
    _convert_config(source, target)
    return
  to_format, options = _TO.value, _SOURCE.values()
  if to_format is None:
    raise ValueError(f"Say with --to what {target} is to be: {', '.join(_FORMATS)}.")
  if _FROM.value == to_format:
    raise ValueError(f"--from and --to are both {_FROM.value}: there is nothing to do.")
  for form in (_FROM.value, to_format):
    if form not in _KINDS[_MODEL.value]:
      raise ValueError(
        f"--model={_MODEL.value} has no format {form!r}, only "
        f"{', '.join(_KINDS[_MODEL.value])}."
      )
  if _MODEL.value == "lora":
    lora.convert_lora(source, target, from_format=_FROM.value, to_format=to_format)
    print(target)
    return
  if _MODEL.value == "t5":
    t5.convert_text_encoder(
      source,
      target,
      from_format=_FROM.value,
      to_format=to_format,
      variant=options.variant,
    )
    print(target)
    return
  if _MODEL.value == "vae":
    vae.convert_autoencoder(
      source,
      target,
      from_layout=_FROM.value,
      to_layout=to_format,
      scaling_factor=options.scaling_factor,
      variant=options.variant,
    )
    print(target)
    return
  model.check_target(target, to_format)
  converted = model.read(
    source,
    _FROM.value,
    options.given(),
    ema=options.ema,
    stored_positions=options.pos_embed,
    variant=options.variant,
  )
  logging.info("Read %s: %s.", source, converted.summary())
  model.write(target, to_format, converted)
  print(target)
  if _VERIFY.value:
    _verify(source, target, converted, to_format)


def _convert_config(source: pathlib.Path, target: pathlib.Path) -> None:
  if _TO.value is not None:
    raise ValueError(f"--from=mmcv gives a config of ours: leave out --to={_TO.value}.")
  if _GPUS.value is None or _IMAGES.value is None:
    raise ValueError(
      "A config of --from=mmcv counts images for each GPU, and epochs: say with --gpus "
      "how many GPUs it was meant for, and with --images how many images the data had."
    )
  imported = mmcv.convert_config(source, target, gpus=_GPUS.value, images=_IMAGES.value)
  for line in imported.report():
    print(line)
  print(target)


def _verify(
  source: pathlib.Path, target: pathlib.Path, converted: model.Model, to_format: str
) -> None:
  inputs, options = verify.fixed_inputs(converted.config), _SOURCE.values()
  logging.info("Running %s and %s on the same inputs.", source, target)
  traces = [
    model.run(path, form, converted, inputs, ema=ema, variant=variant)
    for path, form, ema, variant in (
      (source, _FROM.value, options.ema, options.variant),
      (target, to_format, False, None),
    )
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
