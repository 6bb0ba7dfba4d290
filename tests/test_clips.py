import numpy as np
import torch
import torch.nn.functional as F

from rvedit_diffusers.clips import resize_frames, transfer_edit
from rvedit_diffusers.synthetic import SyntheticEdits, psnr


def to_tensor(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_frames(tensor):
    return ((tensor + 1.0) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def copy(frames):
    """Scaled to a quarter and blurred, as an editor sees and gives back a clip."""
    small = resize_frames(to_tensor(frames), (48, 48))
    return F.avg_pool2d(small, 3, 1, 1, count_include_pad=False)


def test_what_is_not_edited_is_the_source_exactly():
    source = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    small = torch.rand(2, 3, 8, 12) * 2 - 1
    np.testing.assert_array_equal(to_frames(transfer_edit(small, small, to_tensor(source))), source)


def test_an_edit_of_a_copy_is_nearer_to_the_true_edit_than_the_copy_enlarged():
    gains = {}
    for operation in ("grade", "recolour", "remove"):
        edits = SyntheticEdits(3, num_frames=2, height=192, width=192, operations=(operation,))
        for index in range(4):
            edit = edits[index]
            source, target = edit.source_frames, edit.target_frames
            kept = to_frames(transfer_edit(copy(target), copy(source), to_tensor(source)))
            enlarged = to_frames(resize_frames(copy(target), (192, 192)))
            gains.setdefault(operation, []).append(psnr(kept, target) - psnr(enlarged, target))
    assert all(min(each) > 0 and np.mean(each) > 4 for each in gains.values()), gains


def test_what_is_gone_leaves_no_detail_behind():
    gains = []
    for operation in ("replace", "remove"):
        edits = SyntheticEdits(5, num_frames=2, height=192, width=192, operations=(operation,))
        for index in range(4):
            edit = edits[index]
            clips = copy(edit.target_frames), copy(edit.source_frames), to_tensor(edit.source_frames)
            kept, added = (to_frames(transfer_edit(*clips, **options)) for options in ({}, {"tolerance": 1e6}))
            gains.append(psnr(kept, edit.target_frames, edit.mask) - psnr(added, edit.target_frames, edit.mask))
    assert min(gains) > 0 and np.mean(gains) > 0.5, gains


def test_detail_that_an_edit_takes_away_is_not_put_back():
    edits = SyntheticEdits(4, num_frames=2, height=192, width=192, operations=("grade",))
    for index in range(4):
        source = edits[index].source_frames
        tiles = F.avg_pool2d(to_tensor(source), 16)
        target = to_frames(F.interpolate(tiles, scale_factor=16))
        kept = to_frames(transfer_edit(copy(target), copy(source), to_tensor(source)))
        assert psnr(kept, target) > psnr(kept, source) + 2
        assert psnr(kept, target) > psnr(source, target) + 2


def test_a_grade_whose_copy_is_blurred_more_keeps_the_detail():
    edits = SyntheticEdits(3, num_frames=2, height=192, width=192, operations=("grade",))
    for index in range(4):
        source = edits[index].source_frames
        target = (0.35 * source).round().astype(np.uint8)
        blurred = F.avg_pool2d(copy(target), 5, 1, 2, count_include_pad=False)
        kept = to_frames(transfer_edit(blurred, copy(source), to_tensor(source)))
        assert psnr(kept, target) > psnr(to_frames(resize_frames(blurred, (192, 192))), target) + 2


def test_the_copy_of_the_result_is_the_edited_copy():
    """What the affine function cannot express is not lost."""
    edit = SyntheticEdits(4, num_frames=1, height=192, width=192, operations=("replace",))[1]
    small = [resize_frames(to_tensor(frames), (48, 48)) for frames in (edit.target_frames, edit.source_frames)]
    result = transfer_edit(*small, to_tensor(edit.source_frames))
    assert (resize_frames(result, (48, 48)) - small[0]).square().mean() < 3e-3
