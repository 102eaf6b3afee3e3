"""Folders, metadata files and `datasets`: what is listed, what is refused, and that nothing is read twice."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from conftest import draw_photo
from PIL import Image
from unit_parts import caption_of, check_samples, log_lines


def fill(folder: Path, *names: str) -> Path:
    """A folder with one small photograph per name."""
    for seed, name in enumerate(names):
        draw_photo(folder / name, (40, 32), seed)
    return folder


def arguments(script, *flags) -> object:
    """The parsed command line without its checks: the functions under test see folders only."""
    return script.build_parser().parse_args([str(word) for word in flags])


def listed(script, folder: Path, *flags) -> dict[str, str | None]:
    """{name: caption or None} of a folder, in the order of the list."""
    found = script.list_samples(arguments(script, "--instance_data_dir", folder, *flags))
    return {row.image.name: caption_of(row) for row in found}


# ---- folders ----


def test_a_folder_lists_images_only_and_sorted(script, tmp_path):
    """Whatever order the disk has; in subfolders too."""
    fill(tmp_path, "b.jpg", "a.PNG", "sub/0.jpeg", "c.webp")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "Thumbs.db").write_bytes(b"\0")
    (tmp_path / "a-folder.jpg").mkdir()
    assert list(listed(script, tmp_path)) == ["a.PNG", "b.jpg", "c.webp", str(Path("sub/0.jpeg"))]


def test_hidden_files_and_folders_are_skipped(script, tmp_path):
    """What `snapshot_download`, macOS and network drives leave; a hidden folder above is no reason to find nothing."""
    data = fill(tmp_path / ".hidden" / "data", "a.jpg", ".cache/huggingface/b.jpg", "._c.jpg", "@eaDir/a.jpg/thumb.jpg")
    (data / ".DS_Store").write_bytes(b"\0")
    assert list(listed(script, data)) == ["a.jpg"]


def test_the_drawn_photographs_are_all_listed_without_a_caption(script, photos):
    """The fixture of every other test: five photographs beside a .cache folder and a .DS_Store."""
    assert listed(script, photos) == {f"{number:02d}.jpg": None for number in range(5)}


def test_an_empty_folder_is_an_error_that_names_the_suffixes(script, tmp_path):
    """Only hidden images are none."""
    fill(tmp_path, ".cache/a.jpg")
    with pytest.raises(script.UserError, match=r"has no image \(.*\.jpg.*\.png") as error:
        listed(script, tmp_path)
    assert str(tmp_path) in str(error.value)


def test_captions_beside_the_images_are_read(script, tmp_path):
    """NAME.txt before NAME.caption, blanks stripped, a byte order mark dropped, an empty file is no caption."""
    fill(tmp_path, "a.jpg", "b.png", "c.jpg", "d.jpg")
    (tmp_path / "a.txt").write_bytes("\ufeff  ein Hündchen \n".encode())
    (tmp_path / "a.caption").write_text("the second choice")
    (tmp_path / "b.caption").write_text("a cat")
    (tmp_path / "c.txt").write_text(" \n")
    with log_lines(logging.WARNING) as lines:
        assert listed(script, tmp_path) == {"a.jpg": "ein Hündchen", "b.png": "a cat", "c.jpg": None, "d.jpg": None}
    assert "1 .caption file(s) not used, see docs/data.md: 'a.caption'" in lines[0]


def test_a_caption_that_is_not_utf8_is_an_error_with_its_path(script, tmp_path):
    """Latin-1 from an old editor."""
    fill(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes("Hündchen".encode("latin-1"))
    with pytest.raises(script.UserError, match=r"a\.txt: cannot be read as UTF-8"):
        listed(script, tmp_path)


# ---- metadata files ----


def write_jsonl(folder: Path, *rows: object) -> None:
    """metadata.jsonl with the rows, a blank line between them."""
    (folder / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def test_metadata_jsonl_gives_the_captions(script, tmp_path):
    """In subfolders and with './' too; an image that the file does not name keeps its own caption file."""
    fill(tmp_path, "a.jpg", "b.jpg", "c.jpg", "sub/d.jpg")
    (tmp_path / "c.txt").write_text("from the text file")
    (tmp_path / "a.txt").write_text("not this one")
    rows = [{"file_name": "a.jpg", "text": " one "}, {"file_name": "./b.jpg", "text": "two"}]
    write_jsonl(tmp_path, *rows, {"file_name": "sub/d.jpg", "text": "four"})
    assert list(listed(script, tmp_path).values()) == ["one", "two", "from the text file", "four"]


def test_a_metadata_row_ends_at_a_newline_only(script, tmp_path):
    """JSON may hold a line separator of Unicode as it is, and pasted captions do."""
    fill(tmp_path, "a.jpg")
    row = json.dumps({"file_name": "a.jpg", "text": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row + "\r\n", encoding="utf-8")
    assert listed(script, tmp_path) == {"a.jpg": "one\u2028two\x85three"}


def test_metadata_csv_gives_the_captions(script, tmp_path):
    """Quoted commas and newlines, a byte order mark from Excel, a short row."""
    fill(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "metadata.csv").write_bytes('\ufefffile_name,caption\na.jpg,"a, b\nc"\nb.jpg\n'.encode())
    assert listed(script, tmp_path) == {"a.jpg": "a, b\nc", "b.jpg": None}


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_the_usual_caption_columns_are_found(script, tmp_path, column):
    """Without --caption_column."""
    fill(tmp_path, "a.jpg")
    write_jsonl(tmp_path, {"file_name": "a.jpg", "other": "no", column: "yes"})
    assert listed(script, tmp_path) == {"a.jpg": "yes"}


def test_the_caption_column_that_is_asked_for_is_taken(script, tmp_path):
    """Even beside a usual one."""
    fill(tmp_path, "a.jpg")
    write_jsonl(tmp_path, {"file_name": "a.jpg", "text": "no", "long": "yes"})
    assert listed(script, tmp_path, "--caption_column", "long") == {"a.jpg": "yes"}


def test_a_missing_caption_column_is_an_error_that_names_the_columns(script, tmp_path):
    """Of the metadata file."""
    fill(tmp_path, "a.jpg")
    write_jsonl(tmp_path, {"file_name": "a.jpg", "text": "x", "style": "y"})
    with pytest.raises(script.UserError, match="--caption_column txt: .*columns: file_name, text, style"):
        listed(script, tmp_path, "--caption_column", "txt")


@pytest.mark.parametrize(
    "content",
    [b'{"file_name": "a.jpg"', b'{"text": "no name"}', b'["a.jpg"]', b'{"file_name": 5}', b'{"file_name": ""}',
     b'{"file_name": "a.jpg", "text": "\xff"}', b'"a.jpg"'],
)  # fmt: skip
def test_bad_metadata_is_an_error_with_its_path(script, tmp_path, content):
    """Broken JSON, no file name, a row that is no object, a name that is no text, not UTF-8."""
    fill(tmp_path, "a.jpg")
    (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(script.UserError, match=r"metadata\.jsonl"):
        listed(script, tmp_path)


def test_a_metadata_csv_without_file_names_is_an_error_with_its_path(script, tmp_path):
    """The column is called otherwise."""
    fill(tmp_path, "a.jpg")
    (tmp_path / "metadata.csv").write_text("photo,text\na.jpg,x\n")
    with pytest.raises(script.UserError, match=r"metadata\.csv, every row needs a 'file_name'"):
        listed(script, tmp_path)


@pytest.mark.parametrize("name", ["../secret.jpg", "sub/../../secret.jpg", "/etc/hostname"])
def test_metadata_cannot_lead_out_of_the_folder(script, tmp_path, name):
    """Neither with .. nor with an absolute path, to a file that exists."""
    data = fill(tmp_path / "data", "a.jpg", "sub/b.jpg")
    fill(tmp_path, "secret.jpg")
    write_jsonl(data, {"file_name": name, "text": "x"})
    with pytest.raises(script.UserError, match="leads out of the folder") as error:
        listed(script, data)
    assert name in str(error.value)


def test_a_metadata_row_without_a_file_is_an_error_that_names_it(script, tmp_path):
    """An image that was deleted."""
    fill(tmp_path, "a.jpg")
    write_jsonl(tmp_path, {"file_name": "gone.jpg", "text": "x"})
    with pytest.raises(script.UserError, match=r"'gone\.jpg' leads out of the folder or does not exist"):
        listed(script, tmp_path)


# ---- captions ----


def settled(script, captions: dict[str, str | None], prompt: str | None = None) -> list[str]:
    """The captions after --instance_prompt was applied."""
    flags = ["--instance_prompt", prompt] if prompt else []
    rows = [script.Sample(script.Image(name), (caption,) if caption else ()) for name, caption in captions.items()]
    return [caption_of(row) for row in script.fill_captions(arguments(script, *flags), rows)]


def test_the_instance_prompt_is_the_caption_of_images_without_one(script):
    """Those that have one keep it, and the log names the others."""
    with log_lines() as lines:
        assert settled(script, {"a.jpg": "a cat", "b.jpg": None}, "sks toy") == ["a cat", "sks toy"]
    assert any("no caption" in line and "b.jpg" in line and "a.jpg" not in line for line in lines)


def test_a_missing_caption_without_an_instance_prompt_is_an_error_that_names_the_images(script):
    """And says the flag that helps."""
    with pytest.raises(script.UserError, match=r"--instance_prompt: required.*b\.jpg, c\.jpg"):
        settled(script, {"a.jpg": "a cat", "b.jpg": None, "c.jpg": None})


def test_captions_everywhere_need_no_instance_prompt(script):
    """And one that is given is said to be unused."""
    assert settled(script, {"a.jpg": "a cat"}) == ["a cat"]
    with log_lines() as lines:
        assert settled(script, {"a.jpg": "a cat"}, "sks toy") == ["a cat"]
    assert any("--instance_prompt is not used" in line for line in lines)


def test_the_trigger_is_replaced_by_the_instance_prompt(script):
    """Every time it stands there, and it is not called unused then."""
    with log_lines() as lines:
        assert settled(script, {"a.jpg": "[trigger] and [trigger]"}, "sks toy") == ["sks toy and sks toy"]
    assert not any("not used" in line for line in lines)


def test_a_trigger_without_an_instance_prompt_is_an_error_that_names_the_image(script):
    """Otherwise the word [trigger] would be trained."""
    with pytest.raises(script.UserError, match=r"--instance_prompt: required.*\[trigger\].*a\.jpg"):
        settled(script, {"a.jpg": "[trigger] on a table"})


# ---- datasets ----


def parquet(folder: Path, photos: Path) -> Path:
    """A folder with a parquet file of five rows: image, caption, label."""
    import datasets

    rows = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.glob("*.jpg"))],
        "label": list(range(5)),
        "words": ["one", " two ", "", None, "five"],
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"), words=datasets.Value("string"))
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory, photos) -> Path:
    """The parquet data set, written once."""
    return parquet(tmp_path_factory.mktemp("parquet"), photos)


def list_table(script, tmp_path: Path, name: Path, *flags) -> list:
    """The rows of a data set by --dataset_name, with a cache of this test's own."""
    return script.list_samples(arguments(script, "--dataset_name", name, "--cache_dir", tmp_path / "cache", *flags))


def test_a_parquet_data_set_gives_the_bytes_and_captions_of_its_rows(script, tmp_path, table, photos):
    """Undecoded, in order; empty captions are none."""
    rows = list_table(script, tmp_path, table, "--image_column", "image", "--caption_column", "words")
    assert [caption_of(row) for row in rows] == ["one", "two", None, None, "five"]
    assert [row.image.read() for row in rows] == [path.read_bytes() for path in sorted(photos.glob("*.jpg"))]
    assert rows[3].image.name == "row 3"


def test_a_data_set_without_a_caption_column_has_no_captions(script, tmp_path, table):
    """The columns of a hub data set mean what its author wanted: none is guessed."""
    rows = list_table(script, tmp_path, table, "--image_column", "image")
    assert [caption_of(row) for row in rows] == [None] * 5


@pytest.mark.parametrize("flag", ["image_column", "caption_column"])
def test_a_wrong_column_is_an_error_that_names_the_columns(script, tmp_path, table, flag):
    """Before an image is touched."""
    columns = {"image_column": "image", "caption_column": "words", flag: "txt"}
    flags = [word for name, value in columns.items() for word in (f"--{name}", value)]
    with pytest.raises(script.UserError, match=f"--{flag} txt: not in .*columns: image, label, words"):
        list_table(script, tmp_path, table, *flags)


def test_an_image_folder_with_metadata_loads_as_a_data_set(script, tmp_path, photos):
    """The `imagefolder` builder, by the name of the folder."""
    data = tmp_path / "folder"
    for number in range(3):
        (data / "train").mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / f"0{number}.jpg", data / "train")
    write_jsonl(data / "train", *({"file_name": f"0{number}.jpg", "text": f"photo {number}"} for number in range(3)))
    rows = list_table(script, tmp_path, data, "--caption_column", "text")
    assert [caption_of(row) for row in rows] == ["photo 0", "photo 1", "photo 2"]
    assert [row.image.read() for row in rows] == [(photos / f"0{number}.jpg").read_bytes() for number in range(3)]


def test_a_column_that_holds_no_images_is_an_error_that_names_it(script, tmp_path, table):
    """A number cannot be cast to an image."""
    with pytest.raises(script.UserError, match="column label holds no images"):
        list_table(script, tmp_path, table, "--image_column", "label")


@pytest.mark.parametrize("content", [None, b"not parquet"], ids=["no such folder", "damaged"])
def test_a_data_set_that_cannot_be_loaded_is_an_error_with_its_name(script, tmp_path, content):
    """A wrong path, or a damaged file."""
    data = tmp_path / "data"
    if content is not None:
        data.mkdir()
        (data / "train.parquet").write_bytes(content)
    with pytest.raises(script.UserError, match=f"--dataset_name {data}"):
        list_table(script, tmp_path, data)


# ---- the index of checked images ----


@pytest.fixture
def counted(script, monkeypatch) -> dict[str, int]:
    """Counts how often a file is read and how often one is decoded."""
    counts = {"read": 0, "decoded": 0}
    read, decode = script.Image.read, script.decode_image

    def counting_read(image):
        counts["read"] += 1
        return read(image)

    def counting_decode(*given):
        counts["decoded"] += 1
        return decode(*given)

    monkeypatch.setattr(script.Image, "read", counting_read)
    monkeypatch.setattr(script, "decode_image", counting_decode)
    return counts


def check(script, folder: Path, cache: Path, *flags) -> list:
    """Lists a folder and checks its images, as a start of the script does."""
    args = arguments(script, "--instance_data_dir", folder, *flags)
    return [sample.image for sample in check_samples(script, args, cache)]


def test_the_second_start_neither_reads_nor_decodes_unchanged_images(script, tmp_path, photos, counted):
    """And says the same of them."""
    first = check(script, photos, tmp_path)
    assert counted == {"read": 5, "decoded": 5}
    assert check(script, photos, tmp_path) == first
    assert counted == {"read": 5, "decoded": 5}


def test_the_index_knows_the_size_of_a_image_as_a_viewer_shows_it(script, tmp_path, photos):
    """(height, width) after the EXIF rotation, and the SHA-256 of the file: 01 lies on its side."""
    good = {image.name: (image.sha256, image.size) for image in check(script, photos, tmp_path)}
    assert [size for _, size in good.values()] == [(128, 96), (128, 96), (128, 128), (120, 200), (90, 160)]
    assert good["00.jpg"][0] == hashlib.sha256((photos / "00.jpg").read_bytes()).hexdigest()


def test_a_changed_image_is_read_and_decoded_again(script, tmp_path, counted):
    """Only that one."""
    data = fill(tmp_path / "data", "a.jpg", "b.jpg")
    before = check(script, data, tmp_path / "cache")
    draw_photo(data / "b.jpg", (60, 50), 7)
    after = check(script, data, tmp_path / "cache")
    assert counted == {"read": 3, "decoded": 3}
    assert after[0] == before[0] and after[1].sha256 != before[1].sha256 and after[1].size == (50, 60)


@pytest.mark.skipif(os.name == "nt", reason="of POSIX: the time of the last change of a file")
def test_an_image_of_the_same_size_and_time_is_read_again(script, tmp_path):
    """Programs that unpack archives set the times."""
    data = fill(tmp_path / "data", "a.jpg", "b.jpg")
    for path, colour in ((data / "a.bmp", "red"), (data / "b.bmp", "blue")):
        Image.new("RGB", (64, 64), colour).save(path)
        os.utime(path, (10**9, 10**9))
    before = {image.name: image.sha256 for image in check(script, data, tmp_path / "cache")}
    for old, new in (("a.bmp", "c"), ("b.bmp", "a.bmp"), ("c", "b.bmp")):
        (data / old).rename(data / new)
    after = {image.name: image.sha256 for image in check(script, data, tmp_path / "cache")}
    assert (after["a.bmp"], after["b.bmp"]) == (before["b.bmp"], before["a.bmp"])


def test_known_content_under_another_name_is_read_but_not_decoded_again(script, tmp_path, counted):
    """A renamed file, or a copy of the data."""
    data = fill(tmp_path / "data", "a.jpg", "b.jpg")
    before = check(script, data, tmp_path / "cache")
    (data / "a.jpg").rename(data / "z.jpg")
    after = check(script, data, tmp_path / "cache")
    assert counted == {"read": 3, "decoded": 2}
    assert (after[1].name, after[1].size) == ("z.jpg", before[0].size)


def test_a_refusal_is_remembered_too(script, tmp_path, counted):
    """A bad image is not decoded at every start, and is still refused."""
    data = fill(tmp_path / "data", "a.jpg")
    (data / "bad.jpg").write_bytes(b"not an image")
    for _ in range(2):
        with pytest.raises(script.UserError, match=r"bad\.jpg: not an image"):
            check(script, data, tmp_path / "cache")
    assert counted == {"read": 2, "decoded": 2}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b'{"decoder 2": {"0": []}}',
        b'{"POLICY": null}',
        b'{"POLICY": {"0": null}}',
        b'{"POLICY": {"0": ["", 1, 2]}}',
    ],
)
def test_a_damaged_or_outdated_index_is_begun_anew(script, tmp_path, photos, counted, content):
    """It is a cache: losing it costs time only."""
    policy = f"masks, decoder {script.DECODE_POLICY}".encode()
    (tmp_path / "checked_images.json").write_bytes(content.replace(b"POLICY", policy))
    assert len(check(script, photos, tmp_path)) == 5
    assert counted["decoded"] == 5
    check(script, photos, tmp_path)
    assert counted["decoded"] == 5


def test_a_new_decode_policy_checks_every_image_again(script, tmp_path, photos, counted, monkeypatch):
    """Sizes and refusals of the old policy may be wrong under the new one."""
    check(script, photos, tmp_path)
    monkeypatch.setattr(script, "DECODE_POLICY", script.DECODE_POLICY + 1)
    check(script, photos, tmp_path)
    assert counted["decoded"] == 10


def spoil(folder: Path) -> Path:
    """Three good images, one of them a link, and three bad ones, each with a fault of its own."""
    fill(folder, "a.jpg", "e.jpg")
    (folder / "b.jpg").write_bytes(b"")
    (folder / "c.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "d.png").write_bytes(b"hello")
    (folder / "f.jpg").symlink_to(folder / "a.jpg")
    return folder


def test_one_error_lists_every_bad_image_with_its_reason(script, tmp_path):
    """All at once, so that one start is enough to mend them."""
    data = spoil(tmp_path / "data")
    with pytest.raises(script.UserError) as error:
        check(script, data, tmp_path / "cache")
    message = str(error.value)
    assert "--on_bad_image skip" in message
    reasons = {"b.jpg": "empty file", "c.jpg": "truncated", "d.png": "not an image"}
    assert all(
        any(name in line and reason in line for line in message.splitlines()) for name, reason in reasons.items()
    )
    assert "a.jpg" not in message and "e.jpg" not in message


def test_skip_trains_on_the_rest_and_names_what_is_skipped(script, tmp_path):
    """--on_bad_image skip."""
    with log_lines() as lines:
        good = check(script, spoil(tmp_path / "data"), tmp_path / "cache", "--on_bad_image", "skip")
    assert [image.name for image in good] == ["a.jpg", "e.jpg", "f.jpg"]
    assert any("skipped" in line and all(name in line for name in ("b.jpg", "c.jpg", "d.png")) for line in lines)


def test_skipping_everything_is_an_error(script, tmp_path):
    """There would be nothing to train on."""
    data = fill(tmp_path / "data", "a.jpg")
    (data / "a.jpg").write_bytes(b"")
    with pytest.raises(script.UserError, match=r"a\.jpg: empty file"):
        check(script, data, tmp_path / "cache", "--on_bad_image", "skip")


def test_a_image_that_vanishes_is_a_bad_image_and_no_crash(script, tmp_path):
    """Deleted between the listing and the check."""
    data = fill(tmp_path / "data", "a.jpg", "b.jpg")
    args = arguments(script, "--instance_data_dir", data)
    images = [sample.image for sample in script.list_samples(args)]
    (data / "b.jpg").unlink()
    good, bad = script.inspect_images(images, tmp_path / "cache")
    assert good[images[0]].size and bad["b.jpg"].startswith("cannot be read ([Errno 2] No such file")


@pytest.mark.parametrize("name", ["reg", "Regularization", "regularisation_images", "class_images"])
def test_class_images_among_the_images_are_told_by_their_folder(script, tmp_path, name):
    """They would be trained on as the subject."""
    fill(tmp_path, "img/a.jpg", f"{name}/b.jpg", "classic/c.jpg")
    with log_lines(logging.WARNING) as lines:
        listed(script, tmp_path)
    assert [line for line in lines if "class" in line] == [
        "data: 1 image(s) lie in a folder for class images but are trained on; "
        f"move them away: {tmp_path.name}/{name}/b.jpg"
    ]


def test_a_list_of_bad_images_ends_after_twenty_with_the_count_of_the_rest(script, tmp_path):
    for number in range(31):
        (tmp_path / f"{number:02d}.jpg").write_bytes(b"x")
    with pytest.raises(script.UserError) as error:
        check(script, tmp_path, tmp_path / "cache")
    first, *lines, last = str(error.value).splitlines()
    assert first.startswith("31 image(s)") and "19.jpg" in lines[-1] and last == "    and 11 more"


def test_a_file_of_yours_in_the_cache_folder_is_not_written_over(script, tmp_path, photos):
    """`index.json` is a name that others use."""
    (tmp_path / "index.json").write_text("mine")
    check(script, photos, tmp_path)
    assert (tmp_path / "index.json").read_text() == "mine"
