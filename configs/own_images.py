"""Your own images at 512 pixels, from the published model of that size.

  python -m pixsigma_jax.train --config=configs/own_images.py --workdir=runs/own/512px

docs/own_images.md leads here from a folder of images, command by command. Every
parameter is trained. On one accelerator of 40 GB or more; on several, parameters and
batch are sharded over all of them. Not measured: no accelerator was at hand. For the
other published sizes set `base_size` to the resolution / 16, `pe_interpolation` to the
resolution / 512, and the parent.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """PixArt-Σ 512 as released, with the paper's optimizer at a fine-tuning's length."""
  return ml_collections.ConfigDict(
    {
      "stage": "own_images",
      "seed": 0,
      "total_steps": 2000,
      "batch_size": 32,
      "accumulation": 1,
      "model": {
        "variant": "XL/2",
        "base_size": 32,
        "pe_interpolation": 1.0,
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
      "compute": {
        "dtype": "bfloat16",
        "attention": "chunked",
        "remat": "block",
        "unroll": False,
      },
      "data": {
        "path": "runs/own/data/512px",
        "weights": (),
        "holdout": 0.0,
        "hashes": {"autoencoder": "", "text_encoder": "", "crop_rule": ""},
        "long_caption_ratio": 0.6,
        "num_threads": 8,
        "num_workers": 0,
        "damaged": "stop",
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
      "init": {"parent": "weights/sigma-512", "transforms": ()},
      "mesh": {"slices": 0, "data": 1, "fsdp": -1, "context": 1},
      "checkpoint": {
        "every": 500,
        "keep_last": 2,
        "keep_every": 0,
        "snapshot_every": 500,
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
        "every": 20,
        "sample_every": 500,
        "prompts": ("a photograph of a cat",),
        "sample_set": {"every": 0, "count": 0},
        "profile": (),
      },
    }
  )
