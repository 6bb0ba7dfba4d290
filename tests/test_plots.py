import json

import pytest

from rvedit_diffusers.training import plots


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a log of these entries, and of text behind them, and returns the panels by their titles."""

    def draw(*entries, end=""):
        log, path = tmp_path / "log.jsonl", tmp_path / "losses.png"
        log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(plots.plt, "close", figures.append)
            plots.plot_losses(log, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        plots.plt.close(figures[0])
        return {axis.get_title(): axis for axis in figures[0].axes if axis.axison}

    return draw


def lines(axis):
    """The points of each line by its label."""
    return {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axis.lines}


def test_what_belongs_together_shares_a_panel(draw):
    panels = draw(
        {"step": 20, "flow": 2.0, "flow_sigma_0.00-0.25": 1.0, "lr": 1e-3, "validation_flow": 3.0},
        {"step": 40, "flow": 1.5, "flow_sigma_0.75-1.00": 2.0, "lr": 2e-3, "validation_flow_sigma_0.1": 4.0},
    )
    assert {title: lines(axis) for title, axis in panels.items()} == {
        "flow matching loss": {"flow": [(20, 2.0), (40, 1.5)], "validation flow": [(20, 3.0)]},
        "flow matching loss by noise level": {
            "flow sigma 0.00-0.25": [(20, 1.0)],
            "flow sigma 0.75-1.00": [(40, 2.0)],
        },
        "held-out loss by noise level": {"validation flow sigma 0.1": [(40, 4.0)]},
        "learning rate": {"lr": [(20, 1e-3), (40, 2e-3)]},
    }


def test_each_line_of_a_shared_panel_is_named(draw):
    panels = draw({"step": 20, "flow": 2.0, "validation_flow": 3.0, "lr": 1e-3})
    assert [text.get_text() for text in panels["flow matching loss"].get_legend().texts] == ["flow", "validation flow"]
    assert panels["learning rate"].get_legend() is None


def test_what_no_panel_is_for_is_left_out(draw):
    panels = draw({"step": 20, "flow": 2.0, "epoch": 0.5, "progress": 0.5, "my_term": 3, "note": "warm", "lr": True})
    assert list(panels) == ["flow matching loss"]


@pytest.mark.parametrize("last, titles", [(0, []), (1, ["steps skipped"])])
def test_a_panel_that_would_be_all_zero_is_left_out(draw, last, titles):
    panels = draw({"step": 20, "flow": 2.0, "nonfinite": 0}, {"step": 40, "flow": 1.5, "nonfinite": last})
    assert list(panels) == ["flow matching loss", *titles]


def test_the_ceiling_is_dashed_in_the_panel_of_the_information(draw):
    panels = draw(
        {"step": 20, "align": 4.0, "information_nats": 0.5, "information_ceiling_nats": 4.5},
        {"step": 40, "align": 3.5, "information_nats": 1.0, "information_ceiling_nats": 4.5},
    )
    styles = {line.get_label(): line.get_linestyle() for line in panels["mutual information, nats"].lines}
    assert styles == {"information nats": "-", "information ceiling nats": "--"}


def test_gradient_norms_alone_are_logarithmic(draw):
    panels = draw({"step": 20, "flow": 2.0, "gradient_norm": 1.0, "gradient_norm_flow": 10.0, "lr": 1e-3})
    assert {title for title, axis in panels.items() if axis.get_yscale() == "log"} == {"gradient norms"}


def test_a_last_line_that_was_cut_off_is_passed_over(draw):
    panels = draw({"step": 20, "flow": 2.0}, {"step": 40, "flow": 1.5}, end='{"step": 60, "flow": 1.')
    assert lines(panels["flow matching loss"]) == {"flow": [(20, 2.0), (40, 1.5)]}


@pytest.mark.parametrize("entries", [[], [{"step": 20, "epoch": 0.5, "nonfinite": 0, "note": "warm"}]])
def test_a_log_with_nothing_to_draw_is_named(draw, entries):
    with pytest.raises(ValueError, match="`log`.*log.jsonl"):
        draw(*entries)


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="log.jsonl"):
        plots.plot_losses(tmp_path / "log.jsonl", tmp_path / "losses.png")
