"""The small pipelines of prompt_embedding.npz as folders, and how near an embedding must be to theirs."""

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
# Float32 sums over widths of 8 to 32, in another order than torch's, through two blocks.
TOLERANCE = 1e-5
LENGTHS = {"sd3": 20, "flux": 24}  # T5 tokens of the stored embeddings


def write_pipeline(golden, family, folder):
  """The folder of a pipeline's text encoders and tokenizers, file by file as diffusers saved it."""
  prefix = f"{family}/files/"
  for key in (key for key in golden.files if key.startswith(prefix)):
    path = folder / key.removeprefix(prefix)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(golden[key].tobytes())
  return folder


def assert_equal(found, text, pooled, tolerance=TOLERANCE):
  """Fails unless a Condition of NumPy arrays is within `tolerance` of the largest wanted value."""
  for name, wanted in (("text", text), ("pooled", pooled)):
    array = getattr(found, name)
    assert isinstance(array, np.ndarray) and array.shape == wanted.shape
    error = np.abs(array.astype(np.float32) - wanted).max() / np.abs(wanted).max()
    assert error < tolerance, name
