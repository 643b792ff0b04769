"""How far a run is: plain lines without a terminal, a bar with one."""

import io
import sys

import pytest
from absl import logging

from pixsigma_jax.train import progress

VALUES = {
  "loss": 0.12345,
  "learning_rate": 2e-5,
  "images_per_second": 1234.5,
  "data_share": 0.015,
  "norm/gradients": 0.5,
  "norm/params": 3.0,
  "images_seen": 60,
  "epochs": 1.25,
}


@pytest.fixture
def lines(monkeypatch):
  said = []
  monkeypatch.setattr(logging, "info", lambda text, *args: said.append(text % args))
  return said


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_line_has_step_total_metrics_and_the_time_left(lines, clock, monkeypatch):
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  bar = progress.Progress(40, 100)
  bar.advance(41)
  clock[0] += 1000.0  # the first step, with all that it waits for: it says nothing
  bar.advance(42)
  clock[0] += 18.0  # for nine steps: the other fifty will take a hundred seconds
  bar.advance(50)
  assert lines == []
  bar.report(50, VALUES)
  bar.close()
  assert lines == [
    "step 50/100  loss 0.123  norm/gradients 0.5  learning_rate 2e-05  "
    "images_per_second 1.23e+03  data_share 0.015  images_seen 60  epochs 1.25  "
    "eta 01:40"
  ]


def test_the_time_left_is_not_guessed_from_the_first_step(lines, clock, monkeypatch):
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  bar = progress.Progress(0, 3)
  for step in (1, 2, 3):
    bar.advance(step)
    clock[0] += 60.0 if step == 1 else 2.0
    bar.report(step, {})
  bar.go_back(1)  # rolled back
  bar.advance(2)
  clock[0] += 60.0
  bar.report(2, {})
  assert [line.split("eta ")[1] for line in lines] == ["?", "00:02", "00:00", "?"]


def test_a_terminal_has_a_bar_and_no_lines(lines, monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  bar = progress.Progress(40, 100)
  bar.advance(45)
  bar.report(50, VALUES)
  bar.close()
  assert lines == []
  last = terminal.getvalue().split("\r")[-1]
  assert "50/100" in last
  assert "loss=0.123" in last
