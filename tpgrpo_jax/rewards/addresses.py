"""The addresses of servers, as a config or a command line gives them."""

from collections.abc import Sequence
import ipaddress
import re
from typing import Any
from urllib import parse
import warnings


def check_urls(url: Any, field: str = "url") -> list[str]:
  """The addresses, one or a list of them, without a slash at their end.

  Raises:
    ValueError: none, one twice, or one that is no http:// or https:// address.
  """
  if not isinstance(url, str | list | tuple):
    raise ValueError(
      f"{field}={url!r}: must be an address or a list of them. Use 'http://localhost:8090'."
    )
  urls = [url] if isinstance(url, str) else list(url)
  if not urls:
    raise ValueError(f"{field}={url!r}: names no server. Use 'http://localhost:8090'.")
  for each in urls:
    _check_url(each, field)
  urls = [each.rstrip("/") for each in urls]
  if len(set(urls)) < len(urls):
    raise ValueError(f"{field}={urls}: has a server twice. Name each once.")
  return urls


def warn_of_open_roads(urls: Sequence[str]) -> None:
  """Warns of addresses of other machines to which a token would travel unencrypted."""
  for url in urls:
    parts = parse.urlsplit(url)
    try:
      near = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
      near = parts.hostname == "localhost"
    if parts.scheme == "http" and not near:
      warnings.warn(
        f"url={url!r}: the token travels unencrypted. Use https, or a tunnel (ssh -L).",
        stacklevel=4,
      )


def _check_url(url, field):
  if not isinstance(url, str) or "://" not in url:
    host = re.sub(r"^\w+:/+", "", url) if isinstance(url, str) else ""  # http:/localhost
    advised = f"http://{host or 'localhost:8090'}"
    raise ValueError(f"{field}={url!r}: must begin with http:// or https://. Use {advised!r}.")
  if re.search(r"[\s\x00-\x1f\x7f]", url):
    raise ValueError(f"{field}={url!r}: is no address (a space or a line end in it). Leave it out.")
  try:
    parts = parse.urlsplit(url)
    parts.port  # noqa: B018  (raises)
  except ValueError as error:
    raise ValueError(f"{field}={url!r}: is no address ({error}).") from error
  if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
    raise ValueError(
      f"{field}={url!r}: must be http:// or https://, a host and a port. Use 'http://localhost:8090'."
    )
  if parts.username or parts.password:
    raise ValueError(f"{field}: has a password in it. Put a token in a file, and set token_file.")
