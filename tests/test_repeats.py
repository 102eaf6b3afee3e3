"""Several folders of images, each with its own share of the visits."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from test_data_sources import arguments, fill, listed, write_jsonl
from unit_parts import log_lines, start_run


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Three images and two, with captions of their own; one name comes in both."""
    few, many = fill(tmp_path / "few", "a.jpg", "b.jpg", "c.jpg"), fill(tmp_path / "many", "a.jpg", "z.jpg")
    for number, path in enumerate([*few.iterdir(), *many.iterdir()]):
        path.with_suffix(".txt").write_text(f"caption {number}")
    return few, many


def checked(script, tiny, tmp_path, *flags) -> tuple:
    """(run, samples) after the data check."""
    run = start_run(script, tiny, tmp_path, *flags)
    return run, script.check_data(run)[0]


def visits(script, samples, batch: int = 1, **options) -> Counter:
    """How often each image is visited in ten rounds of all samples."""
    stream = script.SampleStream([sample.geometry for sample in samples], batch, 0, "instance", **options)
    drawn = [index for step in range(10 * len(samples)) for index, _ in stream.micro_batch(step)]
    return Counter(samples[index].image.name for index in drawn)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("buckets", [(), ("--aspect_ratio_buckets", "64,80;80,64")])
def test_images_of_a_folder_with_four_repeats_are_visited_four_times_as_often(
    script, tiny, folders, tmp_path, batch, buckets
):
    """Exactly, over whole rounds; in whatever batches and buckets."""
    flags = ("--instance_data_dir", *folders, "--repeats", "1", "4", *buckets)
    _, samples = checked(script, tiny, tmp_path, *flags)
    few, many = ({f"{folder.name}/{path.name}" for path in folder.glob("*.jpg")} for folder in folders)
    assert visits(script, samples, batch) == dict.fromkeys(few, 10 * batch) | dict.fromkeys(many, 40 * batch)


def test_what_the_numbers_have_in_common_lengthens_the_epoch_alone(script, tiny, folders, tmp_path):
    """3 and 12 draw the samples of 1 and 4, three rounds of them an epoch."""
    drawn = []
    for repeats in (("1", "4"), ("3", "12")):
        run, samples = checked(script, tiny, tmp_path, "--instance_data_dir", *folders, "--repeats", *repeats)
        drawn.append([sample.image.name for sample in samples])
        assert script.total_steps(run, len(samples)) == 3 * int(repeats[0]) + 2 * int(repeats[1])
    assert drawn[0] == drawn[1] and len({*drawn[0][:5]}) == 5  # the fixed losses are of different images


def test_folders_without_repeats_and_one_folder_are_visited_equally(script, tiny, folders, tmp_path):
    """One folder with any number has the samples that it has without."""
    both = checked(script, tiny, tmp_path, "--instance_data_dir", *folders)[1]
    assert len(both) == 5 and set(visits(script, both).values()) == {10}
    alone = [checked(script, tiny, tmp_path, "--instance_data_dir", folders[0], *more)[1]
             for more in ((), ("--repeats", "7"))]  # fmt: skip
    assert alone[0] == alone[1] and [sample.image.name for sample in alone[0]] == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_folder_inside_another_one_counts_for_itself_alone(script, folders, tmp_path):
    fill(tmp_path / "few" / "close", "d.jpg")
    found = script.list_samples(
        arguments(script, "--instance_data_dir", folders[0], folders[0] / "close", "--repeats", "1", "5")
    )
    assert {sample.image.name: sample.repeats for sample in found} == {
        "a.jpg": 1, "b.jpg": 1, "c.jpg": 1, str(Path("close/d.jpg")): 5
    }  # fmt: skip


def test_a_folder_may_have_metadata_beside_one_with_caption_files(script, folders):
    write_jsonl(folders[1], {"file_name": "a.jpg", "text": "from metadata"})
    with log_lines() as lines:
        found = script.list_samples(arguments(script, "--instance_data_dir", *folders))
    assert all(any(f"data: {folder}: " in line and "row(s)" in line for line in lines) for folder in folders)
    assert {sample.origin for sample in found} == {"caption files", "metadata.jsonl"}
    assert listed(script, folders[1])["a.jpg"] == "from metadata"


@pytest.mark.parametrize("repeats", [("2",), ("1", "2", "3")])
def test_another_number_of_repeats_than_of_folders_is_an_error(script, tiny, folders, capsys, repeats):
    flags = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", *folders, "--repeats", *repeats]
    with pytest.raises(SystemExit) as stop:
        script.parse_args([str(word) for word in flags])
    said = f"--repeats: {len(repeats)} number(s) for 2 --instance_data_dir; give one for each"
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_every_folder_that_does_not_exist_is_named(script, tiny, folders, tmp_path, capsys):
    flags = [
        "--pretrained_model_name_or_path",
        tiny,
        "--instance_data_dir",
        folders[0],
        tmp_path / "no",
        tmp_path / "x",
    ]
    with pytest.raises(SystemExit):
        script.parse_args([str(word) for word in flags])
    said = capsys.readouterr().err
    assert all(f"--instance_data_dir {tmp_path / name}: no such folder" in said for name in ("no", "x"))


def test_references_by_stem_go_with_one_folder(i2i, tiny, folders, tmp_path, capsys):
    flags = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", *folders, "--cond_data_dir", tmp_path]
    with pytest.raises(SystemExit):
        i2i.parse_args([str(word) for word in flags])
    assert "--cond_data_dir: needs exactly one --instance_data_dir" in capsys.readouterr().err


@pytest.mark.parametrize("repeats", [("10", "1"), ("10", "2")])
def test_kohyas_folders_are_silent_once_their_number_is_given(script, tmp_path, repeats):
    """The advice names the flags."""
    folders = [fill(tmp_path / name, "a.jpg") for name in ("10_sks dog", "1_dog")]
    with log_lines(logging.WARNING) as lines:
        script.list_samples(arguments(script, "--instance_data_dir", *folders, "--repeats", *repeats))
    told = [line for line in lines if "in its name" in line]
    assert len(told) == (repeats != ("10", "1")) and all("'1_dog'" in line and "--repeats 1" in line for line in told)


def test_other_repeats_are_other_data_for_a_resumed_run(script, tiny, folders, tmp_path):
    """What has a common factor is the same data: only the epochs are longer."""
    keys = {}
    for repeats in (("1", "4"), ("1", "3"), ("2", "8")):
        run, samples = checked(script, tiny, tmp_path, "--instance_data_dir", *folders, "--repeats", *repeats)
        keys[repeats] = script.fingerprint(run, [script.Stream("instance", samples)])["instance data"]
    assert keys["1", "4"] == keys["2", "8"] != keys["1", "3"]


@pytest.mark.scripts("i2i")
@pytest.mark.e2e
def test_a_run_with_repeats_that_is_resumed_in_the_middle_of_an_epoch_is_one_never_stopped(train, folders, capsys):
    """Bit for bit; and the epoch is told as an equation."""
    flags = ("--instance_data_dir", *folders, "--repeats", "2", "6", "--max_train_steps")
    whole, parts = train(*flags, "7", output="whole"), train(*flags, "4", output="parts")
    train(*flags, "7", "--resume_from_checkpoint", "latest", output="parts")
    losses = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
              for folder in (whole, parts)]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 7
    assert "3 images x 2 repeats + 2 images x 6 repeats = 18 samples per epoch" in capsys.readouterr().err
