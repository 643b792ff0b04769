"""The house itself: linters, types, imports, packaging, and what may not be in it."""

import ast
import itertools
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = pathlib.Path(sysconfig.get_path("scripts"))
PACKAGE = sorted((ROOT / "pixsigma_jax").rglob("*.py"))
COMMANDS = [
  *("train", "sample", "evaluate", "prepare", "convert", "curate", "transform"),
  *("demo", "plan", "reproduce", "serve"),
]

LINTERS = {
  "ruff check": ["ruff", "check"],
  "ruff format": ["ruff", "format", "--check"],
  "pyright": ["pyright", "--pythonpath", sys.executable],
  "import-linter": ["lint-imports", "--no-cache"],
  "codespell": ["codespell"],
}


def is_ours(folder):
  return folder == ".ci" or not (
    folder in {"runs", "__pycache__", "build", "dist"}
    or folder.startswith(".")
    or folder.endswith(".egg-info")
  )


def project_files():
  """Every text file of the project: what lies here, less caches, runs and builds."""
  # Walked, not asked of git: a copy of the tree is held to the same rules.
  for folder, folders, names in os.walk(ROOT):
    folders[:] = filter(is_ours, folders)
    paths = [pathlib.Path(folder, name) for name in names]
    yield from (path for path in paths if b"\0" not in path.read_bytes()[:4096])


def relative(path):
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize("linter", LINTERS)
def test_is_clean_under(linter):
  tool, *arguments = LINTERS[linter]
  if tool == "codespell":
    arguments = [relative(path) for path in project_files() if path.name != "LICENSE"]
  done = subprocess.run(
    [SCRIPTS / tool, *arguments],
    cwd=ROOT,
    # pyright would ask the network for a newer version of itself.
    env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_a_file_opens_with_what_it_is_about(path):
  assert ast.get_docstring(ast.parse(path.read_text()))


def test_nothing_is_kept_in_an_attic():
  attics = {"utils", "util", "helpers", "misc", "common_utils"}
  assert [relative(path) for path in project_files() if path.stem in attics] == []


@pytest.mark.parametrize(
  "room",
  [path.parent for path in PACKAGE if path.match("pixsigma_jax/*/__init__.py")],
  ids=relative,
)
def test_a_room_that_is_a_command_can_be_run(room):
  assert (room / "__main__.py").is_file() == (room.name in COMMANDS)


def test_importing_the_package_brings_neither_torch_nor_tensorflow():
  modules = [
    relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for path in PACKAGE
    if path.stem != "__main__"  # they import the others, and define flags
  ]
  code = (
    f"import sys, {', '.join(modules)}\n"
    "heavy = {'torch', 'diffusers', 'tensorflow', 'clu'}\n"
    "print(sorted(heavy & set(sys.modules)))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def requirement_lines():
  text = (ROOT / "requirements.txt").read_text()
  lines = [line.partition("#")[0].strip() for line in text.splitlines()]
  return [line for line in lines if line]


def pyproject():
  return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_dependencies_have_a_lower_bound_and_one_exact_version():
  settings = pyproject()
  assert "dependencies" in settings["project"]["dynamic"]
  assert settings["tool"]["setuptools"]["dynamic"]["dependencies"] == {
    "file": ["requirements.txt"]
  }
  extras = settings["project"]["optional-dependencies"]
  wanted = [
    Requirement(line)
    for line in [*requirement_lines(), *itertools.chain(*extras.values())]
    if not line.startswith("pixsigma-jax[")
  ]
  # Whoever installs the package beside others gets at least what was tested.
  open_ended = [each for each in wanted if not each.extras]
  assert [str(each) for each in open_ended if str(each.specifier)[:2] != ">="] == []
  for line in lines_of_python():
    exact = pins(re.match(r"3\.\d+", line["tested with"])[0])
    for each in wanted:
      if each.marker is None or each.marker.evaluate(python_of(line)):
        assert each.specifier.contains(exact[canonicalize_name(each.name)]), each


def python_of(line):
  full = re.match(r"3\.\d+\.\d+", line["tested with"])[0]
  return {
    "python_version": full.rpartition(".")[0],
    "python_full_version": full,
    "sys_platform": "linux",
  }


def pins(python):
  """Name → exact version that constraints.txt has for a version of Python."""
  lines = (ROOT / "constraints.txt").read_text().splitlines()
  wanted = [Requirement(line) for line in lines if not line.startswith("#")]
  on = {
    "python_version": python,
    "python_full_version": f"{python}.9",
    "sys_platform": "linux",
  }
  found = [
    (each.name, str(each.specifier).removeprefix("=="))
    for each in wanted
    if each.marker is None or each.marker.evaluate(on)
  ]
  assert len(dict(found)) == len(found)  # none twice
  return dict(found)


def lines_of_python():
  """The lines of Python and JAX that CONTRIBUTING.md says were tested."""
  lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
  rows = [
    list(map(str.strip, line.strip("|").split("|"))) for line in lines if "|" in line
  ]
  [head] = [row for row in rows if row[0] == "Python"]
  return [
    dict(zip(head, row, strict=True)) for row in rows if re.match(r"3\.\d", row[0])
  ]


def test_what_is_pinned_for_a_python_is_what_was_tested_on_it():
  first, *later = lines_of_python()
  assert first["Python"] == pyproject()["project"]["requires-python"].strip(">=")
  for row in (first, *later):
    on = re.match(r"(3\.\d+)\.\d+, libtpu [\d.]+$", row["tested with"])[1]
    lowest = re.match(r"3\.\d+", row["Python"])[0]
    for python in {on, lowest}:
      have = {name: pins(python)[name] for name in ("jax", "flax")}
      assert have == {name: row[name] for name in have}, python
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", row["on"])
    assert "passed" in row["result"]


def test_the_suite_runs_with_what_is_pinned():
  exact = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
  # torch's build for CPUs is the same version, and says +cpu.
  have = {
    canonicalize_name(each.metadata["Name"]): each.version.partition("+")[0]
    for each in metadata.distributions()
  }
  assert {name: have[name] for name in exact.keys() & have.keys()} == {
    name: exact[name] for name in exact.keys() & have.keys()
  }
  missing = {canonicalize_name(Requirement(line).name) for line in requirement_lines()}
  assert missing - have.keys() == set()


def test_what_the_package_imports_is_a_declared_dependency():
  # The extra of a room goes for that room alone: import-linter sees to it.
  extras = pyproject()["project"]["optional-dependencies"]
  rooms = ("convert", "curate", "demo", "eval", "heif", "int8", "openmoji", "serve")
  lines = requirement_lines()
  lines += [pin for room in (*rooms, "wandb") for pin in extras[room]]
  declared = {distribution_name(line) for line in lines}
  owners = metadata.packages_distributions()
  undeclared = {
    (relative(path), module)
    for path in PACKAGE
    for module in third_party_imports(path)
    if not declared & {distribution_name(owner) for owner in owners.get(module, [])}
  }
  assert undeclared == set()


def distribution_name(requirement):
  return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def third_party_imports(path):
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name.partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
      names.add(node.module.partition(".")[0])
  return names - sys.stdlib_module_names - {"pixsigma_jax", "configs"}


def test_no_file_knows_the_machine_it_was_written_on():
  # Homes and workplaces, package registries, folders beside the repository.
  forbidden = re.compile(
    r"(?<![\w.>-])/(?:home|Users|root|work)/\w"
    r"|pypi\.org|pythonhosted\.org|registry\.npmjs\.org|index[-_]url|find[-]links"
    r"|\.\./shared\b"
  )
  found = [
    f"{relative(path)}:{number}: {line.strip()}"
    for path in project_files()
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if forbidden.search(line)
  ]
  assert found == []
