"""Websites of one page: its files, and headers that let nothing else in."""

import importlib.resources

_TYPES = {
  "page.html": "text/html",
  "page.js": "text/javascript",
  "page.css": "text/css",
}


def read(package: str, name: str) -> tuple[bytes, str]:
  """Content and media type of a file in a package's folder `static`.

  Args:
    name: page.html, page.js or page.css.
  """
  content = (importlib.resources.files(package) / "static" / name).read_bytes()
  return content, _TYPES[name]


def headers(images: str) -> dict[str, str]:
  """Headers by which a browser runs, shows and asks for nothing of anybody else's.

  Args:
    images: where images may come from, in the words of a content security policy.
  """
  return {
    "content-security-policy": "default-src 'none'; script-src 'self'; "
    f"style-src 'self'; img-src {images}; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # an address may have a token in it
    "cache-control": "no-store",
  }
