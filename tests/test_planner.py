"""tools/plan_memory.py: what it counts is what is allocated, what it prints fits and runs."""

import json
import shlex
import sys
from types import SimpleNamespace
from unittest import mock

import bare_training
import plan_memory
import pytest
import torch
from bare_training import make_batches, make_streams, quantise_by_script, read_architecture, set_up, start_run
from memory_counter import LiveStorages
from plan_memory import BASES, GB, Job, count_training, largest_share_kept, sharded, share_of

SIZES = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4, "joint_attention_dim": 96}
BLOCKS = SIZES["num_layers"] + SIZES["num_single_layers"]


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> str:
    """A folder with the configs of the embedded model, its transformer wider and deeper; no weights."""
    folder = tmp_path_factory.mktemp("planner") / "small"
    architecture = read_architecture(str(tiny))
    architecture["transformer"] |= {**SIZES, "attention_head_dim": 64, "axes_dims_rope": [16, 16, 16, 16]}
    return str(bare_training.write_checkpoint(architecture, folder))


def allocated_peak(action) -> tuple[int, int]:
    """(what the counter says, what PyTorch's CPU allocator says) of the peak above the start while `action` runs."""
    counter = LiveStorages(grain=1)
    with torch.profiler.profile(profile_memory=True) as profile, counter:
        action()
    events, level, peak = [], 0, 0
    trees = list(profile.profiler.kineto_results.experimental_event_tree())
    while trees:
        event = trees.pop()
        trees += event.children
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    for _, size in sorted(events, key=lambda event: event[0]):
        level += size
        peak = max(peak, level)
    return counter.peak, peak


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--gradient_checkpointing",)], ids=str)
def test_on_real_tensors_the_counter_agrees_with_the_allocator_to_one_percent(t2i, small, tmp_path, flags):
    """A step of a small transformer on the CPU, from its frozen weights to the updated adapter.

    Not with FP8, which the CPU emulates with copies of its own inside the kernel.
    """
    run = start_run(t2i, read_architecture(small), tmp_path / "run", "--resolution", 192, *flags)
    given = make_streams(t2i, run)

    def train() -> None:
        training = set_up(t2i, run, given)
        t2i.train_step(run, training, make_batches(t2i, run, training))

    counted, allocated = allocated_peak(train)
    assert counted > 20e6 and counted == pytest.approx(allocated, rel=0.01), (counted, allocated)


def test_a_storage_counts_once_until_its_last_view_is_gone():
    with LiveStorages(grain=512) as counter:
        first = torch.zeros(100)
        view = first[10:].view(9, 10)
        del first
        assert counter.now == 512
        second = view + 1
        del view, second
    assert (counter.now, counter.peak) == (0, 1024)


@pytest.mark.slow
def test_the_weights_of_klein_are_those_that_its_checkpoint_has():
    """3,875,544,576 parameters in bf16, and the adapter with two moments in fp32; blocks as their Linears say."""
    training = count_training(Job("klein-4B", 512), "bf16", 1.0)
    adapter = 3 * 4 * training.lora_parameters + 2 * 2 * 512 * 7680  # and a prompt, in the loader and in the batch
    assert training.resident == pytest.approx(2 * 3_875_544_576 + adapter, rel=1e-3)
    assert training.blocks == 2 * (5 * 245_367_296 + 20 * 122_683_648)
    assert training.resident < training.peak < training.resident + 2e9


@pytest.mark.slow
def test_the_peak_falls_with_the_share_of_blocks_that_are_recomputed(small):
    peaks = [count_training(Job(small, 512), "bf16", share_of(count, BLOCKS)).peak for count in range(BLOCKS + 1)]
    # the last block is recomputed at the peak itself: that one saves nothing
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) >= BLOCKS, peaks
    assert peaks[0] > 1.5 * peaks[-1]


@pytest.mark.parametrize("blocks", [2, 10, 25, 32, 56])
def test_a_printed_share_means_that_number_of_blocks(t2i, blocks):
    for count in range(blocks + 1):
        assert t2i.math.ceil(share_of(count, blocks) * blocks) == count


@pytest.mark.slow
def test_the_share_that_is_printed_fits_and_the_next_one_does_not(small):
    job, fits = Job(small, 512), []
    peaks = [count_training(job, "bf16", share).peak for share in (0.0, 1.0)]
    for part in (0.25, 0.6):
        gpu_gb = (peaks[1] + part * (peaks[0] - peaks[1])) / GB
        share = largest_share_kept(job, "bf16", gpu_gb)
        count = round(share * BLOCKS)
        assert count_training(job, "bf16", share).peak <= gpu_gb * GB
        assert count_training(job, "bf16", share_of(count - 1, BLOCKS)).peak > gpu_gb * GB
        fits.append(share)
    assert 0 < fits[1] < fits[0] < 1, fits
    assert largest_share_kept(job, "bf16", peaks[0] / GB) == 0.0
    assert largest_share_kept(job, "bf16", peaks[1] / GB - 0.001) is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_stand_in_stores_what_a_layer_of_bitsandbytes_stores(t2i, kind):
    """Bytes of weight and scales of a real one, made by the script with the settings that the project ships."""
    settings = t2i.json.loads((plan_memory.ROOT / BASES[kind][1][1]).read_text())
    linear = torch.nn.Linear(512, 1024, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    ours = plan_memory.frozen_bytes(plan_memory.StandIn(linear, kind))
    block, nothing = torch.nn.Sequential(linear), SimpleNamespace(do_fp8_training=False)
    run = SimpleNamespace(args=nothing, quantization=settings, device=torch.device("cpu"), dtype=torch.bfloat16)
    with mock.patch.object(t2i, "outside_blocks", lambda _: []):
        quantise_by_script(t2i, run, block)
    weight = block[0].weight
    state = getattr(weight, "quant_state", None)
    scales = [state.absmax, state.state2.absmax] if state else [weight.SCB]
    assert ours == sum(tensor.nbytes for tensor in (weight.data, *scales))


@pytest.mark.slow
def test_each_base_needs_less_than_the_one_before(small):
    peaks = {base: count_training(Job(small, 512), base, 1.0) for base in ("bf16", "fp8", "int8", "nf4")}
    blocks = {base: training.blocks for base, training in peaks.items()}
    assert blocks["fp8"] == pytest.approx(blocks["bf16"] / 2, rel=0.02) and blocks["int8"] == blocks["fp8"]
    assert blocks["nf4"] == pytest.approx(blocks["bf16"] * (4 + 8 / 64 + 32 / 64 / 256) / 16, rel=0.02)
    assert peaks["bf16"].resident > peaks["fp8"].resident > peaks["nf4"].resident


@pytest.mark.slow
def test_int8_keeps_its_inputs_where_others_are_recomputed(small):
    """As bitsandbytes does: beside a step of NF4, which keeps none, the bf16 inputs of all layers."""
    steps = {base: count_training(Job(small, 512), base, 1.0) for base in ("nf4", "int8")}
    kept = steps["int8"].peak - steps["int8"].resident - (steps["nf4"].peak - steps["nf4"].resident)
    width, tokens = 4 * 128, 512 + 1024
    # of each block: the input of q, k, v, that of out, that of gate and up (in single blocks the first), that of down
    inputs = SIZES["num_layers"] * (1 + 1 + 1 + 3) + SIZES["num_single_layers"] * (1 + 4)
    assert kept > 0.4 * 2 * width * tokens * inputs  # some of them are gone, or there anyway, at the peak


@pytest.mark.slow
def test_a_reference_costs_what_its_tokens_cost(small):
    alone, beside = (count_training(Job(small, 512, references), "bf16", 1.0) for references in (0, 1))
    assert (alone.tokens, beside.tokens) == (512 + 1024, 512 + 1024 + 4096)
    assert beside.peak - beside.resident > 2 * (alone.peak - alone.resident)


@pytest.mark.slow
def test_sharding_adds_up(small):
    """On one GPU of many the rest, its part, and two blocks on the move; nodes send each other the LoRA's gradient."""
    job, training = Job(small, 512), count_training(Job(small, 512), "bf16", 1.0)
    row = sharded(job, "bf16", 1.0, processes=8, nodes=2)
    expected = training.peak - training.blocks * 7 / 8 + 2 * training.largest_block
    assert row["per_gpu_gb"] == pytest.approx(expected / GB)
    assert row["gathered_gb_per_step"] == pytest.approx(2 * training.blocks * 7 / 8 / GB)
    assert row["all_reduced_gb_per_step"] == pytest.approx(2 * 4 * training.lora_parameters * 15 / 16 / GB)
    assert sharded(job, "nf4", 1.0, 8, 1)["gathered_gb_per_step"] == 0
    hosts = {sharded(job, base, 1.0, 8, 1)["host_gb_per_node"] for base in ("bf16", "fp8")}
    assert len(hosts) == 1, "blocks are quantised one by one, right before they are split"


@pytest.mark.slow
@pytest.mark.parametrize(("base", "references"), [("bf16", 0), ("fp8", 0), ("nf4", 0), ("nf4", 1)])
def test_the_command_that_is_printed_is_one_that_the_script_takes(small, base, references, tmp_path, monkeypatch):
    job = Job(small, 512, references, ("--rank", "8"))
    (encoder, _), *_ = plan_memory.encoder_places(job, gpu_gb=0.001)
    line = plan_memory.command_line(job, base, 0.5, encoder=encoder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "configs").symlink_to(plan_memory.ROOT / "configs")
    args = job.script.parse_args(shlex.split(line.replace("\\\n", " "))[3:])
    assert (args.resolution, args.gradient_checkpointing, args.rank, args.offload) == (512, 0.5, 8, True)
    assert args.do_fp8_training == (base == "fp8") and bool(args.bnb_quantization_config_path) == (base == "nf4")


@pytest.mark.slow
def test_the_tables_mark_what_is_predicted_and_what_was_not_measured(small, capsys):
    plan_memory.main(["--model", small, "--resolution", "256", "--references", "0", "--", "--rank", "4"])
    shown = capsys.readouterr().out
    assert shown.count("not measured") == len(plan_memory.RUNGS) and "predicted GB" in shown
    assert "FP8 + checkpointing" in shown and "NF4 + checkpointing" in shown


@pytest.fixture
def gpu_benchmark(monkeypatch):
    """benchmarks/gpu.py, which on a CPU can only be tried small."""
    monkeypatch.syspath_prepend(str(plan_memory.ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_a_row_of_the_gpu_benchmark_trains_the_real_step(bnb_on_cpu, gpu_benchmark, tiny, base):
    row = dict(zip(gpu_benchmark.KEYS, (str(tiny), base, 1.0, 128, 0, False, 0.0), strict=True))
    values = gpu_benchmark.measure(row, seconds=0)
    assert values["steps"] == 1 and values["seconds_per_step"] > 0 and values["tflops"] > 0
    assert "peak_gb" not in values  # there is no GPU


def test_the_gpu_benchmark_goes_on_where_it_stopped_and_a_failed_row_costs_no_other(
    gpu_benchmark, small, tmp_path, monkeypatch
):
    seen, path = [], tmp_path / "gpu.json"

    def fake(row: dict) -> dict:
        seen.append(row["resolution"])
        if row["resolution"] == 512:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much\nmore")
        return {"tflops": 1.0, "peak_gb": 2.0, "seconds_per_step": 1.0}

    monkeypatch.setattr(gpu_benchmark, "measure", fake)
    rows = [(small, "bf16", 1.0, size, 0, False, 0.0) for size in (256, 512, 768)]
    options = path, rows, 1000, "some GPU", torch.device("cpu"), 64
    gpu_benchmark.run_rows(path, rows, 1.0, *options[3:])  # no time for any
    assert seen == []
    first = gpu_benchmark.run_rows(*options)
    assert seen == [256, 512, 768] and "out of memory" in first[1]["failed"] and first[2]["peak_gb"] == 2.0
    gpu_benchmark.run_rows(*options)
    assert seen == [256, 512, 768]


def test_the_rows_of_the_gpu_benchmark_are_few_and_different(gpu_benchmark):
    assert len(gpu_benchmark.ROWS) == len(set(gpu_benchmark.ROWS)) == 27
    first = gpu_benchmark.ROWS[: len(gpu_benchmark.COMPILED)]
    seconds = gpu_benchmark.ROW_SECONDS + gpu_benchmark.COMPILE_SECONDS
    assert all(row[5] for row in first) and seconds * 4 <= 500, "a call of 500 s measures four compiled rows"


@pytest.mark.slow
def test_a_compiled_row_runs_in_a_process_of_its_own_and_says_what_was_compiled(gpu_benchmark, tiny, monkeypatch):
    """On the CPU with a backend that only traces; the row that fails there is told by its last line."""
    run = gpu_benchmark.subprocess.run
    traced = lambda *words, env, **options: run(*words, env={**env, "ACCELERATE_DYNAMO_BACKEND": "eager"}, **options)  # noqa: E731
    monkeypatch.setattr(gpu_benchmark.subprocess, "run", traced)
    monkeypatch.setattr(gpu_benchmark, "__file__", str(plan_memory.ROOT / "benchmarks" / "gpu.py"))
    row = dict(zip(gpu_benchmark.KEYS, (str(tiny), "fp8", 1.0, 128, 0, True, 1.0), strict=True))
    monkeypatch.setattr(gpu_benchmark, "COMPILE_SECONDS", 0.0)
    values = gpu_benchmark.measure_alone(row)
    assert values["graphs"] >= 2 and values["steps"] >= 1
    failed = gpu_benchmark.attempt({**row, "model": "lab/no-such-model"})["failed"]
    assert failed.startswith("RuntimeError: ") and "LocalEntryNotFoundError" in failed, "the last line of the process"


def test_a_machine_without_bitsandbytes_loses_no_row(gpu_benchmark, small, tmp_path, monkeypatch):
    real = gpu_benchmark.importlib.metadata.version

    def version(library: str) -> str:
        if library == "bitsandbytes":
            raise gpu_benchmark.importlib.metadata.PackageNotFoundError(library)
        return real(library)

    def refuse(row: dict) -> dict:
        sys.exit("pip install bitsandbytes")

    monkeypatch.setattr(gpu_benchmark.importlib.metadata, "version", version)
    monkeypatch.setattr(gpu_benchmark, "measure", refuse)
    rows = [(small, base, 1.0, 128, 0, False, 0.0) for base in ("bf16", "nf4")]
    done = gpu_benchmark.run_rows(tmp_path / "gpu.json", rows, 1000, "some GPU", torch.device("cpu"), 64)
    assert ["pip install" in row["failed"] for row in done] == [True, True]
    assert done[0]["versions"]["bitsandbytes"] is None
    monkeypatch.setattr(gpu_benchmark, "measure", lambda row: {"tflops": 1.0})
    again = gpu_benchmark.run_rows(tmp_path / "gpu.json", rows, 1000, "some GPU", torch.device("cpu"), 64)
    assert ["failed" in row for row in again] == [False, False], "what was refused is tried again"


@pytest.mark.slow
def test_what_streams_on_a_small_gpu_is_counted_and_the_line_is_parsed(small, capsys, t2i):
    """Device memory falls by the streamed blocks and rises by two buffers; the least share that fits is told."""
    job, base = Job(small, 256, flags=("--rank", "4")), "bf16"
    training = count_training(job, base, 1.0)
    whole, half = (plan_memory.streamed(job, base, share) for share in (1.0, 0.5))
    assert whole["gpu"] * GB == training.peak - training.blocks + 2 * training.largest_block
    assert whole["pinned"] * GB == pytest.approx(training.blocks) and half["pinned"] < whole["pinned"]
    assert whole["copied"] < 2 * whole["pinned"]
    limit = (whole["gpu"] + half["gpu"]) / 2
    share = plan_memory.least_share_streamed(job, base, limit)
    assert plan_memory.streamed(job, base, share)["gpu"] <= limit < plan_memory.streamed(job, base, share - 0.01)["gpu"]
    line = plan_memory.find_line(job, base, limit)["command"]
    words = shlex.split(line.replace("--instance_data_dir dog", f"--instance_data_dir {small}").replace("\\\n", ""))[3:]
    assert t2i.parse_args(words).stream_blocks == share
    for lacking in ("bf16", "nf4"):
        assert "does not fit" in plan_memory.find_line(job, lacking, 1e-6)


@pytest.mark.slow
def test_host_memory_is_the_sum_of_its_parts_and_follows_the_flags(small, t2i, tmp_path):
    """What streams is pinned; the peak is that of training, or of a text encoder that lies on the host."""
    plain, more = (
        plan_memory.host(Job(small, 256, flags=flags))
        for flags in (("--rank", "4"), ("--rank", "8", "--dataloader_num_workers", "6"))
    )
    assert more["saving"] == 2 * plain["saving"] > 0 and more["workers"] == pytest.approx(3 * plain["workers"])
    assert (
        plain["saving"] * GB
        > 3 * 4 * count_training(Job(small, 256, flags=("--rank", "4")), "bf16", 1.0).lora_parameters
    )
    assert plain["peak"] == pytest.approx(sum(plain[name] for name in ("process", "workers", "saving")))
    pinned, spread = plan_memory.host(Job(small, 256), pinned_gb=5.0), plan_memory.host(Job(small, 256), encoder_gb=9.0)
    assert pinned["peak"] == pytest.approx(plan_memory.host(Job(small, 256))["peak"] + 5)
    assert spread["peak"] == pytest.approx(spread["process"] + 9)
    folder = t2i.Flux2Transformer2DModel.from_config(read_architecture(small)["transformer"]).bfloat16()
    assert plain["mapped"] * GB == sum(parameter.nbytes for parameter in folder.parameters())


@pytest.mark.slow
def test_a_line_that_the_host_has_no_memory_for_gives_way_to_another(small, capsys, monkeypatch):
    """Pinned blocks to a base that needs none, the encoder on the host to one in NF4, at last a smaller image."""
    job, base = (
        Job(small, 512, flags=("--rank", "4")),
        count_training(Job(small, 512, flags=("--rank", "4")), "bf16", 1.0),
    )
    limit = (base.peak - base.blocks / 3) / GB
    line = plan_memory.find_line(job, "bf16", limit)
    need = line["host"]["peak"]
    assert line["stream"] > 0 and plan_memory.find_line(job, "bf16", limit, need) == line
    refused = plan_memory.find_line(job, "bf16", limit, need - 0.5 * line["host"]["pinned"])
    assert "of host memory" in refused and f"{need:.1f} GB" in refused
    other = plan_memory.find_line(job, "nf4", limit, need - 0.5 * line["host"]["pinned"])
    assert other["stream"] == 0 and "nf4.json" in other["command"]

    words = ["--model", small, "--resolution", "512", "--references", "0", "--gpu_gb", f"{limit:g}", "--host_gb"]
    monkeypatch.setattr(plan_memory, "BASES", {"bf16": BASES["bf16"]})
    plan_memory.main([*words, f"{need - 0.5 * line['host']['pinned']}", "--", "--rank", "4"])
    shown = capsys.readouterr().out
    assert "512 px, 0 reference(s), bf16: fits" in shown and "of host memory" in shown.splitlines()[0]
    assert "--resolution 256" in shown and "--stream_blocks" not in shown


@pytest.mark.slow
def test_a_text_encoder_that_neither_fits_the_gpu_nor_the_host_is_loaded_in_nf4():
    """That of [dev]: 36 GB in bf16, 10.5 GB in NF4."""
    places = dict(plan_memory.encoder_places(Job("dev", 512), 24))
    assert places == {("--offload",): pytest.approx(12, abs=0.2), plan_memory.ENCODER_NF4: 0.0}
    assert [*plan_memory.encoder_places(Job("dev", 512), 8)] == [(("--offload",), pytest.approx(28, abs=0.2))]
    assert [*plan_memory.encoder_places(Job("dev", 512), 48)] == [((), 0.0)]


@pytest.mark.slow
def test_the_predictions_of_streaming_are_near_what_was_measured_on_a_gpu():
    """Rows of benchmarks/gpu.json with --stream_blocks at rank 16; real architectures, seconds each."""
    rows = json.loads(plan_memory.MEASURED.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["streamed"] and not row["compiled"] and row["model"] == "klein-9B"]
    for row in rows:
        predicted = plan_memory.streamed(Job(row["model"], row["resolution"]), row["base"], row["streamed"])["gpu"]
        assert predicted == pytest.approx(row["peak_gb"], rel=0.05)
    assert rows


def test_several_resolutions_are_planned_by_the_largest(capsys):
    with pytest.raises(SystemExit):
        plan_memory.main(["--model", "klein-4B", "--", "--train_resolutions", "512", "1024"])
    assert "give it as --resolution" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bf16", "fp8", "nf4"])
def test_the_stored_predictions_are_those_of_the_present_scripts(base):
    """If the training step needs more memory, or less, `python tools/plan_memory.py --all` has to be run again."""
    place = {"model": "klein-4B", "base": base, "share": 1.0, "resolution": 512, "references": 0}
    rows = json.loads(plan_memory.RESULT.read_text(encoding="utf-8"))["rows"]
    (stored,) = (row["training_gb"] for row in rows if place.items() <= row.items())
    found = count_training(Job("klein-4B", 512), base, 1.0)
    assert found.peak / GB == pytest.approx(stored, rel=0.005)


def test_predictions_are_within_two_percent_of_what_a_gpu_measured():
    rows = json.loads(plan_memory.MEASURED.read_text(encoding="utf-8"))["rows"]
    ratios = [row["predicted_gb"] / row["peak_gb"] for row in rows if row.get("predicted_gb")]
    assert len(ratios) >= 10 and all(ratio == pytest.approx(1, abs=0.02) for ratio in ratios)


def test_the_predictions_in_the_docs_are_those_of_the_stored_file():
    page = (plan_memory.ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- tools/plan_memory.py -->\n")[2].partition("<!-- end of tools/plan_memory.py -->")[0]
    assert shown.strip() == plan_memory.readme_tables().strip()
    shown = (plan_memory.ROOT / "README.md").read_text(encoding="utf-8").partition("tools/plan_memory.py -->\n")[2]
    assert shown.partition("<!-- end of gpu_lines -->")[0].strip() == "\n".join(plan_memory.gpu_lines())


def test_a_plan_does_not_depend_on_the_gpu_of_this_machine(t2i, small, tmp_path, monkeypatch):
    asked, real = [], t2i.accelerate.Accelerator
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(t2i.accelerate, "Accelerator", lambda **options: asked.append(options["cpu"]) or real(cpu=True))
    Job(small, 128).plan(tmp_path / "plan")
    Job(small, 128).run(tmp_path / "run")
    assert asked == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("kind, part", [("nf4", (4 + 8 / 64 + 32 / 64 / 256) / 16), ("int8", 0.5)])
def test_a_text_encoder_in_another_format_is_counted_in_it(tmp_path, kind, part):
    """Its layers shrink, its word embeddings do not."""
    flags = ("--text_encoder_bnb_config_path", str(plan_memory.ROOT / "configs" / "quantization" / f"{kind}.json"))
    plain, other = (plan_memory.count_encoder(Job("klein-4B", 512, 0, words)) for words in ((), flags))
    config = plan_memory.encoder_config(Job("klein-4B", 512).plan(tmp_path))
    with torch.device("meta"):
        encoder = plan_memory.transformers.Qwen3Model(config)
    linears = [module for module in encoder.layers.modules() if isinstance(module, torch.nn.Linear)]
    saved = (1 - part) * 2 * sum(module.weight.numel() for module in linears)
    assert plain["peak"] - other["peak"] == pytest.approx(saved, rel=0.02) and other["weights"] == plain["weights"]
