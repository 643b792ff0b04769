"""Who may ask a server: bearer tokens, and pages of other sites that may not.

A server without tokens answers whoever reaches it, which on a machine of one's own a
page in the browser does too. So it takes no request that another site's page has made,
and none that came by a name which such a page has pointed here.
"""

import dataclasses
import hashlib
import hmac
import ipaddress
import pathlib
import urllib.parse

from starlette.requests import Request

from pixsigma_jax.serve.fields import Refusal

_LEAST_TOKEN = 16  # characters
_OPEN = ("/", "/page.js", "/page.css", "/health/live", "/health/ready")


@dataclasses.dataclass(frozen=True)
class Access:
  """Tokens, one of which each request has to bear.

  Attributes:
    tokens: their SHA-256; none lets everybody in.
    any_host: without tokens, also take requests by another name than localhost.
  """

  tokens: tuple[bytes, ...] = ()
  any_host: bool = False

  @classmethod
  def read(cls, path: pathlib.Path) -> "Access":
    """Tokens of a file, one a line; lines that begin with # say something else.

    Raises:
      OSError: the file cannot be read.
      ValueError: it has no token, or one that is short or has other characters.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    tokens = [line.strip() for line in lines if line.strip()[:1] not in ("", "#")]
    if not tokens:
      raise ValueError(f"{path} has no token in it: write one on each line.")
    for number, token in enumerate(tokens, 1):
      if len(token) < _LEAST_TOKEN or not token.isascii() or " " in token:
        raise ValueError(
          f"Token {number} of {path} must have {_LEAST_TOKEN} characters or more, of "
          "ASCII and no spaces: python -c 'import secrets; "
          "print(secrets.token_urlsafe())' makes one."
        )
    return cls(tuple(map(_hashed, tokens)))

  def refusal(self, request: Request) -> Refusal | None:
    """Why a request is not answered; None if it is."""
    host, origin = (request.headers.get(name) for name in ("host", "origin"))
    if origin is not None and urllib.parse.urlsplit(origin).netloc != host:
      return Refusal(
        403, "Pages of other sites may not ask here.", code="foreign_origin"
      )
    if not self.tokens:
      if self.any_host or is_loopback(urllib.parse.urlsplit(f"//{host}").hostname):
        return None
      return Refusal(
        403,
        "Without tokens this server answers to localhost alone: see --tokens and "
        "--allow_anonymous.",
        code="foreign_host",
      )
    if request.url.path in _OPEN or self._knows(request):
      return None
    return Refusal(
      401,
      "A token is needed here, and this request bears none that is known: give it as "
      "api_key, or in the header Authorization: Bearer TOKEN.",
      code="invalid_api_key",
      headers={"www-authenticate": "Bearer"},
    )

  def _knows(self, request: Request) -> bool:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    given = _hashed(token.strip())
    known = [hmac.compare_digest(given, each) for each in self.tokens]
    return kind.lower() == "bearer" and any(known)


def is_loopback(host: str | None) -> bool:
  """Whether an address or a name is this machine's own, for itself alone."""
  if host is None or host == "localhost":
    return host is not None
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _hashed(token: str) -> bytes:
  return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
