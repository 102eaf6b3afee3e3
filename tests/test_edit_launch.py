"""The image-to-image command of the guide in bash, and what it leaves. One launch; the tests look at its results."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import IMAGE_TO_IMAGE, run_python
from servers import RemoteEncoder
from test_launch import TOKEN, WEIGHTS, environment, launch, losses_of

pytestmark = [pytest.mark.launch, pytest.mark.e2e, pytest.mark.slow]

# The command of the FLUX.2 guide as people paste it, with the model's path and the data set swapped; $LATER holds the
# flags that make it quick.
RELIGHTING_COMMAND = """
accelerate launch train_dreambooth_lora_flux2_img2img.py \\
  --pretrained_model_name_or_path=$MODEL_NAME  \\
  --output_dir="flux2-i2i" \\
  --dataset_name="$DATASET" \\
  --image_column="output" --cond_image_column="file_name" --caption_column="instruction" \\
  --do_fp8_training \\
  --gradient_checkpointing \\
  --remote_text_encoder \\
  --cache_latents \\
  --resolution=1024 \\
  --train_batch_size=1 \\
  --guidance_scale=1 \\
  --gradient_accumulation_steps=4 \\
  --gradient_checkpointing \\
  --optimizer="adamw" \\
  --use_8bit_adam \\
  --cache_latents \\
  --learning_rate=1e-4 \\
  --lr_scheduler="constant_with_warmup" \\
  --lr_warmup_steps=200 \\
  --max_train_steps=1000 \\
  --rank=16\\
  --seed="0" $LATER
"""
PAIRS = 24


@pytest.fixture(scope="module")
def relighting(tmp_path_factory):
    """(process, folder, encoder) of the command, the script copied alone into an empty folder."""
    tmp = tmp_path_factory.mktemp("relighting")
    here = tmp / "here"
    here.mkdir()
    shutil.copy(ROOT / IMAGE_TO_IMAGE, here)
    drawn = run_python("tools/draw_edit_pairs.py", here / "pairs", "--count", PAIRS, "--size", 768, "--parquet")
    assert drawn.returncode == 0, drawn.stderr
    with RemoteEncoder() as encoder:
        names = {"MODEL_NAME": str(ROOT / "tiny_flux2"), "DATASET": "pairs"}
        names["LATER"] = f"--max_train_steps 2 --resolution 64 --remote_text_encoder_url {encoder.predict_url}"
        process = launch("bash", "-e", "-c", RELIGHTING_COMMAND, cwd=here, home=tmp / "home", HF_TOKEN=TOKEN, **names)
        return process, here / "flux2-i2i", encoder


def test_the_image_to_image_command_of_the_guide_leaves_the_promised_files(relighting):
    process, folder, _ = relighting
    assert process.returncode == 0, process.stdout
    present = {path.name for path in folder.iterdir()}
    assert present == {
        WEIGHTS,
        "comfyui_lora.safetensors",
        "README.md",
        "config.args",
        "metrics.jsonl",
        "checkpoint-2",
        "cache",
        "logs",
    }
    assert len(losses_of(folder)) == 2


def test_every_row_of_the_data_set_has_its_reference_and_the_log_says_so(relighting):
    process, folder, _ = relighting
    told = f"pairs: {PAIRS} rows, images from output, references from file_name, captions from instruction"
    assert told in process.stdout
    assert "have no reference" not in process.stdout
    assert f"check images: {2 * PAIRS}/{2 * PAIRS}" in process.stdout
    assert len(list((folder / "cache" / "latents").iterdir())) == 2 * PAIRS
    groups = int(re.search(r"(\d+) groups of equal geometry", process.stdout)[1])
    assert groups == 4  # the drawn images have four shapes, the targets one


def test_each_instruction_is_asked_of_the_remote_encoder_once(relighting):
    process, folder, encoder = relighting
    different = int(re.findall(r"text: (\d+) different prompts", process.stdout)[-1])  # the first is the probe
    assert len(encoder.prompts) == len(set(encoder.prompts)) == different > 5
    assert "make it night" in encoder.prompts


def test_the_token_of_the_image_to_image_command_is_in_no_file_and_in_no_line(relighting):
    process, folder, _ = relighting
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert TOKEN not in process.stdout and len(files) > 60
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_the_environment_of_a_launch_has_no_settings_of_the_hub():
    """The launches are hermetic: nothing of this process's accounts reaches them."""
    assert [name for name in environment(Path("home")) if name.startswith("HF_") and name != "HF_HOME"] == []
