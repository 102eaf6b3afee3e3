"""Every mistake of the user's ends before a model is loaded, in one message: what is wrong, where, and what to do."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, draw_photos
from helpers import load_arguments, run_python
from PIL import Image
from runs import command_line

pytestmark = pytest.mark.scripts("t2i")

LOADERS = ("load_text_encoder", "load_vae", "load_transformer")


@pytest.fixture(scope="session")
def parse(script):
    """The script's command line without its heavy imports."""
    return load_arguments(Path(script.__file__).name)


def of_one_script(*rows: tuple, ids: list[str] | None = None) -> pytest.MarkDecorator:
    """Parametrises a test over rows (short name of the script, value): what is one script's own."""
    assert {name for name, _ in rows} <= set(SCRIPTS)
    return pytest.mark.parametrize(("script", "own"), rows, indirect=["script"], ids=ids)


@pytest.fixture
def good(tmp_path) -> list[str]:
    """A command line without a mistake; a flag appended to it replaces the one here."""
    draw_photos(tmp_path / "photos", 2)
    return [
        *("--pretrained_model_name_or_path", str(ROOT / "tiny_flux2")),
        *("--instance_data_dir", str(tmp_path / "photos")),
        *("--instance_prompt", "a photo of sks toy", "--resolution", "64"),
        *("--output_dir", str(tmp_path / "out"), "--max_train_steps", "2", "--report_to", "none"),
    ]


@pytest.fixture
def refusal(parse, good, capsys):
    """Gives the message with which `refusal(*flags)` ends: SystemExit with 2, everything on stderr."""

    def refuse(*flags: object) -> str:
        with pytest.raises(SystemExit) as stop:
            parse.parse_args([*good, *map(str, flags)])
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return refuse


@pytest.fixture
def failure(script, good, monkeypatch):
    """Gives the message of the UserError with which a run ends, after making sure that it loaded no model."""

    def fail(*flags: object) -> str:
        for name in LOADERS:
            monkeypatch.setattr(script, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
        with pytest.raises(script.UserError) as error:
            script.main(script.parse_args([*good, *map(str, flags)]))
        return str(error.value)

    return fail


def has(message: str, *parts: str) -> bool:
    """Whether all parts are in the message; pytest prints the message when not."""
    missing = [part for part in parts if part not in message]
    assert missing == [], message
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

WRONG_FLAGS = {
    "an unknown flag": (["--learnin_rate", "1e-4"], ["unrecognized arguments: --learnin_rate 1e-4"]),
    "an unknown optimizer names the known ones": (
        ["--optimizer", "adamax"],
        ["--optimizer", "adamax", "adamw", "prodigy"],
    ),
    "a number that is none": (["--rank", "many"], ["--rank", "many"]),
    "a resolution off the grid names the nearest": (
        ["--resolution", "500"],
        ["--resolution 500", "multiple of 16", "496"],
    ),
    "a bucket without a width": (
        ["--aspect_ratio_buckets", "512"],
        ["--aspect_ratio_buckets", "'512'", "height,width"],
    ),
    "a bucket of words": (["--aspect_ratio_buckets", "wide"], ["--aspect_ratio_buckets", "'wide'", "height,width"]),
    "a bucket with x": (["--aspect_ratio_buckets", "512x768"], ["--aspect_ratio_buckets", "512x768", "height,width"]),
    "a bucket off the grid": (["--aspect_ratio_buckets", "64,64;500,64"], ["--aspect_ratio_buckets", "500,64", "16"]),
    "an empty bucket list": (["--aspect_ratio_buckets", ";"], ["--aspect_ratio_buckets", "height,width"]),
    "a rank of zero": (["--rank", "0"], ["--rank", "at least 1", "0"]),
    "a negative learning rate": (["--learning_rate", "-1"], ["--learning_rate", "must be at least"]),
    "a learning rate that is not a number": (["--learning_rate", "nan"], ["--learning_rate", "nan"]),
    "an infinite learning rate": (["--learning_rate", "inf"], ["--learning_rate", "inf"]),
    "a probability above one": (["--caption_dropout", "1.5"], ["--caption_dropout", "1.5", "0 ", " 1"]),
    "a beta of one": (["--adam_beta2", "1"], ["--adam_beta2"]),
    "too long a text": (["--max_sequence_length", "1024"], ["--max_sequence_length", "1024", "512"]),
    "a shift that is neither name nor number": (["--timestep_shift", "some"], ["--timestep_shift some", "linear"]),
    "a shift without any noise but noise": (["--timestep_shift", "100"], ["--timestep_shift 100", "0.01 to 99"]),
    "a shift of nearly none": (["--timestep_shift", "0.009"], ["--timestep_shift 0.009", "0.01 to 99"]),
    "fp16": (["--mixed_precision", "fp16"], ["--mixed_precision fp16", "overflow", "bf16"]),
    "a sharded text encoder on one process": (["--fsdp_text_encoder"], ["--fsdp_text_encoder", "--offload"]),
    "an unknown tracker": (["--report_to", "tensorbored"], ["--report_to tensorbored", "tensorboard", "wandb"]),
    "a data folder that is not there": (
        ["--instance_data_dir", "no_such_photos"],
        ["--instance_data_dir", "no such folder"],
    ),
    "both kinds of data": (["--dataset_name", "a/b"], ["--instance_data_dir", "--dataset_name", "exactly one"]),
    "a model that is neither folder nor id": (
        ["--pretrained_model_name_or_path", "./no/such"],
        ["./no/such", "owner/name"],
    ),
    "a saved command line that is not there": (["@no_such.args"], ["no_such.args", "cannot read"]),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_a_wrong_flag_is_refused_with_what_where_and_remedy(refusal, case):
    flags, named = WRONG_FLAGS[case]
    assert has(refusal(*flags), *named)


INDEX = str(ROOT / "tiny_flux2" / "model_index.json")  # any file that is there

OWN_WRONG_FLAGS = {
    "fp16 class images": (
        "t2i",
        ["--prior_generation_precision", "fp16"],
        ["--prior_generation_precision", "fp16", "bf16"],
    ),
    "prior preservation without a folder": (
        "t2i",
        ["--with_prior_preservation", "--class_prompt", "a toy"],
        ["--class_data_dir"],
    ),
    "prior preservation without a prompt": (
        "t2i",
        ["--with_prior_preservation", "--class_data_dir", "x"],
        ["--class_prompt"],
    ),
    "references with the script that has none": (
        "t2i",
        ["--cond_data_dir", "tests"],
        ["unrecognized arguments: --cond_data_dir tests"],
    ),
    "class images with the script that has none": (
        "i2i",
        ["--with_prior_preservation"],
        ["unrecognized arguments: --with_prior_preservation"],
    ),
    "a folder of references that is not there": (
        "i2i",
        ["--cond_data_dir", "no_such_references"],
        ["--cond_data_dir no_such_references", "no such folder"],
    ),
    "references by folder and by column": (
        "i2i",
        ["--cond_data_dir", str(ROOT / "tests"), "--cond_image_column", "before"],
        ["--cond_data_dir", "--cond_image_column"],
    ),
    "a probability above one that references are dropped": ("i2i", ["--cond_dropout", "2"], ["--cond_dropout", "2"]),
    "a validation image that is not there": (
        "i2i",
        ["--validation_prompt", "a toy", "--validation_image", "none.png"],
        ["--validation_image none.png", "no such file"],
    ),
    "a class prompt without prior preservation": (
        "t2i",
        ["--class_prompt", "a toy"],
        ["--with_prior_preservation", "--class_data_dir", "all three or none"],
    ),
    "class images that would count for nothing": (
        "t2i",
        ["--prior_loss_weight", "0"],
        ["--prior_loss_weight", "must be at least"],
    ),
    "a validation image without a prompt": ("i2i", ["--validation_image", INDEX], ["--validation_image", "0 prompt"]),
    "more validation images than prompts": (
        "i2i",
        ["--validation_prompt", "a toy", "--validation_image", INDEX, INDEX],
        ["--validation_image", "2 for 1 prompt", "comma"],
    ),
}


@of_one_script(*((row[0], row[1:]) for row in OWN_WRONG_FLAGS.values()), ids=list(OWN_WRONG_FLAGS))
def test_a_wrong_flag_of_one_script_is_refused_with_what_where_and_remedy(refusal, own):
    flags, named = own
    assert has(refusal(*flags), *named)


@of_one_script(("i2i", None))
def test_the_folder_of_the_targets_cannot_be_that_of_the_references(refusal, tmp_path, own):
    assert has(refusal("--cond_data_dir", tmp_path / "photos"), "--cond_data_dir", "a folder of their own")


MISSING_FILES = {
    "--bnb_quantization_config_path": ["nf4.json: cannot be used", "configs/quantization/"],
    "--init_lora_from": ["nf4.json: not a plain FLUX.2 LoRA", "No such file"],
    "--resume_from_checkpoint": ["--resume_from_checkpoint nf4.json", "latest"],
}


@pytest.mark.parametrize("flag", MISSING_FILES)
def test_a_file_of_a_flag_that_is_not_there_is_an_error_before_anything_is_loaded(failure, flag):
    assert has(failure(flag, "nf4.json"), *MISSING_FILES[flag])


@pytest.mark.scripts("t2i", "i2i")
def test_a_command_line_without_a_mistake_passes(parse, good):
    assert parse.parse_args(good).resolution == 64


@pytest.mark.scripts("t2i", "i2i")
def test_all_problems_that_the_script_finds_are_told_in_one_message(refusal):
    message = refusal("--resolution", "500", "--mixed_precision", "fp16", "--fsdp_text_encoder", "--report_to", "x")
    assert has(message, "500", "fp16", "--fsdp_text_encoder", "--report_to x", "4 problem(s) on the command line")
    assert message.count("\n  - ") == 4


@pytest.mark.scripts("t2i", "i2i")
def test_missing_required_flags_are_told_together(parse, capsys):
    with pytest.raises(SystemExit) as stop:
        parse.parse_args([])
    assert stop.value.code == 2
    assert has(capsys.readouterr().err, "--pretrained_model_name_or_path", "--instance_data_dir", "--dataset_name")


def test_a_model_folder_without_an_index_is_refused(failure, tmp_path):
    shutil.copytree(ROOT / "tiny_flux2" / "transformer", tmp_path / "model" / "transformer")
    assert has(failure("--pretrained_model_name_or_path", tmp_path / "model"), "model_index.json", "diffusers folder")


# Package, the flags that need it, and what is named.
OPTIONAL_PACKAGES = [
    ("prodigyopt", ["--optimizer", "prodigy"], "--optimizer prodigy"),
    ("bitsandbytes", ["--use_8bit_adam"], "--use_8bit_adam"),
    ("tensorboard", ["--report_to", "tensorboard"], "--report_to"),
    ("trackio", ["--report_to", "trackio"], "--report_to"),
]


@pytest.mark.parametrize(("package", "flags", "named"), OPTIONAL_PACKAGES, ids=[row[0] for row in OPTIONAL_PACKAGES])
def test_a_missing_optional_package_is_named_with_its_install_line(refusal, monkeypatch, package, flags, named):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    assert has(refusal(*flags), named, f"pip install {package}")


@pytest.mark.parametrize(("package", "flags", "named"), OPTIONAL_PACKAGES[:2])
def test_an_optional_package_that_no_flag_needs_may_be_missing(parse, good, monkeypatch, package, flags, named):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    assert parse.parse_args(good)


def test_report_to_all_means_the_installed_trackers(parse, good, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found("json") if name == "tensorboard" else None
    )
    assert parse.report_to(parse.parse_args([*good, "--report_to", "all"])) == ["tensorboard"]


@pytest.mark.parametrize("flag", ["--push_to_hub", "--remote_text_encoder"])
def test_the_hub_and_the_public_remote_encoder_without_a_token_are_refused_at_start(failure, monkeypatch, flag):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert has(failure(flag), flag, "need a token", "hf auth login", "HF_TOKEN")


@pytest.mark.parametrize("tracker", ["wandb", "comet_ml", "all"])
def test_a_token_on_the_command_line_is_refused_with_a_tracker_that_records_it(refusal, tracker):
    message = refusal("--hub_token", "hf_canary", "--report_to", tracker)
    assert has(message, "--hub_token", tracker, "HF_TOKEN")
    assert "hf_canary" not in message


# ---------------------------------------------------------------------------------------------------------------------
# The output folder
# ---------------------------------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_a_file_is_refused(refusal, tmp_path):
    (tmp_path / "taken").write_text("x")
    assert has(refusal("--output_dir", tmp_path / "taken"), "--output_dir", "taken", "cannot write", "another folder")


def test_an_output_folder_below_a_file_is_refused(refusal, tmp_path):
    (tmp_path / "taken").write_text("x")
    assert has(refusal("--output_dir", tmp_path / "taken" / "out"), "--output_dir", "cannot write", "another folder")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where not even root may write")
def test_an_output_folder_without_permission_is_refused(refusal):
    assert has(refusal("--output_dir", "/proc/flux2-out"), "--output_dir", "cannot write", "/proc", "another folder")


def test_checking_the_output_folder_leaves_nothing_behind(parse, good, tmp_path):
    parse.parse_args(good)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_the_data_folder_as_output_folder_is_refused(refusal, tmp_path):
    assert has(refusal("--output_dir", tmp_path / "photos", "--overwrite_output_dir"), "--output_dir", "data folder")


def test_the_home_folder_as_output_folder_is_refused(refusal, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert has(refusal("--output_dir", tmp_path, "--overwrite_output_dir"), "--output_dir", "home")


@pytest.fixture
def earlier(parse, tmp_path) -> Path:
    """The output folder with the settings of an earlier run in it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.args").write_text(f"{parse.CONFIG_HEAD}--rank 4\n")
    return tmp_path / "out"


def test_an_earlier_run_in_the_output_folder_is_refused_with_both_ways_on(refusal, earlier):
    (earlier / "pytorch_lora_weights.safetensors").write_text("x")
    message = refusal()
    assert has(message, "--output_dir", "config.args, pytorch_lora_weights.safetensors", "of an earlier run")
    assert has(message, "--resume_from_checkpoint latest", "--overwrite_output_dir")


WAYS = [["--resume_from_checkpoint", "latest"], ["--overwrite_output_dir"], ["--dry_run"]]


@pytest.mark.parametrize("way", WAYS)
def test_an_earlier_run_is_accepted_when_the_user_says_what_to_do_with_it(parse, good, earlier, way):
    (earlier / "README.md").write_text("a card")
    assert parse.parse_args([*good, *way])


@pytest.mark.parametrize("way", WAYS[:2])
def test_checkpoints_that_were_copied_alone_are_a_runs(parse, good, refusal, tmp_path, way):
    (tmp_path / "out" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-4" / "manifest.json").write_text("{}")
    assert has(refusal(), "checkpoint-4, of an earlier run") and parse.parse_args([*good, *way])


FOREIGN = {  # path, the name that is told
    "README.md": "README.md",
    "config.args": "config.args",
    "pytorch_lora_weights.safetensors": "pytorch_lora_weights.safetensors",
    "comfyui_lora.safetensors": "comfyui_lora.safetensors",
    "metrics.jsonl": "metrics.jsonl",
    "checkpoint-500/optimizer.bin": "checkpoint-500",
    "samples/final/a.png": "final",
    "samples/contact_sheet.png": "contact_sheet.png",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("way", [[], *WAYS])
def test_what_no_run_wrote_is_never_overwritten_whatever_the_flags(refusal, tmp_path, name, way):
    """A README of one's own, the results of another trainer, a hand-written config.args."""
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("--rank 4 # mine")
    assert has(refusal(*way), f"holds {FOREIGN[name]}, which no run of this script wrote", "choose another folder")
    assert path.read_text() == "--rank 4 # mine"


NEIGHBOURS = [
    "notes.txt",
    "samples/mine.png",
    "checkpoint-best/x",
    "checkpoint-2.zip",
    "cache/checked_images.json",
    "logs/x",
]


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_files_that_a_run_does_not_write_may_lie_in_the_output_folder(parse, good, tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("x")
    assert parse.parse_args(good)


# ---------------------------------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------------------------------


def test_an_empty_folder_is_an_error_that_names_it(failure, tmp_path):
    (tmp_path / "empty").mkdir()
    assert has(failure("--instance_data_dir", tmp_path / "empty"), "--instance_data_dir", "empty", "no image", ".jpg")


def test_a_folder_with_only_hidden_files_counts_as_empty(failure, tmp_path):
    folder = draw_photos(tmp_path / "hidden", 1)
    (folder / "00.jpg").unlink()
    assert has(failure("--instance_data_dir", folder), "no image")


@pytest.mark.scripts("t2i", "i2i")
def test_all_corrupt_images_are_listed_with_their_reasons(failure, tmp_path):
    folder = draw_photos(tmp_path / "bad", 4)
    data = (folder / "01.jpg").read_bytes()
    (folder / "01.jpg").write_bytes(data[: len(data) // 2])
    (folder / "02.jpg").write_bytes(b"")
    (folder / "03.jpg").write_bytes(b"<html>404</html>")
    message = failure("--instance_data_dir", folder)
    assert has(
        message, "3 image(s)", "01.jpg: truncated", "02.jpg: empty", "03.jpg: not an image", "--on_bad_image skip"
    )
    assert "00.jpg" not in message


def test_a_folder_of_only_corrupt_images_is_an_error_also_with_skip(failure, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"nothing")
    assert has(failure("--instance_data_dir", tmp_path / "bad", "--on_bad_image", "skip"), "a.jpg")


def test_images_without_captions_need_a_prompt(script, good, monkeypatch):
    words = [word for word in good if word not in ("--instance_prompt", "a photo of sks toy")]
    with pytest.raises(script.UserError) as error:
        script.main(script.parse_args(words))
    assert has(str(error.value), "--instance_prompt", "no caption", "00.jpg")


@pytest.mark.scripts("t2i", "i2i")
def test_a_missing_caption_column_of_a_metadata_file_names_those_there_are(failure, tmp_path):
    folder = draw_photos(tmp_path / "meta", 2)
    rows = [{"file_name": f"{number:02d}.jpg", "text": "a toy"} for number in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = failure("--instance_data_dir", folder, "--caption_column", "captoin")
    assert has(message, "--caption_column captoin", "columns:", "file_name", "text")


@pytest.mark.parametrize(("content", "named"), [
    ('{"file_name": "00.jpg"', "not readable"),
    ('{"file_name": "no.jpg"}', "no.jpg"),
    ('{"file_name": "../out.jpg"}', "leads out of the folder"), ("[1]", "file_name"),
])  # fmt: skip
def test_a_bad_metadata_file_is_an_error_that_says_why(failure, tmp_path, content, named):
    folder = draw_photos(tmp_path / "meta", 1)
    (folder / "metadata.jsonl").write_text(content)
    assert has(failure("--instance_data_dir", folder), "meta", named)


@pytest.mark.scripts("t2i", "i2i")
def test_a_metadata_file_without_a_column_of_images_says_what_is_looked_for(failure, tmp_path):
    folder = draw_photos(tmp_path / "meta", 1)
    (folder / "metadata.jsonl").write_text('{"text": "a toy"}')
    assert has(failure("--instance_data_dir", folder), "metadata.jsonl", "every row needs a 'file_name'")


def test_a_caption_file_that_is_not_utf_8_is_an_error_that_names_it(failure, tmp_path):
    folder = draw_photos(tmp_path / "latin", 1)
    (folder / "00.txt").write_bytes("ein schönes Spielzeug".encode("latin-1"))
    assert has(failure("--instance_data_dir", folder), "00.txt", "UTF-8")


@pytest.fixture
def local_dataset(tmp_path, monkeypatch) -> Path:
    """A data set on this machine with the columns image and text."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "dataset" / "train"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,text\na.png,a red toy\n")
    return folder.parent


@pytest.mark.scripts("t2i", "i2i")
@pytest.mark.parametrize(("flag", "column"), [("--image_column", "photo"), ("--caption_column", "captoin")])
def test_a_wrong_column_of_a_data_set_names_those_there_are(script, good, local_dataset, tmp_path, flag, column):
    words = [word for word in good if word not in ("--instance_data_dir", str(tmp_path / "photos"))]
    words += ["--dataset_name", str(local_dataset), "--cache_dir", str(tmp_path / "cache"), flag, column]
    with pytest.raises(script.UserError) as error:
        script.main(script.parse_args(words))
    assert has(str(error.value), f"{flag} {column}", "columns:", "image", "text")


def test_a_data_set_that_is_not_there_is_an_error(script, good, tmp_path):
    words = [word for word in good if word not in ("--instance_data_dir", str(tmp_path / "photos"))]
    with pytest.raises(script.UserError) as error:
        script.main(script.parse_args([*words, "--dataset_name", "nobody/nothing"]))
    assert has(str(error.value), "--dataset_name nobody/nothing", "cannot be loaded")


def test_a_lora_target_that_matches_nothing_names_the_nearest(failure):
    assert has(failure("--lora_layers", "attn.to_x"), "--lora_layers", "'attn.to_x'", "nearest", "attn.to_")


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def test_a_hub_id_that_cannot_be_reached_is_an_error_without_retries(failure):
    message = failure("--pretrained_model_name_or_path", "nobody/no-such-model")
    assert has(message, "--pretrained_model_name_or_path nobody/no-such-model", "Hub")


@pytest.fixture
def model_copy(tmp_path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(ROOT / "tiny_flux2", tmp_path / "model"))


def test_a_model_of_another_kind_is_an_error_that_names_the_kinds_we_train(failure, model_copy):
    index = json.loads((model_copy / "model_index.json").read_text())
    (model_copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    message = failure("--pretrained_model_name_or_path", model_copy)
    assert has(message, "FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_model_without_one_of_its_parts_is_an_error_that_names_it(failure, model_copy, part):
    shutil.rmtree(model_copy / part)
    assert has(failure("--pretrained_model_name_or_path", model_copy), part, "missing")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_model_without_the_weights_of_a_part_is_an_error_before_anything_is_loaded(failure, model_copy, part):
    next((model_copy / part).glob("*.safetensors")).unlink()
    assert has(failure("--pretrained_model_name_or_path", model_copy), part)


def test_layers_that_the_text_encoder_does_not_have_are_an_error(failure):
    assert has(failure("--text_encoder_out_layers", 10, 20, 99), "--text_encoder_out_layers", "99")


def test_layers_that_do_not_fit_the_transformer_are_an_error(failure):
    assert has(failure("--text_encoder_out_layers", 10, 20), "--text_encoder_out_layers", "(10, 20)")


# ---------------------------------------------------------------------------------------------------------------------
# The launch
# ---------------------------------------------------------------------------------------------------------------------


def test_several_processes_that_are_not_one_run_are_refused(script, failure, monkeypatch):
    monkeypatch.setattr(script, "process_count", lambda: 2)
    assert has(failure(), "2 processes", "configs/accelerate/")


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "-1"}], ids=str
)
def test_what_changes_nothing_may_be_in_the_environment(script, good, monkeypatch, variables):
    """As containers of some schedulers have it."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert list(script.check_launch(script.parse_args([*good]))) == []


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP on one process"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "MEGATRON"),
        ("PJRT_DEVICE", "TPU", "TPU"),
    ],
)
def test_an_engine_is_refused_by_name_from_the_shell_and_from_a_notebook(
    script, tiny, photos, tmp_path, monkeypatch, capsys, variable, value, named
):
    words = command_line(tiny, photos, tmp_path / "out")
    args = script.parse_args(words)
    monkeypatch.setenv(variable, value)
    with pytest.raises(script.UserError, match=named):
        script.main(args)
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(words)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and named in shown and "configs/accelerate/" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_half_precision_that_overflows_in_the_accelerate_config_is_refused_by_name(failure, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert has(failure(), precision, "--mixed_precision bf16")


DTYPES = [  # --mixed_precision, what the accelerate config says, on CPU, the dtype
    (None, "no", False, "bfloat16"), (None, None, False, "bfloat16"), (None, "bf16", False, "bfloat16"),
    (None, "no", True, "float32"), (None, None, True, "float32"), (None, "bf16", True, "bfloat16"),
    ("no", "bf16", False, "float32"), ("no", "no", False, "float32"), ("bf16", "no", True, "bfloat16"),
    ("bf16", "fp16", False, "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "config", "on_cpu", "dtype"), DTYPES)
def test_a_no_in_the_accelerate_config_does_not_mean_fp32_on_an_accelerator(
    script, good, monkeypatch, flag, config, on_cpu, dtype
):
    if config is None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", config)
    args = script.parse_args([*good, *(["--mixed_precision", flag] if flag else [])])
    assert str(script.compute_dtype(args, on_cpu)) == f"torch.{dtype}"


# ---------------------------------------------------------------------------------------------------------------------
# Flags without effect
# ---------------------------------------------------------------------------------------------------------------------

NOTES = {
    "warm-up with a constant rate": ["--lr_warmup_steps", "100"],
    "a learning rate of Prodigy's with AdamW": ["--learning_rate", "1.0"],
    "a learning rate that moves nothing": ["--learning_rate", "1e-9"],
    "a crop that the cache fixes": ["--cache_latents"],
    "a learning rate too small for Prodigy": ["--learning_rate", "1e-4", "--optimizer", "prodigy"],
    "a rate for a text encoder that is not trained": ["--text_encoder_lr", "1e-5"],
    "a decay for a text encoder that is not trained": ["--adam_weight_decay_text_encoder", "1e-3"],
    "the launcher's rank": ["--local_rank", "0"],
    "the NPU switch": ["--enable_npu_flash_attention"],
    "8-bit Adam with Prodigy": ["--use_8bit_adam", "--optimizer", "prodigy"],
    "the weight outside of masks that there are not": ["--unmasked_weight", "0.1"],
    "a mean of another density": ["--logit_mean", "-1"],
}


def assert_one_note(parse, good: list[str], flags: list[str]) -> None:
    """Fails unless exactly one note, of one line, names the first of the flags."""
    notes = parse.flag_notes(parse.parse_args([*good, *flags]))
    naming = [note for note in notes if flags[0] in note]
    assert len(naming) == 1 and "\n" not in naming[0], notes


@pytest.mark.parametrize("case", NOTES)
def test_a_flag_without_effect_is_said_so_in_one_line(parse, good, case):
    assert_one_note(parse, good, NOTES[case])


@pytest.mark.scripts("t2i", "i2i")
def test_a_command_line_in_which_every_flag_counts_gets_no_note(parse, good):
    assert parse.flag_notes(parse.parse_args(good)) == []


def test_the_notes_of_a_run_are_in_its_log(script, good, capsys):
    script.main(script.parse_args([*good, "--lr_warmup_steps", "100", "--dry_run"]))
    line = "WARNING --lr_warmup_steps has no effect with --lr_scheduler constant; use constant_with_warmup"
    assert line in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# As a program
# ---------------------------------------------------------------------------------------------------------------------


def test_a_usage_error_as_a_program_exits_with_2_and_prints_no_traceback(script, good):
    result = run_python(script.__file__, *good, "--resolution", "500", "--report_to", "paper")
    assert result.returncode == 2
    assert has(result.stderr, "2 problem(s) on the command line", "500", "paper")
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) <= 4  # not the whole usage


def test_the_environment_of_the_tests_is_hermetic():
    assert os.environ["HF_HUB_OFFLINE"] == "1" and "HF_TOKEN" not in os.environ


@pytest.mark.parametrize("flag", ["--output_dir", "--latents_cache_dir"])
def test_a_folder_of_the_run_inside_the_data_folder_is_refused(refusal, tmp_path, flag):
    """What the run writes there would be trained on at the next start."""
    assert has(refusal(flag, tmp_path / "photos" / "inside"), flag, "data folder")


@of_one_script(("t2i", "--class_data_dir"))
def test_class_images_inside_the_data_folder_are_refused(refusal, tmp_path, own):
    """They would be trained on as images of the subject at the next start."""
    assert has(refusal(own, tmp_path / "photos" / "inside"), own, "data folder")


@of_one_script(("i2i", "--output_dir"), ("i2i", "--latents_cache_dir"))
def test_a_folder_of_the_run_inside_the_references_is_refused(refusal, tmp_path, own):
    """What the run writes there would be taken for references at the next start."""
    (tmp_path / "references").mkdir()
    message = refusal("--cond_data_dir", tmp_path / "references", own, tmp_path / "references" / "inside")
    assert has(message, own, "data folder")


@pytest.mark.parametrize(("kind", "told"), [("mps", "Apple GPUs are not supported"), ("xpu", "xpu is untested")])
def test_what_is_not_tested_is_told_and_what_fails_refused(script, train, monkeypatch, kind, told):
    """The backward pass of these models is reported to fail on Apple GPUs."""
    real = script.accelerate.Accelerator

    def pretended(**options):
        accelerator = real(**{**options, "cpu": True})
        monkeypatch.setattr(type(accelerator), "device", torch.device(kind))
        return accelerator

    monkeypatch.setattr(script.accelerate, "Accelerator", pretended)
    lines = []
    monkeypatch.setattr(script.log, "warning", lines.append)
    with pytest.raises((script.UserError, RuntimeError, NotImplementedError, AssertionError)) as stop:
        train("--max_train_steps", "1")
    assert told in " ".join([*lines, str(stop.value)])
    assert (kind == "mps") == isinstance(stop.value, script.UserError)
