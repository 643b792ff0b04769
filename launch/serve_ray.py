"""Serves a trained model from several machines, or several devices, with Ray Serve.

  python launch/serve_ray.py --checkpoint=DIR --max_replicas=4 --gpus=1

A replica is the service of `python -m pixsigma_jax.serve`, with the same flags, on the
devices that --gpus, --tpus or --cpus reserve for it. There are as many as the requests
that wait ask for. The checkpoint must lie at the same path on all machines. Of several
machines run it on one of an existing cluster (`ray start`). It needs the extra `ray`.
SIGTERM and Ctrl-C let the replicas finish what was begun.
"""

import os
import signal
import threading
from typing import Any

# Its report of usage goes to Ray's makers, unless this says otherwise.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from absl import flags
from ray import serve

from pixsigma_jax import command
from pixsigma_jax.serve import building
from pixsigma_jax.serve.option_flags import OptionFlags

_OPTIONS = OptionFlags()
_MIN_REPLICAS = flags.DEFINE_integer("min_replicas", 1, "Replicas at rest.")
_MAX_REPLICAS = flags.DEFINE_integer("max_replicas", 1, "Replicas at most.")
_TARGET = flags.DEFINE_integer(
  "target_requests",
  None,
  "Requests that a replica should have, waiting ones among them, before there is "
  "another; twice --batch_size by default.",
)
_CPUS = flags.DEFINE_float("cpus", 1, "CPUs of a replica.")
_GPUS = flags.DEFINE_float("gpus", 0, "GPUs of a replica.")
_TPUS = flags.DEFINE_float("tpus", 0, "Chips of a replica, all of one host.")

_HEALTH_SECONDS = 5.0  # between two looks at a replica
_APPLICATION = "images"


def application(
  options: building.Options,
  *,
  min_replicas: int,
  max_replicas: int,
  target_requests: int,
  resources: dict[str, Any],
) -> serve.Application:
  """Replicas of a service, as Ray runs them."""

  class Images:
    """A replica."""

    def check_health(self) -> None:
      """Says whether the engine's thread still runs, or Ray starts another replica."""
      if not building.running(options).engine.alive:
        raise RuntimeError("The engine has ended.")

  replica: Any = serve.ingress(lambda: building.running(options).app())(Images)
  deployed: Any = serve.deployment(
    name=_APPLICATION,
    ray_actor_options=resources,
    # A replica refuses by itself what its queue does not hold.
    max_ongoing_requests=2 * (options.max_queue + options.batch_size),
    autoscaling_config={
      "min_replicas": min_replicas,
      "max_replicas": max_replicas,
      "target_ongoing_requests": target_requests,
    },
    health_check_period_s=_HEALTH_SECONDS,
    graceful_shutdown_timeout_s=options.deadline,
  )(replica)
  return deployed.bind()


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  options = building.Options(**_OPTIONS.values())
  building.access_of(options)
  if not 1 <= _MIN_REPLICAS.value <= _MAX_REPLICAS.value:
    raise ValueError(
      f"--min_replicas={_MIN_REPLICAS.value} must be at least 1, and at most "
      f"--max_replicas={_MAX_REPLICAS.value}."
    )
  ray.init(log_to_driver=False)  # the cluster of RAY_ADDRESS, or one of its own
  serve.start(http_options={"host": options.host, "port": options.port})
  resources: dict[str, Any] = {"num_cpus": _CPUS.value, "num_gpus": _GPUS.value}
  if _TPUS.value:
    resources["resources"] = {"TPU": _TPUS.value}
  serve.run(
    application(
      options,
      min_replicas=_MIN_REPLICAS.value,
      max_replicas=_MAX_REPLICAS.value,
      target_requests=_TARGET.value or 2 * options.batch_size,
      resources=resources,
    ),
    name=_APPLICATION,
  )
  print(f"Serving {options.model} at http://{options.host}:{options.port}/", flush=True)
  ended = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):  # Ray has handlers of its own
    signal.signal(number, lambda *_: ended.set())
  ended.wait()
  serve.shutdown()
  ray.shutdown()


if __name__ == "__main__":
  command.run(main)
