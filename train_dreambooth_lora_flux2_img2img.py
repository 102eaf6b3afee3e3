# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11.0", "torchvision>=0.26.0", "diffusers>=0.40.0", "transformers>=5.0.0", "accelerate>=1.5.0",
#     "peft>=0.20.0", "datasets>=5.2.0", "safetensors>=0.8.0", "huggingface_hub>=1.33.0", "Pillow>=12.3.0",
#     "numpy>=2.4.0", "tensorboard>=2.21.0", "Jinja2>=3.1.6", "tqdm>=4.70.1", "prodigyopt>=1.1.2",
#     "bitsandbytes>=0.50.2", "torchao>=0.18.0", "wandb>=0.31.0", "psutil>=7.2.2", "requests>=2.34.2", "urllib3>=2.8.0",
# ]
# ///
"""Train a FLUX.2 LoRA that edits images: references and an instruction in, image out.

    python train_dreambooth_lora_flux2_img2img.py @configs/runs/demo_edit_cpu.args
    accelerate launch train_dreambooth_lora_flux2_img2img.py @configs/runs/relighting.args

The first trains the embedded tiny model on the CPU, the second FLUX.2 [dev] on a GPU.
Rows without a reference train as plain text-to-image in the same run.

The file reads in the order of a run: Arguments, The run, Model families, Data, Text and latents (encoded once), Models
and LoRA, Flow matching (the loss), The step, Checkpoints, Images while training, Results, Main.

examples/minimal_flux2_lora.py is the same training in 261 lines, without references: read it first.

Shapes in names: B batch, C channels, H W rows and columns, L tokens (one per 16 x 16 pixels), D width of the text.
"""

# region shared: arguments
from __future__ import annotations

import argparse
import builtins
import contextlib
import csv
import difflib
import errno
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import urllib.parse
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

# ------------------------------------------------------------------------------------------------------------ Arguments
# The flags, one per entry under the title of their group, and every check that needs neither torch nor a model, so that
# mistakes are reported within a second, all at once. Rejected: dataclasses, which separate a flag from its help text.
Args = argparse.Namespace  # the flags, as parse_args returns them
Size = tuple[int, int]  # (height, width) in pixels


class UserError(ValueError):
    """Something the user can fix: the message says what is wrong, where, and what to do. Exit code 2."""


class CannotWrite(UserError, OSError):
    """A file that cannot be written, for example because the disk is full."""


def parse_number(kind: tuple, text: str) -> float:
    """The value of a flag whose kind is (type, minimum) or (type, minimum, maximum)."""
    cast, minimum, maximum = (*kind, 1e18)[:3]
    try:
        value = cast(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid {cast.__name__} value: '{text}'") from None
    if not minimum <= value <= maximum:
        limits = f"at least {minimum}" if maximum == 1e18 else f"from {minimum} to {maximum}"
        raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
    return value


COUNT, NATURAL, POSITIVE, NOT_NEGATIVE, SHARE = (int, 1), (int, 0), (float, 1e-30), (float, 0), (float, 0, 1)
BETA = (float, 0, 1 - 2**-24)


def share_or_switch(text: str) -> float:
    return parse_number(SHARE, {"true": "1", "false": "0"}.get(text.lower(), text))


def to_path(text: str) -> str:
    """A path, or several separated by commas, with `~` expanded: a shell does not do so in --output_dir=~/x."""
    return ",".join(map(os.path.expanduser, text.split(",")))


def to_sizes(text: str) -> str:
    """Checks what `parse_sizes` reads: heights and widths in multiples of 16."""
    grid = re.fullmatch(r"\s*\d+\s*,\s*\d+\s*(;\s*\d+\s*,\s*\d+\s*)*", text)
    if not grid or any(side < 16 or side % 16 for side in map(int, re.findall(r"\d+", text))):
        raise argparse.ArgumentTypeError(f"'{text}': write it as 'height,width', multiples of 16, ';' between several")
    return text


class Switch(argparse.Action):
    """--NAME, --NAME true or --NAME=false; also --no-NAME if the flag is, or may be, on by default."""

    def __call__(self, _parser: Any, found: Args, value: str | None, option: str | None = None) -> None:
        setattr(found, self.dest, (value != "false") != str(option).startswith("--no-"))


def flag(name: str, kind: Any, default: Any, help: str, resume: bool = False, **options: Any) -> tuple[str, dict]:
    """One flag: `kind` is a type, bool for a switch, 'a|b|c' for choices in any case, or a range.

    `resume` marks a flag that must not change when a run is resumed.
    """
    options |= {"default": default, "help": f"{help} (default: {default})", "resume": resume}
    if kind is bool:
        options |= {"action": Switch, "nargs": "?", "type": str.lower, "choices": ("true", "false")}
    elif isinstance(kind, str):
        options |= {"type": str.lower, "choices": kind.split("|")}
    else:
        options |= {"type": functools.partial(parse_number, kind) if isinstance(kind, tuple) else kind}
    return name, options


SHARED_FLAGS = [
    "Model",
    flag("pretrained_model_name_or_path", to_path, None, "folder or hub id of FLUX.2 [dev] or [klein]; required"),
    flag("revision", str, None, "branch, tag or commit of the model, for every part of it"),
    flag("variant", str, None, "file variant such as fp32 in diffusion_pytorch_model.fp32.safetensors"),
    flag("cache_dir", to_path, None, "where downloads are kept; None is the Hugging Face cache"),
    flag("mixed_precision", "no|bf16|fp16", None, "dtype of base and compute; None: bf16, on CPU no (fp32)"),
    "Data",
    flag("dataset_name", to_path, None, "a data set's hub id, folder, or .parquet, .jsonl or .csv file"),
    flag("dataset_config_name", str, None, "configuration of that data set"),
    flag("dataset_split", str, "train", "split of that data set"),
    flag("image_column", str, "image", "column with the images to train on; in metadata files image is file_name"),
    flag("caption_column", str, None, "column of captions; None: one with a usual name, such as text or caption"),
    flag("instance_data_dir", to_path, None, "folder(s) of images, with NAME.txt captions or metadata", nargs="+"),
    flag("instance_prompt", str, None, "caption of images without one; replaces [trigger] in all texts"),
    flag("caption_dropout", SHARE, 0.0, "probability of training a sample on the empty prompt", resume=True),
    flag("repeats", COUNT, None, "visits of each image in one epoch, one number per folder; None: 1", nargs="+"),
    flag("mask_suffix", str, None, "use loss masks: with -mask, dog-mask.png is the mask of dog.jpg; white is learned",
         resume=True),
    flag("alpha_as_mask", bool, False, "use loss masks: what is transparent in an image is not learned", resume=True),
    flag("unmasked_weight", SHARE, 0.0, "weight of the loss where the mask is black or clear", resume=True),
    flag("on_bad_image", "error|skip", "error", "error: list bad images and stop; skip: train on the rest"),
    flag("dataloader_num_workers", NATURAL, 2, "worker processes that prepare batches; 0: none"),
    "Image size",
    flag("resolution", COUNT, 512, "pixels of the short side, a multiple of 16"),
    flag("train_resolutions", COUNT, None, "train an image at each of these that does not enlarge it; --resolution is "
         "then the size of validation images", nargs="+"),
    flag("aspect_ratio_buckets", to_sizes, None, "train at these sizes, not squares: 'height,width;height,width'"),
    flag("use_aspect_ratio_buckets", bool, False, "compute such a list from --resolution"),
    flag("center_crop", bool, False, "crop the centre instead of a random place at every visit", resume=True),
    flag("random_flip", bool, False, "mirror an image at half of its visits", resume=True),
    flag("vae_encode_mode", "mode|sample", "mode", "use the VAE's mean, as at inference, or a sample", resume=True),
    "Prior preservation",
    "Text",
    flag("max_sequence_length", (int, 1, 512), 512, "text tokens, with those of the template", resume=True),
    flag("text_encoder_out_layers", int, None, "hidden states to use; None: the model's", nargs="+"),
    flag("remote_text_encoder", bool, False, "encode prompts on a server instead of loading the encoder"),
    flag("remote_text_encoder_url", str, "https://remote-text-encoder-flux-2.huggingface.co/predict", "its address"),
    flag("fsdp_text_encoder", bool, False, "shard the text encoder over the processes of the run"),
    flag("text_encoder_bnb_config_path", to_path, None, "JSON for bitsandbytes: load the encoder in NF4 or int8"),
    "LoRA",
    flag("rank", COUNT, None, "rank r of the LoRA matrices; None: 16, or as in --init_lora_from"),
    flag("lora_alpha", (float, 0.01), None, "the update is scaled by alpha / rank; None: rank, or the file's"),
    flag("lora_dropout", (float, 0, 0.99), 0.0, "dropout on the LoRA's input", resume=True),
    flag("lora_layers", str, None, "Linear modules, or attention, fal, ai-toolkit; None: all attention projections"),
    flag("init_lora_from", to_path, None, "start from this .safetensors LoRA with its rank, alpha and modules"),
    "Flow matching",
    flag("weighting_scheme", "none|logit_normal|mode|cosmap|sigma_sqrt", "none",
         "how sigmas are drawn (logit_normal, mode) or weighted (cosmap, sigma_sqrt)", resume=True),
    flag("logit_mean", (float, -10, 10), 0.0, "mean of logit(u); below 0 means more noise", resume=True),
    flag("logit_std", POSITIVE, 1.0, "standard deviation of logit(u)", resume=True),
    flag("mode_scale", (float, -1e18), 1.29, "scale of the mode density", resume=True),
    flag("timestep_shift", str, "linear", "shift of sigma: linear (in tokens), none, empirical (pipelines), a number"),
    flag("guidance_scale", NOT_NEGATIVE, 1.0, "embedded guidance in training ([dev] only)", resume=True),
    "Steps",
    flag("train_batch_size", COUNT, 1, "samples per micro-batch and process"),
    flag("gradient_accumulation_steps", COUNT, 1, "micro-batches per optimizer step", resume=True),
    flag("num_train_epochs", COUNT, 1, "epochs; one is images x repeats samples"),
    flag("max_train_steps", COUNT, None, "optimizer steps; overrides --num_train_epochs"),
    flag("max_train_minutes", POSITIVE, None, "save and stop after this many minutes"),
    flag("seed", NATURAL, None, "seed of everything random; None: chosen at random and logged"),
    "Optimizer",
    flag("optimizer", "adamw|prodigy", "adamw", "AdamW or Prodigy", resume=True),
    flag("learning_rate", POSITIVE, None, "peak learning rate; None: 1e-4, for Prodigy 1.0"),
    flag("scale_lr", bool, False, "multiply the learning rate by batch size x accumulation x processes"),
    flag("use_8bit_adam", bool, False, "AdamW with 8-bit moments (bitsandbytes)", resume=True),
    flag("adam_beta1", BETA, 0.9, "decay of the first moment (AdamW, Prodigy)", resume=True),
    flag("adam_beta2", BETA, 0.999, "decay of the second moment (AdamW, Prodigy)", resume=True),
    flag("adam_weight_decay", (float, 0, 10), 1e-4, "weight decay of the LoRA", resume=True),
    flag("adam_epsilon", (float, 1e-30, 0.01), 1e-8, "epsilon of the denominator", resume=True),
    flag("prodigy_beta3", BETA, None, "decay of Prodigy's step-size estimate; None: sqrt(beta2)"),
    flag("prodigy_decouple", bool, True, "Prodigy: AdamW-style weight decay", resume=True),
    flag("prodigy_use_bias_correction", bool, True, "Prodigy: bias correction", resume=True),
    flag("prodigy_safeguard_warmup", bool, True, "Prodigy: no warm-up in its step-size estimate", resume=True),
    flag("max_grad_norm", (float, 0.001), 1.0, "clip the LoRA's gradient to this L2 norm", resume=True),
    flag("lr_scheduler", "linear|cosine|cosine_with_restarts|polynomial|constant|constant_with_warmup", "constant",
         "schedule of the learning rate, in optimizer steps", resume=True),
    flag("lr_warmup_steps", NATURAL, 0, "optimizer steps of linear warm-up", resume=True),
    flag("lr_num_cycles", COUNT, 1, "restarts of cosine_with_restarts", resume=True),
    flag("lr_power", (float, 0, 10), 1.0, "power of polynomial", resume=True),
    "Memory and speed",
    flag("gradient_checkpointing", share_or_switch, 0.0, "recompute activations in the backward pass: without a value "
         "in every block, 0.5: in half of them", nargs="?", const=1.0),
    flag("cache_latents", bool, False, "encode each image once, to disk; crops the centre", resume=True),
    flag("latents_cache_dir", to_path, None, "folder of latents and prompt embeddings; None: OUTPUT_DIR/cache"),
    flag("offload", bool, False, "keep the VAE on the CPU between uses, spread the text encoder over GPU and CPU"),
    flag("stream_blocks", share_or_switch, 0.0, "for small GPUs: keep frozen blocks in host memory and fetch each one "
         "when it is needed; 0.5: half of them; implies --gradient_checkpointing", nargs="?", const=1.0),
    flag("do_fp8_training", bool, False, "keep the frozen blocks in FP8, in half the memory", resume=True),
    flag("bnb_quantization_config_path", to_path, None, "JSON for bitsandbytes: frozen blocks in NF4 or int8"),
    flag("allow_tf32", bool, False, "use TF32 for fp32 matmuls (Ampere and later)"),
    flag("compile_blocks", bool, None, "torch.compile blocks; None: in bf16, FP8, NF4 on CUDA, if 500 steps are left"),
    flag("attention_backend", str, None, "attention backend of diffusers, such as flash or _native_cudnn"),
    "Checkpoints",
    flag("output_dir", to_path, "flux2-lora", "folder for everything the run writes"),
    flag("overwrite_output_dir", bool, False, "remove an earlier run's files there, but not the cache"),
    flag("checkpointing_steps", COUNT, 500, "optimizer steps between checkpoints; the last step is always saved"),
    flag("checkpoints_total_limit", COUNT, None, "checkpoints to keep; the oldest goes once a new one is verified"),
    flag("resume_from_checkpoint", to_path, None, "'latest', a path, or the name of a folder in OUTPUT_DIR"),
    flag("upcast_before_saving", bool, False, "save the LoRA in fp32 instead of the compute dtype"),
    flag("comfyui_lora", bool, True, "also write comfyui_lora.safetensors, with BFL's names, for ComfyUI and others"),
    "Validation",
    flag("validation_prompt", str, None, "generate images from these prompts while training", nargs="+"),
    flag("num_validation_images", NATURAL, 4, "images per prompt"),
    flag("validation_epochs", COUNT, 50, "epochs between validations"),
    flag("validation_split", NATURAL, 0, "number of images to hold out for the validation loss", resume=True),
    flag("validation_data_dir", to_path, None, "folder(s) of images for the validation loss alone", nargs="+"),
    flag("validation_steps", COUNT, None, "optimizer steps between validations, instead of epochs"),
    flag("num_inference_steps", COUNT, 28, "denoising steps per image"),
    flag("validation_guidance_scale", NOT_NEGATIVE, 4.0, "guidance scale of those images"),
    flag("validation_size", to_sizes, None, "'height,width' of those images; None: --resolution or the first bucket"),
    flag("final_validation_prompt", str, None, "prompt of the images at the end; None: --validation_prompt"),
    flag("skip_final_inference", bool, False, "generate no images at the end"),
    "Logging and Hub",
    flag("report_to", str, "tensorboard", "trackers, comma separated: tensorboard, wandb, trackio, ..., all, none"),
    flag("logging_dir", to_path, "logs", "folder of the tracker files below OUTPUT_DIR"),
    flag("push_to_hub", bool, False, "upload weights, card, samples and configuration at the end"),
    flag("hub_model_id", str, None, "name of the repository; None: the name of OUTPUT_DIR"),
    flag("hub_token", str, None, "token for all Hub calls; HF_TOKEN or `hf auth login` is safer"),
    flag("hub_private", bool, True, "create a private repository"),
    "Other",
    flag("dry_run", bool, False, "check data and settings, print the plan, and stop before loading weights"),
    "Accepted, no effect",
    flag("text_encoder_lr", float, None, "the text encoder is not trained"),
    flag("adam_weight_decay_text_encoder", float, None, "the text encoder is not trained"),
    flag("local_rank", int, None, "comes from the launcher"),
    flag("enable_npu_flash_attention", bool, False, "use --attention_backend _native_npu"),
]  # fmt: skip
# Accepted so that command lines of other trainers run; the start says that they have no effect.
ACCEPTED_NO_EFFECT = ("text_encoder_lr", "adam_weight_decay_text_encoder", "local_rank", "enable_npu_flash_attention")
SECRET_FLAGS = ("hub_token",)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LORA_FILE, COMFYUI_FILE = "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"
# What a run writes into the output folder besides its cache. It is taken for ours only beside a config.args of ours.
CONFIG_HEAD = "# Settings of a FLUX.2 LoRA run, which is repeated by giving @ and the path of this file.\n"
OWN_FILES = (rf"{LORA_FILE}|{COMFYUI_FILE}|README\.md|config\.args|metrics\.jsonl|(abandoned-)?(checkpoint-\d+|best)|"
             r"logs/flux2-lora|samples/(step-\d+|final|given|contact_sheet\.png)")  # fmt: skip
LAUNCHERS = {b"accelerate", b"accelerate-launch", b"accelerate.commands.launch", b"torchrun", b"torch.distributed.run"}
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab", "aim")
# endregion shared: arguments

# differs: the two scripts do different tasks
TASK = "image-to-image"
# differs: an editing data set may describe the image beside the instruction
USUAL_CAPTIONS = ("text", "instruction", "edit_prompt", "caption", "captions", "prompt", "description")

# differs: references are an image-to-image matter
OWN_FLAGS = [
    "Data",
    flag("cond_image_column", str, None, "column(s) with the references; None: those with usual names", nargs="+"),
    flag("cond_data_dir", to_path, None, "folder(s) of references, matched by file name without suffix", nargs="+"),
    flag("cond_dropout", SHARE, 0.0, "probability of training a sample without its references", resume=True),
    "Image size",
    flag("align_cond_image", bool, False, "crop references like their target image", resume=True),
    "Validation",
    flag("validation_image", to_path, None, "reference for each prompt; two for one: 'a.png,b.png'", nargs="+"),
]  # fmt: skip


# differs: references are an image-to-image matter
def check_own(args: Args) -> Iterator[str]:
    """Problems with the flags that name references."""
    for folder in args.cond_data_dir or []:
        if os.path.realpath(folder) in map(os.path.realpath, args.instance_data_dir or []):
            yield f"--cond_data_dir {folder}: is also --instance_data_dir; references need a folder of their own"
    if args.cond_data_dir and args.validation_data_dir:
        yield "--validation_data_dir: name its references in metadata, --cond_data_dir is for --instance_data_dir alone"
    if args.cond_data_dir and (args.dataset_name or args.cond_image_column or len(args.instance_data_dir or []) > 1):
        yield "--cond_data_dir: needs exactly one --instance_data_dir; for others use metadata, see --cond_image_column"
    prompts, images = max(len(final_prompts(args)), len(args.validation_prompt or [])), args.validation_image or []
    if len(images) > prompts:
        yield f"--validation_image: {len(images)} for {prompts} prompt(s); join those of one prompt with a comma"
    for path in itertools.chain(*map(split_paths, images)):
        if not os.path.isfile(path):
            yield f"--validation_image {path}: no such file"
    if args.cond_dropout and args.train_batch_size > 1 and launched_with("ACCELERATE_USE_FSDP"):
        yield "--cond_dropout: processes may differ in forwards, which FSDP forbids; give --train_batch_size 1"


def split_paths(text: str) -> list[str]:
    """The files of one --validation_image: a path, several separated by commas, or '' for none."""
    return [text] if os.path.isfile(text) else list(filter(None, text.split(",")))


# differs: there are folders of references too
def data_folders(args: Args) -> list[str]:
    """The folders that images are read from; nothing is written there."""
    return [*(args.instance_data_dir or []), *(args.cond_data_dir or []), *(args.validation_data_dir or [])]


# region shared: run
FLAGS = dict(row for row in SHARED_FLAGS + OWN_FLAGS if isinstance(row, tuple))
DEFAULTS = {name: options["default"] for name, options in FLAGS.items()}
PATH_FLAGS = [name for name, options in FLAGS.items() if options["type"] is to_path]
RESUME_FLAGS = [name for name, options in FLAGS.items() if options.pop("resume")]  # argparse does not know the mark
LIKELY_CAUSES = {  # of argparse's own errors
    r"unrecognized arguments: (?!\d+$)[^-]": "Quote a text with spaces: --instance_prompt 'a photo of sks dog'",
    r"--mask_suffix: expected": "A value that begins with a dash needs =, as in --mask_suffix=-mask",
    r"--resolution: invalid|arguments: \d+$": "For sizes that are not square: --aspect_ratio_buckets '832,1216'",
}


class Parser(argparse.ArgumentParser):
    """Only one process per machine prints an error; the others wait, since the launcher kills all after one exits."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2; adds the likely cause."""
        if "MASTER_ADDR" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)
            self.exit(2)
        causes = [cause for pattern, cause in LIKELY_CAUSES.items() if re.search(pattern, message)]
        self.exit(2, f"{self.prog}: error: {'. '.join([message, *causes])}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser, with the flags in their groups."""
    style = argparse.RawDescriptionHelpFormatter
    about = __doc__.partition("\n\nThe file reads")[0]
    parser = Parser(Path(__file__).name, argparse.SUPPRESS, about, formatter_class=style, allow_abbrev=False)
    groups = {row: parser.add_argument_group(row) for row in SHARED_FLAGS if isinstance(row, str)}
    for row in SHARED_FLAGS + OWN_FLAGS:
        if isinstance(row, str):
            group = groups[row]
            continue
        name, options = row
        may_be_on = options.get("action") is Switch and options["default"] is not False
        more = ["--lora_blocks"] * (name == "lora_layers") + [f"--no-{name}"] * may_be_on
        group.add_argument(f"--{name}", *more, **options)
    return parser


def parse_words(parser: argparse.ArgumentParser, argv: list[str]) -> Args:
    """The flags, with each `@NAME.args` read (shell quoting, # comments) and [trigger] replaced."""
    words: list[str] = []
    for word in argv:
        saved = word.startswith("@") and word.endswith(".args")
        try:  # bytes: reading text would turn a carriage return in a prompt into a line break
            word.encode()  # fails for what is not UTF-8, which config.args could not hold
            words += shlex.split(Path(to_path(word[1:])).read_bytes().decode(), comments=True) if saved else [word]
        except (OSError, ValueError) as error:
            parser.error(f"{word!a}: cannot read it ({error})")
    trigger = parser.parse_args(words).instance_prompt or "[trigger]"
    return parser.parse_args([word.replace("[trigger]", trigger) for word in words])


def parse_sizes(text: str) -> list[Size]:
    """'height,width;height,width' as a list of (height, width)."""
    return [tuple(map(int, pair.split(","))) for pair in text.split(";")]


def final_prompts(args: Args) -> list[str]:
    return [args.final_validation_prompt] if args.final_validation_prompt else list(args.validation_prompt or [])


def check_values(args: Args) -> Iterator[str]:
    """Problems with single flags, with texts, and with the flags that name model and data."""
    model, settings = args.pretrained_model_name_or_path, args.bnb_quantization_config_path
    if not model:
        yield "--pretrained_model_name_or_path: required; for instance black-forest-labs/FLUX.2-dev or tiny_flux2"
    elif not os.path.isdir(model) and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        yield f"--pretrained_model_name_or_path {model}: neither a folder here nor a hub id like 'owner/name'"
    if args.mixed_precision == "fp16":
        yield "--mixed_precision fp16: FLUX.2's activations overflow fp16; use bf16 (or no for fp32)"
    text_format, elsewhere = args.text_encoder_bnb_config_path, args.fsdp_text_encoder or args.remote_text_encoder
    together = {
        "--bnb_quantization_config_path and --do_fp8_training: give only one, the base is quantised once":
            settings and args.do_fp8_training,
        "--stream_blocks: bitsandbytes' weights cannot be streamed; use --do_fp8_training, or neither":
            settings and args.stream_blocks,
        "--text_encoder_bnb_config_path: cannot be used with --fsdp_text_encoder or --remote_text_encoder":
            text_format and elsewhere,
        "--instance_data_dir or --dataset_name: give exactly one of them":
            bool(args.instance_data_dir) == bool(args.dataset_name),
        "--mask_suffix: masks are files beside the images of --instance_data_dir; a data set has none":
            args.mask_suffix and args.dataset_name,
        "--mask_suffix and --alpha_as_mask: give only one of them": args.mask_suffix and args.alpha_as_mask,
        "--train_resolutions and --aspect_ratio_buckets: give only one of them, both are sizes to train at":
            args.train_resolutions and args.aspect_ratio_buckets,
    }  # fmt: skip
    yield from (problem for problem, holds in together.items() if holds)
    for name in ("instance_data_dir", "cond_data_dir", "validation_data_dir"):
        for folder in itertools.filterfalse(os.path.isdir, vars(args).get(name) or []):
            yield f"--{name} {folder}: no such folder"
    if args.repeats and len(args.repeats) != max(1, count := len(args.instance_data_dir or [])):
        yield f"--repeats: {len(args.repeats)} number(s) for {count} --instance_data_dir; give one for each"
    for side in (side for side in (args.resolution, *(args.train_resolutions or [])) if side % 16):
        near, name = max(16, round(side / 16) * 16), "resolution" if side == args.resolution else "train_resolutions"
        yield f"--{name} {side}: must be a multiple of 16 (one token is 16 x 16 pixels); nearest: {near}"
    if not re.fullmatch(r"linear|none|empirical|[1-9]\d?(\.\d*)?|0?\.\d?[1-9]\d*", args.timestep_shift):
        yield f"--timestep_shift {args.timestep_shift}: use linear, none, empirical or a number from 0.01 to 99"
    if not all(map(str.strip, [*(args.validation_prompt or []), args.final_validation_prompt or "none"])):
        yield "--validation_prompt: a text is empty; leave the flag out to draw no images"
    for name in (name for name, value in vars(args).items() if "[trigger]" in str(value)):
        yield f"--{name}: [trigger] stands for --instance_prompt, which is missing or contains it"


def launched_with(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def process_count() -> int:  # on all machines
    return int(os.environ.get("WORLD_SIZE", 1))


def check_launch(args: Args) -> Iterator[str]:
    """Problems with the accelerate configuration, which arrives in the environment."""
    if args.fsdp_text_encoder and process_count() == 1:
        yield "--fsdp_text_encoder: needs several processes; on one use --offload"
    asked = [name for name in ("DEEPSPEED", "MEGATRON_LM") if launched_with(f"ACCELERATE_USE_{name}")]
    for name in asked + ["TPU"] * (os.environ.get("PJRT_DEVICE") == "TPU"):
        yield f"the accelerate config asks for {name}, which is not supported; use one of configs/accelerate/"
    sharded = launched_with("ACCELERATE_USE_FSDP")
    if sharded and args.stream_blocks:
        yield "--stream_blocks: FSDP splits the blocks already; leave one out, or set fsdp_offload_params"
    if sharded and process_count() == 1:
        yield "the accelerate config asks for FSDP on one process; set num_processes, or see configs/accelerate/"
    known = "TRANSFORMER_BASED_WRAP"
    if sharded and os.environ.get("FSDP_AUTO_WRAP_POLICY", known).upper() != known:
        blocks = "fsdp_transformer_layer_cls_to_wrap: Flux2TransformerBlock,Flux2SingleTransformerBlock"
        yield f"the accelerate config has another wrap policy; write fsdp_auto_wrap_policy: {known}, {blocks}"


def report_to(args: Args) -> list[str]:
    """The trackers asked for; `all` is all that are installed, `none` is none."""
    names = {name.strip().lower() for name in args.report_to.split(",")} - {"none", ""}
    return sorted(names) if "all" not in names else [name for name in TRACKERS if importlib.util.find_spec(name)]


def check_services(args: Args) -> Iterator[str]:
    """Problems with secrets, trackers and missing packages."""
    trackers, url = report_to(args), urllib.parse.urlsplit(args.remote_text_encoder_url)
    if url.username or url.query:  # the address is written to config.args
        yield "--remote_text_encoder_url: give an address without user, password and query"
    for name in sorted({*trackers} - {*TRACKERS}):
        yield f"--report_to {name}: unknown tracker; known: {', '.join(TRACKERS)}, all, none"
    if args.hub_token and {*trackers} - {"tensorboard", "trackio", "mlflow"}:  # may upload sys.argv
        yield f"--hub_token: --report_to {args.report_to} uploads the command line; use HF_TOKEN or `hf auth login`"
    needed = {f"--report_to {name}": name for name in trackers if name in TRACKERS}
    needed |= {"--optimizer prodigy": "prodigyopt"} if args.optimizer == "prodigy" else {}
    needed |= {"--use_8bit_adam": "bitsandbytes"} if args.use_8bit_adam and args.optimizer == "adamw" else {}
    for reason, package in needed.items():
        if importlib.util.find_spec(package) is None:
            yield f"{reason}: the package is missing, install it with `pip install {package}`"


def check_folders(args: Args) -> Iterator[str]:
    """Problems with the folders that are written to: no permission, data in them, or results of an earlier run."""
    data = {Path(path).resolve() for path in data_folders(args)}
    for name in ("latents_cache_dir", "class_data_dir", "output_dir"):
        if not (given := getattr(args, name, None)):
            continue
        path = Path(given).resolve()
        try:
            tempfile.TemporaryDirectory(dir=next(filter(os.path.exists, (path, *path.parents)))).cleanup()
        except OSError as error:
            yield f"--{name} {given}: cannot write there ({error}); choose another folder"
            return
        holds_data = name == "class_data_dir" and any(path in folder.parents for folder in data)
        if path in (Path.home(), Path("/").resolve()) or not data.isdisjoint((path, *path.parents)) or holds_data:
            yield f"--{name} {path}: is the root, your home, or in or above a data folder; choose one of its own"
    folder, written = Path(args.output_dir), results_in(Path(args.output_dir))
    settings, listed = folder / "config.args", ", ".join(path.name for path in written[:3])
    own = settings.is_file() and settings.read_bytes().startswith(CONFIG_HEAD.encode())
    if not own and not all((path / "manifest.json").is_file() for path in written):  # as in our checkpoints
        yield f"--output_dir {folder}: holds {listed}, which no run of this script wrote; choose another folder"
    elif written and not (args.resume_from_checkpoint or args.overwrite_output_dir or args.dry_run):
        ways = "continue with --resume_from_checkpoint latest, or remove its files with --overwrite_output_dir"
        yield f"--output_dir {folder}: holds {listed}, of an earlier run; {ways}, which keeps the cache"


def results_in(folder: Path) -> list[Path]:
    """Files and folders there that have the names of a run's results."""
    paths = [path for pattern in ("*", "logs/*", "samples/*") for path in folder.glob(pattern)]
    return sorted(path for path in paths if re.fullmatch(OWN_FILES, path.relative_to(folder).as_posix()))


def flag_notes(args: Args) -> list[str]:
    """A line for each flag whose effect, or lack of one, is easily overlooked."""
    rate, usual = args.learning_rate, 1.0 if args.optimizer == "prodigy" else 1e-4
    notes = {
        "--lr_warmup_steps has no effect with --lr_scheduler constant; use constant_with_warmup":
            args.lr_warmup_steps and args.lr_scheduler == "constant",
        f"--learning_rate {rate}: with --optimizer {args.optimizer} {usual:g} is usual":
            rate is not None and not usual / 10 <= rate <= usual * 100,
        "--use_8bit_adam has no effect with --optimizer prodigy": args.use_8bit_adam and args.optimizer == "prodigy",
        "--cache_latents fixes the crop to the centre": args.cache_latents and not args.center_crop,
        "--unmasked_weight: no masks are used": args.unmasked_weight and not (args.mask_suffix or args.alpha_as_mask),
        "--logit_mean is for logit_normal alone": args.logit_mean and args.weighting_scheme != "logit_normal",
        **{f"--{name} has no effect": getattr(args, name) != DEFAULTS[name] for name in ACCEPTED_NO_EFFECT},
    }  # fmt: skip
    return [note for note, holds in notes.items() if holds]


def end_with_launcher() -> None:
    """Asks Linux for a SIGUSR2 when the launcher, which does not pass signals on, dies; other parents may."""
    command = Path(f"/proc/{os.getppid()}/cmdline")
    words = command.read_bytes().split(b"\0")[:4] if command.is_file() else []  # python -X y -m module
    if sys.platform == "linux" and LAUNCHERS & set(map(os.path.basename, words)):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGUSR2)  # PR_SET_PDEATHSIG


def parse_args(argv: list[str] | None = None) -> Args:
    """The checked command line (`sys.argv[1:]` if None); if something is wrong, says what to do and exits with 2."""
    parser = build_parser()
    args = parse_words(parser, sys.argv[1:] if argv is None else argv)
    checks = (check_values, check_launch, check_services, check_folders, check_own)
    if problems := [problem for check in checks for problem in check(args)]:
        parser.error("\n  - ".join([f"{len(problems)} problem(s) on the command line, nothing was loaded:", *problems]))
    return args


if __name__ == "__main__":
    end_with_launcher()
    COMMAND_LINE = parse_args()

# The heavy imports stand below the arguments so that --help and usage errors are answered at once.

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%T')} INFO    start: importing torch and diffusers takes some seconds", file=sys.stderr)

# messages of libraries to their own maintainers, at import and at each step
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if sys.platform == "linux" and "microsoft" not in platform.release() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less fragmentation; fails under WSL
gc.disable()  # imports leave little garbage, and the search for it would take a seventh of their time

import accelerate
import diffusers
import huggingface_hub
import numpy as np
import PIL.Image
import psutil
import requests
import torch
import torch.distributed
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast, gather
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel, training_utils
from diffusers.optimization import get_scheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from diffusers.quantizers import DiffusersAutoQuantizer
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import ImageCms, ImageDraw, ImageOps, PngImagePlugin
from requests.adapters import HTTPAdapter, Retry
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

log, IN_NOTEBOOK = logging.getLogger("flux2_lora"), "ipykernel" in sys.modules
tqdm.set_lock(threading.RLock())  # its own one is shared with workers: one that is killed would keep it for ever
gc.enable()


# -------------------------------------------------------------------------------------------------------------- The run
# What is decided once (`Run`), how a run starts, and how it ends: on its own, by a signal, by a known failure with its
# exit code, or out of memory. After a signal or the time limit the step is finished and saved; nothing else is caught.
@dataclass(frozen=True)
class Run:
    """The flags, and what follows from them and from the machine, worked out once at the start."""

    args: Args
    accelerator: accelerate.Accelerator
    device: torch.device
    process_index: int  # from 0, over all machines
    processes: int  # on all machines; each has its own device and micro-batch
    dtype: torch.dtype  # of the frozen base and of compute; the LoRA is fp32
    seed: int
    model: ModelFiles
    family: ModelFamily
    text_layers: tuple[int, ...]
    token_size: int  # pixels per side of a token
    lora: LoraShape
    quantization: dict[str, Any] | None  # bitsandbytes settings of the frozen base
    text_quantization: dict[str, Any] | None  # and of the text encoder
    output_dir: Path
    cache_dir: Path
    resume: Checkpoint | None
    started: float  # time.monotonic()
    sharding: bool = False  # FSDP2 splits the frozen blocks over the processes; otherwise each holds all of them
    hub_repo: str | None = None  # created when all checks have passed, like the next one
    trigger: str = ""  # --instance_prompt, if a caption contains it
    said_once: set[str] = field(default_factory=set)  # what `warn_once` has warned about

    @property
    def base_format(self) -> str:
        """How the frozen base is stored, to be read by people: 'bfloat16', 'bfloat16, blocks in nf4', ..."""
        dtype, settings = str(self.dtype).removeprefix("torch."), self.quantization or {}
        four_bit = settings.get("bnb_4bit_quant_type", "fp4") if settings.get("load_in_4bit") else None
        blocks = four_bit or ("int8" if settings else "fp8" if self.args.do_fp8_training else None)
        return f"{dtype}, blocks in {blocks}" if blocks else dtype

    @property
    def resolutions(self) -> list[int]:  # to train at, the smallest first
        return sorted({*(self.args.train_resolutions or [self.args.resolution])})

    @property
    def is_main(self) -> bool:  # the process that writes what a run has only once
        return self.process_index == 0


class Stream(NamedTuple):
    """Samples that are batched among themselves; every micro-step takes one batch of each stream."""

    name: str
    samples: list[Sample]
    weight: float = 1.0  # of its loss


@dataclass
class Training:
    """What is trained, on which data, and how far: made by `prepare_training`, changed by every step."""

    codec: LatentCodec
    streams: list[Stream]  # the first one holds what is to be learned
    held_out: list[Sample]  # never trained on
    vae: Any  # None if latents are cached and no images are generated
    transformer: nn.Module
    parameters: dict[str, nn.Parameter]  # of the LoRA, fp32
    lora_B: list[torch.Tensor]  # detached views; they start at 0, so their norm says how far the LoRA has come
    update_norm: torch.Tensor  # norm of the last step's change of lora_B
    optimizer: torch.optim.Optimizer
    schedule: Any
    fingerprint: dict[str, Any]
    stop: StopSignals
    compiled: int  # blocks that run compiled
    step: int = 0  # optimizer steps done
    consistent: bool = True  # False during an update, when weights and step count do not belong together
    skipped: int = 0  # steps in a row that were not finite
    smoothed_loss: float | None = None
    signal: int = 0  # the highest that any process received in the last step
    best: tuple[float, int] | None = None  # the lowest validation loss and its step
    unsaved: bool = False  # the last checkpoint that was due could not be written
    seconds: float = 0.0  # spent in steps since this start

    @property
    def samples(self) -> list[Sample]:  # the ones that epochs count
        return self.streams[0].samples

    def vae_on_device(self, run: Run) -> AutoencoderKLFlux2:  # with --offload it leaves again after each use
        return self.vae.to(run.device)

    def rest_vae(self, args: Args) -> None:
        if args.offload and self.vae is not None:
            rest_vae(self.vae)


class NotFinite(RuntimeError):
    """Ten steps in a row had a loss or gradient that is not finite. Exit code 3."""


class SaveFailed(RuntimeError):
    """The final save failed. Exit code 4."""


class OutOfMemory(torch.OutOfMemoryError):
    """Out of memory; says in which phase and what helps. Exit code 6."""


EXIT_CODES = {UserError: 2, NotFinite: 3, SaveFailed: 4, OutOfMemory: 6, KeyboardInterrupt: 130}


@contextlib.contextmanager
def start_run(args: Args) -> Iterator[Run]:
    """The run, alone in its output folder. Run as a program, a known failure is one message and its exit code."""
    set_up_logging()
    if __name__ == "__main__":
        gc.freeze()  # what is imported is never garbage; searching it would take 0.3 s each time
    try:
        with output_lock(args):
            run = start_accelerator(args)
            check_parts(run)
            try:
                yield run
            except Exception as error:
                explain_out_of_memory(run, error)
                raise
    except tuple(EXIT_CODES) as error:
        if __name__ != "__main__":
            raise
        with contextlib.suppress(OSError):  # a log file on a full disk
            print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))) from None


@contextlib.contextmanager
def output_lock(args: Args) -> Iterator[None]:
    """Keeps other runs out of the output folder while this one is going on. Raises UserError.

    The kernel releases the lock however the process ends. Rejected: `filelock`, whose flock is inherited by workers
    that may outlive a killed run, and which silently falls back to a file that a kill leaves behind. Not on Windows.
    """
    if args.dry_run or os.environ.get("RANK", "0") != "0" or importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl  # POSIX only

    path = Path(args.output_dir) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            print(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}", file=file, flush=True)
        except (BlockingIOError, PermissionError):
            who = path.read_text(encoding="utf-8").strip()
            raise UserError(f"--output_dir {path.parent}: another run is using it ({who}); stop that first") from None
        except OSError as error:  # this drive has no locks, or the disk is full
            log.warning(f"{path}: cannot be locked ({error}); do not start a second run with this --output_dir")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                path.parent.rmdir()  # if empty: a run that was refused leaves nothing behind


def explain_out_of_memory(run: Run, error: Exception) -> None:
    """Raises OutOfMemory, with what helps, if that is what the error is, on a GPU or the CPU."""
    signs = "out of memory|can(no|')t allocate memory|ALLOC_FAILED"  # in RuntimeErrors that have no class of their own
    short = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(signs, str(error), re.IGNORECASE)
    if not short or isinstance(error, tuple(EXIT_CODES)):
        return
    called = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    phase = next((name for caller, name in itertools.pairwise(called) if caller == "main"), "start").replace("_", " ")
    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
    peak, free = max(peak_memory(run).values(), default=math.nan), free_bytes(run) / 1e9
    flags = memory_flags(run, phase)[:2]
    text = f"out of memory in phase '{phase}' ({said}); peak {peak:.2f} GB, free now {free:.2f} GB\n"
    text += f"  what would help, most first: {', '.join(flags)}\n"
    if any(verify_checkpoint(folder) is None for folder in list_checkpoints(run.output_dir)):
        same = [flag for flag in flags if flag in ("--gradient_checkpointing", "--stream_blocks", "--offload")]
        text += f"  other flags may make it another run. Continue this one with\n    {resume_line(run, *same)}"
    raise OutOfMemory(text.rstrip()) from error


def free_bytes(run: Run) -> int:
    """Free bytes of the device; of the host when training on the CPU or if the device does not say."""
    if run.device.type != "cpu":
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
            return torch.accelerator.get_memory_info(run.device)[0]
    return psutil.virtual_memory().available


def memory_flags(run: Run, phase: str) -> list[str]:
    """Flags that save memory and are not on yet, the most useful first; phases are named after functions in main."""
    if "prompts" in phase:
        names, smaller = ["offload", "text_encoder_bnb_config_path"], ["max_sequence_length"]
        names += ["fsdp_text_encoder", "remote_text_encoder"]
    elif re.search("data|images|samples", phase):
        names, smaller = [], ["resolution"]
    else:
        fewer_bits = "do_fp8_training" if run.sharding or run.args.stream_blocks else "bnb_quantization_config_path"
        base = ["stream_blocks"] * (not run.sharding and run.args.stream_blocks < 1)
        base += [fewer_bits] * (not run.args.do_fp8_training)
        names = ["gradient_checkpointing"] * (phase == "train" and checkpointed_share(run) < 1)
        names += ([] if run.quantization else base) + ["cache_latents", "offload", "use_8bit_adam"]
        smaller = ["resolution", "rank"]
    useless = ["stream_blocks", "offload"] if run.device.type == "cpu" else []
    useless += ["fsdp_text_encoder"] if run.processes == 1 or run.text_quantization else []
    useless += ["text_encoder_bnb_config_path"] if run.args.fsdp_text_encoder else []
    useless += [name for name, value in vars(run.args).items() if value and not isinstance(value, float)]  # on already
    helping = [f"--{name}" for name in names if name not in useless]
    return helping + [f"a smaller --{name}" for name in smaller]


def resume_line(run: Run, *more: str) -> str:
    """The command, or in a notebook the call, that continues from the last checkpoint."""
    words = [f"@{run.output_dir / 'config.args'}", "--resume_from_checkpoint", "latest", *more]
    if __name__ != "__main__":  # imported, as docs/notebooks.md shows it
        several = f"notebook_launcher(train, ({words},), {run.processes})"
        return f"main(parse_args({words}))" if run.processes == 1 else several
    launcher = "python" if run.processes == 1 else "accelerate launch --config_file YOURS.yaml"
    return f"{launcher} {shlex.join([sys.argv[0], *words])}"


@dataclass
class StopSignals:
    """Remembers the first SIGINT, SIGTERM or SIGUSR2 (the launcher died), so that the step is finished and saved."""

    received: int | None = None  # by this process
    agreed: int | None = None  # by any process; all know it after the same step
    since: float = 0.0  # time.monotonic() of the first signal
    previous: dict[int, Any] = field(default_factory=dict)  # the handlers before ours

    def __enter__(self) -> StopSignals:
        numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR2", signal.SIGTERM)}
        with contextlib.suppress(ValueError):  # in any but the main thread
            self.previous = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            launcher = number not in (signal.SIGINT, signal.SIGTERM)  # ignored from now on: this process ends as well
            signal.signal(number, signal.SIG_IGN if launcher and self.received else handler)

    def handle(self, number: int, _frame: Any) -> None:
        """Notes the first signal; a later one acts at once, unless it is the echo that launchers send to all."""
        if self.received is None:
            self.received, self.since = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM, time.monotonic()
            log.warning(f"{signal.Signals(number).name}: finishing and saving this step; a second one stops at once")
        elif number in (signal.SIGINT, signal.SIGTERM) and time.monotonic() - self.since > 1:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)

    def agree(self, run: Run, known: int) -> None:
        """Sets `agreed` to the signal `known` to all processes after this step; the time limit counts as a SIGTERM."""
        if self.received is None and time.monotonic() - run.started > 60 * (run.args.max_train_minutes or math.inf):
            log.warning(f"--max_train_minutes {run.args.max_train_minutes:g}: the time is up")
            self.received = signal.SIGTERM
        self.agreed = self.received if run.processes == 1 else known or None


def set_up_logging() -> None:
    """Sends our lines to stderr, above the progress bar; processes other than the first log only errors."""
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    log.propagate = False
    if "LogHandler" not in (type(handler).__name__ for handler in log.handlers):  # both scripts may be imported
        log.addHandler(LogHandler())
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        if not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
            library.logging.disable_progress_bar()


def start_accelerator(args: Args) -> Run:
    """Decides device, dtype, seed, model family, folders and the checkpoint to resume; loads no weights."""
    if problems := list(check_launch(args)):  # processes that a notebook launches have not been through parse_args
        raise UserError("\n".join(problems))
    remote = args.remote_text_encoder and urllib.parse.urlsplit(args.remote_text_encoder_url).hostname not in LOOPBACK
    if (remote or args.push_to_hub) and not (args.hub_token or huggingface_hub.get_token()):
        raise UserError("--push_to_hub, --remote_text_encoder: need a token; run `hf auth login` or set HF_TOKEN")
    for note in flag_notes(args):
        log.warning(note)
    if process_count() > 1:
        log.info(f"launch: {process_count()} processes meet at {os.environ.get('MASTER_ADDR')}")
    output_dir, resume, model = Path(args.output_dir), find_checkpoint(args), find_model(args)
    family = find_family(model)
    accelerator = accelerate.Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",  # the base is loaded in its dtype, the LoRA is fp32: no autocast, no scaler
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=report_to(args) or None,
        project_config=ProjectConfiguration(str(output_dir), str(output_dir / args.logging_dir)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],  # encoding may take that long
    )
    if accelerator.num_processes != process_count():  # separate runs, which would all write to the same folder
        raise UserError(f"{process_count()} processes were started, but not as one run; see configs/accelerate/")
    if accelerator.device.type == "mps":
        raise UserError("Apple GPUs are not supported, their backward pass fails; use configs/accelerate/cpu.yaml")
    if accelerator.device.type not in ("cpu", "cuda"):
        log.warning(f"start: {accelerator.device.type} is untested; CUDA and the CPU are tested")
    dtype = compute_dtype(args, accelerator.device.type == "cpu")
    if args.do_fp8_training:
        check_fp8(accelerator.device, dtype)
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    # all processes use the first one's random seed, even if only some of them found a checkpoint
    drawn = int(broadcast(torch.tensor([int.from_bytes(os.urandom(4), "little")], device=accelerator.device)))
    seed = resume.state["seed"] if resume and args.seed is None else args.seed
    return Run(
        args, accelerator, accelerator.device, accelerator.process_index, accelerator.num_processes,
        dtype=dtype, seed=drawn if seed is None else seed,
        model=model, family=family, text_layers=text_layers(args, model, family),
        token_size=2 ** len(model.config("vae")["block_out_channels"]),  # the VAE's factor x 2 for patches
        lora=find_lora(args, model), quantization=find_quantization(args, model, dtype, "transformer"),
        text_quantization=find_quantization(args, model, dtype, "text_encoder"),
        output_dir=output_dir, cache_dir=Path(args.latents_cache_dir or output_dir / "cache"),
        resume=resume, started=time.monotonic(), sharding=launched_with("ACCELERATE_USE_FSDP"),
    )  # fmt: skip


def compute_dtype(args: Args, on_cpu: bool) -> torch.dtype:
    """--mixed_precision, else bf16 if the accelerate config says so, else bf16 on an accelerator and fp32 on CPU."""
    # `accelerate config default` writes "no", which must not load 129 GB of fp32 weights by accident
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if args.mixed_precision is None and configured in ("fp16", "fp8"):
        raise UserError(f"the accelerate config asks for {configured}; FLUX.2 needs bf16: add --mixed_precision bf16")
    choice = args.mixed_precision or ("bf16" if configured == "bf16" or not on_cpu else "no")
    return torch.bfloat16 if choice == "bf16" else torch.float32


def text_layers(args: Args, model: ModelFiles, family: ModelFamily) -> tuple[int, ...]:
    """The hidden states that make up a prompt embedding. Raises UserError if the encoder has no such layer."""
    layers = tuple(args.text_encoder_out_layers or family.text_layers)
    if args.remote_text_encoder:
        return layers
    config, joint = model.config("text_encoder"), model.config("transformer")["joint_attention_dim"]
    depth, width = (config.get("text_config", config)[name] for name in ("num_hidden_layers", "hidden_size"))
    if not all(0 <= layer <= depth for layer in layers) or width * len(layers) != joint:
        raise UserError(f"--text_encoder_out_layers {layers}: give {joint // width} numbers from 0 to {depth}")
    return layers


class Progress(tqdm):
    """A bar per phase on a terminal or in a notebook; in a log file a line every ten seconds and one at the end."""

    def __init__(self, phase: str, total: int, done: int = 0) -> None:
        """`total` things to do, `done` of them already done."""
        self.in_lines = not (sys.stderr.isatty() or IN_NOTEBOOK)
        options = {"file": io.StringIO(), "mininterval": 10, "miniters": 1} if self.in_lines else {}
        options |= {"dynamic_ncols": True} if IN_NOTEBOOK else {"ncols": shutil.get_terminal_size().columns}  # never 0
        end = "{postfix}, {remaining} left" if self.in_lines else " |{bar}| {remaining} left{postfix}"
        options |= {"bar_format": "{desc}: {n_fmt}/{total_fmt}" + end, "smoothing": 0}
        super().__init__(total=total, initial=done, desc=phase, disable=not log.isEnabledFor(logging.INFO), **options)

    def display(self, *args: Any, **options: Any) -> None:
        """Draws the bar, or writes a line where there is no terminal."""
        if not self.in_lines:
            super().display(*args, **options)
        elif self.n > self.last_print_n:
            log.info(str(self).removesuffix(", 00:00 left"))


class LogHandler(logging.Handler):
    """Writes to stderr, above the progress bar; a closed pipe or a full disk does not end the run."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(f"{time.strftime('%T')} {record.levelname:7} {record.getMessage()}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- Model families
# Which checkpoint it is, and whether it is complete. What differs between the FLUX.2 models stands in FAMILIES; sizes
# come from their configs. Names and shapes of all weights are checked before anything is loaded, since transformers
# initialises missing ones at random. The parts of a Hub model are downloaded, and checked, when they are needed.
class ModelFamily(NamedTuple):
    """What differs between the FLUX.2 checkpoints."""

    name: str
    pipeline: str  # class name in diffusers, as in model_index.json
    text_encoder: str  # class name in transformers
    tokenizer: str
    text_layers: tuple[int, ...]  # indices into hidden_states; 0 is the embedding output
    text_width: int | None  # joint_attention_dim, which tells the klein sizes apart; None: any
    architecture: str  # the model's name in modelspec headers
    license: dict[str, str]


LICENSE_LINK = "https://huggingface.co/black-forest-labs/FLUX.2-dev/blob/main/LICENSE.txt"
FLUX_LICENSE = {"license": "other", "license_name": "flux-non-commercial-license", "license_link": LICENSE_LINK}
DEV = "Flux2Pipeline", "Mistral3ForConditionalGeneration", "PixtralProcessor", (10, 20, 30)
KLEIN = "Flux2KleinPipeline", "Qwen3ForCausalLM", "Qwen2TokenizerFast", (9, 18, 27)
FAMILIES = (
    ModelFamily("FLUX.2 [dev]", *DEV, None, "Flux.2-dev", FLUX_LICENSE),
    ModelFamily("FLUX.2 [klein] 9B", *KLEIN, 12288, "Flux.2-klein-9b", FLUX_LICENSE),
    ModelFamily("FLUX.2 [klein] 4B", *KLEIN, None, "Flux.2-klein-4b", {"license": "apache-2.0"}),
)


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint: a local folder, or a Hub repository whose parts are downloaded when they are needed."""

    name: str
    folder: Path
    remote: bool
    options: dict[str, Any]  # revision, cache_dir and token for Hub calls
    variant: str | None

    def part(self, subfolder: str) -> Path:
        """The folder of one part, downloaded for a Hub model. Raises UserError: no space, or the download fails."""
        if not self.remote:
            return self.folder / subfolder
        fetch = functools.partial(huggingface_hub.snapshot_download, self.name, allow_patterns=f"{subfolder}/*")
        try:
            plan = [] if huggingface_hub.constants.HF_HUB_OFFLINE else fetch(dry_run=True, **self.options)
            if missing := sum(entry.file_size or 0 for entry in plan if entry.will_download):
                check_space(self.folder, missing, f"the download of {self.name}/{subfolder}", "--cache_dir")
            return Path(fetch(**self.options)) / subfolder
        except UserError:
            raise
        except Exception as error:  # the network has no common base of errors
            reason = f"the download failed ({type(error).__name__}: {error})"
            raise UserError(f"{self.name}/{subfolder}: {reason}. Start again: finished files are kept") from error

    def config(self, subfolder: str, file: str = "config.json") -> dict[str, Any]:
        """The part's config.json, or another file. Raises UserError if it is missing or not a JSON object."""
        path = self.folder / subfolder / file
        if not path.is_file():
            raise UserError(f"{path}: missing; is this a complete diffusers folder?")
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a JSON object ({error}); download it again") from None

    def weight_files(self, part: str) -> list[Path]:
        """The weight files of a part, downloaded or not: one file, or the shards that an index names."""
        stem, variant = "model" if part == "text_encoder" else "diffusion_pytorch_model", self.variant or ""
        index = f"{stem}.safetensors.index.{variant}.json".replace("..", ".")
        names = [f"{stem}.{variant}.safetensors".replace("..", ".")]
        if (self.folder / part / index).is_file():
            names = sorted(set(self.config(part, index)["weight_map"].values()))
        return [self.folder / part / name for name in names]

    def version(self, subfolder: str) -> str:
        """Stands for the weights of a part in cache keys: the commit, or config, size and time of the files."""
        if self.remote:
            return f"{self.name}@{self.folder.name}/{subfolder}/{self.variant}"
        config, files = self.folder / subfolder / "config.json", sorted((self.folder / subfolder).glob("*"))
        content = config.read_text(encoding="utf-8") if config.is_file() else ""  # a tokenizer has none
        return digest(self.variant, content, *(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files))

    @property
    def public_name(self) -> str:  # without local folders
        return self.name if self.remote else Path(self.name).absolute().name


def find_model(args: Args) -> ModelFiles:
    """Finds the checkpoint and downloads its configs, no weights. Raises UserError if it cannot be reached."""
    name = args.pretrained_model_name_or_path
    if Path(name).is_dir():
        return ModelFiles(name, Path(name), False, {}, args.variant)
    options = {"revision": args.revision, "cache_dir": args.cache_dir, "token": args.hub_token}
    configs = ["*.json", "*/*.json", "README.md", "tokenizer/*"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=configs, **options))
    except huggingface_hub.errors.GatedRepoError:
        page = f"https://huggingface.co/{name}"
        raise UserError(f"{name} is gated: accept its licence at {page}, then `hf auth login`") from None
    except (huggingface_hub.errors.HfHubHTTPError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {name}: cannot get it from the Hub ({reason})") from None
    # with the commit as revision, parts that are downloaded later belong to the same one
    return ModelFiles(name, folder, True, {**options, "revision": folder.name}, args.variant)


def find_family(model: ModelFiles) -> ModelFamily:
    """The family of the checkpoint, from model_index.json. Raises UserError for any other pipeline class."""
    index = model.config(".", "model_index.json")
    found, widths = index.get("_class_name"), (None, model.config("transformer")["joint_attention_dim"])
    if index.get("is_distilled"):
        log.warning(f"{model.name} is a DISTILLED checkpoint: LoRAs trained on it come out weak; use the base model")
    for family in FAMILIES:
        if family.pipeline == found and family.text_width in widths:
            return family
    raise UserError(f"{model.name}: is a {found}; this script trains Flux2Pipeline and Flux2KleinPipeline")


# What works for training on a frozen base; BitsAndBytesConfig accepts other values without complaint.
BNB_VALUES = {"bnb_4bit_quant_type": ("nf4", "fp4"), "bnb_4bit_compute_dtype": ("bfloat16", "float32")}
BNB_VALUES |= {"bnb_4bit_quant_storage": ("uint8",), "llm_int8_skip_modules": (None,)}
# what bitsandbytes stores beside a weight
BNB_TENSORS = re.compile(r"\.(SCB|weight_format|weight\.(\w*absmax|\w*quant_map|quant_state\.bitsandbytes__\w+))$")


def find_quantization(args: Args, model: ModelFiles, dtype: torch.dtype, part: str) -> dict[str, Any] | None:
    """The bitsandbytes settings of a part: from its flag, or from a checkpoint that is stored quantised; else None.

    For the text encoder only its flag counts: one that is stored quantised is used as it is. Raises UserError for
    settings or machines that do not work, for other formats, and for what would be quantised twice.
    """
    own_flag = "bnb_quantization_config_path" if part == "transformer" else "text_encoder_bnb_config_path"
    path = getattr(args, own_flag)
    stored = model.config(part).get("quantization_config") if part == "transformer" or path else None
    if not (stored or path):
        return None
    where = f"{model.name} is stored quantised" if stored else f"--{own_flag} {path}"
    if stored and (method := stored.get("quant_method")) != "bitsandbytes":
        raise UserError(f"{where} by {method}: use a checkpoint quantised by bitsandbytes, or an unquantised one")
    for name in (own_flag, *(("do_fp8_training", "stream_blocks") if part == "transformer" else ())):
        if stored and getattr(args, name):
            raise UserError(f"--{name}: leave it out, {where}")
    settings, known = stored, diffusers.BitsAndBytesConfig().to_dict()
    if not stored:
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
            if sum(settings.get(f"load_in_{bits}bit") is True for bits in (4, 8)) != 1:
                raise ValueError('one of "load_in_4bit" and "load_in_8bit" must be true')
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: cannot be used ({error}); see configs/quantization/nf4.json") from None
        for name, value in settings.items():
            usable = BNB_VALUES.get(name, (value,) if name in known else ())  # diffusers would ignore another name
            if value not in usable:
                choices = " or ".join(map(json.dumps, usable)) or f"one of {', '.join(known)}"
                raise UserError(f"{where}: {name} is {json.dumps(value)}; use {choices}")
        settings = {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."), **settings}
        settings |= {"llm_int8_skip_modules": outside_blocks(model)} if part == "transformer" else {}
    try:  # needs bitsandbytes, and the loader of diffusers needs a GPU
        if part == "transformer":
            DiffusersAutoQuantizer.from_config(diffusers.BitsAndBytesConfig(**settings)).validate_environment()
        else:
            transformers.BitsAndBytesConfig(**settings)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"{where}: {error}") from None
    return settings


def check_part(run: Run, part: str) -> None:
    """Raises UserError unless a part's files hold the weights it needs, by name and shape; reads only headers."""
    shapes, config = {}, run.model.config(part)
    for path in run.model.weight_files(part):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            advice = "download it again, after a clone run `git lfs pull`, or choose another --variant"
            raise UserError(f"{path}: missing, cut short, damaged or a Git LFS pointer ({error}); {advice}") from None
    quantised = config.get("quantization_config")
    if part == "text_encoder":
        if quantised and quantised.get("quant_method") != "bitsandbytes":
            return  # a format that transformers checks when it loads it
        report = read_text_encoder(run, device_map="meta")[1]
    else:
        with torch.device("meta"):
            model = (AutoencoderKLFlux2 if part == "vae" else Flux2Transformer2DModel).from_config(config)
        needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        report = {"missing": [*needed.keys() - shapes.keys()], "unexpected": [*shapes.keys() - needed.keys()]}
        shared = [(name, shapes[name], needed[name]) for name in needed.keys() & shapes.keys()]
        report["misshapen"] = [entry for entry in shared if entry[1] != entry[2]]
    if quantised:
        report["unexpected"] = [name for name in report["unexpected"] if not BNB_TENSORS.search(name)]
        report["misshapen"] = [entry for entry in report["misshapen"] if entry[1][1:] != (1,)]  # 4 bits as (bytes, 1)
    refuse_misfits(run, part, report)


def refuse_misfits(run: Run, part: str, report: dict[str, list]) -> None:
    """Raises UserError if weights are missing, unexpected or misshapen (name, found shape, needed shape)."""
    report["misshapen"] = [f"{name} {tuple(found)} for {tuple(needed)}" for name, found, needed in report["misshapen"]]
    bad = [f"{len(names)} {kind}, such as {' and '.join(sorted(names)[:2])}" for kind, names in report.items() if names]
    advice = "it is incomplete, of another model, or in an unknown quantised format: choose another checkpoint"
    if bad:
        raise UserError(f"{run.model.name}/{part}: the weights do not fit the model ({'; '.join(bad)}); {advice}")


def check_parts(run: Run) -> None:
    """Checks the parts that are on disk; `fetch_part` checks the others of a Hub model after their download."""
    for part in ("vae", "transformer") if run.args.remote_text_encoder else ("vae", "text_encoder", "transformer"):
        if not run.model.remote or all(path.is_file() for path in run.model.weight_files(part)):
            check_part(run, part)


def fetch_part(run: Run, part: str, announced: bool = True) -> Path:
    """The folder to load a part from; what was downloaded is checked first."""
    folder = run.model.part(part)
    if run.model.remote:
        check_part(run, part)
    if announced:
        size = sum(path.stat().st_size for path in run.model.weight_files(part) if path.is_file())
        log.info(f"load: {part}, {size / 1e9:.2f} GB on disk")
    return folder


def digest(*parts: Any) -> str:
    """A hex digest of the parts, the same on all machines and Python versions."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).hexdigest()


# ----------------------------------------------------------------------------------------------------------------- Data
# Every image is decoded once before anything heavy is loaded, so that one message lists all problems; an index in the
# cache makes the next start quick. Images are not kept in memory: each visit decodes its image or reads cached latents.
# Everything random in a visit is keyed by (seed, purpose, position), so a resumed run needs nothing but its step.
# Rejected: the image folders of `datasets`, which leave out AVIF and silently drop a subfolder called `test`.
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"]  # JPEG opens MPO too
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".mpo"}
Captions = tuple[str, ...]  # of one image
MAX_PIXELS = 100_000_000
PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this and refuses twice as many
warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
DECODE_POLICY = 2  # raise it when decode_image changes: then all images are checked and encoded again


def decode_image(data: bytes, alpha_only: bool = False) -> PIL.Image.Image:
    """The image as a viewer shows it: upright, in sRGB, on white; or its alpha channel. Raises ValueError if bad."""
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        image = ImageOps.exif_transpose(image)  # decodes the whole image; fails on damaged EXIF, too
    except PIL.UnidentifiedImageError:
        raise ValueError("not an image in a known format" if data else "empty file (0 bytes)") from None
    except PIL.Image.DecompressionBombError:
        raise ValueError(f"over {MAX_PIXELS // 10**6} MP") from None
    except Exception as error:  # damaged files make Pillow raise struct.error, TypeError, SyntaxError and more
        raise ValueError(f"truncated or damaged ({error})") from None
    if frames > 1:
        raise ValueError(f"animated or multi-page ({frames} frames)")
    if image.mode in ("F", "I"):
        raise ValueError(f"{image.mode} pixels (float or 32-bit) have no fixed range; save it with 8 or 16 bits")
    profile, clear = image.info.get("icc_profile"), image.info.get("transparency")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        image = PIL.Image.fromarray(np.round(levels / 257.0).astype(np.uint8))  # 65535 / 257 = 255
        if clear is not None:
            image.putalpha(PIL.Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if alpha_only:
        return (alpha or PIL.Image.new("L", image.size, 255)).convert("RGB")
    image = image.convert({"LA": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB"}.get(image.mode, image.mode))
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
                image = image.convert("RGB")
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError) as error:
            raise ValueError(f"unreadable colour profile ({error}); remove it or save the image as sRGB") from None
    image = image.convert("RGB")
    return image if alpha is None else PIL.Image.composite(image, PIL.Image.new("RGB", image.size, "white"), alpha)


def cover_size(size: Size, target: Size) -> Size:
    """The smallest (height, width) of the same shape that covers `target`."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))


def image_to_pixels(
    image: PIL.Image.Image, target: Size, crop: list[float] | None, flip: bool, resized: Size | None = None
) -> torch.Tensor:
    """(3, H, W) in [-1, 1] at `target`; `crop` is its place in [0, 1) from the top and left, None the centre."""
    height, width = resized or cover_size((image.height, image.width), target)
    if height * width > MAX_PIXELS:  # a narrow strip: cropped before it is enlarged, to fit into memory
        place = crop[::-1] if crop else (0.5, 0.5)
        image = ImageOps.fit(image, target[::-1], PIL.Image.Resampling.LANCZOS, centering=place)
    else:
        image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    down, right = image.height - target[0], image.width - target[1]
    top, left = (int(crop[0] * (down + 1)), int(crop[1] * (right + 1))) if crop else (down // 2, right // 2)
    image = image.crop((left, top, left + target[1], top + target[0]))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0).permute(2, 0, 1) * 2.0 - 1.0
    return pixels.flip(-1) if flip else pixels


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """The bucket with the nearest aspect ratio (in logarithm); among equals the one nearest in area."""
    shape, area = math.log(size[0] / size[1]), math.log(size[0] * size[1])
    return min((round(abs(math.log(h / w) - shape), 9), abs(math.log(h * w) - area), (h, w)) for h, w in buckets)[2]


@dataclass(frozen=True)
class Image:
    """An image: a file, or a cell of a data set."""

    name: str
    path: Path | None = None
    cell: Callable[[], bytes] | None = None
    sha256: str = ""  # of the file's bytes; filled in by `inspect_images`, like the next four
    size: Size = (0, 0)
    darkest: int = 0  # grey
    light: tuple[int, ...] = ()  # left, top, right, bottom of what is not black
    target: Size = (0, 0)  # the size it is encoded at, see `make_samples`
    resize_key: str = "centre"  # how it is brought to `target`, for cache keys
    mask: Image | None = None  # loss mask
    alpha_only: bool = False  # with --alpha_as_mask an image is its own mask

    def read(self) -> bytes:  # raises OSError
        return self.cell() if self.cell else self.path.read_bytes()

    def decoded(self) -> PIL.Image.Image:
        try:
            return decode_image(self.read(), self.alpha_only)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name}: was good at the start, but now: {error}") from error

    def pixels(self, crop: list[float] | None = None, flip: bool = False) -> torch.Tensor:
        return image_to_pixels(self.decoded(), self.target, crop, flip)

    def shows_mask(self, centre: bool) -> bool:
        """Whether the mask is light anywhere, or with `centre` in the centre crop."""
        full, part = (cover_size(self.size, self.target), self.target) if centre else (self.size, self.size)
        left, top, right, bottom = self.mask.light or (0, 0, 0, 0)
        spans = zip((top, left), (bottom, right), self.size, full, part, strict=True)
        return all(abs((a + b) / side - 1) < (b - a) / side + size / whole for a, b, side, whole, size in spans)

    def token_weights(self, args: Args, token_size: int, crop: list[float] | None, flip: bool) -> torch.Tensor:
        """Loss weights (L) with mean 1: the share of each token's pixels that are in the mask."""
        if not self.mask:
            return torch.ones(math.prod(self.target) // token_size**2)
        grey_HW = image_to_pixels(self.mask.decoded(), self.target, crop, flip)[:1] / 2 + 0.5
        shares_L = F.avg_pool2d(grey_HW, token_size).flatten()
        weights_L = args.unmasked_weight + (1 - args.unmasked_weight) * shares_L
        return weights_L / weights_L.mean().clamp(min=1e-6)  # all 0 if the crop misses the mask


# endregion shared: run


REFERENCE_AREA = 1024 * 1024  # pixels; Flux2Pipeline shrinks larger references to this
MIN_REFERENCE_SIDE, MAX_REFERENCE_ASPECT = 64, 8  # its limits


def capped_size(size: Size) -> Size:
    """(height, width) within REFERENCE_AREA, of the same shape; never larger. Source: Flux2ImageProcessor."""
    height, width = size
    scale = math.sqrt(REFERENCE_AREA / (width * height))
    return size if height * width <= REFERENCE_AREA else (int(height * scale), int(width * scale))


@dataclass(frozen=True)
class Reference(Image):
    """A reference, prepared as the pipelines do: its own shape, at most 1 MP, the centre in whole tokens."""

    pair_size: Size | None = None  # with --align_cond_image the size of its target image, whose crop it gets

    def pixels(self, crop: list[float] | None = None, flip: bool = False) -> torch.Tensor:
        """(3, H, W) in [-1, 1]; mirrored like its target, so that mirroring is not learned."""
        image = self.decoded()
        if not self.pair_size:
            return image_to_pixels(image, self.target, None, flip, capped_size(self.size))
        image = image.resize(self.pair_size[::-1], PIL.Image.Resampling.LANCZOS)
        return image_to_pixels(image, self.target, crop, flip)


# differs: samples of the text-to-image script have no references
@dataclass(frozen=True)
class Sample:
    """What belongs together: target image, instructions and references; without references it is text-to-image."""

    image: Image
    captions: Captions  # one of them is chosen at each visit
    origin: str = ""  # where the captions come from, for the log
    references: tuple[Image, ...] = ()
    repeats: int = 1  # visits in one pass over all samples

    @property
    def images(self) -> tuple[Image, ...]:
        return self.image, *self.references

    @property
    def geometry(self) -> tuple[Size, ...]:  # the same for all samples of a batch, which share position ids
        return tuple(image.target for image in self.images)

    @property
    def content(self) -> tuple[Any, ...]:  # must be unchanged when a run is resumed
        references = [(reference.sha256, reference.target, reference.resize_key) for reference in self.references]
        masks = [self.image.mask.sha256] if self.image.mask else []
        return self.image.sha256, *self.captions, self.image.target, *references, *masks


USUAL_TARGETS = ("file_name", *(f"{name}_file_name" for name in ("image", "target", "output", "edited")), "image")
REFERENCE_LIKE = r"(cond(ition(ing)?)?|control|reference|source|input|original|before)(_?images?)?(_?\d+)?|edit_images?"


def holds_images(table: Any, column: str) -> bool:
    """Whether a column of a data set is of type Image, or one of a metadata file (a dict of rows) names image files."""
    if not isinstance(table, dict):
        feature = table.features[column]
        return type(getattr(feature, "feature", feature)).__name__ == "Image"  # or a list of them
    cells = [row.get(column) for row in table.values()]
    names = [name for cell in cells for name in (cell if isinstance(cell, list) else [cell]) if isinstance(name, str)]
    return any("://" not in name and Path(name.strip()).suffix.lower() in IMAGE_SUFFIXES for name in names)


# differs: metadata files of the text-to-image script name no references
def image_columns(args: Args, origin: Any, columns: list[str], table: Any) -> list[str]:
    """The column of the targets and those of the references. Raises UserError if there are two possible targets."""
    in_metadata, asked, found = isinstance(table, dict), args.cond_image_column or [], {}
    for name in (*asked, args.image_column):
        endings = ["_file_name", "_file_names"] if in_metadata else []
        more = ["file_name"] if in_metadata and name == "image" else []
        found[name] = find_column(columns, name, *(name + ending for ending in endings), *more)
    targets, references = [found[args.image_column]], [found[name] for name in asked]
    if in_metadata and args.image_column == "image":
        usual = dict.fromkeys(find_column(columns, name) for name in USUAL_TARGETS)
        holds = {column for column in usual if column and (folded(column) != "image" or holds_images(table, column))}
        targets = [column for column in usual if column in holds and column not in references]
    missing = [f"--cond_image_column {name}" for name in asked if found[name] is None]
    missing += [] if any(targets) else [f"--image_column {args.image_column}"]
    if missing:
        advice = "every row needs a 'file_name'; " * in_metadata + f"columns: {', '.join(columns)}"
        raise UserError(f"{' and '.join(missing)}: not in {origin}, {advice}")
    if len(targets) > 1 or targets[0] in references:
        raise UserError(f"{origin}: is {' or '.join(targets)} the target? Give --image_column, or --cond_image_column")
    named = [name for name in columns if in_metadata and re.fullmatch(r"(?!mask)(.+_)?file_names?", folded(name))]
    usual = [name for name in columns if re.fullmatch(REFERENCE_LIKE, folded(name)) and holds_images(table, name)]
    return [targets[0], *(references or [name for name in columns if name in named + usual and name != targets[0]])]


# differs: data sets of the text-to-image script have no references
def dataset_images(args: Args, table: Any, columns: list[str]) -> list[list[Image]]:
    """The target of each row and its references: none if a cell is empty, several if it holds a list."""
    rows = [[image] for image in column_images(args, table, columns[0])]
    for column in columns[1:]:
        lists, counts = hasattr(table.features[column], "feature"), []
        for chunk in table.data.column(column).chunks:  # from the Arrow table, without reading images
            if lists:
                counts += chunk.value_lengths().to_pylist()
            else:  # some writers store a struct of two nulls instead of a null
                fields = chunk.flatten() if hasattr(chunk, "field") else [chunk]
                counts += map(any, zip(*(field.is_valid().to_pylist() for field in fields), strict=True))
        for row, image, count in zip(rows, column_images(args, table, column, lists), counts, strict=True):
            name = f"{image.name}, {column}"
            if lists:
                cells = [functools.partial(image.cell, item) for item in range(count or 0)]
                row += [Image(f"{name} {item}", cell=cell) for item, cell in enumerate(cells)]
            elif count:
                row.append(replace(image, name=name))
    return rows


# differs: samples of the text-to-image script have no references
def list_samples(args: Args) -> list[Sample]:
    """Target, references and captions of every row, wherever they come from."""
    samples = [Sample(image, texts, origin, (*others,), n) for (image, *others), texts, origin, n in list_rows(args)]
    samples = add_references(args, samples) if args.cond_data_dir else samples
    counts = Counter(len(sample.references) for sample in samples)
    if len(counts) > 1:
        listed = ", ".join(f"{number}: {count} rows" for number, count in sorted(counts.items()))
        log.info(f"data: references per row: {listed}; if one is missing, the next takes its place")
    if counts[0]:
        level = log.info if len(counts) > 1 else log.warning
        level(f"data: {counts[0]} of {len(samples)} rows have no reference and train as text-to-image")
    return samples


def add_references(args: Args, samples: list[Sample]) -> list[Sample]:
    """Adds the references of the same stem in each --cond_data_dir. Raises UserError if a file has no partner."""
    listed, found = dict.fromkeys(sample.image.path for sample in samples), []
    if any(sample.references for sample in samples):
        raise UserError("--cond_data_dir: the metadata name references, too; leave one of them out")
    for folder in (Path(os.path.abspath(path)) for path in args.instance_data_dir + args.cond_data_dir):
        files, images = list_files(folder)
        if found:
            report_unused(folder, files, images)
        stems: dict[str, Path] = {}
        for path in images if found else listed:
            stem = folded(path.relative_to(folder).with_suffix(""))
            if stems.setdefault(stem, path) != path:
                raise UserError(f"{folder}: {stems[stem].name} and {path.name} have the same stem; keep one of them")
        found.append(stems)
    targets, *found = found
    alone = [path for stem, path in targets.items() if not any(stem in stems for stems in found)]
    alone += [path for stems in found for stem, path in stems.items() if stem not in targets]
    if alone:
        advice = "add it or remove them (rows without references: see metadata.jsonl)"
        reason = f"{len(alone)} file(s) without a partner of the same stem; {advice}"
        raise UserError(f"--cond_data_dir: {reason}:{as_lines([*map(str, alone)])}")
    for folder, stems in zip(args.cond_data_dir, found, strict=True):
        if lacking := [path.name for stem, path in targets.items() if stem not in stems]:
            reason = f"{len(lacking)} targets have no reference there; that of the next folder takes its place"
            log.warning(f"--cond_data_dir {folder}: {reason}: {first_few(lacking)}")
    images = {path: [stems[stem] for stems in found if stem in stems] for stem, path in targets.items()}
    images = {path: tuple(Image(printable(str(p)), p) for p in partners) for path, partners in images.items()}
    return [replace(sample, references=images[sample.image.path]) for sample in samples]


def reference_problem(size: Size, target: Size | None = None) -> str | None:
    """Why a reference of (height, width) cannot be used, as the pipelines say or for its `target`'s shape, or None."""
    height, width = size
    if min(size) < MIN_REFERENCE_SIDE or max(size) > MAX_REFERENCE_ASPECT * min(size):
        limits = f"{MIN_REFERENCE_SIDE} pixels a side and {MAX_REFERENCE_ASPECT}:1 at most"
        return f"a reference needs {limits}, it has {width} x {height}"
    if target and abs(height * target[1] / (width * target[0]) - 1) > 0.01:
        return f"{width} x {height} is not the shape of its target, {target[1]} x {target[0]}; see --align_cond_image"
    return None


# region shared: data
Row = tuple[list[Image], Captions, str, int]  # the image (and its references), captions, their origin, repeats
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.csv", "metadata.jsonl")  # if a folder has both, the second is read
NAMES_ELSEWHERE = {  # names that mean something to other trainers, but not here
    r".*[-_. ]mask(label)?(\.\w+)?|(.*/)?masks?/[^/]*": "image(s) look like masks (see --mask_suffix)",
    r"(.*/)?(reg|class|regulari[sz]ation)([-_ ]images)?/.*": "image(s) lie in a folder for class images",
}
TABLE_FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}  # what `datasets` calls them


def folded(name: str | Path) -> str:  # for comparing: no blanks at the ends, one case, one Unicode form
    return unicodedata.normalize("NFC", "/".join(part.strip() for part in Path(name).parts).casefold())


def first_few(names: list[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def as_lines(problems: list[str]) -> str:
    rest = [f"and {len(problems) - 20} more"] * (len(problems) > 20)
    return "".join(f"\n    {line}" for line in (*problems[:20], *rest))


def list_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files and links below `folder`, sorted, without hidden ones, and those that have an image's suffix."""
    found = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    files = [p for p in sorted(found) if not any(n.startswith((".", "@eaDir")) for n in p.relative_to(folder).parts)]
    return files, [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()]


def report_unused(folder: Path, files: list[Path], used: Iterable[Path]) -> None:
    """Warns about files in a data folder that are not used: captions without an image, other metadata, ..."""
    kinds: dict[str, list[str]] = {}
    for path in sorted({*files}.difference(used)):
        if path.name.lower() not in ("thumbs.db", "desktop.ini", "readme.md", "license"):
            kind = "linked folder(s)" if path.is_dir() else f"{path.suffix.lower() or 'other'} file(s)"
            kinds.setdefault(kind, []).append(repr(str(path.relative_to(folder))))
    for kind, names in kinds.items():
        log.warning(f"data: {folder.name}: {len(names)} {kind} not used, see docs/data.md: {first_few(names)}")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 ({error}); save it as UTF-8") from None


def caption_texts(cell: Any, where: str = "", classes: Iterable[str] = ()) -> Captions:
    """The captions in a cell, text or a list; `classes` are the names of class labels. Raises UserError."""
    values = cell if isinstance(cell, list) else [cell]
    if classes:
        values = [[*classes, None][value] for value in values if value is not None]  # -1: no class
    if wrong := [value for value in values if not isinstance(value, str | None)]:
        raise UserError(f"{where}the caption is of type {type(wrong[0]).__name__}, it must be text or a list of texts")
    # JSON may hold half an emoji, which is not UTF-8
    texts = [clean for text in values if text and (clean := text.encode("utf-8", "ignore").decode().strip())]
    if wrong := [text for text in texts if re.fullmatch(r"""\[\s*['"].*['"]\s*\]""", text, re.DOTALL)]:
        raise UserError(f"{where}the caption is a list written as text: {wrong[0][:60]}; use metadata.jsonl")
    return tuple(texts)


def find_column(columns: list[str], *names: str) -> str | None:
    """The column with the first of these names that exists, in any case."""
    return next((c for name in names for c in (name, *columns) if c in columns and folded(c) == folded(name)), None)


def caption_column(args: Args, origin: Any, count: int, columns: list[str], images: list[str]) -> str | None:
    """The column with captions. Logs the number of rows and which columns are used and not used."""
    caption = find_column(columns, *([args.caption_column] if args.caption_column else USUAL_CAPTIONS))
    if args.caption_column and caption is None:
        raise UserError(f"--caption_column {args.caption_column}: not in {origin}; columns: {', '.join(columns)}")
    unused = ", ".join(column for column in columns if column not in (*images, caption))
    used = ", references from ".join([images[0], ", ".join(images[1:])][: len(images)])
    report = f"data: {origin}: {count} rows, images from {used}, captions from {caption or 'no column'}"
    level = logging.WARNING if unused and caption is None else logging.INFO
    log.log(level, report + f"; columns not used: {unused}" * bool(unused))
    return caption


def read_metadata(path: Path) -> dict[int, dict[str, Any]]:
    """The rows of a metadata file, by the line where each ends. Raises UserError if one cannot be read."""
    rows, content, header = {}, read_text(path), []
    if path.suffix.lower() == ".csv":
        separator = max(",;\t", key=content.partition("\n")[0].count)
        reader = csv.DictReader(io.StringIO(content), delimiter=separator, strict=True)
        try:
            header = reader.fieldnames or []
            rows = dict((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: {error}; is a quotation mark missing?") from None
    for line, text in enumerate([] if header else content.split("\n"), start=1):
        try:
            rows |= {line: json.loads(text)} if text.strip() else {}
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {line} is not readable as one JSON object ({error.msg})") from None
    if len(set(header)) < len(header):
        raise UserError(f"{path}: two columns have one name: {', '.join(header)}")
    for line, row in rows.items():
        if not isinstance(row, dict) or None in row:
            reason = f"has more cells than columns ({', '.join(header)}); quote texts with commas"
            raise UserError(f"{path}: line {line} {reason if header else 'must be an object with a file_name'}")
    return rows


def list_metadata(args: Args, path: Path, names: dict[Any, Path]) -> tuple[list[str], list[str], list]:
    """All columns of a metadata file, those with images, and (files, captions, origin) of each row."""
    table, found, problems = read_metadata(path), [], []
    if not table:
        return [], [], []
    columns = list(dict.fromkeys(key for row in table.values() for key in row))
    images = image_columns(args, path, columns, table)
    caption = caption_column(args, path, len(table), columns, images)
    for line, row in table.items():
        first, *others = (row.get(column) for column in images)  # the first one is required
        lists = (cell if isinstance(cell, list) else [cell] for cell in others)
        cells = [first, *filter(None, itertools.chain(*lists))]
        paths = [Path(os.path.normpath(path.parent / str(cell).strip())) for cell in cells]
        files = [names.get(file) or names.get(folded(file)) for file in paths]
        advice = f"leads out of the folder or does not exist; names start at {path.parent}"
        wrong = [cell for cell, file in zip(cells, files, strict=True) if file is None]
        problems += [f"line {line}: {cell!r} {advice}" for cell in wrong]
        found.append((files, caption_texts(row.get(caption), f"{path}: line {line}: "), path.name))
    if problems:
        raise UserError(f"{path}: {len(problems)} file name(s) cannot be used:{as_lines(problems)}")
    return columns, images, found


def list_rows(args: Args) -> list[Row]:
    """The rows of --dataset_name, or of each --instance_data_dir with its number of --repeats."""
    if args.dataset_name:
        rows = list_dataset(args)
    else:
        folders = zip(args.instance_data_dir, args.repeats or [1] * len(args.instance_data_dir), strict=True)
        rows = [(*row, n // epoch_rounds(args)) for path, n in folders for row in list_folder(args, path, n)]
    for images, *_ in rows if args.alpha_as_mask else ():
        images[0] = replace(images[0], mask=replace(images[0], alpha_only=True))
    return rows


def list_folder(args: Args, path: str, repeats: int) -> list[tuple[list[Image], Captions, str]]:
    """The rows of the metadata in an --instance_data_dir, or its images; names what is not used."""
    folder, every = Path(os.path.abspath(path)), [Path(os.path.abspath(path)) for path in data_folders(args)]
    root = os.path.commonpath(every[: len(args.instance_data_dir)])  # names of images start here
    others = [other for other in every if other != folder and other.is_relative_to(folder)]
    files, images = ([p for p in paths if not any(map(p.is_relative_to, others))] for paths in list_files(folder))
    found = {path: path.stem.removesuffix(args.mask_suffix or "") for path in images}
    found = {path: stem for path, stem in found.items() if stem not in ("", path.stem)}
    masks = {key: path for path, stem in found.items() for key in (folded(path.with_name(stem)), path.with_name(stem))}
    images = [path for path in images if path not in found]
    names = {key: path for path in reversed(files) for key in (path, folded(path))}
    metadata = {path.parent: path for name in METADATA for path in files if folded(path.name) == name}
    tables = {path: table for path in metadata.values() if (table := list_metadata(args, path, names))[0]}
    for name in ("image_column", "caption_column", "cond_image_column"):
        if not tables and vars(args).get(name) not in (None, "image"):
            raise UserError(f"--{name}: {folder} has no metadata.jsonl or metadata.csv")
    found = [row for *_, rows in tables.values() for row in rows]
    single = all([folded(column) for column in columns] == ["file_name"] for _, columns, _ in tables.values())
    if single:  # metadata only add captions to the images of the folder, perhaps several to one
        captions = dict.fromkeys(images, ((), ""))
        for [image], texts, origin in found:
            captions[image] = captions.get(image, ((), ""))[0] + texts, origin
        found = [([image], *texts) for image, texts in captions.items()]
    if not found:
        name = "validation" if args.instance_data_dir == args.validation_data_dir else "instance"
        raise UserError(f"--{name}_data_dir {folder}: has no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    texts = [p for suffix in CAPTION_SUFFIXES[::-1] for p in files if p.suffix.lower() == suffix and p.is_file()]
    stems = [path.with_suffix("") for path in texts]  # the image's name with or without its suffix
    beside = dict(zip([*map(folded, stems), *stems], [*texts, *texts], strict=True))
    used, listed = [*tables], []
    for paths, texts, origin in found:
        keys = [paths[0].with_suffix(""), paths[0], folded(paths[0].with_suffix("")), folded(paths[0])]
        if not texts and (file := next((beside[key] for key in keys if key in beside), None)):
            texts, origin = caption_texts(read_text(file), f"{file}: "), "caption files"
            used += [file] * len(texts)
        mask = masks.get(keys[0]) or masks.get(keys[2])
        used += [*paths, mask]
        images = [Image(printable(str(path.relative_to(root))).replace("\n", "\\n"), path) for path in paths]
        images[0] = replace(images[0], mask=Image(f"mask {mask.name}", mask) if mask else None)
        listed.append((images, texts, origin))
    log.info(f"data: {path}: {len(listed)} row(s)")
    report_unused(folder, files, used)
    inner = [paths[0].relative_to(folder.parent).as_posix() for paths, *_ in found]
    for pattern, meaning in NAMES_ELSEWHERE.items():
        if odd := [name for name in inner if re.fullmatch(pattern, name, re.IGNORECASE)]:
            log.warning(f"data: {len(odd)} {meaning} but are trained on; move them away: {first_few(odd)}")
    for number, prompt in sorted({match for name in inner for match in re.findall(r"(?:^|/)(\d+)_(.+?)(?=/)", name)}):
        if int(number) != repeats:
            advice = f"give it to --instance_data_dir, with --repeats {number} and --instance_prompt '{prompt}'"
            log.warning(f"data: folder '{number}_{prompt}': repeats and prompt in its name are not read; {advice}")
    without = [(path, every) for path, (every, ours, _) in tables.items() if single or len(every) > len(ours)]
    if without and not any(texts for _, texts, _ in listed):
        lines = as_lines([f"{path}: {', '.join(every)}" for path, every in without])
        raise UserError(f"the metadata has no captions; give --caption_column, or remove the file:{lines}")
    return listed


def column_images(args: Args, table: Any, column: str, lists: bool = False) -> list[Image]:
    """One image per row of the column, whose cells may hold `lists`; none is read yet. Raises UserError."""
    import datasets

    kind, name, caches = datasets.Image(decode=False), args.dataset_name, ()
    try:
        cells = table.select_columns(column).cast_column(column, datasets.List(kind) if lists else kind)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--dataset_name {name}: column {column} holds no images ({error})") from None
    path = Path(os.path.abspath(name))
    if not path.exists():  # a table from the Hub may name downloaded files, but no others on this machine
        caches = args.cache_dir, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE
    roots = [Path(os.path.abspath(root)) for root in caches if root]
    read = functools.partial(read_cell, cells, column, path.parent if path.is_file() else path, roots)
    return [Image(f"row {row}", cell=functools.partial(read, row)) for row in range(len(table))]


def read_cell(table: Any, column: str, folder: Path, roots: list[Path], row: int, item: int | None = None) -> bytes:
    """The image in a cell, or the file it names, from `folder`, and below one of `roots` if given. Raises OSError."""
    cell = table[row][column] if item is None else table[row][column][item]
    if not cell or cell["bytes"] is not None or not cell["path"]:
        return (cell and cell["bytes"]) or b""
    path = Path(os.path.normpath(folder / cell["path"]))
    if roots and not any(map(path.is_relative_to, roots)):
        raise OSError(f"its path leads out of the data set, to {path}")
    return path.read_bytes()


def list_dataset(args: Args) -> list[Row]:
    """The rows of --dataset_name; no image is read yet. Raises UserError with the cause if it cannot be loaded."""
    import datasets  # here because it takes a second and most runs use a folder

    name, split, path = args.dataset_name, args.dataset_split, Path(args.dataset_name)
    builder, files = (TABLE_FILES.get(path.suffix.lower(), name), name) if path.is_file() else (name, None)
    options = {"data_files": files, "split": split, "cache_dir": args.cache_dir, "token": args.hub_token}
    try:
        if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):  # from save_to_disk
            saved = datasets.load_from_disk(name)
            if isinstance(saved, dict) and split not in saved:
                raise ValueError(f"it has {', '.join(saved)}")
            table = saved[split] if isinstance(saved, dict) else saved
        else:
            table = datasets.load_dataset(builder, args.dataset_config_name, **options)
    except Exception as error:  # the readers of files and of the Hub have no common base of errors
        says_nothing = type(error) is datasets.exceptions.DatasetGenerationError
        reason = " ".join(str(error.__cause__ if says_nothing else error).split())
        raise UserError(f"--dataset_name {name} --dataset_split {split}: cannot be loaded ({reason})") from None
    images = image_columns(args, name, table.column_names, table)
    caption = caption_column(args, name, len(table), table.column_names, images)
    files, found = list_files(path) if path.is_dir() else ([], [])
    if caption is None and any(file.suffix.lower() in CAPTION_SUFFIXES for file in files):
        log.warning(f"data: {name}: its caption files are not read; use --instance_data_dir for that")
    if len(found) > len(table) * len(images):
        log.warning(f"data: {name}: has {len(found)} images, its rows have fewer; --instance_data_dir takes all")
    cells, feature = table[caption][:] if caption else [None] * len(table), table.features.get(caption)
    classes, where = getattr(getattr(feature, "feature", feature), "names", ()), f"{name}: column {caption}, row"
    texts = [caption_texts(cell, f"{where} {row}: ", classes) for row, cell in enumerate(cells)]
    return [(*row, f"column {caption}", 1) for row in zip(dataset_images(args, table, images), texts, strict=True)]


def fill_captions(args: Args, samples: list[Sample]) -> list[Sample]:
    """Fills in --instance_prompt where captions are missing and for [trigger]; logs. Raises UserError without it."""
    prompt = args.instance_prompt or ""
    missing = [sample.image.name for sample in samples if not sample.captions]
    triggered = [sample.image.name for sample in samples if "[trigger]" in "".join(sample.captions)]
    if not prompt and (names := missing or triggered):
        reason = "no caption" if missing else "[trigger] in the caption"
        raise UserError(f"--instance_prompt: required, {len(names)} image(s) have {reason}: {first_few(names)}")
    if prompt and not missing and not triggered:
        log.warning("data: every image has a caption, --instance_prompt is not used")
    if missing and len(missing) < len(samples):
        log.warning(f"data: {len(missing)} images have no caption and get --instance_prompt: {first_few(missing)}")
    filled = [s if s.captions else replace(s, captions=(prompt,), origin="--instance_prompt") for s in samples]
    filled = [replace(s, captions=tuple(text.replace("[trigger]", prompt) for text in s.captions)) for s in filled]
    first = {sample.origin: sample for sample in reversed(filled)}  # shown first: an example of each origin
    counts = Counter(sample.origin for sample in filled)
    report = ", ".join(f"{count} image(s) from {origin}" for origin, count in counts.items())
    for sample in list(dict.fromkeys([*map(first.get, counts), *filled]))[:3]:
        others = f" (one of {len(sample.captions)}, chosen at each visit)" * (len(sample.captions) > 1)
        report += f"\n    {sample.image.name}: {sample.captions[0][:120]}{others}"
    log.info(f"data: captions of {report}")
    return filled


def inspect_images(images: Iterable[Image], cache_dir: Path) -> tuple[dict[Image, Image], dict[str, str]]:
    """Checks every image once, in threads: the good ones with hash and size, the names of bad ones with the reason."""
    # `checked_images.json` holds what earlier starts found, so that only new images are decoded
    file, policy, index, good, bad = cache_dir / "checked_images.json", f"masks, decoder {DECODE_POLICY}", {}, {}, {}
    images = list(dict.fromkeys(other for image in images for other in (image.mask, image) if other))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # missing or damaged
        index = {key: facts for key, facts in json.loads(file.read_bytes())[policy].items() if len(facts) == 6}
    known, inspect = len(index), functools.partial(inspect_image, index)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, Progress("check images", len(images)) as progress:
        for image, (key, height, width, darkest, light, reason) in zip(images, pool.map(inspect, images), strict=True):
            mask = good.get(image.mask)  # masks come before their images
            if image.mask and mask and mask.size != (height, width):
                reason = reason or f"{mask.name} is {mask.size[1]} x {mask.size[0]}, the image {width} x {height}"
            if reason or (image.mask and not mask):
                bad[image.name] = reason or f"{image.mask.name} is bad"
            else:
                facts = {"sha256": key, "size": (height, width), "darkest": darkest, "light": (*light,)}
                good[image] = replace(image, **facts, mask=mask)
            progress.update()
    if len(index) > known:
        write_atomically(file, json.dumps({policy: index}).encode())
    return good, bad


def inspect_image(index: dict[str, list], image: Image) -> list:
    """[sha256, height, width, darkest, light, what is wrong or None]; only what is new is read and decoded."""
    try:
        stat = image.path.stat() if image.path else None
        stamp = stat and f"{stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_size} {image.alpha_only} {image.path}"
        if stamp in index:
            return index[stamp]
        data = image.read()
    except OSError as error:
        return ["", 0, 0, 0, [], f"cannot be read ({error})"]
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"{sha256} {image.alpha_only}"
    try:
        if key not in index:
            grey = decode_image(data, image.alpha_only).convert("L")
            index[key] = [sha256, grey.height, grey.width, grey.getextrema()[0], grey.getbbox() or [], None]
    except ValueError as error:
        index[key] = [sha256, 0, 0, 0, [], str(error)]
    index[stamp or key] = index[key]
    return index[key]


def refuse_bad_images(args: Args, bad: dict[str, str], listed: int, good: int) -> None:
    """Raises UserError with a list of all bad images, or with --on_bad_image skip logs what is left out."""
    lines, count = as_lines([f"{name}: {reason}" for name, reason in bad.items()]), f"{len(bad)} image(s)"
    if bad and (args.on_bad_image == "error" or not good):
        raise UserError(f"{count} cannot be trained on; repair or remove them, or use --on_bad_image skip:{lines}")
    if bad:
        log.warning(f"data: {count} are skipped, and with them {listed - good} of {listed} rows:{lines}")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it; makes the folder. Raises CannotWrite, leaving nothing."""
    temporary = path.with_name(f".{path.name}.{int.from_bytes(os.urandom(8), 'big')}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = f"cannot be written ({error.strerror or error}); free space, or choose another folder"
        raise CannotWrite(f"{path}: {reason}") from error


def make_generator(seed: int, *purpose: Any) -> torch.Generator:
    """A CPU generator for one purpose, the same on all machines and processes."""
    key = "\x1f".join(map(str, (seed, *purpose))).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)


@functools.lru_cache(maxsize=256)
def permutation(seed: int, stream: str, bucket: int, turn: int, length: int) -> list[int]:
    return torch.randperm(length, generator=make_generator(seed, stream, "order", bucket, turn)).tolist()


@functools.lru_cache(maxsize=4)
def bucket_schedule(seed: int, stream: str, cycle: int, shares: tuple[int, ...]) -> list[tuple[int, int]]:
    """(bucket, j) for each micro-step of a cycle: a bucket with n shares comes at the times (j + offset) / n, j < n."""
    offsets = torch.rand(len(shares), generator=make_generator(seed, stream, "schedule", cycle)).tolist()
    turns = [((j + offsets[b]) / share, b, j) for b, share in enumerate(shares) for j in range(share)]
    return [(bucket, j) for _, bucket, j in sorted(turns)]


class SampleStream:
    """Endless batch sampler: (sample index, position) pairs of this process; a function of (seed, step) alone.

    Buckets come up in proportion to their size. Each is one permutation after another, and a batch may reach into the
    next one, so nothing is dropped. The position counts visits over all processes.
    """

    def __init__(self, geometries: list, batch: int, seed: int, stream: str, first=0, process_index=0, processes=1):
        """`geometries` (sortable) are those of the samples: a batch holds samples of one geometry."""
        order = sorted(range(len(geometries)), key=geometries.__getitem__)
        self.buckets = [list(group) for _, group in itertools.groupby(order, key=geometries.__getitem__)]
        common = math.gcd(*map(len, self.buckets))
        self.shares = tuple(len(bucket) // common for bucket in self.buckets)
        self.batch, self.seed, self.stream, self.first = batch, seed, stream, first
        self.process_index, self.processes = process_index, processes

    def micro_batch(self, step: int) -> list[tuple[int, int]]:
        """This process's (sample index, position) pairs of global micro-batch `step`."""
        cycle, place = divmod(step, sum(self.shares))
        bucket, earlier = bucket_schedule(self.seed, self.stream, cycle, self.shares)[place]
        members, global_batch = self.buckets[bucket], self.batch * self.processes
        start = (cycle * self.shares[bucket] + earlier) * global_batch
        pairs = []
        for i in range(self.process_index * self.batch, (self.process_index + 1) * self.batch):
            turn, offset = divmod(start + i, len(members))
            order = permutation(self.seed, self.stream, bucket, turn, len(members))
            pairs.append((members[order[offset]], step * global_batch + i))
        return pairs

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.micro_batch, itertools.count(self.first))


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors and keeps everything else as lists."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    return {key: torch.stack(values) if torch.is_tensor(values[0]) else values for key, values in batch.items()}


def epoch_rounds(args: Args) -> int:
    """How many times an epoch goes through all samples: the common divisor of --repeats."""
    return math.gcd(*(args.repeats or [1]))


def choose_buckets(run: Run, resolution: int = 0) -> list[Size]:
    """The (height, width) sizes to train at: the given list, a computed one, or the square of --resolution."""
    resolution = resolution or run.args.resolution
    if run.args.aspect_ratio_buckets:
        return parse_sizes(run.args.aspect_ratio_buckets)
    if run.args.use_aspect_ratio_buckets:
        return training_utils.generate_aspect_ratio_buckets(resolution, divisibility=run.token_size)
    return [(resolution, resolution)]


def choose_targets(size: Size, choices: list[list[Size]]) -> list[Size]:
    """The nearest bucket in each of the `choices` that does not enlarge the image, or else the first one's."""
    targets = [nearest_bucket(size, buckets) for buckets in choices]
    return [target for target in targets if cover_size(size, target) <= size] or targets[:1]


def report_samples(run: Run, samples: list[Sample]) -> None:
    """Logs captions and sizes; warns about captions that are cut and images that are enlarged a lot."""
    if not run.args.remote_text_encoder:  # which has its own tokenizer
        tokenizer, limit = load_tokenizer(run), run.args.max_sequence_length
        texts = sorted({text for sample in samples for text in sample.captions})
        lengths = {text: len(token_ids(run.family, tokenizer, text)) for text in texts}
        log.info(f"data: {len(lengths)} different captions, the longest has {max(lengths.values())} of {limit} tokens")
        if long := [s.image.name for s in samples for text in s.captions if lengths[text] > limit]:
            log.warning(f"data: {len(long)} captions are cut at {limit} tokens: {first_few(long)}")
    images = [sample.image for sample in samples]
    for (height, width), count in sorted(Counter(image.target for image in images).items()):
        small = sum(i.target == (height, width) and cover_size(i.size, i.target) > i.size for i in images)
        log.info(f"data: {height:5d} x {width:<5d} {count:6d} image(s)" + f", {small} of them enlarged" * (small > 0))
    if run.args.mask_suffix or run.args.alpha_as_mask:
        distinct = {(image.sha256, image.mask and image.mask.sha256): image for image in images}.values()
        masks, outside = [i for i in distinct if i.mask and i.mask.darkest < 255], run.args.unmasked_weight
        level, centre = logging.INFO if masks else logging.WARNING, run.args.center_crop or run.args.cache_latents
        log.log(level, f"data: {len(masks)} of {len(distinct)} images have a mask; {outside:g} outside of it")
        if lost := [image.name for image in masks if outside == 0 and not image.shows_mask(centre)]:
            where = "in the centre crop" if centre else "all over"
            raise UserError(f"{len(lost)} mask(s) are black or clear {where}: {first_few(lost)}; change or remove them")
    images = [*{image.name: image for image in images}.values()]  # each once, whatever the number of sizes
    if blurred := [image.name for image in images if cover_size(image.size, image.target)[0] > 4 * image.size[0]]:
        log.warning(f"data: {len(blurred)} image(s) are enlarged more than four times: {first_few(blurred)}")
    if cut := [i.name for i in images if 2 * math.prod(i.target) < math.prod(cover_size(i.size, i.target))]:
        log.warning(f"data: {len(cut)} image(s) lose over half to the crop, see docs/data.md: {first_few(cut)}")
    first = {image.sha256: image.path for image in reversed(images)}
    if copies := [image.name for image in images if image.path and image.path != first[image.sha256]]:
        log.warning(f"data: {len(copies)} image(s) are copies of others, and trained on as well: {first_few(copies)}")


def split_samples(run: Run, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The samples to train on, and those held out for the validation loss. Raises UserError if none is left."""
    contents, count = list(dict.fromkeys(sample.image.sha256 for sample in samples)), run.args.validation_split
    if count >= len(contents):
        raise UserError(f"--validation_split {count}: there are only {len(contents)} images; hold out fewer")
    chosen = {contents[index] for index in permutation(run.seed, "held out", 0, 0, len(contents))[:count]}
    held_out = [sample for sample in samples if sample.image.sha256 in chosen]
    rest = [sample for sample in samples if sample.image.sha256 not in chosen]
    if folders := run.args.validation_data_dir:
        usual = {"dataset_name": None, "repeats": None, "image_column": "image", "caption_column": None}
        flags = Args(**vars(run.args) | usual | {"cond_image_column": None, "instance_data_dir": folders})
        others, trained = make_samples(run, fill_captions(flags, list_samples(flags))), {s.image.sha256 for s in rest}
        held_out += [sample for sample in others if sample.image.sha256 not in trained]
        if both := list(dict.fromkeys(sample.image.name for sample in others if sample.image.sha256 in trained)):
            reason = f"{len(both)} image(s) of --validation_data_dir are also trained on, so they are not held out"
            log.warning(f"data: {reason}: {first_few(both)}")
    if held_out:
        names = [name for _, name in dict.fromkeys((s.image.sha256, s.image.name) for s in held_out)]
        log.info(f"data: {len(names)} image(s) are held out: {first_few(names)}")
    rounds = range(max(sample.repeats for sample in rest))  # a sample is visited as often as it stands in the list
    return [sample for turn in rounds for sample in rest if turn < sample.repeats], held_out


# endregion shared: data


# differs: samples of the text-to-image script have no references
def check_data(run: Run) -> tuple[list[Sample], list[Sample]]:
    """The samples to train on and those held out; every image has been decoded once, every caption is final."""
    samples, held_out = split_samples(run, make_samples(run, fill_captions(run.args, list_samples(run.args))))
    for check in (report_samples, check_references):
        check(run, [*dict.fromkeys(samples + held_out)])
    for row, prompt in enumerate(run.args.validation_prompt or final_prompts(run.args)):
        sizes = [f"{image.width} x {image.height}" for image in validation_references(run.args, row)]
        given = f"references of {', '.join(sizes)}" if sizes else "no reference; see --validation_image"
        log.info(f"validation: '{prompt}' has {given}")
    return samples, held_out


def as_reference(image: Image, token_size: int, target: Image | None) -> Reference:
    """Turns a checked image into a reference: with its own shape, in whole tokens, or with the crop of its `target`."""
    if target:
        fitted = {"target": target.target, "resize_key": f"aligned {target.size}", "pair_size": target.size}
    else:
        whole = tuple(side // token_size * token_size for side in capped_size(image.size))
        fitted = {"target": whole, "resize_key": "reference"}
    return Reference(**vars(image) | fitted)


# differs: samples of the text-to-image script have no references
def make_samples(run: Run, listed: list[Sample]) -> list[Sample]:
    """The samples with good images: each target at the size, or sizes, it is trained at, references as at inference."""
    good, bad = inspect_images([image for sample in listed for image in sample.images], run.cache_dir)
    kept, samples, align = [], [], run.args.align_cond_image
    for sample in (sample for sample in listed if good.keys() >= {*sample.images}):
        image, *others = map(good.get, sample.images)
        reasons = {other.name: reference_problem(other.size, image.size if align else None) for other in others}
        bad |= {name: reason for name, reason in reasons.items() if reason}
        kept += [] if any(reasons.values()) else [(sample, image, others)]
    refuse_bad_images(run.args, bad, len(listed), len(kept))
    choices = [choose_buckets(run, side) for side in run.resolutions]
    sizes = ((*row, target) for row in kept for target in choose_targets(row[1].size, choices))
    for sample, image, others, target in sizes:
        sized = replace(image, target=target)
        references = tuple(as_reference(other, run.token_size, sized if align else None) for other in others)
        samples.append(replace(sample, image=sized, references=references))
    return samples


# differs: samples of the text-to-image script have no references
class TrainingSet(Dataset):
    """Turns (sample index, position) into the tensors of a visit; everything random depends on stream and position."""

    def __init__(self, run: Run, codec: LatentCodec, samples: list[Sample], stream: str) -> None:
        self.run = replace(run, accelerator=None)  # spawned workers get a pickled copy, and it cannot be pickled
        self.codec, self.samples, self.stream, self.prompts = codec, samples, stream, open_prompts(run)

    def __getitem__(self, visit: tuple[int, int]) -> dict[str, Any]:
        """noise (L, C), u and prompt embedding of the visit, and latent moments or pixels (3, H, W) of each image."""
        index, position = visit
        run, sample, channels = self.run, self.samples[index], self.codec.channels
        generator = functools.partial(make_generator, run.seed, self.stream)
        names = ("caption", "caption dropout", "cond dropout", "flip")
        chance = {name: torch.rand(1, generator=generator(name, position)).item() for name in names}  # in [0, 1)
        centre = run.args.center_crop or run.args.cache_latents
        crop = None if centre else torch.rand(2, generator=generator("crop", position)).tolist()
        flip = run.args.random_flip and chance["flip"] < 0.5
        caption = sample.captions[int(chance["caption"] * len(sample.captions)) % len(sample.captions)]
        caption = "" if chance["caption dropout"] < run.args.caption_dropout else caption
        images = sample.images[:1] if chance["cond dropout"] < run.args.cond_dropout else sample.images
        height, width = (side // run.token_size for side in sample.image.target)  # in tokens
        if cached := run.args.cache_latents:
            target, *references = (self.codec.cache.get(*self.codec.key(image, flip)) for image in images)
        else:
            target, *references = (image.pixels(crop, flip) for image in images)
        item = {
            "moments" if cached else "pixels": target,
            "name": sample.image.name,
            "position": position,
            "target": sample.image.target,
            "caption": caption,
            "prompt_embeds": self.prompts.get(caption),
            "noise": torch.randn(height * width, channels, generator=generator("noise", position)),
            "u": draw_u(run.args, generator("sigma", position)),
            "references": references,
        }
        if run.args.vae_encode_mode == "sample":
            shape = (channels // 4, 2 * height, 2 * width)
            item["posterior_noise"] = torch.randn(shape, generator=generator("posterior", position))
        if run.args.mask_suffix or run.args.alpha_as_mask:
            item["weights"] = sample.image.token_weights(run.args, run.token_size, crop, flip)
        return item


def check_references(run: Run, samples: list[Sample]) -> None:
    """Logs groups and lengths; warns about what would be learned by accident."""
    batch, align = run.args.train_batch_size, run.args.align_cond_image
    paired = [sample for sample in samples if sample.references]
    if align and (large := [s.image.target for s in paired if math.prod(s.image.target) > REFERENCE_AREA]):
        reason = f"{len(large)} targets are trained at more than {REFERENCE_AREA} pixels, such as {large[0]}"
        raise UserError(f"--align_cond_image: {reason}; the pipelines shrink such references: choose smaller sizes")
    if same := [s.image.name for s in paired if s.image.sha256 in {image.sha256 for image in s.references}]:
        log.warning(f"data: {len(same)} rows have their own target as a reference and teach nothing: {first_few(same)}")
    groups = Counter(sample.geometry for sample in samples)
    log.info(f"data: {len(groups)} groups of equal geometry (sizes of target and references); a batch holds one group")
    target, *references = max(([math.prod(size) // run.token_size**2 for size in sizes] for sizes in groups), key=sum)
    log.info(f"data: the longest sequence has {target} target + {sum(references)} reference tokens + text")
    if small := sum(count < batch for count in groups.values()):
        log.warning(f"data: {small} groups have fewer than {batch} rows: a batch repeats some, with other noise")
    images = [sample.image for sample in paired]
    cut = [i for i in images if math.prod(i.target) < 0.9 * math.prod(cover_size(i.size, i.target))]
    if cut and not align:
        remedy = "the LoRA will learn to crop; see --use_aspect_ratio_buckets and --align_cond_image"
        log.warning(f"data: {len(cut)} targets lose over a tenth to the crop, their references do not: {remedy}")


def validation_references(args: Args, row: int) -> list[PIL.Image.Image]:
    """The references of this prompt, decoded. Raises UserError for one that the pipelines would refuse."""
    images = []
    for path in map(Path, split_paths(args.validation_image[row]) if row < len(args.validation_image or []) else []):
        try:
            image = decode_image(path.read_bytes())
            problem = reference_problem((image.height, image.width))
        except (OSError, ValueError) as error:
            problem = error
        if problem:
            raise UserError(f"--validation_image {path}: {problem}")
        images.append(image)
    return images


# ---------------------------------------------------------------------------------------------- Text and latents (once)
# region shared: models
# Each distinct prompt and image is encoded once, by one process, into a file named after everything it depends on. Text
# encoder and VAE leave the device before the transformer is loaded; of the encoder only the layers needed are loaded.
# Training reads the files in the loader's workers. Rejected: keeping them in memory, 15.7 MB per embedding of [dev].
UNREAD = re.compile(r"lm_head|vision_tower|multi_modal_projector|layers\.(\d+)\.")  # of the layers only the last ones
HUB_SILENCE, REMOTE_SILENCE, REMOTE_PATIENCE = 120.0, 60.0, 300.0  # seconds without a byte, and for a whole answer


class TensorCache:
    """A folder of safetensors files with one tensor each; a file is named after everything the tensor depends on."""

    def __init__(self, folder: Path, *model: Any) -> None:
        self.folder, self.key = folder, digest(*model)

    def path(self, *what: Any) -> Path:
        return self.folder / f"{digest(self.key, *what)}.safetensors"

    def has(self, *what: Any) -> bool:
        """Whether there is a complete file; one that a crash has damaged is written again."""
        try:
            with safe_open(self.path(*what), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def get(self, *what: Any) -> torch.Tensor:
        [tensor] = load_file(self.path(*what)).values()
        return tensor

    def put(self, tensor: torch.Tensor, name: str, *what: Any) -> None:
        """Raises UserError with this name if the tensor is not finite, since every later run would read it."""
        if not tensor.isfinite().all():
            raise UserError(f"{name}: its encoding is not finite; check the model's weights, or --mixed_precision no")
        write_atomically(self.path(*what), save({"tensor": tensor.cpu().contiguous()}))


def open_prompts(run: Run) -> TensorCache:
    """The cache of prompt embeddings (L, D) by prompt."""
    encoder = run.args.remote_text_encoder_url if run.args.remote_text_encoder else run.model.version("text_encoder")
    template, length = (run.model.version("tokenizer"), SYSTEM_MESSAGE), run.args.max_sequence_length
    formats = [json.dumps(run.text_quantization, sort_keys=True)] if run.text_quantization else []
    return TensorCache(run.cache_dir / "prompts", encoder, *run.text_layers, length, run.dtype, *template, *formats)


def load_tokenizer(run: Run) -> Any:
    """The tokenizer, tried on a prompt: if the vocabulary is missing, transformers silently makes an empty one."""
    config = run.model.config("text_encoder")
    known = config.get("text_config", config)["vocab_size"]
    try:
        tokenizer = getattr(transformers, run.family.tokenizer).from_pretrained(run.model.folder / "tokenizer")
        ids = token_ids(run.family, tokenizer, "a photo")
        if "a photo" not in tokenizer.decode(ids) or max(ids) >= known:
            raise ValueError(f"a prompt becomes {ids[:8]} of {known} tokens")
    except Exception as error:  # the libraries have no common base of errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        advice = "download it again, or after a clone run `git lfs pull`"
        raise UserError(f"{run.model.name}/tokenizer: does not fit the text encoder ({reason}); {advice}") from None
    return tokenizer


def token_ids(family: ModelFamily, tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt in the chat template of the family's pipeline, not padded and not cut."""
    messages, options = [{"role": "user", "content": prompt}], {"add_generation_prompt": True, "enable_thinking": False}
    if family.pipeline == "Flux2Pipeline":
        [messages], options = format_input([prompt]), {}
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"][0].tolist()


def read_text_encoder(run: Run, **options: Any) -> tuple[nn.Module, dict[str, list]]:
    """The text encoder with only the layers that are needed, and a report on its weights for `refuse_misfits`."""
    kind, folder = getattr(transformers, run.family.text_encoder), run.model.folder / "text_encoder"
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        text_config = getattr(config, "text_config", config)  # Mistral 3 nests it beside its vision tower
        # one layer more than the last hidden state, since transformers applies the final norm after the last layer
        keep = text_config.num_hidden_layers = min(max(run.text_layers) + 1, text_config.num_hidden_layers)
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = text_config.layer_types[:keep]
        if options.get("device_map") == "meta":
            vars(config).pop("quantization_config", None)  # else it would load such weights to check them
        options |= {"config": config, "dtype": run.dtype, "variant": run.model.variant, "use_safetensors": True}
        encoder, info = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{run.model.name}/text_encoder: cannot be read as {kind.__name__} ({reason})") from None
    report = {}
    for name, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"), ("misshapen", "mismatched_keys")):
        matches = ((entry, UNREAD.search(str(entry))) for entry in info[key])
        report[name] = [entry for entry, match in matches if not match or match[1] and int(match[1]) < keep]
    return encoder, report


def load_text_encoder(run: Run) -> nn.Module:
    """The text encoder with only the layers that are needed, frozen, in the compute dtype, on the device."""
    fetch_part(run, "text_encoder")
    quantized = run.text_quantization is not None  # then all of it is on the device
    spread = run.args.offload and run.device.type != "cpu" and not run.args.fsdp_text_encoder and not quantized
    options = {"device_map": "auto"} if spread else {}
    if quantized:
        settings = transformers.BitsAndBytesConfig(**run.text_quantization)
        options = {"device_map": {"": run.device}, "quantization_config": settings}
    if spread and run.processes > 1:  # the other GPUs belong to other processes
        options["max_memory"] = {run.device.index: free_bytes(run) - 2**30, "cpu": 2**62}
    encoder, report = read_text_encoder(run, **options)
    refuse_misfits(run, "text_encoder", report)
    encoder.eval().requires_grad_(False)
    encoder.lm_head = nn.Identity()  # not needed, nor is what reads images: 2 GB of [dev] in bf16
    if hasattr(encoder.model, "vision_tower"):
        encoder.model.vision_tower = encoder.model.multi_modal_projector = None
    if run.args.fsdp_text_encoder:
        # not `encoder.model`: FSDP renames the class of its root, by which transformers finds the hidden states
        shard(run, encoder, getattr(encoder.model, "language_model", encoder.model).layers)
    stored = getattr(encoder.config, "quantization_config", None)  # then transformers has put it on the device already
    return encoder if spread or stored or run.args.fsdp_text_encoder else encoder.to(run.device)


@torch.no_grad()
def encode_prompt(run: Run, tokenizer: Any, encoder: nn.Module, prompt: str) -> torch.Tensor:
    """Prompt embedding (L, D) from the family's pipeline: the chosen hidden states concatenated, with padding."""
    nothing = {"transformer": None, "vae": None, "scheduler": None}
    pipeline = getattr(diffusers, run.family.pipeline)(text_encoder=encoder, tokenizer=tokenizer, **nothing)
    options = {"max_sequence_length": run.args.max_sequence_length, "text_encoder_out_layers": run.text_layers}
    return pipeline.encode_prompt(prompt, device=run.device, **options)[0][0].to(run.dtype)


def encode_prompt_remotely(run: Run, prompt: str) -> torch.Tensor:
    """Prompt embedding (L, D) from --remote_text_encoder_url. Raises UserError if the answer is not usable.

    A busy server is asked again. The token is sent only to hosts of the Hub and to this machine; redirects are not
    followed. The answer is a saved tensor, read with `weights_only`; its size is limited, also when unpacked.
    """
    expected = (1, run.args.max_sequence_length, run.model.config("transformer")["joint_attention_dim"])
    url, limit, body = run.args.remote_text_encoder_url, 4 * math.prod(expected) + 1_000_000, bytearray()
    scheme, host = urllib.parse.urlsplit(url).scheme, str(urllib.parse.urlsplit(url).hostname)
    hub = scheme == "https" and host.endswith((".huggingface.co", ".hf.space", ".huggingface.cloud"))
    token = (run.args.hub_token or huggingface_hub.get_token()) if hub or host in LOOPBACK else None
    request = {"json": {"prompt": prompt}, "headers": {"Authorization": f"Bearer {token}"} if token else {}}
    busy = {"status_forcelist": (429, 500, 502, 503, 504), "allowed_methods": None, "retry_after_max": REMOTE_PATIENCE}
    request |= {"timeout": REMOTE_SILENCE, "stream": True, "allow_redirects": False}
    session = requests.Session()
    session.mount(url, HTTPAdapter(max_retries=Retry(5, backoff_factor=1, **busy)))
    try:
        with session, session.post(url, **request) as response:
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code} {response.reason}")
            end = time.monotonic() + REMOTE_PATIENCE
            while piece := response.raw.read1(2**20):
                body += piece
                if len(body) > limit or time.monotonic() > end:
                    raise ValueError(f"more than {limit} bytes, or only {len(body)} bytes in {REMOTE_PATIENCE:g} s")
        with zipfile.ZipFile(io.BytesIO(body)) as archive:  # torch.load would unpack a thousand times the size
            if (size := sum(entry.file_size for entry in archive.infolist())) > limit:
                raise ValueError(f"{size} bytes when unpacked, more than {limit}")
        embedding = torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")
        if not torch.is_tensor(embedding) or tuple(embedding.shape) != expected:
            raise ValueError(f"{getattr(embedding, 'shape', type(embedding))} is not a tensor of shape {expected}")
        if not embedding.is_floating_point() or not embedding.to(run.dtype).isfinite().all():
            raise ValueError(f"{embedding.dtype} values that are not floating point or not all finite")
    except Exception as error:  # connection, protocol and unpickling errors have no common base
        advice = "to encode here, replace --remote_text_encoder with --offload"
        raise UserError(f"{url}: no usable answer ({type(error).__name__}: {error}); {advice}") from None
    return embedding[0].to(run.dtype)


@contextlib.contextmanager
def shared_out(run: Run, work: list[Any], lockstep: bool = False) -> Iterator[list[Any]]:
    """This process's share of the work; no process starts before all know what there is to do, and all end together.

    In lockstep, for sharded models, all shares are equally long, and a failure ends the run instead of waiting.
    """
    run.accelerator.wait_for_everyone()
    try:
        with run.accelerator.split_between_processes(work, apply_padding=lockstep and bool(work)) as mine:
            yield mine
    except Exception:
        if not lockstep:
            run.accelerator.wait_for_everyone()
        raise
    run.accelerator.wait_for_everyone()


def encode_prompts(run: Run, prompts: list[str], limit: int | None = None) -> TensorCache:
    """Encodes the prompts missing in the cache, at most `limit`; the encoder is loaded, used once and freed."""
    cache = open_prompts(run)
    missing = [prompt for prompt in dict.fromkeys(prompts) if not cache.has(prompt)]
    log.info(f"text: {len(set(prompts))} different prompts, {len(missing)} to encode")
    with shared_out(run, missing[:limit], lockstep=run.args.fsdp_text_encoder) as mine:
        if mine:
            encode = functools.partial(encode_prompt_remotely, run)
            if not run.args.remote_text_encoder:
                encode = functools.partial(encode_prompt, run, load_tokenizer(run), load_text_encoder(run))
            with Progress("encode prompts", len(mine)) as progress:
                for prompt in mine:
                    cache.put(encode(prompt), f"prompt {prompt[:80]!r}", prompt)
                    progress.update()
            del encode
            training_utils.free_memory()
    return cache


def all_prompts(run: Run, samples: list[Sample]) -> list[str]:
    """All prompts of the run: captions, validation, and the empty one for caption dropout and klein's guidance."""
    prompts = [caption for sample in samples for caption in sample.captions]
    others = *final_prompts(run.args), *(run.args.validation_prompt or []), vars(run.args).get("class_prompt")
    prompts += [prompt for prompt in others if prompt is not None]
    return prompts + [""] * (run.args.caption_dropout > 0 or run.family.pipeline != "Flux2Pipeline")


class LatentCodec:
    """What turns images into tokens, beside the VAE: its sizes and batch-norm statistics, and the cache of latents."""

    def __init__(self, run: Run) -> None:
        """Reads the statistics from the weight files, without loading the VAE."""
        fetch_part(run, "vae", announced=False)
        weights = {name: tensor for path in run.model.weight_files("vae") for name, tensor in load_file(path).items()}
        variance_C, epsilon = weights["bn.running_var"].float(), run.model.config("vae").get("batch_norm_eps", 1e-4)
        self.mean_C, self.std_C = weights["bn.running_mean"].float(), torch.sqrt(variance_C + epsilon)
        self.channels, self.token_size = len(self.mean_C), run.token_size  # of a token, and its pixels per side
        self.cache = TensorCache(run.cache_dir / "latents", run.model.version("vae"))

    def key(self, image: Image, flip: bool) -> tuple:
        return image.sha256, DECODE_POLICY, *image.target, image.resize_key, flip


def load_vae(run: Run) -> AutoencoderKLFlux2:
    """The VAE, frozen, in fp32: it is small, and bf16 would make its statistics up to 0.4 % wrong."""
    options = {"torch_dtype": torch.float32, "variant": run.model.variant, "use_safetensors": True}
    vae = AutoencoderKLFlux2.from_pretrained(fetch_part(run, "vae"), **options).eval().requires_grad_(False)
    vae.at_rest = vae.state_dict()  # on the CPU, for `rest_vae`
    return vae.to(run.device)


def rest_vae(vae: AutoencoderKLFlux2) -> AutoencoderKLFlux2:
    """Takes the frozen VAE off the device without copying: its weights are still on the CPU."""
    vae.load_state_dict(vae.at_rest, assign=True)
    return vae


def position_ids(height: int, width: int, time: int = 0, length: int = 1, device: Any = None) -> torch.Tensor:
    """(1, N, 4) coordinates (T, row, column, l) of the tokens of an image, with T = 0 for the target, or of a text."""
    ends = ((time, time + 1), (0, height), (0, width), (0, length))
    return torch.cartesian_prod(*(torch.arange(*pair, device=device) for pair in ends))[None]


@torch.no_grad()
def encode_pixels(vae: AutoencoderKLFlux2, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] -> moments (B, 2, C, H, W) of the latent distribution: mean and log-variance, fp32."""
    # the pipelines use this memory format
    posterior = vae.encode(pixels_BCHW.to(vae.device, vae.dtype, memory_format=torch.channels_last)).latent_dist
    return torch.stack([posterior.mean, posterior.logvar], dim=1).float()


def tokens_from_moments(
    codec: LatentCodec, moments_B2CHW: torch.Tensor, posterior_noise_BCHW: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalised clean tokens x_0 (B, L, C), fp32; from the mean if there is no noise (`--vae_encode_mode mode`)."""
    mean, log_variance = moments_B2CHW.unbind(1)
    latents = mean if posterior_noise_BCHW is None else mean + torch.exp(0.5 * log_variance) * posterior_noise_BCHW
    mean_C, std_C = (each.to(latents.device, non_blocking=True) for each in (codec.mean_C, codec.std_C))
    patches = F.pixel_unshuffle(latents, 2)  # 2 x 2 latents become the channels of one token
    return ((patches - mean_C.view(1, -1, 1, 1)) / std_C.view(1, -1, 1, 1)).flatten(2).transpose(1, 2)


@torch.no_grad()
def decode_tokens(
    codec: LatentCodec, vae: AutoencoderKLFlux2, tokens_BLC: torch.Tensor, height: int, width: int
) -> list[PIL.Image.Image]:
    """Images from normalised tokens (B, height*width, C): undoes `tokens_from_moments` and the VAE's encoder."""
    tokens_BLC = tokens_BLC.float() * codec.std_C.to(tokens_BLC.device) + codec.mean_C.to(tokens_BLC.device)
    latents = F.pixel_shuffle(tokens_BLC.transpose(1, 2).unflatten(2, (height, width)), 2)
    # one at a time: at 1024 px the decoder's activations are several GB per image
    pixels = torch.cat([vae.decode(one.to(vae.device, vae.dtype), return_dict=False)[0] for one in latents.split(1)])
    bytes_BHWC = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [PIL.Image.fromarray(array) for array in bytes_BHWC]


def encode_images(run: Run, codec: LatentCodec, images: list[Image]) -> AutoencoderKLFlux2 | None:
    """With --cache_latents encodes what is not cached yet, one image at a time, with --random_flip mirrored as well.

    Returns the VAE if it is still needed; it waits on the CPU, out of the transformer's way.
    """
    vae, flips = None, (False, True) if run.args.random_flip else (False,)
    wanted = {codec.key(image, flip): (image, flip) for image in images for flip in flips if run.args.cache_latents}
    missing = [(key, *work) for key, work in wanted.items() if not codec.cache.has(*key)]
    if wanted:
        log.info(f"latents: {len(wanted)} wanted, {len(missing)} to encode")
    with shared_out(run, missing) as mine:
        if mine:
            numbers_per_pixel = 2 * codec.channels / codec.token_size**2  # mean and log-variance
            need = sum(4 * numbers_per_pixel * math.prod(image.target) for _, image, _ in mine)
            check_space(run.cache_dir, need, "the latent cache", "--latents_cache_dir")
            vae = load_vae(run)
            with Progress("encode images", len(mine)) as progress:
                for key, image, flip in mine:
                    moments = encode_pixels(vae, image.pixels(flip=flip)[None])[0]
                    codec.cache.put(moments, f"image {image.name}", *key)
                    progress.update()
    draws = bool(final_prompts(run.args)) and run.args.num_validation_images > 0
    vae = rest_vae(vae or load_vae(run)) if draws or not run.args.cache_latents else None
    training_utils.free_memory()
    return vae


def safetensors_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file; equal runs must give equal files, but the library writes metadata in random order."""
    data = save(tensors)
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps({**({"__metadata__": metadata} if metadata else {}), **json.loads(data[8:end])}).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[end:]])


def check_space(folder: Path, need: float, what: str, remedy: str) -> None:
    """Raises UserError unless `need` bytes and 10 % more are free on the disk of `folder`."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    log.info(f"disk: {what} needs {need / 1e9:.2f} GB, {free / 1e9:.1f} GB are free")
    if need * 1.1 > free:
        raise UserError(f"{folder}: {what} needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; see {remedy}")


# ------------------------------------------------------------------------------------------------------ Models and LoRA
# The base is frozen: loaded once, quantised block by block (FP8 here, NF4 and int8 by diffusers), then kept whole on
# the device, split over processes, or streamed from the host. Only the LoRA is trained, in fp32. Tried and rejected:
# torchao's FP8 layers, which keep a bf16 weight for the backward pass; PEFT's own cast, which copies the input of every
# layer in fp32; accelerate's FSDP, which turns the LoRA into DTensors.
FP8 = torch.float8_e4m3fn
ATTENTION = "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0"
TEXT_ATTENTION = "attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out"
FAL = f"{ATTENTION},{TEXT_ATTENTION},ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2"
AI_TOOLKIT = f"{FAL},norm1_context.linear,norm1.linear,norm.linear,proj_mlp,proj_out"
LORA_PRESETS = {"attention": ATTENTION, "fal": FAL, "ai-toolkit": AI_TOOLKIT}
DEFAULT_LORA_LAYERS = f"{ATTENTION},{TEXT_ATTENTION},attn.to_qkv_mlp_proj,attn.to_out"
# FLUX.1 names, which many published lists use, and their FLUX.2 counterparts: there, all blocks share the modulation,
# and single blocks fuse q, k, v and the MLP.
FLUX1_NAMES = (
    (r"(ff|ff_context)\.net\.0\.proj$", r"\1.linear_in"), (r"(ff|ff_context)\.net\.2$", r"\1.linear_out"),
    (r"^(transformer_blocks\.\d+\.)?norm1\.linear$", "double_stream_modulation_img.linear"),
    (r"^(transformer_blocks\.\d+\.)?norm1_context\.linear$", "double_stream_modulation_txt.linear"),
    (r"^(single_transformer_blocks\.\d+\.)?norm\.linear$", "single_stream_modulation.linear"),
    (r"^(single_transformer_blocks\.\d+\.)(attn\.to_[qkv]|proj_mlp)$", r"\1attn.to_qkv_mlp_proj"),
    ("^proj_mlp$", "attn.to_qkv_mlp_proj"), (r"^(single_transformer_blocks\.\d+\.)?proj_out$", r"\1attn.to_out"),
)  # fmt: skip


def rename(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    for pattern, new in patterns:
        name = re.sub(pattern, new, name)
    return name


def resolve_lora_layers(linear_names: list[str], asked: str | None) -> list[str]:
    """Full names of the Linear modules that get a LoRA. Raises UserError for an entry that matches none.

    `asked` is a preset or a comma separated list of names or their ends; `final:proj_out` is the last layer.
    """
    text = LORA_PRESETS.get((asked or "").strip().lower(), asked or DEFAULT_LORA_LAYERS)
    entries = [part.strip() for part in text.split(",") if part.strip()] or [text]
    names, chosen = {entry: rename(entry, FLUX1_NAMES) for entry in entries}, set()
    if renamed := [f"{entry} is {name}" for entry, name in names.items() if name != entry]:
        log.info(f"lora: FLUX.1 names in FLUX.2: {', '.join(renamed)}")
    for entry, name in names.items():
        matches = [full for full in linear_names if f"final:{full}" == name or f".{full}".endswith(f".{name}")]
        if not matches:
            endings = sorted({re.sub(r"^.*blocks\.\d+\.", "", full) for full in linear_names})
            near = difflib.get_close_matches(name, [*linear_names, *endings], n=4, cutoff=0.4) or endings
            raise UserError(f"--lora_layers: '{entry}' is not a Linear module; nearest: {', '.join(near)}")
        chosen.update(matches)
    return [full for full in linear_names if full in chosen]


def linear_modules(config: dict[str, Any]) -> dict[str, nn.Linear]:
    """All Linear modules of the architecture by name, from its config alone (meta device)."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(config)
    return {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


class LoraLinear(nn.Linear):
    """lora_A or lora_B: an fp32 weight, cast to the dtype of its input; the gradient arrives in fp32."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight.to(hidden.dtype))


def to_fp8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(FP8 values, fp32 scales (rows, 1)) of a matrix, without temporaries of its size; an outlier affects one row."""
    largest = torch.linalg.vector_norm(matrix, math.inf, dim=1, keepdim=True)
    scales = largest.float().clamp(min=1e-12) / torch.finfo(FP8).max
    return torch.div(matrix, scales, out=torch.empty_like(matrix, dtype=FP8)), scales


def fp8_matmul(rows: torch.Tensor, columns: torch.Tensor, scales: tuple, **options: Any) -> torch.Tensor:
    """rows @ columns in FP8, times `scales` (M, 1) and (1, N), or only (M, 1): inside the product or after it."""
    if FP8Linear.row_wise:
        scales = scales if len(scales) == 2 else (*scales, scales[0].new_ones(1, columns.shape[1]))
        return torch._scaled_mm(rows, columns, *scales, **options)
    one = scales[0].new_ones(())
    product = torch._scaled_mm(rows, columns, one, one, **options)
    for each in scales:
        product.mul_(each)
    return product


class FP8Gradient(torch.autograd.Function):
    """Gives a product x W^T, computed without autograd, its backward pass: another FP8 product, which needs no x.

    The product is not computed in `forward`: torch.compile would keep it instead of recomputing it (29 GB for [dev]).
    """

    @staticmethod
    def forward(context: Any, _hidden: Any, product: torch.Tensor, weight: Any, scales: Any) -> torch.Tensor:
        context.save_for_backward(weight, scales)  # (out, in) in FP8, and (out, 1)
        return product

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of `hidden`. The sum runs over W's scales, so they are multiplied in before quantising."""
        weight, scales = context.saved_tensors
        rows, row_scales = to_fp8(gradient.flatten(0, -2) * scales.t().to(gradient.dtype))
        columns = weight.t().contiguous().t()  # Hopper's tensor cores need the second matrix in column-major order
        product = fp8_matmul(rows, columns, (row_scales,), out_dtype=gradient.dtype)
        return product.unflatten(0, gradient.shape[:-1]), None, None, None


class FP8Linear(nn.Linear):
    """A frozen Linear without bias: the weight (out, in) is FP8 only, with fp32 scales (out, 1); half of bf16's memory.

    Uses `torch._scaled_mm`, since Dynamo cannot trace `F.scaled_mm` on PyTorch 2.11.
    """

    row_wise = True  # whether products take the scales of rows and columns; see `check_fp8`

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        """Quantises `linear` on `device`, 1024 rows at a time, so that no whole layer is there in bf16."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        assert linear.bias is None, "FLUX.2 has none"
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=FP8, device=device), requires_grad=False)
        self.register_buffer("scales", torch.empty(self.out_features, 1, device=device))
        chunks = (tensor.split(1024) for tensor in (linear.weight.detach(), self.weight, self.scales))
        for source, weight, scales in zip(*chunks, strict=True):
            weight[:], scales[:] = to_fp8(source.to(device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out) in the dtype of `hidden`."""
        rows, row_scales = to_fp8(hidden.detach().flatten(0, -2))
        # fast accumulation costs no accuracy here (errors of 3.749 % and 3.752 % on an H200) and saves 8 % of the time
        options = {"out_dtype": hidden.dtype, "use_fast_accum": True}
        product = fp8_matmul(rows, self.weight.t(), (row_scales, self.scales.t()), **options)
        return FP8Gradient.apply(hidden, product.unflatten(0, hidden.shape[:-1]), self.weight, self.scales)


def quantize_block(run: Run, block: nn.Module) -> nn.Module:
    """The block, with --do_fp8_training with FP8 layers on the device in place of its frozen Linear layers."""
    linears = [name for name, module in block.named_modules() if type(module) is nn.Linear]  # not those of a LoRA
    for name in linears if run.args.do_fp8_training else []:
        block.set_submodule(name, FP8Linear(block.get_submodule(name), run.device))
    return block


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError if a GPU has no FP8 matmuls, and chooses the faster kind; the CPU emulates them, for tests.

    Products with row-wise scales are faster on Hopper (measured), but are reported to be three to four times slower on
    Ada, and are not built on Windows. The others need another pass over the product, hence the factor of 1.5.
    """
    seconds = [time_fp8(device, row_wise) for row_wise in (False, True)] if device.type == "cuda" else [math.inf] * 2
    if device.type != "cpu" and (dtype != torch.bfloat16 or min(seconds) == math.inf):
        found = f"this is {dtype} on {device}; see --bnb_quantization_config_path"
        raise UserError(f"--do_fp8_training: needs bf16 and a CUDA GPU of compute capability 8.9 or higher, {found}")
    FP8Linear.row_wise = device.type == "cpu" or seconds[1] < 1.5 * seconds[0]


def time_fp8(device: torch.device, row_wise: bool) -> float:
    """Seconds of a square product, the fastest of four; infinite if this GPU or PyTorch has none."""
    matrix, scales = torch.ones(4096, 4096, device=device).to(FP8), torch.ones(4096, 1, device=device)
    FP8Linear.row_wise, times = row_wise, [math.inf]
    with contextlib.suppress(RuntimeError, NotImplementedError):
        for _ in range(4):
            started = time.perf_counter()
            fp8_matmul(matrix, matrix.t(), (scales, scales.t()), out_dtype=torch.bfloat16)
            torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - started)
    return min(times)


def outside_blocks(model: ModelFiles) -> list[str]:
    """The modules of the transformer that are never quantised: embedders, modulation, last layer."""
    names = {name.partition(".")[0] for name in linear_modules(model.config("transformer"))}
    return sorted(name for name in names if not name.endswith("transformer_blocks"))


def shard(run: Run, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Splits the frozen weights of `blocks` over the processes with FSDP2, following the accelerate config.

    The LoRA, integer (bitsandbytes) weights and everything outside the blocks stay whole on every device.
    """
    shape, names = (run.processes,), ("devices",)
    if os.environ.get("FSDP_SHARDING_STRATEGY", "").upper() in ("HYBRID_SHARD", "4"):  # each machine holds everything
        on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", run.processes))
        shape, names = (run.processes // on_machine, on_machine), ("machines", "devices")
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "shard_grad_op")
    mesh = init_device_mesh(run.device.type, shape, mesh_dim_names=names)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    if launched_with("FSDP_OFFLOAD_PARAMS"):
        options["offload_policy"] = CPUOffloadPolicy(run.device.type == "cuda")
    for block in blocks:
        whole = {p for p in block.parameters() if p.requires_grad or not p.is_floating_point()}
        fully_shard(block, ignored_params=whole, **options)
    fully_shard(model, ignored_params=set(model.parameters()), **options)  # a common root lets blocks be prefetched
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(run.device)


def blocks_of(transformer: Flux2Transformer2DModel) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


class BlockStream:
    """Frozen blocks that live in pinned host memory and are copied to the device one by one (--stream_blocks).

    Two buffers take turns: while one block computes, the next one (in the backward pass the one before) is copied into
    the other buffer on its own CUDA stream. Blocks are recomputed in the backward pass, so autograd keeps no view of a
    buffer. Rejected: `fully_shard` with offload, which in a single process copies on the compute stream (PyTorch 2.11
    to 2.15), and diffusers' group offloading, which evicts a block before its backward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.blocks = device, []
        self.pinned_blocks: list[torch.Tensor] = []  # the bytes of each block
        self.tensors: list[list[tuple[torch.Tensor, int]]] = []  # of each block, with their byte offsets

    def __del__(self) -> None:
        for home in self.pinned_blocks if self.device.type == "cuda" else ():
            torch.cuda.cudart().cudaHostUnregister(home.data_ptr())

    def keep(self, block: nn.Module) -> None:
        """Moves a block's weights, wherever they are, into pinned memory of exactly their size."""
        tensors = [*block.parameters(), *block.buffers()]
        ends = list(itertools.accumulate((-(-tensor.nbytes // 256) * 256 for tensor in tensors), initial=0))
        home = torch.empty(ends.pop(), dtype=torch.uint8)
        if self.device.type == "cuda":  # PyTorch's allocator of pinned memory rounds up to powers of two
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(home.data_ptr(), home.nbytes, 0))
        self.blocks.append(block)
        self.pinned_blocks.append(home)
        self.tensors.append(list(zip(tensors, ends, strict=True)))
        for tensor, offset in self.tensors[-1]:
            tensor.data = view_bytes(home, offset, tensor).copy_(tensor.data)

    def start(self) -> None:
        """Makes the buffers; each block will fetch its weights before it runs, outside of what torch.compile sees."""
        largest = max(home.nbytes for home in self.pinned_blocks)
        self.buffers = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.held: list[int | None] = [None, None]  # the block in each buffer
        self.side = None if self.device.type == "cpu" else torch.Stream(self.device)
        for buffer in self.buffers if self.side else ():
            buffer.record_stream(self.side)  # so that its memory is not reused before the last copy has ended
        for number, block in enumerate(self.blocks):
            call = block._compiled_call_impl or block._call_impl
            block._compiled_call_impl = functools.partial(self.visit, number, call)

    def visit(self, number: int, call: Callable, *inputs: Any, **named_inputs: Any) -> Any:
        """Runs a block with its weights on the device; a hook brings them back for its backward pass."""
        training = torch.is_grad_enabled()  # otherwise the first block comes after the last
        self.fetch(number, number + 1 if training else (number + 1) % len(self.blocks))
        outputs = call(*inputs, **named_inputs)
        for output in (outputs,) if torch.is_tensor(outputs) else outputs:
            if output.requires_grad:  # when its gradient arrives, the backward pass of the block after it is launched
                output.register_hook(lambda _gradient: self.fetch(number, number - 1))
        return outputs

    def fetch(self, number: int, following: int) -> None:
        """Kernels launched after this find block `number` on the device; the copy of the `following` one starts."""
        if number not in self.held:
            self.copy(number, 0)
        buffer = self.held.index(number)
        if self.side:
            torch.accelerator.current_stream(self.device).wait_stream(self.side)
        if 0 <= following < len(self.blocks) and following not in self.held:
            self.copy(following, 1 - buffer)

    def copy(self, number: int, buffer: int) -> None:
        """Copies a block into a buffer once all kernels launched before, which may read from there, have ended."""
        self.held[buffer], home = number, self.pinned_blocks[number]
        if self.side:
            self.side.wait_stream(torch.accelerator.current_stream(self.device))
        with self.side or contextlib.nullcontext():
            self.buffers[buffer][: home.nbytes].copy_(home, non_blocking=True)
        for tensor, offset in self.tensors[number]:
            tensor.data = view_bytes(self.buffers[buffer], offset, tensor)


def view_bytes(memory: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


def is_streamed(run: Run, number: int) -> bool:
    """Whether --stream_blocks includes this block: its share, spread evenly, so that other blocks give time to copy."""
    before, after = (math.floor(round(run.args.stream_blocks * n, 6)) for n in (number, number + 1))
    return after > before


def load_transformer(run: Run) -> Flux2Transformer2DModel:
    """The frozen transformer in the compute dtype: memory-mapped on the CPU, or on the device by bitsandbytes."""
    folder, stored = fetch_part(run, "transformer"), run.model.config("transformer").get("quantization_config")
    options = {"torch_dtype": run.dtype, "variant": run.model.variant, "use_safetensors": True}
    options |= {"device_map": {"": run.device}} if run.quantization else {}
    if run.quantization and not stored:
        options["quantization_config"] = diffusers.BitsAndBytesConfig(**run.quantization)
    transformer = Flux2Transformer2DModel.from_pretrained(folder, **options)
    if run.args.attention_backend:
        try:
            transformer.set_attention_backend(run.args.attention_backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"--attention_backend {run.args.attention_backend}: {error}") from None
    transformer.requires_grad_(False)
    transformer.stream = BlockStream(run.device)
    for number, block in enumerate(blocks_of(transformer)):
        if not run.sharding:
            quantize_block(run, block)
        if is_streamed(run, number):
            transformer.stream.keep(block)
    return transformer


def place_transformer(run: Run, transformer: Flux2Transformer2DModel) -> Flux2Transformer2DModel:
    """Brings the transformer to the device: all of it, all but streamed blocks, or with FSDP this process's share."""
    if run.sharding:  # a block is quantised right before it is split, so that no process ever holds all of them
        shard(run, transformer, (quantize_block(run, block) for block in blocks_of(transformer)))
    elif not transformer.stream.blocks:
        transformer.to(run.device)
    else:
        streamed = {id(tensor) for tensors in transformer.stream.tensors for tensor, _ in tensors}
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            tensor.data = tensor.data if id(tensor) in streamed else tensor.data.to(run.device)
        transformer.stream.start()
    return transformer


def checkpointed_share(run: Run) -> float:
    """--gradient_checkpointing, or all blocks if streaming or the FSDP settings of the accelerate config need it."""
    asked = run.sharding and launched_with("FSDP_ACTIVATION_CHECKPOINTING")
    return 1.0 if asked or run.args.stream_blocks else run.args.gradient_checkpointing


def recompute(forward: Callable, *inputs: Any, **named_inputs: Any) -> Any:  # a bare `checkpoint` breaks Dynamo's graph
    if not torch.is_grad_enabled():
        return forward(*inputs, **named_inputs)
    return torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False, **named_inputs)


def asked_to_compile(args: Args) -> bool | None:  # None: only if it pays off
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no") or args.compile_blocks


def compile_blocks(run: Run, transformer: Flux2Transformer2DModel, several_sizes: bool, steps: int) -> int:
    """Sets up torch.compile for each block, if asked for or if it pays off; returns how many. See `try_compiled`."""
    done, stored = (run.resume.state["step"], run.resume.state.get("compiled")) if run.resume else (0, None)
    pays = run.device.type == "cuda" and run.dtype == torch.bfloat16 and steps - done >= 500
    pays = pays and not (run.args.do_fp8_training and several_sizes)  # that has crashed, see docs/memory.md
    wanted = [choice for choice in (asked_to_compile(run.args), stored, pays) if choice is not None]
    if not wanted[0]:
        return 0
    backend, mode = (os.environ.get(f"ACCELERATE_DYNAMO_{name}", "").lower() for name in ("BACKEND", "MODE"))
    backend, problem = "inductor" if backend in ("", "no") else backend, None
    if (run.quantization or {}).get("load_in_8bit"):
        problem = "bitsandbytes' int8 stays eager; FP8 and NF4 compile"
    elif backend == "inductor" and not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cl")))):
        problem = "torch.compile needs a C compiler, such as gcc, and Python's headers"
    elif backend == "inductor" and run.device.type == "cuda" and not importlib.util.find_spec("triton"):
        problem = "torch.compile needs the package triton"
    if problem and asked_to_compile(run.args):
        raise UserError(f"--compile_blocks: {problem}; remove the flag, or dynamo_config from the accelerate config")
    if problem:
        log.warning(f"compile: {problem}; this run is not compiled")
        return 0
    log.info("compile: before the first step; on an H200 it took 93 s and paid off in 204 steps ([dev]) or 446 (9B)")
    torch._dynamo.reset()  # forget an earlier run in this process
    torch.compiler.set_stance("default")
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of silently running eager from there on
    dynamic = several_sizes or launched_with("ACCELERATE_DYNAMO_USE_DYNAMIC") or None
    for block in blocks_of(transformer):  # not diffusers' compile_repeated_blocks: FSDP changes the class names it uses
        block.compile(backend=backend, dynamic=dynamic, mode=mode or None)
    return len(blocks_of(transformer))


def add_lora(run: Run, transformer: Flux2Transformer2DModel) -> dict[str, nn.Parameter]:
    """Adds the LoRA: lora_A from N(0, 1/rank), seeded by its name, lora_B 0. Returns its parameters by name."""
    rank, alpha, targets = run.lora.rank, run.lora.alpha, [*run.lora.targets]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=run.args.lora_dropout, target_modules=targets)
    transformer.add_adapter(config)
    parameters = {}
    for layer_name, layer in transformer.named_modules():
        for part in ("lora_A", "lora_B") if isinstance(layer, LoraLayer) else ():
            layer.cast_input_dtype_enabled = False
            name, old = f"{layer_name}.{part}.weight", getattr(layer, part)["default"]
            new = LoraLinear(old.in_features, old.out_features, bias=False, device=run.device)
            start = torch.zeros(new.weight.shape)
            if part == "lora_A":
                start.normal_(std=1 / rank, generator=make_generator(run.seed, "lora", name))
            new.weight.data.copy_(start)
            getattr(layer, part)["default"], parameters[name] = new, new.weight
    assert len(parameters) == 2 * len(targets), "exactly the LoRA must be trainable"
    millions = sum(parameter.numel() for parameter in parameters.values()) / 1e6
    log.info(f"lora: {len(targets)} modules, rank {rank}, alpha {alpha:g}: {millions:.2f} M parameters in fp32")
    return parameters


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], float]:
    """(matrices by our parameter names, alpha) of a LoRA from this script, diffusers, PEFT, ai-toolkit or kohya."""
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}
            header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        beside = path.with_name("adapter_config.json")  # where PEFT stores alpha
        if beside.is_file() and any(name.startswith("base_model.") for name in stored):
            header = {f"transformer.{key}": value for key, value in json.loads(beside.read_bytes()).items()}
        if any("dora_scale" in name for name in stored) or header.get("transformer.use_rslora"):
            raise ValueError("it is a DoRA or rank-stabilised")
        # this multiplies kohya's alphas into the matrices
        converted = diffusers.Flux2Pipeline.lora_state_dict(stored)
        ranks = {matrix.shape[0] for name, matrix in converted.items() if name.endswith(".lora_A.weight")}
        if len(ranks) != 1 or header.get("transformer.alpha_pattern"):
            raise ValueError(f"the ranks of its modules are {sorted(ranks)}, or their alphas differ")
    except Exception as error:  # diffusers' converters raise all kinds of errors at unknown names
        raise UserError(f"{path}: not a plain FLUX.2 LoRA of one rank and alpha ({error}); give another") from error
    alpha = float(header.get("transformer.lora_alpha") or ranks.pop())
    return {name.removeprefix("transformer."): matrix for name, matrix in converted.items()}, alpha


class LoraShape(NamedTuple):
    """`targets` are the Linear modules with a LoRA; each is updated by alpha / rank times lora_B times lora_A."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


def find_lora(args: Args, model: ModelFiles) -> LoraShape:
    """The LoRA that the flags ask for, or that of --init_lora_from. Raises UserError if they differ."""
    linears, path = linear_modules(model.config("transformer")), args.init_lora_from
    if not path:
        rank = args.rank or 16
        return LoraShape(rank, args.lora_alpha or rank, tuple(resolve_lora_layers([*linears], args.lora_layers)))
    matrices, alpha = read_lora(Path(path))
    rank = next(len(matrix) for name, matrix in matrices.items() if name.endswith(".lora_A.weight"))
    targets = tuple(name for name in linears if f"{name}.lora_A.weight" in matrices)
    fitting = {f"{name}.lora_A.weight": (rank, linears[name].in_features) for name in targets}
    fitting |= {f"{name}.lora_B.weight": (linears[name].out_features, rank) for name in targets}
    found = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
    if misfits := sorted(name for name, _ in found.items() ^ fitting.items()):
        raise UserError(f"{path}: is for another model; its {misfits[0]} does not fit {model.name}")
    layers = tuple(resolve_lora_layers([*linears], args.lora_layers)) if args.lora_layers else None
    given = {"rank": (args.rank, rank), "lora_alpha": (args.lora_alpha, alpha), "lora_layers": (layers, targets)}
    for name, (asked, there) in given.items():
        if asked not in (None, there):
            there = there if name != "lora_layers" else f"{len(there)} modules, such as {there[0]},"
            raise UserError(f"--{name}: it is {there} in --init_lora_from {path}; leave the flag out")
    return LoraShape(rank, alpha, targets)


def load_lora(parameters: dict[str, torch.Tensor], path: Path) -> None:
    """Copies a LoRA file into the adapter; `find_lora` has found that it fits."""
    for name, matrix in read_lora(path)[0].items():
        parameters[name].data.copy_(matrix)


def save_lora(run: Run, parameters: dict[str, nn.Parameter], folder: Path, for_comfyui: bool = False) -> None:
    """Writes the LoRA for diffusers, or for ComfyUI and others, which use BFL's names and ignore the header's alpha."""
    dtype = torch.float32 if run.args.upcast_before_saving else run.dtype
    header, lora = {"format": "pt", **describe_lora(run)}, run.lora
    tensors = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    if for_comfyui:
        tensors = bfl_lora(tensors, lora.alpha / lora.rank)
    else:
        tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
        # what differs from PEFT's defaults, of which older ones refuse new keys; diffusers < 0.40 needs rank_pattern
        adapter = {"r": lora.rank, "lora_alpha": lora.alpha, "rank_pattern": {}, "target_modules": sorted(lora.targets)}
        header["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": adapter[key] for key in adapter})
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / (COMFYUI_FILE if for_comfyui else LORA_FILE), safetensors_bytes(tensors, header))


def describe_lora(run: Run) -> dict[str, str]:
    """What user interfaces show about a LoRA file. Without a date, so that equal runs give equal files."""
    trigger, size = run.trigger, run.resolutions[-1]
    facts = {"sai_model_spec": "1.0.0", "architecture": f"{run.family.architecture}/lora", "trigger_phrase": trigger}
    facts |= {"implementation": "diffusers", "title": f"{trigger or 'LoRA'} ({run.family.name})"}
    facts = {f"modelspec.{name}": value for name, value in {**facts, "resolution": f"{size}x{size}"}.items()}
    return {**facts, "base_model": run.model.public_name, "seed": str(run.seed)}


BFL_NAMES = (  # diffusers' module names and BFL's; applied one after the other
    ("^single_transformer_blocks", "single_blocks"), ("^transformer_blocks", "double_blocks"),
    (r"attn\.to_qkv_mlp_proj$", "linear1"), (r"^(single.*)attn\.to_out$", r"\1linear2"),
    (r"attn\.to_([qkv])$", r"img_attn.qkv.\1"), (r"attn\.add_([qkv])_proj$", r"txt_attn.qkv.\1"),
    (r"attn\.to_out\.0$", "img_attn.proj"), (r"attn\.to_add_out$", "txt_attn.proj"),
    (r"ff\.linear_in$", "img_mlp.0"), (r"ff\.linear_out$", "img_mlp.2"),
    (r"ff_context\.linear_in$", "txt_mlp.0"), (r"ff_context\.linear_out$", "txt_mlp.2"),
    (r"^time_guidance_embed\.(time|guidance)(step)?_embedder", r"\1_in"), (r"(modulation\w*)\.linear$", r"\1.lin"),
    (r"_in\.linear_1$", "_in.in_layer"), (r"_in\.linear_2$", "_in.out_layer"), ("^x_embedder$", "img_in"),
    ("^context_embedder$", "txt_in"), (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1"),
    ("^proj_out$", "final_layer.linear"),
)  # fmt: skip


def bfl_lora(matrices: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The LoRA with the names of BFL's own model, `scale` multiplied into lora_B.

    There q, k and v are one module, so their lora_A are stacked and lora_B is block-diagonal.
    """
    modules: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}  # by module, then q, k, v or ""
    for name in sorted(name.removesuffix(".lora_A.weight") for name in matrices if name.endswith(".lora_A.weight")):
        down, up = matrices[f"{name}.lora_A.weight"], matrices[f"{name}.lora_B.weight"] * scale
        if name == "norm_out.linear":  # BFL's order is shift, scale
            up = torch.cat(up.chunk(2)[::-1])
        module, _, part = rename(name, BFL_NAMES).partition("qkv.")
        modules.setdefault(f"{module}qkv" if part else module, {})[part] = down, up
    tensors = {}
    for module, parts in modules.items():
        down, up = next(iter(parts.values()))
        empty = down[:0], up[:, :0]  # a part without a LoRA has rank 0
        pairs = [parts.get(part, empty) for part in ([""] if "" in parts else "qkv")]
        tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.cat([down for down, _ in pairs])
        tensors[f"diffusion_model.{module}.lora_B.weight"] = torch.block_diag(*(up for _, up in pairs))
    return tensors


# -------------------------------------------------------------------------------------------------------- Flow matching
# Flow matching: x_t lies on the straight line from the image (sigma 0) to noise (sigma 1); the model learns to predict
# the direction of that line, the velocity. `batch_losses` is all of it, from the data loader's tensors to the loss.
def draw_u(args: Args, generator: torch.Generator) -> torch.Tensor:
    """One u in [0, 1] from the density of --weighting_scheme; sigma is 1 - u before the shift."""
    density = args.weighting_scheme, 1, args.logit_mean, args.logit_std, args.mode_scale
    return training_utils.compute_density_for_timestep_sampling(*density, generator=generator)[0].clamp(0.0, 1.0)


def shift_sigmas(args: Args, sigmas: torch.Tensor, tokens: int) -> torch.Tensor:
    """Shifts sigmas towards noise, as larger images need: s*t / (1 + (s-1)*t), with s from the target's `tokens`.

    `linear` is FLUX.1's mu (0.5 at 256 tokens, 1.15 at 4096), with which FLUX.2 is reported to have been trained;
    `empirical` is the mu of the pipelines at --num_inference_steps.
    """
    if args.timestep_shift == "linear":
        shift = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    elif args.timestep_shift == "empirical":
        shift = math.exp(compute_empirical_mu(tokens, args.num_inference_steps))
    else:
        shift = 1.0 if args.timestep_shift == "none" else float(args.timestep_shift)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


# endregion shared: models


def encode_references(run: Run, training: Training, views: list[list[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
    """(tokens (B, L, C), position ids (1, L, 4)) of each reference; `views` holds those of every sample.

    The tokens have no noise and come from the mean of the VAE's distribution; reference k = 1, 2, ... has T = 10 k.
    """
    references = []
    for number, view in enumerate(zip(*views, strict=True), start=1):
        moments = torch.stack([each.to(run.device, non_blocking=True) for each in view])
        if not run.args.cache_latents:
            moments = encode_pixels(training.vae_on_device(run), moments)
        height, width = (side // 2 for side in moments.shape[-2:])  # a token is 2 x 2 latents
        ids = position_ids(height, width, time=10 * number, device=run.device)
        references.append((tokens_from_moments(training.codec, moments), ids))
    return references


# differs: some samples have references
def batch_losses(run: Run, training: Training, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses (B), sigmas (B)) of one micro-batch from the data loader: the quantity that is minimised.

    x_t = (1 - sigma) x_0 + sigma noise, and its velocity is noise - x_0. The loss of a sample is the mean squared error
    over the tokens and channels of its target, not of its references. Everything but the transformer is fp32.
    """
    # sigma: u is drawn in the data loader; the more tokens, the further sigma is shifted towards noise
    height, width = (side // training.codec.token_size for side in batch["target"][0])  # in tokens
    sigmas_B = shift_sigmas(run.args, 1.0 - batch["u"], height * width).to(run.device, non_blocking=True)
    tensors = {key: value.to(run.device, non_blocking=True) for key, value in batch.items() if torch.is_tensor(value)}
    noise_BLC, prompt_embeds_BLD = tensors["noise"], tensors["prompt_embeds"]

    # x_0: the VAE's latents of the images, cached or encoded now, normalised and packed into tokens
    if "moments" not in tensors:
        tensors["moments"] = encode_pixels(training.vae_on_device(run), tensors["pixels"])
    clean_BLC = tokens_from_moments(training.codec, tensors["moments"], tensors.get("posterior_noise"))
    references = encode_references(run, training, [views for views in batch["references"] if views])
    if not run.args.cache_latents:
        training.rest_vae(run.args)

    # x_t and the predicted velocity, by the same call as in the pipelines' denoising loop; the timestep is rounded to
    # the compute dtype as it is there. The sequence: target, reference 1, 2, ...; only the target's output is used
    sigmas_B11 = sigmas_B.view(-1, 1, 1)
    noisy_BLC = (1 - sigmas_B11) * clean_BLC + sigmas_B11 * noise_BLC
    timestep_B, guided = (sigmas_B * 1000).to(run.dtype) / 1000, training.transformer.config.guidance_embeds
    text_ids = position_ids(1, 1, length=prompt_embeds_BLD.shape[1], device=run.device)
    target_ids = position_ids(height, width, device=run.device)
    velocity_BLC = torch.empty_like(noise_BLC, dtype=run.dtype)
    for given in (True, False):  # samples without references have shorter sequences: a second forward
        chosen = [place for place, views in enumerate(batch["references"]) if bool(views) == given]
        if not chosen:
            continue
        chosen = chosen if len(chosen) < len(sigmas_B) else slice(None)  # a slice needs no index on the device
        behind = references if given else []
        velocity_BLC[chosen] = training.transformer(
            hidden_states=torch.cat([noisy_BLC[chosen], *(tokens for tokens, _ in behind)], dim=1).to(run.dtype),
            timestep=timestep_B[chosen],
            guidance=torch.full_like(sigmas_B[chosen], run.args.guidance_scale) if guided else None,
            encoder_hidden_states=prompt_embeds_BLD[chosen],
            txt_ids=text_ids,
            img_ids=torch.cat([target_ids, *(ids for _, ids in behind)], dim=1),
            return_dict=False,
        )[0][:, : height * width]

    # the squared error against the true velocity
    errors_BLC = (velocity_BLC.float() - (noise_BLC - clean_BLC)).square()
    if "weights" in tensors:  # loss masks
        errors_BLC = errors_BLC * tensors["weights"][..., None]
    errors_B = errors_BLC.mean(dim=(1, 2))
    weights_B = training_utils.compute_loss_weighting_for_sd3(run.args.weighting_scheme, sigmas_B)
    return weights_B.clamp(max=100.0) * errors_B, sigmas_B  # sigma_sqrt: 10^6 at sigma 0.001


# ------------------------------------------------------------------------------------------------------------- The step
# region shared: step
def samples_per_step(run: Run) -> int:
    return run.args.train_batch_size * run.args.gradient_accumulation_steps * run.processes


def total_steps(run: Run, samples: int) -> int:
    visits = run.args.num_train_epochs * samples * epoch_rounds(run.args)
    return run.args.max_train_steps or math.ceil(visits / samples_per_step(run))


def peak_learning_rate(run: Run) -> float:
    rate = run.args.learning_rate or (1.0 if run.args.optimizer == "prodigy" else 1e-4)
    return rate * (samples_per_step(run) if run.args.scale_lr else 1)


def make_optimizer(run: Run, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW or Prodigy for the fp32 LoRA; the optional packages are imported only when they are used."""
    options = {"lr": peak_learning_rate(run), "betas": (run.args.adam_beta1, run.args.adam_beta2)}
    options |= {"eps": run.args.adam_epsilon, "weight_decay": run.args.adam_weight_decay}
    if run.args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        options |= {"beta3": run.args.prodigy_beta3, "decouple": run.args.prodigy_decouple}
        options |= {"use_bias_correction": run.args.prodigy_use_bias_correction}
        return Prodigy(parameters, safeguard_warmup=run.args.prodigy_safeguard_warmup, **options)
    if run.args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def train_step(run: Run, training: Training, batches: Iterator) -> dict[str, Any]:
    """One optimizer step over --gradient_accumulation_steps micro-batches; returns its metrics.

    A loss or gradient that is not finite never reaches the weights: the step is skipped and its samples are logged.
    The host waits for the device only once, before the update. Therefore `lora_norm` is the norm of lora_B that gave
    this loss, and `update_ratio` is the size of the previous update relative to it.
    """
    started, accumulation = time.perf_counter(), run.args.gradient_accumulation_steps
    parameters, per_sample, weights, names = list(training.parameters.values()), [], [], []

    # gradients: of each stream's mean loss, summed over streams; accelerate's backward averages over micro-batches
    for micro in range(accumulation):
        for stream, batch in zip(training.streams, next(batches), strict=True):
            if run.args.lora_dropout > 0:
                # dropout depends on (seed, micro-step, process) alone, whatever resume or validation did before
                key = (training.step * accumulation + micro, len(per_sample) * run.processes + run.process_index)
                torch.manual_seed(make_generator(run.seed, "dropout", *key).initial_seed())
            losses_B, sigmas_B = batch_losses(run, training, batch)
            run.accelerator.backward(stream.weight * losses_B.mean())
            per_sample.append(torch.stack([stream.weight * losses_B.detach(), sigmas_B], dim=1))
            weights += [stream.weight] * len(sigmas_B)
            names += batch["name"]

    # average over processes; each process gets (loss, sigma) of all samples and learns whether one got a signal
    samples_N3 = F.pad(torch.cat(per_sample), (0, 1), value=training.stop.received or 0)
    samples_N3 = average_over_processes(run, parameters, samples_N3)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, run.args.max_grad_norm)
    norms = torch.stack([grad_norm, torch.stack(torch._foreach_norm(training.lora_B)).norm(), training.update_norm])
    *numbers, grad_norm, lora_norm, last_update = torch.cat([samples_N3.flatten(), norms]).tolist()
    losses, sigmas, signals = numbers[0::3], numbers[1::3], numbers[2::3]
    training.signal = int(max(signals))

    # the loss that is minimised: the weighted mean over the global batch
    loss = sum(losses) / samples_per_step(run)
    values = {"step": training.step + 1, "loss": loss, "grad_norm": grad_norm, "lr": training.schedule.get_last_lr()[0]}
    values |= {"lora_norm": lora_norm, "update_ratio": last_update / lora_norm if lora_norm else 0.0}
    values |= loss_by_sigma(losses, sigmas, weights * run.processes)
    training.consistent = False
    if math.isfinite(loss) and math.isfinite(grad_norm):
        before = [up.clone() for up in training.lora_B]
        training.optimizer.step()
        training.update_norm = torch.stack(torch._foreach_norm(torch._foreach_sub(training.lora_B, before))).norm()
        training.skipped = 0
    else:
        training.optimizer._opt_called = True  # stops PyTorch's warning about a schedule that is ahead of the optimizer
        training.skipped += 1
        name_bad_samples(run, training.step + 1, names, losses, sigmas)
    training.optimizer.zero_grad(set_to_none=True)
    training.schedule.step()
    training.step += 1
    training.consistent = True
    return {**values, "seconds": time.perf_counter() - started}


def average_over_processes(run: Run, parameters: list[nn.Parameter], per_sample: torch.Tensor) -> torch.Tensor:
    """Averages the LoRA's gradients, and returns `per_sample` (N, K) of all processes, in one all-reduce.

    All processes hold the same whole LoRA, so nothing else has to be synchronised, even with FSDP.
    """
    if run.processes == 1:
        return per_sample
    slots = per_sample.new_zeros(run.processes, *per_sample.shape)
    slots[run.process_index] = per_sample
    gradients = [parameter.grad for parameter in parameters]
    pieces = [*gradients, slots]
    flat = torch.cat([piece.flatten() for piece in pieces])
    torch.distributed.all_reduce(flat)
    *sums, slots = flat.split([piece.numel() for piece in pieces])
    for gradient, total in zip(gradients, sums, strict=True):
        gradient.copy_(total.view_as(gradient) / run.processes)
    return slots.view(-1, per_sample.shape[1])


def name_bad_samples(run: Run, step: int, names: list[str], losses: list[float], sigmas: list[float]) -> None:
    """Logs a skipped step and the samples of this process whose loss is not finite, or all of them."""
    own, all_finite = slice(run.process_index * len(names), None), all(map(math.isfinite, losses))
    rows = zip(names, losses[own], sigmas[own], strict=False)
    bad = [f"{name} (sigma {sigma:.3f})" for name, loss, sigma in rows if all_finite or not math.isfinite(loss)]
    where = f" (process {run.process_index})" * (run.processes > 1)
    if bad or run.is_main:
        log.error(f"step {step}: not finite, the weights are not changed; samples{where}: {', '.join(bad) or 'none'}")


def loss_by_sigma(losses: list[float], sigmas: list[float], weights: list[float]) -> dict[str, float]:
    """Mean unweighted loss of the samples in each tenth of sigma: `loss_sigma_0.3` is from 0.3 to 0.4."""
    tenths: dict[int, list[float]] = {}
    for loss, sigma, weight in zip(losses, sigmas, weights, strict=True):
        if weight:
            tenths.setdefault(min(9, int(sigma * 10)), []).append(loss / weight)
    return {f"loss_sigma_{tenth / 10}": sum(values) / len(values) for tenth, values in sorted(tenths.items())}


# ---------------------------------------------------------------------------------------------------------- Checkpoints
# A checkpoint is a folder of safetensors and JSON that gets its name only when it is complete: it is written as .tmp-*,
# flushed to disk, renamed, and verified against its manifest; only then older ones are deleted. It does not depend on
# the number of processes. Rejected: torch.distributed.checkpoint and accelerate's save_state, which pickle.
CHECKPOINT_FORMAT = 2


class Checkpoint(NamedTuple):
    folder: Path  # verified
    state: dict[str, Any]  # its state.json


def file_stamp(path: Path) -> list[int | str]:
    with path.open("rb") as stream:
        return [path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file has the size and hash in the manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, stamp in {"state.json": None, **manifest}.items():
            if file_stamp(folder / name) != stamp:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError) as error:
        return f"manifest.json or a file in it is not readable ({error})"
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def list_checkpoints(output_dir: Path) -> list[Path]:  # oldest first
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, folders), key=step_of)


def find_checkpoint(args: Args) -> Checkpoint | None:
    """The checkpoint to resume from, verified; `latest` skips damaged ones with a warning, and may find none."""
    target, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
    if not target:
        return None
    named = output_dir / target if (output_dir / target).is_dir() else Path(target)
    for folder in reversed(list_checkpoints(output_dir)) if target == "latest" else [named]:
        if (problem := verify_checkpoint(folder)) is None:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state.get("format") != CHECKPOINT_FORMAT:
                raise UserError(f"{folder}: has an unknown format; start a new run with --init_lora_from its LoRA")
            return Checkpoint(folder, state)
        if target != "latest":
            raise UserError(f"--resume_from_checkpoint {folder}: {problem}; use an older one or 'latest'")
        log.warning(f"checkpoint: {folder} is skipped: {problem}")
    if list_checkpoints(output_dir) or (output_dir / LORA_FILE).exists():
        raise UserError(f"there is no intact checkpoint in {output_dir}; --overwrite_output_dir starts over")
    log.info(f"checkpoint: none in {output_dir}, the run starts from step 0")
    return None


def fingerprint(run: Run, streams: list[Stream]) -> dict[str, Any]:
    """What must not change for a resumed run, with defaults resolved; class images are added later than the rest."""
    shift, beta3 = run.args.timestep_shift, run.args.prodigy_beta3
    result = {name: vars(run.args)[name] for name in RESUME_FLAGS} | {"seed": run.seed, "dtype": str(run.dtype)}
    result |= {"rank": run.lora.rank, "lora_alpha": run.lora.alpha, "LoRA modules": len(run.lora.targets)}
    result["lora_layers"] = sorted({re.sub(r"^.*blocks\.\d+\.", "", name) for name in run.lora.targets})
    result["learning_rate"] = peak_learning_rate(run)
    result["train_batch_size x processes"] = run.args.train_batch_size * run.processes
    result["timestep_shift"] = shift if shift.isalpha() else float(shift)
    result["prodigy_beta3"] = math.sqrt(run.args.adam_beta2) if beta3 is None else beta3
    result |= {"transformer": run.model.version("transformer"), "bnb_quantization_config": run.quantization}
    result |= {"text_encoder_out_layers": list(run.text_layers), "text encoder and tokenizer": open_prompts(run).key}
    if shift == "empirical":
        result["num_inference_steps"] = run.args.num_inference_steps
    for stream in streams:
        result[f"{stream.name} captions"] = sorted({text for sample in stream.samples for text in sample.captions})[:5]
        result[f"{stream.name} data"] = digest(*(sample.content for sample in stream.samples))
    if run.args.lr_scheduler not in ("constant", "constant_with_warmup"):  # the others depend on the number of steps
        result[f"steps of the {run.args.lr_scheduler} schedule"] = total_steps(run, len(streams[0].samples))
    return result


def check_resume(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """Raises UserError that lists every setting that differs from the checkpoint's, and how to use it anyway."""
    then, lines = checkpoint.state["fingerprint"], ""
    changed = [key for key in now if then.get(key, DEFAULTS.get(key)) != now[key]]  # it may be older than a flag
    for key in changed:
        is_hash, what = re.fullmatch("[0-9a-f]{32}", str(now[key])), " (images, order, captions, masks or sizes)"
        said = "has changed" + what * key.endswith(" data") if is_hash else f"was {then.get(key)}, is {now[key]}"
        lines += f"\n    {key}: {said}"
    if {"rank", "lora_alpha", "lora_layers", "LoRA modules", "transformer"}.isdisjoint(changed):
        new = ["--init_lora_from", str(checkpoint.folder / LORA_FILE), "--output_dir", f"{checkpoint.folder.parent}-2"]
        lines += f"\n  Or start a new run from this LoRA: replace --resume_from_checkpoint with\n    {shlex.join(new)}"
    if changed:
        raise UserError(f"{checkpoint.folder}: belongs to a run with other settings. Restore these:{lines}")


def save_checkpoint(run: Run, training: Training) -> Path:
    """Writes checkpoint-N under a temporary name, renames and verifies it, and only then deletes older ones."""
    if bad := [name for name, parameter in training.parameters.items() if not parameter.isfinite().all()]:
        raise NotFinite(f"step {training.step}: {bad[0]} is not finite and not saved; earlier checkpoints are kept")
    final = run.output_dir / f"checkpoint-{training.step}"
    if verify_checkpoint(final) is None:
        return final  # a finished run was resumed, from this one
    tensors, scalars = {f"lora/{name}": parameter for name, parameter in training.parameters.items()}, {}
    for name, parameter in training.parameters.items():
        for key, value in training.optimizer.state[parameter].items():
            (tensors if torch.is_tensor(value) else scalars)[f"{name}/{key}"] = value
    # cloned, since all parameters share bitsandbytes' quantisation maps, which safetensors refuses
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    groups = [{k: value for k, value in group.items() if k != "params"} for group in training.optimizer.param_groups]
    schedule = {key: value for key, value in training.schedule.state_dict().items() if key != "lr_lambdas"}
    content = {
        "format": CHECKPOINT_FORMAT, "step": training.step, "skipped": training.skipped, "seed": run.seed,
        "smoothed_loss": training.smoothed_loss, "best": training.best, "fingerprint": training.fingerprint,
        "held_out": digest(*(sample.content for sample in training.held_out)),
        "optimizer": {"state": scalars, "groups": groups}, "schedule": schedule, "compiled": training.compiled > 0,
        "versions": {library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".tmp-checkpoint-", dir=run.output_dir) as holder:
        temporary = Path(holder) / final.name
        temporary.mkdir()
        (temporary / "training_state.safetensors").write_bytes(safetensors_bytes(tensors))
        save_lora(run, training.parameters, temporary)
        (temporary / "state.json").write_text(json.dumps(content), encoding="utf-8")
        manifest = {path.name: file_stamp(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for path in temporary.iterdir():
            flush_to_disk(path)
        if final.exists():  # a damaged one that was skipped
            shutil.rmtree(final)
        temporary.rename(final)
    flush_to_disk(run.output_dir)
    if problem := verify_checkpoint(final):
        raise OSError(f"{final}: {problem} right after it was written")
    older = [folder for folder in list_checkpoints(run.output_dir) if folder != final]
    for folder in older[: max(0, len(older) + 1 - (run.args.checkpoints_total_limit or math.inf))]:
        shutil.rmtree(folder, ignore_errors=True)
    return final


def flush_to_disk(path: Path) -> None:
    """fsync of a file or folder, where there is one: not on Windows, and not on some network drives."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def rewind(run: Run) -> None:
    """Takes the output folder back to the step a run continues from: no newer checkpoints, no metrics twice."""
    step, path, kept = run.resume.state["step"] if run.resume else 0, run.output_dir / "metrics.jsonl", []
    later, best = [p for p in list_checkpoints(run.output_dir) if step_of(p) > step], run.output_dir / "best"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or its file is damaged
        later += [best] * (json.loads((best / "validation.json").read_bytes())["step"] > step)
    for folder in later:
        aside = folder.with_name(f"abandoned-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        log.warning(f"checkpoint: {folder.name} is newer than the checkpoint resumed from, and is now {aside}")
    if path.is_file():
        for line in path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                kept += [line] if json.loads(line)["step"] <= step else []
        write_atomically(path, b"".join(kept))


def restore(run: Run, training: Training) -> None:
    """Loads weights, optimizer and schedule from the run's checkpoint."""
    tensors, stored = load_file(run.resume.folder / "training_state.safetensors"), run.resume.state
    for name, parameter in training.parameters.items():
        parameter.data.copy_(tensors.pop(f"lora/{name}"))
    slots: dict[str, dict[str, Any]] = {name: {} for name in training.parameters}
    for path, value in {**tensors, **stored["optimizer"]["state"]}.items():
        name, key = path.split("/")
        slots[name][key] = value
    groups = [{**group, "params": [*range(len(slots))]} for group in stored["optimizer"]["groups"]]  # there is one
    training.optimizer.load_state_dict({"state": dict(enumerate(slots.values())), "param_groups": groups})
    training.schedule.load_state_dict({**training.schedule.state_dict(), **stored["schedule"]})
    training.step, training.skipped, training.smoothed_loss = (stored[k] for k in ("step", "skipped", "smoothed_loss"))
    if stored.get("best") and stored.get("held_out") == digest(*(sample.content for sample in training.held_out)):
        training.best = tuple(stored["best"])
    log.info(f"checkpoint: resumed from {run.resume.folder} at step {training.step}")


# ------------------------------------------------------------------------------------------------ Images while training
# The pipeline of diffusers around the transformer in training, so that you see what users of the LoRA will get. One
# image costs --num_inference_steps forward passes; processes share the images. Seeds are fixed, so images differ only
# by training, and training itself is not affected. If images fail, the run goes on with a warning, except with
# sharding, where the other processes wait for this one's part of the weights.
def make_pipeline(run: Run, transformer: nn.Module, vae: AutoencoderKLFlux2) -> Any:
    """The installed pipeline around models that are on the device, without text encoder; it changes neither."""
    distilled = bool(run.model.config(".", "model_index.json").get("is_distilled"))
    klein = {"is_distilled": distilled} if run.family.pipeline == "Flux2KleinPipeline" else {}
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(run.model.folder / "scheduler")
    models = {"transformer": transformer, "vae": vae, "text_encoder": None, "tokenizer": None}
    pipeline = getattr(diffusers, run.family.pipeline)(scheduler=scheduler, **models, **klein)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    run: Run, codec: LatentCodec, pipeline: Any, prompt: str, seeds: list[tuple], size: Size, **inputs: Any
) -> list[PIL.Image.Image]:
    """Images of one prompt, one per seed, by the pipeline's own denoising loop; decoded by the VAE in fp32."""
    prompts, dtype = open_prompts(run), pipeline.transformer.x_embedder.weight.dtype  # which class images may choose
    options = {"height": size[0], "width": size[1], "num_inference_steps": run.args.num_inference_steps, **inputs}
    options |= {"guidance_scale": run.args.validation_guidance_scale, "output_type": "latent", "return_dict": False}
    if run.family.pipeline == "Flux2KleinPipeline":  # real guidance, against the empty prompt
        options["negative_prompt_embeds"] = torch.stack([prompts.get("")] * len(seeds)).to(run.device, dtype)
    prompt_embeds = torch.stack([prompts.get(prompt)] * len(seeds)).to(run.device, dtype)
    generators = [make_generator(run.seed, *seed) for seed in seeds]
    tokens_BLC = pipeline(prompt_embeds=prompt_embeds, generator=generators, **options)[0]
    if tokens_BLC.dim() == 4:  # Flux2KleinPipeline returns the VAE's latents (B, C, H, W) instead
        tokens_BLC = tokens_from_moments(codec, tokens_BLC.float()[:, None].expand(-1, 2, -1, -1, -1))
    return decode_tokens(codec, pipeline.vae, tokens_BLC, *(side // run.token_size for side in size))


def draw_samples(run: Run, training: Training, prompts: list[str], folder: Path) -> None:
    """Generates --num_validation_images of each prompt in `folder`, by all processes, in lockstep if they shard."""
    everything = list(itertools.product(enumerate(prompts), range(run.args.num_validation_images)))
    with shared_out(run, everything, lockstep=run.sharding) as todo:
        pipeline = make_pipeline(run, training.transformer, training.vae_on_device(run))
        with Progress(f"draw {folder.name}", len(todo)) as progress:
            for (row, prompt), number in todo:
                size, inputs = validation_inputs(run, row)
                seeds = [("validation", row, number)]
                image = generate(run, training.codec, pipeline, prompt, seeds, size, **inputs)[0]
                write_image(image, folder / f"prompt-{row}_image-{number}.png")
                progress.update()


def write_image(image: PIL.Image.Image, path: Path, **facts: str) -> None:
    """Writes a PNG, completely or not at all: in lockstep two processes may write the same one."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, text in facts.items():
        info.add_text(name, text)
    image.save(buffer, "PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())


def draw_sheet(run: Run, prompts: list[str], folders: list[Path], path: Path) -> None:
    """A contact sheet with a row per prompt: its references, and the first image of it in each folder."""
    given = [validation_inputs(run, row)[1].get("image", []) for row in range(len(prompts))]
    titles = [f"reference {number + 1}" for number in range(max(map(len, given)))]
    cells = {(x, y): image for y, images in enumerate(given) for x, image in enumerate(images)}
    for (x, folder), y in itertools.product(enumerate(folders, start=len(titles)), range(len(prompts))):
        if (file := folder / f"prompt-{y}_image-0.png").is_file():
            cells[x, y] = PIL.Image.open(file).convert("RGB")
    titles += [folder.name for folder in folders]
    sheet = PIL.Image.new("RGB", (len(titles) * 264 + 8, len(prompts) * 284 + 24), "white")  # 256 pixels an image
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((8 + 264 * x, 6), title, fill="black")
    for y, prompt in enumerate(prompts):
        draw.text((8, 284 + 284 * y), prompt[: len(titles) * 36], fill="black")
    for (x, y), image in cells.items():
        sheet.paste(ImageOps.contain(image, (256, 256)), (8 + 264 * x, 24 + 284 * y))
    write_image(sheet, path)
    if IN_NOTEBOOK:  # IPython's builtin; a new sheet replaces the previous one below the cell
        builtins.display(sheet, display_id="contact sheet", update="contact sheet" in run.said_once)
        run.said_once.add("contact sheet")


def send_images(prompts: list[str], folder: Path, step: int, tracker: Any) -> None:
    """Sends the first image of each prompt to a tracker that takes images, to TensorBoard and wandb with the prompt."""
    for row, prompt in enumerate(prompts):
        name, image = f"validation/{row}", np.asarray(PIL.Image.open(folder / f"prompt-{row}_image-0.png"))
        if tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Image(image, caption=prompt)}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")
            tracker.log({f"{name}/prompt": prompt}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: image[None]}, step=step)


@torch.no_grad()
def validation_loss(run: Run, training: Training) -> dict[str, float]:
    """Mean loss, also by sigma, on the held-out samples or else on four training samples, at fixed noise and sigmas.

    u is spread evenly over [0, 1], so that the values of different steps can be compared.
    """
    samples = training.held_out or training.samples[:4]
    visits = max(8, 4 * len(samples))
    fixed = Args(**vars(run.args) | {"caption_dropout": 0.0, "cond_dropout": 0.0, "random_flip": False})
    data = TrainingSet(replace(run, args=fixed), training.codec, samples, "validation")
    losses, sigmas = [], []
    for number in range(visits):
        item = data[(number % len(samples), number)] | {"u": torch.tensor((number + 0.5) / visits)}
        for found, value in zip((losses, sigmas), batch_losses(run, training, collate([item])), strict=True):
            found.append(value.item())
    by_sigma = loss_by_sigma(losses, sigmas, [1.0] * visits).items()
    return {"validation_loss": sum(losses) / visits, **{f"validation_{name}": value for name, value in by_sigma}}


def validate(run: Run, training: Training) -> dict[str, float]:
    """Images, contact sheet and validation loss at the current step, in eval mode; training is not affected.

    At a new low on held-out samples the LoRA is saved to best/; the first value, of step 0, is the one to beat.
    """
    samples_dir, prompts, values = run.output_dir / "samples", run.args.validation_prompt, {}
    folder = samples_dir / f"step-{training.step:06d}"
    training.transformer.eval()
    try:
        if prompts and run.args.num_validation_images:
            draw_samples(run, training, prompts, folder)
            training.rest_vae(run.args)
            if run.is_main:
                draw_sheet(run, prompts, sorted(samples_dir.glob("step-*/")), samples_dir / "contact_sheet.png")
                track(run, functools.partial(send_images, prompts, folder, training.step))
        values = validation_loss(run, training)
        lowest = training.best[0] if training.best else math.inf
        if training.held_out and values["validation_loss"] < lowest:  # never true for nan
            if run.is_main and training.best:
                save_lora(run, training.parameters, best := run.output_dir / "best")
                write_atomically(best / "validation.json", json.dumps({"step": training.step, **values}).encode())
            training.best = values["validation_loss"], training.step
    except Exception as error:
        if run.sharding:
            raise
        log.error(f"validation: failed at step {training.step} ({type(error).__name__}: {error}); training goes on")
    training.transformer.train()
    training.rest_vae(run.args)
    training_utils.free_memory()  # training needs the memory again
    return values


# endregion shared: step


# differs: images of the text-to-image script have no references
def validation_inputs(run: Run, row: int) -> tuple[Size, dict[str, Any]]:
    """(height, width) of the images of this prompt, and its references for the pipeline.

    The size is as asked, or the one trained at that is nearest in shape to the first reference. With --align_cond_image
    references are brought to it, as in training.
    """
    images, buckets = validation_references(run.args, row), choose_buckets(run)
    size = buckets[0]
    if run.args.validation_size:
        size = parse_sizes(run.args.validation_size)[0]
    elif images:
        size = nearest_bucket((images[0].height, images[0].width), buckets)
    if run.args.align_cond_image:
        images = [ImageOps.fit(image, size[::-1], PIL.Image.Resampling.LANCZOS) for image in images]
    return size, {"image": images} if images else {}


# differs: the text-to-image script has class images and no references
def make_streams(
    run: Run, codec: LatentCodec, samples: list[Sample], held_out: list[Sample]
) -> tuple[list[Stream], list[Image]]:
    """The stream of samples, and all images to encode: targets and references."""
    return [Stream("instance", samples)], [image for sample in samples + held_out for image in sample.images]


# -------------------------------------------------------------------------------------------------------------- Results
# What a run leaves behind: settings, metrics and trackers on the way; then the LoRA, images generated from the saved
# file, a model card whose snippets run, and the upload. The LoRA is saved first; what fails later is only a warning.
# differs: the text-to-image script has no image to give
def card_inputs(run: Run) -> tuple[str, str]:
    """(import lines, arguments) of the card's snippets that only this script has."""
    height, width = parse_sizes(run.args.validation_size)[0] if run.args.validation_size else choose_buckets(run)[0]
    image = 'image=[load_image("reference.png")]'
    if run.args.align_cond_image:  # references were trained at the size of the target
        image = f'image=[load_image("reference.png").resize(({width}, {height}))], height={height}, width={width}'
    return "from diffusers.utils import load_image\n", image


# region shared: results
def write_config(run: Run, basenames: bool = False) -> str:
    """The resolved flags, one per line, without secrets; with `basenames`, for uploads, paths lose their folders."""
    precision, lines = "bf16" if run.dtype == torch.bfloat16 else "no", [CONFIG_HEAD]
    left_out = (*SECRET_FLAGS, *ACCEPTED_NO_EFFECT, "resume_from_checkpoint", "overwrite_output_dir", "dry_run")
    for name, value in {**vars(run.args), "seed": run.seed, "mixed_precision": precision}.items():
        if name in left_out or value is None:
            continue
        if isinstance(value, bool):
            lines += [f"--{name}\n"] if value else [f"--no-{name}\n"] * (DEFAULTS[name] is not False)
            continue
        words = [str(word) for word in (value if isinstance(value, list) else [value])]
        if basenames and name in PATH_FLAGS:  # what is neither here nor looks like a path is a hub id
            local = [os.path.exists(word) or re.match("[/.~]|.*,", word) for word in words]
            words = [re.sub("[^,]*/(?=[^,])", "", w) if here else w for w, here in zip(words, local, strict=True)]
        between = "=" if len(words) == 1 and words[0].startswith("-") else " "
        lines.append(f"--{name}{between}{shlex.join(words)}\n")
    return "".join(lines)


def warn_once(run: Run, subject: str, problem: Any) -> None:
    if subject not in run.said_once:
        run.said_once.add(subject)
        log.warning(f"{subject}: {problem}; the run goes on (further failures are not logged)")


def track(run: Run, send: Callable) -> None:
    """Calls `send` with each tracker; an error in one stops neither the run nor the others."""
    for tracker in run.accelerator.trackers:
        try:
            send(tracker)
        except Exception as error:
            warn_once(run, f"tracker {tracker.name}", f"failed ({type(error).__name__}: {error})")


def write_metrics(run: Run, values: dict[str, Any]) -> None:
    """Adds a step to metrics.jsonl and the trackers; a failure is only a warning."""
    try:
        if run.is_main:
            with (run.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")  # floats are written so that they read back exactly
    except OSError as error:
        warn_once(run, "metrics.jsonl", f"step {values['step']} was not written ({error})")
    track(run, lambda tracker: tracker.log(values, step=values["step"]))


def draw_final_images(run: Run, training: Training) -> list[tuple[str, str]]:
    """Generates images with the LoRA as saved, read back from its file; (prompt, path) of each, for the card."""
    prompts, final = final_prompts(run.args), run.output_dir / "samples" / "final"
    if run.args.skip_final_inference or not prompts or run.args.num_validation_images == 0:
        return []
    training.transformer.eval()
    try:
        load_lora(training.parameters, run.output_dir / LORA_FILE)
        draw_samples(run, training, prompts, final)
        if run.is_main:
            draw_sheet(run, prompts, [final], final / "contact_sheet.png")
    except Exception as error:
        if run.sharding:
            raise
        log.warning(f"final images: failed ({type(error).__name__}: {error}); the LoRA is saved")
        return []
    numbers = itertools.product(enumerate(prompts), range(run.args.num_validation_images))
    return [(prompt, f"samples/final/prompt-{row}_image-{n}.png") for (row, prompt), n in numbers]


def write_card(run: Run, training: Training, gallery: list[tuple[str, str]]) -> None:
    """Writes the model card, README.md: YAML head, gallery of (prompt, path), how to use the LoRA, and its training."""
    base, trigger, data = run.model.public_name, run.trigger or None, run.args.dataset_name
    adapted = {"base_model": base, "base_model_relation": "adapter"} if run.model.remote else {}
    adapted |= {"datasets": [data]} if data and not Path(data).exists() else {}
    tags = [TASK, "diffusers-training", "diffusers", "lora", "flux2", "flux2-diffusers", "template:sd-lora"]
    widget = [{"text": prompt, "output": {"url": url}} for prompt, url in gallery] or None
    known = {"library_name": "diffusers", "pipeline_tag": TASK, "instance_prompt": trigger, **run.family.license}
    head = huggingface_hub.ModelCardData(**known, tags=tags, widget=widget, **adapted)
    facts = {"base model": base, "rank": run.lora.rank, "alpha": f"{run.lora.alpha:g}"}
    facts |= {"steps": training.step, "seed": run.seed, "base in": run.base_format, "resolution": run.resolutions[-1]}
    table = "\n".join(f"| {key} | {escape_markdown(str(value))} |" for key, value in facts.items())
    files = f"[{LORA_FILE}]({LORA_FILE}) is for diffusers."
    if run.args.comfyui_lora:
        files += f" For ComfyUI put [{COMFYUI_FILE}]({COMFYUI_FILE}) into `models/loras`; other programs take it too."
    files += f"\n\n`hf download {run.hub_repo} --local-dir lora` fetches all." if run.hub_repo else ""
    card = f"""---
{head.to_yaml()}
---
# {escape_markdown(Path(run.hub_repo or run.output_dir.absolute()).name)}

<Gallery />

A LoRA for {escape_markdown(base)}, trained with `{Path(__file__).name}`; the settings are in `config.args`.

## Trigger words

{f'Write "{escape_markdown(trigger)}" in the prompt.' if trigger else "None: the images have captions of their own."}

## Download

{files}

## Use it with diffusers

{card_snippets(run)}
## Training

| | |
|---|---|
{table}
"""
    try:
        write_atomically(run.output_dir / "README.md", card.encode())
    except OSError as error:  # a card is not worth a run
        log.warning(f"card: {error}")


def card_snippets(run: Run) -> str:
    """Two ways to use the LoRA: in a few lines, and part by part for a model that is larger than the GPU."""
    base, repo = run.model.public_name, run.hub_repo or run.output_dir.absolute().name
    pipeline, encoder, (imports, inputs) = run.family.pipeline, run.family.text_encoder, card_inputs(run)
    given = {name: vars(run.args)[name] for name in ("max_sequence_length", "text_encoder_out_layers")}
    given = "".join(f", {name}={value}" for name, value in given.items() if value != DEFAULTS[name])
    steps = f"num_inference_steps={run.args.num_inference_steps}, guidance_scale={run.args.validation_guidance_scale}"
    prompt = next(iter(final_prompts(run.args)), run.args.instance_prompt or "a photo")
    # klein has real guidance, against the empty prompt
    prompts = {"prompt_embeds": prompt} | ({} if pipeline == "Flux2Pipeline" else {"negative_prompt_embeds": ""})
    text = ", ".join(f"{k!r}: encode({v!r}, device=device{given})[0].to(dtype)" for k, v in prompts.items())
    return f"""On a GPU that holds the whole model:

```python
import torch
from diffusers import {pipeline}
{imports}
pipeline = {pipeline}.from_pretrained({base!r}, torch_dtype={run.dtype})
pipeline.to("cuda" if torch.cuda.is_available() else "cpu").load_lora_weights({repo!r}, weight_name={LORA_FILE!r})
pipeline(prompt={prompt!r}, {inputs}, {steps}{given}).images[0].save("image.png")
```

Part by part, with the transformer as it was trained:

```python
import gc
import torch
from diffusers import {pipeline}
from transformers import {encoder}
{imports}
base, dtype = {base!r}, {run.dtype}
device = "cuda" if torch.cuda.is_available() else "cpu"

# first the text: the encoder is spread over GPU and CPU if necessary, and freed before the transformer is loaded
encoder = {encoder}.from_pretrained(base, subfolder="text_encoder", dtype=dtype, device_map="auto")
encode = {pipeline}.from_pretrained(base, text_encoder=encoder, transformer=None, vae=None).encode_prompt
with torch.no_grad():
    text = {{{text}}}
del encoder, encode
gc.collect()
torch.cuda.empty_cache()

# the transformer as it was trained
parts = {{"text_encoder": None, "tokenizer": None}}
{card_quantization(run)}pipeline = {pipeline}.from_pretrained(base, torch_dtype=dtype, **parts).to(device)
pipeline.load_lora_weights({repo!r}, weight_name={LORA_FILE!r})
pipeline(**text, {inputs}, {steps}).images[0].save("image.png")
```
"""


def card_quantization(run: Run) -> str:
    """Lines of the card's snippet that quantise the base as in training; a checkpoint stored quantised needs none."""
    if run.args.do_fp8_training:  # only the weights: there, products are computed in the compute dtype
        name, more = "TorchAoConfig", "from torchao.quantization import Float8WeightOnlyConfig\n"
        options = f"Float8WeightOnlyConfig(), modules_to_not_convert={outside_blocks(run.model)}"
    elif run.args.bnb_quantization_config_path:
        name, more = "BitsAndBytesConfig", ""
        options = ", ".join(f"{key}={value!r}" for key, value in run.quantization.items())
    else:
        return ""
    mapping = f'{{"transformer": {name}({options})}}'
    line = f'parts["quantization_config"] = PipelineQuantizationConfig(quant_mapping={mapping})\n'
    return f"from diffusers import {name}, PipelineQuantizationConfig\n{more}{line}"


def printable(text: str) -> str:
    """`text` with control characters escaped, except line breaks and the joiners that some scripts need."""
    kept = "\n\xa0\u200d\u3000"
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def escape_markdown(text: str) -> str:  # so that it cannot end a table cell, a line or a block
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(printable(text).split()))


def open_hub(args: Args) -> huggingface_hub.HfApi:  # with a time limit, which it does not have by itself
    huggingface_hub.get_session().timeout = HUB_SILENCE
    return huggingface_hub.HfApi(token=args.hub_token)


def push(run: Run) -> None:
    """Uploads weights, card, images and settings, no checkpoints or caches; a failure is only a warning."""
    hub, wanted = open_hub(run.args), [LORA_FILE, COMFYUI_FILE, "README.md", "samples/*.png"]
    target = {"repo_id": run.hub_repo, "commit_message": "FLUX.2 LoRA"}
    try:
        url = hub.upload_folder(folder_path=run.output_dir, allow_patterns=wanted, **target).commit_url
        settings = write_config(run, basenames=True).encode()
        hub.upload_file(path_or_fileobj=settings, path_in_repo="config.args", **target)
        log.info(f"hub: uploaded: {url}")
    except Exception as error:  # network errors have no common base
        included = [word for name in wanted for word in ("--include", name)]
        line = shlex.join(["hf", "upload", run.hub_repo, str(run.output_dir), *included])
        log.warning(f"hub: the upload failed ({type(error).__name__}: {error}). Upload the results with\n    {line}")


# ----------------------------------------------------------------------------------------------------------------- Main
# A run from its plan to its last line. If a checkpoint cannot be written, training goes on and tries again; if training
# fails, the last complete step is saved; only the final save must succeed. Nothing is retried when memory runs out:
# with a smaller batch it would be another run.
def check_plan(run: Run, samples: list[Sample]) -> None:
    """The last checks before anything heavy: resume, disk space, steps; all that --dry_run prints."""
    if run.resume:
        check_resume(run.resume, fingerprint(run, [Stream("instance", samples)]))
    prompts, width = all_prompts(run, samples), run.model.config("transformer")["joint_attention_dim"]
    need = len(set(prompts)) * run.args.max_sequence_length * width * run.dtype.itemsize
    check_space(run.cache_dir, need, f"the cache of {len(set(prompts))} prompts", "--latents_cache_dir")
    if run.args.stream_blocks:
        linears = [item for item in linear_modules(run.model.config("transformer")).items() if "blocks." in item[0]]
        blocks = enumerate(itertools.groupby(linears, key=lambda item: item[0].split(".")[:2]))
        frozen = sum(linear.weight.numel() for n, (_, b) in blocks if is_streamed(run, n) for _, linear in b)
        size = frozen * (1 if run.args.do_fp8_training else run.dtype.itemsize)
        need = size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / 1e9  # each process pins its own
        if need > (free := psutil.virtual_memory().available / 1e9):
            advice = "stream a smaller share" + ", or use --do_fp8_training" * (not run.args.do_fp8_training)
            raise UserError(f"--stream_blocks: pins {need:.1f} GB of host memory, {free:.1f} GB are free; {advice}")
    if run.args.remote_text_encoder:  # so that a server that is down is noticed at once
        encode_prompts(run, prompts, limit=1)
    steps, warm_up = total_steps(run, len(samples)), run.args.lr_warmup_steps
    if run.resume and run.resume.state["step"] >= steps:
        done = f"{run.resume.folder.name} is already at step {run.resume.state['step']} of {steps}"
        log.warning(f"plan: {done}, there is nothing left to train; raise --max_train_steps")
    if run.args.lr_scheduler != "constant" and warm_up >= steps:
        share = f"the learning rate ends at {steps / warm_up:.0%} of its peak"
        log.warning(f"plan: --lr_warmup_steps {warm_up} in {steps} steps: {share}")
    log.info(f"plan: {run.family.name} ({run.model.name}), LoRA on {len(run.lora.targets)} modules, {steps} steps")


def begin_output(run: Run, samples: list[Sample]) -> Run:
    """Clears what earlier runs left, creates the repository, writes settings, starts trackers; returns the new run."""
    trigger = run.args.instance_prompt or ""
    run = replace(run, trigger=trigger * any(trigger in text for sample in samples for text in sample.captions))
    if run.is_main and run.args.push_to_hub:  # before training, so that a missing permission is noticed now
        name = run.args.hub_model_id or run.output_dir.absolute().name
        try:
            repo = open_hub(run.args).create_repo(name, private=run.args.hub_private, exist_ok=True)
        except Exception as error:  # the network has no common base of errors
            raise UserError(f"--push_to_hub: cannot create {name} ({type(error).__name__}: {error})") from None
        run = replace(run, hub_repo=repo.repo_id)
    if run.is_main:
        write_atomically(run.output_dir / "config.args", write_config(run).encode())
        doomed = list(run.output_dir.glob(".tmp-*checkpoint-*"))
        if run.args.overwrite_output_dir and not run.resume:
            doomed += [path for path in results_in(run.output_dir) if path.name != "config.args"]
        for path in doomed:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in itertools.chain(run.output_dir.rglob(".*.tmp"), run.cache_dir.rglob(".*.tmp")):
            age = 3600 if path.is_relative_to(run.cache_dir) else 0  # another run may share the cache
            with contextlib.suppress(OSError):
                if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and time.time() - path.stat().st_mtime >= age:
                    path.unlink()
        rewind(run)
    flags = {name: value for name, value in vars(run.args).items() if name not in SECRET_FLAGS}
    flags |= {name: Path(flags[name]).name for name in PATH_FLAGS if isinstance(flags.get(name), str)}  # no folders
    settings = {name: value for name, value in flags.items() if isinstance(value, (str, int, float, bool))}
    name = run.output_dir.absolute().name
    options = {"wandb": {"name": name}, "trackio": {"name": name}, "swanlab": {"experiment_name": name}}
    options |= {"mlflow": {"run_name": name}, "clearml": {"task_name": name}}
    try:
        run.accelerator.init_trackers("flux2-lora", {**settings, "seed": run.seed}, options)
    except Exception as error:  # whatever a tracker raises
        raise UserError(f"--report_to {run.args.report_to}: cannot start ({error}); log in or leave it out") from error
    if plain := [tracker.name for tracker in run.accelerator.trackers if not hasattr(tracker, "log_images")]:
        log.info(f"trackers: {', '.join(plain)} only get numbers; images are in {run.output_dir / 'samples'}")
    run.accelerator.wait_for_everyone()
    return run


def check_agreement(run: Run, now: dict[str, Any]) -> None:
    """Raises UserError unless all processes see the same; machines without a shared drive could silently differ."""
    own = (*PATH_FLAGS, *SECRET_FLAGS, *ACCEPTED_NO_EFFECT)  # these may differ, such as --local_rank
    flags = {name: value for name, value in vars(run.args).items() if name not in own}
    seen = digest(json.dumps([now, flags]), run.resume.state["step"] if run.resume else 0)
    numbers = gather(torch.tensor([int(seen[:15], 16)], device=run.device)).tolist()
    if others := [str(index) for index, number in enumerate(numbers) if number != numbers[0]]:
        where = f"process(es) {', '.join(others)} see other images, settings or checkpoints than process 0"
        raise UserError(f"{where}: start all with the same command, data and --output_dir on a shared drive")


def prepare_training(run: Run, codec: LatentCodec, streams: list[Stream], vae: Any, held_out: list = ()) -> Training:
    """Loads the transformer; makes LoRA, optimizer and schedule: new, from --init_lora_from, or from the checkpoint."""
    now, steps = fingerprint(run, streams), total_steps(run, len(streams[0].samples))
    if run.resume:
        check_resume(run.resume, now)
    check_agreement(run, now)
    transformer = load_transformer(run)
    parameters = add_lora(run, transformer)
    if run.args.init_lora_from:
        load_lora(parameters, Path(run.args.init_lora_from))
    blocks = blocks_of(transformer)
    for block in blocks[: math.ceil(checkpointed_share(run) * len(blocks))]:
        block.forward = functools.partial(recompute, block.forward)  # inside, so that compile and FSDP wrap around it
    geometries = {sample.geometry for stream in streams for sample in stream.samples}
    compiled = compile_blocks(run, transformer, len(geometries) > 1, steps)
    place_transformer(run, transformer)
    optimizer = make_optimizer(run, list(parameters.values()))
    schedule = get_scheduler(  # counts optimizer steps; not prepared by accelerate
        run.args.lr_scheduler, optimizer, num_warmup_steps=run.args.lr_warmup_steps, num_training_steps=steps,
        num_cycles=run.args.lr_num_cycles, power=run.args.lr_power,
    )  # fmt: skip
    lora_B = [parameter.detach() for name, parameter in parameters.items() if name.endswith("lora_B.weight")]
    rest = torch.zeros((), device=run.device), optimizer, schedule, now, StopSignals(), compiled
    training = Training(codec, streams, held_out, vae, transformer, parameters, lora_B, *rest)
    if run.resume:
        restore(run, training)
    return training


def start_worker(_worker: int) -> None:
    """Sets up a worker's logging, and lets it ignore signals to the process group, which the main process handles."""
    set_up_logging()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_loaders(run: Run, training: Training) -> Iterator[tuple[dict, ...]]:
    """Endless micro-batches from the current step on, each a tuple with one batch per stream."""
    loaders, first = [], training.step * run.args.gradient_accumulation_steps
    for stream in training.streams:
        geometries, place = [sample.geometry for sample in stream.samples], (run.process_index, run.processes)
        sampler = SampleStream(geometries, run.args.train_batch_size, run.seed, stream.name, first, *place)
        data = TrainingSet(run, training.codec, stream.samples, stream.name)
        workers = {"num_workers": run.args.dataloader_num_workers, "worker_init_fn": start_worker}
        options = {"batch_sampler": sampler, "collate_fn": collate, "pin_memory": run.device.type == "cuda"}
        loaders.append(DataLoader(data, **options, **workers))
    return zip(*loaders, strict=True)


def announce_training(run: Run, training: Training, steps: int) -> None:
    """Logs the numbers of the run as equations, before the first step."""
    rounds, per_step = epoch_rounds(run.args), samples_per_step(run)
    epoch, groups = rounds * len(training.samples), Counter(Counter(training.samples).values())
    what = "pairs of image and size" if run.args.train_resolutions else "images"
    images = " + ".join(f"{count} {what} x {shares * rounds} repeats" for shares, count in sorted(groups.items()))
    batch, micro, visits = run.args.train_batch_size, run.args.gradient_accumulation_steps, steps * per_step
    log.info(f"train: {images} = {epoch} samples per epoch")
    log.info(f"train: batch {batch} x accumulation {micro} x {run.processes} process(es) = {per_step} samples per step")
    log.info(f"train: {steps} steps x {per_step} samples = {visits} visits = {visits / epoch:.1f} epochs")
    rate = f"{run.args.optimizer}, learning rate {peak_learning_rate(run):g} {run.args.lr_scheduler}"
    log.info(f"train: {rate}, seed {run.seed}, base in {run.base_format} on {run.device}")
    if count := run.args.dataloader_num_workers * len(training.streams):
        log.info(f"train: starting {count} worker processes that prepare batches")
    if pinned_blocks := training.transformer.stream.pinned_blocks:
        pinned = sum(home.nbytes for home in pinned_blocks) / 1e9
        log.info(f"train: {len(pinned_blocks)} blocks stream from host memory, {pinned:.1f} GB pinned by each process")
    if run.sharding:
        whole = "; bitsandbytes' weights stay whole, FP8 weights would be split" * (run.quantization is not None)
        log.info(f"train: the frozen blocks are split over {run.processes} processes (FSDP2){whole}")
    if steps < 100 and not run.args.max_train_steps:
        log.warning(f"train: only {steps} steps; a LoRA needs hundreds: see --max_train_steps, --num_train_epochs")


def peak_memory(run: Run) -> dict[str, float]:
    """Peak memory so far in GB: of the device, or of this process on the CPU if the system says."""
    if run.device.type != "cpu":
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):  # not all backends count it
            return {"peak_device_gb": torch.accelerator.max_memory_allocated(run.device) / 1e9}
    with contextlib.suppress(ImportError):
        import resource  # POSIX only

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes, Linux KiB
        return {"peak_host_gb": peak * (1 if sys.platform == "darwin" else 1024) / 1e9}
    return {}


def try_compiled(run: Run, training: Training, batches: tuple[dict, ...]) -> None:
    """Compiles each kind of block with a forward and backward pass; if that fails, UserError or an eager run."""
    started, problem = time.perf_counter(), ""
    try:
        for batch in batches:
            batch_losses(run, training, batch)[0].mean().backward()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # Dynamo, Inductor, Triton and the C compiler have no common base
        problem = " ".join(f"{type(error).__name__}: {error}".split()).partition(" Set TORCHDYNAMO")[0][:200]
    training.optimizer.zero_grad(set_to_none=True)
    if not gather(torch.tensor([bool(problem)], device=run.device)).any():  # all processes must do the same
        log.info(f"compile: {training.compiled} blocks are compiled, after {time.perf_counter() - started:.0f} s")
        return
    if asked_to_compile(run.args):
        raise UserError(f"--compile_blocks: the trial failed ({problem}); leave it, or the config's dynamo_config, out")
    training.compiled = 0
    torch.compiler.set_stance("force_eager")
    log.warning(f"compile: the trial failed ({problem}); this run is not compiled, nor is it when resumed")


def train(run: Run, training: Training) -> None:
    """The loop: step, validation, metrics, checkpoint; ends after the last step, a signal or the time limit."""
    steps, stop = total_steps(run, len(training.samples)), training.stop
    announce_training(run, training, steps)
    epochs = run.args.validation_epochs * len(training.samples) * epoch_rounds(run.args) / samples_per_step(run)
    drawing = run.args.validation_prompt and run.args.num_validation_images
    period = (run.args.validation_steps or math.ceil(epochs)) if drawing or training.held_out else math.inf
    if steps < period < math.inf:
        log.warning(f"validation: runs every {period} steps, but this run has only {steps}; see --validation_steps")
    batches = make_loaders(run, training)
    training.transformer.train()
    if training.compiled and training.step < steps:
        first = next(batches)
        try_compiled(run, training, first)
        batches = itertools.chain([first], batches)
    if training.step == 0 and period < math.inf:
        values = validate(run, training)
        track(run, lambda tracker: tracker.log(values, step=0))
    with Progress("train", steps, done=training.step) as progress:
        while training.step < steps and stop.agreed is None:
            values = train_step(run, training, batches)
            training.seconds += values["seconds"]
            if math.isfinite(values["loss"]):  # an average over about 50 steps
                last = values["loss"] if training.smoothed_loss is None else training.smoothed_loss
                training.smoothed_loss = 0.98 * last + 0.02 * values["loss"]
            note = f"loss (running mean) {training.smoothed_loss or math.nan:.4f}, lr {values['lr']:.1e}"
            progress.set_postfix_str(note, refresh=False)
            progress.update()
            stop.agree(run, training.signal)
            if stop.agreed is None and training.step % period == 0:
                values |= validate(run, training)
            write_metrics(run, values | {"compiled_blocks": training.compiled} | peak_memory(run))
            if training.skipped >= 10:
                advice = "check the samples listed above; if they are good, start over with a lower --learning_rate"
                raise NotFinite(f"step {training.step}: ten steps in a row were not finite: {advice}")
            if training.step == 50 and values["lora_norm"] == 0.0:
                log.warning("train: after 50 steps the LoRA is still ZERO: nothing is learned; check --learning_rate")
            due = training.step % run.args.checkpointing_steps == 0 or (training.unsaved and training.step % 10 == 0)
            if due and training.step < steps and stop.agreed is None:
                try_save_checkpoint(run, training)


def try_save_checkpoint(run: Run, training: Training) -> None:
    """Saves the last complete step; if that fails, training goes on, and every tenth step tries again."""
    try:
        if run.is_main and training.consistent and training.step:
            log.info(f"checkpoint: step {training.step} is saved in {save_checkpoint(run, training)}")
        training.unsaved = False
    except Exception as error:
        training.unsaved = True
        log.warning(f"checkpoint: step {training.step} was not saved ({error})")


def save_results(run: Run, training: Training) -> None:
    """Saves the last checkpoint, and if the run is finished LoRA and card. Raises SaveFailed, or SystemExit."""
    stopped, lora = training.stop.agreed, run.output_dir / LORA_FILE
    try:
        if run.is_main:
            folder = save_checkpoint(run, training)
        if run.is_main and stopped is None:
            save_lora(run, training.parameters, run.output_dir)
            flush_to_disk(lora)
            if run.args.comfyui_lora:
                save_lora(run, training.parameters, run.output_dir, for_comfyui=True)
            write_card(run, training, [])
    except OSError as error:
        with contextlib.suppress(OSError):  # the LoRA alone is a fraction of a checkpoint
            save_lora(run, training.parameters, run.output_dir)
        kept = [str(path) for path in (lora, *list_checkpoints(run.output_dir)[-1:]) if path.exists()]
        failed = f"the final save failed ({error}). What is on disk: {', '.join(kept) or 'nothing'}"
        raise SaveFailed(f"{failed}. Free space in {run.output_dir}, then resume") from error
    run.accelerator.wait_for_everyone()
    track(run, lambda tracker: tracker.finish())
    if stopped is not None:
        if run.is_main:
            log.info(f"stopped at step {training.step}, saved in {folder}. Continue with\n    {resume_line(run)}")
        run.accelerator.state.destroy_process_group()
        raise SystemExit(128 + stopped)


def finish(run: Run, training: Training, gallery: list[tuple[str, str]]) -> None:
    """Card, upload and the summary of a run: what it did, what it took, and where everything is."""
    run.accelerator.state.destroy_process_group()
    if run.is_main:
        write_card(run, training, gallery)
    if run.hub_repo:
        push(run)
    steps = training.step - (run.resume.state["step"] if run.resume else 0)
    facts = {
        "steps": training.step,
        "time": timedelta(seconds=round(time.monotonic() - run.started)),
        "seconds per step": f"{training.seconds / steps:.3g}" if steps else "no step was left",
        "loss, running mean": f"{training.smoothed_loss or math.nan:.4f}",
        **({"validation loss": "lowest {:.4f}, after step {}".format(*training.best)} if training.best else {}),
        "peak memory": f"{max(peak_memory(run).values(), default=math.nan):.2f} GB",
    }
    results = {"LoRA": LORA_FILE, "best": "best", "images": "samples", "card": "README.md", "settings": "config.args"}
    facts |= {label: run.output_dir / name for label, name in results.items() if (run.output_dir / name).exists()}
    log.info("done" + "".join(f"\n    {label:<18}  {value}" for label, value in facts.items()))


def main(args: Args) -> None:
    """One run, from checked flags to the uploaded result. Encoder, VAE and transformer are in memory one at a time."""
    with start_run(args) as run:
        with run.accelerator.main_process_first():  # the others use its index of checked images
            samples, held_out = check_data(run)
        check_plan(run, samples)
        if args.dry_run:
            return
        run = begin_output(run, samples)
        codec = LatentCodec(run)
        encode_prompts(run, all_prompts(run, samples + held_out))
        streams, images = make_streams(run, codec, samples, held_out)
        vae = encode_images(run, codec, images)
        training = prepare_training(run, codec, streams, vae, held_out)
        with training.stop:  # before and after, a signal ends the run at once: everything done is on disk
            try:
                train(run, training)
            except Exception:
                try_save_checkpoint(run, training)
                raise
            save_results(run, training)
        gallery = draw_final_images(run, training)
        finish(run, training, gallery)


if __name__ == "__main__":
    main(COMMAND_LINE)
# endregion shared: results
