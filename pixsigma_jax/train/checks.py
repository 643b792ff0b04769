"""Checks of single values of a config: what makes no sense is refused by name.

A check takes a value and returns what is wrong with it, as the end of a sentence that
begins with the field and its value, or None.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Check: TypeAlias = Callable[[Any], str | None]


def whole(least: int, *, below: int | None = None, way_out: str = "") -> Check:
  """A whole number of at least `least`, and below `below` if that is given.

  Args:
    way_out: what to give instead of a number that is too small.
  """

  def check(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
      return "must be a whole number"
    if int(value) < least:
      return f"must be at least {least}{way_out and f' ({way_out})'}"
    if below is not None and int(value) >= below:
      return f"must be below {below}"
    return None

  return check


def number(
  *,
  least: float | int | None = None,
  above: float | int | None = None,
  most: float | int | None = None,
  below: float | int | None = None,
  infinite: bool = False,
) -> Check:
  """A real number within bounds, with or without the bound itself.

  Args:
    infinite: whether infinity will do, as a limit that is never reached.
  """

  def check(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
      return "must be a number"
    given = float(value)
    if math.isnan(given) or (math.isinf(given) and not infinite):
      return "must be a number" if infinite else "must be a finite number"
    wrong = {
      f"at least {least}": least is not None and given < least,
      f"above {above}": above is not None and given <= above,
      f"at most {most}": most is not None and given > most,
      f"below {below}": below is not None and given >= below,
    }
    said = [bound for bound, broken in wrong.items() if broken]
    return f"must be {' and '.join(said)}" if said else None

  return check


def truth(value: Any) -> str | None:
  """True or False."""
  return None if isinstance(value, bool) else "must be True or False"


def text(value: Any) -> str | None:
  """A string, which may be empty."""
  return None if isinstance(value, str) else "must be text"


def one_of(*known: str) -> Check:
  """One of some names."""

  def check(value: Any) -> str | None:
    if isinstance(value, str) and value in known:
      return None
    return f"must be one of {', '.join(map(repr, known))}"

  return check


def none_or(check: Check) -> Check:
  """None, or what another check takes."""

  def either(value: Any) -> str | None:
    wrong = None if value is None else check(value)
    return wrong and f"{wrong}, or None"

  return either


def zero_or(check: Check) -> Check:
  """0, or what another check takes."""

  def either(value: Any) -> str | None:
    wrong = check(value)
    off = not isinstance(value, bool) and value == 0
    return None if off else wrong and f"{wrong}, or 0 for off"

  return either


def each(check: Check) -> Check:
  """A tuple or list, whose elements another check takes."""

  def all_of(value: Any) -> str | None:
    if not isinstance(value, tuple | list):
      return "must be a tuple"
    for element in value:
      if wrong := check(element):
        return f"must be a tuple of which each {wrong}, and {element!r} is none"
    return None

  return all_of


def pair(check: Check) -> Check:
  """A tuple of two, which another check takes."""

  def both(value: Any) -> str | None:
    wrong = each(check)(value)
    return "must be a pair" if wrong is None and len(value) != 2 else wrong

  return both


def factor_of_group(value: Any) -> str | None:
  """A regular expression, and a factor of the learning rate."""
  if not isinstance(value, tuple | list) or len(value) != 2:
    return "must be a pattern and a factor of at least 0"
  pattern, factor = value
  if text(pattern) or number(least=0)(factor):
    return "must be a pattern and a factor of at least 0"
  return None


def span(value: Any) -> str | None:
  """(first, last), or () for none."""
  wrong = each(whole(1))(value)
  if wrong is None and len(value) in (0, 2) and list(value) == sorted(value):
    return None
  return "must be (first step, last step), or () for none"


def named(value: Any) -> str | None:
  """A mapping with a name, and what belongs to it."""
  if isinstance(value, Mapping) and isinstance(value.get("name"), str):
    return None
  return "must be a dict with a name"


def complaints(
  fields: Mapping[str, Any], checks: Mapping[str, Check], section: str = ""
) -> list[str]:
  """Complaints about the values of a config, a clause for each field.

  Args:
    fields: a config, or a section of it; what has no check is passed over.
    checks: dotted name of a field → its check. A field that stands for a section, one
      that other names lie in, must be a mapping.
    section: dotted name of `fields`; "" for the whole config.
  """
  said = []
  for name, value in fields.items():
    dotted = f"{section}.{name}" if section else name
    if dotted in checks:
      if wrong := checks[dotted](value):
        said.append(f"config.{dotted}={value!r} {wrong}")
    elif any(known.startswith(f"{dotted}.") for known in checks):
      if isinstance(value, Mapping):
        said += complaints(value, checks, dotted)
      else:
        said.append(f"config.{dotted}={value!r} must be a section of fields")
  return said
