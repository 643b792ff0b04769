"""A whole model in any of the three formats: read, written, run.

  orbax      WORKDIR/snapshots/STEP, see `checkpoint.py`
  pixart     a .pth of the official repository
  diffusers  the folder of a PixArtTransformer2DModel, or one file of its names

The other two formats have no place for most of what a snapshot says about itself
(stage, provenance, whose latents), so that goes along as JSON: as a second entry of the
pickle, which the official code ignores, and as a file of its own beside config.json.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from pixsigma_jax import checkpoint, disk, tree
from pixsigma_jax.convert import files, pixart, verify
from pixsigma_jax.convert.released import RELEASES, Release
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.autoencoders import vae_identity
from pixsigma_jax.models.pixart import PixArtConfig

FORMATS = ("orbax", "pixart", "diffusers")

_CONFIG, _ABOUT = "config.json", "pixsigma_jax.json"
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Of PixArt in the official layout and in diffusers', in a file of ComfyUI with all of a
# pipeline or alone.
_NETWORK = files.Network(
  landmarks=("t_block.1.weight", "adaln_single.linear.weight"),
  prefixes=("model.diffusion_model.", "diffusion_model."),
)
_DOWNSAMPLING = 8  # pixels to a latent, of SD's and SDXL's autoencoders


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
  """Hyper-parameters that the user gives for a source; None where not given."""

  base_size: int | None = None
  pe_interpolation: float | None = None
  caption_length: int | None = None
  scaling_factor: float | None = None
  num_heads: int | None = None

  def of_release(self, release: Release) -> "Given":
    """These fields, completed by those of a published model.

    Raises:
      ValueError: they contradict each other.
    """
    merged = dataclasses.asdict(self)
    for name, value in merged.items():
      known = getattr(release, name, None)
      if value is not None and known is not None and value != known:
        raise ValueError(
          f"--{name}={value} was asked for, but the release has {name}={known}."
        )
      merged[name] = known if value is None else value
    return Given(**merged)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Answers to what a source leaves open: the flags of `convert`, by their names.

  Attributes:
    release: key of `RELEASES`, which sets the next four.
    base_size, pe_interpolation, caption_length, scaling_factor, num_heads: see `Given`.
    ema: take the EMA weights of a .pth that has both.
    pos_embed: read the table of positions in a .pth.
    variant: which of a folder's weights.
  """

  release: str | None = None
  base_size: int | None = None
  pe_interpolation: float | None = None
  caption_length: int | None = None
  scaling_factor: float | None = None
  num_heads: int | None = None
  ema: bool = False
  pos_embed: bool = True
  variant: str | None = None

  def given(self) -> Given:
    """Hyper-parameters, those of the release included.

    Raises:
      ValueError: they contradict each other, or there is no such release.
    """
    names = [field.name for field in dataclasses.fields(Given)]
    given = Given(**{name: getattr(self, name) for name in names})
    if self.release is None:
      return given
    if self.release not in RELEASES:
      raise ValueError(
        f"Unknown release {self.release!r}; choose one of {', '.join(RELEASES)}."
      )
    return given.of_release(RELEASES[self.release])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A network and its metadata; `null_caption` may be unknown."""

  config: PixArtConfig
  params: Any
  null_caption: Any
  metadata: Metadata
  step: int

  def summary(self) -> str:
    """Size and hyper-parameters in a line."""
    config, compression = self.config, self.config.kv_compression
    compressed = (
      f", keys and values {compression.ratio}:1 in layers {compression.layers}"
      if compression.layers
      else ""
    )
    return (
      f"{tree.size(self.params):,} parameters, {self.metadata.resolution} px, "
      f"pe_interpolation {config.pe_interpolation}, {config.caption_length} caption "
      f"tokens, scaling factor {self.metadata.scaling_factor}{compressed}"
    )


def check_target(path: pathlib.Path, form: str) -> None:
  """Checks the target before any work is done.

  Raises:
    FileExistsError: there is something at `path` already.
    ValueError: the name does not go with the format.
  """
  if form == "pixart" and path.suffix != ".pth":
    raise ValueError(f"{path} must end in .pth: the official format is one such file.")
  is_folder = form != "pixart" and path.is_dir()
  if path.exists() and not (is_folder and not disk.whole_files(path)):
    raise FileExistsError(f"{path} exists already and is left as it is.")


def read(
  path: pathlib.Path,
  form: str,
  given: Given,
  *,
  ema: bool = False,
  stored_positions: bool = True,
  variant: str | None = None,
) -> Model:
  """Reads a model; the parameters are NumPy arrays, or JAX's for `orbax`.

  Args:
    ema: takes the EMA weights of a .pth that has both.
    stored_positions: False leaves the table of positions in a .pth out of account.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: it is damaged, another format or another network, or something about it
      is neither shown nor given, or is given otherwise than shown.
  """
  if not stored_positions and form != "pixart":
    raise ValueError(f"--nopos_embed is for --from=pixart: {form} stores no pos_embed.")
  if form == "orbax":
    return _read_snapshot(path, given)
  if form == "diffusers":
    path = transformer_at(path)
  weights, about = _weights(path, form, ema, variant)
  if about is not None:
    given = _agreed(given, about)
  if form == "pixart":
    config, params = pixart.from_pixart(
      weights,
      num_heads=given.num_heads,
      base_size=given.base_size,
      pe_interpolation=given.pe_interpolation,
      caption_length=given.caption_length,
      stored_positions=stored_positions,
    )
  else:
    config, params = pixart.from_diffusers(
      weights,
      num_heads=given.num_heads,
      base_size=given.base_size,
      pe_interpolation=given.pe_interpolation,
      caption_length=given.caption_length,
      config_json=_config_json(path),
    )
  if about is not None and PixArtConfig.from_dict(about.model) != config:
    raise ValueError(
      f"{path} says that it was {about.model}, but its weights are {config.to_dict()}."
    )
  return Model(
    config=config,
    params=params,
    null_caption=pixart.null_caption_in(weights),
    metadata=about or _metadata(path, form, config, given),
    step=0,
  )


def write(path: pathlib.Path, form: str, model: Model) -> None:
  """Writes a model, whole or not at all; see `check_target` first.

  Raises:
    ValueError: the format cannot hold such a model.
  """
  if form == "orbax":
    checkpoint.save_snapshot(
      path,
      model.step,
      params=model.params,
      null_caption=model.null_caption,
      metadata=model.metadata,
    )
    return
  params = jax.tree.map(np.asarray, model.params)
  about = model.metadata.to_json()
  if form == "pixart":
    null_caption = model.null_caption
    if null_caption is not None:
      null_caption = np.asarray(null_caption)
    weights = pixart.to_pixart(model.config, params, null_caption)
    files.write_pickle(path, weights, about)
    return
  weights = pixart.to_diffusers(model.config, params)
  with disk.whole_folder(path) as folder:
    files.write_safetensors(folder / _DIFFUSERS_WEIGHTS, weights)
    files.write_json(folder / _ABOUT, about)
    files.write_json(folder / _CONFIG, pixart.diffusers_config(model.config))


def run(
  path: pathlib.Path,
  form: str,
  model: Model,
  inputs: verify.Inputs,
  *,
  ema: bool,
  variant: str | None = None,
) -> verify.Trace:
  """Runs the network at `path` on `inputs`, with the code of its own format.

  diffusers has no key/value compression, so a compressing model in its layout is run
  as ours.
  """
  if form == "diffusers":
    path = transformer_at(path)
  if form == "pixart":
    weights, _ = _weights(path, form, ema, variant)
    return verify.run_official(model.config, weights, inputs)
  if form == "diffusers" and not model.config.kv_compression.layers:
    weights, _ = _weights(path, form, ema, variant)
    return verify.run_diffusers(model.config, weights, inputs)
  again = read(path, form, Given())
  return verify.run_ours(again.config, again.params, inputs)


def transformer_at(path: pathlib.Path) -> pathlib.Path:
  """The transformer's folder or file, where `path` may be the whole pipeline's folder.

  Raises:
    FileNotFoundError: it is a pipeline without a transformer; says what it has.
  """
  return files.part_folder(path, "transformer") if path.is_dir() else path


def form_of(path: pathlib.Path) -> str:
  """Format of one file with weights: "pixart" or, by its tensors' names, "diffusers".

  Raises:
    ValueError: it is no file of weights, or damaged.
  """
  if path.suffix in files.PICKLES:
    return "pixart"
  weights = files.part_of(files.open_weights(path), _NETWORK, path)
  return "diffusers" if _NETWORK.landmarks[1] in weights else "pixart"


def sources_of(
  path: pathlib.Path, form: str, variant: str | None = None
) -> list[pathlib.Path]:
  """All files that `read` reads of a source in another format than ours.

  Raises:
    FileNotFoundError, ValueError: see `read`.
  """
  if form == "diffusers":
    path = transformer_at(path)
  found = files.paths_of(path, variant)
  if path.is_dir():
    found += [path / name for name in (_CONFIG, _ABOUT)]
  elif _config_json(path) is not None:
    found.append(path.with_name(_CONFIG))
  return [file for file in found if file.exists()]


def _config_json(path: pathlib.Path) -> Any:
  """Config beside diffusers' weights; None for a file that lies by itself."""
  if path.is_dir():
    return files.read_json(path / _CONFIG)
  beside = path.with_name(_CONFIG)
  # A file with a name of its own may lie among those of another model.
  own = path in files.weights_in(path.parent).values()
  return files.read_json(beside) if own and beside.exists() else None


def _weights(
  path: pathlib.Path, form: str, ema: bool, variant: str | None
) -> tuple[files.Weights, Metadata | None]:
  if form == "pixart":
    if path.is_dir():
      raise ValueError(f"{path} is a folder: --from=pixart takes a .pth file.")
    about = files.note_in(path)
    weights = files.open_weights(path, "ema" if ema else "raw", variant=variant)
  else:
    if not path.exists() or path.suffix in files.PICKLES:
      raise ValueError(
        f"{path} is not a folder: --from=diffusers takes a folder, or a .safetensors."
      )
    if ema:
      raise ValueError(
        "--ema chooses between the two states of a .pth; diffusers keeps EMA weights "
        "in a folder of their own: give that."
      )
    noted = path / _ABOUT
    about = files.read_json(noted) if path.is_dir() and noted.exists() else None
    weights = files.open_weights(path, variant=variant)
  weights = files.part_of(weights, _NETWORK, path)
  return weights, None if about is None else Metadata.from_json(about)


def _read_snapshot(path: pathlib.Path, given: Given) -> Model:
  unneeded = [name for name, value in dataclasses.asdict(given).items() if value]
  if unneeded:
    raise ValueError(
      f"A checkpoint of this package says itself what it is: leave out "
      f"{', '.join(f'--{name}' for name in unneeded)} (or --release)."
    )
  snapshot = checkpoint.read_snapshot(path)
  return Model(
    config=snapshot.config,
    params=snapshot.params,
    null_caption=snapshot.null_caption,
    metadata=snapshot.metadata,
    step=snapshot.step,
  )


def _agreed(given: Given, about: Metadata) -> Given:
  """Metadata that an exported model carries, unless something contradicts them."""
  known = {**about.model, "scaling_factor": about.scaling_factor}
  shown = {field.name: known[field.name] for field in dataclasses.fields(Given)}
  return Given(**pixart.settled(shown, dataclasses.asdict(given)))


def _metadata(
  path: pathlib.Path, form: str, config: PixArtConfig, given: Given
) -> Metadata:
  if given.scaling_factor is None:
    raise ValueError(
      "Neither the weights nor their config show the scaling factor: give "
      "--scaling_factor (0.13025 for SDXL's VAE and Σ, 0.18215 for SD's and α), or "
      "--release."
    )
  return Metadata(
    stage="converted",
    model=config.to_dict(),
    autoencoder=vae_identity(given.scaling_factor, config.in_channels, _DOWNSAMPLING),
    scaling_factor=given.scaling_factor,
    text_encoder={"name": "t5", "width": config.caption_width},
    resolution=config.base_size * config.patch_size * _DOWNSAMPLING,
    provenance=({"converted_from": str(path.absolute()), "format": form},),
  )
