"""What a judge may cost, kept by all threads together."""

import threading


class LimitReached(Exception):
  """No more may be asked; the message says why."""


class Budget:
  """Requests and money that are spent.

  A request takes its place before it is sent, and settles it afterwards. That the limit
  holds with several on their way, each of them is expected to cost what the dearest so
  far has; until one is known, they go one by one.

  Args:
    most_requests: None for any number; attempts that fail count, too.
    most_cost: in the prices' currency; None for any.
    prices: of a million tokens, of input and of output; None if they are not known.
  """

  def __init__(
    self,
    most_requests: int | None = None,
    most_cost: float | None = None,
    prices: tuple[float, float] | None = None,
  ):
    if most_cost is not None and prices is None:
      raise ValueError(
        f"--max_cost={most_cost:g} needs --prices=INPUT,OUTPUT of a million tokens."
      )
    self.requests = 0
    self.input_tokens = 0
    self.output_tokens = 0
    self._most_requests, self._most_cost = most_requests, most_cost
    self._prices = prices
    self._on_their_way = 0
    self._dearest: float | None = None
    self._changed = threading.Condition()

  @property
  def cost(self) -> float | None:
    """What was spent; None without prices."""
    if self._prices is None:
      return None
    return self._cost_of(self.input_tokens, self.output_tokens)

  def take(self) -> None:
    """Makes place for one request.

    Raises:
      LimitReached: it would go beyond a limit.
    """
    with self._changed:
      if self._most_cost is not None:
        while self._on_their_way and self._dearest is None:
          self._changed.wait()
        spent = self.cost or 0.0
        expected = spent + (self._on_their_way + 1) * (self._dearest or 0.0)
        if spent >= self._most_cost or expected > self._most_cost:
          raise LimitReached(
            f"--max_cost={self._most_cost:g}: {spent:.4g} are spent, and the dearest "
            f"request took {self._dearest or 0:.4g}."
          )
      if self._most_requests is not None and self.requests >= self._most_requests:
        raise LimitReached(f"--max_requests={self._most_requests} are sent.")
      self.requests += 1
      self._on_their_way += 1

  def settle(self, usage: tuple[int, int] | None) -> None:
    """Ends a request.

    Args:
      usage: tokens of input and output; None if it failed, and nothing was paid.
    """
    with self._changed:
      self._on_their_way -= 1
      if usage is not None:
        self.input_tokens += usage[0]
        self.output_tokens += usage[1]
        if self._prices is not None:
          self._dearest = max(self._dearest or 0.0, self._cost_of(*usage))
      self._changed.notify_all()

  def check_usage(self, usage: tuple[int, int] | None) -> None:
    """Refuses to go on without knowing the cost.

    Raises:
      ValueError: there is a limit of cost, and an answer did not say its tokens.
    """
    if self._most_cost is not None and usage is None:
      raise ValueError(
        "The endpoint does not say how many tokens an answer took, so --max_cost "
        "cannot be held: give --max_requests in place of it."
      )

  def _cost_of(self, input_tokens: int, output_tokens: int) -> float:
    assert self._prices is not None
    price_in, price_out = self._prices
    return (input_tokens * price_in + output_tokens * price_out) / 1e6
