"""The parts of a multipart/form-data body."""

from collections.abc import Callable


def split(
  body: bytes, content_type: str, check_count: Callable[[int], None]
) -> list[tuple[bytes, bytes]]:
  """(name, content) of each part, in order.

  Args:
    body: of the form.
    content_type: its header, with the boundary.
    check_count: is told after each part how many there are, and raises for too many.

  Raises:
    Exception: the parser's own, where it is no form; what `check_count` raises.
  """
  from python_multipart import multipart

  boundary = multipart.parse_options_header(content_type)[1].get(b"boundary", b"")
  headers: dict[bytes, bytes] = {}
  field, value, content = bytearray(), bytearray(), bytearray()
  parts: list[tuple[bytes, bytes]] = []

  def end_header():
    headers[bytes(field).lower()] = bytes(value)
    field.clear()
    value.clear()

  def end_part():
    options = multipart.parse_options_header(headers.get(b"content-disposition"))[1]
    parts.append((options.get(b"name", b""), bytes(content)))
    headers.clear()
    content.clear()
    check_count(len(parts))

  collect = lambda buffer: lambda data, start, end: buffer.extend(data[start:end])
  parser = multipart.MultipartParser(
    boundary,
    {
      "on_header_field": collect(field),
      "on_header_value": collect(value),
      "on_header_end": end_header,
      "on_part_data": collect(content),
      "on_part_end": end_part,
    },
  )
  parser.write(body)
  parser.finalize()
  return parts
