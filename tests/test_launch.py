"""launch/: well-formed scripts, the commands they would run, a manifest that fits, a real local run."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TPU = {
  "NAME": "pod",
  "ZONE": "zone-a",
  "ACCELERATOR": "v6e-16",
  "RUNTIME": "runtime",
  "DRY_RUN": "1",
}
SMALL = (
  "--config.train.epochs=1", "--config.train.prompts_per_epoch=2", "--config.train.group_size=4",
  "--config.train.microbatch=8", "--config.train.updates_per_epoch=1", "--config.eval.prompts=8",
  "--config.eval.batch=8",
)  # fmt: skip


def launch(script, *arguments, timeout=30, **environment):
  """The finished process of a script that sees `environment` beside our own."""
  return subprocess.run(
    ["bash", LAUNCH / script, *arguments],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )


def commands(done):
  """The commands that a dry run printed, one a line, as lists of words."""
  assert done.returncode == 0, done.stderr
  script = "".join(f"printf '%s\\0' {line}\necho\n" for line in done.stdout.splitlines())
  words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
  return [line.split("\0") for line in words.split("\0\n") if line]


def stand_in(folder, name, script):
  """An executable of that name, found first, that logs its arguments and runs `script`."""
  path = folder / name
  path.write_text(f'#!/usr/bin/env bash\necho "$(basename "$0") $*" >>{folder}/log\n{script}\n')
  path.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_well_formed(script):
  subprocess.run(["bash", "-n", script], check=True)
  shellcheck = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  )
  assert shellcheck, "pip install -e '.[test]'"
  done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout
  assert os.access(script, os.X_OK)


# local.sh


@pytest.mark.slow
def test_two_local_processes_train_one_run(tmp_path):
  done = launch(
    "local.sh", "configs/tiny_text.py:flow_grpo", *SMALL, f"--config.run.dir={tmp_path / 'run'}",
    PYTHON=sys.executable, PROCESSES="2", DEVICES="2", PYTHONPATH=str(ROOT), timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  state = tmp_path / "run" / "checkpoints" / "1" / "state"
  assert {"ocdbt.process_0", "ocdbt.process_1"} <= {path.name for path in state.iterdir()}
  rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
  assert [row["kind"] for row in rows] == ["eval", "train", "eval", "judge"]


@pytest.fixture
def fake_python(tmp_path):
  """Returns the shell text of a process, which knows its $id -> an interpreter for local.sh."""

  def make(script):
    stand_in(
      tmp_path,
      "python",
      'if [[ "$1" == -c ]]; then echo 1234; exit; fi\nid="${*: -1}"; id="${id##*=}"\n' + script,
    )
    return str(tmp_path / "python")

  return make


def test_local_processes_have_a_gpu_each_and_one_coordinator(fake_python):
  show = 'echo "$CUDA_VISIBLE_DEVICES $*"'
  done = launch(
    "local.sh", "recipe.py", "--config.seed=1",
    PYTHON=fake_python(show), PROCESSES="2", CUDA_VISIBLE_DEVICES="4,6",
  )  # fmt: skip
  given = "-m tpgrpo_jax.train --config recipe.py --config.seed=1"
  meet = "--config.distributed.coordinator=localhost:1234 --config.distributed.num_processes=2"
  assert sorted(done.stdout.splitlines()) == [
    f"4 {given} {meet} --config.distributed.process_id=0",
    f"[1] 6 {given} {meet} --config.distributed.process_id=1",
  ]


def test_virtual_devices_are_shared_out(fake_python):
  python = fake_python('echo "$JAX_PLATFORMS $XLA_FLAGS"')
  done = launch("local.sh", PYTHON=python, PROCESSES="2", DEVICES="6", XLA_FLAGS="--xla_x")
  assert set(done.stdout.splitlines()) == {
    f"{prefix}cpu --xla_x --xla_force_host_platform_device_count=3" for prefix in ("", "[1] ")
  }
  refused = launch("local.sh", PYTHON=python, PROCESSES="2", DEVICES="3")
  assert refused.returncode == 2 and "DEVICES=3" in refused.stderr


def test_first_failure_stops_the_others_and_is_the_status(fake_python):
  python = fake_python("((id == 1)) && exit 7\nexec sleep 100")
  done = launch("local.sh", PYTHON=python, PROCESSES="3")
  assert done.returncode == 7, done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_reaches_every_local_process(fake_python, tmp_path, name):
  # The second takes longer to save: that the first has ended must not stop it.
  python = fake_python(
    f"sleep 100 &\ntrap 'sleep $id; touch {tmp_path}/heard$id; kill $!; exit 143' {name}\n"
    f"touch {tmp_path}/ready$id\nwait"  # which a signal ends; bash may forget one while it waits for sleep
  )
  environment = os.environ | {"PYTHON": python, "PROCESSES": "2"}
  # Where the tests themselves run in the background, SIGINT is ignored, and bash could not take it.
  heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
  script = subprocess.Popen(["bash", LAUNCH / "local.sh"], env=environment, preexec_fn=heard)
  end = time.monotonic() + 120
  while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < end:
    time.sleep(0.1)
  script.send_signal(signal.Signals[name])
  assert script.wait(timeout=30) == 143
  assert sorted(path.name for path in tmp_path.glob("heard*")) == ["heard0", "heard1"]


# slurm.sh


def test_slurm_job_starts_a_process_per_task():
  done = launch("slurm.sh", "recipe.py", "--config.run.dir=a b", DRY_RUN="1")
  (srun,) = commands(done)
  train = [".venv/bin/python", "-m", "tpgrpo_jax.train", "--config", "recipe.py"]
  assert srun[0] == "srun" and srun[-6:] == [*train, "--config.run.dir=a b"]


def test_slurm_process_per_node_has_all_gpus_of_the_node():
  done = launch("slurm.sh", DRY_RUN="1", SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="4")
  assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3" in commands(done)[0]


@pytest.mark.parametrize(
  "status, state, requeued",
  [(143, "RUNNING", True), (143, "CANCELLED", False), (1, "RUNNING", False), (0, "RUNNING", False)],
)
def test_slurm_job_that_saved_and_was_not_cancelled_is_queued_again(
  tmp_path, status, state, requeued
):
  stand_in(tmp_path, "srun", f"exit {status}")
  stand_in(tmp_path, "squeue", f"echo {state}")
  stand_in(tmp_path, "scontrol", "")
  path = f"{tmp_path}:{os.environ['PATH']}"
  done = launch("slurm.sh", PATH=path, SLURM_JOB_ID="12", SLURM_SUBMIT_DIR=str(tmp_path))
  assert done.returncode == status
  assert ("scontrol requeue 12" in (tmp_path / "log").read_text()) == requeued


# tpu_pod.sh


def test_tpu_pod_is_created_installed_and_deleted():
  created = commands(launch("tpu_pod.sh", "create", SPOT="1", **TPU))[0]
  assert created[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
  assert {"pod", "--zone=zone-a", "--accelerator-type=v6e-16", "--spot"} <= set(created)
  _, copied, installed = commands(launch("tpu_pod.sh", "install", **TPU))
  assert "scp" in copied
  for command in (copied, installed):
    assert "--worker=all" in command
  assert "[ocr,gcs,tpu]" in installed[-1]
  (deleted,) = commands(launch("tpu_pod.sh", "delete", **TPU))
  assert deleted[4:6] == ["delete", "pod"] and "--force" in deleted


def test_tpu_hosts_run_the_arguments_as_they_were_given(tmp_path):
  given = ["recipe.py", "--config.run.dir=a b", "--config.prompts.path=it's"]
  (ssh,) = commands(launch("tpu_pod.sh", "start", *given, **TPU))
  assert "--worker=all" in ssh
  host = tmp_path / "tpgrpo_jax"
  (host / ".venv" / "bin").mkdir(parents=True)
  stand_in(host / ".venv" / "bin", "python", 'printf "%s\\n" "$@"')
  remote = ssh[-1].removeprefix("--command=") + "\nwait"
  subprocess.run(["bash", "-c", remote], cwd=tmp_path, check=True)
  assert (host / "train.log").read_text().splitlines()[3:] == given
  assert (host / "train.pid").read_text().strip().isdigit()


@pytest.mark.parametrize("verb", ["install", "start", "logs", "stop"])
def test_what_tpu_hosts_run_is_well_formed(verb):
  for command in commands(launch("tpu_pod.sh", verb, "recipe.py", **TPU)):
    if "ssh" in command:
      script = command[-1].removeprefix("--command=")
      subprocess.run(["bash", "-n", "-c", script], check=True)


def test_tpu_pod_without_a_known_verb_explains_itself():
  done = launch("tpu_pod.sh", "begin", **TPU)
  assert done.returncode == 2 and "launch/tpu_pod.sh create" in done.stdout


# gke_jobset.yaml


def test_jobset_is_one_indexed_job_that_restarts_as_a_whole():
  jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
  assert job["completions"] == job["parallelism"]
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
  (container,) = pod["containers"]
  width, height = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
  assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == width * height


def test_jobset_trains_a_recipe_in_a_bucket():
  jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
  pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  command = shlex.join(pod["containers"][0]["command"])
  assert command.startswith("python -m tpgrpo_jax.train --config configs/")
  assert (ROOT / pod["containers"][0]["command"][4]).is_file()
  assert "--config.run.dir=gs://BUCKET/" in command
  assert "gcs" in re.search(r"EXTRAS=(\S+)", (LAUNCH / "Dockerfile").read_text())[1].split(",")


# Reward servers


def test_slurm_reward_server_asks_for_a_token():
  done = launch(
    "serve_slurm.sh", "ocr", "--workers=4", DRY_RUN="1", PORT="8091", TOKEN_FILE="my token"
  )
  (srun,) = commands(done)
  serve = [".venv/bin/python", "-m", "tpgrpo_jax.serve", "--rewards", "ocr"]
  address = ["--host", "0.0.0.0", "--port", "8091", "--token_file", "my token"]
  assert srun[0] == "srun" and srun[-14:-3] == serve + address
  assert srun[-1] == "--workers=4"
  assert launch("serve_slurm.sh", DRY_RUN="1").returncode != 0


def test_slurm_reward_server_makes_a_token_of_its_own_and_says_where_it_is(tmp_path):
  stand_in(tmp_path, "srun", "")
  path = f"{tmp_path}:{os.environ['PATH']}"
  for _ in range(2):
    done = launch("serve_slurm.sh", "ocr", PATH=path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
  token = tmp_path / "reward.token"
  assert len(token.read_text()) == 64 and token.stat().st_mode & 0o077 == 0
  assert (tmp_path / "reward.url").read_text().strip().endswith(":8090")
  first, second = (line for line in (tmp_path / "log").read_text().splitlines())
  assert first == second and "--token_file reward.token" in first


def test_kubernetes_reward_server_is_ready_when_its_canary_is():
  deployment, service = yaml.safe_load_all((LAUNCH / "gke_rewards.yaml").read_text())
  assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
  pod = deployment["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  assert container["command"][:3] == ["python", "-m", "tpgrpo_jax.serve"]
  assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": 8090}
  (port,) = service["spec"]["ports"]
  assert port["targetPort"] == container["ports"][0]["containerPort"] == 8090
  drain = next(a for a in container["command"] if a.startswith("--drain="))
  assert int(drain.partition("=")[2]) < pod["terminationGracePeriodSeconds"]
  (volume,) = pod["volumes"]
  assert volume["secret"]["defaultMode"] == 0o400  # YAML's 0400 is octal
  mount = container["volumeMounts"][0]["mountPath"]
  assert f"--token_file={mount}/token" in container["command"]
