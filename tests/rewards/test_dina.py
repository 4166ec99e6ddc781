"""DiNa-LRM equals an independent torch module on random weights, and says what is wrong with its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import stored_dina

from tpgrpo_jax import rewards, types
from tpgrpo_jax.models import dina
from tpgrpo_jax.rewards import dina as dina_reward
from tpgrpo_jax.serving import build

TAPS, WIDTH, RANK, ALPHA = (1, 3), 32, 4, 8
SIZES = {
  "_class_name": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 2, "in_channels": 4,
  "out_channels": 4, "num_layers": 5, "attention_head_dim": 16, "num_attention_heads": 2,
  "joint_attention_dim": 24, "caption_projection_dim": WIDTH, "pooled_projection_dim": 20,
  "pos_embed_max_size": 8, "dual_attention_layers": [0, 1], "qk_norm": "rms_norm",
}  # fmt: skip
HEAD = dina.HeadConfig(token_dim=WIDTH, width=WIDTH, taps=2, queries=3, heads=4)
ADAPTED = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
           "attn.add_v_proj", "attn.to_add_out")  # fmt: skip


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformer(torch, tmp_path_factory):
  """(folder, diffusers' model) of random weights."""
  diffusers = pytest.importorskip("diffusers")
  torch.manual_seed(0)
  sizes = {k: v for k, v in SIZES.items() if not k.startswith("_")}
  model = diffusers.SD3Transformer2DModel(**sizes).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  folder = tmp_path_factory.mktemp("pipeline")
  model.save_pretrained(folder / "transformer")
  return folder, model


@pytest.fixture(scope="module")
def head(tmp_path_factory):
  return stored_dina.write_head(tmp_path_factory.mktemp("head") / "rm_head.safetensors", HEAD)


def write_adapters(folder, seed=1):
  """PEFT's adapters on the three blocks that are read; returns {module: change of its weight}."""
  rng = np.random.default_rng(seed)
  modules = [f"transformer_blocks.{i}.{name}" for i in range(3) for name in ADAPTED]
  modules += [
    f"transformer_blocks.{i}.attn2.{name}" for i in (0, 1) for name in ("to_q", "to_out.0")
  ]
  tensors, change = {}, {}
  for module in modules:
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((RANK, WIDTH), (WIDTH, RANK)))
    tensors |= {
      f"base_model.model.{module}.lora_{side}.weight": 0.1 * x for side, x in (("A", a), ("B", b))
    }
    change[module] = ALPHA / RANK * (0.1 * b) @ (0.1 * a)
  folder.mkdir()
  safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
  settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
  (folder / "adapter_config.json").write_text(json.dumps(settings))
  return change


def reference_head(torch, file):
  """The published head, written from its description: strict names, torch's own attention."""
  nn, functional = torch.nn, torch.nn.functional

  def perceptron(*widths, between):
    return nn.Sequential(nn.Linear(*widths[:2]), between, nn.Linear(*widths[1:]))

  class Adapter(nn.Module):
    def __init__(self):
      super().__init__()
      self.layer_embed = nn.Parameter(torch.zeros(1, 1, WIDTH))
      self.cond_mlp = perceptron(WIDTH, 2 * WIDTH, 2 * WIDTH, between=nn.SiLU())
      self.proj = nn.Linear(WIDTH, WIDTH // 4)

    def forward(self, tokens, temb):
      gamma, beta = self.cond_mlp(temb)[:, None].chunk(2, dim=-1)
      return self.proj(tokens * (1 + gamma) + beta + self.layer_embed)

  class Looks(nn.Module):
    def __init__(self, text):
      super().__init__()
      self.norm_q, self.norm_v = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
      self.to_q, self.to_k_vis, self.to_v_vis = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
      self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH))
      self.text = text
      if text:
        self.norm_t = nn.RMSNorm(WIDTH)
        self.to_k_text, self.to_v_text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate_vis, self.gate_text = (
          perceptron(WIDTH, WIDTH, 1, between=nn.SiLU()) for _ in range(2)
        )

    def one(self, q, k, v):
      heads = lambda x: x.unflatten(-1, (HEAD.heads, -1)).transpose(1, 2)
      y = functional.scaled_dot_product_attention(heads(q), heads(k), heads(v))
      return y.transpose(1, 2).flatten(2)

    def forward(self, queries, image, text):
      q, image = self.to_q(self.norm_q(queries)), self.norm_v(image)
      v = self.to_v_vis(image)
      if not self.text:
        return queries + self.to_out(self.one(q, self.to_k_vis(image), v))
      y = self.one(q, self.to_k_vis(image), v * torch.sigmoid(self.gate_vis(image)))
      text = self.norm_t(text)
      v = self.to_v_text(text) * torch.sigmoid(self.gate_text(text))
      return queries + self.to_out(y + self.one(q, self.to_k_text(text), v))

  class Head(nn.Module):
    def __init__(self):
      super().__init__()
      self.layer_adapters_visual = nn.ModuleList(Adapter() for _ in TAPS)
      self.layer_adapters_text = nn.ModuleList(Adapter() for _ in TAPS)
      narrow = len(TAPS) * WIDTH // 4
      self.agg_visual, self.agg_text = nn.Linear(narrow, WIDTH), nn.Linear(narrow, WIDTH)
      self.query_tokens = nn.Parameter(torch.zeros(1, HEAD.queries, WIDTH))
      self.attn1, self.attn2, self.norm_ff = Looks(True), Looks(False), nn.RMSNorm(WIDTH)
      self.ff = perceptron(WIDTH, 4 * WIDTH, WIDTH, between=nn.GELU())
      self.head = nn.Linear(WIDTH, 1)

    def forward(self, temb, images, texts):
      adapt = lambda adapters, each: torch.cat([f(x, temb) for f, x in zip(adapters, each)], -1)
      image = self.agg_visual(adapt(self.layer_adapters_visual, images))
      text = self.agg_text(adapt(self.layer_adapters_text, texts))
      queries = self.attn1(self.query_tokens.expand(len(temb), -1, -1), image, text)
      queries = self.attn2(queries, image, None)
      queries = queries + self.ff(self.norm_ff(queries))
      return self.head(queries).mean(dim=1)[:, 0]

  model = Head().eval()
  loaded = {k: torch.tensor(v) for k, v in safetensors.numpy.load_file(file).items()}
  model.load_state_dict(loaded, strict=True)
  return model


def reference_score(torch, model, head, x, level, condition):
  """(raw + 10) / 10 by diffusers' blocks; x is [S, h, w, c]."""
  images, texts = [], []
  with torch.no_grad():
    given = lambda a: torch.tensor(np.asarray(a, np.float32))
    hidden = model.pos_embed(given(x).permute(0, 3, 1, 2))
    temb = model.time_text_embed(torch.full((len(x),), 1000.0 * level), given(condition.pooled))
    text = model.context_embedder(given(condition.text))
    for number, block in enumerate(model.transformer_blocks[: TAPS[-1]], 1):
      text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=temb)
      if number in TAPS:
        images.append(hidden)
        texts.append(text)
    return ((head(temb, images, texts) + 10) / 10).numpy()


def inputs(count=3):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, count, 8, 12, 4)).astype(np.float32)
  condition = types.Condition(
    text=rng.standard_normal((2, 7, 24)).astype(np.float32),
    pooled=rng.standard_normal((2, 20)).astype(np.float32),
  )
  return x, condition


@pytest.mark.parity
def test_scores_of_noisy_and_finished_latents_equal_torch_with_adapters_and_without(
  torch, transformer, head, tmp_path
):
  folder, model = transformer
  judge = reference_head(torch, head)
  x, condition = inputs()
  levels = (0.9, 0.2, 0.0)
  samples = types.Samples(jnp.asarray(x), jnp.asarray(levels))
  options = dict(path=folder, head=head, taps=TAPS, heads=HEAD.heads)
  noise = np.asarray(jax.random.normal(jax.random.key(0), x.shape[2:]))
  finished = 0.6 * x[:, 2] + 0.4 * noise
  shown = [(x[:, 0], 0.9), (x[:, 1], 0.2), (finished, 0.4)]
  wanted = lambda: np.stack(
    [reference_score(torch, model, judge, seen, level, condition) for seen, level in shown], axis=1
  )
  make = rewards.LATENT_REWARDS["dina_lrm"]
  plain = wanted()
  assert np.ptp(plain) > 0.1
  np.testing.assert_allclose(make(**options)(samples, condition), plain, atol=1e-5)
  change = write_adapters(tmp_path / "lora")
  modules = dict(model.named_modules())
  for name, delta in change.items():
    modules[name].weight.data += torch.tensor(delta)
  adapted = wanted()
  for name, delta in change.items():
    modules[name].weight.data -= torch.tensor(delta)
  assert np.abs(adapted - plain).max() > 0.05
  found = make(**options, lora=tmp_path / "lora")(samples, condition)
  np.testing.assert_allclose(found, adapted, atol=1e-5)
  assert make(**options, dtype="bfloat16")(samples, condition).dtype == np.float32


def test_finished_latents_are_noised_to_the_level_and_others_stay():
  x = jnp.asarray(inputs()[0][:, 0])
  seen, level = dina_reward.noised(x, jnp.asarray([0.0, 0.7]), 0.4)
  np.testing.assert_array_equal(level, np.float32([0.4, 0.7]))
  np.testing.assert_array_equal(seen[1], x[1])
  noise = (seen[0] - 0.6 * x[0]) / 0.4
  other, _ = dina_reward.noised(-3.0 * x, jnp.zeros(2), 0.4)
  np.testing.assert_allclose((other + 1.8 * x) / 0.4, jnp.stack([noise] * 2), atol=1e-5)
  assert abs(float(noise.std()) - 1.0) < 0.1


def test_wrong_files_and_options_are_named(head, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(SIZES))
  options = {"path": str(tmp_path), "head": str(head), "taps": TAPS, "heads": 4}
  cases = [
    ({"head": str(tmp_path / "rm_head.pt")}, "no such file(.|\n)*weights_only=True"),
    ({"heads": 5}, "heads=5: must divide the head's width, 32"),
    ({"noise_level": 1.0}, "noise_level=1.0: must be above 0"),
    ({"taps": (4, 8, 12)}, r"taps=\(4, 8, 12\): are 3 blocks, and the head .* reads 2"),
    ({"taps": (4, 5)}, r"taps=\(4, 5\): must be below the 5 blocks"),
    ({"taps": (3, 1)}, "must be rising numbers"),
    ({"dtype": "float16"}, "dtype='float16': unknown name"),
    ({}, "no diffusion_pytorch_model.safetensors"),
  ]
  for changed, part in cases:
    with pytest.raises(ValueError, match=f"rewards.dina_lrm: .*{part}"):
      rewards.make_rewards({"dina_lrm": {"weight": 1.0, **options, **changed}})
  (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
  with pytest.raises(ValueError, match="holds a FluxTransformer2DModel, must hold the SD3"):
    rewards.make_rewards({"dina_lrm": {"weight": 1.0, **options}})


def test_a_server_of_pictures_does_not_serve_it():
  with pytest.raises(ValueError, match="--rewards: 'mine' takes latents"):
    build.read_specs(["mine"], '{"mine": {"make": "dina_lrm"}}')
