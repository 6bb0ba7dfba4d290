import copy

import accelerate
import pytest
import torch

from rvedit_diffusers.distiller_rvedit import RVEDiTTokenDistiller, RVEDiTTokenDistillerOutput
from rvedit_diffusers.processing_rvedit import RVEDiTProcessor
from rvedit_diffusers.tiny import FAMILIES, save_tiny_mllm


HIDDEN_SIZE, DIM, NUM_EDIT_TOKENS = 32, 24, 4


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    mllm, _ = save_tiny_mllm(folder, request.param, hidden_size=HIDDEN_SIZE, num_layers=2, initializer_range=0.2)
    return folder, mllm.requires_grad_(False)


@pytest.fixture
def processor(checkpoint):
    return RVEDiTProcessor.from_mllm(checkpoint[0], num_edit_tokens=NUM_EDIT_TOKENS, max_frames=6, max_pixels=64 * 64)


@pytest.fixture
def mllm(checkpoint):
    return checkpoint[1]


def make_distiller(**kwargs):
    torch.manual_seed(0)
    return RVEDiTTokenDistiller(HIDDEN_SIZE, DIM, **{"num_edit_tokens": NUM_EDIT_TOKENS} | kwargs)


def make_batch(processor):
    """Two samples that differ in length, size and instruction."""
    generator = torch.Generator().manual_seed(0)
    clips = [torch.rand(3, 3, 32, 32, generator=generator), torch.rand(6, 3, 48, 64, generator=generator)]
    texts = ["remove the large green object on the left", "make it red"]
    return clips, texts, processor(clips, texts)


def model_inputs(inputs):
    """What the MLLM alone takes."""
    return {name: inputs[name] for name in inputs if name not in ("edit_mask", "visual_mask", "visual_positions")}


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_planted_queries_and_video_features_come_back(processor, mllm, padding_side):
    # The states before the first layer are what stands in the context, so each harvested state can be checked exactly.
    processor.tokenizer.padding_side = padding_side
    distiller = make_distiller(hidden_layer=0)
    _, _, inputs = make_batch(processor)
    edit_states, visual_states, _, mask = distiller.harvest(mllm, inputs)
    assert torch.equal(edit_states, distiller.queries.expand(2, -1, -1))
    features = mllm.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    for row, feature in enumerate(features):
        assert torch.equal(visual_states[row][mask[row]], feature)
        assert torch.equal(mask[row], torch.arange(mask.shape[1]) < len(feature))
    assert not visual_states[~mask].any()


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("hidden_layer", [-1, 1])
def test_harvest_equals_a_plain_call_when_queries_are_the_slots_own_embedding(
    processor, mllm, hidden_layer, padding_side
):
    processor.tokenizer.padding_side = padding_side
    distiller = make_distiller(hidden_layer=hidden_layer)
    embedding = mllm.get_input_embeddings().weight
    with torch.no_grad():
        distiller.queries.copy_(embedding[processor.edit_token_id].expand_as(distiller.queries))
    _, _, inputs = make_batch(processor)
    expected = mllm(**model_inputs(inputs), output_hidden_states=True).hidden_states[hidden_layer]
    edit_states, visual_states, _, mask = distiller.harvest(mllm, inputs)
    for row, ids in enumerate(inputs["input_ids"]):
        torch.testing.assert_close(edit_states[row], expected[row][ids == processor.edit_token_id])
        torch.testing.assert_close(visual_states[row][mask[row]], expected[row][ids == mllm.config.video_token_id])


def test_batch_of_two_equals_two_of_one(processor, mllm):
    distiller = make_distiller()
    clips, texts, inputs = make_batch(processor)
    batch = distiller(mllm, inputs)
    for row, (clip, text) in enumerate(zip(clips, texts)):
        single = distiller(mllm, processor(clip, text))
        mask = batch.visual_attention_mask[row]
        torch.testing.assert_close(batch.edit_hidden_states[row], single.edit_hidden_states[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            batch.visual_hidden_states[row][mask], single.visual_hidden_states[0], rtol=1e-4, atol=1e-5
        )
        assert torch.equal(batch.visual_positions[row][mask], single.visual_positions[0])
        assert single.visual_attention_mask is None


def test_queries_get_gradients_through_a_frozen_mllm(processor, mllm):
    distiller = make_distiller()
    _, _, inputs = make_batch(processor)
    distiller(mllm, inputs).edit_hidden_states.square().mean().backward()
    assert (distiller.queries.grad.norm(dim=-1) > 0).all()
    assert all(parameter.grad is None for parameter in mllm.parameters())


def test_mllm_gradient_checkpointing_gives_equal_gradients(processor, mllm):
    _, _, inputs = make_batch(processor)
    gradients = []
    for checkpointing in (False, True):
        distiller, model = make_distiller(), copy.deepcopy(mllm).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        distiller(model, inputs).edit_hidden_states.square().mean().backward()
        gradients.append(distiller.queries.grad)
    torch.testing.assert_close(*gradients)


def test_harvest_leaves_the_mllm_as_it_was(processor, mllm):
    before = {name: parameter.clone() for name, parameter in mllm.named_parameters()}
    mllm.model.rope_deltas = None
    _, _, inputs = make_batch(processor)
    make_distiller().harvest(mllm, inputs)
    assert mllm.model.rope_deltas is None
    assert all(torch.equal(parameter, before[name]) for name, parameter in mllm.named_parameters())


def test_the_head_is_not_needed(processor, mllm):
    distiller = make_distiller()
    _, _, inputs = make_batch(processor)
    expected, output = (distiller(model, inputs) for model in (mllm, mllm.model))
    assert type(mllm.model) is not type(mllm)
    assert torch.equal(output.edit_hidden_states, expected.edit_hidden_states)
    assert torch.equal(output.visual_hidden_states, expected.visual_hidden_states)


def test_visual_tokens_have_read_an_instruction_that_comes_first(checkpoint, mllm):
    clip = torch.rand(4, 3, 32, 32)
    for instruction_first in (True, False):
        processor = RVEDiTProcessor.from_mllm(
            checkpoint[0], num_edit_tokens=NUM_EDIT_TOKENS, instruction_first=instruction_first
        )
        # One word differs, so positions do not.
        inputs = [processor(clip, f"make the {colour} ball") for colour in ("red", "blue")]
        assert inputs[0]["input_ids"].shape == inputs[1]["input_ids"].shape
        red, blue = (make_distiller().harvest(mllm, each) for each in inputs)
        assert torch.equal(red[1], blue[1]) is not instruction_first
        assert not torch.equal(red[0], blue[0])


def test_forward_is_harvest_then_connect(processor, mllm):
    distiller = make_distiller()
    _, _, inputs = make_batch(processor)
    edit_states, visual_states, visual_positions, mask = distiller.harvest(mllm, inputs)
    edit_tokens, visual_tokens = distiller.connect(edit_states, visual_states)
    output = distiller(mllm, inputs)
    assert isinstance(output, RVEDiTTokenDistillerOutput)
    assert output.edit_hidden_states.shape == (2, NUM_EDIT_TOKENS, DIM)
    assert output.visual_hidden_states.shape == (2, int(inputs["visual_mask"].sum(1).max()), DIM)
    expected = (edit_tokens, visual_tokens, visual_positions, mask)
    for got in (output.to_tuple(), distiller(mllm, inputs, return_dict=False)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_states_are_brought_to_where_the_connectors_are():
    with torch.device("meta"):
        distiller = RVEDiTTokenDistiller(mllm_hidden_size=8, dim=4, num_edit_tokens=2)
    edit, visual = distiller.connect(torch.zeros(1, 2, 8), torch.zeros(1, 3, 8, dtype=torch.bfloat16))
    assert (edit.device.type, edit.shape, visual.shape) == ("meta", (1, 2, 4), (1, 3, 4))


def test_streams_have_their_own_connectors():
    distiller = make_distiller()
    states = torch.randn(2, 5, HIDDEN_SIZE)
    edit_tokens, visual_tokens = distiller.connect(states, states)
    torch.nn.init.zeros_(distiller.visual_connector.linear_2.weight)
    torch.nn.init.zeros_(distiller.visual_connector.linear_2.bias)
    edit_again, visual_again = distiller.connect(states, states)
    assert torch.equal(edit_tokens, edit_again)
    assert visual_tokens.abs().max() > 0 and not visual_again.any()


def test_save_and_load(processor, mllm, tmp_path):
    distiller = make_distiller(hidden_layer=1)
    distiller.save_pretrained(tmp_path)
    loaded = RVEDiTTokenDistiller.from_pretrained(tmp_path)
    assert dict(loaded.config).items() >= {"hidden_layer": 1, "num_edit_tokens": NUM_EDIT_TOKENS, "dim": DIM}.items()
    _, _, inputs = make_batch(processor)
    for got, expected in zip(
        loaded(mllm, inputs, return_dict=False), distiller.eval()(mllm, inputs, return_dict=False)
    ):
        assert torch.equal(got, expected)


def test_bfloat16_load(processor, mllm, tmp_path):
    distiller = make_distiller()
    distiller.save_pretrained(tmp_path)
    loaded = RVEDiTTokenDistiller.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    _, _, inputs = make_batch(processor)
    output, expected = loaded(mllm, inputs), distiller(mllm, inputs)
    assert output.edit_hidden_states.dtype == output.visual_hidden_states.dtype == torch.bfloat16
    assert output.visual_positions.dtype == torch.float32
    torch.testing.assert_close(output.edit_hidden_states.float(), expected.edit_hidden_states, rtol=0.05, atol=0.05)


def test_mllm_and_distiller_may_differ_in_dtype(processor, mllm):
    distiller = make_distiller()
    _, _, inputs = make_batch(processor)
    edit_states, visual_states, *_ = distiller.harvest(copy.deepcopy(mllm).bfloat16(), inputs)
    assert edit_states.dtype == visual_states.dtype == torch.bfloat16
    edit_tokens, visual_tokens = distiller.connect(edit_states, visual_states)
    assert edit_tokens.dtype == visual_tokens.dtype == torch.float32
    edit_tokens.sum().backward()
    assert distiller.queries.grad.abs().sum() > 0


def test_layerwise_casting_computes_in_the_compute_dtype(processor, mllm):
    distiller = make_distiller()
    _, _, inputs = make_batch(processor)
    expected = distiller(mllm, inputs)
    distiller.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    output = distiller(mllm, inputs)
    assert distiller.edit_connector.linear_1.weight.dtype == torch.bfloat16
    assert output.edit_hidden_states.dtype == torch.float32
    torch.testing.assert_close(output.edit_hidden_states, expected.edit_hidden_states, rtol=0.05, atol=0.05)


def test_offloaded_modules_give_equal_tokens(processor, mllm):
    distiller = make_distiller().requires_grad_(False)
    _, _, inputs = make_batch(processor)
    expected = distiller(mllm, inputs, return_dict=False)
    offloaded_mllm, offloaded = copy.deepcopy(mllm), copy.deepcopy(distiller)
    accelerate.cpu_offload(offloaded_mllm, torch.device("cpu"))
    accelerate.cpu_offload(offloaded, torch.device("cpu"))
    assert offloaded.queries.is_meta and offloaded_mllm.get_input_embeddings().weight.is_meta
    with torch.no_grad():
        states = offloaded.harvest(offloaded_mllm, inputs)
        output = (*offloaded.connect(*states[:2]), *states[2:])
    for got, wanted in zip(output, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_offloading_brings_in_the_mllm_and_then_the_distiller(processor, mllm):
    order = []

    class Recorder(accelerate.hooks.ModelHook):
        def __init__(self, name):
            self.name = name

        def pre_forward(self, module, *args, **kwargs):
            order.append(self.name)
            return args, kwargs

    distiller, mllm = make_distiller(), copy.deepcopy(mllm)
    accelerate.hooks.add_hook_to_module(mllm, Recorder("mllm"))
    accelerate.hooks.add_hook_to_module(distiller, Recorder("distiller"))
    _, _, inputs = make_batch(processor)
    states = distiller.harvest(mllm, inputs)
    distiller.connect(*states[:2])
    assert order[-2:] == ["mllm", "distiller"]


def test_wrong_number_of_slots_is_named(processor, mllm):
    _, _, inputs = make_batch(processor)
    with pytest.raises(ValueError, match=r"\[4, 4\] editing slots.*`num_edit_tokens=5`"):
        make_distiller(num_edit_tokens=5)(mllm, inputs)


def test_wrong_hidden_size_is_named(processor, mllm):
    _, _, inputs = make_batch(processor)
    with pytest.raises(ValueError, match="`mllm` has hidden size 32.*`mllm_hidden_size=16`"):
        RVEDiTTokenDistiller(16, DIM, num_edit_tokens=NUM_EDIT_TOKENS)(mllm, inputs)


@pytest.mark.parametrize("hidden_layer", [3, -4])
def test_wrong_hidden_layer_is_named(processor, mllm, hidden_layer):
    _, _, inputs = make_batch(processor)
    with pytest.raises(ValueError, match=r"`hidden_layer` must be in \[-3, 2\]"):
        make_distiller(hidden_layer=hidden_layer)(mllm, inputs)


def test_wrong_mllm_is_named(processor):
    _, _, inputs = make_batch(processor)
    with pytest.raises(TypeError, match="`mllm` must be a Qwen2.5-VL or Qwen3-VL model.*got Linear"):
        make_distiller()(torch.nn.Linear(2, 2), inputs)


def test_wrong_inputs_are_named(processor, mllm):
    _, _, inputs = make_batch(processor)
    with pytest.raises(ValueError, match=r"`inputs`.*lacks \['edit_mask', 'visual_mask', 'visual_positions'\]"):
        make_distiller()(mllm, model_inputs(inputs))
    with pytest.raises(TypeError, match="`inputs`.*got Tensor"):
        make_distiller()(mllm, inputs["input_ids"])
    with pytest.raises(ValueError, match=r'`inputs\["visual_positions"\]` must be float32'):
        make_distiller()(mllm, inputs.to(dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(2, 5, HIDDEN_SIZE + 1), (5, HIDDEN_SIZE)])
def test_wrong_states_are_named(shape):
    good, bad = torch.zeros(2, 5, HIDDEN_SIZE), torch.zeros(shape)
    with pytest.raises(ValueError, match=r"`edit_states` must have shape \(batch, seq, 32\)"):
        make_distiller().connect(bad, good)
    with pytest.raises(ValueError, match=r"`visual_states` must have shape \(batch, seq, 32\)"):
        make_distiller().connect(good, bad)
