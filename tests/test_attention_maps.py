import math
from types import SimpleNamespace

import pytest
import torch
from components import DIM, build_pipeline, build_transformer, make_clip
from diffusers import FirstBlockCacheConfig

from rvedit_diffusers import attention_maps
from rvedit_diffusers.attention_maps import (
    changed_places,
    latent_frames,
    place_information,
    record_attention,
    text_words,
    visual_grid,
)
from rvedit_diffusers.pipeline_rvedit import merge_padding
from rvedit_diffusers.tiny import build_text_tokenizer


PROMPT = "make the red ball blue"
GRID = (3, 4, 2)
EVERYTHING = {"shallow_tokens": ("edit",), "deep_tokens": ("edit", "text", "visual")}


def make_inputs(num_edit=5, text_len=7, num_visual=6):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": noise(2, 16, GRID[0], 2 * GRID[1], 2 * GRID[2]),
        "timestep": torch.tensor([300.0, 700.0]),
        "encoder_hidden_states": noise(2, text_len, 16),
        "edit_hidden_states": noise(2, num_edit, DIM),
        "visual_hidden_states": noise(2, num_visual, DIM),
        "visual_positions": noise(2, num_visual, 3).sigmoid(),
        "source_hidden_states": noise(2, 16, GRID[0], 2 * GRID[1], 2 * GRID[2]),
        "visual_attention_mask": torch.arange(num_visual).expand(2, -1) < torch.tensor([[num_visual], [2]]),
    }


def plain_attention(transformer, block, inputs):
    """Softmax of edit and text, and of visual tokens, for each head: `(batch, heads, seq, num_tokens)`."""
    seen = {}
    layer = transformer.blocks[block].attn2
    modules = {"block": transformer.blocks[block], "layer": layer, "context": layer.to_k, "visual": layer.add_k_proj}
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        transformer(**inputs)
    for handle in handles:
        handle.remove()
    (context,), (visual,), visual_rotary_emb = seen["context"], seen["visual"], seen["block"][6]
    hidden_states, _, rotary_emb, mask = seen["layer"]

    def heads(states):
        return states.unflatten(2, (layer.heads, -1)).transpose(1, 2)  # (batch, heads, seq, head_dim)

    def rotate(states, cos, sin):
        pairs = torch.view_as_complex(states.double().unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.complex(cos.double(), sin.double()).transpose(1, 2)
        return torch.view_as_real(turned).flatten(-2)

    with torch.no_grad():
        query = heads(layer.norm_q(layer.to_q(hidden_states)))
        key = heads(layer.norm_k(layer.to_k(context)))
        visual_key = rotate(heads(layer.norm_added_k(layer.add_k_proj(visual))), *visual_rotary_emb)
        logits = query.double() @ key.double().mT / math.sqrt(query.shape[-1])
        visual_logits = rotate(query, *rotary_emb) @ visual_key.mT / math.sqrt(query.shape[-1])
    visual_logits[~mask[:, None, None, :].expand_as(visual_logits)] = -math.inf
    return logits.softmax(-1), visual_logits.softmax(-1)


def as_maps(probabilities):
    return probabilities.mean(1).transpose(1, 2).unflatten(2, GRID).float()


@pytest.mark.parametrize("logits_at_once", [1, 700, 2**24])
@pytest.mark.parametrize("is_fused", [False, True])
@torch.no_grad()
def test_maps_are_the_softmax_of_the_projections(monkeypatch, is_fused, logits_at_once):
    monkeypatch.setattr(attention_maps, "LOGITS_AT_ONCE", logits_at_once)
    transformer, inputs = build_transformer(**EVERYTHING), make_inputs()
    context, visual = plain_attention(transformer, 1, inputs)
    if is_fused:
        transformer.fuse_qkv_projections()
    with record_attention(transformer, [1]) as attention:
        transformer(**inputs)
    expected = {"edit": as_maps(context[..., :5]), "text": as_maps(context[..., 5:]), "visual": as_maps(visual)}
    torch.testing.assert_close(attention[1].maps, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_entropy_is_of_each_head_within_the_stream():
    transformer, inputs = build_transformer(**EVERYTHING), make_inputs()
    context, visual = plain_attention(transformer, 1, inputs)
    with record_attention(transformer, [1]) as attention:
        transformer(**inputs)
    for stream, share in (("edit", context[..., :5]), ("text", context[..., 5:]), ("visual", visual)):
        within = share / share.sum(-1, keepdim=True)
        entropy = -torch.xlogy(within, within).sum(-1).mean(1).unflatten(1, GRID)
        torch.testing.assert_close(attention[1].entropy[stream], entropy.float(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merged_padding_is_recorded_as_all_of_it():
    transformer, inputs = build_transformer(**EVERYTHING), make_inputs(text_len=90)
    inputs["encoder_hidden_states"][:, 11:] = 0
    with record_attention(transformer, [1]) as plain:
        transformer(**inputs)
    text, mask = merge_padding(inputs["encoder_hidden_states"], 14)
    with record_attention(transformer, [1]) as merged:
        transformer(**inputs | {"encoder_hidden_states": text, "encoder_attention_mask": mask})
    maps, expected = merged[1].maps, plain[1].maps
    torch.testing.assert_close(maps["edit"], expected["edit"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(maps["text"][:, :11], expected["text"][:, :11], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(maps["text"][:, 11:].sum(1), expected["text"][:, 11:].sum(1), atol=1e-6, rtol=1e-5)
    for stream, entropy in plain[1].entropy.items():
        torch.testing.assert_close(merged[1].entropy[stream], entropy, atol=1e-5, rtol=1e-5)


def test_null_editing_tokens_are_recorded_as_the_one_that_they_are_merged_into(pipe, clip):
    with record_attention(pipe.transformer, [0]) as attention:
        pipe(clip, PROMPT, edit_embeds=torch.zeros(1, 5, DIM), num_inference_steps=1)
    torch.testing.assert_close(attention[0].maps["edit"], torch.ones_like(attention[0].maps["edit"]))
    assert attention[0].maps["edit"].shape[1] == 1


@torch.no_grad()
def test_softmax_sums_to_one_over_its_valid_tokens():
    transformer, inputs = build_transformer(**EVERYTHING), make_inputs()
    with record_attention(transformer, [0, 1]) as attention:
        transformer(**inputs)
    shallow, deep = attention[0].maps, attention[1].maps
    assert list(attention) == [0, 1]
    assert set(shallow) == {"edit"}
    for total in (shallow["edit"].sum(1), (deep["edit"].sum(1) + deep["text"].sum(1)), deep["visual"].sum(1)):
        torch.testing.assert_close(total, torch.ones(2, *GRID))
    assert not deep["visual"][1, 2:].any()  # masked
    assert deep["visual"][1, :2].min() > 0
    assert torch.equal(attention[1].visual_attention_mask, inputs["visual_attention_mask"])
    assert torch.equal(attention[1].visual_positions, inputs["visual_positions"])


def test_recording_changes_nothing_and_leaves_nothing_behind(pipe, clip):
    def run():
        return pipe(clip, PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt").frames

    expected, processors = run(), pipe.transformer.attn_processors
    with record_attention(pipe.transformer, [0, 1]):
        recorded = run()
    assert torch.equal(recorded, expected)
    assert pipe.transformer.attn_processors == processors
    assert not pipe.transformer._forward_pre_hooks
    assert torch.equal(run(), expected)


def test_failure_leaves_nothing_behind(pipe):
    processors = pipe.transformer.attn_processors
    with pytest.raises(KeyError), record_attention(pipe.transformer, [0]):
        raise KeyError
    assert pipe.transformer.attn_processors == processors
    assert not pipe.transformer._forward_pre_hooks


def record_edit(pipe, clip, steps=None, blocks=(0, 1), **kwargs):
    with record_attention(pipe.transformer, blocks, steps) as attention:
        pipe(clip, PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **kwargs)
    return attention


def test_guidance_does_not_count(shared_pipe, clip):
    plain = record_edit(shared_pipe, clip, [0], guidance_scale=1.0)
    guided = record_edit(shared_pipe, clip, [0], guidance_scale=3.0, source_guidance_scale=2.0)
    for block in plain:
        assert guided[block].num_steps == 1
        assert all(torch.equal(maps, plain[block].maps[stream]) for stream, maps in guided[block].maps.items())


def test_steps_are_averaged(shared_pipe, clip):
    mean = record_edit(shared_pipe, clip)
    first, second = (record_edit(shared_pipe, clip, [step]) for step in (0, 1))
    assert mean[1].num_steps == 2
    for stream, maps in mean[1].maps.items():
        assert not torch.equal(first[1].maps[stream], second[1].maps[stream])
        torch.testing.assert_close(maps, (first[1].maps[stream] + second[1].maps[stream]) / 2)


def test_bfloat16_is_recorded_in_float32(pipe, clip):
    expected = record_edit(pipe, clip, [0])
    attention = record_edit(pipe.to(torch.bfloat16), clip, [0])
    for stream, maps in attention[1].maps.items():
        assert maps.dtype == attention[1].entropy[stream].dtype == torch.float32
        torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]))
        torch.testing.assert_close(maps, expected[1].maps[stream], atol=0.02, rtol=0.1)


def test_offloaded_weights_give_the_same_maps(pipe, clip):
    expected = record_edit(pipe, clip)
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    for block, attention in record_edit(pipe, clip).items():
        torch.testing.assert_close(attention.maps, expected[block].maps, atol=1e-6, rtol=1e-4)


def test_steps_that_a_cache_skips_do_not_count(pipe, clip):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    attention = record_edit(pipe, clip, num_inference_steps=3)
    assert (attention[0].num_steps, attention[1].num_steps) == (3, 1)


@pytest.mark.parametrize("blocks", [[], [2], [0, -1]])
def test_blocks_that_there_are_not(shared_pipe, blocks):
    with pytest.raises(ValueError, match=r"`blocks` has to name one or more blocks in \[0, 1\], got \["):
        with record_attention(shared_pipe.transformer, blocks):
            pass


def test_a_compiled_transformer_is_refused():
    transformer = build_transformer()
    transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match="has to be eager"), record_attention(transformer, [0]):
        pass


def test_a_sequence_that_is_split_is_refused(monkeypatch):
    transformer = build_transformer()
    transformer._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(ValueError, match="split over processes"), record_attention(transformer, [0]):
        pass


def test_steps_that_there_are_not(shared_pipe, clip):
    with pytest.raises(ValueError, match=r"recorded in no step: there were 2, and `steps` is \[2\]"):
        record_edit(shared_pipe, clip, [2])


def test_one_recording_is_of_one_edit(shared_pipe, clip):
    with pytest.raises(ValueError, match="One recording is of one edit"):
        with record_attention(shared_pipe.transformer, [0]):
            for height in (32, 16):
                shared_pipe(make_clip(5, height, 32), PROMPT, output_type="latent")


def test_place_information_is_mutual_information():
    maps = torch.rand(6, *GRID, generator=torch.Generator().manual_seed(0)).mul(9).softmax(0)
    information = place_information(maps)
    mean = maps.mean((1, 2, 3), keepdim=True)
    assert information.min() >= 0
    torch.testing.assert_close(information.sum(0), (maps * (maps / mean).log()).sum(0))
    torch.testing.assert_close(information.mean((1, 2, 3)), (maps * (maps / mean).log()).mean((1, 2, 3)))
    assert place_information(mean.expand_as(maps)).max() < 1e-6
    assert place_information(torch.zeros(1, *GRID)).max() == 0


def test_words_of_a_text():
    words, marks, padding = text_words(build_text_tokenizer(), "Make  the zebra blue.", 16)
    assert [word for word, _ in words] == ["Make", "the", "zebra", "blue."]
    assert [len(tokens) for _, tokens in words] == [5, 1, 6, 2]  # letters, and signs that it does not know
    tokens = [index for _, indices in words for index in indices]
    assert tokens + marks + padding == list(range(16))
    assert (len(marks), len(padding)) == (1, 1)


def test_text_that_is_too_long():
    words, marks, padding = text_words(build_text_tokenizer(), "make the ball blue", 3)
    assert (words, marks, padding) == ([("make", [0]), ("the", [1])], [2], [])


def test_words_are_those_that_the_text_encoder_gives(shared_pipe):
    embeds, _ = shared_pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    words, marks, padding = text_words(shared_pipe.tokenizer, PROMPT, embeds.shape[1])
    assert " ".join(word for word, _ in words) == PROMPT
    is_padding = (embeds[0] == 0).all(-1)
    assert is_padding.nonzero().flatten().tolist() == padding
    assert not is_padding[marks].any()


@pytest.mark.parametrize(("patch", "expected"), [(1, [0, 1, 1, 1, 1, 2]), (2, [0, 0, 0, 0, 0, 1])])
def test_frames_of_the_maps(patch, expected):
    pipe = build_pipeline(patch_size=(patch, 2, 2))
    assert latent_frames(pipe, 6) == expected
    attention = record_edit(pipe, make_clip(6, 32, 32), blocks=[0])
    assert attention[0].maps["edit"].shape[2] == expected[-1] + 1


def test_changed_places_are_covered_half_as_much_as_any():
    region = torch.zeros(3, 8, 8, dtype=torch.bool)
    region[:, :4, :4] = True  # a whole place
    region[:, :2, 4:] = True  # half a place
    region[:, 4:, 0] = True  # a quarter of one
    region[1, 4:, 4:] = True  # half the frames of the second time
    changed = changed_places(region, (2, 2, 2), [0, 1, 1])
    assert changed.tolist() == [[[True, True], [False, False]], [[True, True], [False, True]]]
    thin = torch.zeros(1, 8, 8, dtype=torch.bool)
    thin[0, 5, 5] = True
    assert changed_places(thin, (1, 2, 2), [0]).tolist() == [[[False, False], [False, True]]]
    assert not changed_places(torch.zeros_like(thin), (1, 2, 2), [0]).any()


def test_visual_tokens_stand_on_a_grid(shared_pipe, clip):
    _, _, positions, _ = shared_pipe.encode_tokens(clip, PROMPT)
    order = torch.randperm(positions.shape[1], generator=torch.Generator().manual_seed(0))
    grid, times = visual_grid(positions[0, order])
    assert grid.shape == (2, 2, 2)
    placed = positions[0, order][grid]  # (times, rows, columns, 3)
    assert torch.equal(placed.flatten(0, 2), positions[0])
    assert torch.equal(times, positions[0, :, 0].unique())


def test_visual_tokens_that_fill_no_grid():
    with pytest.raises(ValueError, match="`positions` has to fill a grid, got 3 places"):
        visual_grid(torch.eye(3))
