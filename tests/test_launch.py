"""Runs as users start them: `accelerate launch`, seed commands in bash, plain python, signals. A few launches in all.

Each launch is a module fixture (it costs ten seconds, most of them for imports); the tests look at what it left.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, draw_photos
from helpers import TEXT_TO_IMAGE
from servers import Hub, Loopback, RemoteEncoder

pytestmark = [pytest.mark.launch, pytest.mark.e2e, pytest.mark.slow, pytest.mark.scripts("i2i")]

TOKEN = "hf_canary_token_of_the_tests"
WEIGHTS = "pytorch_lora_weights.safetensors"

# The two text-to-image commands of the FLUX.2 guide as people paste them; $LATER holds the flags that make them quick.
DOG_COMMAND = """
accelerate launch train_dreambooth_lora_flux2.py \\
  --pretrained_model_name_or_path=$MODEL_NAME  \\
  --instance_data_dir=$INSTANCE_DIR \\
  --output_dir=$OUTPUT_DIR \\
  --do_fp8_training \\
  --gradient_checkpointing \\
  --remote_text_encoder \\
  --cache_latents \\
  --instance_prompt="a photo of sks dog" \\
  --resolution=1024 \\
  --train_batch_size=1 \\
  --guidance_scale=1 \\
  --use_8bit_adam \\
  --gradient_accumulation_steps=4 \\
  --optimizer="adamW" \\
  --learning_rate=1e-4 \\
  --report_to="wandb" \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=100 \\
  --max_train_steps=500 \\
  --validation_prompt="A photo of sks dog in a bucket" \\
  --validation_epochs=25 \\
  --seed="0" \\
  --push_to_hub $LATER
"""
PRODIGY_COMMAND = """
accelerate launch train_dreambooth_lora_flux2.py \\
  --pretrained_model_name_or_path=$MODEL_NAME  \\
  --instance_data_dir=$INSTANCE_DIR \\
  --output_dir=$OUTPUT_DIR \\
  --do_fp8_training \\
  --gradient_checkpointing \\
  --remote_text_encoder \\
  --cache_latents \\
  --instance_prompt="a photo of sks dog" \\
  --resolution=512 \\
  --train_batch_size=1 \\
  --guidance_scale=1 \\
  --gradient_accumulation_steps=4 \\
  --optimizer="prodigy" \\
  --learning_rate=1. \\
  --report_to="wandb" \\
  --lr_scheduler="constant_with_warmup" \\
  --lr_warmup_steps=100 \\
  --max_train_steps=500 \\
  --validation_prompt="A photo of sks dog in a bucket" \\
  --validation_epochs=25 \\
  --seed="0" \\
  --push_to_hub $LATER
"""
QUICK = "--max_train_steps 2 --resolution 64 --num_validation_images 1 --num_inference_steps 2"


def environment(home: Path, **changes: str) -> dict[str, str]:
    """This process's environment without its Hub settings, with this interpreter's programs first on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ACCELERATE_", "WANDB_"))}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": programs, "HF_HOME": str(home), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **changes}


def flags(folder: Path, photos: Path, *later: object) -> list[str]:
    """Quick steps on the embedded model; a later flag replaces an earlier one."""
    words = ["--pretrained_model_name_or_path", ROOT / "tiny_flux2", "--instance_data_dir", photos]
    words += ["--instance_prompt", "a photo of sks toy", "--output_dir", folder, "--resolution", 64, "--seed", 0]
    words += ["--max_train_steps", 3, "--rank", 4, "--max_sequence_length", 64, "--report_to", "none"]
    return [str(word) for word in [*words, "--dataloader_num_workers", 0, *later]]


def launch(*words: object, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    """Runs a command to its end and returns it with its output; both streams are in stdout."""
    command = [str(word) for word in words]
    return subprocess.run(command, cwd=cwd, env=environment(**changes), text=True, timeout=240, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def losses_of(folder: Path) -> list[float]:
    """The loss of each step in metrics.jsonl."""
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    header = path.read_bytes()
    return sorted(set(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])) - {"__metadata__"})


@pytest.fixture(scope="module")
def program(script) -> str:
    """The file name of each of the two scripts."""
    return Path(script.__file__).name


@pytest.fixture(scope="module")
def dog(tmp_path_factory) -> Path:
    """Photographs as `snapshot_download` leaves them, with a hidden folder beside them."""
    return draw_photos(tmp_path_factory.mktemp("dog") / "dog")


# ---------------------------------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory, dog):
    """(process, output folder, requests on the network) of the demo's command, shortened; nothing says offline."""
    tmp = tmp_path_factory.mktemp("demo")
    with Loopback() as network:
        proxies = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"], network.url)
        process = launch(
            *("accelerate", "launch", "--config_file", "configs/accelerate/cpu.yaml", TEXT_TO_IMAGE),
            *("@configs/runs/demo_cpu.args", "--instance_data_dir", dog, "--output_dir", tmp / "lora"),
            *("--max_train_steps", 4, "--validation_steps", 2, "--num_inference_steps", 2),
            **{"home": tmp / "home", "NO_PROXY": "", "no_proxy": "", "HF_ENDPOINT": network.url, **proxies},
        )
        return process, tmp / "lora", [f"{request.method} {request.path}" for request in network.requests]


def test_the_demo_ends_well_and_says_where_everything_is(demo):
    process, folder, _ = demo
    assert process.returncode == 0, process.stdout
    ending = process.stdout[process.stdout.index("INFO    done\n") :]
    shown = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in ending.splitlines()[1:9])
    assert (shown["LoRA"], shown["images"]) == (str(folder / WEIGHTS), str(folder / "samples"))
    assert shown["steps"] == "4" and float(shown["seconds per step"]) > 0
    assert float(shown["loss, running mean"]) > 0 and shown["peak memory"].endswith(" GB")
    assert len(losses_of(folder)) == 4


def test_the_demo_prints_no_warning_of_a_library(demo):
    process, _, _ = demo
    noise = [line for line in process.stdout.splitlines() if "Warning" in line or "warn(" in line]
    assert noise == []


def test_a_run_that_does_not_push_asks_nothing_of_the_network(demo):
    process, _, requests = demo
    assert process.returncode == 0, process.stdout
    assert requests == []


def test_the_settings_of_a_run_are_the_words_of_the_same_run(demo, t2i):
    _, folder, _ = demo
    args = t2i.parse_args([f"@{folder / 'config.args'}", "--overwrite_output_dir"])
    assert (args.max_train_steps, args.rank, args.seed, args.resolution) == (4, 32, 0, 128)
    assert args.output_dir == str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The commands of the guide
# ---------------------------------------------------------------------------------------------------------------------


def run_guide_command(command: str, tmp: Path, dog: Path, output: str) -> tuple:
    """(process, folder, hub, encoder) of a command of the guide, the script copied alone into an empty folder."""
    here = tmp / "here"
    here.mkdir()
    shutil.copy(ROOT / TEXT_TO_IMAGE, here)
    shutil.copytree(dog, here / "dog")
    with Hub() as hub, RemoteEncoder() as encoder:
        names = {"MODEL_NAME": str(ROOT / "tiny_flux2"), "INSTANCE_DIR": "dog", "OUTPUT_DIR": output}
        names["LATER"] = f"{QUICK} --remote_text_encoder_url {encoder.predict_url}"
        process = launch("bash", "-e", "-c", command, cwd=here, home=tmp / "home", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN,
                         HF_HUB_DISABLE_XET="1", NO_PROXY="*", **names)  # fmt: skip
        return process, here / output, hub, encoder


@pytest.fixture(scope="module")
def guide_dog(tmp_path_factory, dog):
    """The first command, without any accelerate config."""
    return run_guide_command(DOG_COMMAND, tmp_path_factory.mktemp("guide1"), dog, "trained-flux2")


@pytest.fixture(scope="module")
def guide_prodigy(tmp_path_factory, dog):
    """The second command, after `write_basic_config()`."""
    from accelerate.utils import write_basic_config

    tmp = tmp_path_factory.mktemp("guide2")
    config = tmp / "home" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    assert write_basic_config(save_location=str(config))
    return run_guide_command(PRODIGY_COMMAND, tmp, dog, "trained-flux2-lora")


@pytest.fixture(params=["guide_dog", "guide_prodigy"])
def guide(request):
    """Each of the two commands."""
    return request.getfixturevalue(request.param)


def test_a_command_of_the_guide_leaves_the_promised_files(guide):
    process, folder, _, _ = guide
    assert process.returncode == 0, process.stdout
    present = {path.name for path in folder.iterdir()}
    assert present >= {WEIGHTS, "README.md", "config.args", "samples", "metrics.jsonl", "checkpoint-2"}
    assert "comfyui_lora.safetensors" in present
    assert len(losses_of(folder)) == 2
    assert (folder / "samples" / "contact_sheet.png").is_file()
    assert [path.name for path in (folder / "samples" / "step-000000").iterdir()] == ["prompt-0_image-0.png"]
    assert (folder / "samples" / "final" / "prompt-0_image-0.png").is_file()


def test_a_command_of_the_guide_uploads_its_result_to_a_private_repository(guide):
    process, folder, hub, _ = guide
    assert process.returncode == 0, process.stdout
    assert [(body["name"], body["visibility"]) for body in hub.created] == [(folder.name, "private")]
    assert hub.files[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    top = {name.split("/")[0] for name in hub.files}
    assert top == {WEIGHTS, "comfyui_lora.safetensors", "README.md", "config.args", "samples"}


def test_a_command_of_the_guide_asks_the_remote_encoder_for_two_prompts(guide):
    _, _, _, encoder = guide
    assert sorted(encoder.prompts) == ["A photo of sks dog in a bucket", "a photo of sks dog"]


def test_a_command_of_the_guide_is_tracked_by_wandb(guide):
    _, folder, _, _ = guide
    runs = list(folder.parent.rglob("offline-run-*"))
    assert len(runs) == 1 and list(runs[0].glob("*.wandb"))


def test_the_token_of_a_command_of_the_guide_is_in_no_file_and_in_no_line(guide):
    process, folder, _, _ = guide
    assert TOKEN not in process.stdout
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert len(files) > 20 and [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_warm_up_without_effect_is_said_so_where_the_guide_has_it(guide_dog, guide_prodigy):
    assert "--lr_warmup_steps has no effect" in guide_dog[0].stdout
    assert "--lr_warmup_steps has no effect" not in guide_prodigy[0].stdout
    assert "WARNING plan: --lr_warmup_steps 100 in 2 steps" in guide_prodigy[0].stdout


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, program, dog, reference_flags):
    """(process, output folder) of a launch whose accelerate config has a dynamo backend."""
    tmp = tmp_path_factory.mktemp("compiled")
    text = (ROOT / "configs" / "accelerate" / "cpu.yaml").read_text()
    (tmp / "eager.yaml").write_text(f"{text}\ndynamo_config:\n  dynamo_backend: EAGER\n")
    words = ["accelerate", "launch", "--config_file", tmp / "eager.yaml", program]
    words += flags(tmp / "out", dog, *reference_flags)
    says_what_it_compiles = {"HF_HUB_OFFLINE": "1", "TORCH_LOGS": "dynamo"}
    return launch(*words, home=tmp / "home", **says_what_it_compiles), tmp / "out"


@pytest.mark.scripts("t2i")  # what is compiled is the same in both
def test_a_compiled_run_has_the_losses_of_a_plain_one(compiled, train, dog, reference_flags):
    process, folder = compiled
    assert process.returncode == 0, process.stdout
    assert "torchdynamo start tracing" in process.stdout
    plain = losses_of(train("--instance_data_dir", dog, *reference_flags))
    assert losses_of(folder) == pytest.approx(plain, rel=1e-4) and len(plain) == 3


@pytest.mark.scripts("t2i")  # what is compiled is the same in both
def test_a_compiled_run_saves_the_names_of_a_plain_one(compiled, train, dog):
    _, folder = compiled
    plain = tensor_names(train("--instance_data_dir", dog, "--max_train_steps", 1) / WEIGHTS)
    assert tensor_names(folder / WEIGHTS) == plain and len(plain) > 10
    assert [name for name in plain if "_orig_mod" in name] == []


# ---------------------------------------------------------------------------------------------------------------------
# Plain python
# ---------------------------------------------------------------------------------------------------------------------


def wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    """Waits until the condition holds; fails when the process ends before, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, program, dog, reference_flags):
    """(exit code, output, folder) of a long run by plain python that got a SIGTERM after some steps."""
    tmp = tmp_path_factory.mktemp("stopped")
    endless = (*reference_flags, "--max_train_steps", 10**6, "--hub_token", TOKEN)
    words = ["python", program, *flags(tmp / "a run", dog, *endless)]
    changes = environment(tmp / "home", HF_HUB_OFFLINE="1")
    with subprocess.Popen(
        words, cwd=ROOT, env=changes, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        metrics = tmp / "a run" / "metrics.jsonl"
        try:
            wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= 2, run)
            run.send_signal(signal.SIGTERM)
            output = run.communicate(timeout=60)[0]
        finally:
            run.kill()
    return run.returncode, output, tmp / "a run"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
def test_a_sigterm_saves_a_checkpoint_of_the_last_step_and_exits_with_143(stopped, script):
    code, output, folder = stopped
    assert code == 143, output
    steps = len(losses_of(folder))
    assert script.verify_checkpoint(folder / f"checkpoint-{steps}") is None
    assert not (folder / WEIGHTS).exists()  # the run is not finished
    assert "Traceback" not in output


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
def test_the_printed_line_goes_on_with_the_run_and_does_not_tell_the_token(stopped):
    _, output, folder = stopped
    line = next(line for line in output.splitlines() if line.strip().endswith("--resume_from_checkpoint latest"))
    assert TOKEN not in output
    done = len(losses_of(folder))
    words = [*shlex.split(line), "--max_train_steps", str(done + 2)]
    process = launch(*words, home=folder.parent / "home", HF_HUB_OFFLINE="1")
    assert process.returncode == 0, process.stdout
    assert f"at step {done}" in process.stdout
    assert len(losses_of(folder)) == done + 2 and (folder / WEIGHTS).is_file()


def test_a_data_error_of_a_program_is_one_message_and_exit_code_2(program, tmp_path):
    (tmp_path / "empty").mkdir()
    process = launch("python", program, *flags(tmp_path / "out", tmp_path / "empty"), home=tmp_path)
    assert process.returncode == 2, process.stdout
    assert "error: --instance_data_dir" in process.stdout and "no image" in process.stdout
    assert "Traceback" not in process.stdout


@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX")
def test_a_sigterm_to_the_whole_process_group_saves_a_checkpoint_and_exits_with_143(
    program, tmp_path, photos, reference_flags
):
    """As Slurm, systemd and `timeout` send it: the loader's workers get it too and must not end the run."""
    out = tmp_path / "out"
    words = ["--pretrained_model_name_or_path", "tiny_flux2", "--instance_data_dir", photos, *reference_flags]
    words += ["--instance_prompt", "a toy"]
    words += ["--resolution", "64", "--rank", "4", "--max_sequence_length", "64", "--max_train_steps", "100000"]
    words += ["--output_dir", out, "--report_to", "none", "--dataloader_num_workers", "2"]
    command = [sys.executable, program, *map(str, words)]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGTERM)
    errors = run.communicate(timeout=60)[1]
    assert run.returncode == 143, errors
    assert errors.count("SIGTERM") == 1 and list(out.glob("checkpoint-*/manifest.json")), errors
