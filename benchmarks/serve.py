r"""What batching brings a server, and how it bears more requests than it can draw.

  python -m benchmarks.serve --checkpoint=weights/miniature
  python -m benchmarks.serve --checkpoint=weights/miniature --soak_seconds=300

The first serves the model in several ways and asks for images of mixed sizes: with
`--clients` that each ask again when they are answered, and at random times (a Poisson
process) of `--load` times what the first way could bear, whoever is answered or not.
The second asks at random times of `--soak_load` times the capacity, and looks at how
many are answered, refused and lost, and at the server's memory.

Server and clients share the machine.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import httpx
import numpy as np
from absl import app, flags

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A miniature.", required=True)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Of the server that batches.")
_CLIENTS = flags.DEFINE_integer("clients", 8, "That ask at the same time.")
_SECONDS = flags.DEFINE_float("seconds", 15, "Of each measurement.")
_LOAD = flags.DEFINE_float("load", 0.7, "Of the capacity of the server that batches.")
_SOAK_SECONDS = flags.DEFINE_float("soak_seconds", 0, "Of the second kind.")
_SOAK_LOAD = flags.DEFINE_float("soak_load", 1.5, "Of the capacity.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision.")

_SIZES = ("16x16", "32x16", "16x32")
_WARM_UP = "16x16,16x32"  # the third has the second's length
_PATIENCE = 120.0  # seconds
_SETTLING = 0.2  # of a soak's time, after which memory should no longer grow
_BETWEEN_LOOKS = 2.0  # seconds


@dataclasses.dataclass
class Result:
  """What clients have seen.

  Attributes:
    statuses: how often which came; "lost" of a request without an answer.
    latencies: seconds of those that got an image.
    seconds: from the first request to the last answer.
  """

  statuses: Counter[str] = dataclasses.field(default_factory=Counter)
  latencies: list[float] = dataclasses.field(default_factory=list)
  seconds: float = 0.0

  @property
  def throughput(self) -> float:
    """Images a second."""
    return self.statuses["200"] / self.seconds

  def percentiles(self) -> str:
    """Of the latencies, in milliseconds: the median, 95 and 99 %."""
    values = np.percentile(self.latencies, [50, 95, 99]) if self.latencies else []
    return " | ".join(f"{1000 * value:.0f}" for value in values)


@contextlib.contextmanager
def served(*options: str) -> Iterator[str]:
  """The server in a process of its own; its address, once it is ready."""
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "pixsigma_jax.serve", "--port=0"),
      *(f"--checkpoint={_CHECKPOINT.value}", f"--dtype={_DTYPE.value}"),
      *(f"--warm_up={_WARM_UP}", *options),
    ],
    env={**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")},
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  try:
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]
    until = time.monotonic() + 10 * _PATIENCE
    while httpx.get(f"{address}health/ready").status_code != 200:
      if time.monotonic() > until:
        raise TimeoutError("The server did not become ready.")
      time.sleep(0.2)
    yield address
  finally:
    process.terminate()
    process.wait()


async def ask(client: httpx.AsyncClient, draw: random.Random, result: Result) -> None:
  """One request, of a random size."""
  fields = {"prompt": "a red three", "size": draw.choice(_SIZES)}
  began = time.monotonic()
  try:
    answer = await client.post("v1/images/generations", json=fields)
  except httpx.HTTPError:
    result.statuses["lost"] += 1
    return
  result.statuses[str(answer.status_code)] += 1
  if answer.status_code == 200:
    result.latencies.append(time.monotonic() - began)


@contextlib.asynccontextmanager
async def asking(address: str) -> AsyncIterator[httpx.AsyncClient]:
  """A client of any number of connections."""
  limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
  async with httpx.AsyncClient(
    base_url=address, timeout=_PATIENCE, limits=limits
  ) as client:
    yield client


async def closed(address: str, clients: int, seconds: float) -> Result:
  """Clients that ask again whenever they are answered."""
  result, began = Result(), time.monotonic()

  async def client_of(number: int, client: httpx.AsyncClient) -> None:
    draw = random.Random(number)
    while time.monotonic() - began < seconds:
      await ask(client, draw, result)

  async with asking(address) as client:
    await asyncio.gather(*(client_of(number, client) for number in range(clients)))
  result.seconds = time.monotonic() - began
  return result


async def opened(address: str, rate: float, seconds: float) -> Result:
  """A Poisson process of requests, `rate` a second, answered or not."""
  result, draw, began = Result(), random.Random(0), time.monotonic()
  tasks, at = [], 0.0
  async with asking(address) as client:
    while (at := at + draw.expovariate(rate)) < seconds:
      await asyncio.sleep(max(0.0, began + at - time.monotonic()))
      tasks.append(asyncio.ensure_future(ask(client, draw, result)))
    await asyncio.gather(*tasks)
  result.seconds = time.monotonic() - began
  return result


def metric(address: str, name: str) -> float:
  """One of the server's figures."""
  text = httpx.get(f"{address}metrics").text
  found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
  assert found is not None
  return float(found[1])


def mean_batch(address: str) -> float:
  """Images of a batch so far."""
  count = metric(address, "pixsigma_batch_size_count")
  return metric(address, "pixsigma_batch_size_sum") / count if count else 0.0


def compare() -> None:
  """Prints the table of ways to serve."""
  size, clients = _BATCH_SIZE.value, _CLIENTS.value
  smaller = ",".join(str(2**i) for i in range(size.bit_length() - 1))
  ways: list[tuple[str, int, list[str]]] = [
    (f"batches of {size}", clients, [f"--batch_size={size}"]),
    (f"the same, one request at a time ({size} rows)", 1, [f"--batch_size={size}"]),
    ("a program of 1 row", clients, ["--batch_size=1"]),
    (
      f"batches of {size}, and {smaller} where bits are equal",
      clients,
      [f"--batch_size={size}", f"--smaller_batches={smaller}"],
    ),
  ]
  rate = None
  print(
    "| way | clients | images/s | p50 ms | p95 | p99 | images a batch | at random "
    "times: requests/s | p50 ms | p95 | p99 | refused |"
  )
  print("|---" * 12 + "|")
  for name, count, options in ways:
    with served(*options) as address:
      found = asyncio.run(closed(address, count, _SECONDS.value))
      rate = rate or _LOAD.value * found.throughput
      batch = mean_batch(address)
      random_times = asyncio.run(opened(address, rate, _SECONDS.value))
    print(
      f"| {name} | {count} | {found.throughput:.1f} | {found.percentiles()} | "
      f"{batch:.1f} | {rate:.1f} | {random_times.percentiles()} | "
      f"{random_times.statuses['429']} |",
      flush=True,
    )
    for result in (found, random_times):
      if set(result.statuses) - {"200", "429"}:
        print(f"Neither drawn nor refused: {dict(result.statuses)}", flush=True)


async def soak(address: str, rate: float) -> tuple[Result, list[tuple[float, float]]]:
  """Random requests, and the server's memory in bytes at each second."""
  memory: list[tuple[float, float]] = []
  began = time.monotonic()

  async def look() -> None:
    while True:
      await asyncio.sleep(_BETWEEN_LOOKS)
      bytes_ = await asyncio.to_thread(metric, address, "process_resident_memory_bytes")
      memory.append((time.monotonic() - began, bytes_))

  looking = asyncio.ensure_future(look())
  result = await opened(address, rate, _SOAK_SECONDS.value)
  looking.cancel()
  return result, memory


def endure() -> None:
  """Prints what came of more requests than can be drawn."""
  with served(f"--batch_size={_BATCH_SIZE.value}", "--max_queue=64") as address:
    capacity = asyncio.run(closed(address, 2 * _CLIENTS.value, _SECONDS.value))
    rate = _SOAK_LOAD.value * capacity.throughput
    found, memory = asyncio.run(soak(address, rate))
    left = metric(address, "pixsigma_queue_images")
  settled = [size for at, size in memory if at >= _SETTLING * _SOAK_SECONDS.value]
  others = {k: v for k, v in found.statuses.items() if k not in ("200", "429", "lost")}
  print(
    f"Capacity {capacity.throughput:.1f} images/s; {sum(found.statuses.values())} "
    f"requests at {rate:.1f}/s in {found.seconds:.0f} s: "
    f"{found.statuses['200']} drawn ({found.throughput:.1f}/s), "
    f"{found.statuses['429']} refused with 429, {found.statuses['lost']} lost, others "
    f"{others}; latency p50 | p95 | p99: {found.percentiles()} ms; {left:.0f} left "
    "waiting."
  )
  print(
    f"Memory: {settled[0] / 2**20:.0f} MiB after {_SETTLING:.0%} of the time, at most "
    f"{max(settled) / 2**20:.0f} MiB from then on "
    f"({max(settled) / settled[0] - 1:+.1%})."
  )


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
  if _SOAK_SECONDS.value:
    endure()
  else:
    compare()


if __name__ == "__main__":
  app.run(main)
