"""No secret leaves, nothing runs that was only meant to be read, no path leads out, no prompt writes more than text."""

import ast
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from conftest import draw_photo
from helpers import ROOT, run_python
from runs import command_line
from servers import Bomb, Hub, point_to, saved
from unit_parts import check_samples, start_run

pytestmark = pytest.mark.scripts("t2i")

# Made up, in the form of a real one.
CANARY = "hf_CanaryCanaryCanaryCanaryCanary0123"
DRAWS = ("--validation_prompt", "a toy", "--num_validation_images", "1", "--num_inference_steps", "1")


def holders(folder: Path, secret: str = CANARY) -> list[str]:
    """The files below a folder that hold the secret, in more than one encoding."""
    needles = [secret.encode(), secret.encode("utf-16-le"), secret.encode().hex().encode()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(needle in path.read_bytes() for needle in needles)]


# ---------------------------------------------------------------------------------------------------------------------
# Canary tokens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize("place", ["environment", "flag", "saved command line"])
def test_a_token_is_used_for_the_hub_and_is_in_nothing_that_is_written(
    script, train, cache, monkeypatch, tmp_path, capsys, place
):
    """0 hits in the output folder, TensorBoard's files, what is uploaded, stdout and stderr."""
    words = {"environment": [], "flag": ["--hub_token", CANARY], "saved command line": [f"@{tmp_path / 'token.args'}"]}
    (tmp_path / "token.args").write_text(f"--hub_token {CANARY}\n")
    flags = ("--report_to", "tensorboard", "--push_to_hub", "--max_train_steps", "2", "--checkpointing_steps", "1")
    with Hub() as hub:
        point_to(monkeypatch, hub, tmp_path / "hub_cache", CANARY if place == "environment" else None)
        folder = train("--latents_cache_dir", cache, *flags, *DRAWS, *words[place])
        assert {request.token for request in hub.requests if request.path == "/api/repos/create"} == {CANARY}
    assert hub.files and not [name for name, data in hub.files.items() if CANARY.encode() in data]
    assert any("tfevents" in path.name for path in folder.rglob("*"))
    assert holders(folder) == [] and CANARY not in "".join(capsys.readouterr())
    assert holders(folder / "logs", str(tmp_path)) == []  # nor folders of this machine in what trackers show


@pytest.mark.e2e
@pytest.mark.slow
def test_tokens_in_the_environment_of_a_program_are_in_nothing_that_wandb_and_tensorboard_write(
    t2i, tiny, photos, cache, tmp_path, monkeypatch
):
    """A process of its own, because wandb records its command line, its surroundings and its output."""
    pytest.importorskip("wandb")
    key = "0123456789abcdef" + "c0ffee" * 4
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", key)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir()
    words = command_line(tiny, photos, tmp_path / "out", "--latents_cache_dir", cache, "--max_train_steps", "2", *DRAWS)
    ended = run_python(
        ROOT / Path(t2i.__file__).name, *words, "--report_to", "tensorboard,wandb", cwd=tmp_path, timeout=180
    )
    assert ended.returncode == 0, ended.stderr
    written = [path.name for path in (tmp_path / "wandb").rglob("*")]
    assert any(name.endswith(".wandb") for name in written) and any("tfevents" in p.name for p in tmp_path.rglob("*"))
    for secret in (CANARY, key):
        assert holders(tmp_path, secret) == [] and secret not in ended.stdout + ended.stderr


@pytest.mark.e2e
def test_the_line_that_goes_on_does_not_tell_the_token(script, train, cache, capsys):
    token = "of-a-form-that-nobody-knows"
    with pytest.raises(SystemExit):
        train("--latents_cache_dir", cache, "--hub_token", token, "--max_train_minutes", "1e-6")
    printed = "".join(capsys.readouterr())
    assert "config.args', '--resume_from_checkpoint', 'latest'" in printed and token not in printed


# ---------------------------------------------------------------------------------------------------------------------
# Pickles and code
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bomb(tmp_path):
    """(bytes of a pickle that makes a folder when a careless loader reads it, that folder)."""
    return saved(Bomb(tmp_path / "ran")), tmp_path / "ran"


def test_the_pickle_of_these_tests_would_run_in_a_careless_loader(bomb):
    import torch

    torch.load(io.BytesIO(bomb[0]), weights_only=False)
    assert bomb[1].is_dir()


@pytest.mark.e2e
def test_a_pickle_in_the_cache_is_not_run_and_made_anew(script, train, tmp_path, bomb):
    """Prompts and images; the same mends a file that a crash has damaged."""
    flags = ("--cache_latents", "--latents_cache_dir", tmp_path / "cache", "--max_train_steps", "1")
    first = train(*flags, output="first")
    files = [*(tmp_path / "cache").rglob("*.safetensors")]
    contents = {path: path.read_bytes() for path in files}
    for number, path in enumerate(files):
        path.write_bytes((bomb[0], b"", contents[path][:-8])[number % 3])
    (tmp_path / "cache" / "checked_images.json").write_bytes(bomb[0])
    second = train(*flags, output="second")
    assert not bomb[1].exists() and {path: path.read_bytes() for path in files} == contents
    assert (first / "pytorch_lora_weights.safetensors").read_bytes() == (
        second / "pytorch_lora_weights.safetensors"
    ).read_bytes()


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["training_state.safetensors", "state.json", "manifest.json"])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(script, train, cache, bomb, name):
    """With a manifest that fits it, as an attacker would write."""
    flags = ("--latents_cache_dir", cache, "--max_train_steps", "2")
    folder = train(*flags) / "checkpoint-2"
    (folder / name).write_bytes(bomb[0])
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[name] = script.file_stamp(folder / name)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    for stray in ("random_states_0.pkl", "optimizer.bin", "custom_checkpoint_0.pkl", "pytorch_lora_weights.bin"):
        (folder / stray).write_bytes(bomb[0])  # what other trainers would load
    with pytest.raises(Exception) as caught:
        train(*flags, "--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    assert not isinstance(caught.value, AssertionError) and not bomb[1].exists()


@pytest.mark.e2e
def test_strange_pickles_beside_a_good_checkpoint_are_not_looked_at(script, train, cache, bomb):
    flags = ("--latents_cache_dir", cache)
    folder = train(*flags, "--max_train_steps", "1")
    for place in (folder, folder / "checkpoint-1"):
        for name in ("random_states_0.pkl", "optimizer.bin", "scheduler.bin", "pytorch_lora_weights.bin"):
            (place / name).write_bytes(bomb[0])
    train(*flags, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    assert not bomb[1].exists()


@pytest.mark.parametrize("name", ["lora.safetensors", "pytorch_lora_weights.bin", "lora.pt"])
def test_a_pickle_to_start_from_is_refused_and_not_run(script, train, tmp_path, bomb, name):
    (tmp_path / name).write_bytes(bomb[0])
    with pytest.raises(script.UserError, match=name):
        train("--init_lora_from", tmp_path / name)
    assert not bomb[1].exists()


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model whose files may be replaced."""
    return shutil.copytree(tiny, tmp_path / "model")


WEIGHTS = {
    "text_encoder": "pytorch_model.bin",
    "transformer": "diffusion_pytorch_model.bin",
    "vae": "diffusion_pytorch_model.bin",
}


@pytest.mark.e2e
@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("how", ["instead", "hidden", "renamed"])
def test_a_model_of_pickles_is_refused_and_not_run(script, train, model, bomb, part, how):
    """Instead of the weights; behind a file that only looks like them; as the weights themselves."""
    weights = next((model / part).glob("*.safetensors"))
    if how == "renamed":
        weights.write_bytes(bomb[0])
    else:
        (model / part / WEIGHTS[part]).write_bytes(bomb[0])
        weights.rename(weights.with_name("other.safetensors")) if how == "hidden" else weights.unlink()
    with pytest.raises(Exception) as caught:
        train("--pretrained_model_name_or_path", model)
    assert not isinstance(caught.value, AssertionError) and not bomb[1].exists()


@pytest.mark.e2e
def test_pickles_and_code_beside_a_good_model_are_not_looked_at(script, train, model, cache, bomb):
    """A model repository may hold anything; `auto_map` asks for code of its own."""
    for part, name in WEIGHTS.items():
        (model / part / name).write_bytes(bomb[0])
        (model / part / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(bomb[1])!r})\nclass Evil: pass\n")
        config = json.loads((model / part / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "modeling_evil.Evil", "AutoModel": "modeling_evil.Evil"}
        (model / part / "config.json").write_text(json.dumps(config))
    train("--pretrained_model_name_or_path", model, "--max_train_steps", "1")
    assert not bomb[1].exists()


@pytest.mark.scripts("t2i", "i2i")
def test_a_data_set_with_a_loading_script_or_a_pickle_does_not_run_them(script, tiny, tmp_path, bomb):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import os\nos.mkdir({str(bomb[1])!r})\n")
    (folder / "train.pkl").write_bytes(bomb[0])
    with pytest.raises(script.UserError, match="cannot be loaded|not in"):
        start = start_run(script, tiny, tmp_path / "run", "--dataset_name", folder)
        script.list_samples(start.args)
    assert not bomb[1].exists()


# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------

OUTWARD = ("../secret.png", "sub/../../secret.png", "{absolute}", "..", "nul\0.png", "n" * 300 + ".png", "")


@pytest.mark.scripts("t2i", "i2i")
@pytest.mark.parametrize("name", OUTWARD, ids=ascii)
@pytest.mark.parametrize("column", ["file_name", "before_file_name"])
def test_a_metadata_row_that_leads_out_of_the_folder_is_refused(script, tiny, tmp_path, name, column):
    """To files that are there; the references of the image-to-image script too."""
    secret, folder = draw_photo(tmp_path / "secret.png", (70, 70), 0), tmp_path / "data"
    draw_photo(folder / "a.png", (70, 70), 1)
    row = {"file_name": "a.png", "text": "x", column: name.format(absolute=secret)}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    run = start_run(script, tiny, tmp_path / "run", "--instance_data_dir", folder)
    if column == "file_name" or (name and script.TASK == "image-to-image"):
        with pytest.raises(script.UserError, match="leads out|needs a 'file_name'"):
            script.list_samples(run.args)
    else:  # no reference, or a script that has none
        assert [row.image.name for row in script.list_samples(run.args)] == ["a.png"]


@pytest.mark.parametrize(("name", "refused"), [("lab/images", True), ("cached", False), ("own", False)])
def test_a_table_from_the_hub_cannot_name_a_image_of_this_machine(script, tiny, tmp_path, monkeypatch, name, refused):
    """Its cells hold bytes, or files that were downloaded with it; a table of the user's own may name any file."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    photo = draw_photo(tmp_path / ("cache" if name == "cached" else "private") / "photo.png", (70, 70), 0)
    cells = {"image": [{"bytes": None, "path": str(photo)}, {"bytes": photo.read_bytes(), "path": "x.png"}]}
    table = datasets.Dataset.from_dict(cells, features=datasets.Features({"image": datasets.Image()}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    flags = ("--dataset_name", "lab/images" if refused else name, "--cache_dir", tmp_path / "cache")
    run = start_run(script, tiny, tmp_path / "run", *flags)
    if refused:
        with pytest.raises(
            script.UserError, match="row 0: cannot be read .its path leads out of the data set"
        ) as error:
            check_samples(script, run.args, tmp_path / "index")
        assert "row 1" not in str(error.value)
    else:
        assert len(check_samples(script, run.args, tmp_path / "index")) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------

PROMPTS = {
    "yaml": 'a "toy": [x]\n---\nlicense: mit\n---\n- a\n',
    "a yaml tag": "!!python/object/apply:os.system ['touch x']",
    "yaml anchors": "&a *a %YAML 1.1",
    "a code fence": "```\n```python\nimport os\n```",
    "a table": "a | b |\n|---|---|\n| c",
    "html": "<script>alert(1)</script><img src=x onerror=y>",
    "a heading": "# big\n## bigger\n> quoted",
    "a link": "[click](javascript:alert) ![x](http://x/y.png)",
    "quotes": "'''\"\"\" \\' \\\" \\\\",
    "braces": "{0} {prompt} {head} {{}} %s %(x)s $x ${x}",
    "control characters": "a\x00b\x07c\x1b[31md\re\tf\x85g\u2028h",
    "python": "' + __import__('os').getcwd() + '",
    "unicode": "ein Pudel 日本 \N{DOG FACE}\u202e",
    "much": "toy " * 3000,
}


@pytest.fixture(scope="module")
def card_of(script, tiny, tmp_path_factory):
    """Writes the card of a run with this prompt; returns (its YAML head, its body, the snippet's syntax tree)."""

    def write(prompt: str) -> tuple[dict, str, ast.Module]:
        folder = tmp_path_factory.mktemp("card")
        run = start_run(script, tiny, folder, f"--instance_prompt={prompt}", f"--final_validation_prompt={prompt}")
        run = replace(run, trigger=prompt)  # as a run whose captions contain it
        script.write_card(run, SimpleNamespace(step=3), [(prompt, "samples/x.png")])
        text = (run.output_dir / "README.md").read_bytes().decode()
        head, body = text.removeprefix("---\n").split("\n---\n", 1)
        assert huggingface_hub.ModelCard(text).data.license == yaml.safe_load(head)["license"]
        fence = body.split("```python\n")[1].split("\n```")[0]
        return yaml.safe_load(head), body, ast.parse(fence)

    return write


@pytest.fixture(scope="module")
def plain_card(card_of):
    """The card of a harmless prompt."""
    return card_of("a toy")


@pytest.mark.parametrize("case", PROMPTS)
def test_a_hostile_prompt_is_text_in_the_card_and_nothing_else(card_of, plain_card, case):
    """The head parses to the same keys, the body has the same lines, the snippet the same code around the prompt."""
    prompt = PROMPTS[case]
    (head, body, tree), (plain_head, plain_body, plain_tree) = card_of(prompt), plain_card
    assert head.keys() == plain_head.keys()
    assert head["instance_prompt"] == prompt and head["widget"][0]["text"] == prompt
    assert {key: value for key, value in head.items() if key not in ("instance_prompt", "widget")} == {
        key: value for key, value in plain_head.items() if key not in ("instance_prompt", "widget")
    }
    assert len(body.splitlines()) == len(plain_body.splitlines())
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value == prompt]
    assert len(constants) == 1
    constants[0].value = "a toy"
    assert ast.dump(tree) == ast.dump(plain_tree)
    trigger = next(line for line in body.splitlines() if line.startswith('Write "'))
    assert not re.search(r"(?<!\\)[<>\[\]`|]", trigger)
    assert [c for c in body if c != "\n" and not c.isprintable()] == []


@pytest.mark.parametrize("prompt", [*PROMPTS.values(), "--rank=4 x", "--rank", "-", "- a toy", "@x.args", "# x", " x "])
def test_a_saved_command_line_gives_back_every_prompt(script, tiny, tmp_path, prompt):
    """Byte for byte, with its carriage returns, and when it looks like a flag; none can be an argument of a program."""
    prompt = prompt.replace("\0", "")
    run = start_run(script, tiny, tmp_path, f"--instance_prompt={prompt}", f"--validation_prompt={prompt}")
    (tmp_path / "config.args").write_bytes(script.write_config(run).encode())
    args = script.parse_args([f"@{tmp_path / 'config.args'}", "--overwrite_output_dir"])
    assert args.instance_prompt == prompt and args.validation_prompt == [prompt] and args.rank == 4


def test_words_that_are_no_utf8_are_refused_by_name(script, tiny, photos, tmp_path, capsys):
    """They could not be written into the card of a finished run."""
    word = os.fsdecode(b"caf\xe9")
    with pytest.raises(SystemExit) as stop:
        script.parse_args(command_line(tiny, photos, tmp_path / "out", "--instance_prompt", word))
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "'caf\\udce9': cannot read it" in printed
