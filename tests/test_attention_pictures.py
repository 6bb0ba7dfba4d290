import numpy as np
import pytest
from components import make_clip
from PIL import Image, ImageDraw

from rvedit_diffusers.attention_pictures import (
    GAP,
    LEFT,
    OUTLINE,
    RAMP,
    Column,
    HeatMap,
    draw_attention_clip,
    number,
    paint,
    write_attention_picture,
)
from rvedit_diffusers.video import write_video


NUM_FRAMES = 5
LABEL = ("text", "share of attention")


def make_column(value=1.0, title="a pipeline", label=LABEL):
    values = np.zeros((NUM_FRAMES, 2, 2), np.float32)
    values[:, 0, 1] = value
    outline = np.zeros((NUM_FRAMES, 2, 2), bool)
    outline[:, 1, 0] = True
    return Column(title, make_clip(seed=1), outline, {label: HeatMap(values, "%", ["0 to 1"])})


def test_colours_lie_over_the_grey_frame():
    frame = np.full((8, 8, 3), (90, 0, 0), np.uint8)
    picture = paint(frame, np.float32([[0, 2], [1, 0]]), 2.0, np.zeros((2, 2), bool))
    assert picture.dtype == np.uint8
    assert (picture[:4, :4] == (0.8 * 30 + 0.2 * RAMP[0]).round()).all()
    assert (picture[:4, 4:] == (0.2 * 30 + 0.8 * RAMP[-1]).round()).all()
    assert picture[:4, :4].sum() < picture[4:, :4].sum() < picture[:4, 4:].sum()


def test_outline_runs_inside_of_its_places():
    picture = paint(np.zeros((8, 8, 3), np.uint8), np.zeros((2, 2)), 0.0, np.array([[False, True], [False, True]]))
    is_outlined = (picture == OUTLINE).all(-1)
    assert is_outlined[:, 4].all()  # the edges of the frame are none
    assert not is_outlined[:, [0, 1, 2, 3, 5, 6, 7]].any()


@pytest.mark.parametrize("num_notes", [0, 3, 4])
def test_texts_of_a_wide_clip_do_not_overlap(tmp_path, monkeypatch, num_notes):
    boxes, text = [], ImageDraw.ImageDraw.text

    def record(self, xy, string, *args, **kwargs):
        boxes.append(self.textbbox(xy, string, kwargs["font"], kwargs.get("anchor")))
        text(self, xy, string, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    heat = HeatMap(np.ones((NUM_FRAMES, 2, 2), np.float32), "%", ["changed: 1"] * num_notes)
    column = Column("a pipeline", make_clip(height=32, width=96), np.zeros((NUM_FRAMES, 2, 2), bool), {LABEL: heat})
    write_attention_picture(tmp_path / "a.png", "a title", make_clip(height=32, width=96), [column])
    for index, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:index]:
            assert left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1]


def test_picture_has_a_row_for_source_edit_and_map(tmp_path):
    source, column = make_clip(), make_column()
    write_attention_picture(tmp_path / "a.png", "a title", source, [column], num_frames=3)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    cell, top = 128, 68
    for row, frames in enumerate((source, column.edited)):
        for at, frame in enumerate((0, 2, 4)):
            y, x = top + row * (cell + GAP), LEFT + at * (cell + GAP)
            expected = Image.fromarray(frames[frame]).resize((cell, cell), Image.Resampling.BICUBIC)
            assert np.array_equal(picture[y : y + cell, x : x + cell], expected)
    y = top + 2 * (cell + GAP)
    heat = picture[y : y + cell, LEFT : LEFT + cell]
    assert (heat[0, -1] > heat[0, 0]).all()
    assert (heat == OUTLINE).all(-1).any()


def test_pipelines_share_a_scale(tmp_path):
    sides = [make_column(1.0), make_column(4.0)]
    clip = draw_attention_clip(make_clip(), sides)
    alone = draw_attention_clip(make_clip(), sides[:1])
    height = clip.shape[1] // 2
    corner = (98, 2 * 230 + 223)  # of the map's brightest place
    weak, strong = clip[0, corner[0], corner[1]], clip[0, height + corner[0], corner[1]]
    assert (weak < strong).all()
    assert np.array_equal(alone[0, corner[0], corner[1]], strong)


def test_clip_shows_every_frame_at_an_even_size():
    source = make_clip(NUM_FRAMES, 33, 47)
    column = Column("", make_clip(NUM_FRAMES, 33, 47, seed=1), make_column().outline, make_column().maps)
    clip = draw_attention_clip(source, [column])
    assert clip.dtype == np.uint8
    assert clip.shape[0] == NUM_FRAMES
    assert clip.shape[1] % 2 == clip.shape[2] % 2 == 0
    still = draw_attention_clip(np.repeat(source[:1], NUM_FRAMES, 0), [column])
    for frames in (clip, still):  # the edit and its map move where the source does not
        assert len({frame.tobytes() for frame in frames}) == NUM_FRAMES
    column.edited[:] = column.edited[0]
    assert len({frame.tobytes() for frame in draw_attention_clip(source, [column])}) == NUM_FRAMES


def test_many_maps_take_further_rows(tmp_path):
    """Of a model of 30 blocks; H.264 knows no wider frames."""
    column = make_column()
    heat = next(iter(column.maps.values()))
    column.maps.update({(f"block {number}", "text"): heat for number in range(80)})
    clip = draw_attention_clip(make_clip(), [column])
    assert clip.shape[2] <= 16384 and clip.shape[1] == 2 * draw_attention_clip(make_clip(), [make_column()]).shape[1]
    second = clip[:, clip.shape[1] // 2 :]
    assert (second[:, 98:, :230] != 255).any() and (second[:, 98:, -230:] == 255).all()  # the last row is not full
    write_video(tmp_path / "a.mp4", clip[:1], 8)


def test_map_that_a_pipeline_lacks(tmp_path):
    other = make_column(label=("visual tokens", "share of attention"))
    clip = draw_attention_clip(make_clip(), [make_column(), other])
    height = clip.shape[1] // 2
    assert (clip[:, :height, 3 * 230 :] == 255).all()
    assert (clip[:, height:, 2 * 230 : 3 * 230] == 255).all()
    write_attention_picture(tmp_path / "a.png", "", make_clip(), [make_column(), other])
    alone = Image.open(tmp_path / "a.png").size
    write_attention_picture(tmp_path / "a.png", "", make_clip(), [make_column(), make_column()])
    assert alone[1] == Image.open(tmp_path / "a.png").size[1] + 128 + GAP


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.012"), (12.3, "12"), (99.7, "100"), (123.4, "123"), (float("nan"), "-")],
)
def test_numbers(value, text):
    assert number(value) == text
