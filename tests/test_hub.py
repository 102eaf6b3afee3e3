"""The Hub: what a push uploads and what it never does, both failures, and a model that comes from the Hub."""

import argparse
import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from servers import Hub, point_to
from unit_parts import start_run

pytestmark = pytest.mark.scripts("i2i")

TOKEN = "hf_canary_token_of_the_tests"
WEIGHTS = "pytorch_lora_weights.safetensors"
DRAWS = ("--validation_prompt", "a toy on grass", "--num_validation_images", "1", "--num_inference_steps", "1")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A loopback Hub that this process talks to, with a token in the environment."""
    with Hub() as server:
        point_to(monkeypatch, server, tmp_path / "hub_cache", TOKEN)
        yield server


def files_below(folder) -> set[str]:
    """The files below a folder, as paths with slashes."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Push
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pushed(script, tiny, reference_flags, validation_reference, tmp_path_factory):
    """(hub, output folder, everything printed) of one run with images, checkpoints, cache, tracker and push."""
    import contextlib
    import io

    from conftest import draw_photos

    monkeypatch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("pushed") / "secret-folder" / "toy-lora"
    photos = draw_photos(tmp_path_factory.mktemp("private-photos"))
    words = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", photos, "--output_dir", folder]
    words += ["--instance_prompt", "a photo of sks toy", "--resolution", 64, "--max_train_steps", 2, "--seed", 0]
    words += ["--rank", 4, "--lora_alpha", 2, "--max_sequence_length", 64, "--dataloader_num_workers", 0]
    words += [
        *reference_flags,
        *validation_reference,
        *DRAWS,
        "--cache_latents",
        "--checkpointing_steps",
        1,
        "--report_to",
        "tensorboard",
        "--push_to_hub",
    ]
    printed = io.StringIO()
    with Hub() as hub, monkeypatch.context() as patch:
        point_to(patch, hub, folder.parent / "hub_cache", TOKEN)
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            script.main(script.parse_args([str(word) for word in words]))
        yield hub, folder, printed.getvalue()


@pytest.mark.e2e
def test_the_repository_is_private_and_named_after_the_output_folder(pushed):
    hub, _, _ = pushed
    assert [(body["organization"], body["name"], body["visibility"]) for body in hub.created] == [
        (None, "toy-lora", "private")
    ]
    assert set(hub.commits) == {"tester/toy-lora"}


@pytest.mark.e2e
def test_exactly_weights_card_samples_and_settings_are_uploaded(pushed):
    hub, folder, _ = pushed
    kept = {WEIGHTS, "comfyui_lora.safetensors", "README.md", "config.args"}
    local = files_below(folder)
    samples = {name for name in local if name.startswith("samples/")}
    assert set(hub.files) == kept | samples
    assert any(name.startswith("samples/step-") for name in hub.files) and "samples/contact_sheet.png" in hub.files
    # there was something to leave out
    assert {name.split("/")[0] for name in local - set(hub.files)} >= {"cache", "logs", "checkpoint-1", "metrics.jsonl"}


@pytest.mark.e2e
def test_what_is_uploaded_is_what_lies_in_the_folder(pushed):
    hub, folder, _ = pushed
    for name, data in hub.files.items():
        if name != "config.args":
            assert data == (folder / name).read_bytes(), name


@pytest.mark.e2e
def test_the_uploaded_settings_have_no_folders_of_this_machine_and_no_token(pushed, script):
    hub, folder, _ = pushed
    text = hub.files["config.args"].decode()
    assert TOKEN not in text and "hub_token" not in text
    assert str(folder.parent) not in text and "secret-folder" not in text
    words = script.shlex.split(text)
    assert words[words.index("--output_dir") + 1] == "toy-lora"
    assert words[words.index("--pretrained_model_name_or_path") + 1] == "tiny_flux2"
    assert [word for word in words if word.startswith("/")] == []


@pytest.mark.e2e
def test_the_local_settings_keep_their_folders_and_have_no_token(pushed):
    _, folder, _ = pushed
    text = (folder / "config.args").read_text()
    assert str(folder) in text and TOKEN not in text


@pytest.mark.e2e
def test_the_uploaded_card_shows_images_that_are_uploaded(pushed):
    hub, _, _ = pushed
    head = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    assert [entry["text"] for entry in head["widget"]] == ["a toy on grass"]
    assert {entry["output"]["url"] for entry in head["widget"]} <= set(hub.files)


@pytest.mark.e2e
def test_the_card_names_no_folder_of_this_machine(pushed):
    hub, folder, _ = pushed
    assert str(folder.parent) not in hub.files["README.md"].decode()


@pytest.mark.e2e
def test_every_request_about_the_repository_carries_the_token(pushed):
    hub, _, _ = pushed
    about = [r for r in hub.requests if r.path == "/api/repos/create" or "toy-lora" in r.path]
    assert len(about) >= 4 and {request.token for request in about} == {TOKEN}


@pytest.mark.e2e
def test_the_token_is_in_no_file_and_in_no_line(pushed):
    _, folder, printed = pushed
    assert TOKEN not in printed and "hub: uploaded" in printed
    assert [name for name in files_below(folder) if TOKEN.encode() in (folder / name).read_bytes()] == []


@pytest.mark.e2e
def test_a_token_on_the_command_line_is_used_and_stored_nowhere(train, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    folder = train("--push_to_hub", "--hub_token", TOKEN, "--report_to", "tensorboard", "--max_train_steps", 1)
    printed = "".join(capsys.readouterr())
    assert {r.token for r in hub.requests if r.path == "/api/repos/create" or "tester/out" in r.path} == {TOKEN}
    assert TOKEN not in printed
    assert [name for name in files_below(folder) if TOKEN.encode() in (folder / name).read_bytes()] == []
    assert all(TOKEN.encode() not in data for data in hub.files.values())


@pytest.mark.e2e
def test_a_public_repository_of_another_name_is_made_when_asked(train, hub):
    train("--push_to_hub", "--no-hub_private", "--hub_model_id", "club/sks-toy", "--max_train_steps", 1)
    assert [(body["organization"], body["name"]) for body in hub.created] == [("club", "sks-toy")]
    assert hub.created[0]["visibility"] == "public"
    assert set(hub.commits) == {"club/sks-toy"}


@pytest.mark.e2e
def test_a_second_run_does_not_upload_the_images_of_an_earlier_one(train, hub):
    folder = train(*DRAWS, "--max_train_steps", 2, "--validation_steps", 2)
    train("--max_train_steps", 1, "--overwrite_output_dir", "--push_to_hub")
    assert folder.is_dir() and [name for name in hub.files if name.startswith("samples/")] == []


# ---------------------------------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------------------------------


def test_a_repository_that_cannot_be_made_stops_before_anything_is_loaded(script, train, hub, monkeypatch, tmp_path):
    loaded = []
    for name in ("load_text_encoder", "load_vae", "load_transformer"):
        monkeypatch.setattr(script, name, lambda *_, name=name: loaded.append(name))
    hub.fault = "create"
    with pytest.raises(script.UserError) as error:
        train("--push_to_hub", "--hub_model_id", "club/sks-toy")
    assert "--push_to_hub" in str(error.value) and "club/sks-toy" in str(error.value) and "403" in str(error.value)
    assert TOKEN not in str(error.value)
    assert loaded == [] and not (tmp_path / "out" / WEIGHTS).exists()


def test_that_error_ends_a_program_with_exit_code_2(script):
    assert script.EXIT_CODES[script.UserError] == 2


def test_a_repository_is_made_only_after_the_data_is_checked(script, train, hub, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(script.UserError, match="no image"):
        train("--push_to_hub", "--instance_data_dir", tmp_path / "empty")
    assert hub.created == []


def test_a_dry_run_makes_no_repository(train, hub):
    train("--push_to_hub", "--dry_run")
    assert hub.requests == []


@pytest.mark.e2e
def test_a_failed_upload_keeps_the_result_and_prints_the_line_that_does_it_by_hand(train, hub, capsys):
    hub.fault = "commit"
    folder = train("--push_to_hub", "--hub_model_id", "club/sks-toy", "--max_train_steps", 1)  # ends without an error
    printed = "".join(capsys.readouterr())
    assert (folder / WEIGHTS).is_file() and (folder / "README.md").is_file() and hub.files == {}
    assert f"hf upload club/sks-toy {folder}" in printed and "500" in printed
    assert TOKEN not in printed


@pytest.mark.e2e
def test_the_line_for_an_upload_by_hand_takes_the_result_and_leaves_out_the_rest(train, hub, capsys):
    from fnmatch import fnmatch

    hub.fault = "commit"
    folder = train("--push_to_hub", "--max_train_steps", 1, "--cache_latents", "--checkpointing_steps", 1, *DRAWS)
    line = next(line for line in "".join(capsys.readouterr()).splitlines() if line.strip().startswith("hf upload"))
    import shlex

    words = shlex.split(line)
    patterns = [words[place + 1] for place, word in enumerate(words) if word == "--include"]
    names = files_below(folder)
    taken = {name for name in names if any(fnmatch(name, p) for p in patterns)}
    assert {WEIGHTS, "README.md"} <= taken and any(name.startswith("samples/") for name in taken)
    assert {name for name in taken if name.startswith(("checkpoint-", "cache/", "logs/"))} == set()


# ---------------------------------------------------------------------------------------------------------------------
# A model from the Hub
# ---------------------------------------------------------------------------------------------------------------------


def model_args(script, token: str | None = None) -> object:
    """What `find_model` reads of the command line, for the model that the loopback Hub has."""
    flags = {"revision": None, "variant": None, "cache_dir": None, "hub_token": token}
    return script.Args(pretrained_model_name_or_path="lab/tiny-flux2", **flags)


@pytest.mark.e2e
def test_a_hub_id_trains_to_the_same_losses_as_the_folder_it_was_uploaded_from(train, hub, tiny):
    hub.models["lab/tiny-flux2"] = tiny
    remote = train("--pretrained_model_name_or_path", "lab/tiny-flux2", output="remote")
    local = train(output="local")
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (remote, local)
    ]
    assert losses[0] == losses[1]
    head = yaml.safe_load((remote / "README.md").read_text().split("---")[1])
    assert head["base_model"] == "lab/tiny-flux2" and head["base_model_relation"] == "adapter"


def test_finding_a_model_downloads_no_weights(script, hub, tiny):
    hub.models["lab/tiny-flux2"] = tiny
    script.find_model(model_args(script))
    assert "model_index.json" in hub.downloads and "transformer/config.json" in hub.downloads
    assert [name for name in hub.downloads if name.endswith(".safetensors")] == []


def test_a_part_is_downloaded_when_it_is_needed_and_only_it(script, hub, tiny, capsys):
    script.set_up_logging()
    hub.models["lab/tiny-flux2"] = tiny
    model = script.find_model(model_args(script))
    hub.requests.clear()
    folder = model.part("vae")
    weights = [name for name in hub.downloads if name.endswith(".safetensors")]
    assert [name.split("/")[0] for name in weights] == ["vae"]
    assert files_below(folder) == files_below(tiny / "vae")
    assert "lab/tiny-flux2/vae" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("part", "before"), [("vae", []), ("text_encoder", ["vae"])])
def test_a_part_is_checked_right_after_its_download_and_at_the_next_start(
    script, train, hub, tiny, tmp_path, part, before
):
    """The rest, for [dev] many GB, is not downloaded for nothing; what is here already is checked first of all."""
    model = hub.models["lab/tiny-flux2"] = shutil.copytree(tiny, tmp_path / "uploaded")
    path = next((model / part).glob("*.safetensors"))
    weights = script.load_file(path)
    name = next(name for name in weights if name.endswith("layers.4.mlp.up_proj.weight") or part == "vae")
    path.write_bytes(script.safetensors_bytes({other: weights[other] for other in weights if other != name}))
    flags = ("--pretrained_model_name_or_path", "lab/tiny-flux2")
    train(*flags, "--dry_run")
    for more in ((), ("--dry_run",)):
        with pytest.raises(
            script.UserError, match=f"lab/tiny-flux2/{part}: the weights do not fit the model .1 missing"
        ):
            train(*flags, *more)
    weights = {name.split("/")[0] for name in hub.downloads if name.endswith(".safetensors")}
    assert weights == {*before, part}


def test_a_download_that_does_not_fit_the_disk_is_refused_before_it_starts(script, hub, tiny, monkeypatch):
    hub.models["lab/tiny-flux2"] = tiny
    model = script.find_model(model_args(script))
    usage = shutil.disk_usage(tiny)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(script.UserError, match="--cache_dir"):
        model.part("transformer")
    assert [name for name in hub.downloads if name.endswith(".safetensors")] == []


def test_a_cached_model_needs_no_network_when_offline(script, hub, tiny, monkeypatch):
    hub.models["lab/tiny-flux2"] = tiny
    args = model_args(script)
    script.find_model(args).part("transformer")
    hub.requests.clear()
    monkeypatch.setattr(script.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert (script.find_model(args).part("transformer") / "config.json").is_file()
    assert hub.requests == []


def test_a_gated_model_says_where_to_accept_the_licence(script, train, hub, tiny):
    hub.gated.add("lab/tiny-flux2")
    with pytest.raises(script.UserError) as error:
        train("--pretrained_model_name_or_path", "lab/tiny-flux2")
    assert "gated" in str(error.value) and "https://huggingface.co/lab/tiny-flux2" in str(error.value)
    assert "hf auth login" in str(error.value)


def test_a_model_that_is_not_on_the_hub_is_an_error_that_names_the_flag(script, train, hub):
    with pytest.raises(script.UserError) as error:
        train("--pretrained_model_name_or_path", "lab/no-such")
    assert "--pretrained_model_name_or_path lab/no-such" in str(error.value)


def test_the_hub_token_is_used_for_the_model_too(script, hub, tiny, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    hub.models["lab/tiny-flux2"] = tiny
    script.find_model(model_args(script, TOKEN)).part("scheduler")
    assert {request.token for request in hub.requests if "lab/tiny-flux2" in request.path} == {TOKEN}


def test_an_empty_path_does_not_stop_the_upload(script, tiny, tmp_path):
    """The copy of the settings that leaves the machine is made after training: it must not fail then."""
    run = start_run(script, tiny, tmp_path, "--cache_dir", "")
    assert "--cache_dir ''" in script.write_config(run, basenames=True).splitlines()


@pytest.mark.parametrize(
    "given, uploaded",
    [
        ("private/a.png,private/b.png", "a.png,b.png"),
        ("private,folder/cache", "private,cache"),
        ("lab/model", "lab/model"),
    ],
)
def test_folders_that_are_gone_stay_out_of_the_upload_and_a_hub_id_stays_whole(script, given, uploaded):
    """The images may have been moved while the run was going on."""
    args = argparse.Namespace(**script.DEFAULTS | {"cache_dir": given})
    run = SimpleNamespace(args=args, dtype=script.torch.float32, seed=0)
    assert f"--cache_dir {uploaded}" in script.write_config(run, basenames=True).splitlines()
