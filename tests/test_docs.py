"""README and docs: links lead somewhere, pages are what their generators write, messages and metrics are real."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT, existing_scripts, load_arguments, read_script, run_python

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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


def test_the_messages_of_the_troubleshooting_page_stand_in_the_scripts():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.M)
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(map(read_script, existing_scripts())))
    assert len(quoted) > 20 and [words for words in quoted if words not in source] == []


def fenced(page: Path) -> list[str]:
    """The shell blocks of a page."""
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


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
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", page.read_text(encoding="utf-8")))
    assert sorted(flag for flag in named - known - others if f'"{flag}"' not in tools) == []


def launch_lines() -> list[str]:
    """Every complete training command of README and docs, and the rows of README's table by GPU."""
    lines = []
    for block in (block for page in PAGES for block in fenced(page)):
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


@pytest.mark.e2e
def test_every_metric_that_a_run_writes_is_explained(train):
    """Of a run with validation; `peak_device_gb` is a GPU's."""
    folder = train("--validation_prompt", "a toy", "--validation_steps", "1", "--num_inference_steps", "2",
                   "--num_validation_images", "1", "--max_train_steps", "1")  # fmt: skip
    keys = {key for line in (folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    text = (ROOT / "docs" / "output.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"`([a-z_0-9.]+)`", text.partition("## Metrics")[2].partition("## Exit codes")[0]))
    keys = {re.sub(r"loss_sigma_0\.\d", "loss_sigma_0.0", key) for key in keys}
    assert keys <= rows and {"loss", "lora_norm", "update_ratio"} <= keys


def test_the_settings_tool_runs_as_a_program():
    before = (ROOT / "docs" / "settings.md").read_bytes()
    assert run_python("tools/settings_page.py").returncode == 0
    assert (ROOT / "docs" / "settings.md").read_bytes() == before
