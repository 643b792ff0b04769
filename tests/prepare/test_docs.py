"""What docs/curation.md, data.md and own_images.md tell to type does what they say."""

import pathlib
import re
import shlex

import pytest

from pixsigma_jax.curate.scan import scan
from tests.prepare import world
from tests.train import runs

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("curation", "data", "own_images")


def blocks(page, language):
  text = (ROOT / "docs" / f"{page}.md").read_text()
  return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


SNIPPETS = [(page, code) for page in PAGES for code in blocks(page, "python")]
COMMANDS = [
  shlex.split(line)
  for page in PAGES
  for block in blocks(page, "bash")
  for line in block.splitlines()
  if line.startswith("python -m pixsigma_jax.")
]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
  """runs/index and runs/quickstart/data/8px, as the pages speak of them."""
  root = tmp_path_factory.mktemp("docs")
  folder = world.make_folder(root / "photos")
  (folder / "broken.jpg").write_bytes(b"no image")
  scan(
    *(str(root / "runs" / "index"), str(folder)),
    **{"per_part": 4, "near_distance": 4, "beam_options": []},
  )
  runs.prepare(root / "runs/quickstart/data/8px")
  return root


@pytest.mark.parametrize(
  ("page", "code"), SNIPPETS, ids=lambda value: value[:9].strip()
)
def test_a_snippet_runs(page, code, there, monkeypatch, capsys):
  monkeypatch.chdir(there)
  exec(compile(code, f"{page}.md", "exec"), {"__name__": "snippet"})
  out = capsys.readouterr().out
  if page == "curation":
    assert out == f"{len(world.SIZES) + 1} ['not an image']\n"
  else:
    assert out.split()[0].isdigit()


def test_every_page_of_ours_has_been_looked_at():
  assert len(SNIPPETS) >= 3
  assert len(COMMANDS) >= 15


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_has_the_flags_that_it_is_given(command):
  room = command[2].removeprefix("pixsigma_jax.")
  source = "".join(
    path.read_text() for path in (ROOT / "pixsigma_jax" / room).glob("*.py")
  )
  defined = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
  given = {word[2:].partition("=")[0] for word in command if word.startswith("--")}
  own = {name for name in given if not name.startswith("config")}
  assert own <= defined, own - defined
