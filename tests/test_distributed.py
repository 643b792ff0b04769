"""How processes find each other, and who is named when one is missing."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from pixsigma_jax import distributed
from pixsigma_jax.distributed import DistributedError, Process, find_process

# What may say that there are several processes, in whatever runs the tests.
VARIABLES = (
  *distributed.VARIABLES.values(),
  *("TPU_WORKER_HOSTNAMES", distributed.HOSTS_VARIABLE, "KUBERNETES_SERVICE_HOST"),
  *("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri"),
)


@pytest.fixture(autouse=True)
def bare(monkeypatch):
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port():
  with socket.create_server(("localhost", 0)) as server:
    return server.getsockname()[1]


def find(address=None, count=None, index=None):
  return find_process(
    coordinator_address=address, num_processes=count, process_id=index, timeout=1
  )


def test_where_nothing_is_said_there_is_one_process():
  assert find() is None


def test_addresses_come_from_flags_before_the_environment(monkeypatch):
  assert find("a:1", 4, 2) == Process("a:1", 4, 2)
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "b:2")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "8")
  monkeypatch.setenv("JAX_PROCESS_ID", "7")
  assert find() == Process("b:2", 8, 7)
  assert find("a:1", index=3) == Process("a:1", 8, 3)


def test_a_job_of_one_process_needs_no_addresses():
  assert find("a:1", 1, 0) is None


@pytest.mark.parametrize(
  ("given", "missing"),
  [
    (("a:1", None, None), "num_processes and process_id are missing"),
    (("a:1", 4, None), "process_id is missing"),
    ((None, 4, 2), "coordinator_address is missing"),
  ],
)
def test_half_an_address_is_refused_and_the_rest_is_named(given, missing):
  with pytest.raises(ValueError, match=f"JAX_PROCESS_ID.*{missing}"):
    find(*given)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("a", 4, 2), r"coordinator_address='a' must be HOST:PORT"),
    (("a:1", 4, 4), r"process_id=4 must lie in 0 … num_processes - 1 = 3"),
  ],
)
def test_an_address_that_cannot_be_is_refused(given, message):
  with pytest.raises(ValueError, match=message):
    find(*given)


def test_a_number_that_is_none_is_named_by_its_variable(monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES=four must be a whole number"):
    find()


def test_a_task_of_slurm_is_found(monkeypatch):
  variables = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
  }
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  # JAX derives the port from the number of the job.
  assert find() == Process("node07:61440", 16, 9, local_device_ids=(1,))


def call(port, count, indices, timeout=5.0, silence=5.0):
  """The connecting of some processes, each in a thread: what each got, or its error."""
  results = {}

  def one(index):
    process = Process(f"localhost:{port}", count, index)
    try:
      results[index] = distributed._Membership.establish(process, timeout, silence)
    except DistributedError as error:
      results[index] = str(error)

  threads = [threading.Thread(target=one, args=(index,)) for index in indices]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return results


def close(members):
  for member in members.values():
    member.say_goodbye()
  for member in members.values():
    member.close()


def test_connecting_tells_everyone_who_is_there_and_frees_the_port(port):
  members = call(port, 4, range(4))
  hosts = dict.fromkeys(range(4), socket.gethostname())
  assert {index: member.hosts for index, member in members.items()} == dict.fromkeys(
    range(4), hosts
  )
  # As JAX will, while the connections are still open.
  with socket.create_server(("localhost", port)):
    close(members)


# Where the program would end, the thread does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whoever_is_gone_is_named_by_all_who_stay(port, monkeypatch, capsys):
  monkeypatch.setattr(distributed, "_exit", sys.exit)
  members = call(port, 3, range(3))
  members[1].close()  # without a goodbye
  for index in (0, 2):
    members[index]._watch.join(30)
    assert not members[index]._watch.is_alive()
    members[index].close()
  lines = sorted(capsys.readouterr().err.splitlines())
  gone = f"Error: Process 1 on {socket.gethostname()} is gone without a word: killed"
  assert [line[: len(gone)] for line in lines] == [gone, gone]
  assert ["Process 0 ends too" in lines[0], "Process 2 ends too" in lines[1]] == [
    True
  ] * 2


# Where the program would end, the thread does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("frozen", [0, 1])
def test_whoever_is_frozen_is_named_by_all_others(port, monkeypatch, capsys, frozen):
  monkeypatch.setattr(distributed, "_exit", sys.exit)
  beat = distributed._Membership._beat
  monkeypatch.setattr(
    distributed._Membership,
    "_beat",
    lambda members: None if members._process.process_id == frozen else beat(members),
  )
  members = call(port, 3, range(3), silence=1.0)
  others = [index for index in range(3) if index != frozen]
  # The connections of the frozen process stay open, and the error of a collective that
  # waits for it comes first.
  if frozen == 1:
    time.sleep(0.5)
    members[2]._tell({"failed": "XlaRuntimeError: timed out"})
  for index in others:
    members[index]._watch.join(30)
    assert not members[index]._watch.is_alive()
  for member in members.values():
    member.close()
  lines = capsys.readouterr().err.splitlines()
  host = socket.gethostname()
  named = f"Error: Process {frozen} on {host} has not answered for 1 s: it is frozen"
  for index in others:
    assert any(named in x and f"Process {index} ends too" in x for x in lines), lines
  assert not any("ended in" in line for line in lines)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_waits_for_whoever_may_be_frozen_and_is_told_if_nobody_is(
  port, monkeypatch, capsys
):
  monkeypatch.setattr(distributed, "_exit", sys.exit)
  monkeypatch.setattr(distributed, "_SECONDS_TO_END", 0.1)
  members = call(port, 3, range(3), silence=4.0)
  late = members[0]._heard_at
  late[1] -= 2.0  # not heard for a while
  members[2]._ending.set()  # it is in that error itself
  members[2]._tell({"failed": "OSError: no room"})
  for index in (0, 1):
    members[index]._watch.join(30)
  for member in members.values():
    member.close()
  lines = capsys.readouterr().err.splitlines()
  assert all("Process 2 on" in line for line in lines)
  assert len([line for line in lines if "ended in OSError: no room" in line]) == 2


def test_processes_that_answer_stay_together_however_long(port, capsys):
  members = call(port, 3, range(3), silence=0.5)
  time.sleep(1.5)
  assert all(member._watch.is_alive() for member in members.values())
  close(members)
  assert not capsys.readouterr().err


def test_those_who_have_not_come_are_named_to_all_who_have(port, monkeypatch):
  monkeypatch.setenv(distributed.HOSTS_VARIABLE, "n1,n2")
  said = call(port, 4, [0, 2], timeout=1.0)
  assert said[0] == said[2]
  host = socket.gethostname()
  assert said[0] == (
    f"2 of 4 processes did not come within 1 s to process 0 at localhost:{port}: "
    f"missing are processes 1 (n1), 3 (n2); here are processes 0 ({host}), 2 ({host}). "
    "Look at the logs of the former, or raise --startup_timeout."
  )


def test_without_process_0_the_others_say_where_they_looked(port):
  said = call(port, 3, [1], timeout=1.0)
  assert said[1].startswith(
    "Process 0 of 3 has not come within 1 s: nobody answers as process 0 at "
    f"localhost:{port} ("
  )


def test_two_processes_of_one_number_are_refused(port):
  said = call(port, 3, [0, 1, 1])
  assert "there are two processes 1, on" in said[0]
  assert "Give each its own --process_id" in said[1]


def test_processes_of_two_jobs_are_refused(port):
  result = []
  thread = threading.Thread(target=lambda: result.append(call(port, 3, [0])))
  thread.start()
  said = call(port, 4, [2])
  thread.join(30)
  assert said[2] == result[0][0]
  assert "process 0 knows of 3 processes, process 2 on" in said[2]


def test_a_stranger_at_the_door_does_not_disturb(port):
  result = []
  thread = threading.Thread(target=lambda: result.append(call(port, 2, [0])))
  thread.start()
  for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b""):
    while True:
      with contextlib.suppress(OSError):
        stranger = socket.create_connection(("localhost", port))
        break
    stranger.sendall(greeting)
    stranger.close()
  members = call(port, 2, [1])
  thread.join(30)
  close(members | result[0])


def test_a_process_that_is_started_again_while_others_connect_is_the_same_process(port):
  result = []
  thread = threading.Thread(target=lambda: result.append(call(port, 3, [0])))
  thread.start()
  while True:
    with contextlib.suppress(OSError):
      first = socket.create_connection(("localhost", port))
      break
  first.sendall(json.dumps({"process": 1, "processes": 3, "host": "old"}).encode())
  first.sendall(b"\n")
  time.sleep(0.3)  # its place is taken, and then free again
  first.close()
  members = call(port, 3, [1, 2])
  thread.join(30)
  assert result[0][0].hosts[1] == socket.gethostname()
  close(members | result[0])


def test_a_taken_port_is_named(port):
  with socket.create_server(("", port)):
    said = call(port, 2, [0], timeout=0.2)
  assert f"could not listen on port {port} for 0.2 s" in said[0]


def test_hosts_of_a_pod_are_known_where_the_environment_names_all(monkeypatch):
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t0,t1")
  assert distributed._expected_hosts(2) == {0: "t0", 1: "t1"}
  assert distributed._expected_hosts(4) == {}  # two slices, of which one is named
  monkeypatch.setenv(distributed.HOSTS_VARIABLE, "a,b")
  assert distributed._expected_hosts(4) == {0: "a", 1: "a", 2: "b", 3: "b"}
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "WARNING: could not find,out")
  assert distributed._expected_hosts(2) == {0: "a", 1: "b"}


def test_a_long_list_ends_in_how_many_more():
  assert distributed._listed(range(12), {0: "a"}) == (
    "processes 0 (a), 1, 2, 3, 4, 5, 6, 7 and 4 more"
  )
  assert distributed._listed([3], {}) == "process 3"


def test_alone_there_is_nothing_to_agree_on(key):
  with distributed.initialized(None, startup_timeout=1, silence_timeout=1):
    assert distributed.is_first()
    distributed.check_same("seed", 3)
  array = jax.random.normal(key, (8, 2))
  np.testing.assert_array_equal(distributed.whole(array), array)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_alone_a_signal_stops_after_the_step_under_way(number):
  before = signal.getsignal(number)
  stop = distributed.Stop()
  try:
    assert not stop.is_due()
    os.kill(os.getpid(), number)
    assert stop.is_due()
    assert stop.number == number
  finally:
    stop.close()
  assert signal.getsignal(number) == before


def _wait_for(condition):
  until = time.monotonic() + 20
  while not condition() and time.monotonic() < until:
    time.sleep(0.01)
  assert condition()


def test_a_signal_is_answered_before_anybody_asks(caplog):
  stop = distributed.Stop(lambda: "finishing step 7, then saving")
  try:
    os.kill(os.getpid(), signal.SIGINT)
    said = "SIGINT: finishing step 7, then saving; once more to end now."
    _wait_for(lambda: said in caplog.messages)
    os.kill(os.getpid(), signal.SIGTERM)
    said = "SIGTERM: finishing step 7, then saving; Ctrl-C to end now."
    _wait_for(lambda: said in caplog.messages)
  finally:
    stop.close()
  assert stop.number == signal.SIGINT


def test_what_waits_is_broken_off_by_a_signal_and_does_not_begin_after_one():
  stop = distributed.Stop()
  try:
    with contextlib.suppress(distributed.Stopping), stop.breaking_off():
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(20)
      pytest.fail("The signal did not break it off.")
    assert stop.is_due()
    with pytest.raises(distributed.Stopping), stop.breaking_off():
      pytest.fail("It began.")
    os.kill(os.getpid(), signal.SIGTERM)  # outside, nothing is
  finally:
    stop.close()


def test_in_an_interactive_session_a_second_ctrl_c_interrupts(monkeypatch):
  monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
  stop = distributed.Stop()
  try:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.is_due()
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  finally:
    stop.close()


_ONE_LONG_LINE = """
import hashlib
from pixsigma_jax import distributed
stop = distributed.Stop()
print("here", flush=True)
hashlib.pbkdf2_hmac("sha256", b"a step", b"that is one line of Python", 2_000_000_000)
"""


def test_a_second_ctrl_c_ends_a_process_in_the_middle_of_a_step():
  process = subprocess.Popen(
    [sys.executable, "-c", _ONE_LONG_LINE],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  with process:
    try:
      assert process.stdout.readline() == "here\n"
      process.send_signal(signal.SIGINT)
      while "to end now" not in (line := process.stderr.readline()):
        assert line
      process.send_signal(signal.SIGINT)
      assert process.wait(20) == 128 + signal.SIGINT
      assert "SIGINT again: ended here" in process.stderr.read()
    finally:
      process.kill()


def test_of_two_texts_that_look_alike_only_what_differs_is_said():
  config = {"a": {"rate": 1e-3, "names": ["x"]}, "path": "/data/" + 300 * "x" + "/1"}
  other = {"a": {"rate": 2e-3, "names": ["x"], "new": 1}, "path": config["path"] + "2"}
  said = distributed._differences([config, other, config])
  assert said.startswith(
    "a.rate: 0.001 in processes 0, 2, 0.002 in process 1; path: …xxx"
  )
  assert 'xxx/1" in processes 0, 2, …xxx' in said
  assert (
    'xxx/12" in process 1; a.new: nothing in processes 0, 2, 1 in process 1' in said
  )
  assert len(said) < 500


def test_many_differences_end_in_how_many_more():
  values = [dict.fromkeys("abcdefghijk", index) for index in range(2)]
  assert distributed._differences(values).endswith("; and 3 more fields")


# Processes of one device, without a model.
SCRIPT = """
import os
import signal
import sys
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from pixsigma_jax import distributed

address, index, count, what = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
logging.set_verbosity(logging.INFO)
process = distributed.Process(address, count, index)
silence = 6 if what == "freeze" else 30
with distributed.initialized(process, startup_timeout=120, silence_timeout=silence):
  distributed.check_same("seed", 3 + index if what == "differ" else 3)
  config = {"a": {"b": index if what == "config" else 0}, "c": ["x"] * 100}
  distributed.check_same("config", config)
  assert distributed.of_first({"index": index}) == {"index": 0}
  if what == "freeze" and index == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
  if what == "fail" and index:
    raise OSError("No space left on the device of this host")
  for step in range(10):
    gathered = multihost_utils.process_allgather(np.int32(index)).tolist()
    assert gathered == list(range(count))
print("left")
"""


def run(port, what, count=2, frozen=()):
  """Codes and what was said, but of those that are frozen."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", SCRIPT, f"localhost:{port}", str(index), str(count), what],
      cwd=pathlib.Path(__file__).parents[1],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(count)
  ]
  heard = [process for index, process in enumerate(processes) if index not in frozen]
  try:
    said = [process.communicate(timeout=180)[0] for process in heard]
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  return [process.returncode for process in heard], said


def test_processes_leave_together_and_only_the_first_says_so(port):
  codes, said = run(port, "nothing")
  assert codes == [0, 0], said
  assert "Together: processes 0 (" in said[0]
  assert "Together" not in said[1]
  assert all(text.endswith("left\n") for text in said)


def test_an_error_in_one_process_ends_the_others_in_its_name(port):
  codes, said = run(port, "fail")
  assert codes == [1, 1], said
  assert said[1].endswith("OSError: No space left on the device of this host\n")
  last = said[0].splitlines()[-1]
  message = "ended in OSError: No space left on the device of this host. Process 0 ends"
  assert last.startswith(f"Error: Process 1 on {socket.gethostname()} {message}")
  assert "Traceback" not in said[0]


def test_processes_that_differ_all_say_in_what(port):
  codes, said = run(port, "differ")
  assert codes == [1, 1], said
  for text in said:
    assert "do not have the same seed: 3 in process 0, 4 in process 1." in text


def test_the_field_of_a_config_in_which_processes_differ_is_said_alone(port):
  codes, said = run(port, "config")
  assert codes == [1, 1], said
  for text in said:
    assert "not have the same config: a.b: 0 in process 0, 1 in process 1. G" in text


def test_a_frozen_process_ends_the_others_in_its_name(port):
  codes, said = run(port, "freeze", count=3, frozen=[1])
  assert codes == [1, 1], said
  named = f"Process 1 on {socket.gethostname()} has not answered for 6 s: it is frozen"
  for index, text in zip((0, 2), said, strict=True):
    assert f"Error: {named}" in text
    assert f"Process {index} ends too" in text
    assert "Traceback" not in text
