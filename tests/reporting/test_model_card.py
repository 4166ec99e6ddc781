"""The page of an exported model: what it says is the run's, and a hub gets all of it."""

import base64
import dataclasses
import http.server
import json
import shlex
import threading

import pytest
import yaml

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import version
from tpgrpo_jax.config import presets
from tpgrpo_jax.reporting import model_card

CONFIG = dataclasses.replace(
  presets.apply(
    presets.recipe("sd35m_ocr", "tempflow"),
    {"train.epochs": 7, "run.dir": "runs/mine", "sampler.shift": 2.0},
  ),
  seed=3,
)
JUDGED = {
  "epoch": 7, "kind": "judge", "prompts": 100,
  "base/reward/ocr/mean": 0.5, "base/reward/ocr/standard_error": 0.02,
  "last/reward/ocr/mean": 0.8, "last/reward/ocr/standard_error": 0.01,
  "last/gain/ocr/mean": 0.3, "last/gain/ocr/standard_error": 0.015,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
  folder = tmp_path / "mine"
  (folder / "images").mkdir(parents=True)
  for epoch in (0, 5, 7):
    (folder / "images" / f"eval_{epoch:05d}.png").write_bytes(b"picture %d" % epoch)
  (folder / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
  rows = [{"epoch": e, "kind": "eval", "reward/ocr/mean": 0.5 + 0.04 * e} for e in (0, 5)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, JUDGED]))
  return folder


def card_of(run_dir, output):
  output.mkdir()
  return model_card.write_card(run_dir, output, weights="ema", how="pipe.load()").read_text()


def test_the_page_has_base_model_method_gains_pictures_and_command(run_dir, tmp_path):
  text = card_of(run_dir, tmp_path / "out")
  front = yaml.safe_load(text.split("---")[1])
  assert front["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
  assert front["library_name"] == "diffusers" and "lora" in front["tags"]
  assert front["pipeline_tag"] == "text-to-image"
  assert "eprint = {2508.04324}" in text and f"version = {{{version.installed()}}}" in text
  assert "| ocr | 0.500 ± 0.039 | 0.800 ± 0.020 | 0.300 ± 0.029 |" in text
  assert presets.PAPERS["tempflow"] in text and "pipe.load()" in text
  assert (tmp_path / "out" / "before.png").read_bytes() == b"picture 0"
  assert (tmp_path / "out" / "after.png").read_bytes() == b"picture 7"


@pytest.mark.parametrize(
  "weights, strength, said",
  [
    ("ema", 1.0, ""),
    ("last", 1.0, "without average. Measured, and drawn below: the average (EMA)"),
    ("best", 0.5, "base + 0.5 (learned - base). Measured, and drawn below: the best weights"),
  ],
)
def test_the_page_says_of_which_weights_its_scores_are(run_dir, tmp_path, weights, strength, said):
  (tmp_path / "out").mkdir()
  path = model_card.write_card(
    run_dir, tmp_path / "out", weights=weights, how="", strength=strength
  )
  text = path.read_text()
  assert ("Exported: " in text) == bool(said) and said in text


@pytest.mark.parametrize("path", ["models/mine", "/models/mine"])
def test_a_model_of_this_machine_is_no_base_model_of_the_hub(run_dir, tmp_path, monkeypatch, path):
  (tmp_path / "models" / "mine").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  model = dataclasses.replace(CONFIG.model, path=path, variant="flux_kontext")
  config = dataclasses.replace(CONFIG, model=model)
  (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
  front = yaml.safe_load(card_of(run_dir, tmp_path / "out").split("---")[1])
  assert not {"base_model", "base_model_relation"} & {*front}
  assert front["pipeline_tag"] == "image-to-image"  # it edits


def test_a_run_that_was_not_judged_shows_its_evaluations(run_dir, tmp_path):
  lines = (run_dir / "metrics.jsonl").read_text().splitlines()
  (run_dir / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
  assert "| ocr | 0.500 | 0.700 |" in card_of(run_dir, tmp_path / "out")


def test_the_command_of_the_page_makes_the_runs_config():
  words = shlex.split(model_card.train_command(CONFIG).replace("\\\n", " "))
  assert words[:3] == ["tpgrpo", "train", "--config=sd35m_ocr:tempflow"]
  assert "--config.train.epochs=7" in words and "--config.seed=3" in words
  recipe = config_lib.to_config_dict(presets.recipe("sd35m_ocr", "tempflow"))
  for word in words[3:]:
    name, _, value = word.removeprefix("--config.").partition("=")
    kind = type(
      recipe.get_ref(name).get()
      if "." not in name
      else recipe[name.split(".")[0]][name.split(".")[1]]
    )
    recipe.update_from_flattened_dict({name: kind(value)})
  assert config_lib.from_config_dict(config_lib.Config, recipe) == CONFIG


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub as an upload needs; keeps what is committed."""

  files: dict = {}
  refuses = False
  asked: dict = {}  # of the repository that is made

  def do_POST(self):
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    if self.refuses:
      return self._answer({"error": "no"}, 403)
    if self.path.endswith("/repos/create"):
      self.asked |= json.loads(body)
      return self._answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/mine"})
    if "/preupload/" in self.path:
      names = [f["path"] for f in json.loads(body)["files"]]
      modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
      return self._answer({"files": modes})
    if "/commit/" in self.path:
      for line in map(json.loads, body.splitlines()):
        if line["key"] == "file":
          self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
      return self._answer(
        {
          "commitUrl": f"http://127.0.0.1:{self.server.server_port}/me/mine/commit/1",
          "commitOid": "1",
          "success": True,
        }
      )
    return self._answer({}, 200)

  def do_GET(self):
    if self.refuses:
      return self._answer({"error": "no"}, 404)
    self._answer({"id": "me/mine", "sha": "1", "siblings": []})

  def _answer(self, content, status=200):
    data = json.dumps(content).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass


@pytest.fixture
def hub(monkeypatch):
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  monkeypatch.setattr(Hub, "files", {})
  monkeypatch.setattr(Hub, "asked", {})
  monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
  monkeypatch.setenv("HF_TOKEN", "hf_test")
  yield Hub
  server.shutdown()
  server.server_close()


def test_a_push_uploads_every_file_of_the_folder(hub, run_dir, tmp_path):
  text = card_of(run_dir, tmp_path / "out")
  (tmp_path / "out" / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
  model_card.push(tmp_path / "out", "me/mine")
  assert hub.files["README.md"].decode() == text
  assert hub.files["pytorch_lora_weights.safetensors"] == b"weights"
  assert {"run_config.json", "before.png", "after.png"} < {*hub.files}
  assert not hub.asked.get("private") and hub.asked.get("visibility") != "private"


def test_a_repository_is_made_private_where_that_is_asked_for(hub, tmp_path):
  (tmp_path / "README.md").write_text("page")
  model_card.push(tmp_path, "me/mine", private=True)
  assert hub.asked.get("private") or hub.asked.get("visibility") == "private"


def test_a_push_that_is_refused_says_so_and_where_the_files_are(hub, monkeypatch, tmp_path):
  monkeypatch.setattr(hub, "refuses", True)
  (tmp_path / "README.md").write_text("page")
  with pytest.raises(ValueError, match="--push='me/mine': could not be uploaded") as caught:
    model_card.push(tmp_path, "me/mine")
  assert str(tmp_path) in str(caught.value)
