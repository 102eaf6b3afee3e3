"""Which caption an image gets, from wherever it is written, and that nothing is missed in silence."""

import json
import logging
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import draw_photo
from helpers import ROOT
from PIL import Image
from test_data_sources import arguments, fill, listed, write_jsonl
from unit_parts import caption_of, check_samples, log_lines, start_run, training_set

pytestmark = pytest.mark.scripts("i2i")

datasets = pytest.importorskip("datasets")


def write(folder: Path, name: str, text: str) -> None:
    """A text file in the folder, in UTF-8."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def warned(script, folder: Path, *flags) -> list[str]:
    """The warnings of listing the folder, without that of rows that have no reference."""
    with log_lines(logging.WARNING) as lines:
        script.list_samples(arguments(script, "--instance_data_dir", folder, *flags))
    return [line for line in lines if "no reference" not in line]


# ---- several captions of one image ----


@pytest.mark.scripts("t2i", "i2i")
def test_a_list_and_several_rows_are_several_captions_of_one_image(script, tmp_path):
    """In the order they are written; empty ones are none."""
    fill(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    rows = [("a.jpg", ["one", " two ", "", None]), ("b.jpg", "three"), ("c.jpg", []), ("b.jpg", "four")]
    write_jsonl(tmp_path, *({"file_name": name, "text": text} for name, text in rows))
    found = {"a.jpg": ("one", "two"), "b.jpg": ("three", "four"), "c.jpg": None, "d.jpg": None}
    assert listed(script, tmp_path) == found


def test_two_rows_of_a_csv_are_two_captions(script, tmp_path):
    fill(tmp_path, "a.jpg")
    write(tmp_path, "metadata.csv", "file_name,text\na.jpg,one\na.jpg,two\n")
    assert listed(script, tmp_path) == {"a.jpg": ("one", "two")}


@pytest.mark.parametrize(
    ("cell", "kind"),
    [(5, "int"), (1.5, "float"), (True, "bool"), ({"a": 1}, "dict"), (["a", 3], "int"), ([["a"]], "list")],
)
def test_what_is_no_text_is_refused_with_its_line_and_type(script, tmp_path, cell, kind):
    """Its Python form would be trained on."""
    fill(tmp_path, "a.jpg", "b.jpg")
    write_jsonl(tmp_path, {"file_name": "a.jpg", "text": "x"}, {"file_name": "b.jpg", "text": cell})
    with pytest.raises(script.UserError, match=rf"metadata\.jsonl(.|\n)*line 3: the caption is of type {kind},"):
        listed(script, tmp_path)


@pytest.mark.parametrize("text", ["['a', 'b']", '["a"]', " [ 'it''s', \"b\" ] "])
def test_a_list_that_was_written_as_text_is_refused(script, tmp_path, text):
    """As pandas writes a list into a CSV."""
    fill(tmp_path, "a.jpg")
    cell = text.replace('"', '""')
    write(tmp_path, "metadata.csv", f'file_name,text\na.jpg,"{cell}"\n')
    with pytest.raises(script.UserError, match="line 2: the caption is a list written as text"):
        listed(script, tmp_path)


def test_square_brackets_alone_are_a_caption(script, tmp_path):
    fill(tmp_path, "a.jpg", "b.jpg")
    write_jsonl(tmp_path, {"file_name": "a.jpg", "text": "[trigger]"}, {"file_name": "b.jpg", "text": "['a'] and [b]"})
    assert list(listed(script, tmp_path).values()) == ["[trigger]", "['a'] and [b]"]


def test_the_trigger_is_replaced_in_each_of_several_captions(script):
    rows = [script.Sample(script.Image("a"), ("a [trigger]", "plain", "[trigger] b"))]
    (row,) = script.fill_captions(arguments(script, "--instance_prompt", "sks"), rows)
    assert row.captions == ("a sks", "plain", "sks b")


@pytest.fixture
def captioned(tmp_path) -> Path:
    """Two images, one of them with three captions."""
    data = fill(tmp_path / "data", "a.jpg", "b.jpg")
    write_jsonl(data, {"file_name": "a.jpg", "text": ["one", "two", "three"]}, {"file_name": "b.jpg", "text": "four"})
    return data


def visits(script, tiny, tmp_path, data, *flags):
    """The training set over a folder."""
    run = start_run(script, tiny, tmp_path, "--instance_data_dir", data, *flags)
    samples, _ = script.check_data(run)
    return run, training_set(script, run, samples)


def test_one_of_several_captions_is_drawn_at_each_visit_by_seed_and_visit_alone(script, tiny, tmp_path, captioned):
    """Each about as often; another seed draws others; a visit is the same whenever it is made."""
    (_, first), (_, other) = (visits(script, tiny, tmp_path / seed, captioned, "--seed", seed) for seed in "56")
    drawn = [first[0, position]["caption"] for position in range(60)]
    assert all(12 <= drawn.count(caption) <= 28 for caption in ("one", "two", "three"))
    assert [first[0, position]["caption"] for position in reversed(range(60))] == drawn[::-1]
    assert [other[0, position]["caption"] for position in range(60)] != drawn
    assert {first[1, position]["caption"] for position in range(5)} == {"four"}


def test_more_captions_change_no_other_draw_of_a_visit(script, tiny, tmp_path, captioned):
    _, several = visits(script, tiny, tmp_path / "a", captioned)
    (captioned / "metadata.jsonl").unlink()
    _, plain = visits(script, tiny, tmp_path / "b", captioned)
    for position in range(3):
        one, other = several[0, position], plain[0, position]
        assert all(torch.equal(one[name], other[name]) for name in ("noise", "u", "pixels"))


def test_every_caption_is_encoded_and_part_of_what_resume_compares(script, tiny, tmp_path, captioned):
    run, data = visits(script, tiny, tmp_path, captioned)
    assert {"one", "two", "three", "four"} <= set(script.all_prompts(run, data.samples))
    before = script.fingerprint(run, [script.Stream("instance", data.samples)])
    write_jsonl(captioned, {"file_name": "a.jpg", "text": ["one", "two"]}, {"file_name": "b.jpg", "text": "four"})
    _, data = visits(script, tiny, tmp_path, captioned)
    assert script.fingerprint(run, [script.Stream("instance", data.samples)]) != before


def test_the_longest_of_several_captions_is_counted_and_one_that_is_cut_is_named(script, tiny, tmp_path, captioned):
    write_jsonl(captioned, {"file_name": "a.jpg", "text": ["one", "word " * 90]}, {"file_name": "b.jpg", "text": "x"})
    with log_lines(logging.WARNING) as lines:
        visits(script, tiny, tmp_path, captioned)
    assert any("1 captions are cut at 64 tokens: a.jpg" in line for line in lines)


@pytest.mark.e2e
def test_a_resumed_run_with_several_captions_has_the_losses_of_one_that_was_never_stopped(train, captioned):
    """Bit for bit."""
    flags = ("--instance_data_dir", captioned, "--max_train_steps")
    whole, parts = train(*flags, "4", output="whole"), train(*flags, "2", output="parts")
    train(*flags, "4", "--resume_from_checkpoint", "latest", output="parts")
    losses = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
              for folder in (whole, parts)]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 4


# ---- caption files ----


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
@pytest.mark.parametrize(
    ("image", "name"),
    [("0.jpg", "0"), ("0.jpg", "0.jpg"), ("IMG_0.jpg", "img_0"), ("img.jpg", "IMG.JPG"), ("0.JPG", "0"),
     (unicodedata.normalize("NFC", "été.jpg"), unicodedata.normalize("NFD", "été")),
     (unicodedata.normalize("NFD", "Été.png"), unicodedata.normalize("NFC", "été")), ("a b.jpg", "a b "),
     ("0.jfif", "0"), ("deep/er/0.webp", "deep/er/0")],
)  # fmt: skip
def test_a_caption_file_is_found_however_its_name_is_written(script, tmp_path, image, name, suffix):
    """In upper case too."""
    fill(tmp_path, "other.jpg")
    draw_photo(tmp_path / "x.jpg", (40, 32), 1)
    (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "x.jpg").rename(tmp_path / image)
    for ending in (suffix, suffix.upper()):
        write(tmp_path, name + ending, "a cat")
        assert warned(script, tmp_path) == []
        assert listed(script, tmp_path) == {str(Path(image)): "a cat", "other.jpg": None}
        (tmp_path / (name + ending)).unlink()


def test_a_caption_file_of_the_very_name_goes_before_a_similar_one(script, tmp_path):
    """On a disk that knows upper case both images are there; one without a caption gets that of the other."""
    fill(tmp_path, "a.jpg", "A.jpg", "b.jpg", "B.jpg", "c.jpg", "C.jpg")
    if len(list(tmp_path.iterdir())) < 6:
        pytest.skip("this disk does not tell a.jpg from A.jpg")
    for name, text in {"a.txt": "small", "A.txt": "large", "B.txt": "large b", "c.jpg.txt": "small c"}.items():
        write(tmp_path, name, text)
    large = {"A.jpg": "large", "B.jpg": "large b", "C.jpg": "small c"}
    assert listed(script, tmp_path) == {**large, "a.jpg": "small", "b.jpg": "large b", "c.jpg": "small c"}


def test_txt_goes_before_caption_among_similar_names_too(script, tmp_path):
    fill(tmp_path, "A.jpg")
    for name in ("a.caption", "a.txt"):
        write(tmp_path, name, name)
    assert listed(script, tmp_path) == {"A.jpg": "a.txt"}
    assert any(
        "1 .caption file(s) not used, see docs/data.md: 'a.caption'" in line for line in warned(script, tmp_path)
    )


def test_a_link_to_a_missing_caption_is_told(script, tmp_path):
    fill(tmp_path, "a.jpg")
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    assert any("'a.txt'" in line for line in warned(script, tmp_path))


# ---- metadata ----


@pytest.mark.scripts("t2i", "i2i")
@pytest.mark.parametrize("column", ["Caption", "description", " text", "TEXT ", "captions", "Prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_usual_columns_are_found_in_any_case_and_with_blanks(script, tmp_path, column, kind):
    fill(tmp_path, "a.jpg")
    if kind == "jsonl":
        write_jsonl(tmp_path, {"File_Name": "a.jpg", column: "yes", "other": "no"})
    else:
        write(tmp_path, "metadata.csv", f"File_Name,{column},other\na.jpg, yes ,no\n")
    assert listed(script, tmp_path) == {"a.jpg": "yes"}


def test_a_column_that_is_asked_for_is_found_in_any_case(script, tmp_path):
    fill(tmp_path, "a.jpg")
    write(tmp_path, "metadata.csv", "file_name, Long Text,text\na.jpg,yes,no\n")
    assert listed(script, tmp_path, "--caption_column", "long text") == {"a.jpg": "yes"}


def test_metadata_in_subfolders_is_read(script, tmp_path):
    """Names are those of its own folder, or of another one below the data folder."""
    fill(tmp_path, "a/0.jpg", "b/0.jpg", "c/0.jpg")
    write_jsonl(tmp_path / "a", {"file_name": "0.jpg", "text": "one"})
    write(tmp_path, "b/Metadata.CSV", "file_name,caption\n0.jpg,two\n../c/0.jpg,three\n")
    assert list(listed(script, tmp_path).values()) == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["img_0.JPG", " IMG_0.jpg ", unicodedata.normalize("NFD", "É.jpg")])
def test_metadata_names_a_file_in_any_case_and_unicode_form(script, tmp_path, name):
    image = fill(tmp_path, "IMG_0.jpg") / "IMG_0.jpg"
    if "É" in unicodedata.normalize("NFC", name):
        image.rename(tmp_path / unicodedata.normalize("NFC", "É.jpg"))
    write_jsonl(tmp_path, {"file_name": name, "text": "yes"})
    assert list(listed(script, tmp_path).values()) == ["yes"]


def test_an_image_that_metadata_names_is_trained_on_whatever_its_ending(script, tmp_path):
    """Its caption would be lost otherwise."""
    fill(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "b.jpg").rename(tmp_path / "b")
    write_jsonl(tmp_path, {"file_name": "b", "text": "yes"})
    assert listed(script, tmp_path) == {"a.jpg": None, "b": "yes"}


@pytest.mark.scripts("t2i", "i2i")
@pytest.mark.parametrize("prompt", [(), ("--instance_prompt", "sks")])
@pytest.mark.parametrize("row", [{"label": "x", "style": "y"}, {"text": "", "style": "y"}, {}])
def test_metadata_that_gives_no_caption_ends_the_run_with_its_columns(script, tmp_path, row, prompt):
    """Even if there is an --instance_prompt: somebody wrote captions and they would be missed."""
    fill(tmp_path, "a.jpg")
    write_jsonl(tmp_path, {"file_name": "a.jpg", **row})
    with pytest.raises(script.UserError, match="--caption_column") as error:
        listed(script, tmp_path, *prompt)
    assert f"{tmp_path / 'metadata.jsonl'}: {', '.join(['file_name', *row])}" in str(error.value)


def test_metadata_without_captions_is_no_error_beside_caption_files(script, tmp_path):
    """But its columns are told."""
    fill(tmp_path, "a.jpg")
    write_jsonl(tmp_path, {"file_name": "a.jpg", "style": "y"})
    write(tmp_path, "a.txt", "yes")
    assert listed(script, tmp_path) == {"a.jpg": "yes"}
    assert any("captions from no column; columns not used: style" in line for line in warned(script, tmp_path))


def test_broken_jsonl_names_the_line(script, tmp_path):
    fill(tmp_path, "a.jpg")
    write(tmp_path, "metadata.jsonl", '{"file_name": "a.jpg"}\n\n{"file_name": "b.jpg"\n')
    with pytest.raises(script.UserError, match=r"metadata\.jsonl: line 3 is not readable as one JSON.*Expecting"):
        listed(script, tmp_path)


def test_json_objects_on_one_line_are_told_to_be_several(script, tmp_path):
    """As some converters write them."""
    fill(tmp_path, "a.jpg")
    write(tmp_path, "metadata.jsonl", '{"file_name": "a.jpg"} {"file_name": "b.jpg"}')
    with pytest.raises(script.UserError, match=r"line 1 is not readable as one JSON object.*\(Extra data"):
        listed(script, tmp_path)


def test_names_from_another_folder_say_where_names_start_and_many_rows_are_counted(script, tmp_path):
    """Names that hold the folder itself again, as from a script one folder higher up."""
    names = fill(tmp_path / "train", *(f"{number}.jpg" for number in range(23))).iterdir()
    write_jsonl(tmp_path / "train", *({"file_name": f"train/{path.name}", "text": "x"} for path in sorted(names)))
    with pytest.raises(script.UserError) as error:
        listed(script, tmp_path)
    first, *lines, last = str(error.value).splitlines()
    assert first.endswith("23 file name(s) cannot be used:") and len(lines) == 20 and last == "    and 3 more"
    assert lines[0].endswith(
        f"'train/0.jpg' leads out of the folder or does not exist; names start at {tmp_path / 'train'}"
    )


def test_a_csv_row_with_too_many_cells_names_the_line_after_cells_of_several_lines(script, tmp_path):
    fill(tmp_path, "a.jpg")
    write(tmp_path, "metadata.csv", 'file_name,text\na.jpg,"one\ntwo"\na.jpg,x,y\n')
    with pytest.raises(script.UserError, match=r"metadata\.csv: line 4 has more cells"):
        listed(script, tmp_path)


def test_a_csv_row_whose_image_is_missing_names_the_line_after_cells_of_several_lines(script, tmp_path):
    fill(tmp_path, "a.jpg")
    write(tmp_path, "metadata.csv", 'file_name,text\na.jpg,"one\ntwo"\ngone.jpg,x\n')
    with pytest.raises(script.UserError, match=r"line 4: 'gone\.jpg' leads out of the folder or does not exist"):
        listed(script, tmp_path)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_may_have_the_separators_of_other_spreadsheets(script, tmp_path, mark):
    fill(tmp_path, "a.jpg")
    write(tmp_path, "metadata.csv", f"file_name{mark}text\na.jpg{mark}a cat, a hat\n")
    assert listed(script, tmp_path) == {"a.jpg": "a cat, a hat"}


@pytest.mark.parametrize("text", ['"a dog\nb.jpg,"b dog"\n', '"a dog\nb.jpg,b dog\n', f'"{160_000 * "a"}"\n'])
def test_a_quotation_mark_that_is_missing_in_a_csv_is_told_with_the_line(script, tmp_path, text):
    """The rest of the file would become one caption."""
    fill(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path, "metadata.csv", f"file_name,text\na.jpg,{text}")
    with pytest.raises(script.UserError, match=r"metadata\.csv: line \d: .*; is a quotation mark missing\?"):
        listed(script, tmp_path)


def test_half_an_emoji_in_a_caption_is_left_out(script, tmp_path):
    """Texts that were cut by another program; the tokenizer would end in a traceback."""
    fill(tmp_path, "a.jpg", "b.jpg")
    write(
        tmp_path,
        "metadata.jsonl",
        '{"file_name": "a.jpg", "text": "nice \\ud83d"}\n{"file_name": "b.jpg", "text": "x"}',
    )
    assert listed(script, tmp_path) == {"a.jpg": "nice", "b.jpg": "x"}


@pytest.mark.scripts("t2i", "i2i")
def test_of_several_usual_columns_the_one_that_fits_the_task_is_taken(script, tmp_path):
    """Data sets of edits have a description of the image beside the instruction."""
    fill(tmp_path, "a.jpg")
    write_jsonl(tmp_path, {"file_name": "a.jpg", "caption": "a house at night", "instruction": "make it night"})
    expected = "a house at night" if script.TASK == "text-to-image" else "make it night"
    assert listed(script, tmp_path) == {"a.jpg": expected}


def test_two_columns_of_one_name_are_an_error(script, tmp_path):
    """The captions of the first would be lost."""
    fill(tmp_path, "a.jpg")
    write(tmp_path, "metadata.csv", "file_name,text,text\na.jpg,x,y\n")
    with pytest.raises(script.UserError, match=r"metadata\.csv: two columns have one name: file_name, text, text"):
        listed(script, tmp_path)


@pytest.mark.scripts("t2i", "i2i")
@pytest.mark.parametrize("flags", [("--image_column", "photo"), ("--caption_column", "text")])
def test_a_column_without_metadata_is_an_error(script, tmp_path, flags):
    fill(tmp_path, "a.jpg")
    with pytest.raises(script.UserError, match=f"{flags[0]}: .* has no metadata"):
        listed(script, tmp_path, *flags)


@pytest.mark.scripts("t2i", "i2i")
@pytest.mark.parametrize(
    ("header", "flags"),
    [("image,text", ()), ("image,text", ("--image_column", "image")), ("photo,text", ("--image_column", "photo"))],
)
def test_the_image_column_of_metadata_can_be_chosen_and_is_image_too(script, tmp_path, header, flags):
    fill(tmp_path, "a.jpg")
    write(tmp_path, "metadata.csv", f"{header}\na.jpg,yes\n")
    assert listed(script, tmp_path, *flags) == {"a.jpg": "yes"}


# ---- what is not used is told ----


def test_what_is_not_used_is_told_by_name_as_a_warning(script, tmp_path):
    """A caption without an image, other metadata, a linked folder, an image that cannot be read, latents of others."""
    data = fill(tmp_path / "data", "a.jpg", "sub/b.jpg")
    fill(tmp_path / "elsewhere", "c.jpg")
    (data / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    unused = ["IMG_1.txt", "captions.csv", "captions.json", "photo.heic", "a.npz", "sub/metadata.csv", "noending"]
    for name in unused:
        write(data, name, "x")
    write_jsonl(data / "sub", {"file_name": "b.jpg", "text": "yes"})
    lines = warned(script, data)
    assert all(any(f"'{Path(name)}'" in line and "not used" in line for line in lines) for name in [*unused, "linked"])
    assert any("linked folder(s) not used, see docs/data.md: 'linked'" in line for line in lines)
    assert not any("a.jpg" in line or "b.jpg" in line for line in lines)
    assert list(listed(script, data)) == ["a.jpg", str(Path("sub/b.jpg"))]


def test_a_tidy_folder_gives_no_warning(script, tmp_path):
    fill(tmp_path, "a.jpg", "b.jpg")
    for name in ("a.txt", "README.md", "Thumbs.db", "desktop.ini", ".hidden.txt", "LICENSE"):
        write(tmp_path, name, "x")
    assert warned(script, tmp_path) == []


def test_only_five_names_are_told(script, tmp_path):
    fill(tmp_path, "a.jpg")
    for number in range(8):
        write(tmp_path, f"x{number}.txt", "x")
    (line,) = warned(script, tmp_path)
    assert "8 .txt file(s) not used, see docs/data.md: 'x0.txt'" in line and line.endswith("'x4.txt', ...")


def test_the_folder_names_of_kohyas_trainer_are_told_with_the_remedy(script, tmp_path):
    """Until the remedy is taken; the data folder itself may be called so."""
    fill(tmp_path, "10_sks dog/a.jpg", "plain/b.jpg")
    for folder in (tmp_path, tmp_path / "10_sks dog"):
        (line,) = warned(script, folder)
        assert "'10_sks dog'" in line and "--repeats 10 and --instance_prompt 'sks dog'" in line
        assert warned(script, folder, "--repeats", "10") == []


@pytest.mark.parametrize("name", ["a-masklabel.png", "a_mask.png", "masks/a.png", "Mask/a.jpg"])
def test_masks_are_told(script, tmp_path, name):
    fill(tmp_path, "a.jpg", "masked_man.jpg", name)
    (line,) = warned(script, tmp_path)
    assert "1 image(s) look like masks" in line and Path(name).name in line and "masked_man" not in line


def test_the_report_says_where_captions_come_from_with_three_examples(script, tmp_path):
    """One of each origin first."""
    fill(tmp_path, *(f"{name}.jpg" for name in "abcdef"))
    names = {"a": "x", "b": "y", "c": ["z", "w"]}
    write_jsonl(tmp_path, *({"file_name": f"{name}.jpg", "text": text} for name, text in names.items()))
    write(tmp_path, "d.txt", "from a file")
    args = arguments(script, "--instance_data_dir", tmp_path, "--instance_prompt", "sks")
    with log_lines() as lines:
        script.fill_captions(args, script.list_samples(args))
    first, *examples = next(line for line in lines if "captions of" in line).splitlines()
    assert "3 image(s) from metadata.jsonl" in first
    assert "1 image(s) from caption files" in first and "2 image(s) from --instance_prompt" in first
    assert [line.strip() for line in examples] == ["a.jpg: x", "d.jpg: from a file", "e.jpg: sks"]


def test_the_report_says_that_an_image_has_several_captions(script):
    with log_lines() as lines:
        script.fill_captions(arguments(script), [script.Sample(script.Image("a"), ("one", "two"), "column text")])
    assert any("1 image(s) from column text" in line and "a: one (one of 2" in line for line in lines)


def test_images_without_a_caption_beside_others_with_one_are_a_warning(script):
    rows = [script.Sample(script.Image("a"), ("one",)), script.Sample(script.Image("b"), ())]
    with log_lines(logging.WARNING) as lines:
        script.fill_captions(arguments(script, "--instance_prompt", "sks"), rows)
    assert any("1 images have no caption" in line and line.endswith(": b") for line in lines)


# ---- data sets ----


def table_rows(script, tmp_path: Path, name: object, *flags) -> list:
    """The rows of a data set by --dataset_name."""
    return script.list_samples(arguments(script, "--dataset_name", name, "--cache_dir", tmp_path / "cache", *flags))


def make_table(photos: Path, features: dict | None = None, **columns: list) -> object:
    """A table with an image per row beside the columns."""
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.glob("*.jpg"))]
    count = len(next(iter(columns.values())))
    table = datasets.Dataset.from_dict({"image": cells[:count], **columns})
    return table.cast(datasets.Features({**table.features, "image": datasets.Image(), **(features or {})}))


def in_folder(table, folder: Path, name: str = "train.parquet") -> Path:
    """The folder with the table as a parquet file."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / name)
    return folder


LABEL = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    ("column", "cells", "feature", "captions"),
    [("text", [["a", "b"], [], None], None, [("a", "b"), None, None]),
     ("Caption", ["a", " b ", None], None, ["a", "b", None]),
     (" description", ["a", "", "c"], None, ["a", None, "c"]),
     ("text", [0, 1, -1], LABEL, ["cat", "dog", None]),
     ("text", [[0, 1], [1], []], datasets.List(LABEL), [("cat", "dog"), "dog", None])],
)  # fmt: skip
def test_a_data_set_gives_lists_classes_and_usual_columns(script, tmp_path, photos, column, cells, feature, captions):
    """Without --caption_column."""
    table = make_table(photos, {column: feature} if feature else None, **{column: cells})
    rows = table_rows(script, tmp_path, in_folder(table, tmp_path / "d"))
    assert [caption_of(row) for row in rows] == captions
    assert rows[0].origin == f"column {column}"


@pytest.mark.parametrize(("cells", "kind"), [([1, 2], "int"), ([{"a": "x"}, None], "dict"), ([[["a"]], []], "list")])
def test_a_data_set_column_that_is_no_text_is_refused_with_row_and_type(script, tmp_path, photos, cells, kind):
    folder = in_folder(make_table(photos, text=[None, *cells]), tmp_path / "d")
    with pytest.raises(script.UserError, match=f"{folder}: column text, row 1: the caption is of type {kind},"):
        table_rows(script, tmp_path, folder)


def test_a_data_set_without_captions_warns_with_its_columns(script, tmp_path, photos):
    folder = in_folder(make_table(photos, words=["x"]), tmp_path / "d")
    with log_lines(logging.WARNING) as lines:
        assert [row.captions for row in table_rows(script, tmp_path, folder)] == [()]
    assert any("captions from no column; columns not used: words" in line for line in lines)


def test_caption_files_in_a_data_set_are_told(script, tmp_path):
    """`datasets` does not read them."""
    write(fill(tmp_path / "d" / "train", "a.jpg", "b.jpg"), "a.txt", "x")
    with log_lines(logging.WARNING) as lines:
        table_rows(script, tmp_path, tmp_path / "d")
    assert any("caption files are not read; use --instance_data_dir for that" in line for line in lines)


def test_images_of_a_folder_that_are_in_no_row_are_told(script, tmp_path):
    """`datasets` reads words such as test in file names as the name of a split."""
    folder = fill(tmp_path / "d", "train_1.jpg", "train_2.jpg", "dog-test.jpg")
    with log_lines(logging.WARNING) as lines:
        assert len(table_rows(script, tmp_path, folder)) == 2
    assert any("has 3 images, its rows have fewer; --instance_data_dir takes all" in line for line in lines)


def test_a_split_can_be_chosen_and_a_wrong_one_names_those_there_are(script, tmp_path, photos):
    folder = in_folder(make_table(photos, text=["x", "y"]), tmp_path / "d", "test.parquet")
    assert len(table_rows(script, tmp_path, folder, "--dataset_split", "test")) == 2
    assert len(table_rows(script, tmp_path, folder, "--dataset_split", "test[:1]")) == 1
    with pytest.raises(script.UserError, match=r"--dataset_split train: .*\['test'\]"):
        table_rows(script, tmp_path, folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_of_save_to_disk_is_read(script, tmp_path, photos, split):
    """One table or several splits."""
    table = make_table(photos, text=["x", "y"])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({split: table}).save_to_disk(tmp_path / "several")
    flags = ("--dataset_split", split)
    for name in ("several", *(["one"] if split == "train" else [])):
        rows = table_rows(script, tmp_path, tmp_path / name, *flags)
        assert [caption_of(row) for row in rows] == ["x", "y"]
        assert rows[1].image.read() == (photos / "01.jpg").read_bytes()
    with pytest.raises(script.UserError, match=f"--dataset_split other: .*it has {split}"):
        table_rows(script, tmp_path, tmp_path / "several", "--dataset_split", "other")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "JSONL"])
def test_a_single_table_file_is_read_and_names_images_from_its_own_folder(script, tmp_path, photos, kind, monkeypatch):
    folder = fill(tmp_path / "d", "images/a.jpg")
    cells = {"image": ["images/a.jpg"], "text": ["x"]}
    table = datasets.Dataset.from_dict(cells)
    write_table = {"parquet": table.to_parquet, "csv": table.to_csv}.get(kind, table.to_json)
    write_table(folder / f"rows.{kind}")
    monkeypatch.chdir(photos)
    (row,) = table_rows(script, tmp_path, folder / f"rows.{kind}")
    assert (caption_of(row), row.image.read()) == ("x", (folder / "images" / "a.jpg").read_bytes())


@pytest.mark.parametrize(
    ("files", "cause"),
    [({"train.jsonl": '{"a": 1}\n{"a": \n'}, r"JSON parse error: Invalid value\."),
     ({"train.csv": "a,b\n1,2\n1,2,3\n"}, "Expected 2 fields in line 3, saw 3")],
)  # fmt: skip
def test_a_data_set_that_cannot_be_built_gives_the_cause_in_one_line(script, tmp_path, files, cause):
    for name, text in files.items():
        write(tmp_path / "d", name, text)
    with pytest.raises(script.UserError, match=cause) as error:
        table_rows(script, tmp_path, tmp_path / "d")
    assert "\n" not in str(error.value) and "error occurred while generating" not in str(error.value)


def test_tables_whose_columns_differ_are_told_with_the_columns(script, tmp_path, photos):
    for number, column in enumerate(("text", "caption")):
        in_folder(make_table(photos, **{column: ["x"]}), tmp_path / "d", f"train-{number}.parquet")
    cause = r"Couldn't cast .*caption: string.* to .*'text'.* because column names don't match"
    with pytest.raises(script.UserError, match=cause) as error:
        table_rows(script, tmp_path, tmp_path / "d")
    assert "\n" not in str(error.value)


def test_a_row_that_cannot_be_read_names_its_path_or_address(script, tmp_path):
    write(tmp_path, "rows.csv", "image,text\ngone.jpg,x\nhttps://example.org/a.jpg,y\n")
    args = arguments(script, "--dataset_name", tmp_path / "rows.csv", "--cache_dir", tmp_path / "cache")
    with pytest.raises(script.UserError) as error:
        check_samples(script, args, tmp_path / "index")
    lines = str(error.value).splitlines()
    assert lines[1].strip().startswith("row 0: cannot be read") and "gone.jpg" in lines[1]
    assert lines[2].strip().startswith("row 1: cannot be read") and "https:/example.org/a.jpg" in lines[2]


# ---- pixels ----


@pytest.mark.parametrize("crop", [None, (0.2, 0.9)])
@pytest.mark.parametrize("size", [(6000, 2), (3, 5000)])
def test_a_strip_is_cropped_before_it_is_enlarged(script, size, crop, monkeypatch):
    """Enlarged as a whole it would have 3 thousand million pixels; nothing larger than the target is made."""
    strip = Image.linear_gradient("L").resize(size).convert("RGB")
    made, resize = [], Image.Image.resize

    def watched(image, size, *more, **options):
        made.append(size)
        return resize(image, size, *more, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    pixels = script.image_to_pixels(strip, (1024, 1024), crop, False)
    assert pixels.shape == (3, 1024, 1024) and all(max(size) <= 1024 for size in made)


def test_images_that_are_enlarged_a_lot_are_named(script, tiny, tmp_path):
    data = fill(tmp_path / "data", "a.jpg")
    Image.new("RGB", (600, 5)).save(data / "strip.png")
    with log_lines(logging.WARNING) as lines:
        visits(script, tiny, tmp_path, data)
    assert any("1 image(s) are enlarged more than four times: strip.png" in line for line in lines)


def test_images_that_lose_much_to_the_crop_and_copies_are_named(script, tiny, tmp_path):
    data = fill(tmp_path / "data", "a.jpg")
    (data / "a (1).jpg").write_bytes((data / "a.jpg").read_bytes())
    draw_photo(data / "wide.png", (300, 100), 5)
    draw_photo(data / "photo.png", (160, 90), 6)
    with log_lines(logging.WARNING) as lines:
        visits(script, tiny, tmp_path, data, "--train_resolutions", "32", "64")
    assert any("1 image(s) lose over half to the crop, see docs/data.md: wide.png" in line for line in lines)
    [told] = [line for line in lines if "copies" in line]
    assert "1 image(s) are copies of others" in told and "a.jpg" in told and "photo" not in told


def test_a_strip_shows_the_place_that_the_crop_asks_for(script, monkeypatch):
    """The same as when it is enlarged first, which the limit decides."""
    strip = Image.linear_gradient("L").rotate(90).resize((900, 9)).convert("RGB")
    for crop in (None, (0.0, 0.0), (0.5, 0.25), (0.9, 0.99)):
        whole = script.image_to_pixels(strip, (64, 64), crop, False)
        monkeypatch.setattr(script, "MAX_PIXELS", 1000)
        first = script.image_to_pixels(strip, (64, 64), crop, False)
        monkeypatch.undo()
        assert (whole - first).abs().mean() < 0.02


def test_the_page_on_data_says_where_captions_come_from():
    """The usual columns and the split."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert "--dataset_split" in text and "`description`" in text


def test_empty_caption_files_are_told(script, tmp_path):
    """Elsewhere they mean to train without a caption; here their image gets --instance_prompt."""
    fill(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    for name, text in {"a.txt": "", "b.txt": " \n", "c.txt": "yes"}.items():
        write(tmp_path, name, text)
    (line,) = warned(script, tmp_path)
    assert line.endswith("2 .txt file(s) not used, see docs/data.md: 'a.txt', 'b.txt'")
