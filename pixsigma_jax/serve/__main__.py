"""Serves a trained model over OpenAI's Images API.

  python -m pixsigma_jax.serve --checkpoint=DIR --port=8000

It needs the extra `serve`. Only this machine can ask, unless --host says otherwise.
SIGTERM and Ctrl-C let it finish what was begun; a second one ends it at once.
"""

from absl import flags, logging

from pixsigma_jax import command
from pixsigma_jax.serve.option_flags import OptionFlags
from pixsigma_jax.wording import install

_OPTIONS = OptionFlags()
_DRAIN_DELAY = flags.DEFINE_float(
  "drain_delay",
  0,
  "Seconds for which requests are still refused, not left unanswered, after SIGTERM.",
)


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  try:
    from pixsigma_jax.serve import building, logs, server
  except ModuleNotFoundError as error:
    if error.name not in {"starlette", "uvicorn", "prometheus_client"}:
      raise
    raise ValueError(f"A server needs {error.name}: {install('serve')}.") from error

  options = building.Options(**_OPTIONS.values())
  building.access_of(options)
  with server.listen(options.host, options.port) as listener:
    handler = logging.get_absl_handler()
    if handler is not None:
      handler.setFormatter(logs.JsonFormatter())
    service = building.build(options)
    serving = server.Server(service, drain_delay=_DRAIN_DELAY.value)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"Serving {options.model} at http://{host}:{port}/", flush=True)
    service.engine.start()
    serving.run(sockets=[listener])
  if serving.interrupted:
    raise KeyboardInterrupt


if __name__ == "__main__":
  command.run(main)
