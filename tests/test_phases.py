"""Encoder, VAE and transformer follow one another: what is on the device together, and what stays behind."""

import ctypes
import functools
import gc
import json
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ModelMixin
from runs import command_line, spy
from transformers import PreTrainedModel
from unit_parts import start_run

DEVICE = torch.device("cpu", 0)  # computes like "cpu", but is told from it: here "cpu" is where models wait
KINDS = {"Mistral3ForConditionalGeneration": "encoder", "AutoencoderKLFlux2": "vae",
         "Flux2Transformer2DModel": "transformer"}  # fmt: skip
WHOLE = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}  # transformers' report
DRAW = ("--validation_prompt", "a toy", "--validation_steps", "1", "--num_inference_steps", "1")
DRAW += ("--num_validation_images", "1", "--skip_final_inference")


# ---- what is on the device together ----


class Watch:
    """Which models are on the device when functions are called: those alive whose last move went there."""

    def __init__(self, monkeypatch, script) -> None:
        """The run gets `DEVICE`; models are remembered weakly."""
        self.monkeypatch, self.script = monkeypatch, script
        self.places: dict[weakref.ref, torch.device] = {}
        self.seen: dict[str, list[str]] = {}
        start = script.start_accelerator
        monkeypatch.setattr(script, "start_accelerator", lambda args: replace(start(args), device=DEVICE))
        for base in (ModelMixin, PreTrainedModel):
            monkeypatch.setattr(base, "to", self.noting_moves(base.to))
        rest = script.rest_vae
        monkeypatch.setattr(script, "rest_vae", lambda vae: rest(vae.to("cpu")))  # a note; there it copies nothing

    def noting_moves(self, original):
        """`.to` of a model that leaves a note where it went."""

        def to(model, *args, **kwargs):
            for place in (*args, *kwargs.values()):
                if isinstance(place, (str, torch.device)) and type(model).__name__ in KINDS:
                    self.places[weakref.ref(model)] = torch.device(place)
            return original(model, *args, **kwargs)

        return to

    def at(self, *names: str) -> None:
        """Notes what is there whenever one of these functions is called."""
        for name in names:
            self.monkeypatch.setattr(self.script, name, self.noting_calls(name, getattr(self.script, name)))

    def noting_calls(self, name, original):
        """The function, which first leaves a note of what is on the device."""

        @functools.wraps(original)
        def noted(*args, **kwargs):
            there = [KINDS[type(ref()).__name__] for ref, place in self.places.items() if ref() and place == DEVICE]
            now = " and ".join(sorted(there)) or "nothing"
            if now not in self.seen.setdefault(name, []):
                self.seen[name].append(now)
            return original(*args, **kwargs)

        return noted


@pytest.fixture
def watch(monkeypatch, script) -> Watch:
    """A watch over the phases of a run."""
    watch = Watch(monkeypatch, script)
    watch.at("encode_prompt", "encode_pixels", "load_transformer", "add_lora", "train_step", "decode_tokens")
    return watch


@pytest.mark.e2e
def test_cached_images_that_nobody_draws_need_one_model_at_a_time(watch, train):
    """Each is gone before the next one comes."""
    train("--cache_latents")
    assert watch.seen == {
        "encode_prompt": ["encoder"],
        "encode_pixels": ["vae"],
        "load_transformer": ["nothing"],
        "add_lora": ["nothing"],
        "train_step": ["transformer"],
    }


@pytest.mark.e2e
@pytest.mark.parametrize("cached", [True, False])
def test_a_vae_that_is_needed_again_waits_on_the_cpu_while_the_transformer_is_loaded(watch, train, cached):
    """Then it comes at its first use, for a validation image or for pixels that are not cached, and stays."""
    train(*DRAW, *["--cache_latents"] * cached)
    assert watch.seen["encode_prompt"] == ["encoder"]
    assert watch.seen["load_transformer"] == watch.seen["add_lora"] == ["nothing"]
    assert watch.seen["decode_tokens"] == ["transformer and vae"]
    assert watch.seen["train_step"] == ["transformer and vae"]


@pytest.mark.e2e
def test_with_offload_the_vae_is_on_the_device_only_while_it_computes(watch, train):
    """--offload sends it back after every use."""
    train(*DRAW, "--cache_latents", "--offload")
    assert watch.seen["load_transformer"] == ["nothing"] and watch.seen["encode_pixels"] == ["vae"]
    assert watch.seen["decode_tokens"] == ["transformer and vae"]
    assert watch.seen["train_step"] == ["transformer"]


@pytest.mark.e2e
def test_class_images_leave_nothing_on_the_device(monkeypatch, t2i, tiny, photos, tmp_path):
    """They need transformer and VAE, which are gone before the images are encoded and the transformer comes again."""
    watch = Watch(monkeypatch, t2i)
    watch.at("generate", "encode_pixels", "load_transformer", "train_step")
    flags = ["--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--class_prompt", "a toy"]
    flags += ["--num_class_images", "1", "--num_inference_steps", "1", "--max_train_steps", "1", "--cache_latents"]
    t2i.main(t2i.parse_args(command_line(tiny, photos, tmp_path / "out", *flags)))
    assert watch.seen == {
        "load_transformer": ["nothing"],
        "generate": ["transformer and vae"],
        "encode_pixels": ["vae"],
        "train_step": ["transformer"],
    }


# ---- the encoder ----


@pytest.mark.slow
@pytest.mark.scripts("t2i")
@pytest.mark.parametrize("family", ["dev", "klein"])
def test_the_encoder_has_neither_head_nor_eyes_and_gives_the_same_embedding(script, tiny, tiny_klein, tmp_path, family):
    """No logits over the vocabulary, 131,072 numbers per token of [dev], and no weights for them on the device."""
    run = start_run(script, {"dev": tiny, "klein": tiny_klein}[family], tmp_path)
    encoder = script.load_text_encoder(run)
    assert not [name for name, _ in encoder.named_parameters() if "head" in name or "vision" in name or "multi" in name]
    encoders = getattr(script.transformers, run.family.text_encoder)
    whole = encoders.from_pretrained(run.model.folder / "text_encoder", dtype=run.dtype)
    tokenizer = script.load_tokenizer(run)
    expected = script.encode_prompt(run, tokenizer, whole.eval(), "a toy")
    assert script.encode_prompt(run, tokenizer, encoder, "a toy").equal(expected)


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize("offload", [True, False])
def test_offload_lets_accelerate_spread_the_encoder_over_gpu_and_cpu(script, tiny, tmp_path, monkeypatch, offload):
    """It is not moved afterwards; without the flag it goes to the GPU whole."""
    moves = []
    encoder = SimpleNamespace(eval=lambda: encoder, requires_grad_=lambda _: encoder, to=lambda d: moves.append(d.type))
    encoder.model = encoder.config = SimpleNamespace()
    model = script.transformers.Mistral3ForConditionalGeneration
    monkeypatch.setattr(
        model, "from_pretrained", lambda _, **options: moves.append(options.get("device_map")) or (encoder, WHOLE)
    )
    run = start_run(script, tiny, tmp_path, *["--offload"] * offload)
    script.load_text_encoder(replace(run, device=torch.device("cuda")))
    assert moves == (["auto"] if offload else [None, "cuda"])


def test_with_several_processes_each_spreads_its_encoder_over_its_own_gpu(script, tiny, tmp_path, monkeypatch):
    given = []
    encoder = SimpleNamespace(eval=lambda: encoder, requires_grad_=lambda _: encoder, model=SimpleNamespace())
    encoder.config = SimpleNamespace()
    model = script.transformers.Mistral3ForConditionalGeneration
    monkeypatch.setattr(model, "from_pretrained", lambda _, **options: given.append(options) or (encoder, WHOLE))
    monkeypatch.setattr(script.torch.accelerator, "get_memory_info", lambda device: (20 * 2**30, 24 * 2**30))
    run = replace(start_run(script, tiny, tmp_path, "--offload"), device=torch.device("cuda", 3))
    script.load_text_encoder(run)
    script.load_text_encoder(replace(run, processes=8))
    assert "max_memory" not in given[0]
    assert given[1]["max_memory"][3] == 19 * 2**30 and set(given[1]["max_memory"]) == {3, "cpu"}


@pytest.mark.scripts("t2i")
@pytest.mark.slow
def test_an_encoder_whose_layers_lie_elsewhere_gives_the_same_embedding(script, tiny, tmp_path, monkeypatch):
    """Dispatched by accelerate, as with --offload: here half of the layers come from disk when they compute."""
    run = start_run(script, tiny, tmp_path)
    expected = script.encode_prompt(run, script.load_tokenizer(run), script.load_text_encoder(run), "a toy")
    model = script.transformers.Mistral3ForConditionalGeneration
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu",
              "model.language_model.embed_tokens": "cpu", "model.language_model.norm": "cpu",
              "model.language_model.rotary_emb": "cpu"}  # fmt: skip
    places |= {f"model.language_model.layers.{n}": "cpu" if n < 16 else "disk" for n in range(31)}
    load, here = model.from_pretrained, {"device_map": places, "offload_folder": tmp_path / "disk"}
    monkeypatch.setattr(model, "from_pretrained", lambda folder, **options: load(folder, **{**options, **here}))
    spread = start_run(script, tiny, tmp_path, "--offload")
    encoder = script.load_text_encoder(replace(spread, device=torch.device("cuda")))
    assert {p.device.type for p in encoder.model.language_model.layers[30].parameters()} == {"meta"}
    assert encoder._hf_hook.io_same_device  # hidden states come to where the tokens are, from several GPUs too
    assert script.encode_prompt(run, script.load_tokenizer(run), encoder, "a toy").equal(expected)


# ---- nothing left behind ----


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory) -> Path:
    """The embedded model with random encoder weights of about 200 MB."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("wide") / "model"))
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["text_config"] |= {"intermediate_size": 17_000}  # 32 layers x 3 matrices x 32 x 17,000, fp32
    shutil.rmtree(folder / "text_encoder")
    Mistral3ForConditionalGeneration(Mistral3Config(**config)).save_pretrained(folder / "text_encoder")
    return folder


def live_tensors() -> dict[int, int]:
    """Bytes of every tensor that the garbage collector knows, by its storage."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # not what a pretended GPU has left in this process
    tensors = [item for item in gc.get_objects() if type(item) in plain]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"}


def resident() -> int:
    """Bytes of this process in memory now, without those that the C library keeps for the next allocation."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.scripts("t2i")
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_nothing_of_the_encoder_is_left_when_the_prompts_are_encoded(script, wide, tiny, tmp_path, monkeypatch):
    """Neither a tensor nor memory of the process; while it is there, both are seen."""
    script.encode_prompts(start_run(script, tiny, tmp_path / "first"), ["a toy"])  # what libraries keep
    run, during = start_run(script, wide, tmp_path), []
    loads, encode = spy(monkeypatch, script, "load_text_encoder"), script.encode_prompt

    def measured(*args):
        result = encode(*args)
        during.append((sum(live_tensors().values()), resident()))
        loads.clear()  # the spy's own reference
        return result

    monkeypatch.setattr(script, "encode_prompt", measured)
    before = sum(live_tensors().values()), resident()
    prompts = script.encode_prompts(run, ["a toy", "a dog"])
    after = sum(live_tensors().values()), resident()
    assert len(during) == 2 and prompts.get("a toy").shape == (64, 96)
    for kind, allowed in ((0, 100_000), (1, 30_000_000)):
        assert during[-1][kind] - before[kind] > 180_000_000, (before, during, after)
        assert after[kind] - before[kind] < allowed, (before, during, after)
