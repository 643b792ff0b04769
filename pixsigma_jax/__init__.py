"""PixArt-Σ in JAX and Flax: training, fine-tuning and sampling up to 4K."""

import sys
from typing import Any

__version__ = "0.1.0"


def _one_line_for_ctrl_c(kind: type[BaseException], error: Any, trace: Any) -> None:
  if issubclass(kind, KeyboardInterrupt):
    print("Interrupted: by Ctrl-C.", file=sys.stderr)
  else:
    sys.__excepthook__(kind, error, trace)


# A command spends seconds with imports before `command.run` has a say. While Python is
# looking for the module of `python -m`, it has this in place of the program's name.
if sys.argv[:1] == ["-m"] and sys.excepthook is sys.__excepthook__:
  sys.excepthook = _one_line_for_ctrl_c
