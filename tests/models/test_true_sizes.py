"""Every tensor of the released models has its place, by name and shape, and nothing is left over.

Nothing is allocated: the torch models live on the meta device, ours are abstract.
"""

from flax import nnx
import jax
import numpy as np
import pytest

from tpgrpo_jax import models
from tpgrpo_jax.models import hf, lora

SD3 = dict(
  sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64,
  joint_attention_dim=4096, pooled_projection_dim=2048,
)  # fmt: skip
MEDIUM = SD3 | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
LARGE = SD3 | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
FLUX = dict(
  patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
  num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
)  # fmt: skip
FLUX2 = dict(in_channels=128, attention_head_dim=128, guidance_embeds=False)
# name -> (diffusers' class, what config.json on the hub says, parameters in billions)
MODELS = {
  "SD3-Medium": ("SD3Transformer2DModel", MEDIUM | dict(pos_embed_max_size=192), 2.08),
  "SD3.5-Medium": (
    "SD3Transformer2DModel",
    MEDIUM
    | dict(
      pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=list(range(13))
    ),
    2.5,
  ),
  "SD3.5-Large": (
    "SD3Transformer2DModel", LARGE | dict(pos_embed_max_size=192, qk_norm="rms_norm"), 8.1,
  ),
  "FLUX.1-dev": ("FluxTransformer2DModel", FLUX | dict(guidance_embeds=True), 11.9),
  "FLUX.1-schnell": ("FluxTransformer2DModel", FLUX | dict(guidance_embeds=False), 11.9),
  "FLUX.2-klein-4B": (
    "Flux2Transformer2DModel",
    FLUX2
    | dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680),
    3.876,
  ),
  "FLUX.2-klein-9B": (
    "Flux2Transformer2DModel",
    FLUX2
    | dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288),
    9.08,
  ),
  "FLUX.2-dev": ("Flux2Transformer2DModel", dict(guidance_embeds=True), 32.2),
  "Z-Image": ("ZImageTransformer2DModel", dict(), 6.155),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_the_true_configuration_is_mapped_both_ways(name):
  torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
  class_name, raw, billions = MODELS[name]
  with torch.device("meta"):
    theirs = getattr(diffusers, class_name)(**raw).state_dict()
  config = hf.ARCHITECTURES[class_name].read_config(raw)
  model = nnx.eval_shape(models.build_transformer(config), jax.random.key(0))
  tree = hf.flatten(lora.merge_trees(*lora.split_trainable(model, rank=0)[1:]))
  entries = hf.names(config, {path: tuple(leaf.shape) for path, leaf in tree.items()})
  assert len(entries) == len(theirs)
  assert {e.name: e.shape for e in entries} == {k: tuple(v.shape) for k, v in theirs.items()}
  assert sum(np.prod(e.shape) for e in entries) == pytest.approx(billions * 1e9, rel=0.02)
  places = {(e.path, e.block) for e in entries}
  assert len(places) == len(entries)
  for path in {e.path for e in entries}:
    blocks = {block for other, block in places if other == path}
    assert blocks in ({None}, set(range(tree[path].shape[0])))
  assert {e.path for e in entries} == set(tree)
  for e in entries:
    ours = jax.ShapeDtypeStruct(tree[e.path].shape[e.block is not None :], np.float32)
    foreign = jax.eval_shape(e.to_foreign, ours)
    assert foreign.shape == e.shape, e.name
    assert jax.eval_shape(e.from_foreign, foreign).shape == ours.shape, e.name
