"""Each family of transformers: its classes here and in diffusers, small sizes, and how theirs is called.

A new family is a line of FAMILIES: the tests of test_families.py then ask of it what they ask of all.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import numpy as np

from tpgrpo_jax import models, types
from tpgrpo_jax.config import model_fields, tasks
from tpgrpo_jax.models import hf, lora

SIGMA = (0.3, 0.93)
TOKENS = 37


class Case(NamedTuple):
  """A family.

  Attributes:
    name: of diffusers' class.
    raw: small sizes, as its arguments and as config.json.
    targets: of adapters.
    evaluate: (diffusers' model, x [B, h, w, c], sigma, condition) -> velocity as torch has it, [B, h, w, c].
    size: (h, w) of the latents.
    fields: of the condition.
    guidance: a scale that the model is told.
  """

  name: str
  raw: dict[str, Any]
  targets: tuple[str, ...]
  evaluate: Callable[..., Any]
  size: tuple[int, int]
  fields: tuple[str, ...] = ("text", "pooled")
  guidance: float | None = None


def _nchw(x):
  import torch

  return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _tensors(condition):
  import torch

  return {k: torch.from_numpy(v) for k, v in vars(condition).items() if v is not None}


def _sd3(model, x, sigma, condition):
  given = _tensors(condition)
  found = model(_nchw(x), given["text"], given["pooled"], 1000 * _scalar(sigma), return_dict=False)
  return found[0].numpy().transpose(0, 2, 3, 1)


def _scalar(x):
  import torch

  return torch.from_numpy(x)


def _flux(model, x, sigma, condition, guidance=3.5):
  import diffusers
  import torch

  b, height, width, c = x.shape
  given, pipe = _tensors(condition), diffusers.FluxPipeline
  ids = pipe._prepare_latent_image_ids(b, height // 2, width // 2, "cpu", torch.float32)
  found = model(
    pipe._pack_latents(_nchw(x), b, c, height, width),
    encoder_hidden_states=given["text"], pooled_projections=given["pooled"],
    timestep=_scalar(sigma), img_ids=ids, txt_ids=torch.zeros(given["text"].shape[1], 3),
    guidance=torch.full((b,), guidance), return_dict=False,
  )[0]  # fmt: skip
  found = pipe._unpack_latents(found, 8 * height, 8 * width, 8)
  return found.numpy().transpose(0, 2, 3, 1)


def _flux2(model, x, sigma, condition, guidance=None):
  import diffusers
  import torch

  text, pipe = _tensors(condition)["text"], diffusers.Flux2KleinPipeline
  latents = _nchw(x)
  found = model(
    hidden_states=pipe._pack_latents(latents), encoder_hidden_states=text, timestep=_scalar(sigma),
    img_ids=pipe._prepare_latent_ids(latents), txt_ids=pipe._prepare_text_ids(text),
    guidance=None if guidance is None else torch.full((len(x),), guidance), return_dict=False,
  )[0]  # fmt: skip
  return found.numpy().reshape(x.shape)


def _z_image(model, x, sigma, condition):
  given = _tensors(condition)
  captions = [row[:n] for row, n in zip(given["text"], given["length"])]
  images = list(_nchw(x).unsqueeze(2))
  found = model(images, 1 - _scalar(sigma), captions, return_dict=False)[0]
  return -np.stack([row.numpy() for row in found])[:, :, 0].transpose(0, 2, 3, 1)


_FLUX = dict(
  in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
  joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
_FLUX2 = dict(
  in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
  joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
)  # fmt: skip
FAMILIES = {
  "sd3": Case(
    "SD3Transformer2DModel",
    dict(
      sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
      num_attention_heads=2, caption_projection_dim=32, joint_attention_dim=24, pooled_projection_dim=20,
      pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    ),
    model_fields.REFERENCE_LORA_TARGETS,
    _sd3,
    (6, 8),
  ),
  "flux": Case(
    "FluxTransformer2DModel", _FLUX, model_fields.REFERENCE_LORA_TARGETS, _flux, (6, 8), guidance=3.5
  ),
  "flux2": Case(
    "Flux2Transformer2DModel", _FLUX2, tasks.FLUX2_TARGETS, _flux2, (3, 5), fields=("text",)
  ),
  "flux2_dev": Case(
    "Flux2Transformer2DModel", _FLUX2 | dict(guidance_embeds=True), tasks.FLUX2_TARGETS,
    functools.partial(_flux2, guidance=4.0), (3, 5), fields=("text",), guidance=4.0,
  ),
  "z_image": Case(
    "ZImageTransformer2DModel",
    dict(
      in_channels=4, dim=48, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
      axes_dims=(8, 8, 8), axes_lens=(128, 16, 16),
    ),
    tasks.Z_IMAGE_TARGETS,
    _z_image,
    (6, 10),
    fields=("text", "length"),
  ),
}  # fmt: skip


def config_of(case):
  return hf.ARCHITECTURES[case.name].read_config(case.raw)


def create_of(case, **options):
  """key -> model."""
  return models.build_transformer(config_of(case), guidance=case.guidance, **options)


@functools.cache
def split(name, *, rank=0, **options):
  """(graphdef, shapes of the trainable weights, of the frozen ones)."""
  case = FAMILIES[name]

  def create():
    model = create_of(case, **options)(jax.random.key(0))
    if rank:
      kw = dict(rank=rank, alpha=8.0, init="gaussian", targets=case.targets)
      lora.add_lora(model, jax.random.key(0), **kw)
    return model

  return lora.split_trainable(nnx.eval_shape(create), rank=rank)


def random_like(tree, seed):
  """Normal weights about as large as trained ones; none is zero, so that every layer matters."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    scale = leaf.shape[-2] ** -0.5 if path[-1].key in ("kernel", "lora_a", "lora_b") else 0.1
    offset = 1.0 if path[-1].key == "scale" else 0.0
    return (offset + scale * rng.standard_normal(leaf.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, tree)


def draw_inputs(case, *, batch=2, tokens=TOKENS, size=None):
  """(x [B, h, w, c], sigma [B], condition); captions have 11 tokens and all of them, in turn."""
  config, rng = config_of(case), np.random.default_rng(1)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  x = draw(batch, *(size or case.size), config.latents.channels)
  sigma = np.resize(np.asarray(SIGMA, np.float32), batch)
  made = {
    "text": draw(batch, tokens, config.joint_attention_dim),
    "pooled": draw(batch, getattr(config, "pooled_projection_dim", 1)),
    "length": np.resize(np.asarray([11, tokens], np.int32), batch),
  }
  return x, sigma, types.Condition(**{name: made[name] for name in case.fields})


def entries_of(case, tree):
  return hf.names(config_of(case), {k: tuple(v.shape) for k, v in hf.flatten(tree).items()})


def to_diffusers(case, params):
  """Our weights under diffusers' names."""
  flat = hf.flatten(params)
  pick = lambda e: flat[e.path] if e.block is None else flat[e.path][e.block]
  entries = entries_of(case, params)
  return {e.name: np.ascontiguousarray(e.to_foreign(pick(e))) for e in entries}


def from_diffusers(case, tensors, abstract):
  """Their tensors in our tree; each of them is wanted, and none is missing or misshapen."""
  entries = entries_of(case, abstract)
  assert {e.name: e.shape for e in entries} == {k: v.shape for k, v in tensors.items()}
  flat = {k: np.empty(v.shape, np.float32) for k, v in hf.flatten(abstract).items()}
  for e in entries:
    flat[e.path][() if e.block is None else e.block] = e.from_foreign(tensors[e.name])
  return hf.unflatten(flat)


def velocity_of(name, **options):
  """Jitted (weights, x, sigma, condition) -> velocity, without adapters."""
  graphdef, trainable, frozen = split(name, **options)
  del trainable, frozen

  @jax.jit
  def velocity(weights, x, sigma, condition):
    return models.velocity_fn(graphdef, {"frozen": {}, "trainable": weights}, x, sigma, condition)

  return velocity


def weights_of(name):
  """Shapes of all weights, the buffers' too."""
  return lora.merge_trees(*split(name)[1:])
