"""What a pipeline's JSON files must not hold ends with one message, of file, field, value, rule and fix."""

import dataclasses
import itertools
import json
import math
import warnings

import pytest
import stored_diffusers as stored

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models
from tpgrpo_jax.models import hf, qwen3, t5, text_source
from tpgrpo_jax.models.hf import encoder, tokenizer
from tpgrpo_jax.training import pipeline

NO_NUMBERS = (math.nan, -math.inf, 10**400)
VALUES = (*NO_NUMBERS, None, True, "x", 0, -1, -0.5, [], {}, [None], [-1], {"x": None})
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  golden = stored.load()
  make = lambda family: stored.write_pipeline(golden, family, tmp_path_factory.mktemp(family))
  return {family: make(family) for family in stored.FAMILIES}


def read_text_encoder(folder):
  kind = encoder.load_json(folder).get("model_type")
  if kind in ("t5", "qwen3"):
    return encoder.read_config({"t5": t5.T5Config, "qwen3": qwen3.Qwen3Config}[kind], folder)
  return hf.load_config(folder)


def readers(folder, family):
  """{file: what reads it}."""
  variant = models.MODELS[family]

  def read_index():
    text_source.check_from_text(folder)
    text_source.TextSource(folder, family).parts()

  return {
    INDEX: read_index,
    SCHEDULER: lambda: pipeline.read_scheduler(config_lib.Sampler(), variant, folder),
    "transformer/config.json": lambda: hf.load_config(folder / "transformer"),
    "vae/config.json": lambda: hf.load_config(folder / "vae"),
  } | {
    f"{part.encoder}/config.json": lambda name=part.encoder: read_text_encoder(folder / name)
    for part in text_source.FAMILIES[family].parts
  }


def changes(content):
  """(field, value, the whole with it), for fields of objects inside too."""
  for field, value in itertools.product(content, VALUES):
    yield field, value, content | {field: value}
    for inner in content[field] if isinstance(content[field], dict) else ():
      yield inner, value, content | {field: content[field] | {inner: value}}


@pytest.mark.parametrize("family", [f for f in stored.FAMILIES if f != "flux"])  # as SD3's
def test_a_field_of_any_other_type_ends_with_one_message_or_is_not_read(folders, family):
  folder = folders[family]
  for name, read in readers(folder, family).items():
    path = folder / name
    text = path.read_text()
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of the scheduler's fields that are not followed
      sizes = read()
      is_number = lambda value: type(value) in (int, float)
      numbers = {f for f, v in vars(sizes).items() if is_number(v)} if has_fields(sizes) else set()
      for field, value, changed in changes(json.loads(text)):
        path.write_text(json.dumps(changed))
        try:
          read()
        except ValueError as error:  # any other is a failure
          message = str(error)
          assert str(folder) in message and len(message.splitlines()) == 1, (name, field, value)
        else:
          assert not (field in numbers and value in NO_NUMBERS), (name, field)
    path.write_text(text)


def has_fields(value):
  return dataclasses.is_dataclass(value)


def edit(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


VAE, QWEN3, TRANSFORMER = (f"{part}/config.json" for part in ("vae", "text_encoder", "transformer"))
ROPE = "must be an object or null. Fetch"
ABOVE_0 = "must be a finite number above 0. Fetch"
CASES = [
  (INDEX, "_class_name", None, "must be the class of the pipeline. Fetch"),
  (INDEX, "_class_name", 5, "must be the class of the pipeline"),
  (INDEX, "text_encoder", "Qwen3", "must be a library and a class, or null for both. Fetch"),
  (INDEX, "text_encoder", [], "must be a library and a class"),
  (INDEX, "is_distilled", "false", "must be true or false. Fetch"),
  (QWEN3, "rope_parameters", "default", ROPE),
  (QWEN3, "rope_parameters", {"rope_theta": None}, "rope_theta=None: must be a finite"),
  (QWEN3, "rope_parameters", {"rope_theta": -1e6}, "rope_theta=-1000000.0: must be a finite number above 0"),
  (QWEN3, "rms_norm_eps", math.nan, ABOVE_0),
  (QWEN3, "rms_norm_eps", 0.0, ABOVE_0),
  (QWEN3, "hidden_size", 10**400, "must be at least 1, and below 2^31. Fetch"),
  (TRANSFORMER, "mlp_ratio", -3.0, ABOVE_0),
  (VAE, "down_block_types", None, "must be 'DownEncoderBlock2D' for each of block_out_channels"),
  (VAE, "patch_size", None, "must be [2, 2]; no other is known. Fetch"),
  (VAE, "patch_size", 2, "must be [2, 2]"),
  (VAE, "batch_norm_eps", math.inf, ABOVE_0),
  (VAE, "block_out_channels", [-8, -8], "must be one or more multiples of norm_num_groups"),
  (VAE, "decoder_block_out_channels", [8], "must be as many as block_out_channels"),
  (SCHEDULER, "shift", math.nan, ABOVE_0),
  (SCHEDULER, "shift", 0, ABOVE_0),
  (SCHEDULER, "max_shift", math.inf, "must be a finite number. Fetch"),
  (SCHEDULER, "shift_terminal", 1.0, "must be a number between 0 and 1. Fetch"),
  (SCHEDULER, "max_image_seq_len", 256, "must be above base_image_seq_len=256. Fetch"),
  (SCHEDULER, "use_dynamic_shifting", "no", "must be true or false. Fetch"),
]  # fmt: skip


@pytest.mark.parametrize("name, field, value, rule", CASES)
def test_message_names_file_field_value_rule_and_fix(folders, name, field, value, rule):
  path = folders["flux2"] / name
  text = path.read_text()
  edit(path, **{field: value})
  try:
    with pytest.raises(ValueError) as caught:
      readers(folders["flux2"], "flux2")[name]()
  finally:
    path.write_text(text)
  named = field in rule or "rope_theta=" in rule or f"{field}=" in str(caught.value)
  assert str(path) in str(caught.value) and rule in str(caught.value) and named


def test_numbers_that_may_be_negative_are_read(folders):
  path = folders["z_image"] / VAE
  text = path.read_text()
  for value in (-0.5, 0, None):
    edit(path, shift_factor=value)
    assert hf.load_config(path.parent).shift_factor == value
  path.write_text(text)


@pytest.mark.parametrize(
  "found, what",
  [
    ("Flux2KleinKVPipeline", "FLUX.2-klein-KV, which edits"),
    ("Flux2KleinInpaintPipeline", "paints inside a mask"),
    ("ZImageInpaintPipeline", "paints inside a mask"),
    ("ZImageControlNetPipeline", "a ControlNet"),
    ("ZImageControlNetInpaintPipeline", "a ControlNet"),
    ("ZImageOmniPipeline", "Z-Image-Omni"),
    ("StableDiffusion3InpaintPipeline", "paints inside a mask"),
    ("StableDiffusion3ControlNetInpaintingPipeline", "a ControlNet"),
    ("StableDiffusion3PAGPipeline", "perturbs attention"),
    ("FluxFillPipeline", "FLUX.1-Fill"),
    ("FluxControlImg2ImgPipeline", "FLUX.1-Depth or FLUX.1-Canny"),
    ("FluxControlNetImg2ImgPipeline", "a ControlNet"),
    ("FluxKontextInpaintPipeline", "paints inside a mask"),
    ("FluxKontextPipeline", "model.variant='flux_kontext'"),
    ("FluxPriorReduxPipeline", "FLUX.1-Redux"),
  ],
)
def test_pipeline_that_is_something_else_is_named_for_what_it_is(tmp_path, found, what):
  (tmp_path / INDEX).write_text(json.dumps({"_class_name": found}))
  with pytest.raises(ValueError, match=f"holds a {found}: .*from text alone") as caught:
    text_source.check_from_text(tmp_path)
  assert what in str(caught.value)
  if found != "FluxKontextPipeline":
    with pytest.raises(ValueError, match=f"holds a {found}, and model.variant='flux_kontext'"):
      text_source.check_edits(tmp_path)


@pytest.mark.parametrize("family", text_source.FAMILIES)
def test_only_the_familys_own_classes_are_read(tmp_path, family):
  line = text_source.FAMILIES[family]
  content = {part.encoder: ["transformers", "x"] for part in line.parts}
  for end, fits in {
    "Pipeline": True,
    "Img2ImgPipeline": True,
    "XPipeline": False,
    "": False,
  }.items():
    (tmp_path / INDEX).write_text(json.dumps(content | {"_class_name": line.pipeline + end}))
    source = text_source.TextSource(tmp_path, family)
    if fits:
      assert len(source.parts()) == len(line.parts)
    else:
      with pytest.raises(ValueError, match="Set family to what the folder holds"):
        source.parts()


def test_tokenizer_without_a_padding_token_is_refused(folders):
  path = folders["flux2"] / "tokenizer" / "tokenizer_config.json"
  text = path.read_text()
  edit(path, pad_token=None)
  try:
    with pytest.raises(ValueError, match="pad_token=None: must be a token that fills up") as caught:
      tokenizer.load_tokenizer("qwen3", path.parent)
  finally:
    path.write_text(text)
  assert str(path.parent) in str(caught.value)
