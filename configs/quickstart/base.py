"""What the stages of the quickstart share: every field of a training config.

Not a stage itself: `low.py`, `high.py` and `compressed.py` are.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The fields of all stages; a stage sets its own name, data, parent and length."""
  return ml_collections.ConfigDict(
    {
      "stage": "",
      "seed": 0,
      "total_steps": 0,
      "batch_size": 32,
      "accumulation": 1,
      "model": {
        "variant": "Mini/2",
        "base_size": 4,
        "pe_interpolation": 1.0,
        "mlp_ratio": 4.0,
        "in_channels": 3,
        "learn_variance": True,
        "caption_width": 64,
        "caption_length": 12,
        "qk_norm": False,
        "size_conditions": False,
        "kv_compression": {
          "ratio": 1,
          "layers": (),
          "operator": "conv",
          # The official code's norm would set a trained model's keys and values to
          # another scale: from the average 22 % of pairs are left then, else 96 %.
          "norm": False,
        },
      },
      "compute": {
        "dtype": "float32",
        "attention": "xla",
        "remat": "none",
        "unroll": True,
      },
      "data": {
        "path": "",
        "weights": (),
        "holdout": 0.0,
        "hashes": {"autoencoder": "", "text_encoder": "", "crop_rule": ""},
        "long_caption_ratio": 0.6,
        "num_threads": 1,
        "num_workers": 0,
        "damaged": "stop",
      },
      "frozen": "",
      # PixArt-Σ's own: noise, all timesteps alike, and learned variance.
      "loss": {
        "caption_dropout": 0.1,
        "snr_switch": False,
        "min_snr_gamma": None,
        "snr_shift": 1.0,
      },
      # After 4000 steps of this loss AdamW follows one prompt in five, Muon nine in ten.
      "optimizer": {
        "name": "muon",
        "learning_rate": 6e-3,
        "scale_rule": "none",
        "schedule": "cosine",
        "warmup_steps": 100,
        "beta": 0.95,
        "nesterov": True,
        "newton_schulz_steps": 5,
        "consistent_rms": 0.2,
        "eps": 1e-8,
        "adam_b1": 0.9,
        "adam_b2": 0.99,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "groups": (),
      },
      "ema": {
        "kind": "exponential",
        "values": (0.998,),
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
      "mesh": {"slices": 0, "data": -1, "fsdp": 1, "context": 1},
      "checkpoint": {
        "every": 1000,
        "keep_last": 2,
        "keep_every": 0,
        "snapshot_every": 0,
        "local": "",
        "local_every": 0,
        "remote": "",
        "remote_every": 0,
      },
      "guards": {
        "bad_step": "stop",
        "spike_factor": 0.0,
        "max_bad_steps": 10,
        "hang_factor": 10.0,
      },
      "validation": {"every": 0, "examples": 0},
      "log": {
        "every": 100,
        "sample_every": 2000,
        "prompts": (
          "a red seven",
          "a white three",
          "a blue two",
          "a cyan nine",
        ),
        "sample_set": {"every": 0, "count": 0},
        "profile": (),
        "wandb": {"project": "", "entity": ""},
      },
    }
  )
