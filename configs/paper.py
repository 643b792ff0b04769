"""What the paper's stages share: every field of a training config.

Not a stage itself: `stage_256_vae.py` to `stage_4k.py` are, PixArt-Σ's table 4 from the
first row to the last. docs/stages.md lays their numbers beside the paper's, and says
what departs from it and why.
"""

import ml_collections

# The paper's choice of section 3.2: 2×2 windows in the deeper half of the layers.
KV_COMPRESSION = {
  "ratio": 4,
  "layers": tuple(range(14, 28)),
  "operator": "conv",
  "norm": True,
}


def get_config() -> ml_collections.ConfigDict:
  """The fields of all stages; a stage sets its own name, data, parent and length."""
  return ml_collections.ConfigDict(
    {
      "stage": "",
      "seed": 0,
      "total_steps": 0,
      "batch_size": 0,
      "accumulation": 1,
      "model": {
        "variant": "XL/2",
        "base_size": 16,
        "pe_interpolation": 0.5,
        "mlp_ratio": 4.0,
        "in_channels": 4,
        "learn_variance": True,
        "caption_width": 4096,
        "caption_length": 300,
        "qk_norm": False,
        "size_conditions": False,
        "kv_compression": {
          "ratio": 1,
          "layers": (),
          "operator": "conv",
          "norm": True,
        },
      },
      # The official code computes in float16 and scales its loss; bfloat16 needs no
      # scaling. Parameters, norms, softmax, residuals and loss are float32 in both.
      "compute": {
        "dtype": "bfloat16",
        "attention": "auto",
        # To run attention again costs 4 % of a step at 512 pixels and a fifth at 4096,
        # to keep what it returned between 1 and 4 GiB of each of 64 chips.
        "remat": "attention",
        "unroll": False,
      },
      "data": {
        "path": "",
        "weights": (),
        "holdout": 0.001,
        "hashes": {"autoencoder": "", "text_encoder": "", "crop_rule": ""},
        "long_caption_ratio": 0.6,
        "num_threads": 16,
        "num_workers": 0,
        "damaged": "replace",
      },
      "frozen": "weights/frozen",
      "loss": {
        "caption_dropout": 0.1,
        "snr_switch": False,
        "min_snr_gamma": None,
        "snr_shift": 1.0,
      },
      "optimizer": {
        "name": "came",
        "learning_rate": 2e-5,
        "scale_rule": "none",
        "schedule": "constant",
        "warmup_steps": 100,
        "b1": 0.9,
        "b2": 0.999,
        "b3": 0.9999,
        "eps": (1e-30, 1e-16),
        "clip_threshold": 1.0,
        "momentum_dtype": "float32",
        "weight_decay": 0.0,
        "clip_norm": 0.01,
        "groups": (),
      },
      # A stage averages over the last tenth of its steps, or thereabouts.
      "ema": {
        "kind": "exponential",
        "values": (0.999,),
        "unit": "updates",
        "offload": False,
      },
      "adapter": {
        "rank": 0,
        "alpha": 16.0,
        "targets": ("attention/", "mlp/"),
        "dora": False,
      },
      "init": {"parent": "", "transforms": ()},
      # Chosen for the machines that are there: parameters in eighths, rows over all
      # devices, and tokens over what has no row of its own.
      "mesh": {"slices": 0, "data": 0, "fsdp": 0, "context": 0},
      "checkpoint": {
        "every": 500,
        "keep_last": 2,
        "keep_every": 0,
        "snapshot_every": 0,
        "local": "",
        "local_every": 0,
        "remote": "",
        "remote_every": 0,
      },
      "guards": {
        "bad_step": "skip",
        "spike_factor": 0.0,
        "max_bad_steps": 10,
        "hang_factor": 10.0,
      },
      "validation": {"every": 1000, "examples": 1024},
      "log": {
        "every": 20,
        "sample_every": 0,
        # Those of the official configs.
        "prompts": (
          "dog",
          "portrait photo of a girl, photograph, highly detailed face, depth of field",
          "Self-portrait oil painting, a beautiful cyborg with golden hair, 8k",
          "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k",
          "A photo of beautiful mountain with realistic sunset and blue lake, highly detailed, masterpiece",
        ),
        "sample_set": {"every": 0, "count": 0},
        "profile": (),
        "wandb": {"project": "", "entity": ""},
      },
    }
  )


def compress(config: ml_collections.ConfigDict, *, parent_compresses: bool) -> None:
  """Lets a stage compress, and its parent become one that does if it does not."""
  config.model.kv_compression = ml_collections.ConfigDict(KV_COMPRESSION)
  if not parent_compresses:
    config.init.transforms = (
      *config.init.transforms,
      {"name": "add_kv_compression", **KV_COMPRESSION, "initialization": "average"},
    )


# Fields of any optimizer; the others are its own.
_SHARED = (
  *("learning_rate", "scale_rule", "schedule", "warmup_steps"),
  *("weight_decay", "clip_norm", "groups"),
)


def use_optimizer(config: ml_collections.ConfigDict, *, name: str, **fields) -> None:
  """Puts another optimizer, with the fields that are its own, in the config's place."""
  optimizer = config.optimizer.to_dict()
  shared = {field: optimizer[field] for field in _SHARED}
  config.optimizer = ml_collections.ConfigDict({**shared, "name": name, **fields})
