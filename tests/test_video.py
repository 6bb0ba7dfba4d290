import subprocess
from fractions import Fraction

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from rvedit_diffusers.video import _frame_rate, probe_video, read_frames, read_video, write_strip, write_video


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "error", "-y", *arguments]
    process = subprocess.run([str(argument) for argument in command], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def make_clip(path, *options, rate="25", size="64x48", seconds=None, num_frames=12, sound=False):
    sources = ["-f", "lavfi", "-i", f"testsrc=size={size}:rate={rate}"]
    if sound:
        seconds = num_frames / float(Fraction(rate))
        sources += ["-f", "lavfi", "-i", f"sine=frequency=440:sample_rate=48000:duration={seconds}", "-c:a", "aac"]
    ffmpeg(*sources, "-frames:v", num_frames, "-c:v", "libx264", *options, path)
    return path


def streams(path):
    """What ffmpeg itself says about the video: exact rate, coded size, sample aspect ratio and decoded frame count."""
    lines = ffmpeg("-noautorotate", "-i", path, "-map", "0:v:0", "-f", "framecrc", "-").splitlines()
    header = dict(line[1:].split(" 0: ") for line in lines if line.startswith("#") and " 0: " in line)
    num_frames = sum(not line.startswith("#") for line in lines)
    return 1 / Fraction(header["tb"]), header["dimensions"], header["sar"], num_frames


def sound_packets(path):
    lines = ffmpeg("-i", path, "-map", "0:a:0", "-c", "copy", "-f", "framecrc", "-").splitlines()
    return [line.split(",")[5].strip() for line in lines if not line.startswith("#")]


def sound(path):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", path, "-map", "0:a:0"]
    output = subprocess.check_output([*command, "-ac", "1", "-ar", "48000", "-f", "f32le", "-"])
    return np.frombuffer(output, np.float32)


def gradient_frames(num_frames=5, height=48, width=64):
    time, y, x = np.meshgrid(*[np.linspace(0, 1, n) for n in (num_frames, height, width)], indexing="ij")
    return (np.stack([x, y, time], axis=-1) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("rate", ["24000/1001", "25", "30", "30000/1001", "12"])
def test_rate_and_frame_count_survive_exactly(tmp_path, rate):
    clip = read_video(make_clip(tmp_path / "source.mp4", "-pix_fmt", "yuv420p", rate=rate))
    assert clip.fps == Fraction(rate)
    write_video(tmp_path / "edit.mp4", clip.frames, clip.fps)
    assert streams(tmp_path / "edit.mp4") == (Fraction(rate), "64x48", "1/1", 12)


@pytest.mark.parametrize("suffix", [".mp4", ".m4v", ".mov", ".mkv"])
def test_containers(tmp_path, suffix):
    write_video(tmp_path / f"clip{suffix}", gradient_frames(), Fraction(30000, 1001))
    clip = read_video(tmp_path / f"clip{suffix}")
    assert clip.frames.shape == (5, 48, 64, 3)
    assert clip.fps == Fraction(30000, 1001)


def test_float_rate_is_the_nearest_fraction(tmp_path):
    write_video(tmp_path / "clip.mp4", gradient_frames(), 30000 / 1001)
    assert read_video(tmp_path / "clip.mp4").fps == Fraction(30000, 1001)


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (47, 63), (1, 1), (2, 2), (144, 193)])
def test_any_size_is_kept(tmp_path, height, width):
    write_video(tmp_path / "clip.mp4", gradient_frames(3, height, width), 25)
    assert streams(tmp_path / "clip.mp4") == (25, f"{width}x{height}", "1/1", 3)
    assert read_video(tmp_path / "clip.mp4").frames.shape == (3, height, width, 3)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)])
def test_colours_survive_writing_and_reading(tmp_path, height, width):
    frames = gradient_frames(5, height, width)
    write_video(tmp_path / "clip.mp4", frames, 25, crf=4)
    difference = read_video(tmp_path / "clip.mp4").frames.astype(float) - frames
    assert np.abs(difference).mean() < 2
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 1


def test_float_frames_and_lists_of_images_write_the_same_clip(tmp_path):
    frames = gradient_frames()
    write_video(tmp_path / "bytes.mp4", frames, 25)
    write_video(tmp_path / "floats.mp4", (frames / 255).astype(np.float32), 25)
    write_video(tmp_path / "images.mp4", [Image.fromarray(frame) for frame in frames], 25)
    expected = read_video(tmp_path / "bytes.mp4").frames
    assert np.array_equal(read_video(tmp_path / "floats.mp4").frames, expected)
    assert np.array_equal(read_video(tmp_path / "images.mp4").frames, expected)


@pytest.mark.parametrize(
    ("sample_aspect_ratio", "height", "width"), [("128/117", 48, 70), ("2/1", 48, 128), ("1/2", 96, 64)]
)
def test_pixels_are_made_square_by_enlarging(tmp_path, sample_aspect_ratio, height, width):
    path = make_clip(tmp_path / "clip.mp4", "-vf", f"setsar={sample_aspect_ratio}", "-pix_fmt", "yuv420p")
    assert read_video(path).frames.shape == (12, height, width, 3)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_rotation_flag_is_applied(tmp_path, degrees, turns):
    plain = make_clip(tmp_path / "plain.mp4", "-pix_fmt", "yuv444p")
    ffmpeg("-display_rotation", degrees, "-i", plain, "-c", "copy", tmp_path / "turned.mp4")
    expected = np.rot90(read_video(plain).frames, turns, axes=(1, 2))
    assert np.array_equal(read_video(tmp_path / "turned.mp4").frames, expected)


def test_rotation_and_square_pixels_together(tmp_path):
    plain = make_clip(tmp_path / "plain.mp4", "-vf", "setsar=2/1", "-pix_fmt", "yuv420p")
    ffmpeg("-display_rotation", 90, "-i", plain, "-c", "copy", tmp_path / "turned.mp4")
    assert read_video(tmp_path / "turned.mp4").frames.shape == (12, 128, 48, 3)


def test_part_of_a_clip(tmp_path):
    path = make_clip(tmp_path / "clip.mp4", "-pix_fmt", "yuv420p")
    clip, part = read_video(path), read_video(path, max_frames=4, start=3)
    assert np.array_equal(part.frames, clip.frames[3:7])
    assert part.fps == 25
    assert clip.start_time == 0
    assert part.start_time == Fraction(3, 25)
    assert read_video(path, max_frames=100).num_frames == 12


def test_frames_can_be_written_to(tmp_path):
    clip = read_video(make_clip(tmp_path / "clip.mp4", num_frames=2))
    clip.frames[0] = 0
    assert clip.frames[0].max() == 0


def make_colours(path, filters, width=64):
    """Grey, red and white of BT.709, 128, (192, 32, 32) and 255, through filters; gives the three that were read."""
    frame = np.full((48, width, 3), (192, 32, 32), np.uint8)
    frame[:, : width // 4], frame[:, -width // 4 :] = 128, 255
    Image.fromarray(frame).save(path.with_suffix(".png"))
    ffmpeg("-i", path.with_suffix(".png"), "-vf", filters, "-c:v", "libx264", "-crf", "4", path)
    found = read_video(path).frames[0]
    (again,) = read_frames(path, [0])
    np.testing.assert_array_equal(found, again)
    return found[24, [width // 8, width // 2, -width // 8]].astype(int)


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_high_dynamic_range_is_brought_down(tmp_path, transfer):
    """A clip of common colours, mastered with its white at 203 nits."""
    tags = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    linear = f"scale=out_color_matrix=bt709:out_range=tv,format=yuv444p,{tags},zscale=t=linear:npl=203"
    code = f"zscale=t={transfer}:m=bt2020nc:r=tv:npl=203,format=yuv420p10le"
    grey, red, white = make_colours(tmp_path / "hdr.mp4", f"{linear},format=gbrpf32le,zscale=p=bt2020,{code}")
    assert np.abs(grey - 128).max() <= 3 and np.abs(red - (192, 32, 32)).max() <= 10
    assert white.min() > 225 and np.ptp(white) <= 3  # the room above it is for what is brighter


@pytest.mark.parametrize("width, matrix", [(64, "bt601"), (1280, "bt709")])
def test_colours_without_a_matrix_are_read_as_players_do(tmp_path, width, matrix):
    untold = "setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown"
    scale = f"scale=out_color_matrix={matrix}:out_range=tv,format=yuv420p"
    for name, tags in (("untold", untold), ("told", "setparams=colorspace=smpte170m")):
        if name == "told":
            scale = scale.replace("bt709", "bt601")
        _, red, _ = make_colours(tmp_path / f"{name}.mp4", f"{scale},{tags}", width)
        assert np.abs(red - (192, 32, 32)).max() <= 3, name


def test_a_rate_of_almost_nothing_is_not_none(tmp_path):
    assert _frame_rate(None, [Fraction(0), Fraction(3000)]) == Fraction(1, 1001)
    write_video(tmp_path / "slow.mkv", gradient_frames(2), 0.0004)
    assert read_video(tmp_path / "slow.mkv").num_frames == 2


@pytest.mark.parametrize("options", [("-pix_fmt", "gray"), ("-pix_fmt", "yuv420p10le"), ("-pix_fmt", "yuv444p")])
def test_pixel_formats(tmp_path, options):
    clip = read_video(make_clip(tmp_path / "clip.mp4", *options, num_frames=3))
    assert clip.frames.shape == (3, 48, 64, 3)
    assert clip.frames.dtype == np.uint8
    if options[1] == "gray":
        assert np.array_equal(clip.frames[..., 0], clip.frames[..., 2])


def test_alpha_is_dropped(tmp_path):
    colour = np.full((48, 64, 4), (200, 100, 50, 128), np.uint8)
    Image.fromarray(colour).save(tmp_path / "image.png")
    assert np.array_equal(read_video(tmp_path / "image.png").frames[0], colour[..., :3])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_image_is_a_clip_of_one_frame(tmp_path, suffix):
    Image.fromarray(gradient_frames()[0]).save(tmp_path / f"image{suffix}")
    clip = read_video(tmp_path / f"image{suffix}")
    assert clip.frames.shape == (1, 48, 64, 3)
    assert clip.fps == 25
    write_video(tmp_path / "edit.mp4", clip.frames, clip.fps, audio_from=clip.path)
    assert streams(tmp_path / "edit.mp4")[3] == 1


def test_animation(tmp_path):
    images = [Image.fromarray(frame) for frame in gradient_frames(4)]
    images[0].save(tmp_path / "clip.gif", save_all=True, append_images=images[1:], duration=100)
    clip = read_video(tmp_path / "clip.gif")
    assert clip.frames.shape == (4, 48, 64, 3)
    assert clip.fps == 10


def test_variable_rate_keeps_every_frame_once_and_the_duration(tmp_path):
    # frames at 0, 1, 4, 5, 8, 9, ... 25ths of a second
    filters = "select='lt(mod(n\\,4)\\,2)'"
    path = tmp_path / "clip.mkv"
    make_clip(path, "-vf", filters, "-fps_mode", "vfr", "-c:v", "libx264", num_frames=20)
    clip = read_video(path)
    assert clip.num_frames == 20
    assert float(19 / clip.fps) == pytest.approx(37 / 25, abs=2e-3)
    assert np.array_equal(read_video(path).frames, clip.frames)


def test_one_displaced_frame_leaves_the_declared_rate(tmp_path):
    path = tmp_path / "clip.mp4"
    make_clip(path, "-vf", "select='not(between(n\\,14\\,16))'", "-fps_mode", "vfr", rate="24000/1001", num_frames=15)
    clip = read_video(path)
    assert (clip.num_frames, clip.fps) == (15, Fraction(24000, 1001))


def test_sound_is_copied_and_lasts_as_long(tmp_path):
    source = make_clip(tmp_path / "source.mp4", rate="30000/1001", num_frames=31, sound=True)
    clip = read_video(source)
    assert clip.has_audio
    write_video(tmp_path / "edit.mp4", clip.frames, clip.fps, clip.path, clip.start_time)
    assert read_video(tmp_path / "edit.mp4").has_audio
    assert sound_packets(tmp_path / "edit.mp4") == sound_packets(source)
    assert streams(tmp_path / "edit.mp4") == (Fraction(30000, 1001), "64x48", "1/1", 31)


def test_sound_is_cut_to_the_frames(tmp_path):
    source = make_clip(tmp_path / "source.mp4", num_frames=50, sound=True)
    clip = read_video(source, max_frames=25)
    write_video(tmp_path / "edit.mp4", clip.frames, clip.fps, audio_from=clip.path)
    assert len(sound(tmp_path / "edit.mp4")) / 48000 == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_sound_of_a_later_part_stays_with_its_frames(tmp_path, suffix):
    click = "aevalsrc='between(t\\,1.5\\,1.6)*sin(2000*PI*t)':d=3:s=48000"
    picture = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=3"]
    ffmpeg(*picture, "-f", "lavfi", "-i", click, "-c:a", "aac", tmp_path / f"source{suffix}")
    clip = read_video(tmp_path / f"source{suffix}", start=25)
    write_video(tmp_path / "edit.mp4", clip.frames, clip.fps, clip.path, clip.start_time)
    assert streams(tmp_path / "edit.mp4")[3] == 50
    heard = np.flatnonzero(np.abs(sound(tmp_path / "edit.mp4")) > 0.1)[0] / 48000
    assert heard == pytest.approx(0.5, abs=0.03)


def test_sound_that_the_container_cannot_hold_is_encoded(tmp_path):
    source = make_clip(tmp_path / "source.mkv", "-c:a", "wmav2", num_frames=25, sound=True)
    clip = read_video(source)
    write_video(tmp_path / "edit.mp4", clip.frames, clip.fps, audio_from=clip.path)
    assert len(sound(tmp_path / "edit.mp4")) / 48000 == pytest.approx(1, abs=0.1)
    assert streams(tmp_path / "edit.mp4")[3] == clip.num_frames


def test_silent_source_gives_a_silent_edit(tmp_path):
    clip = read_video(make_clip(tmp_path / "source.mp4"))
    assert not clip.has_audio
    write_video(tmp_path / "edit.mp4", clip.frames, clip.fps, audio_from=clip.path)
    assert not read_video(tmp_path / "edit.mp4").has_audio


def test_a_clip_can_be_overwritten_with_its_own_edit(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, gradient_frames(25), 25, audio_from=make_clip(tmp_path / "sound.mp4", num_frames=25, sound=True))
    clip = read_video(path)
    write_video(path, 255 - clip.frames, clip.fps, audio_from=path)
    edit = read_video(path)
    assert edit.has_audio
    assert np.abs(edit.frames.astype(float) - (255 - clip.frames)).mean() < 8


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="`path`.*absent.mp4"):
        read_video(tmp_path / "absent.mp4")
    with pytest.raises(FileNotFoundError, match="`audio_from`.*absent.mp4"):
        write_video(tmp_path / "edit.mp4", gradient_frames(), 25, audio_from=tmp_path / "absent.mp4")
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_video(tmp_path / "absent" / "edit.mp4", gradient_frames(), 25)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_files(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a clip")
    (tmp_path / "text.txt").write_text("not a clip, but ffmpeg would draw its lines\n" * 100)
    whole = make_clip(tmp_path / "whole.mp4")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:1000])
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.1", tmp_path / "sound.wav")
    reasons = {
        "empty.mp4": "the file is empty",
        "text.mp4": "cannot be read",
        "text.txt": "text file",
        "cut.mp4": "moov atom not found",
        "sound.wav": "no video stream",
        ".": "not a file",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"`path`.*{reason}"):
            read_video(tmp_path / name)


def test_damaged_end_gives_the_frames_before_it_and_a_warning(tmp_path, caplog):
    whole = make_clip(tmp_path / "whole.mp4", "-movflags", "+faststart", "-g", "1", num_frames=20)
    data = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    clip = read_video(tmp_path / "cut.mp4")
    assert 5 < clip.num_frames < 20
    assert np.array_equal(clip.frames[:5], read_video(whole).frames[:5])
    assert "damaged" in caplog.text


def write_animation(path):
    images = [Image.fromarray(frame) for frame in gradient_frames(4, 16, 32)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)


CLIPS = {
    "film.mp4": {"rate": "24000/1001"},
    "sound.mp4": {"rate": "30000/1001", "sound": True},
    "late.mkv": {"options": ("-output_ts_offset", "0.5")},
    "anamorphic.mp4": {"options": ("-vf", "setsar=128/117", "-pix_fmt", "yuv420p")},
    "variable.mkv": {"options": ("-vf", "select='lt(mod(n\\,4)\\,2)'", "-fps_mode", "vfr")},
    "displaced.mp4": {"options": ("-vf", "select='not(between(n\\,9\\,11))'", "-fps_mode", "vfr")},
    "bare.h264": {"rate": "30", "options": ("-f", "h264")},
}


@pytest.mark.parametrize("name", [*CLIPS, "turned.mp4", "clip.gif", "image.png"])
def test_probe_says_what_reading_finds(tmp_path, name):
    path = tmp_path / name
    if name in CLIPS:
        arguments = {"size": "32x16", "num_frames": 12} | CLIPS[name]
        make_clip(path, *arguments.pop("options", ()), **arguments)
    elif name == "turned.mp4":
        plain = make_clip(tmp_path / "plain.mp4", "-vf", "setsar=2/1", "-pix_fmt", "yuv420p", size="32x16")
        ffmpeg("-display_rotation", 90, "-i", plain, "-c", "copy", path)
    elif name == "clip.gif":
        write_animation(path)
    else:
        Image.fromarray(gradient_frames()[0]).save(path)
    clip, info = read_video(path), probe_video(path)
    assert (info.num_frames, info.height, info.width) == (clip.num_frames, clip.height, clip.width)
    assert (info.fps, info.has_audio, info.start_time) == (clip.fps, clip.has_audio, clip.start_time)
    assert info.damage is None
    assert len(info.times) == clip.num_frames


def test_probe_times_are_those_of_the_frames(tmp_path):
    path = make_clip(
        tmp_path / "clip.mkv", "-vf", "select='lt(mod(n\\,4)\\,2)'", "-fps_mode", "vfr", size="32x16", num_frames=6
    )
    expected = [number / 25 for number in (0, 1, 4, 5, 8, 9)]
    assert [float(time) for time in probe_video(path).times] == pytest.approx(expected, abs=1e-3)


def test_probe_of_a_damaged_clip(tmp_path):
    whole = make_clip(tmp_path / "whole.mp4", "-movflags", "+faststart", "-g", "1", size="32x16", num_frames=20)
    data = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    assert probe_video(whole).damage is None
    info = probe_video(tmp_path / "cut.mp4")
    assert info.damage
    assert info.num_frames == read_video(tmp_path / "cut.mp4").num_frames < 20


def test_probe_refuses_what_reading_refuses(tmp_path):
    (tmp_path / "text.mp4").write_text("not a clip")
    (tmp_path / "text.txt").write_text("not a clip, but ffmpeg would draw its lines\n" * 100)
    (tmp_path / "empty.mp4").touch()
    for name in ("absent.mp4", "text.mp4", "text.txt", "empty.mp4"):
        with pytest.raises((ValueError, FileNotFoundError)) as expected:
            read_video(tmp_path / name)
        with pytest.raises(expected.type) as error:
            probe_video(tmp_path / name)
        assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("indices", [[0], [2, 3, 3, 7, 11], [11]])
def test_single_frames_are_those_of_the_clip(tmp_path, indices):
    path = make_clip(tmp_path / "clip.mp4", "-vf", "setsar=2/1", "-pix_fmt", "yuv420p", size="32x16")
    assert np.array_equal(np.stack(list(read_frames(path, indices))), read_video(path).frames[indices])


def test_many_single_frames(tmp_path):
    path = make_clip(tmp_path / "clip.mp4", size="16x16", num_frames=300)
    assert np.array_equal(np.stack(list(read_frames(path, range(1, 300, 2)))), read_video(path).frames[1::2])


def test_frames_beyond_the_end_are_refused(tmp_path):
    path = make_clip(tmp_path / "clip.mp4", size="32x16", num_frames=3)
    with pytest.raises(ValueError, match="`path`.*up to frame 3"):
        list(read_frames(path, [2, 3]))
    for indices in ([], [-1], [2, 1]):
        with pytest.raises(ValueError, match="`indices`"):
            next(read_frames(path, indices))


def test_wrong_arguments_of_read_video(tmp_path):
    path = make_clip(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match="`max_frames`"):
        read_video(path, max_frames=0)
    with pytest.raises(ValueError, match="`start` must"):
        read_video(path, start=-1)
    with pytest.raises(ValueError, match="`start`.*no frame 12"):
        read_video(path, start=12)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("path", {"path": "edit.xyz"}),
        ("fps", {"fps": 0}),
        ("fps", {"fps": float("nan")}),
        ("crf", {"crf": 52}),
        ("audio_start", {"audio_start": -1}),
        ("frames", {"frames": np.zeros((0, 8, 8, 3), np.uint8)}),
        ("frames", {"frames": np.zeros((2, 8, 8), np.uint8)}),
        ("frames", {"frames": np.zeros((2, 8, 8, 3), np.int64)}),
        ("frames", {"frames": np.full((2, 8, 8, 3), 255.0)}),
        ("frames", {"frames": np.full((2, 8, 8, 3), np.nan)}),
        ("frames", {"frames": []}),
    ],
)
def test_wrong_arguments_of_write_video(tmp_path, monkeypatch, name, change):
    monkeypatch.chdir(tmp_path)
    arguments = {"path": "edit.mp4", "frames": gradient_frames(), "fps": 25} | change
    with pytest.raises(ValueError, match=f"`{name}`"):
        write_video(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_the_earlier_file_and_nothing_else(tmp_path):
    (tmp_path / "broken.mp4").write_text("no sound here")
    (tmp_path / "edit.mp4").write_text("earlier")
    with pytest.raises(ValueError, match="`audio_from`.*broken.mp4"):
        write_video(tmp_path / "edit.mp4", gradient_frames(), 25, audio_from=tmp_path / "broken.mp4")
    assert (tmp_path / "edit.mp4").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.mp4", "edit.mp4"]


def test_names_that_ffmpeg_would_interpret(tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    path = folder / "-clip:%03d'.mp4"
    write_video(path, gradient_frames(), 25)
    assert read_video(path).num_frames == 5
    write_video(path, gradient_frames(), 25, audio_from=path)
    assert [path.name for path in folder.iterdir()] == [path.name]


def test_strip_shows_first_and_last_frame_of_each_row(tmp_path):
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    frames[0], frames[-1] = (255, 0, 0), (0, 0, 255)
    write_strip(tmp_path / "strip.png", {"source": frames, "edited": 255 - frames}, num_columns=3)
    image = np.asarray(Image.open(tmp_path / "strip.png"))
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    areas = {tuple(int(value) for value in colour): int(count) for colour, count in zip(colours, counts, strict=True)}
    expected = [(255, 0, 0), (0, 0, 255), (0, 255, 255), (255, 255, 0)]
    assert [areas[colour] for colour in expected] == [176 * 176] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["strip.png"]


def test_strip_of_one_frame(tmp_path):
    write_strip(tmp_path / "strip.png", {"source": gradient_frames(1)})
    assert Image.open(tmp_path / "strip.png").width < 2 * 176


def test_wrong_arguments_of_write_strip(tmp_path):
    frames = gradient_frames()
    with pytest.raises(ValueError, match="`rows`"):
        write_strip(tmp_path / "strip.png", {"a": frames, "b": frames[:2]})
    with pytest.raises(ValueError, match="`rows`"):
        write_strip(tmp_path / "strip.png", {})
    with pytest.raises(ValueError, match="`num_columns`"):
        write_strip(tmp_path / "strip.png", {"a": frames}, num_columns=0)
    with pytest.raises(ValueError, match="`path`"):
        write_strip(tmp_path / "strip.jpg", {"a": frames})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_ffmpeg_is_told(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)

    def find_none():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", find_none)
    with pytest.raises(OSError, match="there is no ffmpeg: install it"):
        read_video(tmp_path / "clip.mp4")


@pytest.mark.parametrize("read", [read_video, probe_video])
def test_a_killed_ffmpeg_says_nothing_of_the_clip(tmp_path, monkeypatch, read):
    write_video(tmp_path / "clip.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nkill -KILL $$\n")
    program.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(program))
    with pytest.raises(InterruptedError, match="ffmpeg was stopped"):
        read(tmp_path / "clip.mp4")
