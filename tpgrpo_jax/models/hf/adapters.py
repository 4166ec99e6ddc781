"""Low-rank adapters in the files of diffusers and PEFT: out, in, and merged into the weights."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import re
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models.hf import architectures, authors, files, save
from tpgrpo_jax.models.hf.table import Entry, flatten, is_finite, shorten, unflatten

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # diffusers keeps rank and alpha in the file's header
OWN_KEY = "tpgrpo_jax"  # and we the alpha of the training that made it
PREFIX = "transformer."  # the part of a pipeline that the adapter sits on

# How other programs end a tensor's name, and begin those of a text encoder's adapters.
_ENDINGS = (
  (r"\.(lora_A|lora_down|lora\.down)(\.default)?\.weight$", "a"),
  (r"\.(lora_B|lora_up|lora\.up)(\.default)?\.weight$", "b"),
  (r"\.alpha$", "alpha"),
)
_TEXT_ENCODER = (
  r"^((base_model\.model|_orig_mod)\.)*"
  r"(text_encoder(_\d)?\.|text_encoders\.|lora_te\d?_|te\d\.|clip_[lgh]\.|t5xxl\.)"
)
# Settings of PEFT that change what an adapter computes, and the only value that is read here.
_PLAIN = {
  "peft_type": "LORA", "use_dora": False, "use_rslora": False, "lora_bias": False, "bias": "none",
  "fan_in_fan_out": False, "modules_to_save": None,
}  # fmt: skip


class Adapter(NamedTuple):
  """What a file of adapters holds.

  Attributes:
    trainable: nested dict of float32 NumPy arrays `lora_a` and `lora_b`, as split_trainable gives.
    rank: of all of them.
    alpha: the output is scaled by alpha / rank.
    targets: ends of module names that select exactly these modules, for lora.targets.
    states_alpha: the file says so; else `alpha` is the rank, as diffusers takes it.
  """

  trainable: dict[str, Any]
  rank: int
  alpha: float
  targets: tuple[str, ...]
  states_alpha: bool = True


def save_lora(
  path: str | os.PathLike[str],
  trainable: Any,
  config: Any,
  *,
  rank: int,
  alpha: float,
  targets: Sequence[str],
) -> pathlib.Path:
  """Writes adapters so that `pipe.load_lora_weights(path)` of diffusers gives our output.

  alpha / rank is part of the B that is written, and the file's metadata says alpha = rank. So a reader
  scales by 1, whether it knows the metadata (diffusers >= 0.34), takes the rank where nobody says more
  (older ones, kohya), or looks for alpha tensors alone (ComfyUI). Alpha tensors would not do: diffusers
  0.39 refuses them for SD3. For `load_lora` the metadata keeps the alpha of the training.

  Args:
    path: a folder, made when it does not exist, or a file that ends in ".safetensors".
    trainable: nested dict with `lora_a` and `lora_b` leaves.
    config: sizes of the model that they belong to.
    rank: of all adapters.
    alpha: the output is scaled by alpha / rank.
    targets: ends of the adapted modules' names.

  Returns:
    The file.
  """
  path = pathlib.Path(path)
  path = path if path.suffix == ".safetensors" else path / ADAPTER_FILE
  tree, pending, modules = flatten(trainable), [], []
  for entry in architectures.names(config, _kernel_shapes(tree)):
    base = entry.path.removesuffix("kernel")
    modules.append(entry.name.removesuffix(".weight"))
    name = PREFIX + modules[-1]
    shapes = _foreign_shapes(entry, rank)
    for side in "ab":
      leaf = tree[f"{base}lora_{side}"]
      dtype = np.dtype(leaf.dtype)
      scale = dtype.type(alpha / rank if side == "b" else 1)
      make = lambda e=entry, x=leaf, s=side, c=scale: (
        c * _to_foreign(e, s, save.to_host(x, e.block))
      )
      foreign = f"{name}.lora_{side.upper()}.weight"
      pending.append(save.Pending(foreign, shapes[side], dtype, make))
  settings = {
    "r": rank,
    "lora_alpha": rank,
    "target_modules": _modules_for_peft(targets, modules, config),
    "peft_type": "LORA",
    "bias": "none",
  }
  text = json.dumps({PREFIX + k: v for k, v in settings.items()}, indent=2, sort_keys=True)
  if jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)
  own = json.dumps({"alpha": float(alpha)})
  save.write_safetensors(path, pending, metadata={METADATA_KEY: text, OWN_KEY: own})
  return path


def _modules_for_peft(targets, modules, config):
  """The targets, but for those that PEFT alone would take for a container too: these by their full names."""
  containers = architectures.ARCHITECTURES[architectures.class_name(config)].containers
  named = []
  for target in targets:
    if any(name.endswith(f".{target}") for name in containers):
      named += [name for name in modules if name.endswith(f".{target}")]
    else:
      named.append(target)
  return named


def _kernel_shapes(tree):
  """{path of a kernel: shape} of the layers that have adapters."""
  shapes = {}
  for path, a in tree.items():
    if path.endswith("lora_a"):
      base = path.removesuffix("lora_a")
      shapes[f"{base}kernel"] = (*a.shape[:-1], tree[f"{base}lora_b"].shape[-1])
  return shapes


def _foreign_shapes(entry, rank):
  """Shapes of lora_A and lora_B beside a Linear [out, in], or a patch convolution [out, c, p, p]."""
  out, *inside = entry.shape
  return {"a": (rank, *inside), "b": (out, rank, *(1,) * (len(inside) - 1))}


def _to_foreign(entry: Entry, side: str, x: np.ndarray) -> np.ndarray:
  if len(entry.shape) == 2:
    return x.T
  _, c, p, q = entry.shape
  if side == "b":
    return x.T[:, :, None, None]
  return x.reshape(p, q, c, -1).transpose(3, 2, 0, 1)


def _from_foreign(entry: Entry, side: str, x: np.ndarray) -> np.ndarray:
  if len(entry.shape) == 2:
    return x.T
  if side == "b":
    return x[:, :, 0, 0].T
  return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def load_lora(path: str | os.PathLike[str], config: Any, abstract: Any) -> Adapter:
  """Reads adapters that `save_lora`, diffusers or PEFT wrote; ai-toolkit's and kohya's where names fit.

  Rank and alpha are those of the file's metadata, of adapter_config.json beside it, or of its alpha
  tensors; without any of them alpha = rank, as diffusers takes it. Of a file of ours alpha is that of the
  training, and B without it, to one rounding (none where alpha / rank is a power of two).

  Args:
    path: the file, or the folder that holds pytorch_lora_weights.safetensors or
      adapter_model.safetensors.
    config: sizes of the model that they are for.
    abstract: the model's params without adapters, a nested dict of things with a shape.

  Raises:
    ValueError: no such file, a broken one, adapters of another kind or architecture, or with
      different ranks or alphas, or on some blocks only; all that does not fit is listed.
  """
  path = _find(pathlib.Path(path))
  kernels = {k: tuple(v.shape) for k, v in flatten(abstract).items() if k.endswith(".kernel")}
  entries = architectures.names(config, kernels)
  found, settings = _read(path)
  of_text = [name for name in found if re.match(_TEXT_ENCODER, name)]
  if of_text:
    warnings.warn(
      f"{path}: its adapters of text encoders ({len(of_text)} tensors, such as {of_text[0]}) are left out: "
      "text encoders are not trained here.",
      stacklevel=2,
    )
    found = {name: tensor for name, tensor in found.items() if name not in of_text}
  found = architectures.ARCHITECTURES[architectures.class_name(config)].adapters(found)
  adapted, problems = _match(entries, found)
  if not adapted:
    problems.append("  it adapts none of the model's modules")
  problems += [
    f"  {key}={settings[key]!r}: only {plain!r} is read"
    for key, plain in _PLAIN.items()
    if settings.get(key) not in (plain, None) and settings.get(key)
  ]
  problems += [
    f"  integers: {name} is stored as {tensor.dtype}, must be floating-point numbers"
    for name, tensor in found.items()
    if not files.is_floating(tensor.dtype) and not name.endswith(".alpha")
  ]
  ranks = sorted({(*parts["a"].shape, 0)[0] for _, parts in adapted if "a" in parts})
  if 0 in ranks:
    problems.append("  rank 0: some of its tensors are empty")
  alphas = _alphas(adapted, settings, ranks)
  for what, values in (("rank", ranks), ("alpha", alphas)):
    if len(values) > 1:
      problems.append(f"  more than one {what}: {', '.join(f'{v:g}' for v in values)}")
  if len(ranks) == 1:
    stated = settings.get("r", ranks[0])
    if stated != ranks[0]:
      problems.append(f"  its settings say rank {stated}, its tensors have rank {ranks[0]}")
    problems += _misshapen(adapted, ranks[0])
  problems += _incomplete(entries, adapted)
  if problems:
    raise ValueError(
      f"{path}: not an adapter for this {architectures.class_name(config)}:\n" + shorten(problems)
    )
  names = {entry.name.removesuffix(".weight") for entry, _ in adapted}
  every = {entry.name.removesuffix(".weight") for entry in entries}
  trainable, alpha = _assemble(adapted), float(alphas[0])
  if own := settings.get(OWN_KEY):
    trainable, alpha = _divide(trainable, own / alpha), own
  states = "lora_alpha" in settings or any("alpha" in parts for _, parts in adapted)
  return Adapter(trainable, ranks[0], alpha, _targets(names, every), states)


def _find(path):
  if path.is_file():
    if path.suffix != ".safetensors":
      raise ValueError(f"lora.path={str(path)!r}: must be a .safetensors file; convert it first.")
    return path
  for name in (ADAPTER_FILE, PEFT_FILE):
    if (path / name).is_file():
      return path / name
  pickles = [p.name for pattern in files.PICKLES for p in path.glob(pattern)]
  convert = f" It holds {pickles[0]}: convert to safetensors." if pickles else ""
  raise ValueError(
    f"lora.path={str(path)!r}: no such file, nor a folder with {ADAPTER_FILE} or {PEFT_FILE}."
    f"{convert}"
  )


def _read(path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """(tensors by name, PEFT's settings) of a file and of adapter_config.json beside it."""
  with files.open_safetensors(path) as handle:
    tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    for name, tensor in tensors.items():
      files.check_finite(tensor, name, path)
      if name.endswith(".alpha"):
        if tensor.size != 1:
          raise ValueError(f"{path}: {name} has the shape {tensor.shape}, must be one number.")
        tensors[name] = tensor.reshape(())
    metadata = handle.metadata() or {}
  settings = {}
  if path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file():
    settings = files.read_json(path.parent / PEFT_CONFIG)
  if METADATA_KEY in metadata:
    stated = _json_object(path, metadata, METADATA_KEY)
    settings = {k.removeprefix(PREFIX): v for k, v in stated.items()}
    if OWN_KEY in metadata:
      settings[OWN_KEY] = _json_object(path, metadata, OWN_KEY).get("alpha")
      _check_number(path, f"alpha of {OWN_KEY}", settings[OWN_KEY])
  patterns = settings.get("alpha_pattern") or {}
  if not isinstance(patterns, dict):
    raise ValueError(f"{path}: its settings say alpha_pattern={patterns!r}, must be an object.")
  stated = {f"alpha_pattern of {name}": value for name, value in patterns.items()}
  stated |= {key: settings[key] for key in ("lora_alpha", "r") if settings.get(key) is not None}
  for name, value in stated.items():
    _check_number(path, name, value)
  return tensors, settings


def _check_number(path, name, value):
  if not (is_finite(value) and value > 0):
    raise ValueError(f"{path}: its settings say {name}={value!r}, must be a finite number above 0.")


def _json_object(path, metadata, key):
  try:
    return dict(json.loads(metadata[key]).items())
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{path}: metadata {key} is not a JSON object ({error}).") from error


def _match(entries, found):
  """([(entry, {"a", "b", "alpha"})], problems); names are those of the table, or with underscores."""
  known = {}
  for entry in entries:
    module = entry.name.removesuffix(".weight")
    known[module] = known[module.replace(".", "_")] = entry
  parts: dict[str, dict[str, np.ndarray]] = {}
  problems = []
  for name, tensor in found.items():
    endings = [(side, match) for ending, side in _ENDINGS if (match := re.search(ending, name))]
    if not endings:
      problems.append(f"  not a tensor of an adapter: {name} {tensor.shape}")
      continue
    ((side, match),) = endings
    entry = known.get(authors.plain(f"{name[: match.start()]}.").removesuffix("."))
    if entry is None:
      problems.append(f"  the model has no such module: {name} {tensor.shape}")
    elif side in parts.get(entry.name, {}):
      problems.append(f"  twice, under another name too: {name} {tensor.shape}")
    else:
      parts.setdefault(entry.name, {})[side] = tensor
  return [(entry, parts[entry.name]) for entry in entries if entry.name in parts], problems


def _alphas(adapted, settings, ranks):
  """The alphas in use, ascending; one of them is the rule."""
  stated = settings.get("lora_alpha")
  values = {float(parts["alpha"]) for _, parts in adapted if "alpha" in parts}
  if stated is not None:
    values |= {float(v) for v in (settings.get("alpha_pattern") or {}).values()}
    values.add(float(stated))
  elif not all("alpha" in parts for _, parts in adapted):
    values.add(float(max(ranks, default=1)))
  return sorted(values)


def _misshapen(adapted, rank):
  for entry, parts in adapted:
    for side, shape in _foreign_shapes(entry, rank).items():
      name = f"{entry.name.removesuffix('.weight')}.lora_{side.upper()}"
      if side not in parts:
        yield f"  missing: {name} {shape}"
      elif parts[side].shape != shape:
        yield f"  misshapen: {name} is {parts[side].shape}, must be {shape}"


def _incomplete(entries, adapted):
  """Blocks of a stack train together: an adapter on some of them has no place here."""
  present = {entry.name for entry, _ in adapted}
  stacks = {entry.path for entry, _ in adapted if entry.block is not None}
  for entry in entries:
    if entry.path in stacks and entry.name not in present:
      yield f"  missing: {entry.name.removesuffix('.weight')}, whose neighbours are adapted"


def _assemble(adapted):
  """The trainable tree; blocks are stacked in the order of the table."""
  leaves: dict[str, Any] = {}
  for entry, parts in adapted:
    for side in "ab":
      path = f"{entry.path.removesuffix('kernel')}lora_{side}"
      value = _from_foreign(entry, side, parts[side]).astype(np.float32)
      if entry.block is None:
        leaves[path] = np.ascontiguousarray(value)
      else:
        leaves.setdefault(path, []).append(value)
  return unflatten({k: np.stack(v) if isinstance(v, list) else v for k, v in leaves.items()})


def _divide(tree, scale):
  """The adapters with B divided by `scale`."""
  if not isinstance(tree, dict):
    return tree
  side = lambda name, x: x / np.float32(scale) if name == "lora_b" else _divide(x, scale)
  return {name: side(name, x) for name, x in tree.items()}


def _targets(adapted, every):
  """The shortest ends of names that select exactly the modules in `adapted`."""
  targets = []
  for name in sorted(adapted):
    short = re.sub(r"^\w+\.\d+\.", "", name)
    selected = {n for n in every if n == short or n.endswith(f".{short}")}
    targets.append(short if selected <= adapted else name)
  return tuple(dict.fromkeys(targets))


def merge_lora(params: Mapping[str, Any], *, rank: int, alpha: float) -> dict[str, Any]:
  """All weights without adapters: W + (alpha / rank) A B in float32, then in W's own dtype.

  Args:
    params: {"frozen": tree, "trainable": tree}, as a VelocityFn takes them.
    rank: of the adapters.
    alpha: their scale is alpha / rank.
  """
  merged, adapters = dict(flatten(params["frozen"])), flatten(params["trainable"])
  for path, a in adapters.items():
    if path.endswith("lora_a"):
      base = path.removesuffix("lora_a")
      merged[f"{base}kernel"] = _merge(
        merged[f"{base}kernel"], a, adapters[f"{base}lora_b"], alpha / rank
      )
  return unflatten(merged)


@jax.jit
def _merge(kernel, a, b, scale):
  change = jnp.matmul(
    a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
  )
  return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)
