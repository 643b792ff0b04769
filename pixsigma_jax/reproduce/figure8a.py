"""Figure 8a: from one autoencoder's latents to another's.

Both autoencoders are trained here (`configs/vae_tiny.py`), and a model on the latents
of the first. Then it goes on with those of the second: as the paper swaps, all
parameters as they are; with the latents' statistics matched (`transforms/vae_swap.py`);
or from fresh parameters.
"""

import dataclasses
import hashlib
import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from pixsigma_jax import disk
from pixsigma_jax.reproduce import autoencoder, full_size
from pixsigma_jax.reproduce.autoencoder import Trained
from pixsigma_jax.reproduce.experiment import Experiment
from pixsigma_jax.reproduce.full_size import FullSize
from pixsigma_jax.reproduce.miniature import BUDGETS, Budget
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table
from pixsigma_jax.reproduce.study import Claim, Row, Study

_WHICH = ("first", "second")
_MINUTES = 7  # of both autoencoders, on two cores


def run(options: Options) -> Result:
  """Figure 8a, with a table of both autoencoders; see `Study.run`.

  Raises:
    ValueError: scikit-image is not installed, whose photographs these learn.
  """
  if options.budget in full_size.BUDGETS:
    return _commands(options.budget)
  budget = BUDGETS[options.budget]
  experiment = Experiment(pathlib.Path(options.output) / options.budget, budget)
  configs = {which: _config(which, budget) for which in _WHICH}
  names = {which: _name(which, config) for which, config in configs.items()}
  folders = {
    which: experiment.autoencoder_folder(name) for which, name in names.items()
  }
  if not all((folder / "facts.json").exists() for folder in folders.values()):
    logging.info("The autoencoders take %d minutes before it.", _MINUTES)
  trained = {
    which: autoencoder.train(configs[which], folder)
    for which, folder in folders.items()
  }
  quality = _quality(configs, trained, budget.side)
  found = study(names, _starts(trained), budget).run(options)
  return dataclasses.replace(
    found,
    tables=[*found.tables, _table(quality)],
    data={**found.data, "autoencoders": quality},
  )


def _quality(
  configs: Mapping[str, Mapping[str, Any]], trained: Mapping[str, Trained], side: int
) -> dict[str, Any]:
  """What `autoencoder.compared` finds of both, which is stored beside the second."""
  path = trained["second"].folder / f"beside_{trained['first'].folder.name}.json"
  if not path.exists():
    models = {
      "first, untrained": autoencoder.untrained(configs["first"]),
      "second, untrained": autoencoder.untrained(configs["second"]),
      **{which: trained[which].autoencoder for which in _WHICH},
    }
    quality = autoencoder.compared(models, side)
    disk.write_text(path, json.dumps(quality, indent=2) + "\n")
  return json.loads(path.read_text(encoding="utf-8"))


def _starts(trained: Mapping[str, Trained]) -> dict[str, Mapping[str, Any] | None]:
  """Label of a row → `swap_vae` with its arguments, or None for fresh parameters."""
  new = trained["second"].autoencoder
  swap = {
    "name": "swap_vae",
    "scaling_factor": new.scaling_factor,
    "autoencoder": new.identity,
  }
  statistics = {
    "old_scaling_factor": trained["first"].autoencoder.scaling_factor,
    **{
      f"old_{name}": tuple(getattr(trained["first"], name)) for name in ("mean", "std")
    },
    **{
      f"new_{name}": tuple(getattr(trained["second"], name)) for name in ("mean", "std")
    },
  }
  return {
    "swapped": swap,
    "swapped, statistics matched": {**swap, **statistics},
    "fresh": None,
  }


def study(
  names: Mapping[str, str],
  starts: Mapping[str, Mapping[str, Any] | None],
  budget: Budget,
) -> Study:
  """The comparison, for a pair of autoencoders.

  Args:
    names: of the folders of `first` and `second`.
    starts: label of a row → the transform that it starts with, None for none.
  """
  first, second = (names[which] for which in _WHICH)
  rows = [
    Row(
      label="before, first autoencoder",
      run=lambda miniature, seed: miniature.on_latents(seed, first),
    ),
    *(
      Row(
        label=label,
        run=lambda miniature, seed, start=start: miniature.swapped(
          seed, first, second, start
        ),
        marks=budget.swap_marks if start is not None else budget.swap_marks[1:],
      )
      for label, start in starts.items()
    ),
  ]
  return Study(
    name="figure8a",
    title="Figure 8a: another autoencoder",
    setting="a model of the first autoencoder's latents of digits of 32 pixels goes on "
    "with those of the second",
    paper=Table(
      "The paper's figure 8a, in words",
      ("VAE change", "Shown"),
      (
        ("0 steps", "images fall apart"),
        ("2,000 steps", "images are satisfying: fine-tuning has converged"),
      ),
    ),
    rows=rows,
    claims=(
      Claim(
        says="fine-tuning after a swap is more efficient than training anew",
        of="swapped",
        than="fresh",
        measure="pairs",
      ),
      Claim(
        says="the same by distance",
        of="swapped",
        than="fresh",
        measure="distance",
      ),
      Claim(
        says="the same by held-out loss",
        of="swapped",
        than="fresh",
        measure="loss",
      ),
      Claim(
        says="fine-tuning converges quickly: as good as before",
        of="swapped",
        than="before, first autoencoder",
        measure="pairs",
        expected="none",
      ),
      Claim(
        says="(ours) matched statistics make a better initial state",
        of="swapped, statistics matched",
        than="swapped",
        measure="loss",
        at=0,
      ),
      Claim(
        says="(ours) matched statistics make convergence faster",
        of="swapped, statistics matched",
        than="swapped",
        measure="loss",
      ),
    ),
    full_size=FullSize(stages={}, continues=False, steps={}, marks=()),
    variants=(),
    plotted=True,
  )


def _config(which: str, budget: Budget) -> dict[str, Any]:
  try:
    module = importlib.import_module("configs.vae_tiny")
  except ModuleNotFoundError as error:
    if error.name not in ("configs", "configs.vae_tiny"):
      raise
    raise FileNotFoundError(
      "There is no configs/vae_tiny.py here: run this in the repository's root."
    ) from error
  return {**module.get_config(which).to_dict(), **budget.autoencoder}


def _name(which: str, config: Mapping[str, Any]) -> str:
  text = json.dumps(config, sort_keys=True)
  return f"{which}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _table(quality: Mapping[str, Any]) -> Table:
  kinds = ("photographs", "digits")
  rows = [
    (name, *(f"{values[kind]:.1f}" for kind in kinds))
    for name, values in quality["psnr"].items()
  ]
  return Table(
    f"Autoencoders: PSNR in dB of held-out images of {quality['side']}² pixels, whose "
    f"latents are {quality['bytes']:,} bytes at eight bits; the best JPEG of as many",
    ("", *kinds),
    rows,
  )


def _commands(budget: str) -> Result:
  """The paper's own swap is a stage, which stands in docs/stages.md as it is."""
  batch = " --config.batch_size=128" if budget == "gpu" else ""
  run = "runs/reproduce"
  lines = [
    f"for seed in 0 1 2; do python -m pixsigma_jax.train --config=configs/{file} "
    f"--workdir={run}/{budget}/figure8a/{name}_seed$seed --config.seed=$seed "
    f"--config.total_steps=2000 --config.checkpoint.snapshot_every=1000{batch}{rest}; "
    "done"
    for name, file, rest in (
      ("swapped", "stage_256_vae.py", ""),
      (
        "fresh",
        "stage_256_vae.py",
        ' --config.init.parent= "--config.init.transforms=()"',
      ),
    )
  ]
  return Result(
    title=f"Figure 8a: another autoencoder, budget {budget}",
    setting={"state": "not run", "devices": full_size.DEVICES[budget]},
    tables=[],
    remarks=[
      "Records and the parent, PixArt-α, are those of docs/stages.md.",
      "\n".join(["```bash", *lines, "```"]),
    ],
    data={"commands": lines},
  )
