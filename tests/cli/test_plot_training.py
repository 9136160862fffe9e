"""Curves of training runs as a picture and a page."""

import json

import pytest
from matplotlib.image import imread

from vita_audio.cli.plot_training import draw, main, panels, read_log


def write_run(folder, steps, heads=2, finished=True):
    lines = [
        {"step": step, "loss": 3 / step, "learning_rate": 1e-3, "data/used": 8 * step}
        | {f"mtp_loss_{k}": (k + 2) / step for k in range(heads)}
        for step in range(1, steps + 1)
    ]
    place = folder if finished else folder / f"checkpoint-{steps}"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text(
        json.dumps({"log_history": [*lines, {"step": steps, "train_loss": 1}]})
    )
    if not finished:
        (place / "checkpoint.complete").touch()
    return folder


def test_several_runs_share_the_panels_and_the_page_shows_their_last_step(tmp_path):
    first, second = write_run(tmp_path / "a<b", 5, heads=12), write_run(tmp_path / "other", 9, heads=0)
    main([str(first), str(second), "--out", str(tmp_path / "new/curves"), "--smooth", "3"])
    picture = imread(tmp_path / "new/curves.png")
    assert picture.shape[1] > 1000
    assert picture.min() < picture.max()
    text = (tmp_path / "new/curves.html").read_text()
    assert "data:image/png;base64," in text
    assert "a&lt;b" in text
    assert "<td>step</td><td>5</td><td>9</td>" in text
    logs = {str(run): read_log(run) for run in (first, second)}
    assert panels(logs)["losses of the heads"] == [f"mtp_loss_{k}" for k in range(12)]


def test_a_curve_holds_every_step_and_is_averaged_on_request(tmp_path):
    logs = {"run": read_log(write_run(tmp_path / "run", 4))}
    plain, smooth = (draw(logs, count).axes[0].lines[0].get_xydata().tolist() for count in (1, 2))
    assert plain == [[1, 3], [2, 1.5], [3, 1], [4, 0.75]]
    assert smooth == [[1, 3], [2, 2.25], [3, 1.25], [4, 0.875]]


def test_a_run_that_still_trains_is_read_from_its_last_checkpoint(tmp_path):
    assert len(read_log(write_run(tmp_path / "run", 3, finished=False))) == 3


def test_folders_without_a_log_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no trainer_state\.json there and no complete checkpoint"):
        main([str(tmp_path / "nothing")])
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        main([str(tmp_path)])
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    with pytest.raises(ValueError, match="holds no step yet"):
        main([str(tmp_path)])
