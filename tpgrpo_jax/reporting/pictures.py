"""The pictures of a run as HTML: each prompt before and after, with score and reading under each picture."""

import base64
from collections.abc import Mapping, Sequence
import html
import io
from typing import Any

from PIL import Image

from tpgrpo_jax.reporting import history

LARGEST = 256  # pixels of a side that a page shows of a picture


def embed(content: bytes, alt: str, kind: str = "png") -> str:
  """An <img> that holds its own bytes."""
  data = base64.b64encode(content).decode()
  return f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}">'


def render_samples(groups: Mapping[str, Sequence[history.Run]]) -> str:
  """Pictures of the first and the last evaluation of each label's first run; "" where there are none."""
  parts = []
  for label, runs in groups.items():
    grids = history.sample_grids(runs[0])
    if not grids:
      continue
    seed = runs[0].config.seed
    parts.append(f"<h3>{html.escape(label)}, seed {seed}: {_span(grids)}</h3>")
    said = all(grid.said for grid in grids)
    parts.append(_cards(grids) if said else _sheets(grids))
  return "\n".join(parts)


def _when(grid):
  return "before training" if grid.epoch == 0 else f"after epoch {grid.epoch}"


def _span(grids):
  return ", and ".join(_when(grid) for grid in grids)


def _sheets(grids):
  """Whole sheets, of runs that have not kept what was said of each picture."""
  note = "<p>This run has kept no scores and readings of single pictures.</p>"
  figures = "".join(
    f'<figure class="sheet">{embed(grid.path.read_bytes(), _when(grid))}'
    f"<figcaption>{_when(grid)}</figcaption></figure>"
    for grid in grids
  )
  return f'{note}<div class="sheets">{figures}</div>'


def _cards(grids):
  """One card a prompt, with the picture of each evaluation in it."""
  columns = [_cells(grid) for grid in grids]
  cards = []
  for i, prompt in enumerate(grids[0].said["prompts"]):
    shown = [cells[i] for cells in columns if i < len(cells) and cells[i][0] == prompt]
    pictures = "".join(content for _, content in shown)
    cards.append(
      f'<figure class="card"><figcaption>{html.escape(prompt)}</figcaption>'
      f'<div class="pair">{pictures}</div></figure>'
    )
  return f'<div class="cards">{"".join(cards)}</div>'


def _cells(grid: history.Grid) -> list[tuple[str, str]]:
  """(prompt, HTML) of each picture of a sheet."""
  said, cells = grid.said, []
  with grid.path.open("rb") as file, Image.open(file) as opened:
    sheet = opened.convert("RGB")
  for i, (box, prompt) in enumerate(zip(said["boxes"], said["prompts"])):
    content, kind = _encode(sheet.crop(box))
    lines = [_when(grid), *_captions(said, i)]
    under = "".join(f"<span>{html.escape(line)}</span>" for line in lines)
    cells.append((prompt, f"<div>{embed(content, f'{prompt}, {_when(grid)}', kind)}{under}</div>"))
  return cells


def _captions(said: dict[str, Any], i: int) -> list[str]:
  """The scores of picture i, and what the rewards have read in it."""
  lines = []
  for label, scores in said["scores"].items():
    lines.append(f"{label} {scores[i]:.3g}")
    if label in said["readings"]:
      read = said["readings"][label][i]
      lines.append(f"reads “{read}”" if read else "reads nothing")
  return lines


def _encode(image) -> tuple[bytes, str]:
  """(bytes, kind): small pictures as they are, large ones smaller and with some loss."""
  content = io.BytesIO()
  if max(image.size) <= LARGEST:
    image.save(content, "PNG", optimize=True)
    return content.getvalue(), "png"
  image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
  image.save(content, "JPEG", quality=88)
  return content.getvalue(), "jpeg"
