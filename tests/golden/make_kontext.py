"""Writes kontext.npz: what diffusers' FluxKontextPipeline makes of the small FLUX.1 of pipeline.npz, whose
weights it takes over: its model_index.json, the latents of two pictures to edit, and the images that it
paints from given initial latents.

Needs torch and diffusers (the "parity" extra): python tests/golden/make_kontext.py
"""

import pathlib
import tempfile

import diffusers
from make_pipeline import CHANNELS, HEIGHT, LENGTHS, NUM_STEPS, PROMPTS, WIDTH_PIXELS, draw_latents
import numpy as np
from PIL import Image
import torch

GUIDANCE = (2.5, 1.0)
SIZES = (
  (HEIGHT, WIDTH_PIXELS),
  (100, 70),
)  # the first as the painted images; the other is stretched


def draw_pictures():
  """Two pictures, uint8 [H, W, 3], of coloured waves."""
  pictures = []
  for n, (height, width) in enumerate(SIZES):
    rows, columns = np.mgrid[:height, :width] / 9
    waves = [np.sin(rows * (n + 1) + c) * np.cos(columns - c * n) for c in range(3)]
    pictures.append(np.uint8(127.5 + 127.5 * np.stack(waves, axis=-1)))
  return pictures


def open_pipeline(folder):
  """The FLUX.1 of pipeline.npz as a FluxKontextPipeline."""
  with np.load(pathlib.Path(__file__).with_name("pipeline.npz")) as file:
    for key in (key for key in file.files if key.startswith("flux/files/")):
      path = pathlib.Path(folder, key.removeprefix("flux/files/"))
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(file[key].tobytes())
  pipe = diffusers.FluxKontextPipeline(**diffusers.FluxPipeline.from_pretrained(folder).components)
  pipe.set_progress_bar_config(disable=True)
  return pipe


def paint(pipe, pictures, latents, guidance):
  """Images [N, H, W, 3] in [0, 1] of edited pictures from initial latents [N, h, w, c]."""
  x = torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 3, 1, 2)))
  x = pipe._pack_latents(x, len(x), CHANNELS, *x.shape[2:])
  return pipe(
    image=pictures, prompt=list(PROMPTS), latents=x, height=HEIGHT, width=WIDTH_PIXELS, output_type="np",
    num_inference_steps=NUM_STEPS, guidance_scale=guidance, max_sequence_length=LENGTHS["flux"],
    max_area=HEIGHT * WIDTH_PIXELS, _auto_resize=False,
  ).images  # fmt: skip


def main():
  drawn = draw_pictures()
  pictures = [Image.fromarray(pixels) for pixels in drawn]
  arrays = {f"picture_{n}": pixels for n, pixels in enumerate(drawn)}
  latents = draw_latents()
  with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as saved:
    pipe = open_pipeline(folder)
    pipe.save_pretrained(saved)
    index = pathlib.Path(saved, "model_index.json").read_bytes()
    arrays["model_index"] = np.frombuffer(index, np.uint8)
    with torch.no_grad():
      seen = pipe.image_processor.preprocess(pictures, HEIGHT, WIDTH_PIXELS)
      encoded = pipe._encode_vae_image(seen, None)
    arrays["encoded"] = encoded.numpy().transpose(0, 2, 3, 1)
    for scale in GUIDANCE:
      images = paint(pipe, pictures, latents, scale)
      print(scale, images.mean(), images.std(), images.min(), images.max())
      arrays[f"images/{scale}"] = images.astype(np.float32)
    arrays["images/swapped"] = paint(pipe, [pictures[0]] * 2, latents, GUIDANCE[0])
  script = pathlib.Path(__file__)
  versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
  np.savez_compressed(
    script.with_name("kontext.npz"), script=script.read_text(), versions=versions, **arrays
  )


if __name__ == "__main__":
  main()
