"""What docs/editing.md tells to type does what it says."""

import pathlib
import re
import shlex

import pytest

from tests import commands
from tests.sample import models

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "editing.md"


def blocks(language):
  text = PAGE.read_text(encoding="utf-8")
  return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("default")
def test_the_pages_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
  config = models.nano(base_size=8, caption_length=12)
  models.save_snapshot(tmp_path / "runs/quickstart/compressed", config, 3)
  monkeypatch.chdir(tmp_path)
  code = "".join(blocks("python"))
  exec(compile(code, PAGE.name, "exec"), {"__name__": "snippet"})
  assert capsys.readouterr().out.splitlines() == ["(24, 16)", "0", "(16, 16, 3)"]
  (line,) = blocks("bash")
  _, _, module, *arguments = shlex.split(line)
  assert module == "pixsigma_jax.sample"
  done = commands.run(capsys, monkeypatch, "sample", *arguments)
  assert done.code == 0, done.err
  assert (tmp_path / "pictures/00000.png").exists()
