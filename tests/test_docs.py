"""README and docs: links lead somewhere, pages are what their generators write, messages and metrics are real."""

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import IMAGE_TO_IMAGE, ROOT, TEXT_TO_IMAGE, existing_scripts, load_arguments, read_script, run_python

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "tiny_flux2/README.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_the_readme_can_be_read_in_five_minutes_and_names_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text] == []


def test_the_settings_page_is_what_the_parsers_say(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import settings_page

    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()
    assert (
        "| `--cond_image_column` | I |" in settings_page.page() and "| `--class_prompt` | T |" in settings_page.page()
    )


def texts_of(script: str) -> set[str]:
    """Every text of a script, as the user sees it: an f-string with NUL for what differs."""
    found = set()
    for node in ast.walk(ast.parse(read_script(script))):
        if isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def is_said(words: str, texts: set[str]) -> bool:
    """Whether one of the texts holds the words; `...` stands for what differs."""
    pattern = re.compile(".+".join(re.escape(piece.strip()) for piece in words.split("...")), re.S)
    return any(pattern.search(text) for text in texts)


def test_the_messages_of_the_troubleshooting_page_stand_in_the_scripts():
    text = (
        (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Messages of other programs")[0]
    )
    quoted = re.findall(r"^\| `([^|]+)` \|", text, re.M)
    texts = set().union(*map(texts_of, existing_scripts()))
    assert len(quoted) > 60 and [words for words in quoted if not is_said(words, texts)] == []


def test_a_message_that_no_script_has_is_found():
    texts = {"--a \0: no such file; give \0", "needs 1 GB"}
    assert is_said("no such file; give ...", texts) and is_said("--a ... no such file", texts)
    assert not is_said("no such folder", texts) and not is_said("needs 1 GB ... no such file", texts)


def test_every_choice_names_a_function_of_the_scripts():
    """And says why; a function that is renamed has to be renamed there."""
    page = (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| (.+) \| (`.+`) \|$", page, re.M)
    trees = [ast.parse(read_script(script)) for script in existing_scripts()]
    known = {node.name for tree in trees for node in tree.body if hasattr(node, "name")}
    named = {name for *_, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert len(rows) > 35 and sorted(named - known) == []


def blocks() -> list[tuple[str, str, str]]:
    """(page, language, content) of every fenced block."""
    return [
        (page.name, language, content)
        for page in PAGES
        for language, content in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    ]


@pytest.mark.parametrize(("page", "language", "content"), blocks())
def test_every_fenced_block_is_well_formed(page, language, content):
    """Shell, Python, JSON lines, YAML; without a language stands only what is printed."""
    if language == "bash":
        checked = subprocess.run(["bash", "-n"], input=content, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        targets = re.findall(r"^make (\S+)", content, re.M)
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets)
    elif language == "python":
        compile(content, page, "exec")
    elif language == "json":
        assert all(map(json.loads, content.splitlines()))
    elif language == "yaml":
        assert yaml.safe_load(content)
    else:
        assert language == "" and not re.search(r"^(make|python|accelerate|pip|git) ", content, re.M)


def script_calls() -> list[tuple[str, str]]:
    """(script, rest of the line) of every start of a script in a block, in Slurm's and Kubernetes' quotes too."""
    shown = "".join(content for _, language, content in blocks() if language in ("bash", "yaml"))
    return re.findall(r"(train_\w+\.py) (.*)", shown.replace("\\\n", " "))


@pytest.mark.parametrize(("script", "rest"), script_calls())
def test_every_start_of_a_script_in_a_block_has_flags_that_it_knows(script, rest):
    rest = re.split(r" & |\s#|\"]|'$", rest)[0]
    words = [re.sub(r"^@run\.args$", "@configs/runs/dog.args", word) for word in shlex.split(rest)]
    words = [f"@{ROOT / word[1:]}" if word.startswith("@") else word for word in words]
    arguments = load_arguments(script)
    assert arguments.parse_words(arguments.build_parser(), words).pretrained_model_name_or_path


def flags_alone() -> list[tuple[str, str]]:
    """(page, line) of every line of a shell block that begins with a flag and is not the rest of a command."""
    return [
        (page, line)
        for page, language, content in blocks()
        for line in content.replace("\\\n", " ").splitlines()
        if language == "bash" and line.startswith("--")
    ]


@pytest.mark.parametrize(("page", "line"), flags_alone())
def test_flags_that_stand_alone_are_parsed(page, line):
    arguments = load_arguments(IMAGE_TO_IMAGE if page == "editing.md" else TEXT_TO_IMAGE)
    words = shlex.split(line)
    found = arguments.parse_words(arguments.build_parser(), words)
    assert getattr(found, words[0].partition("=")[0][2:])


def test_the_notebook_example_is_parsed_and_calls_what_is_there():
    code = next(content for _, language, content in blocks() if language == "python" and "parse_args" in content)
    (words,) = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.List))
    names = [alias.name for node in ast.parse(code).body if isinstance(node, ast.ImportFrom) for alias in node.names]
    defined = {node.name for node in ast.parse(read_script(TEXT_TO_IMAGE)).body if hasattr(node, "name")}
    arguments = load_arguments(TEXT_TO_IMAGE)
    first, *rest = ast.literal_eval(words)
    found = arguments.parse_words(arguments.build_parser(), [f"@{ROOT / first[1:]}", *rest])
    assert set(names) <= defined and found.max_train_steps == 20


def test_each_line_by_gpu_is_parsed_and_fits():
    """The README's table is `gpu_lines` of the planner; benchmarks/plan_memory.json has what it shows."""
    rows = json.loads((ROOT / "benchmarks" / "plan_memory.json").read_text(encoding="utf-8"))["fits"]
    arguments = load_arguments(TEXT_TO_IMAGE)
    assert {(row["model"], row["gpu_gb"]) for row in rows} == {
        (model, gpu_gb) for model in ("dev", "klein-9B", "klein-4B") for gpu_gb in (8, 12, 16, 24, 48, 80, 141)
    }
    for row in rows:
        words = shlex.split(row["command"].replace("\\\n", ""))
        found = arguments.parse_words(arguments.build_parser(), words[3:])
        assert row["training_gb"] <= row["gpu_gb"]
        assert (found.resolution, found.stream_blocks) == (row["resolution"], row["stream"])
        assert found.do_fp8_training == (row["base"] == "fp8")


def test_the_table_of_sharded_runs_has_the_planners_numbers():
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "benchmarks" / "plan_memory.json").read_text(encoding="utf-8"))["processes"]
    one, two = ([row for row in rows if row["resolution"] == 1024 and row["nodes"] == count] for count in (1, 2))
    for row, double in zip(one, two, strict=True):
        [line] = [line for line in text.splitlines() if line.casefold().startswith(f"| {row['base']} |")]
        sums = [f"{each['all_reduced_gb_per_step']:.2f}" for each in (row, double)]
        expected = [row["unsharded_gb"], row["per_gpu_gb"], round(row["gathered_gb_per_step"]), *map(float, sums)]
        assert [float(number) for number in re.findall(r"\d+\.?\d*", line.partition("|")[2].partition("|")[2])] == [
            pytest.approx(number, abs=0.05) for number in expected
        ]
    assert f"{round(one[0]['tflop'])} TFLOP" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_uses_the_words_of_the_field(page):
    """`image` and `VAE`; class names of the libraries in code spans keep theirs."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    assert re.findall(r"(?i)\b(?:picture|autoencoder|control image|condition image)s?\b", prose) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_is_one_of_the_scripts_or_of_a_tool(page):
    """A flag that was renamed would be left behind in the text."""
    known = {
        f"--{name}" for flags in json.loads((ROOT / "tests/flags_snapshot.json").read_text()).values() for name in flags
    }
    known |= {f"--no-{name[2:]}" for name in known} | {"--lora_blocks"}
    tools = "".join(path.read_text() for folder in ("tools", "benchmarks") for path in (ROOT / folder).glob("*.py"))
    others = {
        "--nodes",
        "--ntasks-per-node",
        "--gpus-per-node",
        "--rdzv_backend",
        "--rdzv_endpoint",
        "--nnodes",
        "--requeue",
    }
    others |= {
        "--nproc_per_node",
        "--machine_rank",
        "--main_process_ip",
        "--main_process_port",
        "--config_file",
        "--signal",
    }
    others |= {"--exclude", "--local-dir"}  # of `hf download`
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", page.read_text(encoding="utf-8")))
    assert sorted(flag for flag in named - known - others if f'"{flag}"' not in tools) == []


def launch_lines() -> list[str]:
    """Every complete training command of README and docs, and the rows of README's table by GPU."""
    lines = []
    for block in (content for _, language, content in blocks() if language == "bash"):
        joined = block.replace("\\\n", " ")
        lines += [line for line in joined.splitlines() if "--pretrained_model_name_or_path" in line]
    table = re.findall(r"^\| \d+ GB \| `([^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    start = "accelerate launch train_dreambooth_lora_flux2.py --pretrained_model_name_or_path=$MODEL_NAME"
    return lines + [
        f"{start} --instance_data_dir=$INSTANCE_DIR --instance_prompt x --cache_latents {row}" for row in table
    ]


@pytest.mark.parametrize("line", launch_lines())
def test_every_command_of_the_pages_is_parsed_by_its_script(line, tmp_path, monkeypatch):
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    (tmp_path / "dog").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = {"$MODEL_NAME": "black-forest-labs/FLUX.2-dev", "$INSTANCE_DIR": "dog", "$OUTPUT_DIR": "out"}
    rest = words[words.index(script) + 1 :]
    for name, value in names.items():
        rest = [word.replace(name, value) for word in rest]
    args = load_arguments(script).parse_args(rest)
    assert args.cache_latents and args.pretrained_model_name_or_path == "black-forest-labs/FLUX.2-dev"


@pytest.mark.scripts("t2i")
@pytest.mark.e2e
def test_every_metric_that_a_run_writes_is_explained(train):
    """Of a run with validation; `peak_device_gb` is a GPU's."""
    folder = train("--validation_prompt", "a toy", "--validation_steps", "1", "--num_inference_steps", "2",
                   "--num_validation_images", "1", "--max_train_steps", "1")  # fmt: skip
    keys = {key for line in (folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    text = (ROOT / "docs" / "output.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", text.partition("## Metrics")[2].partition("## Exit codes")[0], re.M)
    rows = {key for cell in cells for key in re.findall(r"`([a-z_0-9.]+)`", cell)}
    keys = {re.sub(r"loss_sigma_0\.\d", "loss_sigma_0.0", key) for key in keys}
    assert keys <= rows and {"loss", "lora_norm", "update_ratio"} <= keys
    ends = {"loss_sigma_0.0", "loss_sigma_0.9", "validation_loss_sigma_0.9", "peak_device_gb", "peak_host_gb"}
    assert rows - keys <= ends  # none that is gone


def test_the_settings_tool_runs_as_a_program():
    before = (ROOT / "docs" / "settings.md").read_bytes()
    assert run_python("tools/settings_page.py").returncode == 0
    assert (ROOT / "docs" / "settings.md").read_bytes() == before
