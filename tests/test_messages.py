"""What the package tells its users to do: that it can be done, in words that fit."""

import ast
import functools
import importlib.util
import itertools
import pathlib
import re
import tomllib

import pytest

from pixsigma_jax import disk, wording
from pixsigma_jax.models.hashed_words import HashedWordEncoder
from pixsigma_jax.sample.encoders import RememberedCaptions
from pixsigma_jax.sample.settings import SETTINGS

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "pixsigma_jax").rglob("*.py"))
PAGES = [
  path
  for pattern in ("*.md", "docs/*.md", "notebooks/*.ipynb", "benchmarks/*.py")
  for path in ROOT.glob(pattern)
]
with open(ROOT / "pyproject.toml", "rb") as file:
  EXTRAS = set(tomllib.load(file)["project"]["optional-dependencies"])


@functools.cache
def parsed(path):
  return ast.parse(path.read_text(encoding="utf-8"))


def texts(node):
  """Literal text in a syntax tree; what is filled in is left a blank."""
  for part in ast.walk(node):
    if isinstance(part, ast.JoinedStr):
      parts = [x.value if isinstance(x, ast.Constant) else "\0" for x in part.values]
      yield "".join(map(str, parts))
    elif isinstance(part, ast.Constant) and isinstance(part.value, str):
      yield part.value


def messages():
  """Every text of a raise and of a warning, with its place."""
  for path in FILES:
    for node in ast.walk(parsed(path)):
      is_log = isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "logging.info",
        "logging.warning",
        "logging.error",
      )
      if is_log or isinstance(node, ast.Raise):
        for text in texts(node):
          yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def calls(name):
  for path in FILES:
    for node in ast.walk(parsed(path)):
      if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
        yield path, node


def test_whatever_is_to_be_installed_is_an_extra_of_this_repository():
  asked = {ast.literal_eval(node.args[0]) for _, node in calls("install")}
  assert asked
  assert asked <= EXTRAS
  own = re.compile(r'pip install -e "\.\[(\w+(?:,\w+)*)\]"')
  others = re.compile(r"pip install (-U )?(spacy|nltk|paddleocr)\b")
  for path in FILES:
    for text in texts(parsed(path)):
      for found in re.finditer("pip install", text):
        rest = text[found.start() :]
        assert path.name == "wording.py" or others.match(rest), (path, rest)
  assert set(own.search(wording.install("convert"))[1].split(",")) <= EXTRAS
  for path in PAGES:
    content = path.read_text(encoding="utf-8").replace('\\"', '"')
    for names in own.findall(content):
      assert set(names.split(",")) <= EXTRAS, path
    # No registry has the package.
    for found in re.finditer(r"pip install[^\n]*pixsigma.jax[^\n]*", content):
      assert "@ git+" in found[0], (path, found[0])


def test_every_flag_that_a_message_names_exists():
  defined = {
    found
    for path in FILES
    for node in ast.walk(parsed(path))
    if isinstance(node, ast.Call)
    and re.search(r"DEFINE_|\bOption$", ast.unparse(node.func))
    for found in itertools.islice(texts(node), 1)  # its name comes first
  }
  defined |= set(SETTINGS)  # `sample.setting_flags` makes a flag of each
  assert {"workdir", "frozen", "variant"} <= defined
  for place, text in messages():
    for name in re.findall(r"(?<![\w-])--([a-z]\w*)", text):
      assert name in defined or name.removeprefix("no") in defined, (place, name)


def test_every_step_of_curation_that_a_message_names_exists():
  # Parsed, as two commands cannot be imported: they have flags of one name.
  source = (ROOT / "pixsigma_jax" / "curate" / "__main__.py").read_text("utf-8")
  [table] = [
    node.value
    for node in ast.parse(source).body
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "_STEPS"
  ]
  steps = {ast.literal_eval(key) for key in table.keys}
  for place, text in messages():
    for step in re.findall(r"`curate ([\w-]+)", text):
      assert step in steps, (place, step)


def test_every_field_of_the_config_that_a_message_names_exists():
  path = ROOT / "configs" / "paper.py"
  spec = importlib.util.spec_from_file_location("paper", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  for place, text in messages():
    for name in re.findall(r"\bconfig\.([a-z_]\w*(?:\.[a-z_]\w*)*)", text):
      if name == "json":
        continue
      found = config
      for field in name.split("."):
        assert field in found, (place, name)
        found = found[field]


def test_no_message_shows_what_a_user_wrote_at_full_length():
  for path in FILES:
    for node in ast.walk(parsed(path)):
      if isinstance(node, ast.FormattedValue) and node.conversion == ord("r"):
        shown = ast.unparse(node.value)
        assert not re.search(r"(?<![a-z_])(prompt|caption|text|cut)(\[0\])?$", shown), (
          f"{path}:{node.lineno} shows {shown}: use wording.shortened"
        )


LONG = "a very long prompt " * 600


@pytest.mark.parametrize(
  "act",
  [
    lambda: HashedWordEncoder(width=8).encode([LONG], 10),
    lambda: RememberedCaptions.of(HashedWordEncoder(width=8), ["a"], 4).count(LONG),
  ],
)
def test_a_prompt_of_ten_thousand_letters_is_not_repeated(act):
  with pytest.raises(ValueError, match=r"'a very .*…' \(11,400 characters\)") as error:
    act()
  assert len(str(error.value)) < 400


def test_a_list_shows_its_beginning_and_how_much_there_is():
  assert wording.listed([]) == "nothing"
  assert wording.listed(["a", "b"], 2) == "a, b"
  assert wording.listed(["a", "b", "c"], 2, "; ") == "a; b; and 1 more"
  names = {f"layer_{i}": None for i in range(60_000)}
  assert wording.listed(names, 1) == "layer_0, and 59,999 more"
  assert wording.listed(["x" * 500]) == "x" * 120 + "… (500 characters)"


def test_a_text_is_shown_as_python_writes_it():
  assert wording.shortened("a 'cat'\n") == repr("a 'cat'\n")
  assert wording.shortened("x" * 80) == repr("x" * 80)
  assert wording.shortened("x" * 81) == f"'{'x' * 80}…' (81 characters)"


def test_room_is_not_what_a_deleted_directory_needs(tmp_path):
  assert disk.way_out(tmp_path, "--output").startswith("Make room there, see that")
  gone = tmp_path / "gone"
  advice = disk.way_out(gone, "--output")
  assert advice.startswith(f"{gone} is not there (any more): make it again, or choose")
  gone.mkdir()  # as it says
  assert disk.way_out(gone, "--output").startswith("Make room")
