"""The fields of the model: transformer, text encoders, autoencoder, adapters."""

import dataclasses

REFERENCE_LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
  """Which transformer.

  Attributes:
    variant: a name of tpgrpo_jax.models.MODELS; "tiny" (words) and "tiny_shapes" ship with their weights.
      "sd3" is Stable Diffusion 3 and 3.5, "flux" FLUX.1, "flux_kontext" FLUX.1-Kontext, which edits pictures,
      "flux2" FLUX.2-klein, "z_image" Z-Image.
    path: a pipeline in diffusers' layout: a folder or a hub id "owner/name". For the tiny ones a transformer
      alone will do (config.json + safetensors); empty for the one that ships.
    dtype: compute dtype; trainable weights are float32 always.
    remat: what the backward pass recomputes: none, full (every block), dots (all but matmuls).
    quantize: "int8" or "nf4" keeps the frozen kernels of the blocks in so many bits, for adapters on
      little memory (docs/speed.md); empty does not.
  """

  variant: str = "tiny"
  path: str = ""
  dtype: str = "float32"
  remat: str = "none"
  quantize: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
  """The text encoders of a pipeline; they are loaded for new prompts only, and freed before training.

  Attributes:
    max_sequence_length: tokens of T5 or Qwen3 a prompt; 0 is the pipeline's own (SD3 256, the others 512).
    t5: False leaves T5 out, as SD3 allows.
    dtype: of the encoders and the embeddings.
    device: "mesh" divides them over each process's own devices, "cpu" keeps them on the host.
    cache: folder of embeddings, and of encoded pictures to edit, that runs share; empty for
      ~/.cache/tpgrpo_jax/prompts.
  """

  max_sequence_length: int = 0
  t5: bool = True
  dtype: str = "float32"
  device: str = "mesh"
  cache: str = ""


@dataclasses.dataclass(frozen=True)
class Vae:
  """The autoencoder.

  Attributes:
    dtype: of its computation and weights.
    images_per_chunk: images that a device decodes at once.
  """

  dtype: str = "float32"
  images_per_chunk: int = 8


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters, as peft defines them; rank 0 trains every weight instead.

  Attributes:
    rank: of the adapters; 0 for none.
    alpha: their output is scaled by alpha / rank.
    init: of A, "gaussian" or "kaiming" as in peft; B begins with 0.
    targets: module names as in diffusers; a module matches when its name ends with one of them.
    path: adapters to start from, a .safetensors file or its folder; rank, alpha and targets must be
      the file's own. Empty for fresh ones.
  """

  rank: int = 0
  alpha: float = 64.0
  init: str = "gaussian"
  targets: tuple[str, ...] = REFERENCE_LORA_TARGETS
  path: str = ""
