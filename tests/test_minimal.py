"""The minimal file trains as the full text-to-image script does, on both families, and stands alone."""

import ast
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import ROOT, existing_scripts, read_script
from PIL import Image
from runs import column, lora

MINIMAL = ROOT / "examples" / "minimal_flux2_lora.py"
# What the full script has to be told to do what the minimal file always does.
FULL_ONLY = ("--center_crop", "--report_to", "none", "--dataloader_num_workers", "0")


@pytest.fixture(scope="module")
def minimal(t2i) -> ModuleType:
    """The minimal file as a module; `t2i` has set the number of threads."""
    spec = importlib.util.spec_from_file_location("minimal_flux2_lora", MINIMAL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def captioned(photos, tmp_path_factory) -> Path:
    """The five photographs, rotated ones among them, and a PNG; one of them has a caption of its own."""
    folder = tmp_path_factory.mktemp("captioned")
    for photo in photos.glob("*.jpg"):
        shutil.copy(photo, folder)
    Image.open(photos / "03.jpg").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "05.png")
    (folder / "01.txt").write_text("sks toy, lying on its side\n", encoding="utf-8")
    return folder


def same_line(model: Path, data: Path, *flags: str) -> list[str]:
    """The flags that both files take."""
    words = ["--pretrained_model_name_or_path", model, "--instance_data_dir", data, "--resolution", "64"]
    words += ["--instance_prompt", "a photo of sks toy", "--max_sequence_length", "64", "--rank", "4"]
    return [*map(str, words), "--learning_rate", "1e-2", *flags]


@pytest.fixture(scope="module", params=["tiny", "tiny_klein"])
def both(request, t2i, minimal, captioned, tmp_path_factory) -> SimpleNamespace:
    """One run of each file on the same flags, longer than an epoch: the losses of the minimal one, both folders."""
    model, outputs = request.getfixturevalue(request.param), tmp_path_factory.mktemp("both")
    line = same_line(model, captioned, "--max_train_steps", "8", "--seed", "3")
    losses = minimal.main(minimal.parse_args([*line, "--output_dir", str(outputs / "minimal")]))
    t2i.main(t2i.parse_args([*line, "--output_dir", str(outputs / "full"), *FULL_ONLY]))
    return SimpleNamespace(model=model, losses=losses, minimal=outputs / "minimal", full=outputs / "full")


@pytest.mark.slow
def test_the_minimal_file_has_the_losses_of_the_full_script_to_the_last_bit(both):
    """Images, captions, order, noise, sigma, start of the LoRA, loss and update: all of it is the same."""
    assert [loss.hex() for loss in both.losses] == [loss.hex() for loss in column(both.full, "loss")]
    assert len(set(both.losses)) == 8


@pytest.mark.slow
def test_the_minimal_file_saves_the_lora_of_the_full_script(both):
    """Names and numbers of every tensor."""
    one, other = lora(both.minimal), lora(both.full)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert all(tensor.any() for tensor in one.values())


@pytest.mark.slow
def test_the_file_that_the_minimal_file_saves_loads_in_diffusers_with_rank_and_alpha(both):
    """Every tensor of the file is in the pipeline's transformer."""
    without_text = {"text_encoder": None, "tokenizer": None, "dtype": torch.float32}
    pipeline = DiffusionPipeline.from_pretrained(both.model, **without_text)
    pipeline.load_lora_weights(both.minimal)
    (config,) = pipeline.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 4)
    parameters = {name: value for name, value in pipeline.transformer.named_parameters() if ".lora_" in name}
    loaded = {f"transformer.{name.replace('.default_0.', '.')}": value for name, value in parameters.items()}
    stored = lora(both.minimal)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


@pytest.mark.slow
def test_on_a_bf16_base_the_adapter_is_fp32_and_the_first_loss_that_of_the_full_script(
    t2i, minimal, tiny, captioned, tmp_path, monkeypatch
):
    """What runs on a GPU, here on the CPU. Later losses differ: PEFT computes the LoRA in fp32, the script in bf16."""
    line = same_line(tiny, captioned, "--max_train_steps", "1", "--seed", "0")
    for name in ("load_and_encode", "load_transformer"):
        original = getattr(minimal, name)
        monkeypatch.setattr(minimal, name, lambda args, device, _, f=original: f(args, device, torch.bfloat16))
    losses = minimal.main(minimal.parse_args([*line, "--output_dir", str(tmp_path / "minimal")]))
    precision = ("--mixed_precision", "bf16")
    t2i.main(t2i.parse_args([*line, "--output_dir", str(tmp_path / "full"), *precision, *FULL_ONLY]))
    assert losses == column(tmp_path / "full", "loss")
    assert {tensor.dtype for tensor in lora(tmp_path / "minimal").values()} == {torch.float32}


@pytest.mark.parametrize("flags, said", [(("--resolution", "100"), "multiple of 16"), ((), "has no image")])
def test_the_minimal_file_refuses_what_it_cannot_train_on_before_it_loads_a_model(
    minimal, tmp_path, capsys, flags, said
):
    """A side that is no whole number of tokens, and a folder without images; the model does not even exist."""
    with pytest.raises(SystemExit) as stopped:
        minimal.main(minimal.parse_args([*same_line(tmp_path / "no model", tmp_path), *flags]))
    assert said in f"{stopped.value} {capsys.readouterr().err}"


def test_the_minimal_file_is_short_and_imports_nothing_from_the_repository():
    """Under 300 lines, ten flags, and only packages that its docstring's readers have: one file, to be copied alone."""
    source = MINIMAL.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 300
    assert source.count("parser.add_argument(") == 10
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.partition(".")[0]
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert names - sys.stdlib_module_names == {"numpy", "torch", "diffusers", "peft", "PIL"}


@pytest.mark.parametrize("script", existing_scripts())
def test_the_docstring_of_each_script_says_where_the_minimal_file_is_and_how_long(script):
    """The number of lines is the real one."""
    lines = len(MINIMAL.read_text(encoding="utf-8").splitlines())
    said = " ".join(ast.get_docstring(ast.parse(read_script(script))).split())
    assert f"examples/minimal_flux2_lora.py is the same training in {lines} lines" in said
    assert "examples/minimal_flux2_lora.py" in (ROOT / "README.md").read_text(encoding="utf-8")
