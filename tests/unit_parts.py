"""What the unit tests share: a `Run` without training, samples from real files, and the script's log lines."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch


def start_run(script: Any, model: Path, folder: Path, *flags: str | Path) -> Any:
    """The `Run` of a 64 px command line with the model; a later flag replaces an earlier one. Nothing is loaded.

    `folder` gets the output, and holds the (empty) data folder unless the flags name one.
    """
    data = folder / "no-data"
    data.mkdir(parents=True, exist_ok=True)
    words = ["--pretrained_model_name_or_path", model, "--output_dir", folder / "out", "--overwrite_output_dir"]
    words += ["--instance_prompt", "a photo of sks toy", "--resolution", "64", "--seed", "0"]
    words += [] if "--init_lora_from" in flags else ["--rank", "4"]
    words += ["--max_sequence_length", "64", "--report_to", "none", "--dataloader_num_workers", "0"]
    if "--dataset_name" not in flags and "--instance_data_dir" not in flags:
        words += ["--instance_data_dir", data]
    return script.start_accelerator(script.parse_args([str(word) for word in [*words, *flags]]))


def check_samples(script: Any, args: Any, cache_dir: Path) -> list:
    """The good samples of what the flags name, as a start of the script finds them."""
    run = SimpleNamespace(args=args, cache_dir=cache_dir, token_size=16, resolutions=[64])
    return script.make_samples(run, script.list_samples(args))


def training_set(script: Any, run: Any, samples: list, stream: str = "instance") -> Any:
    """A TrainingSet of the samples whose prompts are "encoded" already, as small zeros."""
    data = script.TrainingSet(run, script.LatentCodec(run), samples, stream)
    for prompt in {"", *(caption for sample in samples for caption in sample.captions)}:
        data.prompts.put(torch.zeros(2, 3), prompt, prompt)
    return data


def losses_of(
    script: Any, args: Any, model: Any, clean_BLC: torch.Tensor, noise_BLC: torch.Tensor, sigmas_B: torch.Tensor,
    height: int, width: int, references: list = (), embeds_BLD: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`batch_losses` of a batch with these clean tokens, noise and (unshifted) sigmas; nothing is encoded.

    Each sample has all of the `references`, pairs of tokens (B, L, C) and position ids.
    """
    args.timestep_shift = "none"
    codec = SimpleNamespace(token_size=16, mean_C=torch.zeros(clean_BLC.shape[2]), std_C=torch.ones(clean_BLC.shape[2]))
    latents = torch.nn.functional.pixel_shuffle(clean_BLC.transpose(1, 2).unflatten(2, (height, width)), 2)
    training = SimpleNamespace(codec=codec, transformer=model, rest_vae=lambda args: None)
    count = len(sigmas_B)
    embeds_BLD = torch.zeros(count, 8, 96) if embeds_BLD is None else embeds_BLD
    run = SimpleNamespace(args=args, device=torch.device("cpu"), dtype=embeds_BLD.dtype)
    batch = {"target": [(16 * height, 16 * width)] * count, "u": 1 - sigmas_B, "noise": noise_BLC,
             "moments": torch.stack([latents, latents], dim=1), "prompt_embeds": embeds_BLD,
             "references": [list(references)] * count}  # fmt: skip
    if script.TASK == "image-to-image":
        with mock.patch.object(script, "encode_references", lambda *_: references):
            return script.batch_losses(run, training, batch)[0]
    return script.batch_losses(run, training, batch)[0]


def predict(
    script: Any, args: Any, model: Any, noisy_BLC: torch.Tensor, sigmas_B: torch.Tensor, embeds_BLD: torch.Tensor,
    height: int, width: int, references: list = (),
) -> torch.Tensor:  # fmt: skip
    """The velocity (B, L, C) that `batch_losses` gets from the model at exactly these noisy tokens and sigmas."""
    velocities, length = [], height * width

    def exactly(**inputs: Any) -> Any:
        given = inputs["hidden_states"]
        assert given.dtype == embeds_BLD.dtype and torch.allclose(given[:, :length].float(), noisy_BLC.float(), 0.02)
        output = model(**{**inputs, "hidden_states": torch.cat([noisy_BLC.to(given.dtype), given[:, length:]], 1)})
        velocities.append(output[0][:, :length])
        return output

    exactly.config = model.config
    with mock.patch.object(script, "shift_sigmas", lambda *_: sigmas_B), torch.no_grad():
        clean_BLC = noisy_BLC.float()  # the mix with a noise that equals it
        losses_of(script, args, exactly, clean_BLC, clean_BLC, sigmas_B, height, width, references, embeds_BLD)
    return velocities[0]


@contextlib.contextmanager
def log_lines(least: int = logging.INFO) -> Iterator[list[str]]:
    """The lines that the script logs inside the block; its logger does not propagate, so `caplog` sees none.

    `least` is the level from which on they are kept: logging.WARNING leaves out what is merely told.
    """
    lines: list[str] = []
    handler = logging.Handler(least)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("flux2_lora")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def caption_of(row: Any) -> str | tuple[str, ...] | None:
    """The captions of a listed row as tests compare them: None, one text, or several."""
    return row.captions if len(row.captions) > 1 else next(iter(row.captions), None)
