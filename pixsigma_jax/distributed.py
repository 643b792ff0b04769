"""Several processes as one job: who belongs to it, who is missing, and when to stop.

JAX connects processes and runs their collectives. This file adds clear messages about
processes that are missing or lost. Before JAX starts, every process connects to process
0 (`establish`), and whoever waits says which processes have not come. These
connections stay open for heartbeats, so the end of a process is noticed immediately,
and every other process ends with a message that names it. A scheduler then starts all
of them again.

To connect, each process sends a line of JSON to process 0, on the coordinator's port
before JAX takes it, and gets a line back.

JAX's coordination service cannot take this over (tried with JAX 0.10.2). It aborts the
program in C++, where no Python handler runs and nothing is saved. If a process does not
come, each of the others ends so after the timeout, without the missing one's name. If
one is killed, they end after the heartbeats' timeout, while a connection that closes
says so immediately.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

VARIABLES = {
  "coordinator_address": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
HOSTS_VARIABLE = "PIXSIGMA_HOSTS"  # hosts in order, each with as many processes
_SHOWN = 120  # so many characters of a value that differs are shown
_NAMED = 8  # so many processes, or fields, of those that are to blame a message names
# An error waits for so long whether another process has gone before it; a process has
# so long for its last words.
_SECONDS_FOR_OTHERS, _SECONDS_TO_END = 2.0, 5.0
_BEATS = 8  # signs of life in the time after which a silent process is lost


class DistributedError(RuntimeError):
  """The processes of a job do not come, or do not stay, together."""


@dataclasses.dataclass(frozen=True)
class Process:
  """A process's number in its job, and the coordinator's address.

  Attributes:
    coordinator_address: host and port of process 0.
    num_processes: of the job.
    process_id: 0 … num_processes - 1.
    local_device_ids: accelerators of this host that are its own; None for all.
  """

  coordinator_address: str
  num_processes: int
  process_id: int
  local_device_ids: tuple[int, ...] | None = None

  def __post_init__(self):
    if not re.fullmatch(r".+:\d{1,5}", self.coordinator_address):
      raise ValueError(
        f"coordinator_address={self.coordinator_address!r} must be HOST:PORT, an "
        "address of process 0 that all others reach."
      )
    if not 0 <= self.process_id < self.num_processes:
      raise ValueError(
        f"process_id={self.process_id} must lie in 0 … num_processes - 1 = "
        f"{self.num_processes - 1}."
      )

  @property
  def address(self) -> tuple[str, int]:
    """Host and port of the coordinator, separately."""
    host, _, port = self.coordinator_address.rpartition(":")
    return host.strip("[]"), int(port)


def find_process(
  *,
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
  timeout: int,
) -> Process | None:
  """This process's number and address in its job; None for a job of one process.

  What is given counts, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, then what JAX itself finds: a TPU pod, SLURM, Open MPI, Kubernetes.

  Args:
    timeout: seconds that finding may wait, e.g. for a name to be resolved.

  Raises:
    ValueError: some of the three are given and others are not, or they are wrong.
  """
  address = coordinator_address or os.environ.get(VARIABLES["coordinator_address"])
  count = _number(num_processes, VARIABLES["num_processes"])
  index = _number(process_id, VARIABLES["process_id"])
  if count is None and index is None:
    process = _detect(address, timeout)
    if process is None and address is None:
      return None
  elif address is None or count is None or index is None:
    process = None
  else:
    process = Process(address, count, index)
  if process is None:
    given = dict(zip(VARIABLES, (address, count, index), strict=True))
    missing = [name for name, value in given.items() if value is None]
    raise ValueError(
      f"A process of several must be told all of --{', --'.join(given)} (or "
      f"{', '.join(VARIABLES.values())}), or none of them where JAX finds them itself: "
      f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing."
    )
  return process if process.num_processes > 1 else None


def _number(given: int | None, variable: str) -> int | None:
  text = os.environ.get(variable)
  if given is not None or not text:
    return given
  if not text.isdigit():
    raise ValueError(f"{variable}={text} must be a whole number.")
  return int(text)


def _detect(address: str | None, timeout: int) -> Process | None:
  """The process that JAX detects from its environment."""
  # Private, and asked here because only `jax.distributed.initialize` asks it otherwise,
  # which waits for all processes without a word and ends the program if one is missing.
  from jax._src.clusters import ClusterEnv

  address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
    address, None, None, None, None, timeout
  )
  if address is None or count is None or index is None:
    return None
  return Process(address, count, index, tuple(devices) if devices else None)


@contextlib.contextmanager
def initialized(process: Process | None, *, startup_timeout: int, silence_timeout: int):
  """Initializes the job's processes for the block, and ends them together.

  With None there is one process, and nothing to be done. Must come before
  anything that JAX computes. Only process 0 logs what is not a warning.

  A process that goes without a word (killed, out of memory, its machine lost), that is
  frozen, or that ends in an error, takes the others with it: each prints which one it
  was and exits with code 1.

  Args:
    process: this one; None for a job of one.
    startup_timeout: seconds to wait for all processes.
    silence_timeout: seconds after which a process, or a machine, that does not answer
      is lost. A process that ends on a machine that goes on is noticed at once.

  Raises:
    DistributedError: processes have not come, or two claim to be the same one.
  """
  if process is None:
    yield
    return
  membership = _Membership.establish(process, startup_timeout, silence_timeout)
  try:
    jax.distributed.initialize(
      process.coordinator_address,
      process.num_processes,
      process.process_id,
      local_device_ids=process.local_device_ids,
      cluster_detection_method="deactivate",  # done
      initialization_timeout=startup_timeout,
      # After ours, which name the culprit; JAX aborts whoever notices.
      heartbeat_timeout_seconds=2 * silence_timeout + 10,
      shutdown_timeout_seconds=startup_timeout,
    )
    if process.process_id:
      logging.set_verbosity(logging.WARNING)
    logging.info(
      "Together: %s.", _listed(range(process.num_processes), membership.hosts)
    )
    yield
  except SystemExit:
    _leave(membership)  # stopped, by agreement
    raise
  except BaseException as error:
    membership.fail(error)
    raise
  else:
    _leave(membership)


def _leave(membership: "_Membership") -> None:
  membership.say_goodbye()
  jax.distributed.shutdown()  # waits for the others
  membership.close()


def _listed(indices: Sequence[int], hosts: Mapping[int, str]) -> str:
  """Processes by number, and by host where that is known; the first few."""
  names = [
    f"{index} ({hosts[index]})" if index in hosts else str(index)
    for index in indices[:_NAMED]
  ]
  more = len(indices) - len(names)
  word = "process" if len(indices) == 1 else "processes"
  return f"{word} {', '.join(names)}" + (f" and {more} more" if more else "")


def is_first() -> bool:
  """Whether this is the process that speaks for all."""
  return jax.process_index() == 0


def check_same(what: str, value: Any) -> None:
  """Compares a value of this process with those of the others, who must call it too.

  Raises:
    DistributedError: `what` differs; says in which fields, and which processes have
      what.
  """
  if jax.process_count() == 1:
    return
  # As JSON has it, where tuples are lists.
  text = json.dumps(value, sort_keys=True, default=str)
  mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  hashes = multihost_utils.process_allgather(mine)
  if (hashes == hashes[0]).all():
    return
  # All know that they differ, so all come here.
  values = [json.loads(text) for text in _texts(text)]
  raise DistributedError(
    f"The processes do not have the same {what}: {_differences(values)}. Give "
    "all the same command, the same code, and a disk on which they see the same files."
  )


def of_first(value: Any) -> Any:
  """Process 0's value, which JSON must hold, in all; all must call it."""
  if jax.process_count() == 1:
    return value
  return json.loads(_texts(json.dumps(value))[0])


def _texts(text: str) -> list[str]:
  """A text of each process, by number; all must call it."""
  mine = text.encode()
  lengths = multihost_utils.process_allgather(np.array(len(mine))).reshape(-1)
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(mine)] = np.frombuffer(mine, np.uint8)
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:length].tobytes().decode()
    for row, length in zip(rows, lengths.tolist(), strict=True)
  ]


def _differences(values: Sequence[Any]) -> str:
  """Fields in which the values of processes differ, each with who has what."""
  fields = [_fields(value) for value in values]
  names = dict.fromkeys(name for own in fields for name in own)
  said = []
  for name in names:
    have: dict[str, list[int]] = {}
    for index, own in enumerate(fields):
      text = json.dumps(own[name]) if name in own else "nothing"
      have.setdefault(text, []).append(index)
    if len(have) > 1:
      each = ", ".join(
        f"{_shortened(text, list(have))} in {_listed(indices, {})}"
        for text, indices in list(have.items())[:_NAMED]
      )
      said.append(f"{name}: {each}" if name else each)
  more = f"; and {len(said) - _NAMED} more fields" if len(said) > _NAMED else ""
  return "; ".join(said[:_NAMED]) + more


def _fields(value: Any, name: str = "") -> dict[str, Any]:
  """Fields of a JSON value by dotted names; lists are taken whole."""
  if not isinstance(value, dict) or not value:
    return {name: value}
  found: dict[str, Any] = {}
  for key, part in value.items():
    found |= _fields(part, f"{name}.{key}" if name else str(key))
  return found


def _shortened(text: str, others: Sequence[str]) -> str:
  """A text from shortly before it begins to differ from the others, if it is long."""
  if len(text) <= _SHOWN:
    return text
  letters = zip(*others, strict=False)
  alike = itertools.takewhile(lambda column: len(set(column)) == 1, letters)
  begin = max(sum(1 for _ in alike) - _SHOWN // 4, 0)
  end = begin + _SHOWN
  return f"{'…' if begin else ''}{text[begin:end]}{'…' if end < len(text) else ''}"


def in_all(numbers: Iterable[int]) -> list[int]:
  """Numbers that all processes have in common; all must call it."""
  mine = sorted(numbers)
  if jax.process_count() == 1:
    return mine
  counts = multihost_utils.process_allgather(np.array(len(mine)))
  padded = np.full(counts.max(), -1)
  padded[: len(mine)] = mine
  rows = multihost_utils.process_allgather(padded)
  return [number for number in mine if all(number in row for row in rows)]


def _expected_hosts(count: int) -> dict[int, str]:
  """Hosts of the processes, where the environment says: a TPU pod, or launch/."""
  for variable in ("TPU_WORKER_HOSTNAMES", HOSTS_VARIABLE):
    hosts = os.environ.get(variable, "").split(",")
    each, rest = divmod(count, len(hosts))
    # A TPU pod of several slices names those of one slice only.
    named = all(re.fullmatch(r"[\w.:-]+", host) for host in hosts)
    if named and not rest and (each == 1 or variable == HOSTS_VARIABLE):
      return {index: hosts[index // each] for index in range(count)}
  return {}


def wait_for_all() -> None:
  """Returns when all processes have come here, of which some compile for longer."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("wait_for_all")


def whole(array: Any) -> np.ndarray:
  """An array that is spread over processes, on the host; all must ask for it."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


class Stopping(Exception):
  """A wait was interrupted by a request to stop."""


class Stop:
  """SIGTERM and SIGINT as a request that all processes stop after the same step.

  From its making to `close`, a signal to any process makes `is_due` true, in every
  process at the same step: JAX spreads the notice in the background, which costs a step
  nothing. What will happen is said at once, in the middle of a step too; SIGINT after
  another signal ends this process there and then, and in an interactive session raises
  KeyboardInterrupt.

  Attributes:
    number: of the signal, once `is_due` has been true.
  """

  def __init__(self, plan: Callable[[], str] = lambda: "stopping"):
    """Installs the signal handlers.

    Args:
      plan: says what will be done first, e.g. "finishing step 7, then saving".
    """
    self.number: int | None = None
    self._plan = plan
    self._asked = 0  # not the step, which a rollback turns back
    self._due = self._waiting = False
    # With several processes SIGTERM is JAX's: its handler, which Python does not see,
    # is what spreads the notice.
    self._alone = jax.process_count() == 1
    numbers = (signal.SIGINT, signal.SIGTERM)[: 1 + self._alone]
    # Handlers run between two lines of Python, and a step may be one line: a thread
    # reads what the system writes at the moment itself.
    self._numbers, written = socket.socketpair()
    written.setblocking(False)
    self._written = written
    self._before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    self._handlers = {n: signal.signal(n, self._heard) for n in numbers}
    self._thread = threading.Thread(target=self._answer, daemon=True, name="signals")
    self._thread.start()

  def close(self) -> None:
    """Restores the earlier signal handlers."""
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._before)
    self._written.close()
    self._thread.join()
    self._numbers.close()

  def is_due(self) -> bool:
    """Whether to stop here; all processes must ask equally often."""
    if self._alone:
      return self.is_wished()
    if not self._due:
      self._asked += 1
      self._due = multihost_utils.reached_preemption_sync_point(self._asked)
    if self._due:
      self.number = self.number or signal.SIGTERM
    return self._due

  def is_wished(self) -> bool:
    """Whether a process that is alone was told to stop; asked at any time."""
    return self._alone and self.number is not None

  @contextlib.contextmanager
  def breaking_off(self) -> Iterator[None]:
    """Lets a signal interrupt waits in the block, for a process that is alone.

    Raises:
      Stopping: there was a signal, or there is one while it waits.
    """
    self._waiting = self._alone
    try:
      if self.is_wished():
        raise Stopping
      yield
    finally:
      self._waiting = False

  def _heard(self, number: int, _: types.FrameType | None) -> None:
    again = self.number is not None and number == signal.SIGINT
    self.number = self.number or number
    if again and _is_interactive():
      raise KeyboardInterrupt
    if not self._alone:
      os.kill(os.getpid(), signal.SIGTERM)
    elif self._waiting:
      self._waiting = False
      raise Stopping

  def _answer(self) -> None:
    """Announces what a signal will do; SIGINT after another ends the process."""
    heard = False
    while read := self._numbers.recv(1):
      [number] = read
      if number not in self._handlers:
        continue
      name = signal.Signals(number).name
      if heard and number == signal.SIGINT:
        logging.warning("%s again: ended here, nothing more is saved.", name)
        if not _is_interactive():
          logging.flush()
          os._exit(128 + number)
        continue
      heard = True
      again = "once more" if number == signal.SIGINT else "Ctrl-C"
      logging.warning("%s: %s; %s to end now.", name, self._plan(), again)


def _is_interactive() -> bool:
  """Whether this is a notebook or prompt, which outlives what it runs."""
  return hasattr(sys, "ps1")


class _Membership:
  """Connections between process 0 and each other process while the job runs.

  Of process 0 they lead to all others, by number; of another to process 0.
  """

  def __init__(
    self,
    process: Process,
    hosts: dict[int, str],
    sockets: dict[int, socket.socket],
    silence_timeout: float,
  ):
    self.hosts = hosts
    self._process = process
    self._sockets = sockets
    self._silence = silence_timeout
    self._interval = silence_timeout / _BEATS
    now = time.monotonic()
    self._heard_at = dict.fromkeys(sockets, now)
    self._suspected = False  # whether process 0 has not heard of somebody for a while
    self._deferred: dict[str, Any] | None = None  # news that a silence may explain
    self._left: set[int] = set()  # those that said goodbye
    self._ending = threading.Event()  # this process is in an error of its own
    self._heard_of = threading.Event()  # or another one, as `_news` has it
    self._news: dict[str, Any] = {}
    self._closed = threading.Event()
    self._lock = threading.Lock()
    self._watch = threading.Thread(target=self._listen, daemon=True)
    self._pulse = threading.Thread(target=self._beat, daemon=True)

  @classmethod
  def establish(
    cls, process: Process, startup_timeout: float, silence_timeout: float
  ) -> "_Membership":
    """Returns when all processes have come; see `initialized`."""
    call = _establish_as_first if process.process_id == 0 else _establish_as_other
    hosts, sockets = call(process, startup_timeout)
    for connection in sockets.values():
      connection.settimeout(silence_timeout)
      _keep_alive(connection, silence_timeout)
    membership = cls(process, hosts, sockets, silence_timeout)
    membership._watch.start()
    membership._pulse.start()
    return membership

  def say_goodbye(self) -> None:
    """Announces that disconnects of this process after this point are expected."""
    self._tell({"goodbye": True})

  def close(self) -> None:
    """Ends the connections."""
    self._closed.set()
    for connection in self._sockets.values():
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    self._watch.join()
    self._pulse.join()
    for connection in self._sockets.values():
      connection.close()

  def fail(self, error: BaseException) -> None:
    """Tells the others; lets this process end in `error`, but not hang on its way.

    Unless another process was there first: then this error, most likely of a collective
    that was left, says less than that one's.
    """
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    if self._silent_since(2 * self._interval) or self._suspected:
      # Of a collective that waited for somebody who is frozen, most likely.
      self._heard_of.wait(self._silence)
    if self._heard_of.wait(_SECONDS_FOR_OTHERS) and self._news.get("failed") != line:
      self._watch.join()
    self._ending.set()
    self._tell({"failed": line})
    # What waits for other processes at the exit, in JAX or Orbax, would wait in vain.
    atexit.register(_exit)
    timer = threading.Timer(_SECONDS_TO_END, _exit)
    timer.daemon = True
    timer.start()

  def _tell(self, message: Mapping[str, Any], apart_from: int | None = None) -> None:
    for index, connection in self._sockets.items():
      if index != apart_from:
        with contextlib.suppress(OSError), self._lock:
          connection.sendall(_line(message))

  def _beat(self) -> None:
    """Sends heartbeats.

    The system answers for a process that is frozen, and keeps its connections alive;
    this thread is frozen with it.
    """
    while not self._closed.wait(self._interval):
      self._tell({"here": True, "suspects": self._silent_since(2 * self._interval)})

  def _silent_since(self, seconds: float) -> list[int]:
    """Processes without a heartbeat for so long that did not say goodbye."""
    now = time.monotonic()
    return [
      index
      for index, at in self._heard_at.items()
      if now - at > seconds and index not in self._left
    ]

  def _listen(self) -> None:
    """Reads what the others say until this process leaves, or one of them is gone."""
    unread = dict.fromkeys(self._sockets, b"")
    with selectors.DefaultSelector() as selector:
      for index, connection in self._sockets.items():
        selector.register(connection, selectors.EVENT_READ, index)
      looked = time.monotonic()
      while selector.get_map():
        for key, _ in selector.select(self._interval):
          index = key.data
          try:
            text = self._sockets[index].recv(1 << 16)
          except OSError:
            text = b""
          if self._closed.is_set():
            return
          self._heard_at[index] = time.monotonic()
          *lines, unread[index] = (unread[index] + text).split(b"\n")
          for line in lines:
            self._heard(index, json.loads(line))
          if not text:
            selector.unregister(key.fileobj)
            if index not in self._left:
              self._heard_at.pop(index)
              self._blame({"gone": index})
        now = time.monotonic()
        if now - looked > 2 * self._interval:
          # This process itself was frozen, or starved, and has yet to read what came.
          self._heard_at = dict.fromkeys(self._heard_at, now)
        looked = now
        if silent := self._silent_since(self._silence):
          self._end({"silent": silent[0]})
        elif self._deferred and not self._silent_since(2 * self._interval):
          self._end(self._deferred)

  def _heard(self, index: int, message: dict[str, Any]) -> None:
    if "goodbye" in message:
      self._left.add(index)
    elif "here" in message:
      self._suspected = bool(message["suspects"])
    else:
      self._blame({"process": index, **message})

  def _blame(self, message: dict[str, Any]) -> None:
    """Ends in this news, unless somebody who may be frozen is the cause of it."""
    if "silent" not in message and self._silent_since(2 * self._interval):
      self._deferred = self._deferred or message
    else:
      self._end(message)

  def _end(self, message: dict[str, Any]) -> None:
    """Tells the others, and ends this process."""
    self._news = message
    self._heard_of.set()
    if self._process.process_id == 0:
      self._tell(message, apart_from=message.get("gone"))
    if "gone" in message:
      index = message["gone"]
      what = (
        f"Process {index} on {self.hosts[index]} is gone without a word: killed, out "
        "of memory, or its machine is lost"
      )
    elif "silent" in message:
      index = message["silent"]
      what = (
        f"Process {index} on {self.hosts[index]} has not answered for "
        f"{self._silence:g} s: it is frozen, or its machine hangs or is lost"
      )
    else:
      # All may be in the same error, and say so themselves.
      if self._ending.wait(_SECONDS_TO_END):
        return
      index = message["process"]
      what = f"Process {index} on {self.hosts[index]} ended in {message['failed']}"
    if self._ending.is_set():
      return
    logging.flush()
    print(
      f"Error: {what}. Process {self._process.process_id} ends too; its log has no "
      f"more to say. Look at that of process {index}. The same command in all "
      f"{self._process.num_processes} processes goes on from the newest checkpoint.",
      file=sys.stderr,
    )
    _exit()


def _exit() -> NoReturn:
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(1)


def _line(message: Mapping[str, Any]) -> bytes:
  return json.dumps(message).encode() + b"\n"


def _read_line(connection: socket.socket, timeout: float) -> dict[str, Any] | None:
  """One message; None if the other side is none of this job, or is gone again."""
  connection.settimeout(max(timeout, 0.01))
  text = b""
  try:
    # Byte by byte: what follows the line must stay for whoever reads on.
    while not text.endswith(b"\n") and len(text) < 1 << 20:
      byte = connection.recv(1)
      if not byte:
        return None
      text += byte
    message = json.loads(text)
  except (OSError, ValueError):
    return None
  return message if isinstance(message, dict) else None


def _keep_alive(connection: socket.socket, seconds: float) -> None:
  """Lets the system notice within `seconds` that the other machine is lost."""
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  options = {
    "TCP_KEEPIDLE": max(1, int(seconds / 4)),
    "TCP_KEEPINTVL": max(1, int(seconds / 8)),
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": int(1000 * seconds),
  }
  for name, value in options.items():
    if hasattr(socket, name):  # not on every system
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _establish_as_first(
  process: Process, timeout: float
) -> tuple[dict[int, str], dict[int, socket.socket]]:
  """Waits for all others; their hosts and connections by number."""
  count, port = process.num_processes, process.address[1]
  hosts = {0: socket.gethostname()}
  sockets: dict[int, socket.socket] = {}
  until = time.monotonic() + timeout

  def refuse(message: str) -> NoReturn:
    for connection in sockets.values():
      with contextlib.suppress(OSError):
        connection.sendall(_line({"error": message}))
      connection.close()
    raise DistributedError(message)

  with _listener(port, until, timeout) as listener:
    while len(_still_here(hosts, sockets)) < count:
      listener.settimeout(max(until - time.monotonic(), 0.01))
      try:
        connection, _ = listener.accept()
      except TimeoutError:
        missing = sorted(set(range(count)) - set(hosts))
        refuse(
          f"{len(missing)} of {count} processes did not come within {timeout:g} s to "
          f"process 0 at {process.coordinator_address}: missing "
          f"{'is' if len(missing) == 1 else 'are'} "
          f"{_listed(missing, _expected_hosts(count))}; here "
          f"{'is' if len(hosts) == 1 else 'are'} {_listed(sorted(hosts), hosts)}. Look "
          "at the logs of the former, or raise --startup_timeout."
        )
      message = _read_line(connection, min(5.0, until - time.monotonic()))
      if message is None or "process" not in message:
        connection.close()
        continue
      index, host = message["process"], message["host"]
      taken = _still_here(hosts, sockets).get(index)
      if message["processes"] != count or taken is not None:
        what = (
          f"there are two processes {index}, on {taken} and on {host}"
          if message["processes"] == count
          else f"process 0 knows of {count} processes, process {index} on {host} of "
          f"{message['processes']}"
        )
        sockets[-1] = connection
        refuse(
          f"The processes do not fit together: {what}. Give each its own --process_id, "
          "and all the same --num_processes."
        )
      hosts[index], sockets[index] = host, connection
  for connection in sockets.values():
    with contextlib.suppress(OSError):  # gone again, as will be noticed
      connection.sendall(_line({"hosts": hosts}))
  return hosts, sockets


def _still_here(
  hosts: dict[int, str], sockets: dict[int, socket.socket]
) -> dict[int, str]:
  """Forgets those that ended while the others were waited for: they may come again."""
  for index, connection in list(sockets.items()):
    connection.settimeout(0.0)
    gone = True
    with contextlib.suppress(ConnectionError):
      try:
        gone = not connection.recv(1)
      except BlockingIOError:  # nothing to read, from somebody who is there
        gone = False
    connection.settimeout(5.0)
    if gone:
      del hosts[index]
      sockets.pop(index).close()
  return hosts


@contextlib.contextmanager
def _listener(port: int, until: float, timeout: float) -> Iterator[socket.socket]:
  """Listens on all addresses; waits while the job's last attempt still ends."""
  while True:
    try:
      both = socket.has_dualstack_ipv6()
      listener = socket.create_server(
        ("", port),
        family=socket.AF_INET6 if both else socket.AF_INET,
        dualstack_ipv6=both,
        backlog=1024,
      )
      break
    except OSError as error:
      if time.monotonic() > until:
        raise DistributedError(
          f"Process 0 could not listen on port {port} for {timeout:g} s: {error}. "
          "Another program has it: end that, or give another --coordinator_address."
        ) from error
      time.sleep(0.5)
  # Closed before JAX takes the port; the connections stay.
  with listener:
    yield listener


def _establish_as_other(
  process: Process, timeout: float
) -> tuple[dict[int, str], dict[int, socket.socket]]:
  """Tells process 0 that this one is here; hosts of all, and the connection to it."""
  until = time.monotonic() + timeout
  said = "nothing was heard"
  while (left := until - time.monotonic()) > 0:
    try:
      connection = socket.create_connection(process.address, timeout=min(left, 10.0))
    except OSError as error:
      said = str(error)
      time.sleep(min(0.2, left))
      continue
    me = {
      "process": process.process_id,
      "processes": process.num_processes,
      "host": socket.gethostname(),
    }
    with contextlib.suppress(OSError):
      connection.sendall(_line(me))
    # Process 0 counts from its own start, and is the one that knows who is missing.
    answer = _read_line(connection, timeout + 5.0)
    if answer and "error" in answer:
      connection.close()
      raise DistributedError(answer["error"])
    if answer and "hosts" in answer:
      hosts = {int(index): host for index, host in answer["hosts"].items()}
      return hosts, {0: connection}
    # Gone again, or JAX's own service of an attempt that is still ending.
    connection.close()
    said = "it does not answer"
    time.sleep(min(0.2, max(until - time.monotonic(), 0.0)))
  raise DistributedError(
    f"Process 0 of {process.num_processes} has not come within {timeout:g} s: nobody "
    f"answers as process 0 at {process.coordinator_address} ({said}). Look at the log "
    "of process 0 and whether its port can be reached from "
    f"{socket.gethostname()}, or raise --startup_timeout."
  )
