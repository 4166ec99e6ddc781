"""The secret that a reward server and those who may ask it share."""

import hmac
import os
import pathlib
import stat
import warnings


def read_token(path: str | os.PathLike[str], field: str = "token_file") -> str:
  """The secret in a file, which both ends are given; warns where others can read or change it.

  Raises:
    ValueError: no such file, an empty one, or one of several lines.
  """
  file = pathlib.Path(path).expanduser()
  try:
    token = file.read_text(encoding="ascii").strip()
    mode = file.stat().st_mode
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{field}={str(path)!r}: must be a file with a token ({error}). Make one: "
      "python -c 'import secrets; print(secrets.token_hex(32))' > FILE; chmod 600 FILE"
    ) from error
  if len(token) < 16 or not token.isprintable() or " " in token:
    raise ValueError(
      f"{field}={str(path)!r}: must hold one token of 16 characters or more and no spaces. Make one: "
      "python -c 'import secrets; print(secrets.token_hex(32))' > FILE; chmod 600 FILE"
    )
  reads, writes = (stat.S_IRGRP | stat.S_IROTH), (stat.S_IWGRP | stat.S_IWOTH)
  can = " and ".join(what for what, bits in (("read", reads), ("change", writes)) if mode & bits)
  if can:
    warnings.warn(
      f"{field}={str(path)!r}: other users of this machine can {can} it. Run: chmod 600 {file}",
      stacklevel=2,
    )
  return token


def bearer(token: str) -> dict[str, str]:
  """The header that carries it; none without a token."""
  return {"Authorization": f"Bearer {token}"} if token else {}


def is_authorized(header: str | None, token: str) -> bool:
  """Whether the header carries the token; in a time that does not tell how much of it was right.

  The scheme may be written "bearer" too (RFC 9110, 11.1).
  """
  scheme, _, given = (header or "").partition(" ")
  same = hmac.compare_digest(given.encode("latin1", "replace"), token.encode("latin1"))
  return not token or (same and scheme.lower() == "bearer")
