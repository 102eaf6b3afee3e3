"""The remote text encoder: what is asked and sent to whom, what comes back, and how a server can fail."""

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import files_of, forbid
from servers import Loopback, RemoteEncoder

pytestmark = pytest.mark.scripts("t2i")

TOKEN = "hf_canary_token_of_the_tests"
LOCAL_ALTERNATIVE = "replace --remote_text_encoder with --offload"


@pytest.fixture
def encoder(monkeypatch):
    """A loopback encoder that works."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with RemoteEncoder() as server:
        yield server


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits between tries, for which nobody waits."""
    import urllib3.util.retry

    recorded: list[float] = []
    monkeypatch.setattr(urllib3.util.retry, "time", SimpleNamespace(sleep=recorded.append, time=time.time))
    return recorded


@pytest.fixture
def arguments(script, tiny, photos, reference_flags, tmp_path):
    """Makes the parsed command line of a run that asks the given server."""

    def make(encoder: RemoteEncoder, *flags: str | Path):
        words = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", photos, "--instance_prompt", "a toy"]
        words += ["--output_dir", tmp_path / "out", "--report_to", "none", "--resolution", "64", *reference_flags]
        words += ["--remote_text_encoder", "--remote_text_encoder_url", encoder.predict_url]
        return script.parse_args([str(word) for word in [*words, *flags]])

    return make


@pytest.fixture
def run_with(script, arguments):
    """What `encode_prompts` and its helpers need, made by the script's own start from a command line."""
    return lambda encoder, *flags: script.start_accelerator(arguments(encoder, *flags))


# ---------------------------------------------------------------------------------------------------------------------
# A server that works
# ---------------------------------------------------------------------------------------------------------------------


def test_the_embedding_is_the_servers_tensor_bit_for_bit(script, run_with, encoder):
    run = run_with(encoder)
    prompts = script.encode_prompts(run, ["a red toy"])
    assert torch.equal(prompts.get("a red toy"), encoder.embedding("a red toy")[0])


def test_each_different_prompt_is_asked_once(script, run_with, encoder):
    script.encode_prompts(run_with(encoder), ["a red toy", "a blue toy", "a red toy", "", "a red toy"])
    assert encoder.prompts == ["a red toy", "a blue toy", ""]


def test_a_second_start_asks_nothing(script, run_with, encoder):
    script.encode_prompts(run_with(encoder), ["a red toy", "a blue toy"])
    encoder.requests.clear()
    script.encode_prompts(run_with(encoder), ["a blue toy", "a red toy"])
    assert encoder.requests == []


def test_an_interrupted_start_asks_only_for_what_is_missing(script, run_with, encoder):
    script.encode_prompts(run_with(encoder), ["a red toy"])
    encoder.requests.clear()
    script.encode_prompts(run_with(encoder), ["a red toy", "a blue toy"])
    assert encoder.prompts == ["a blue toy"]


def test_another_server_is_asked_anew(script, run_with, encoder):
    script.encode_prompts(run_with(encoder), ["a red toy"])
    with RemoteEncoder() as other:
        script.encode_prompts(run_with(other), ["a red toy"])
        assert other.prompts == ["a red toy"]


def test_the_compute_dtype_is_that_of_the_run(script, run_with, encoder):
    prompts = script.encode_prompts(run_with(encoder, "--mixed_precision", "bf16"), ["a red toy"])
    assert torch.equal(prompts.get("a red toy"), encoder.embedding("a red toy")[0].to(torch.bfloat16))


@pytest.mark.e2e
def test_a_run_needs_no_text_encoder_on_this_machine(script, train, encoder, tiny, tmp_path, monkeypatch):
    model = shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("text_encoder"))
    monkeypatch.setattr(script, "load_text_encoder", lambda _: pytest.fail("the text encoder was loaded"))
    folder = train("--pretrained_model_name_or_path", model, "--remote_text_encoder", "--max_sequence_length", 512,
                   "--remote_text_encoder_url", encoder.predict_url, "--validation_prompt", "a toy on grass",
                   "--num_validation_images", 1, "--num_inference_steps", 1)  # fmt: skip
    assert sorted(encoder.prompts) == ["a photo of sks toy", "a toy on grass"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert (folder / "pytorch_lora_weights.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# A server that fails
# ---------------------------------------------------------------------------------------------------------------------


def refusal(script, run, prompt: str = "a red toy") -> str:
    """The message of the UserError that asking for a prompt ends with; nothing may be left in the cache."""
    with pytest.raises(script.UserError) as error:
        script.encode_prompts(run, [prompt])
    assert list((run.cache_dir / "prompts").glob("*")) == []
    return str(error.value)


FAULTS = {  # fault, what the message must name
    "503": ["503"],
    "429": ["429"],
    "404": ["404"],
    "text": [],
    "shape": ["1, 256, 96", "1, 512, 96"],
    "width": ["1, 512, 95", "1, 512, 96"],
    "list": ["list", "(1, 512, 96)"],
    "integers": ["int64"],
    "complex": ["complex64"],
    "nan": ["finite"],
    "overflow": ["finite"],
    "huge": ["more than 1196608 bytes"],
    "packed": ["bytes when unpacked"],
    "legacy": ["zip"],
    "redirect": ["307"],
    "cut": [],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_is_a_user_error_with_the_local_alternative(script, run_with, encoder, waits, fault):
    encoder.fault, encoder.redirect_to = fault, "http://127.0.0.1:9/predict"
    message = refusal(script, run_with(encoder))
    assert [part for part in [encoder.predict_url, LOCAL_ALTERNATIVE, *FAULTS[fault]] if part not in message] == []


def test_what_is_no_passing_trouble_is_not_asked_again(script, run_with, encoder, waits):
    for fault in ("404", "redirect", "nan", "huge", "text"):
        encoder.fault, encoder.redirect_to = fault, "http://127.0.0.1:9/predict"
        refusal(script, run_with(encoder))
    assert waits == [] and len(encoder.requests) == 5


def test_a_paused_server_is_asked_again_a_few_times_with_growing_waits(script, run_with, encoder, waits):
    encoder.fault = "503"
    refusal(script, run_with(encoder))
    assert 3 <= len(encoder.requests) <= 8
    assert waits == sorted(waits) and 1 <= sum(waits) < 60


@pytest.mark.parametrize("fault", ["503", "429"])
def test_a_server_that_recovers_is_good_enough(script, run_with, encoder, waits, fault):
    encoder.fault, encoder.times = fault, 2
    prompts = script.encode_prompts(run_with(encoder), ["a red toy"])
    assert torch.equal(prompts.get("a red toy"), encoder.embedding("a red toy")[0]) and len(encoder.requests) == 3


def test_an_answer_that_breaks_off_is_said_to_and_what_came_before_is_kept(script, run_with, encoder, waits):
    script.encode_prompts(run_with(encoder), ["a red toy"])
    encoder.fault, encoder.times = "cut", 1
    with pytest.raises(script.UserError, match="no usable answer .*IncompleteRead"):
        script.encode_prompts(run_with(encoder), ["a red toy", "a blue toy"])
    prompts = script.encode_prompts(run_with(encoder), ["a red toy", "a blue toy"])
    assert torch.equal(prompts.get("a blue toy"), encoder.embedding("a blue toy")[0])
    assert waits == [] and encoder.prompts == ["a red toy", "a blue toy", "a blue toy"]


def test_the_wait_that_a_busy_server_asks_for_is_kept(script, run_with, encoder, waits):
    encoder.fault, encoder.times = "429", 1
    script.encode_prompts(run_with(encoder), ["a red toy"])
    assert waits == [3]


def test_no_wish_of_a_server_makes_a_run_wait_longer_than_for_an_answer(script, run_with, encoder, waits):
    encoder.fault, encoder.times, encoder.retry_after = "429", 1, "Fri, 31 Dec 2100 23:59:59 GMT"
    script.encode_prompts(run_with(encoder), ["a red toy"])
    assert waits == [script.REMOTE_PATIENCE]


def test_a_server_that_hangs_is_given_up_after_a_timeout(script, run_with, encoder, waits, monkeypatch):
    assert script.REMOTE_SILENCE <= 120
    monkeypatch.setattr(script, "REMOTE_SILENCE", 0.1)
    encoder.fault = "hang"
    started = time.monotonic()
    message = refusal(script, run_with(encoder))
    assert LOCAL_ALTERNATIVE in message and encoder.predict_url in message and "Timeout" in message
    assert time.monotonic() - started < 10


def test_a_server_that_sends_byte_by_byte_is_given_up_too(script, run_with, encoder, monkeypatch):
    """No byte is late, yet the whole answer would take for ever."""
    monkeypatch.setattr(script, "REMOTE_PATIENCE", 0.5)
    encoder.fault, started = "drip", time.monotonic()
    message = refusal(script, run_with(encoder))
    assert "bytes in 0.5 s" in message and time.monotonic() - started < 10


def test_an_endless_answer_is_cut_off_while_it_comes_in(script, run_with, encoder):
    """Not after it is in memory: the server tells how much it got rid of."""
    encoder.fault = "endless"
    assert "more than" in refusal(script, run_with(encoder))
    encoder.released.set()
    assert 0 < encoder.sent < 64_000_000


def test_a_packed_answer_would_have_been_unpacked_by_torch(encoder):
    """The reason for the check: torch.load inflates what it finds."""
    import io

    body = encoder.faulty("packed", encoder.embedding("a red toy")).body
    assert len(body) < 100_000 and torch.load(io.BytesIO(body), weights_only=True).nbytes > 4_000_000


def test_a_server_that_is_not_there_is_a_user_error_with_the_local_alternative(script, run_with, encoder, waits):
    with RemoteEncoder() as gone:
        run = run_with(gone)
    assert LOCAL_ALTERNATIVE in refusal(script, run)


def test_a_server_of_ones_own_answers_in_offline_mode_too(script, run_with, encoder, monkeypatch):
    """HF_HUB_OFFLINE is about the Hub."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert script.encode_prompts(run_with(encoder), ["a red toy"]).get("a red toy").isfinite().all()
    assert encoder.prompts == ["a red toy"]


def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(script, run_with, encoder, tmp_path):
    encoder.fault, encoder.bomb_folder = "bomb", tmp_path / "exploded"
    assert LOCAL_ALTERNATIVE in refusal(script, run_with(encoder))
    assert not encoder.bomb_folder.exists()


def test_the_pickle_of_the_test_above_would_run_in_a_careless_loader(encoder, tmp_path):
    import io

    from servers import Bomb, saved

    torch.load(io.BytesIO(saved(Bomb(tmp_path / "exploded"))), weights_only=False)
    assert (tmp_path / "exploded").is_dir()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_failing_server_is_noticed_before_a_model_is_loaded_or_the_output_folder_is_begun(
    script, arguments, encoder, waits, tmp_path, monkeypatch, dry_run
):
    forbid(monkeypatch, script, "load_text_encoder", "load_vae", "load_transformer", "begin_output")
    forbid(monkeypatch, script, "LatentCodec")  # of a model on the Hub this downloads the VAE
    earlier = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    earlier.parent.mkdir()
    earlier.write_bytes(b"of a run before")
    (tmp_path / "out" / "config.args").write_text(script.CONFIG_HEAD)
    encoder.fault = "503"
    flags = ["--overwrite_output_dir", "--validation_prompt", "a toy on grass", *["--dry_run"] * dry_run]
    with pytest.raises(script.UserError, match="503"):
        script.main(arguments(encoder, *flags))
    assert earlier.read_bytes() == b"of a run before"
    assert {path.parts[0] for path in map(Path, files_of(tmp_path / "out"))} <= {earlier.name, "config.args", "cache"}
    assert set(encoder.prompts) == {"a toy"}, "one prompt is enough to find out"


def test_the_probe_asks_for_one_prompt_which_is_then_not_asked_again(script, run_with, encoder):
    run = run_with(encoder)
    script.encode_prompts(run, ["a red toy", "a blue toy"], limit=1)
    assert encoder.prompts == ["a red toy"]
    script.encode_prompts(run, ["a red toy", "a blue toy"])
    assert encoder.prompts == ["a red toy", "a blue toy"]


def test_a_server_is_not_asked_when_everything_is_cached(script, run_with, encoder):
    script.encode_prompts(run_with(encoder), ["a red toy"])
    encoder.fault = "503"
    script.encode_prompts(run_with(encoder), ["a red toy"], limit=1)
    assert len(encoder.requests) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Who sees the token
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["flag", "environment"])
def test_the_token_goes_to_a_loopback_server(script, run_with, encoder, monkeypatch, source):
    if source == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    script.encode_prompts(run_with(encoder, *(["--hub_token", TOKEN] if source == "flag" else [])), ["a red toy"])
    assert [request.token for request in encoder.requests] == [TOKEN]


def test_no_token_is_needed_for_a_loopback_server(script, run_with, encoder):
    script.encode_prompts(run_with(encoder), ["a red toy"])
    assert [request.token for request in encoder.requests] == [None]


def test_a_redirect_is_not_followed_so_its_target_sees_neither_token_nor_prompt(script, run_with, encoder):
    with Loopback() as target:
        encoder.fault, encoder.redirect_to = "redirect", f"{target.url}/predict"
        refusal(script, run_with(encoder, "--hub_token", TOKEN))
        assert target.requests == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux answers at 127.0.0.2 without being told to")
def test_a_foreign_host_gets_the_prompt_without_the_token(script, run_with, encoder):
    with RemoteEncoder(host="127.0.0.2") as foreign:  # for the script a host like any other
        script.encode_prompts(run_with(foreign, "--hub_token", TOKEN), ["a red toy"])
        assert [request.token for request in foreign.requests] == [None]


HOSTS = {
    "https://remote-text-encoder-flux-2.huggingface.co/predict": True,
    "https://me-encoder.hf.space/predict": True,
    "https://x.us-east-1.aws.endpoints.huggingface.cloud": True,
    "http://localhost:8000/predict": True,
    "http://[::1]:8000/predict": True,
    "http://remote-text-encoder-flux-2.huggingface.co/predict": False,  # readable on the way
    "https://huggingface.co.example.org/predict": False,
    "https://evilhuggingface.co/predict": False,
    "https://huggingface.co@example.org/predict": False,
    "https://example.org/.hf.space": False,
    "http://127.0.0.1.example.org/predict": False,
    "http://192.168.0.7:8000/predict": False,
}


@pytest.mark.parametrize("url", HOSTS)
def test_only_the_hubs_https_hosts_and_this_machine_see_the_token(script, run_with, encoder, monkeypatch, url):
    sent = []

    def remember(_session, _url, headers, **_):
        sent.append(headers)
        raise OSError("nobody is asked here")

    monkeypatch.setattr(script.requests.Session, "post", remember)
    run = run_with(encoder, "--hub_token", TOKEN)
    run.args.remote_text_encoder_url = url  # the command line would refuse some of them
    refusal(script, run)
    assert sent == [{"Authorization": f"Bearer {TOKEN}"} if HOSTS[url] else {}]


def test_an_error_does_not_tell_the_token(script, run_with, encoder, capsys):
    encoder.fault = "404"
    assert TOKEN not in refusal(script, run_with(encoder, "--hub_token", TOKEN))
    assert TOKEN not in "".join(capsys.readouterr())
