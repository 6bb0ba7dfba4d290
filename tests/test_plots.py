import json

import pytest

from rvedit_diffusers.training import plots


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a log of these entries and returns the panels by their titles."""

    def draw(*entries):
        log, path = tmp_path / "log.jsonl", tmp_path / "losses.png"
        log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(plots.plt, "close", figures.append)
            plots.plot_losses(log, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        plots.plt.close(figures[0])
        return {axis.get_title(): axis for axis in figures[0].axes}

    return draw


def points(line):
    return [tuple(point) for point in line.get_xydata().tolist()]


def test_every_number_gets_a_panel(draw):
    panels = draw(
        {"step": 20, "progress": 0.5, "lr": 1e-3, "seconds": 7, "flow": 2.0, "note": "warm", "done": False},
        {"step": 40, "progress": 1.0, "lr": 0.0, "seconds": 9, "flow": 1.5, "my_term": 3, "note": None},
    )
    assert {title: [points(line) for line in axis.lines] for title, axis in panels.items()} == {
        "flow": [[(20, 2.0), (40, 1.5)]],
        "my term": [[(40, 3)]],
    }


def test_the_ceiling_is_a_dashed_line_in_the_panel_of_the_information(draw):
    panels = draw(
        {"step": 20, "align": 4.0, "information_nats": 0.5, "information_ceiling_nats": 4.5},
        {"step": 40, "align": 3.5, "information_nats": 1.0, "information_ceiling_nats": 4.5},
    )
    assert list(panels) == ["align", "information nats"]
    assert len(panels["align"].lines) == 1
    information, ceiling = panels["information nats"].lines
    assert points(information) == [(20, 0.5), (40, 1.0)]
    assert ceiling.get_linestyle() == "--" and set(ceiling.get_ydata()) == {4.5}


@pytest.mark.parametrize("entries", [[], [{"step": 20, "lr": 1e-3, "information_ceiling_nats": 4.5, "note": "warm"}]])
def test_a_log_with_nothing_to_draw_is_named(draw, entries):
    with pytest.raises(ValueError, match="`log`.*log.jsonl"):
        draw(*entries)
