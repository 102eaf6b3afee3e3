"""The notebook of the examples and the launch of several processes from one run as they stand, in a real kernel."""

import re

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
PAGE = ROOT / "docs" / "notebooks.md"
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def execute(notebook: nbformat.NotebookNode, folder, monkeypatch) -> str:
    """Runs all cells in `folder`, which has what the repository has; returns the text that they printed."""
    for name in ("configs", "tiny_flux2", "tools", "train_dreambooth_lora_flux2.py"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(folder)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return "".join(out.text for cell in notebook.cells for out in cell.get("outputs", ()) if "text" in out)


def test_the_notebook_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert NOTEBOOK.stat().st_size < 10_000


def test_the_notebook_trains_and_shows_its_bar_one_sheet_and_an_image(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    training = next(cell for cell in notebook.cells if "STEPS = 300" in cell.source)
    training.source = training.source.replace("STEPS = 300", "STEPS = 4").replace(
        "str(STEPS)", 'str(STEPS), "--validation_steps", "2", "--num_inference_steps", "1"'
    )
    said = execute(notebook, tmp_path, monkeypatch)
    assert re.search(r"train: 4/4 \|.*left, loss \(running mean\) \d\.\d{4}, lr \d", said), said
    sheets = [out for out in training.outputs if "image/png" in out.get("data", {})]
    assert len(sheets) == 1, "every validation would add one"
    assert "image/png" in notebook.cells[-2].outputs[-1].data


def test_the_page_trains_on_two_processes_and_the_line_of_a_stopped_run_is_its_call(tmp_path, monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "def train" in block)
    definition, call = code.split("\n\n\nnotebook_launcher")
    flags = ["@configs/runs/demo_cpu.args", "--instance_data_dir", "photos", "--output_dir", "out", "--offload"]
    flags += ["--max_train_minutes", "1e-6", "--skip_final_inference", "--num_validation_images", "0"]
    flags += ["--dataloader_num_workers", "0"]
    cells = ["%run tools/draw_demo_photos.py photos", f"{definition}\n\nnotebook_launcher{call}"]
    cells[1] = cells[1].replace('["@configs/runs/dog.args", "--max_train_steps", "200"]', repr(flags))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with pytest.raises(Exception, match="exitcode"):  # 143: the time limit
        execute(notebook, tmp_path, monkeypatch)
    said = "".join(out.get("text", "") for cell in notebook.cells for out in cell.outputs)
    assert "2 processes meet" in said and re.search(r"stopped at step \d", said), said
    assert "notebook_launcher(train, (['@out/config.args', '--resume_from_checkpoint', 'latest'],), 2)" in said
