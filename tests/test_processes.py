"""Several processes: the same run, faster. `accelerate launch` on the CPU with gloo, one launch for many runs.

Every test asserts how many processes there really were, and of FSDP that base weights are DTensors: accelerate starts a
wrong number of processes, or shards nothing, without a word.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import PartialState
from conftest import ROOT, SCRIPTS, draw_photo, draw_photos, draw_references
from runs import LORA, column, lora
from safetensors.torch import load_file, save_file
from test_launch import environment, launch

pytestmark = [pytest.mark.launch, pytest.mark.e2e, pytest.mark.slow]

CONFIGS = ROOT / "configs" / "accelerate"
BUCKETS = ("--aspect_ratio_buckets", "64,64;64,96;96,64")
STEPS = 20


# ---- the data: captions, several shapes, class images, references of one size ----


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Captioned photographs, class images and references."""
    folder = tmp_path_factory.mktemp("data")
    photos = draw_photos(folder / "photos", count=7)
    for number, path in enumerate(sorted(photos.glob("*.jpg"))):
        if number % 3 != 2:
            path.with_suffix(".txt").write_text(f"a [trigger] number {number}", encoding="utf-8")
    draw_references(folder / "references", size=(72, 72))
    for number in (5, 6):
        draw_photo(folder / "references" / f"{number:02d}.png", (72, 72), 100 + number)
    return {"photos": photos, "classes": draw_photos(folder / "classes", count=4, seed=50),
            "references": folder / "references", "tiny": ROOT / "tiny_flux2"}  # fmt: skip


def flags_of(data: dict[str, Path], name: str, folder: Path, *later: object) -> list[str]:
    """A quick command line of a script; both scripts with what only they have."""
    words = ["--pretrained_model_name_or_path", data["tiny"], "--instance_data_dir", data["photos"]]
    words += ["--instance_prompt", "sks toy", "--output_dir", folder, "--resolution", 64, "--max_sequence_length", 64]
    words += ["--rank", 4, "--seed", 3, "--max_train_steps", 12, "--report_to", "none", "--dataloader_num_workers", 0]
    words += ["--upcast_before_saving", "--learning_rate", "1e-3"]
    words += ["--cond_data_dir", data["references"]] if name == "i2i" else []
    return [str(word) for word in [*words, *later]]


PRIOR = ("--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", 4, "--prior_loss_weight", 0.5)


def everything(data: dict[str, Path], name: str) -> list[object]:
    """Captions are in the data; buckets, flips, caption dropout, and what only one script has."""
    own = ["--cond_dropout", 0.3] if name == "i2i" else [*PRIOR, "--class_data_dir", data["classes"]]
    return [*BUCKETS, "--random_flip", "--caption_dropout", 0.2, *own]


class Tasks:
    """Runs for `ranks_driver.py`, in one launch."""

    def __init__(self, folder: Path, data: dict[str, Path]) -> None:
        self.folder, self.data, self.tasks = folder, data, []

    def add(
        self, name: str, script: str, *flags: object, environment: dict | None = None, fails: str | None = None
    ) -> Path:
        """Adds a run; returns its output folder."""
        output = self.folder / name
        words = flags_of(self.data, script, output, *flags)
        task = {"name": name, "script": SCRIPTS[script], "flags": words, "environment": environment or {}}
        self.tasks.append({**task, "fails": fails})
        return output

    def launch(self, config: Path, *options: object, timeout: float = 900) -> list[dict]:
        """Runs them all; returns what each process saw, by task."""
        (self.folder / "tasks.json").write_text(json.dumps(self.tasks))
        path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{ROOT / 'tools'}"
        command = ["accelerate", "launch", "--config_file", config, *options, "tests/ranks_driver.py"]
        process = subprocess.run(
            [str(word) for word in [*command, self.folder / "tasks.json"]], cwd=ROOT, text=True, timeout=timeout,
            env={**environment(self.folder / "home"), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.returncode == 0, process.stdout[-6000:]
        seen = [json.loads(path.read_text()) for path in sorted(self.folder.glob("seen-*.json"))]
        started = yaml.safe_load(Path(config).read_text())
        for view in (view for per_task in seen for view in per_task.values()):
            assert view["processes"] == len(seen) == started["num_processes"]
            assert bool(view["sharded"]) == (started["distributed_type"] == "FSDP")
        return seen


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_cpu(folder: Path, name: str, processes: int) -> Path:
    """A copy of a shipped accelerate config for so many processes on the CPU, with a free port."""
    config = yaml.safe_load((CONFIGS / name).read_text())
    assert config["num_processes"] in (8, 16), "the shipped file is for real GPUs"
    config.update(use_cpu=True, num_processes=processes, mixed_precision="no", main_process_port=free_port())
    del config["gpu_ids"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return path


def alone(data: dict[str, Path], name: str, folder: Path, *flags: object) -> Path:
    """The same run in this process alone."""
    import conftest

    script = conftest.load_script(name)
    script.main(script.parse_args(flags_of(data, name, folder, *flags)))
    return folder


def assert_same_training(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    """Losses agree to a relative tolerance; the LoRAs' difference has that relative L2 norm at most."""
    one, other = torch.tensor(column(first, "loss")), torch.tensor(column(second, "loss"))
    assert len(one) == len(other) >= 8
    torch.testing.assert_close(one, other, rtol=tolerance, atol=0)
    first_lora, second_lora = (torch.cat([t.flatten() for _, t in sorted(lora(f).items())]) for f in (first, second))
    assert (first_lora - second_lora).norm() <= tolerance * first_lora.norm()
    assert first_lora.norm() > 0


# ---- two processes, each with the whole model: configs/accelerate/multi_gpu.yaml ----

OPTIMIZERS = {
    "adam8": ("--use_8bit_adam", "--rank", 32),
    "prodigy": ("--optimizer", "prodigy", "--learning_rate", 1, "--rank", 8),
}


def poisoned(data: dict[str, Path], folder: Path) -> tuple[object, ...]:
    """The flags of a run of which one image's cached latents are not numbers; the cache is made if it is missing."""
    flags = ("--cache_latents", "--latents_cache_dir", folder / "cache")
    if not folder.is_dir():
        alone(data, "t2i", folder / "out", *flags, "--max_train_steps", 1)
        victim = sorted((folder / "cache" / "latents").glob("*.safetensors"))[0]
        save_file({name: tensor * float("nan") for name, tensor in load_file(victim).items()}, victim)
    return flags


@pytest.fixture(scope="module")
def two(tmp_path_factory, data):
    """(folder, what each process saw) of all runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    tasks = Tasks(folder, data)
    for name in SCRIPTS:
        tasks.add(
            f"{name}-everything", name, *everything(data, name), "--train_batch_size", 2, "--max_train_steps", STEPS
        )
    tasks.add("accumulated", "t2i", "--gradient_accumulation_steps", 2)
    for optimizer, flags in OPTIMIZERS.items():
        tasks.add(optimizer, "t2i", *flags, "--train_batch_size", 2)
    drawing = ("--validation_prompt", "a toy", "a cat", "--validation_steps", 3, "--num_inference_steps", 2,
               "--num_validation_images", 3)  # fmt: skip
    tasks.add("drawn", "t2i", *drawing, "--max_train_steps", 8)
    tasks.add("not-drawn", "t2i", "--max_train_steps", 8)
    tasks.add("not-drawn-by-one", "t2i", *drawing, "--max_train_steps", 8, fails="make_pipeline")
    tasks.add("unseeded", "t2i", "--seed", 1, "--max_train_steps", 1)
    seedless = tasks.tasks[-1]["flags"]
    del seedless[seedless.index("--seed") : seedless.index("--seed") + 2]
    del seedless[seedless.index("--seed") : seedless.index("--seed") + 2]
    tasks.add("cached", "t2i", *everything(data, "t2i"), "--cache_latents", "--max_train_steps", 2)
    classes = folder / "made"
    tasks.add("made-classes", "t2i", *PRIOR, "--class_data_dir", classes, "--num_class_images", 5,
              "--sample_batch_size", 2, "--num_inference_steps", 2, "--max_train_steps", 1)  # fmt: skip
    tasks.add("fp8", "t2i", "--do_fp8_training", "--max_train_steps", 8)
    tasks.add("poisoned", "t2i", *poisoned(data, folder / "poison"))
    started = alone(data, "t2i", folder / "resumed", *BUCKETS, "--train_batch_size", 2, "--max_train_steps", 4)
    assert (started / "checkpoint-4").is_dir()
    tasks.add("resumed", "t2i", *BUCKETS, "--max_train_steps", 10, "--resume_from_checkpoint", "latest")
    tasks.add("encoder", "t2i", "--fsdp_text_encoder", "--max_train_steps", 1,
              "--validation_prompt", "one", "two", "three", "--num_validation_images", 0)  # fmt: skip
    return folder, tasks.launch(on_cpu(folder, "multi_gpu.yaml", 2))


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_with_half_the_batch_train_the_same_lora(two, data, name, tmp_path):
    """20 steps with captions, buckets, flips, dropout of captions and references, class images."""
    folder, seen = two
    assert [view[f"{name}-everything"]["processes"] for view in seen] == [2, 2]
    single = alone(data, name, tmp_path / "one", *everything(data, name), "--train_batch_size", 4,
                   "--max_train_steps", STEPS)  # fmt: skip
    assert len(column(single, "loss")) == STEPS
    assert_same_training(single, folder / f"{name}-everything")


def test_accumulation_can_stand_for_processes_in_one_bucket(two, data, tmp_path):
    folder, seen = two
    assert len(seen) == 2
    single = alone(data, "t2i", tmp_path / "one", "--gradient_accumulation_steps", 4)
    assert_same_training(single, folder / "accumulated")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_eight_bit_adam_and_prodigy_step_alike_on_every_process(two, data, optimizer, tmp_path):
    folder, seen = two
    assert len(seen) == 2
    single = alone(data, "t2i", tmp_path / "one", *OPTIMIZERS[optimizer], "--train_batch_size", 4)
    # 8-bit moments round: a gradient's last bit may move one by a step of its map
    assert_same_training(single, folder / optimizer, tolerance=2e-3 if optimizer == "adam8" else 1e-5)


def test_a_sample_that_is_not_finite_on_one_process_skips_the_step_on_both(two, data, tmp_path):
    """The other one had good numbers; had it stepped, the two would train different LoRAs from there on."""
    folder, seen = two
    assert [view["poisoned"]["processes"] for view in seen] == [2, 2]
    single = alone(data, "t2i", tmp_path / "one", *poisoned(data, folder / "poison"), "--train_batch_size", 2)
    one, other = (torch.tensor(column(run, "loss")) for run in (single, folder / "poisoned"))
    assert 1 <= other.isnan().sum() < len(other) - 1
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0, equal_nan=True)
    first, second = (
        torch.cat([t.flatten() for _, t in sorted(lora(f).items())]) for f in (single, folder / "poisoned")
    )
    assert first.norm() > 0 and (first - second).norm() <= 1e-5 * first.norm()


def test_images_are_shared_out_and_drawing_them_does_not_change_training(two, data, tmp_path):
    folder, seen = two
    assert column(folder / "drawn", "loss") == column(folder / "not-drawn", "loss")
    assert (folder / "drawn" / LORA).read_bytes() == (folder / "not-drawn" / LORA).read_bytes()
    single = alone(data, "t2i", tmp_path / "one", "--validation_prompt", "a toy", "a cat", "--num_inference_steps", 2,
                   "--num_validation_images", 3, "--max_train_steps", 1, "--validation_steps", 5)  # fmt: skip
    names = {f"prompt-{row}_image-{number}.png" for row in range(2) for number in range(3)}
    for step in ("step-000000", "step-000003", "step-000006"):
        assert {path.name for path in (folder / "drawn/samples" / step).iterdir()} == names
    for name in names:
        first, second = (path / "samples/step-000000" / name for path in (single, folder / "drawn"))
        assert first.read_bytes() == second.read_bytes(), name
    assert (folder / "drawn/samples/contact_sheet.png").is_file()


def test_a_process_that_cannot_draw_keeps_the_others_in_step(two):
    """It fails before its first image, as for want of memory; both go on training, and nobody waits for ever."""
    folder, seen = two
    assert [view["not-drawn-by-one"]["processes"] for view in seen] == [2, 2]
    assert column(folder / "not-drawn-by-one", "loss") == column(folder / "not-drawn", "loss")
    assert len(list((folder / "not-drawn-by-one/samples/step-000003").iterdir())) == 3  # the first one's half


def test_processes_without_a_seed_agree_on_one(two):
    _, seen = two
    seeds = {view["unseeded"]["seed"] for view in seen}
    assert len(seeds) == 1 and seeds != {3}


def test_prompts_images_and_class_images_are_made_once_over_all_processes(two, data):
    folder, seen = two
    parts = [view["t2i-everything"]["encoded"] for view in seen]
    assert all(parts) and abs(len(parts[0]) - len(parts[1])) <= 1
    assert len(set(parts[0] + parts[1])) == len(parts[0] + parts[1]) == 8  # 5 captions, prompt, class, empty
    assert len(list((folder / "cached/cache/latents").glob("*.safetensors"))) == 2 * (7 + 4)
    assert sorted(path.name for path in (folder / "made").glob("*")) == [f"class-{n:05d}.png" for n in range(5)]


def test_a_run_goes_on_with_another_number_of_processes(two, data, tmp_path):
    """Four steps alone with a batch of 2, then two processes with a batch of 1: as ten steps alone."""
    folder, _ = two
    single = alone(data, "t2i", tmp_path / "one", *BUCKETS, "--train_batch_size", 2, "--max_train_steps", 10)
    assert column(folder / "resumed", "step") == list(range(1, 11))
    assert_same_training(single, folder / "resumed")


def test_a_sharded_text_encoder_gives_the_same_embeddings(two):
    """Prompts go in lock-step: an odd one out is encoded by both."""
    folder, seen = two
    views = [view["encoder"] for view in seen]
    assert all(view["encoder_sharded"] > 0 for view in views)
    assert len(views[0]["encoded"]) == len(views[1]["encoded"])
    cached = {path.name: path for path in (folder / "accumulated/cache/prompts").iterdir()}
    sharded = {path.name: path for path in (folder / "encoder/cache/prompts").iterdir()}
    assert len(sharded) == len(cached) + 3
    for file, path in cached.items():
        assert torch.equal(load_file(path)["tensor"], load_file(sharded[file])["tensor"])


# ---- FSDP2: configs/accelerate/fsdp2.yaml ----

# computed in the dtype of the input: products in bf16 depend on the batch by more than 1e-5
BNB = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "eager", "FSDP_ACTIVATION_CHECKPOINTING": "true"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, data, tiny_klein):
    """(folder, what each process saw) of all runs of two processes with FSDP2."""
    folder = tmp_path_factory.mktemp("sharded")
    tasks = Tasks(folder, data)
    eager = {"FSDP_ACTIVATION_CHECKPOINTING": "false"}
    for name in SCRIPTS:
        own = [] if name == "i2i" else [*PRIOR, "--class_data_dir", data["classes"]]
        tasks.add(f"{name}-everything", name, *BUCKETS, "--random_flip", "--train_batch_size", 2, *own,
                  "--gradient_accumulation_steps", 2, "--max_grad_norm", 0.01)  # fmt: skip
    tasks.add("not-checkpointed", "t2i", "--train_batch_size", 2, environment=eager)
    tasks.add("fp8", "t2i", "--do_fp8_training", "--max_train_steps", 8)
    for kind in BNB:
        (folder / f"{kind}.json").write_text(json.dumps(BNB[kind]))
        tasks.add(kind, "t2i", "--bnb_quantization_config_path", folder / f"{kind}.json", "--max_train_steps", 8)
    tasks.add("compiled", "t2i", "--train_batch_size", 2, environment=COMPILED)
    tasks.add("drawn", "t2i", "--max_train_steps", 8, "--validation_prompt", "a toy", "a cat", "--validation_steps", 3,
              "--num_inference_steps", 2, "--num_validation_images", 1, "--train_batch_size", 2)  # fmt: skip
    tasks.add("made-classes", "t2i", *PRIOR, "--class_data_dir", folder / "made", "--num_class_images", 3,
              "--sample_batch_size", 1, "--num_inference_steps", 2, "--max_train_steps", 1)  # fmt: skip
    tasks.add("offloaded", "t2i", "--train_batch_size", 2, environment={"FSDP_OFFLOAD_PARAMS": "true"})
    tasks.add("klein", "t2i", "--pretrained_model_name_or_path", tiny_klein, "--fsdp_text_encoder",
              "--max_train_steps", 8)  # fmt: skip
    return folder, tasks.launch(on_cpu(folder, "fsdp2.yaml", 2))


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_sharded_processes_train_the_lora_of_one_whole_one(sharded, data, name, tmp_path):
    """With checkpointing (of the accelerate config), accumulation, clipping, buckets, flips, class images."""
    folder, seen = sharded
    for view in seen:
        view = view[f"{name}-everything"]
        assert view["processes"] == 2 and view["mesh"] == ["(2,)"] and view["lora_is_plain"]
        assert view["sharded"] and not view["whole_blocks"], "every weight of the blocks must be split"
    own = [] if name == "i2i" else [*PRIOR, "--class_data_dir", data["classes"]]
    single = alone(data, name, tmp_path / "one", *BUCKETS, "--random_flip", "--train_batch_size", 4, *own,
                   "--gradient_accumulation_steps", 2, "--max_grad_norm", 0.01)  # fmt: skip
    assert_same_training(single, folder / f"{name}-everything")
    assert min(column(single, "grad_norm")) > 0.01, "clipping must have an effect"


def test_checkpointing_compiling_and_offloading_change_nothing_when_sharded(sharded, data, tmp_path):
    folder, seen = sharded
    single = alone(data, "t2i", tmp_path / "one", "--train_batch_size", 4)
    for name, tolerance in (("not-checkpointed", 1e-5), ("offloaded", 1e-5), ("compiled", 1e-4)):
        assert all(view[name]["sharded"] for view in seen)
        assert_same_training(single, folder / name, tolerance)
    assert all(view["compiled"]["graphs"] > 0 for view in seen), "nothing was compiled"
    assert all(view["offloaded"]["graphs"] == 0 for view in seen)


def test_fp8_weights_are_sharded_and_train_as_whole_ones(sharded, two):
    """Compared with two processes that hold them whole: the FP8 rounding is the same, row by row."""
    folder, seen = sharded
    assert all(any("attn" in name for name in view["fp8"]["sharded"]) for view in seen)
    assert not any(view["fp8"]["sharded"] for view in two[1])
    assert_same_training(two[0] / "fp8", folder / "fp8")


@pytest.mark.parametrize("kind", BNB)
def test_bitsandbytes_weights_stay_whole_and_train_as_in_one_process(bnb_on_cpu, sharded, data, kind, tmp_path):
    """Under FSDP each process holds them all; what else the blocks have is split."""
    folder, seen = sharded
    for view in seen:
        assert len(view[kind]["whole_blocks"]) == 32 and view[kind]["sharded"]
        assert all(name.endswith("weight") and "norm" not in name for name in view[kind]["whole_blocks"])
    single = alone(data, "t2i", tmp_path / "one", "--bnb_quantization_config_path", folder / f"{kind}.json",
                   "--train_batch_size", 2, "--max_train_steps", 8)  # fmt: skip
    assert_same_training(single, folder / kind)


def test_sharded_processes_draw_in_lock_step(sharded, data, tmp_path):
    """Images for validation and of the class: the bytes that one process draws, up to rounding."""
    folder, _ = sharded
    names = sorted(path.relative_to(folder / "drawn").as_posix() for path in (folder / "drawn/samples").rglob("*.png"))
    assert sum("step-000003" in name for name in names) == 2 and sum("final/" in name for name in names) == 3
    assert len(list((folder / "made").glob("class-*.png"))) == 3
    quiet = alone(data, "t2i", tmp_path / "one", "--train_batch_size", 4, "--max_train_steps", 8)
    assert_same_training(quiet, folder / "drawn")


def test_klein_is_sharded_with_its_encoder(sharded, data, tiny_klein, tmp_path):
    folder, seen = sharded
    assert all(view["klein"]["encoder_sharded"] > 0 and view["klein"]["sharded"] for view in seen)
    model = ("--pretrained_model_name_or_path", tiny_klein, "--max_train_steps", 8, "--train_batch_size", 2)
    single = alone(data, "t2i", tmp_path / "one", *model)
    assert_same_training(single, folder / "klein")
    for path in (single / "cache/prompts").iterdir():
        other = folder / "klein/cache/prompts" / path.name
        assert torch.equal(load_file(path)["tensor"], load_file(other)["tensor"])


def test_checkpoints_of_one_two_and_sharded_processes_have_the_same_files_and_sizes(two, sharded, data, tmp_path):
    single = alone(data, "t2i", tmp_path / "one", "--train_batch_size", 4)
    folders = [single, two[0] / "accumulated", sharded[0] / "not-checkpointed"]
    listings = [{path.name: path.stat().st_size for path in (f / "checkpoint-12").iterdir()} for f in folders]
    tensors = [{name: size for name, size in files.items() if name.endswith("safetensors")} for files in listings]
    assert tensors[0] == tensors[1] == tensors[2] and len(tensors[0]) == 2
    assert listings[0].keys() == listings[1].keys() == listings[2].keys()
    base = sum(path.stat().st_size for path in (ROOT / "tiny_flux2/transformer").glob("*.safetensors"))
    assert tensors[0]["training_state.safetensors"] < base / 2


# ---- four processes, and two machines ----


def test_four_processes_with_a_batch_of_one_train_the_same_lora(data, tmp_path):
    tasks = Tasks(tmp_path, data)
    for name in SCRIPTS:
        tasks.add(name, name, *everything(data, name))
    seen = tasks.launch(on_cpu(tmp_path, "multi_gpu.yaml", 4))
    assert len(seen) == 4
    for name in SCRIPTS:
        single = alone(data, name, tmp_path / f"one-{name}", *everything(data, name), "--train_batch_size", 4)
        assert_same_training(single, tmp_path / name)


def test_two_machines_of_two_processes_shard_within_the_machine(data, tmp_path):
    """HYBRID_SHARD of configs/accelerate/fsdp2_multi_node.yaml: a mesh of 2 machines x 2 devices."""
    tasks = Tasks(tmp_path, data)
    tasks.add("hybrid", "t2i", *BUCKETS)
    config = on_cpu(tmp_path, "fsdp2_multi_node.yaml", 4)
    (tmp_path / "tasks.json").write_text(json.dumps(tasks.tasks))
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    machines = [
        subprocess.Popen(
            ["accelerate", "launch", "--config_file", str(config), "--machine_rank", str(rank),
             "--main_process_ip", "127.0.0.1", "tests/ranks_driver.py", str(tmp_path / "tasks.json")],
            cwd=ROOT, env={**environment(tmp_path / "home"), "PYTHONPATH": path}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text())["hybrid"] for rank in range(4)]
    assert [view["processes"] for view in seen] == [4] * 4
    assert all(view["mesh"] == ["(2, 2)"] and view["sharded"] and not view["whole_blocks"] for view in seen)
    single = alone(data, "t2i", tmp_path / "one", *BUCKETS, "--train_batch_size", 4)
    assert_same_training(single, tmp_path / "hybrid")


# ---- what stops a run ----


@pytest.mark.parametrize("lockstep, part, barriers", [(False, [3], 2), (True, [3, 3], 1)])
def test_in_lock_step_a_failure_does_not_wait_for_those_that_wait_for_its_weights(script, lockstep, part, barriers):
    """Else one process is in a barrier and the others in a gather of weights, until the time-out."""
    waits = []
    state = SimpleNamespace(num_processes=2, process_index=1)
    split = functools.partial(PartialState.split_between_processes, state)
    accelerator = SimpleNamespace(wait_for_everyone=lambda: waits.append(1), split_between_processes=split)
    run = SimpleNamespace(accelerator=accelerator)
    with pytest.raises(OSError, match="disk"), script.shared_out(run, [1, 2, 3], lockstep) as mine:
        assert mine == part
        raise OSError("disk")
    assert len(waits) == barriers


def test_processes_with_the_same_number_on_two_machines_do_not_write_to_one_temporary_file(
    script, tmp_path, monkeypatch
):
    names = []
    monkeypatch.setattr(os, "replace", lambda source, _: names.append(source))
    for _ in range(2):
        script.write_atomically(tmp_path / "checked_images.json", b"{}")
    assert len(set(names)) == 2


@pytest.mark.parametrize("flag, value, told", [("max_train_steps", 7, True), ("local_rank", 1, False)])
def test_a_process_with_another_flag_is_told_before_training(script, data, tmp_path, monkeypatch, flag, value, told):
    """One of fewer steps would end, and the others wait for it; --local_rank is the launcher's and may differ."""
    name = next(name for name, module in SCRIPTS.items() if module == script.__name__)
    args, numbers = script.parse_args(flags_of(data, name, tmp_path / "out")), []
    monkeypatch.setattr(script, "gather", lambda tensor: numbers.append(tensor) or torch.cat(numbers))
    run = SimpleNamespace(resume=None, device="cpu", args=args)
    script.check_agreement(run, {"data": 1})
    run.args = argparse.Namespace(**{**vars(args), flag: value})
    with pytest.raises(script.UserError, match="see other") if told else contextlib.nullcontext():
        script.check_agreement(run, {"data": 1})


FRAGMENT = """
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_offload_params: false
  fsdp_sharding_strategy: HYBRID_SHARD
  fsdp_auto_wrap_policy: TRANSFOMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Flux2TransformerBlock, Flux2SingleTransformerBlock
  fsdp_forward_prefetch: true
  fsdp_sync_module_states: false
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_use_orig_params: false
  fsdp_activation_checkpointing: true
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: bf16
use_cpu: true
"""


def test_the_guides_fsdp_fragment_stops_with_the_corrected_lines_once(data, tmp_path):
    config = tmp_path / "fragment.yaml"
    config.write_text(FRAGMENT + f"main_process_port: {free_port()}\n")
    words = flags_of(data, "t2i", tmp_path / "out")
    process = launch("accelerate", "launch", "--config_file", config, f"{SCRIPTS['t2i']}.py", *words, home=tmp_path)
    assert process.returncode != 0
    output = process.stdout
    assert output.count("write fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP") == 1
    assert output.count("fsdp_transformer_layer_cls_to_wrap: Flux2TransformerBlock,Flux2SingleTransformerBlock") == 1
    assert not (tmp_path / "out").exists()


LAUNCH_TWO = ("accelerate", "launch", "--config_file")
FAILING = """
import os, signal, sys
import train_dreambooth_lora_flux2 as script
original = script.{where}
def fail(*args, **kwargs):
    if os.environ["RANK"] == "1":
        {what}
    return original(*args, **kwargs)
script.{where} = fail
if __name__ == "__main__":
    script.main(script.parse_args())
"""


@pytest.mark.parametrize(
    "where, what, message",
    [
        ("encode_prompt", "raise RuntimeError('rank one fell over')", "rank one fell over"),
        ("average_over_processes", "os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
)
def test_a_process_that_fails_ends_the_whole_run_and_leaves_no_other_behind(data, where, what, message, tmp_path):
    program = tmp_path / "failing_script_of_the_test.py"
    program.write_text(FAILING.format(where=where, what=what))
    config, words = (
        on_cpu(tmp_path, "multi_gpu.yaml", 2),
        flags_of(data, "t2i", tmp_path / "out", "--max_train_steps", 9999),
    )
    begun = time.monotonic()
    process = launch(*LAUNCH_TWO, config, program, *words, home=tmp_path, PYTHONPATH=str(ROOT))
    assert process.returncode != 0 and message in process.stdout, process.stdout[-3000:]
    assert time.monotonic() - begun < 90
    assert not running(program.name)


def running(word: str) -> list[str]:
    """Command lines of live processes that hold the word."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if word in line and "pytest" not in line]


def test_a_signal_to_the_launcher_saves_on_two_processes_and_the_run_goes_on(data, tmp_path):
    """The launcher hands SIGTERM on; the processes agree on the step, one saves, and the resumed run finishes."""
    config = on_cpu(tmp_path, "multi_gpu.yaml", 2)
    words = flags_of(data, "t2i", tmp_path / "out", "--max_train_steps", 9999)
    command = [*LAUNCH_TWO, str(config), "train_dreambooth_lora_flux2.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path / "home"), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out/metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "--resume_from_checkpoint latest" in output, output[-3000:]
    assert not running(str(tmp_path / "out"))
    step = column(tmp_path / "out", "step")[-1]
    assert (tmp_path / f"out/checkpoint-{step}").is_dir()
    shutil.rmtree(tmp_path / "out/cache")
    done = alone(data, "t2i", tmp_path / "out", "--train_batch_size", 2, "--max_train_steps", step + 2,
                 "--resume_from_checkpoint", "latest")  # fmt: skip
    assert column(done, "step") == list(range(1, step + 3))
