"""What a command line means: switches, paths, [trigger], mistakes, and what is said of odd values."""

import argparse
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SCRIPTS
from helpers import ROOT, load_arguments, run_python
from unit_parts import start_run


@pytest.fixture(scope="module", params=SCRIPTS.values())
def parse(request):
    """Each script's command line without its heavy imports."""
    return load_arguments(f"{request.param}.py")


@pytest.fixture
def good(tmp_path) -> list[str]:
    """A command line without a mistake; a flag appended to it replaces the one here."""
    (tmp_path / "photos").mkdir()
    words = ["--pretrained_model_name_or_path", ROOT / "tiny_flux2", "--instance_data_dir", tmp_path / "photos"]
    words += ["--instance_prompt", "a photo of sks dog", "--output_dir", tmp_path / "out", "--report_to", "none"]
    return [str(word) for word in words]


@pytest.fixture
def refusal(parse, good, capsys):
    """The message with which `refusal(*flags)` ends."""

    def refuse(*flags: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse.parse_args([*good, *flags])
        assert stop.value.code == 2
        return capsys.readouterr().err

    return refuse


def flags_of(parse, wanted) -> list[str]:
    """The names of the flags whose options the function accepts."""
    return [name for name, options in parse.FLAGS.items() if wanted(options)]


# ---- switches ----


def test_every_switch_takes_true_and_false_after_a_blank_or_an_equals_sign(parse, good):
    """As other trainers' commands have it, in any case; a later one wins, and a saved command line may hold them."""
    switches = flags_of(parse, lambda options: options.get("action") is parse.Switch)
    assert len(switches) > 15 and {"push_to_hub", "cache_latents", "hub_private"} <= {*switches}
    for name in switches:
        forms = {(f"--{name}",): True, (f"--{name}=true",): True, (f"--{name}", "True"): True,
                 (f"--{name}=False",): False, (f"--{name}", "false"): False,
                 (f"--{name}", f"--{name}=false"): False, (f"--{name}=false", f"--{name}"): True}  # fmt: skip
        for words, value in forms.items():
            found = parse.build_parser().parse_args([*good, *words])
            assert getattr(found, name) is value, words
    assert {name for name in switches if parse.DEFAULTS[name]} > {"hub_private"}


def test_a_switch_that_is_on_by_default_is_turned_off_with_no(parse, good):
    for words, value in {("--no-hub_private",): False, ("--no-hub_private", "false"): True}.items():
        assert parse.build_parser().parse_args([*good, *words]).hub_private is value


@pytest.mark.parametrize("word", ["yes", "0", "photo"])
def test_any_other_word_after_a_switch_is_an_error(refusal, word):
    assert "--push_to_hub" in refusal("--push_to_hub", word)


def test_gradient_checkpointing_takes_true_false_and_a_share(parse, good):
    values = {"--gradient_checkpointing": 1, "--gradient_checkpointing=True": 1, "--gradient_checkpointing=false": 0,
              "--gradient_checkpointing=0.5": 0.5}  # fmt: skip
    for word, value in values.items():
        assert parse.parse_args([*good, word]).gradient_checkpointing == value


def test_a_switch_turned_off_stands_in_no_saved_settings_and_one_turned_on_does(script, tiny, tmp_path):
    """`@config.args` gives back what was meant."""
    run = start_run(script, tiny, tmp_path, "--random_flip=false", "--cache_latents", "--no-hub_private")
    lines = script.write_config(run).splitlines()
    assert {"--cache_latents", "--no-hub_private"} <= {*lines} and "random_flip" not in "".join(lines)


# ---- paths ----


def test_the_home_folder_is_meant_by_a_tilde_in_every_path_flag(parse, good, tmp_path, monkeypatch):
    """After a blank, an equals sign, which shells leave alone, a comma, and in a saved command line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = flags_of(parse, lambda options: options["type"] is parse.to_path)
    assert sorted(names) == sorted(parse.PATH_FLAGS)
    for name in names:
        several = parse.FLAGS[name].get("nargs") == "+"
        expected = [f"{tmp_path}/x"] if several else f"{tmp_path}/x"
        (tmp_path / "saved.args").write_text(f"--{name} ~/x")
        for words in ([f"--{name}", "~/x"], [f"--{name}=~/x"], [f"@{tmp_path / 'saved.args'}"], ["@~/saved.args"]):
            found = parse.parse_words(parse.build_parser(), [*good, *words])
            assert getattr(found, name) == expected, words


def test_a_flag_that_names_a_file_or_a_folder_is_a_path_flag(parse):
    """A new one cannot be forgotten: by its name or its help."""
    texts = flags_of(parse, lambda options: options["type"] is str)
    named = [name for name in texts if re.search(r"(_dir|_path|_file|_image|_from|_folder)$", name)]
    named += [
        name for name in texts if re.match(r"(a )?(folder|file|path|JSON)\b(?! variant)", parse.FLAGS[name]["help"])
    ]
    assert named == []


def test_references_of_one_prompt_are_joined_with_a_comma_and_each_may_begin_with_a_tilde(tmp_path, monkeypatch):
    parse = load_arguments(f"{SCRIPTS['i2i']}.py")
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--validation_image", "~/a.png,~/b.png", "c~.png"]
    assert parse.build_parser().parse_args(words).validation_image == [f"{tmp_path}/a.png,{tmp_path}/b.png", "c~.png"]


@pytest.mark.parametrize("prompt", ["~", "~/x is a path", "a,~ b"])
def test_a_tilde_in_a_prompt_is_text(parse, good, prompt):
    assert parse.parse_args([*good, "--instance_prompt", prompt]).instance_prompt == prompt


# ---- [trigger] ----


def test_trigger_stands_for_the_instance_prompt_in_every_prompt_that_is_drawn(parse, good):
    words = ["--validation_prompt", "[trigger] in a bucket", "a dog", "[trigger], [trigger]"]
    words += ["--final_validation_prompt", "[trigger] on the moon"]
    args = parse.parse_args([*good, *words])
    prompt = "a photo of sks dog"
    assert args.validation_prompt == [f"{prompt} in a bucket", "a dog", f"{prompt}, {prompt}"]
    assert args.final_validation_prompt == f"{prompt} on the moon"
    assert parse.final_prompts(args) == [args.final_validation_prompt]


def test_trigger_is_replaced_in_a_class_prompt_too(good):
    parse = load_arguments(f"{SCRIPTS['t2i']}.py")
    words = ["--with_prior_preservation", "--class_data_dir", "classes", "--class_prompt", "not [trigger]"]
    assert parse.parse_args([*good, *words]).class_prompt == "not a photo of sks dog"


def test_trigger_in_the_instance_prompt_is_refused(refusal):
    message = refusal("--instance_prompt", "a photo of [trigger] dog", "--validation_prompt", "[trigger]")
    assert "--instance_prompt: [trigger] stands for --instance_prompt" in message and "contains it" in message


@pytest.mark.parametrize("flag", ["--validation_prompt", "--final_validation_prompt"])
def test_trigger_without_an_instance_prompt_is_refused(refusal, flag):
    message = refusal("--instance_prompt", "", flag, "[trigger] in a bucket")
    assert f"{flag}: [trigger] stands for --instance_prompt, which is missing" in message


# ---- likely causes ----


@pytest.mark.parametrize("flags", [
    ["--instance_prompt", "a", "photo", "of", "sks", "dog"],
    ["--output_dir", "my", "folder", "--rank", "4"],
    ["--lora_layers", "attn.to_q,", "attn.to_k"],
    ["--report_to", "tensorboard", "wandb"],
    ["--aspect_ratio_buckets", "832,1216", "1216,832"],
], ids=" ".join)  # fmt: skip
def test_a_text_without_quotes_is_one_error_that_says_so(refusal, flags):
    message = refusal(*flags)
    assert message.count("\n") == 1 and "unrecognized arguments" in message
    assert "Quote a text with spaces: --instance_prompt 'a photo of sks dog'" in message


def test_an_unknown_flag_is_not_taken_for_a_text_without_quotes(refusal):
    message = refusal("--learnin_rate", "1e-4")
    assert "unrecognized arguments: --learnin_rate 1e-4" in message and "Quote" not in message


@pytest.mark.parametrize("size", ["832,1216", "832x1216", "1024.0"])
def test_two_numbers_for_the_resolution_are_led_to_the_buckets(refusal, size):
    message = refusal("--resolution", size)
    assert f"'{size}'" in message and "--aspect_ratio_buckets '832,1216'" in message


def test_two_words_for_the_resolution_are_led_on_too(refusal):
    message = refusal("--resolution", "832", "1216")
    assert "unrecognized arguments: 1216. For sizes that are not square" in message and "Quote" not in message


@pytest.mark.parametrize("texts", [("",), ("a dog", " ")])
def test_an_empty_validation_prompt_is_refused_instead_of_drawn(refusal, texts):
    assert "--validation_prompt: a text is empty" in refusal("--validation_prompt", *texts)


def test_a_class_that_is_called_as_the_instance_is_refused(good, tmp_path, capsys):
    """Prior preservation would hold the base model's idea of the very words that are to be learned."""
    t2i = load_arguments("train_dreambooth_lora_flux2.py")
    flags = ("--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"), "--class_prompt")
    with pytest.raises(SystemExit):
        t2i.parse_args([*good, *flags, "a photo of sks dog"])
    assert "--class_prompt: is the same as --instance_prompt" in capsys.readouterr().err
    assert t2i.parse_args([*good, *flags, "a photo of a dog"]).with_prior_preservation


def test_a_file_instead_of_a_data_folder_is_refused(refusal, tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    assert "photos.zip: no such folder" in refusal("--instance_data_dir", str(tmp_path / "photos.zip"))


def test_of_the_processes_of_a_machine_one_tells_a_mistake(parse, good, capsys, monkeypatch):
    for name, value in {"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    for words in (["--rank", "x"], ["--resolution", "500"], ["@no.args"]):
        for local_rank, told in {"0": True, "1": False, "7": False}.items():
            monkeypatch.setenv("LOCAL_RANK", local_rank)
            waits: list[float] = []
            monkeypatch.setattr(parse.time, "sleep", waits.append)
            with pytest.raises(SystemExit) as stop:
                parse.parse_args([*good, *words])
            assert stop.value.code == 2 and bool(capsys.readouterr().err) is told
            assert bool(waits) is not told, "or the launcher would end the one that speaks"


def test_a_mistake_in_a_notebook_is_headed_by_the_scripts_name(refusal, parse, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    for flags in (["--rank", "x"], ["--resolution", "500"]):
        assert refusal(*flags).startswith(f"{Path(parse.__file__).name}: ")


# ---- values that make a useless run ----


USELESS = {
    "--lora_dropout": ("1.0", "from 0 to 0.99"),
    "--lora_alpha": ("1e-4", "at least 0.01"),
    "--max_grad_norm": ("1e-9", "at least 0.001"),
    "--adam_epsilon": ("1", "to 0.01"),
    "--adam_weight_decay": ("1000", "from 0 to 10"),
    "--logit_mean": ("50", "to 10"),
    "--lr_power": ("1000", "from 0 to 10"),
    "--adam_beta1": ("1.0", "from 0 to 0.99"),
}


@pytest.mark.parametrize("flag", USELESS)
def test_a_value_with_which_nothing_would_be_learned_is_refused(refusal, flag):
    value, reason = USELESS[flag]
    message = refusal(flag, value)
    assert f"argument {flag}: must be" in message and reason in message


def test_the_defaults_are_values_of_their_own_flags(parse):
    """No flag refuses its own default."""
    for name, options in parse.FLAGS.items():
        if callable(options["type"]) and isinstance(options["default"], (int, float)) and "action" not in options:
            assert options["type"](str(options["default"])) == options["default"], name


def test_a_type_that_refuses_says_so_by_argparses_own_error(parse):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be at least 1e-30, not 0"):
        parse.FLAGS["learning_rate"]["type"]("0")


@pytest.mark.slow
@pytest.mark.scripts("t2i")
@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine", "polynomial", "cosine_with_restarts"])
def test_a_warm_up_longer_than_the_run_is_told_with_where_the_rate_ends(
    script, tiny, photos, tmp_path, capsys, schedule
):
    """Before anything is loaded; a run with room for it is told nothing."""
    words = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", photos, "--instance_prompt", "a toy"]
    words += ["--resolution", 64, "--output_dir", tmp_path / "out", "--report_to", "none", "--dry_run"]
    words += ["--lr_scheduler", schedule, "--lr_warmup_steps", 50, "--max_train_steps"]
    line = "WARNING plan: --lr_warmup_steps 50 in 10 steps: the learning rate ends at 20% of its peak"
    for steps, told in {10: True, 51: False}.items():
        script.main(script.parse_args([*map(str, words), str(steps)]))
        assert (line in capsys.readouterr().err) is told


# ---- log lines ----


@pytest.mark.scripts("t2i")
def test_log_lines_carry_their_level(script, capsys):
    script.set_up_logging()
    for level in ("info", "warning", "error"):
        getattr(script.log, level)(f"text of {level}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1:] for line in lines] == [
        ["INFO", "text", "of", "info"], ["WARNING", "text", "of", "warning"], ["ERROR", "text", "of", "error"],
    ]  # fmt: skip


WORKER = """
import multiprocessing, sys
sys.path.insert(0, {root!r})
from {module} import log, start_worker

def work():
    start_worker(0)
    log.warning("from a worker")

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join()
"""


@pytest.mark.scripts("t2i")
@pytest.mark.slow
def test_a_warning_of_a_spawned_worker_carries_its_level(script, tmp_path):
    """As Windows and macOS start the loader's workers: they inherit nothing."""
    (tmp_path / "work.py").write_text(WORKER.format(root=str(ROOT), module=script.__name__))
    ended = run_python(tmp_path / "work.py", timeout=180)
    assert re.search(r"\d\d:\d\d:\d\d WARNING from a worker\n", ended.stderr), ended.stderr


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize(
    ("release", "given", "set_to"),
    [
        ("6.8.0-45-generic", {}, "expandable_segments:True"),
        ("6.8.0-45-generic", {"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ("6.8.0-45-generic", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
        ("5.15.167.4-microsoft-standard-WSL2", {}, None),
    ],
)
def test_gpu_memory_is_allocated_in_segments_that_grow_unless_the_user_says_otherwise(script, release, given, set_to):
    """Before torch is imported; not under WSL, whose driver fails at the first allocation."""
    lines = Path(script.__file__).read_text(encoding="utf-8").split("\n")
    (start,) = (number for number, line in enumerate(lines) if "PYTORCH_CUDA_ALLOC_CONF" in line)
    assert start < lines.index("import torch") and lines[start].startswith("if ")
    surroundings = {"sys": SimpleNamespace(platform="linux"), "platform": SimpleNamespace(release=lambda: release)}
    os_environ = SimpleNamespace(environ=dict(given))
    exec("\n".join(lines[start : start + 2]), {**surroundings, "os": os_environ})
    assert os_environ.environ.get("PYTORCH_ALLOC_CONF") == set_to
