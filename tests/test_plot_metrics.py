"""tools/plot_metrics.py: what stands in metrics.jsonl is what the image shows."""

import json
import math

import pytest
from PIL import Image, ImageColor

import plot_metrics  # isort: skip  (tools/, which conftest puts on the path)


def write_run(folder, rows) -> str:
    """An output folder with these metrics."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def rows_of(steps: int, loss, **more) -> list[dict]:
    """Lines of metrics with `loss(step)`."""
    return [{"step": step, "loss": loss(step), "lr": 1e-4, **more} for step in range(1, steps + 1)]


def colours_at(image: Image.Image, box: tuple[int, int, int, int]) -> set[tuple[int, int, int]]:
    """The colours of an image inside (left, top, right, bottom)."""
    return {colour for _, colour in image.crop(box).getcolors(10**6)}


def test_curves_run_through_their_values_and_runs_have_colours_of_their_own(tmp_path, capsys):
    low = write_run(tmp_path / "low", rows_of(400, lambda step: 0.2))
    high = write_run(tmp_path / "high", rows_of(400, lambda step: 0.8))
    plot_metrics.main([low, high, "--out", str(tmp_path / "out.png")])
    assert capsys.readouterr().out == f"{tmp_path / 'out.png'}: 2 run(s), 400 steps\n"
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (plot_metrics.WIDTH, 2 * plot_metrics.HEIGHT)  # no loss at validations, no panel of it
        first, second = (ImageColor.getrgb(colour) for colour in plot_metrics.COLOURS[:2])
        middle = (plot_metrics.TOP + plot_metrics.HEIGHT - plot_metrics.BOTTOM) // 2
        above = colours_at(image, (200, plot_metrics.TOP, 800, middle))
        below = colours_at(image, (200, middle, 800, plot_metrics.HEIGHT - plot_metrics.BOTTOM))
    assert first in below - above and second in above - below


def test_the_running_mean_forgets_and_starts_at_the_first_value():
    points = [(step, float(step > 100)) for step in range(1, 301)]
    smooth = dict(plot_metrics.running_mean(points))
    assert smooth[1] == smooth[100] == 0.0 and smooth[300] == pytest.approx(1.0, abs=0.03)
    assert plot_metrics.running_mean([(7, 3.0)]) == [(7, 3.0)]
    values = [(1, 1.0), (2, 3.0)]
    assert plot_metrics.running_mean(values)[1][1] == pytest.approx((0.98 * 1.0 + 3.0) / 1.98)


def test_values_that_are_not_finite_and_a_line_that_is_being_written_are_left_out(tmp_path, capsys):
    folder = tmp_path / "run"
    write_run(folder, rows_of(3, lambda step: math.nan if step == 2 else 0.5))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    rows = plot_metrics.read_metrics(folder)
    assert plot_metrics.series(rows, "loss") == [(1, 0.5), (3, 0.5)]
    assert capsys.readouterr().err == f"{folder / 'metrics.jsonl'}: line 4 is incomplete and is skipped\n"
    plot_metrics.main([str(folder), "--out", str(tmp_path / "out.png")])


def test_one_outlier_does_not_flatten_the_curve():
    raw = [(step, 9999.0 if step == 50 else 0.5 + 0.001 * (step % 7)) for step in range(1, 301)]
    low, high = plot_metrics.value_range([plot_metrics.Curve("", "#000000", raw, faint=True)])
    assert 0.4 < low < 0.5 and 0.506 < high < 0.6


@pytest.mark.scripts("t2i")
@pytest.mark.e2e
def test_a_runs_own_metrics_are_drawn_with_its_loss_at_validations(train, tmp_path):
    folder = train("--validation_prompt", "a toy", "--validation_steps", "1", "--num_inference_steps", "1",
                   "--num_validation_images", "1", "--max_train_steps", "2")  # fmt: skip
    panels = plot_metrics.make_panels({"out": plot_metrics.read_metrics(folder)})
    assert [*panels] == ["training loss", "validation_loss", "learning rate"]
    assert [len(curve.points) for curves in panels.values() for curve in curves] == [2, 2, 2, 2]
    plot_metrics.main([str(folder), "--out", str(tmp_path / "out.png")])
    with Image.open(tmp_path / "out.png") as image:
        assert image.height == 3 * plot_metrics.HEIGHT


def test_folders_without_metrics_are_told_in_one_line(tmp_path):
    for content, message in ((None, "has no metrics.jsonl; give the --output_dir of a run"), ("", "is empty; the run")):
        if content is not None:
            (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(SystemExit, match=f"^error: {tmp_path}.*{message}"):
            plot_metrics.main([str(tmp_path), "--out", str(tmp_path / "out.png")])
    assert not (tmp_path / "out.png").exists()
