"""What a library's error is about: the memory, the system, or what was to be read.

Libraries raise one type for all three, and to be told that a sound file is damaged
makes somebody delete it.
"""

import re

# As XLA, torch, TensorStore and the system put it.
_OF_MEMORY = re.compile(
  r"(cannot|can't|unable to) allocate|out of memory", re.IGNORECASE
)


def of_memory(error: BaseException) -> bool:
  """Whether there was too little memory, on the host or on a device."""
  if isinstance(error, MemoryError):
    return True
  kinds = OSError | RuntimeError | ValueError
  return isinstance(error, kinds) and bool(_OF_MEMORY.search(str(error)))


def of_system(error: BaseException) -> bool:
  """Whether a file system or a network has refused something.

  Libraries raise a bare OSError, without a number, for content that they cannot read.
  """
  if not isinstance(error, OSError):
    return False
  return error.errno is not None or type(error) is not OSError


def of_absence(error: ImportError, module: str) -> bool:
  """Whether a module is not installed; one that is may be broken, and says how."""
  return isinstance(error, ModuleNotFoundError) and error.name == module


def of_content(error: BaseException) -> bool:
  """Whether what was read is to blame, and neither the memory nor the system."""
  return not of_memory(error) and not of_system(error)


def first_line(error: BaseException) -> str:
  """First line of what an error says; its type if it says nothing."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
