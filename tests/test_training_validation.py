import copy
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from components import build_pipeline
from PIL import Image
from torch.utils.data import default_collate

from rvedit_diffusers import RVEDiTProcessor, read_video
from rvedit_diffusers.losses import flow_matching_loss
from rvedit_diffusers.synthetic import SyntheticEdits
from rvedit_diffusers.training import validation
from rvedit_diffusers.training.branches import EditingBranches
from rvedit_diffusers.training.cache import CachedPairs, cached_null_text, fill_cache, text_length
from rvedit_diffusers.training.pairs import SyntheticPairs
from rvedit_diffusers.training.sampler import generator
from rvedit_diffusers.training.samples import Draws, MLLMCollator, Samples
from rvedit_diffusers.training.validation import (
    VALIDATION_SIGMAS,
    FixedDraws,
    edit_held_out,
    gradient_norms,
    held_out_loss,
    turns,
)


SHAPE = torch.Size((16, 2, 4, 4))  # of the latents of a pair
PAIRS = SyntheticPairs(SyntheticEdits(20, 5, 32, 32, edits_per_scene=2), 3, 2.0)
DRAWS = Draws(seed=0, num_positions=5)


@pytest.fixture
def build_accelerator():
    yield partial(Accelerator, cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def accelerator(build_accelerator):
    return build_accelerator()


@pytest.fixture(scope="module")
def build_cache(tmp_path_factory):
    """Makes the cache of `PAIRS` and the empty instruction, of kinds of tokens and text."""
    folder, pipe = tmp_path_factory.mktemp("cache"), build_pipeline()

    def build_cache(tokens="tokens", text="embeds"):
        key = f"{tokens} {text}"
        cached = CachedPairs(fill_cache(pipe, PAIRS, folder, tokens, text, model_key=key), text_length(pipe))
        return cached, cached_null_text(pipe, folder, text, key)

    return build_cache


@pytest.fixture
def build_samples(build_cache):
    def build_samples(draws):
        cached, null_text = build_cache()
        return Samples(cached, draws, null_text)

    return build_samples


@pytest.fixture
def branches(pipe):
    return EditingBranches(pipe.transformer).train()


def velocity_loss(branches, sample):
    """The flow matching loss of one sample, its branches called on it alone."""
    batch = default_collate([{name: value for name, value in sample.items() if name != "align_positions"}])
    with torch.no_grad():
        return flow_matching_loss(branches(batch)[0], batch["latents"], batch["noise"]).item()


# Turns


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("num_items", [0, 1, 3, 4, 7])
def test_every_item_counts_exactly_once(num_items, num_processes):
    items = [turns(num_items, rank, num_processes) for rank in range(num_processes)]
    assert sorted(item for rank in items for item, counts in rank if counts) == list(range(num_items))


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("num_items", [0, 1, 3, 4, 7])
def test_all_processes_have_equally_many_turns(num_items, num_processes):
    assert len({len(turns(num_items, rank, num_processes)) for rank in range(num_processes)}) == 1


@pytest.mark.parametrize("num_items, num_processes", [(1, 4), (3, 2)])
def test_a_turn_that_does_not_count_is_of_an_item_that_there_is(num_items, num_processes):
    for rank in range(num_processes):
        assert all(0 <= item < num_items for item, _ in turns(num_items, rank, num_processes))


# Fixed draws


def test_a_pair_has_the_same_noise_at_every_level():
    noises = [FixedDraws()(2 * len(VALIDATION_SIGMAS) + level, SHAPE)["noise"] for level in range(5)]
    assert all(torch.equal(noise, noises[0]) for noise in noises)


def test_other_pairs_have_other_noise():
    first, second = (FixedDraws()(pair * len(VALIDATION_SIGMAS), SHAPE)["noise"] for pair in (0, 1))
    assert not torch.equal(first, second)


def test_the_levels_of_a_pair_are_the_fixed_ones():
    count = len(VALIDATION_SIGMAS)
    drawn = [FixedDraws()(3 * count + level, SHAPE)["sigmas"] for level in range(count)]
    torch.testing.assert_close(torch.stack(drawn), torch.tensor(VALIDATION_SIGMAS))


def test_nothing_is_dropped():
    drawn = [FixedDraws(Draws(seed=0, drop_instruction=0.5, drop_all=0.5))(number, SHAPE) for number in range(20)]
    assert all(each["keep_instruction"] == each["keep_source"] == 1 for each in drawn)


def test_positions_are_those_of_training_if_asked_for():
    drawn = FixedDraws(DRAWS)(4, SHAPE)
    assert torch.equal(drawn["align_positions"], DRAWS(4, SHAPE)["align_positions"])


def test_without_positions_nothing_is_aligned():
    assert "align_positions" not in FixedDraws()(4, SHAPE)


def test_fixed_draws_have_the_types_of_those_of_training():
    expected, drawn = DRAWS(4, SHAPE), FixedDraws(DRAWS)(4, SHAPE)
    assert {name: (value.shape, value.dtype) for name, value in drawn.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }


# The loss of held-out pairs


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_held_out_loss_is_the_mean_over_the_pairs(accelerator, branches, build_samples, batch_size):
    samples = build_samples(FixedDraws())
    losses = torch.tensor(
        [[velocity_loss(branches, samples[pair, pair * 5 + level]) for level in range(5)] for pair in range(3)]
    )
    expected = {f"validation_flow_sigma_{s}": loss for s, loss in zip(VALIDATION_SIGMAS, losses.mean(0).tolist())}
    expected["validation_flow"] = losses.mean().item()
    assert held_out_loss(accelerator, branches, samples, default_collate, batch_size) == pytest.approx(expected)


def test_the_held_out_loss_is_the_same_when_it_is_taken_again(accelerator, branches, build_samples):
    samples = build_samples(FixedDraws())
    first, second = (held_out_loss(accelerator, branches, samples, default_collate, 4) for _ in range(2))
    assert first == second


def test_the_held_out_loss_takes_no_dropout(accelerator, branches, build_samples):
    samples = build_samples(FixedDraws())
    plain = held_out_loss(accelerator, branches, samples, default_collate, 4)
    for block in branches.transformer.blocks:
        block.ffn.net[1].p = 0.5
    assert held_out_loss(accelerator, branches, samples, default_collate, 4) == plain


def test_the_held_out_loss_leaves_the_model_in_training_mode(accelerator, branches, build_samples):
    held_out_loss(accelerator, branches, build_samples(FixedDraws()), default_collate, 4)
    assert all(module.training for module in branches.modules())


def test_the_held_out_loss_of_a_live_mllm_is_that_of_its_cached_states(accelerator, pipe, build_cache):
    branches = EditingBranches(pipe.transformer, pipe.distiller, mllm=pipe.mllm)
    live = Samples(build_cache("none")[0], FixedDraws(), {}, PAIRS)
    of_live = held_out_loss(accelerator, branches, live, MLLMCollator(pipe.processor), 5)
    cached = Samples(build_cache("states")[0], FixedDraws(), {})
    assert of_live == pytest.approx(held_out_loss(accelerator, branches, cached, default_collate, 5), rel=1e-3)


# The norms of the gradients


def norms_by_hand(branches, parameters, sample):
    batch = default_collate([sample])
    velocity, align = branches(batch)
    losses = {"flow": flow_matching_loss(velocity, batch["latents"], batch["noise"]).mean(), "align": align.mean()}
    norms = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
        norms[f"gradient_norm_{name}"] = torch.stack(squares).sum().sqrt().item()
    return norms


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradient_norms_are_those_of_each_loss_alone(build_accelerator, branches, build_samples, accumulation):
    accelerator = build_accelerator(gradient_accumulation_steps=accumulation)
    samples, parameters = build_samples(FixedDraws(DRAWS)), list(branches.transformer.parameters())
    norms = gradient_norms(accelerator, branches, parameters, samples, default_collate)
    middle = len(VALIDATION_SIGMAS) // 2
    assert norms == pytest.approx(norms_by_hand(branches, parameters, samples[0, middle]), rel=1e-4)


def test_gradient_norms_of_branches_that_meet_take_two_pairs(accelerator, pipe, build_samples):
    branches = EditingBranches(pipe.transformer, align_reference_tokens="shuffled").train()
    samples, parameters = build_samples(FixedDraws(DRAWS)), list(branches.transformer.parameters())
    norms = gradient_norms(accelerator, branches, parameters, samples, default_collate, 2)
    middle, count = len(VALIDATION_SIGMAS) // 2, len(VALIDATION_SIGMAS)
    _, align = branches(default_collate([samples[pair, pair * count + middle] for pair in range(2)]))
    gradients = torch.autograd.grad(align.mean(), parameters, allow_unused=True)
    expected = torch.stack([each.norm() for each in gradients if each is not None]).norm()
    assert norms["gradient_norm_align"] == pytest.approx(expected.item(), rel=1e-4)


def test_pairs_that_meet_are_of_one_bucket(accelerator, pipe, build_cache):
    branches = EditingBranches(pipe.transformer, align_reference_tokens="shuffled").train()
    cached, null_text = build_cache()
    cut = {"latents", "source_latents"}
    rows = [{name: v[..., :2] if name in cut and i == 1 else v for name, v in cached[i].items()} for i in range(3)]
    samples, parameters = Samples(rows, FixedDraws(DRAWS), null_text), list(branches.transformer.parameters())
    shapes = []

    def collate(each):
        shapes.extend(sample["latents"].shape for sample in each)
        return default_collate(each)

    gradient_norms(accelerator, branches, parameters, samples, collate, 2)
    assert shapes == [rows[0]["latents"].shape] * 2 and shapes[0] != rows[1]["latents"].shape


def test_gradient_norms_leave_no_gradients(accelerator, branches, build_samples):
    parameters = list(branches.transformer.parameters())
    gradient_norms(accelerator, branches, parameters, build_samples(FixedDraws(DRAWS)), default_collate)
    assert all(parameter.grad is None for parameter in branches.parameters())


def test_gradient_norms_change_no_weights(accelerator, branches, build_samples):
    before = copy.deepcopy(branches.state_dict())
    parameters = list(branches.transformer.parameters())
    gradient_norms(accelerator, branches, parameters, build_samples(FixedDraws(DRAWS)), default_collate)
    torch.testing.assert_close(branches.state_dict(), before, rtol=0, atol=0)


# Edits to look at


def edit(accelerator, cached, null_text, folder, num_edits, learns=(), pairs=PAIRS, **transformer):
    """Edits with the encoders that learn alone."""
    pipe = build_pipeline(**transformer)
    for name in {"distiller", "mllm", "text_encoder"}.difference(learns):
        setattr(pipe, name, None)
    branches = EditingBranches(pipe.transformer, pipe.distiller, pipe.text_encoder, pipe.mllm)
    return branches, edit_held_out(accelerator, branches, pipe, pairs, cached, null_text, num_edits, folder)


@pytest.fixture
def written(monkeypatch):
    """The frames of the clips that are written, by name, before a codec has changed them."""
    frames, write_video = {}, validation.write_video

    def keep(path, clip, fps):
        frames[path.name] = clip
        write_video(path, clip, fps)

    monkeypatch.setattr(validation, "write_video", keep)
    return frames


@pytest.mark.parametrize(
    "tokens, text, learns",
    [
        ("tokens", "embeds", ()),
        ("states", "embeds", ("distiller",)),
        ("none", "embeds", ("distiller", "mllm")),
        ("tokens", "ids", ("text_encoder",)),
        ("none", "ids", ("distiller", "mllm", "text_encoder")),
    ],
)
def test_edits_are_those_of_the_whole_pipeline(
    accelerator, pipe, build_cache, tmp_path, written, tokens, text, learns
):
    edit(accelerator, *build_cache(tokens, text), tmp_path, 2, learns)
    for index, clip in enumerate(written.values()):
        source, instruction = PAIRS.load(index)[0], PAIRS.instruction(index)
        expected = pipe(source, instruction, fps=2.0, generator=generator("validation edit", index)).frames[0]
        # a quarter differs and more where a condition is another; the norms of so small a VAE may flip single pixels
        assert (np.abs(clip / 255 - expected) > 0.005).mean() < 0.05
    assert len(written) == 2


def test_an_mllm_that_learns_reads_the_rate_of_the_pair(accelerator, build_cache, tmp_path, monkeypatch):
    rates, call = [], RVEDiTProcessor.__call__

    def record(*args, fps, **kwargs):
        rates.append(fps)
        return call(*args, fps=fps, **kwargs)

    monkeypatch.setattr(RVEDiTProcessor, "__call__", record)
    edit(accelerator, *build_cache("none"), tmp_path, 1, ("distiller", "mllm"))
    assert rates == [[PAIRS.rate]]


def test_edits_are_clips_that_can_be_played(accelerator, build_cache, tmp_path, written):
    edit(accelerator, *build_cache(), tmp_path, 1)
    ((name, frames),) = written.items()
    clip = read_video(tmp_path / name)
    assert clip.fps == 2 and clip.frames.shape == frames.shape == (5, 32, 32, 3)


@pytest.mark.parametrize("num_edits, count", [(2, 2), (9, 3)])  # of 3 pairs
def test_every_edit_has_a_clip_and_a_strip(accelerator, build_cache, tmp_path, num_edits, count):
    _, strips = edit(accelerator, *build_cache(), tmp_path / "new" / "step-10", num_edits)
    names = [strip.stem for strip in strips]
    assert [int(name.partition("-")[0]) for name in names] == list(range(count))
    assert {path.name for path in strips[0].parent.iterdir()} == {
        f"{n}.{kind}" for n in names for kind in ("gif", "mp4", "png")
    }
    assert Image.open(strips[0].with_suffix(".gif")).n_frames == 5


def test_names_of_edits_say_what_was_asked_for(accelerator, build_cache, tmp_path):
    _, (strip,) = edit(accelerator, *build_cache(), tmp_path, 1)
    assert strip.stem == "0-" + PAIRS.instruction(0).replace(" ", "-")


def test_a_strip_shows_source_edit_and_true_edit(accelerator, build_cache, tmp_path, written, monkeypatch):
    drawn = {}
    monkeypatch.setattr(validation, "write_strip", lambda path, rows: drawn.update(rows))
    edit(accelerator, *build_cache(), tmp_path, 1)
    source, target = PAIRS.load(0)
    expected = {"source": source, PAIRS.instruction(0): written.popitem()[1], "true edit": target}
    assert list(drawn) == list(expected)
    assert all(np.array_equal(drawn[name], rows) for name, rows in expected.items())


def test_strips_are_in_the_order_of_the_pairs(accelerator, build_cache, tmp_path):
    for name in ("10-remove-it.png", "2-make-it-red.png"):
        (tmp_path / name).touch()
    _, strips = edit(accelerator, *build_cache(), tmp_path, 1)
    assert [strip.name.partition("-")[0] for strip in strips] == ["0", "2", "10"]


class Spoken(SyntheticPairs):
    """Pairs with one instruction of a user."""

    def __init__(self, instruction):
        super().__init__(PAIRS.edits, len(PAIRS), PAIRS.rate)
        self.spoken = instruction

    def instruction(self, index):
        return self.spoken


@pytest.mark.parametrize("instruction", ["make it\nblue", "把球变成蓝色", "make it blue " * 40])
def test_any_instruction_can_be_shown(accelerator, build_cache, tmp_path, instruction):
    _, strips = edit(accelerator, *build_cache(), tmp_path, 1, pairs=Spoken(instruction))
    assert len(strips) == 1


def test_edits_leave_the_model_in_training_mode(accelerator, build_cache, tmp_path):
    branches, _ = edit(accelerator, *build_cache(), tmp_path, 1)
    assert all(module.training for module in branches.modules())


@pytest.mark.parametrize("streams", [("edit",), ("text",), ("visual",), ("edit", "text")])
def test_models_that_do_not_read_all_streams_edit_for_validation(accelerator, build_cache, tmp_path, written, streams):
    reads = {"shallow_tokens": streams, "deep_tokens": streams}
    edit(accelerator, *build_cache(), tmp_path, 1, **reads)
    source, instruction = PAIRS.load(0)[0], PAIRS.instruction(0)
    pipe = build_pipeline(**reads)
    expected = pipe(source, instruction, fps=2.0, generator=generator("validation edit", 0)).frames[0]
    (clip,) = written.values()
    assert (np.abs(clip / 255 - expected) > 0.005).mean() < 0.05
