"""What is to be seen on a terminal of 80 columns while a run goes on."""

import os
import re
import subprocess
import sys

import pytest
from conftest import draw_photos
from helpers import ROOT, TEXT_TO_IMAGE
from runs import command_line

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="of POSIX: terminals")]


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> list[str]:
    """Every state of every line of a short run, in order, without what moves the cursor."""
    import fcntl
    import struct
    import termios

    tmp, (ours, theirs) = tmp_path_factory.mktemp("terminal"), os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    draw_photos(tmp / "photos", 3)
    words = command_line(ROOT / "tiny_flux2", tmp / "photos", tmp / "out", "--max_train_steps", "20")
    with subprocess.Popen([sys.executable, ROOT / TEXT_TO_IMAGE, *words], stderr=theirs, stdout=theirs) as run:
        os.close(theirs)
        text = b""
        while True:
            try:
                read = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            text += read
        assert run.wait(60) == 0, text.decode()
    os.close(ours)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[\w+", "", text.decode()))


def test_no_bar_is_longer_than_the_terminal_is_wide(screen):
    bars = [line for line in screen if "|" in line]
    assert len(bars) > 10 and [line for line in bars if len(line) > 80] == []


def test_the_bar_of_the_training_says_what_is_left_and_what_its_numbers_are(screen):
    last = [line for line in screen if line.startswith("train: ") and "|" in line][-1]
    assert re.fullmatch(r"train: 20/20 \|.+\| 00:00 left, loss \(running mean\) \d\.\d{4}, lr 1\.0e-04", last), last
    assert any(re.search(r"\| [\d:]+ left, loss", line) for line in screen)


def test_imports_and_models_are_told_before_they_are_loaded(screen):
    told = [line for line in screen if re.match(r"\d\d:\d\d:\d\d INFO    (start|load): ", line)]
    expected = ["start: importing", "load: text_encoder, 0.00 GB", "load: vae, 0.00 GB", "load: transformer, 0.00 GB"]
    assert [line.split("INFO    ")[1].startswith(words) for line, words in zip(told, expected, strict=True)] == [
        True
    ] * 4
