import math

import pytest
import torch
from components import build_pipeline

from rvedit_diffusers.synthetic import SyntheticEdits
from rvedit_diffusers.training import samples as samples_module
from rvedit_diffusers.training.cache import CachedPairs, cached_null_text, fill_cache, text_length
from rvedit_diffusers.training.pairs import SyntheticPairs
from rvedit_diffusers.training.sampler import BatchSampler
from rvedit_diffusers.training.samples import Draws, MLLMCollator, Samples, numbered_batches


SHAPE = torch.Size((16, 2, 4, 4))  # of the latents of a pair: 8 tokens
PAIRS = SyntheticPairs(SyntheticEdits(20, 5, 32, 32, edits_per_scene=2), 6, 16.0)
COLLATE = torch.utils.data.default_collate


def many(draws, count=2000):
    """The first value of each tensor that is drawn, for the first numbers."""
    drawn = COLLATE([draws(number, SHAPE) for number in range(count)])
    return {name: value.flatten(1)[:, 0].float() if value.ndim > 1 else value for name, value in drawn.items()}


@pytest.fixture(scope="module")
def build_samples(tmp_path_factory):
    """Makes samples of `PAIRS`, whose cache holds embeddings or token ids of the instructions."""
    folder, pipe = tmp_path_factory.mktemp("cache"), build_pipeline()

    def build_samples(draws, text="embeds", pairs=None, twin=None):
        cached = CachedPairs(fill_cache(pipe, PAIRS, folder, "tokens", text, model_key=text), text_length(pipe))
        return Samples(cached, draws, cached_null_text(pipe, folder, text, text), pairs, twin)

    return build_samples


# Draws


def test_what_is_drawn_is_a_function_of_seed_and_number():
    torch.manual_seed(1)
    first = Draws(seed=3)(7, SHAPE)
    torch.manual_seed(2)
    draws = Draws(seed=3)
    draws(6, SHAPE)
    torch.testing.assert_close(draws(7, SHAPE), first, rtol=0, atol=0)


def test_the_global_random_state_stays_as_it_was():
    before = torch.get_rng_state()
    Draws(seed=3)(7, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed, number", [(3, 8), (4, 7)])
@pytest.mark.parametrize("name", ["noise", "sigmas", "align_positions"])
def test_other_numbers_and_seeds_draw_something_else(name, seed, number):
    shape = torch.Size((16, 4, 8, 8))
    draws, others = (Draws(seed=s, num_positions=16)(n, shape)[name] for s, n in ((3, 7), (seed, number)))
    assert not torch.equal(draws, others)


def test_every_purpose_of_every_number_has_a_generator_of_its_own(monkeypatch):
    seeds, generator = [], samples_module.generator
    monkeypatch.setattr(samples_module, "generator", lambda *names: seeds.append(names) or generator(*names))
    for number in range(3):
        Draws(seed=0)(number, SHAPE)
    assert len(set(seeds)) == len(seeds) == 3 * 4  # noise, its level, what is dropped and what is aligned


@pytest.mark.parametrize("drop_instruction, drop_all", [(0.1, 0.1), (0.3, 0.5), (0.0, 0.2), (0.2, 0.0)])
def test_shares_of_what_is_dropped(drop_instruction, drop_all):
    drawn = many(Draws(seed=0, drop_instruction=drop_instruction, drop_all=drop_all))
    kept = [drawn[name].mean().item() for name in ("keep_instruction", "keep_source")]
    assert kept == pytest.approx([1 - drop_instruction - drop_all, 1 - drop_all], abs=0.03)


@pytest.mark.parametrize(
    "drop_instruction, drop_all, kept", [(0.0, 0.0, (1, 1)), (1.0, 0.0, (0, 1)), (0.0, 1.0, (0, 0))]
)
def test_shares_of_none_and_all_are_exact(drop_instruction, drop_all, kept):
    drawn = many(Draws(seed=0, drop_instruction=drop_instruction, drop_all=drop_all), 200)
    assert set(zip(drawn["keep_instruction"].tolist(), drawn["keep_source"].tolist())) == {kept}


def test_a_dropped_source_takes_the_instruction_with_it():
    drawn = many(Draws(seed=0, drop_instruction=0.3, drop_all=0.3), 200)
    dropped = drawn["keep_source"] == 0
    assert dropped.any() and not drawn["keep_instruction"][dropped].any()


def test_noise_levels_are_shifted_as_told():
    shifted, plain = (many(Draws(seed=0, sigma_shift=shift), 100)["sigmas"] for shift in (3.0, 1.0))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_noise_is_gaussian_of_the_shape_of_the_latents():
    noise = Draws(seed=0)(0, torch.Size((16, 4, 16, 16)))["noise"]
    assert noise.shape == (16, 4, 16, 16)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


@pytest.mark.parametrize("num_positions, count", [(5, 5), (8, 8), (2048, 8)])
def test_aligned_positions_are_distinct_sorted_tokens(num_positions, count):
    for number in range(50):
        positions = Draws(seed=0, num_positions=num_positions)(number, SHAPE)["align_positions"]
        assert positions.dtype == torch.int64 and len(positions) == count
        assert (positions.diff() > 0).all() and positions[0] >= 0 and positions[-1] < 8


def test_every_token_is_aligned_at_some_time():
    drawn = [Draws(seed=0, num_positions=2)(number, SHAPE)["align_positions"] for number in range(100)]
    assert set(torch.cat(drawn).tolist()) == set(range(math.prod(SHAPE[1:]) // 4))


# Samples


@pytest.mark.parametrize("text", ["embeds", "ids"])
def test_a_sample_is_the_cached_pair_and_what_is_drawn_for_it(build_samples, text):
    draws = Draws(seed=0, drop_instruction=0.0, drop_all=0.0)
    samples = build_samples(draws, text)
    torch.testing.assert_close(samples[2, 9], samples.cached[2] | draws(9, SHAPE), rtol=0, atol=0)


@pytest.mark.parametrize("text", ["embeds", "ids"])
def test_a_dropped_instruction_is_the_empty_one(build_samples, text):
    samples = build_samples(Draws(seed=0, drop_instruction=1.0, drop_all=0.0), text)
    sample = samples[2, 9]
    dropped = {name: sample[name] for name in samples.null_text}
    torch.testing.assert_close(dropped, samples.null_text, rtol=0, atol=0)


def test_wrong_tokens_are_the_reference_tokens_of_the_twin(build_samples):
    samples = build_samples(Draws(seed=0), twin=lambda index: index ^ 1)
    for index in range(2):
        plain, other = samples.cached[index], samples.cached[index ^ 1]
        sample = samples[index, 5]
        assert sample.keys() - plain.keys() >= {"wrong_edit_tokens", "wrong_visual_tokens"}
        for name in ("edit_tokens", "visual_tokens"):
            assert torch.equal(sample[f"wrong_{name}"], other[f"reference_{name}"])
            assert torch.equal(sample[f"reference_{name}"], plain[f"reference_{name}"])


def test_dropping_changes_nothing_but_the_instruction_and_the_flags(build_samples):
    kept, dropped = (build_samples(Draws(0, drop_instruction=0.0, drop_all=share))[2, 9] for share in (0.0, 1.0))
    assert {name for name, value in kept.items() if not torch.equal(value, dropped[name])} == {
        "prompt_embeds",
        "keep_instruction",
        "keep_source",
    }


# Numbered batches


def steps_of(sampler, first_step, num_steps, num_processes, accumulation):
    """What all processes train on in each step, in the order of micro-batches and ranks."""
    ranks = [numbered_batches(sampler, first_step, rank, num_processes, accumulation) for rank in range(num_processes)]
    return [[row for _ in range(accumulation) for batches in ranks for row in next(batches)] for _ in range(num_steps)]


def test_numbers_count_the_samples_of_the_run():
    sampler = BatchSampler(["1x8x8"] * 6, 4, seed=0)
    steps = steps_of(sampler, 0, 5, 1, 1)
    assert [[number for _, number in step] for step in steps] == [[4 * i + j for j in range(4)] for i in range(5)]
    assert [[index for index, _ in step] for step in steps] == [sampler[i] for i in range(5)]


@pytest.mark.parametrize("num_processes, accumulation, batch_size", [(1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1)])
def test_a_step_is_the_same_however_it_is_split(num_processes, accumulation, batch_size):
    sampler = BatchSampler(["1x8x8"] * 6 + ["1x8x16"] * 3, 4, seed=0)
    whole = steps_of(sampler, 0, 7, 1, 1)
    assert len(next(numbered_batches(sampler, 0, 0, num_processes, accumulation))) == batch_size
    assert steps_of(sampler, 0, 7, num_processes, accumulation) == whole


@pytest.mark.parametrize("num_processes, accumulation", [(1, 1), (2, 2)])
@pytest.mark.parametrize("first_step", [1, 3, 5])
def test_a_run_that_goes_on_gets_the_rest(first_step, num_processes, accumulation):
    sampler = BatchSampler(["1x8x8"] * 6 + ["1x8x16"] * 3, 4, seed=0)
    whole = steps_of(sampler, 0, 7, num_processes, accumulation)
    rest = steps_of(sampler, first_step, 7 - first_step, num_processes, accumulation)
    assert rest == whole[first_step:]


def test_processes_together_train_on_the_tensors_of_one(build_samples):
    samples = build_samples(Draws(seed=5, drop_instruction=0.1, drop_all=0.3))
    sampler = BatchSampler(["one"] * len(samples), 4, seed=5)

    def first_batch(rank, num_processes):
        numbered = numbered_batches(sampler, 3, rank, num_processes)
        return next(iter(torch.utils.data.DataLoader(samples, batch_sampler=numbered)))

    halves = [first_batch(rank, 2) for rank in range(2)]
    together = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    torch.testing.assert_close(first_batch(0, 1), together, rtol=0, atol=0)


# MLLMCollator


@pytest.fixture(scope="module")
def collated(build_samples):
    """A processor, samples that an MLLM reads, and the batch of pairs 1 and 4."""
    processor = build_pipeline().processor
    samples = build_samples(Draws(seed=0), pairs=PAIRS)
    return processor, samples, MLLMCollator(processor)([samples[1, 0], samples[4, 1]])


@pytest.mark.parametrize("name, clip", [("mllm_inputs", 0), ("reference_mllm_inputs", 1)])
def test_the_mllm_reads_what_the_processor_makes_of_the_clips(collated, name, clip):
    processor, _, batch = collated
    texts = [PAIRS.instruction(1), PAIRS.instruction(4)]
    expected = dict(processor([PAIRS.load(1)[clip], PAIRS.load(4)[clip]], texts, fps=[16.0, 16.0]))
    torch.testing.assert_close(batch[name], expected, rtol=0, atol=0)


def test_time_stamps_go_by_the_rate_of_the_pair(build_samples):
    processor = build_pipeline("qwen3_vl").processor
    slow = SyntheticPairs(PAIRS.edits, len(PAIRS), 2.0)
    batch = MLLMCollator(processor)([build_samples(Draws(seed=0), pairs=slow)[1, 0]])
    at = {fps: processor([PAIRS.load(1)[0]], [PAIRS.instruction(1)], fps=fps)["input_ids"] for fps in (2.0, 16.0)}
    assert torch.equal(batch["mllm_inputs"]["input_ids"], at[2.0]) and not torch.equal(at[2.0], at[16.0])


def test_the_rest_of_a_batch_is_collated_as_without_an_mllm(collated, build_samples):
    _, _, batch = collated
    samples = build_samples(Draws(seed=0))
    rest = {name: value for name, value in batch.items() if not name.endswith("mllm_inputs")}
    torch.testing.assert_close(rest, COLLATE([samples[1, 0], samples[4, 1]]), rtol=0, atol=0)
