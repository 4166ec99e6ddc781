"""Adapters of Z-Image under every program's names, and what PEFT alone makes of the files written here."""

import json

import families
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tpgrpo_jax.models import hf
from tpgrpo_jax.models.hf import adapters

RANK = 4
Z_IMAGE = families.FAMILIES["z_image"]
STACKS = {"layers": 2, "noise_refiner": 2, "context_refiner": 2}
BLOCKS = [f"{stack}.{i}" for stack, count in STACKS.items() for i in range(count)]


def draw(names, seed=0):
  """{module: (A, B)} of square modules of the small Z-Image."""
  rng, width = np.random.default_rng(seed), Z_IMAGE.raw["dim"]
  number = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return {name: (number(RANK, width), number(width, RANK)) for name in names}


def load(path, tensors, metadata=None):
  safetensors.numpy.save_file(tensors, path, metadata=metadata)
  config = families.config_of(Z_IMAGE)
  return hf.load_lora(path, config, families.weights_of("z_image"))


def of_diffusers(modules):
  return {
    f"transformer.{name}.lora_{side}.weight": value
    for name, pair in modules.items()
    for side, value in zip("AB", pair)
  }


SIDES = ("to_q", "to_k", "to_v", "to_out.0")
OURS = draw([f"{block}.attention.{side}" for block in BLOCKS for side in SIDES])


def renamed(change, sides=("lora_A", "lora_B")):
  return {
    f"{change(name)}.{side}.weight": value
    for name, pair in OURS.items()
    for side, value in zip(sides, pair)
  }


def kohya(out="to_out_0", down="lora_down"):
  change = lambda name: "lora_unet_" + name.replace("to_out.0", out).replace(".", "_")
  tensors = renamed(change, (down, down.replace("down", "up")))
  alphas = {f"{change(name)}.alpha": np.asarray(float(RANK), np.float32) for name in OURS}
  return tensors | alphas


def beside_fused():
  """As Anime-Z: the fused module stands beside its parts, which are the ones that hold."""
  fused = {
    f"diffusion_model.{block}.attention.{name}.lora_{side}.weight": np.ones((3, 3), np.float32)
    for block in BLOCKS
    for name in ("qkv", "out")
    for side in "AB"
  }
  return renamed(lambda name: f"diffusion_model.{name}") | fused


FILES = {
  "diffusers": lambda: of_diffusers(OURS),
  "ai-toolkit": lambda: renamed(lambda name: f"diffusion_model.{name}"),
  "authors' output": lambda: renamed(
    lambda name: f"diffusion_model.{name}".replace("to_out.0", "out")
  ),
  "kohya": kohya,
  "kohya, authors' output": lambda: kohya("out"),
  "kohya, with dots": lambda: kohya(down="lora.down"),
  "PEFT": lambda: renamed(lambda name: f"base_model.model.{name}"),
  "PEFT's adapter at the end": lambda: renamed(
    lambda name: f"base_model.model.{name}", ("lora_A.default", "lora_B.default")
  ),
  "PEFT's adapter first": lambda: renamed(lambda name: f"diffusion_model.default.{name}"),
  "PEFT's adapter last in the name": lambda: renamed(lambda name: f"transformer.{name}.default"),
  "beside a fused module": beside_fused,
}


@pytest.mark.parametrize("style", FILES)
def test_adapters_of_z_image_under_other_programs_names_are_read(tmp_path, style):
  wanted = load(tmp_path / "wanted.safetensors", FILES["diffusers"]())
  found = load(tmp_path / "theirs.safetensors", FILES[style]())
  assert found[1:4] == wanted[1:4] and set(found.targets) == {f"attention.{side}" for side in SIDES}
  wanted, found = (hf.flatten(adapter.trainable) for adapter in (wanted, found))
  assert wanted.keys() == found.keys() and len(wanted) == 2 * len(SIDES) * len(STACKS)
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value)


def fused():
  """Adapters of the authors' own modules, fused attention, head and door, as kohya would name them."""
  rng, config = np.random.default_rng(1), families.config_of(Z_IMAGE)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  width, narrow, token = config.dim, min(config.dim, 256), config.in_channels * config.patch**2
  shapes = {f"{block}.attention.qkv": (3 * width, width) for block in BLOCKS}
  shapes |= {f"{block}.attention.out": (width, width) for block in BLOCKS}
  shapes |= {"x_embedder": (width, token), "final_layer.linear": (token, width)}
  shapes |= {"final_layer.adaLN_modulation.1": (width, narrow)}
  return {name: (draw(RANK, inside), draw(out, RANK)) for name, (out, inside) in shapes.items()}


@pytest.mark.parametrize("style", ["dots", "underscores"])
def test_the_authors_modules_of_z_image_become_diffusers_own(tmp_path, style):
  made = fused()
  change = (
    (lambda name: "lora_unet_" + name.replace(".", "_"))
    if style == "underscores"
    else (lambda name: f"diffusion_model.{name}")
  )
  tensors = {
    f"{change(name)}.lora_{side}.weight": value
    for name, pair in made.items()
    for side, value in zip(("down", "up"), pair)
  }
  trainable = load(tmp_path / "theirs.safetensors", tensors).trainable
  attention = trainable["noise_refiner"]["attention"]
  a, b = made["noise_refiner.1.attention.qkv"]
  rows = [attention[name]["lora_b"][1].T for name in ("to_q", "to_k", "to_v")]
  np.testing.assert_array_equal(np.concatenate(rows), b)
  np.testing.assert_array_equal(attention["to_k"]["lora_a"][1].T, a)
  for name, ours in {
    "x_embedder": trainable["x_embedder"],
    "final_layer.linear": trainable["final_linear"],
    "final_layer.adaLN_modulation.1": trainable["final_modulation"],
    "layers.1.attention.out": {
      k: v[1] for k, v in trainable["layers"]["attention"]["to_out"].items()
    },
  }.items():
    np.testing.assert_array_equal(ours["lora_b"].T, made[name][1])


@pytest.mark.parity
@pytest.mark.parametrize("style", ["ai-toolkit", "kohya", "kohya, authors' output"])
def test_names_are_read_as_diffusers_reads_them(style):
  torch = pytest.importorskip("torch")
  utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
  given = {name: torch.from_numpy(np.array(x)) for name, x in FILES[style]().items()}
  wanted = utils._convert_non_diffusers_z_image_lora_to_diffusers(given)
  assert {name: wanted[name].shape for name in wanted} == {
    name: value.shape for name, value in of_diffusers(OURS).items()
  }
  for name, value in of_diffusers(OURS).items():
    np.testing.assert_array_equal(wanted[name].numpy(), value)


def test_an_adapter_that_is_there_twice_is_refused(tmp_path):
  tensors = FILES["diffusers"]() | {
    f"diffusion_model.{BLOCKS[0]}.attention.to_q.lora_A.weight": np.ones((RANK, 48), np.float32)
  }
  with pytest.raises(ValueError, match=f"twice, under another name too: .*{BLOCKS[0]}"):
    load(tmp_path / "theirs.safetensors", tensors)


def test_adapters_of_integers_are_refused_and_alpha_may_be_one(tmp_path):
  tensors = FILES["kohya"]()
  tensors |= {name: np.asarray(RANK) for name in tensors if name.endswith(".alpha")}
  assert load(tmp_path / "alpha.safetensors", tensors).alpha == RANK
  name = next(name for name in tensors if "lora_up" in name)
  with pytest.raises(ValueError, match="integers: .*stored as int8, must be floating") as caught:
    load(tmp_path / "codes.safetensors", tensors | {name: tensors[name].astype(np.int8)})
  assert "attention" in str(caught.value)


# What is written here, read by PEFT alone.


def written(name, folder):
  """(random adapters of a family, the file)."""
  case = families.FAMILIES[name]
  trainable = families.random_like(families.split(name, rank=RANK)[1], 3)
  options = dict(rank=RANK, alpha=8.0, targets=case.targets)
  return trainable, hf.save_lora(folder, trainable, families.config_of(case), **options)


def settings_of(path):
  with safetensors.safe_open(path, framework="numpy") as handle:
    text = json.loads(handle.metadata()[adapters.METADATA_KEY])
  return {name.removeprefix("transformer."): value for name, value in text.items()}


def test_targets_that_peft_would_mistake_are_written_in_full(tmp_path):
  _, path = written("flux2", tmp_path)
  found = settings_of(path)["target_modules"]
  assert "attn.to_out" not in found and "attn.to_out.0" in found
  full = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(2)]
  assert [name for name in found if name.startswith("single")] == full
  _, path = written("z_image", tmp_path / "z_image")
  assert settings_of(path)["target_modules"] == list(Z_IMAGE.targets)


@pytest.mark.parity
@pytest.mark.parametrize("name", families.FAMILIES)
def test_peft_alone_gives_our_velocity_and_diffusers_too(name, tmp_path):
  torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
  peft = pytest.importorskip("peft")
  case = families.FAMILIES[name]
  weights = families.random_like(families.weights_of(name), 0)
  trainable, path = written(name, tmp_path / "lora")
  hf.save_transformer(tmp_path / "model", families.config_of(case), weights)
  load = lambda: getattr(diffusers, case.name).from_pretrained(tmp_path / "model").eval()
  x, sigma, condition = families.draw_inputs(case)
  scaled = hf.load_lora(path, families.config_of(case), families.weights_of(name))
  merged = hf.merge_lora({"frozen": weights, "trainable": trainable}, rank=RANK, alpha=8.0)
  ours = np.asarray(families.velocity_of(name)(merged, x, sigma, condition))
  assert scaled.alpha == 8.0

  with_peft = load()
  peft.inject_adapter_in_model(peft.LoraConfig(**settings_of(path)), with_peft)
  tensors = safetensors.numpy.load_file(path)
  given = {k.removeprefix("transformer."): torch.from_numpy(v) for k, v in tensors.items()}
  result = peft.set_peft_model_state_dict(with_peft, given)
  assert not result.unexpected_keys
  adapted = {
    n for n, module in with_peft.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
  }
  assert adapted == {n.rpartition(".lora_")[0] for n in given}
  by_diffusers = load()
  by_diffusers.load_lora_adapter(str(path.parent), weight_name=path.name)
  with torch.no_grad():
    before, *found = (
      case.evaluate(model, x, sigma, condition) for model in (load(), with_peft, by_diffusers)
    )
  error = lambda a: np.abs(a - ours).max() / np.abs(ours).max()
  assert error(before) > 1e-2
  assert error(found[0]) < 1e-4 and error(found[1]) < 1e-4
  np.testing.assert_array_equal(found[0], found[1])
