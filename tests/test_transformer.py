import copy

import pytest
import torch
from accelerate import infer_auto_device_map
from components import Calls
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from peft import LoraConfig
from torch import nn

from rvedit_diffusers.transformer_rvedit import RVEDiTRotaryPosEmbed, RVEDiTTransformer3DModel


NUM_HEADS = 2
HEAD_DIM = 12
DIM = NUM_HEADS * HEAD_DIM
WAN_CONFIG = {
    "num_attention_heads": NUM_HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
CONFIG = {**WAN_CONFIG, "source_channels": 4}
GRID = (3, 4, 6)  # patches of the latents below, in time, height and width
SEQ = GRID[0] * GRID[1] * GRID[2]
SHALLOW, DEEP = 0, 1  # CONFIG's three blocks are one shallow and two deep ones
ONE_OF_EACH = {"num_layers": 2, "num_shallow_blocks": 1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.compiler.reset()


def make_model(**kwargs):
    """A tiny model whose zero-initialised layers are not zero, so that every path reaches the output."""
    model = RVEDiTTransformer3DModel(**{**CONFIG, "num_position_freqs": 2, **kwargs})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_inputs(batch_size=2, num_visual=9, dtype=torch.float32):
    return {
        "hidden_states": torch.randn(batch_size, 4, 3, 8, 12, dtype=dtype),
        "timestep": torch.linspace(20, 900, batch_size),
        "encoder_hidden_states": torch.randn(batch_size, 7, 16, dtype=dtype),
        "edit_hidden_states": torch.randn(batch_size, 5, DIM, dtype=dtype),
        "visual_hidden_states": torch.randn(batch_size, num_visual, DIM, dtype=dtype),
        "visual_positions": torch.rand(batch_size, num_visual, 3),
        "source_hidden_states": torch.randn(batch_size, 4, 3, 8, 12, dtype=dtype),
    }


def make_block_inputs(model, batch_size=2):
    """What a block of `model` gets, by name, from random streams."""
    latents = torch.empty(batch_size, 4, 3, 8, 12)
    cos, sin, visual_cos, visual_sin = model.rope(latents, torch.rand(batch_size, 9, 3))
    return {
        "hidden_states": torch.randn(batch_size, SEQ, DIM),
        "encoder_hidden_states": torch.randn(batch_size, 7, DIM),
        "temb": torch.randn(batch_size, 1, 6, DIM),
        "rotary_emb": (cos, sin),
        "edit_hidden_states": torch.randn(batch_size, 5, DIM),
        "visual_hidden_states": torch.randn(batch_size, 9, DIM),
        "visual_rotary_emb": (visual_cos, visual_sin),
    }


def full_rope(half):
    """Wan's layout of cosines or sines: each value once for both channels of its pair."""
    return half.repeat_interleave(2, dim=-1)


# ------------------------------------------------------------------------------------------------------ Wan parity


@pytest.mark.parametrize("source_channels", [0, 4])
@pytest.mark.parametrize("timestep_shape", [(2,), (2, SEQ)])
def test_equals_wan_bit_for_bit(source_channels, timestep_shape):
    wan = WanTransformer3DModel(**WAN_CONFIG).eval()
    model = RVEDiTTransformer3DModel(
        **WAN_CONFIG, source_channels=source_channels, shallow_tokens=("text",), deep_tokens=("text",)
    ).eval()
    missing, unexpected = model.load_state_dict(wan.state_dict(), strict=False)
    assert missing == (["source_embedding.weight"] if source_channels else [])
    assert unexpected == []

    inputs = make_inputs()
    wan_inputs = {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states")}
    timestep = torch.rand(timestep_shape) * 1000
    source = inputs["source_hidden_states"] if source_channels else None
    expected = wan(**wan_inputs, timestep=timestep).sample
    sample = model(**wan_inputs, timestep=timestep, source_hidden_states=source).sample
    assert torch.equal(sample, expected)
    with torch.no_grad():  # rotates with complex numbers
        sample = model(**wan_inputs, timestep=timestep, source_hidden_states=source).sample
    torch.testing.assert_close(sample, expected, atol=1e-6, rtol=1e-6)


def test_equals_wan_bit_for_bit_in_bf16(tmp_path):
    wan = WanTransformer3DModel(**WAN_CONFIG)
    wan.save_pretrained(tmp_path / "wan")
    model = RVEDiTTransformer3DModel(**WAN_CONFIG, source_channels=0, shallow_tokens=("text",), deep_tokens=("text",))
    model.load_state_dict(wan.state_dict())
    model.save_pretrained(tmp_path / "rvedit")
    wan = WanTransformer3DModel.from_pretrained(tmp_path / "wan", torch_dtype=torch.bfloat16)
    model = RVEDiTTransformer3DModel.from_pretrained(tmp_path / "rvedit", torch_dtype=torch.bfloat16)

    inputs = make_inputs(dtype=torch.bfloat16)
    wan_inputs = {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")}
    expected = wan(**wan_inputs).sample
    assert torch.equal(model(**wan_inputs).sample, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**wan_inputs).sample, expected)


def test_gradients_equal_wan():
    wan = WanTransformer3DModel(**WAN_CONFIG)
    model = RVEDiTTransformer3DModel(**WAN_CONFIG, source_channels=0, shallow_tokens=("text",), deep_tokens=("text",))
    model.load_state_dict(wan.state_dict())
    inputs = make_inputs()
    wan_inputs = {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")}
    wan(**wan_inputs).sample.square().mean().backward()
    model(**wan_inputs).sample.square().mean().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in wan.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-7, rtol=1e-5, msg=name)


@torch.no_grad()
def test_source_embedding_equals_channel_concatenation():
    model = make_model()
    inputs = make_inputs()
    concatenated = nn.Conv3d(8, DIM, kernel_size=(1, 2, 2), stride=(1, 2, 2))
    concatenated.weight.copy_(torch.cat([model.patch_embedding.weight, model.source_embedding.weight], dim=1))
    concatenated.bias.copy_(model.patch_embedding.bias)
    expected = copy.deepcopy(model)
    expected.register_to_config(in_channels=8)
    expected.patch_embedding = concatenated

    sample = model(**inputs).sample
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], inputs.pop("source_hidden_states")], dim=1)
    torch.testing.assert_close(sample, expected(**inputs).sample, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_no_source_equals_zero_source():
    model = make_model()
    inputs = make_inputs()
    source = torch.zeros_like(inputs.pop("source_hidden_states"))
    assert torch.equal(model(**inputs).sample, model(**inputs, source_hidden_states=source).sample)


def test_deep_block_of_converted_base_starts_as_the_base():
    wan = WanTransformer3DModel(**WAN_CONFIG).eval()
    model = RVEDiTTransformer3DModel(**CONFIG).eval()
    model.load_state_dict(wan.state_dict(), strict=False)
    inputs = make_block_inputs(model)
    expected = wan.blocks[DEEP](
        inputs["hidden_states"],
        inputs["encoder_hidden_states"],
        inputs["temb"].squeeze(1),
        tuple(full_rope(half) for half in inputs["rotary_emb"]),
    )
    assert torch.equal(model.blocks[DEEP](**inputs), expected)


def test_place_in_the_frame_starts_at_zero_and_learns():
    plain, placed = RVEDiTTransformer3DModel(**CONFIG), RVEDiTTransformer3DModel(**CONFIG, num_position_freqs=3)
    placed.load_state_dict(plain.state_dict(), strict=False)
    inputs = make_inputs()
    sample = placed(**inputs).sample
    assert torch.equal(sample, plain(**inputs).sample)
    sample.square().mean().backward()
    assert placed.position_embedding.proj.weight.grad.any(dim=0).all()  # of every sine and cosine


@torch.no_grad()
def test_patches_know_their_place_in_frames_of_any_size():
    embed = make_model().position_embedding
    latents = torch.empty(2, 4, 2, 6, 10)
    small, large = embed(latents, (2, 3, 5)), embed(latents, (1, 9, 15))
    assert small.shape == (1, DIM, 2, 3, 5)
    assert torch.equal(small[:, :, 0], small[:, :, 1])
    # the centre of a patch of the small grid is that of the middle one of its nine in the large one
    torch.testing.assert_close(small[:, :, 0], large[:, :, 0, 1::3, 1::3], atol=1e-5, rtol=1e-5)
    assert len(small[0, :, 0].flatten(1).T.unique(dim=0)) == 15
    # row 1 of 3 is the middle: half a wave has sine 1 and cosine 0 there, a whole one 0 and -1
    weight = embed.proj.weight
    middle = weight @ torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, -1.0, 0.0, -1.0])
    torch.testing.assert_close(small[0, :, 0, 1, 2], middle, atol=1e-5, rtol=1e-5)


def test_negative_position_freqs_are_refused():
    with pytest.raises(ValueError, match="`num_position_freqs` has to be at least 0, got -1"):
        RVEDiTTransformer3DModel(**CONFIG, num_position_freqs=-1)


def test_visual_tokens_learn_from_the_zero_start():
    model = RVEDiTTransformer3DModel(**CONFIG)
    model(**make_inputs()).sample.square().mean().backward()
    assert model.blocks[DEEP].attn2.add_v_proj.weight.grad.abs().max() > 0
    assert model.source_embedding.weight.grad.abs().max() > 0


# --------------------------------------------------------------------------------------------------------- routing


def test_default_routing():
    model = RVEDiTTransformer3DModel(**{**CONFIG, "num_layers": 7})
    assert [block.tokens for block in model.blocks] == [("edit",)] * 2 + [("text", "visual")] * 5


@pytest.mark.parametrize("num_shallow_blocks", [0, 2, 3])
def test_num_shallow_blocks(num_shallow_blocks):
    model = RVEDiTTransformer3DModel(**CONFIG, num_shallow_blocks=num_shallow_blocks)
    assert [block.tokens == ("edit",) for block in model.blocks] == [i < num_shallow_blocks for i in range(3)]


def test_added_projections_exist_only_where_visual_tokens_are_read():
    names = make_model().state_dict()
    assert not any(name.startswith("blocks.0.") and "add" in name for name in names)
    assert "blocks.1.attn2.add_k_proj.weight" in names


@pytest.mark.parametrize("changed", ["encoder_hidden_states", "visual_hidden_states", "visual_positions"])
@torch.no_grad()
def test_shallow_block_does_not_read_text_or_visual_tokens(changed):
    model = make_model()
    inputs = make_inputs()
    plain = model(**inputs, return_features=[0, 1, 2])
    inputs[changed] = torch.rand_like(inputs[changed])
    other = model(**inputs, return_features=[0, 1, 2])
    assert torch.equal(plain.features[SHALLOW], other.features[SHALLOW])
    assert not torch.equal(plain.features[DEEP], other.features[DEEP])
    assert not torch.equal(plain.sample, other.sample)


@pytest.mark.parametrize(
    "index, changed, reads",
    [
        (SHALLOW, "edit_hidden_states", True),
        (SHALLOW, "encoder_hidden_states", False),
        (SHALLOW, "visual_hidden_states", False),
        (DEEP, "edit_hidden_states", False),
        (DEEP, "encoder_hidden_states", True),
        (DEEP, "visual_hidden_states", True),
    ],
)
@torch.no_grad()
def test_block_reads_only_its_streams(index, changed, reads):
    model = make_model()
    inputs = make_block_inputs(model)
    plain = model.blocks[index](**inputs)
    other = model.blocks[index](**{**inputs, changed: torch.randn_like(inputs[changed])})
    assert torch.equal(plain, other) == (not reads)


@torch.no_grad()
def test_edit_and_text_tokens_share_one_softmax():
    model = make_model(deep_tokens=("edit", "text"))
    inputs = make_block_inputs(model)
    edit, text = inputs["edit_hidden_states"], inputs["encoder_hidden_states"]
    both = model.blocks[DEEP](**inputs)
    moved = model.blocks[DEEP](
        **{**inputs, "edit_hidden_states": torch.cat([edit, text[:, :3]], dim=1), "encoder_hidden_states": text[:, 3:]}
    )
    torch.testing.assert_close(both, moved, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("deep_tokens", [("text", "visual"), ("edit", "text")])
@pytest.mark.parametrize("with_context", [False, True])
@torch.no_grad()
def test_masked_text_tokens_are_as_if_they_were_not_there(deep_tokens, with_context):
    model, inputs = make_model(deep_tokens=deep_tokens), make_inputs()
    text = inputs.pop("encoder_hidden_states")
    mask = torch.arange(7).expand(2, -1) < 4
    given = inputs
    if with_context:
        given = {name: inputs[name] for name in ("hidden_states", "timestep")}
        tokens = {name: value for name, value in inputs.items() if name != "timestep"}
        given["context"] = model.project_context(**tokens, encoder_hidden_states=text, encoder_attention_mask=mask)
        masked = model(**given).sample
    else:
        masked = model(**given, encoder_hidden_states=text, encoder_attention_mask=mask).sample
    torch.testing.assert_close(masked, model(**inputs, encoder_hidden_states=text[:, :4]).sample, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(masked, model(**inputs, encoder_hidden_states=text).sample, atol=1e-3)


@pytest.mark.parametrize("deep_tokens", [("text", "visual"), ("edit", "text")])
@torch.no_grad()
def test_a_logarithm_in_the_mask_counts_a_text_token_as_several(deep_tokens):
    model, inputs = make_model(deep_tokens=deep_tokens), make_inputs()
    text = inputs.pop("encoder_hidden_states")
    counts = torch.tensor([[1, 1, 1, 4, 1, 1, 2], [3, 1, 1, 1, 3, 1, 1]])
    counted = model(**inputs, encoder_hidden_states=text, encoder_attention_mask=counts.log()).sample
    repeated = torch.stack([row.repeat_interleave(count, 0) for row, count in zip(text, counts)])
    torch.testing.assert_close(counted, model(**inputs, encoder_hidden_states=repeated).sample, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(counted, model(**inputs, encoder_hidden_states=text).sample, atol=1e-3)


@pytest.mark.parametrize("num_edit, num_visual", [(1, 9), (5, 1), (1, 1)])
@torch.no_grad()
def test_a_single_token_is_read_as_equal_ones_are(num_edit, num_visual):
    model, inputs = make_model(), make_inputs(num_visual=num_visual)
    inputs["edit_hidden_states"] = inputs["edit_hidden_states"][:, :num_edit]
    repeated = dict(inputs)
    for name, count in (("edit_hidden_states", num_edit), ("visual_hidden_states", num_visual)):
        if count == 1:
            repeated[name] = inputs[name].expand(-1, 3, -1)
    repeated["visual_positions"] = torch.rand(2, repeated["visual_hidden_states"].shape[1], 3)
    if num_visual != 1:
        repeated["visual_positions"] = inputs["visual_positions"]
    single = model(**inputs, return_features=[SHALLOW, DEEP])
    several = model(**repeated, return_features=[SHALLOW, DEEP])
    torch.testing.assert_close(single.sample, several.sample, atol=1e-5, rtol=1e-5)
    for feature, expected in zip(single.features, several.features):
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-5)


def test_all_parameters_get_gradients_of_single_tokens():
    model, inputs = make_model(), make_inputs(num_visual=1)
    inputs["edit_hidden_states"] = inputs["edit_hidden_states"][:, :1]
    model(**inputs).sample.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(2, 6, dtype=torch.bool), r"shape \(2, 7\), as there are text tokens, got torch.bool of \(2, 6\)"),
        (torch.ones(2, 7, dtype=torch.int64), r"shape \(2, 7\), as there are text tokens, got torch.int64 of"),
    ],
)
def test_text_mask_that_does_not_fit_is_refused(mask, message):
    model, inputs = make_model(), make_inputs()
    with pytest.raises(ValueError, match=message):
        model(**inputs, encoder_attention_mask=mask)
    del inputs["timestep"]
    with pytest.raises(ValueError, match=message):
        model.project_context(**inputs, encoder_attention_mask=mask)


@torch.no_grad()
def test_a_stream_that_no_block_reads_may_be_missing():
    model = make_model(shallow_tokens=("edit",), deep_tokens=("edit", "visual"))
    inputs = make_inputs()
    expected = model(**inputs).sample
    del inputs["encoder_hidden_states"]
    assert torch.equal(model(**inputs).sample, expected)


@torch.no_grad()
def test_missing_visual_tokens_skip_the_visual_branch():
    model = make_model()
    inputs = make_inputs()
    del inputs["visual_hidden_states"], inputs["visual_positions"]
    text_only = make_model(deep_tokens=("text",))
    text_only.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(**inputs).sample, text_only(**inputs).sample)


@torch.no_grad()
def test_visual_tokens_alone_can_be_read():
    model = make_model(shallow_tokens=("visual",), deep_tokens=("visual",))
    inputs = make_inputs()
    del inputs["encoder_hidden_states"], inputs["edit_hidden_states"]
    sample = model(**inputs).sample
    inputs["visual_hidden_states"] = torch.randn_like(inputs["visual_hidden_states"])
    assert not torch.equal(model(**inputs).sample, sample)


# -------------------------------------------------------------------------------------------------- visual tokens


@pytest.mark.parametrize("grid", [(3, 4, 8), (5, 3, 7), (1, 2, 2)])
def test_visual_rope_on_the_grid_is_the_rope_of_the_latents(grid):
    num_frames, height, width = grid
    rope = RVEDiTRotaryPosEmbed(HEAD_DIM, (1, 2, 2), 32)
    time, row, column = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    positions = torch.stack(
        [time / max(num_frames - 1, 1), (row + 0.5) / height, (column + 0.5) / width], dim=-1
    ).reshape(1, -1, 3)
    cos, sin, visual_cos, visual_sin = rope(torch.empty(1, 4, num_frames, 2 * height, 2 * width), positions)
    # Fractions such as 2.5 / 7 are not exact in fp32; nothing else may differ.
    torch.testing.assert_close(visual_cos, cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(visual_sin, sin, atol=1e-6, rtol=0)
    if all(size in (1, 2, 3, 4, 8) for size in grid):
        assert torch.equal(visual_cos, cos)
        assert torch.equal(visual_sin, sin)


def test_latent_rope_equals_wan():
    latents = torch.empty(1, 4, 3, 8, 12)
    cos, sin = RVEDiTRotaryPosEmbed(HEAD_DIM, (1, 2, 2), 32)(latents)
    wan_cos, wan_sin = WanRotaryPosEmbed(HEAD_DIM, (1, 2, 2), 32)(latents)
    assert torch.equal(full_rope(cos), wan_cos)
    assert torch.equal(full_rope(sin), wan_sin)


def test_visual_rope_between_grid_points_follows_the_formula():
    rope = RVEDiTRotaryPosEmbed(HEAD_DIM, (1, 2, 2), 256)
    num_frames, height, width = 21, 60, 104
    positions = torch.rand(2, 500, 3)
    positions[0, 0], positions[0, 1] = 0, 1  # both corners of the clip
    _, _, cos, sin = rope(torch.empty(2, 1, num_frames, 2 * height, 2 * width), positions)

    time, row, column = positions.double().unbind(-1)
    angles = []
    for position, dim in (
        (time * (num_frames - 1), rope.t_dim),
        (row * height - 0.5, rope.h_dim),
        (column * width - 0.5, rope.w_dim),
    ):
        angles.append(position[..., None] * 10000.0 ** -(torch.arange(0, dim, 2).double() / dim))
    angles = torch.cat(angles, dim=-1).unsqueeze(2)
    torch.testing.assert_close(cos.double(), angles.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_order_of_visual_tokens_is_only_in_their_positions():
    model = make_model()
    inputs = make_inputs()
    order = torch.randperm(9)
    expected = model(**inputs).sample
    for name in ("visual_hidden_states", "visual_positions"):
        inputs[name] = inputs[name][:, order]
    torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_masked_visual_tokens_equal_removed_ones():
    model = make_model()
    inputs = make_inputs(num_visual=9)
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[9], [6]])
    batched = model(**inputs, visual_attention_mask=mask).sample
    for index, num_valid in enumerate((9, 6)):
        single = {name: value[index : index + 1] for name, value in inputs.items()}
        for name in ("visual_hidden_states", "visual_positions"):
            single[name] = single[name][:, :num_valid]
        torch.testing.assert_close(batched[index : index + 1], model(**single).sample, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_full_mask_equals_no_mask():
    model = make_model()
    inputs = make_inputs()
    masked = model(**inputs, visual_attention_mask=torch.ones(2, 9, dtype=torch.bool)).sample
    torch.testing.assert_close(masked, model(**inputs).sample, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_batch_of_two_equals_two_of_one():
    model = make_model()
    inputs = make_inputs()
    batched = model(**inputs).sample
    singles = [
        model(**{name: value[index : index + 1] for name, value in inputs.items()}).sample for index in range(2)
    ]
    torch.testing.assert_close(batched, torch.cat(singles), atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- context


def project(model, inputs):
    """The context of `inputs`, from other latents of their size."""
    conditions = {name: value for name, value in inputs.items() if name not in LATENTS}
    conditions.pop("visual_attention_mask", None)
    return model.project_context(torch.full_like(inputs["hidden_states"], torch.nan), **conditions)


LATENTS = ("hidden_states", "timestep")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("without", [(), ("source_hidden_states",), ("visual_hidden_states", "visual_positions")])
@pytest.mark.parametrize("tokens", [("edit",), ("text", "visual"), ("edit", "text", "visual"), ("edit", "visual")])
@torch.no_grad()
def test_a_context_stands_for_tokens_positions_and_source(tokens, without, fused):
    model = make_model(shallow_tokens=tokens)
    if fused:
        model.fuse_qkv_projections()
    inputs = {name: value for name, value in make_inputs().items() if name not in without}
    rest = LATENTS
    if "visual_hidden_states" in inputs:
        inputs["visual_attention_mask"] = torch.arange(9) < torch.tensor([[9], [4]])
        rest += ("visual_attention_mask",)
    expected = model(**inputs).sample
    context = project(model, inputs)
    assert torch.equal(model(**{name: inputs[name] for name in rest}, context=context).sample, expected)
    assert torch.equal(model(**inputs, context=context).sample, expected)


@torch.no_grad()
def test_what_a_context_holds_is_not_computed_again():
    model, inputs = make_model(), make_inputs()
    context = project(model, inputs)
    attn, texts = model.blocks[DEEP].attn2, []
    calls = [Calls(layer) for layer in (attn.to_k, attn.to_v, attn.add_k_proj, model.source_embedding, model.rope)]
    model.condition_embedder.text_embedder.register_forward_pre_hook(lambda _, args: texts.append(args[0].shape[1]))
    model(**inputs, context=context)
    assert inputs["encoder_hidden_states"].shape[1] > 1  # the one that stands for no text
    assert [each.count for each in calls] == [0] * 5 and texts == [1]


def test_gradients_pass_through_a_context():
    model, inputs = make_model(), make_inputs()
    gradients = []
    for context in (None, project(model, inputs)):
        model.zero_grad()
        model(**inputs, context=context).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@torch.no_grad()
def test_a_context_has_the_scale_of_lora_layers():
    model, inputs = make_model(), make_inputs()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "add_v_proj"], init_lora_weights=False))
    expected = model(**inputs, attention_kwargs={"scale": 0.5}).sample
    conditions = {name: value for name, value in inputs.items() if name not in LATENTS}
    context = model.project_context(inputs["hidden_states"], attention_kwargs={"scale": 0.5}, **conditions)
    assert torch.equal(model(**inputs, attention_kwargs={"scale": 0.5}, context=context).sample, expected)
    assert not torch.equal(model(**inputs, context=project(model, inputs)).sample, expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offloading_has_no_context(offload_type):
    model, inputs = make_model(), make_inputs()
    model.enable_group_offload(torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1)
    assert project(model, inputs) is None


@torch.no_grad()
def test_first_block_cache_skips_alike_with_a_context():
    results = []
    for has_context in (False, True):
        torch.manual_seed(0)
        model, inputs, samples = make_model(), make_inputs(), []
        model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        calls = Calls(model.blocks[-1].ffn)
        context = project(model, inputs) if has_context else None
        with model.cache_context("cond"):
            for step in range(3):
                shifted = inputs | {"hidden_states": inputs["hidden_states"] * (1 + 0.01 * step)}
                samples.append(model(**shifted, context=context).sample)
        results.append(torch.stack(samples))
        assert calls.count == 1
    assert torch.equal(*results)


@torch.no_grad()
def test_a_context_of_other_sizes_is_refused():
    model, inputs = make_model(), make_inputs()
    context = project(model, inputs)
    one = {name: value[:1] for name, value in inputs.items()}
    with pytest.raises(ValueError, match=r"`context` has to be of 1 clips and 3 blocks.* got \[2\] clips"):
        model(**one, context=context)
    with pytest.raises(ValueError, match="`context` has to be of 2 clips and 2 blocks.* 3 blocks"):
        make_model(num_layers=2)(**inputs, context=context)
    narrow = {name: inputs[name][..., :8] for name in ("hidden_states", "source_hidden_states")}
    with pytest.raises(ValueError, match=r"`context` has to be of \(3, 4, 4\) patches, got \(3, 4, 6\)"):
        model(**inputs | narrow, context=context)
    with pytest.raises(ValueError, match=r"`visual_attention_mask` has to be bool of shape \(2, 9\), .* \(2, 8\)"):
        model(**inputs, visual_attention_mask=torch.ones(2, 8, dtype=torch.bool), context=context)


# -------------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def test_features_are_the_outputs_of_cross_attention():
    model = make_model()
    captured = []
    for index in (2, 0):
        model.blocks[index].attn2.register_forward_hook(lambda module, args, output: captured.append(output))
    features = model(**make_inputs(), return_features=[2, 0]).features
    assert [tuple(feature.shape) for feature in features] == [(2, SEQ, DIM)] * 2
    assert torch.equal(features[0], captured[1])
    assert torch.equal(features[1], captured[0])


@torch.no_grad()
def test_returning_features_does_not_change_the_sample():
    model = make_model()
    inputs = make_inputs()
    assert torch.equal(model(**inputs).sample, model(**inputs, return_features=[0, 2]).sample)


@pytest.mark.parametrize("stop_after_block, return_features", [(0, [0]), (1, [0, 1]), (2, [2, 0])])
@torch.no_grad()
def test_early_exit_equals_full_forward(stop_after_block, return_features):
    model = make_model()
    inputs = make_inputs()
    full = model(**inputs, return_features=return_features)
    early = model(**inputs, return_features=return_features, stop_after_block=stop_after_block)
    assert early.sample is None
    assert len(early.features) == len(return_features)
    for feature, expected in zip(early.features, full.features):
        assert torch.equal(feature, expected)


@torch.no_grad()
def test_early_exit_runs_no_later_block():
    model = make_model()
    inputs = make_inputs()
    expected = model(**inputs, return_features=[0], stop_after_block=0).features[0]
    del model.blocks[1].attn1, model.blocks[2], model.norm_out
    # Streams of blocks that do not run are not needed either.
    inputs["encoder_hidden_states"] = None
    assert torch.equal(model(**inputs, return_features=[0], stop_after_block=0).features[0], expected)


@torch.no_grad()
def test_tuple_outputs():
    model = make_model()
    inputs = make_inputs()
    full = model(**inputs, return_features=[1])
    assert full.sample.shape == inputs["hidden_states"].shape
    (sample,) = model(**inputs, return_dict=False)
    assert torch.equal(sample, full.sample)
    sample, features = model(**inputs, return_features=[1], return_dict=False)
    assert torch.equal(sample, full.sample)
    assert torch.equal(features[0], full.features[0])
    sample, features = model(**inputs, return_features=[1], stop_after_block=1, return_dict=False)
    assert sample is None
    assert torch.equal(features[0], full.features[0])


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("return_features", [None, [0, 2]])
def test_gradient_checkpointing_gives_equal_gradients(return_features):
    model = make_model().train()
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    inputs = make_inputs()
    inputs["edit_hidden_states"].requires_grad_(True)
    losses, edit_gradients = [], []
    for each in (model, checkpointed):
        inputs["edit_hidden_states"].grad = None
        output = each(**inputs, return_features=return_features)
        loss = output.sample.square().mean()
        for feature in output.features or ():
            loss = loss + feature.square().mean()
        loss.backward()
        losses.append(loss.detach())
        edit_gradients.append(inputs["edit_hidden_states"].grad)
    assert torch.equal(*losses)
    assert torch.equal(*edit_gradients)
    gradients = {name: parameter.grad for name, parameter in checkpointed.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_every_parameter_is_trained():
    model = make_model()
    model(**make_inputs()).sample.square().mean().backward()
    untouched = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert untouched == []


def test_autocast_is_near_fp32():
    model = make_model()
    inputs = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample = model(**inputs, visual_attention_mask=torch.ones(2, 9, dtype=torch.bool)).sample
    sample.float().square().mean().backward()
    assert model.blocks[0].scale_shift_table.grad.dtype == torch.float32
    torch.testing.assert_close(sample.float(), model(**inputs).sample, atol=0.05, rtol=0.05)


# --------------------------------------------------------------------------------------------------------- compile


@torch.no_grad()
def test_compiles_in_one_graph_without_recompiling():
    model = make_model(**ONE_OF_EACH)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            inputs = make_inputs()
            torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_features_and_early_exit_compile_in_one_graph():
    model = make_model(**ONE_OF_EACH)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = make_inputs()
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[9], [6]])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            output = compiled(**inputs, visual_attention_mask=mask, return_features=[0, 1], stop_after_block=1)
    expected = model(**inputs, visual_attention_mask=mask, return_features=[0, 1])
    assert output.sample is None
    for feature, expected_feature in zip(output.features, expected.features):
        torch.testing.assert_close(feature, expected_feature, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("per_token", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_dynamic_compilation_serves_all_sizes(per_token):
    model = make_model(**ONE_OF_EACH)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    with (
        torch.fx.experimental._config.patch(use_duck_shape=False),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        for num_frames, height, width in ((3, 8, 12), (2, 12, 8), (5, 6, 16)):
            inputs = make_inputs()
            for name in ("hidden_states", "source_hidden_states"):
                inputs[name] = torch.randn(2, 4, num_frames, height, width)
            if per_token:
                inputs["timestep"] = torch.rand(2, num_frames * height * width // 4) * 1000
            torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample, atol=1e-6, rtol=1e-5)


def test_compiled_checkpointed_training_step_equals_eager():
    model = make_model(**ONE_OF_EACH).train()
    eager = copy.deepcopy(model)
    model.enable_gradient_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = make_inputs()
    for each in (compiled, eager):
        output = each(**inputs, return_features=[1])
        (output.sample.square().mean() + output.features[0].square().mean()).backward()
    gradients = dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
def test_repeated_blocks_compile_once_for_each_routing():
    model = make_model(num_layers=6)
    inputs = make_inputs()
    expected = model(**inputs).sample
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_inductor_training_step_equals_eager():
    model = make_model(**ONE_OF_EACH).train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    inputs = make_inputs()
    for each in (compiled, eager):
        each(**inputs).sample.square().mean().backward()
    gradients = dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-3, msg=name)


# -------------------------------------------------------------------------------------------------- saving, loading


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
@torch.no_grad()
def test_save_and_load(tmp_path, max_shard_size):
    model = make_model(num_shallow_blocks=2)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    loaded = RVEDiTTransformer3DModel.from_pretrained(tmp_path)
    assert [block.tokens for block in loaded.blocks] == [("edit",)] * 2 + [("text", "visual")]
    inputs = make_inputs()
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


@torch.no_grad()
def test_save_and_load_fp16_variant(tmp_path):
    model = make_model()
    inputs = make_inputs()
    expected = model(**inputs).sample
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    loaded = RVEDiTTransformer3DModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.float()), name
    torch.testing.assert_close(loaded(**inputs).sample, expected, atol=5e-3, rtol=5e-3)


@torch.no_grad()
def test_loaded_in_bf16_keeps_modulation_in_fp32(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = RVEDiTTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for name in ("blocks.0.scale_shift_table", "scale_shift_table", "blocks.1.norm2.weight"):
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    assert torch.equal(loaded.rope.freqs_cos, model.rope.freqs_cos)
    inputs = make_inputs()
    low = {name: value.bfloat16() for name, value in inputs.items() if name not in ("timestep", "visual_positions")}
    sample = loaded(**{**inputs, **low}).sample
    assert sample.dtype == torch.bfloat16
    torch.testing.assert_close(sample.float(), model(**inputs).sample, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_block_is_never_split_over_devices():
    model = make_model()
    block_size = sum(parameter.numel() * 4 for parameter in model.blocks[DEEP].parameters())
    model_size = sum(parameter.numel() * 4 for parameter in model.parameters())
    max_memory = {"cpu": model_size - block_size // 2, "disk": 10**9}
    device_map = infer_auto_device_map(model, max_memory, no_split_module_classes=model._no_split_modules)
    assert set(device_map.values()) == {"cpu", "disk"}
    assert {name for name in device_map if name.startswith("blocks")} == {f"blocks.{index}" for index in range(3)}


# --------------------------------------------------------------------------------------- diffusers' hooks, backends


@torch.no_grad()
def test_first_block_cache_skips_the_other_blocks():
    model = make_model()
    inputs = make_inputs()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with model.cache_context("cond"):
        first = model(**inputs).sample
        # Only deep blocks read text, so the first block sees no change.
        inputs["encoder_hidden_states"] = torch.randn_like(inputs["encoder_hidden_states"])
        cached = model(**inputs).sample
    model.disable_cache()
    torch.testing.assert_close(cached, first, atol=1e-5, rtol=1e-5)
    assert (model(**inputs).sample - first).abs().max() > 1e-3


def test_features_need_the_cache_off():
    model = make_model()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with model.cache_context("cond"), pytest.raises(ValueError, match="return_features"):
        model(**make_inputs(), return_features=[0])


@pytest.mark.parametrize("storage_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@torch.no_grad()
def test_layerwise_casting_equals_rounded_weights(storage_dtype):
    model = make_model()
    inputs = make_inputs()
    model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert stored["blocks.0.attn1.to_q.weight"] == stored["blocks.1.attn2.add_k_proj.weight"] == storage_dtype
    for name in ("patch_embedding.weight", "source_embedding.weight", "blocks.0.norm2.weight", "scale_shift_table"):
        assert stored[name] == torch.float32
    rounded = make_model()
    rounded.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    assert torch.equal(model(**inputs).sample, rounded(**inputs).sample)


@pytest.mark.parametrize("offload", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
@torch.no_grad()
def test_group_offload_equals_plain(offload):
    model = make_model()
    inputs = make_inputs()
    expected = model(**inputs, return_features=[1])
    offload = {"offload_type": "block_level", **offload}
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **offload)
    output = model(**inputs, return_features=[1])
    assert torch.equal(output.sample, expected.sample)
    assert torch.equal(output.features[0], expected.features[0])


@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
@torch.no_grad()
def test_attention_backends_agree(backend):
    model = make_model()
    inputs = make_inputs()
    if backend != "flex":  # flex takes no mask of keys alone
        inputs["visual_attention_mask"] = torch.arange(9).expand(2, 9) < torch.tensor([[9], [6]])
    expected = model(**inputs).sample
    with attention_backend("native"):  # restores the process-wide backend, which `set_attention_backend` also sets
        model.set_attention_backend(backend)
        for processor in model.attn_processors.values():
            assert processor._attention_backend == backend
        torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fused_projections_equal_plain():
    model = make_model()
    inputs = make_inputs()
    expected = model(**inputs).sample
    model.fuse_qkv_projections()
    assert model.blocks[DEEP].attn2.to_added_kv.weight.shape == (2 * DIM, DIM)
    torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-6, rtol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(model(**inputs).sample, expected)


# ------------------------------------------------------------------------------------------------------------ LoRA


def add_lora(model):
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))


def test_lora_trains_adapters_alone_in_every_attention():
    model = make_model()
    add_lora(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * 4 * 2 * 3  # A and B of four layers in two attentions of three blocks
    model(**make_inputs()).sample.square().mean().backward()
    for name in trainable:
        assert model.get_parameter(name).grad.any(), name


@torch.no_grad()
def test_lora_starts_as_the_base():
    model = make_model()
    inputs = make_inputs()
    expected = model(**inputs).sample
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert torch.equal(model(**inputs).sample, expected)


@torch.no_grad()
def test_attention_kwargs_scale_lora():
    model = make_model()
    inputs = make_inputs()
    base = model(**inputs).sample
    add_lora(model)
    full = model(**inputs).sample
    assert torch.equal(model(**inputs, attention_kwargs={"scale": 0.0}).sample, base)
    halved = model(**inputs, attention_kwargs={"scale": 0.5}).sample
    assert torch.equal(model(**inputs).sample, full)  # the scale lasts for one call
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(0.5)
    torch.testing.assert_close(halved, model(**inputs).sample, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_lora_save_and_load(tmp_path):
    model = make_model()
    inputs = make_inputs()
    base = copy.deepcopy(model)
    add_lora(model)
    expected = model(**inputs).sample
    model.save_lora_adapter(tmp_path)
    base.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(base(**inputs).sample, expected)


# ---------------------------------------------------------------------------------------------------- user mistakes


@pytest.mark.parametrize(
    "config, match",
    [
        ({"shallow_tokens": ()}, "shallow_tokens"),
        ({"deep_tokens": ()}, "deep_tokens"),
        ({"shallow_tokens": ("edit", "audio")}, "shallow_tokens"),
        ({"deep_tokens": "text"}, "deep_tokens"),
        ({"num_shallow_blocks": 4}, "num_shallow_blocks"),
        ({"num_shallow_blocks": -1}, "num_shallow_blocks"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
    ],
)
def test_wrong_config_raises(config, match):
    with pytest.raises(ValueError, match=match):
        RVEDiTTransformer3DModel(**{**CONFIG, **config})


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"edit_hidden_states": None}, "edit_hidden_states"),
        ({"encoder_hidden_states": None}, "encoder_hidden_states"),
        ({"visual_positions": None}, "visual_positions"),
        ({"visual_positions": torch.rand(2, 8, 3)}, "visual_positions"),
        ({"visual_attention_mask": torch.ones(2, 8, dtype=torch.bool)}, "visual_attention_mask"),
        ({"visual_attention_mask": torch.ones(2, 9)}, "visual_attention_mask"),
        ({"encoder_hidden_states": torch.rand(2, 7, 17)}, "encoder_hidden_states"),
        ({"edit_hidden_states": torch.rand(1, 5, DIM)}, "edit_hidden_states"),
        ({"visual_hidden_states": torch.rand(2, DIM)}, "visual_hidden_states"),
        ({"hidden_states": torch.rand(2, 5, 3, 8, 12)}, "hidden_states"),
        ({"hidden_states": torch.rand(2, 4, 3, 7, 12)}, "patch_size"),
        ({"hidden_states": torch.rand(4, 3, 8, 12)}, "hidden_states"),
        ({"source_hidden_states": torch.rand(2, 4, 2, 8, 12)}, "source_hidden_states"),
        ({"timestep": torch.tensor(3.0)}, "timestep"),
        ({"timestep": torch.rand(3)}, "timestep"),
        ({"timestep": torch.rand(2, 3)}, rf"`timestep` has to be \(2,\) or \(2, {SEQ}\), got \(2, 3\)"),
        ({"hidden_states": torch.rand(2, 4, 40, 8, 12)}, r"`hidden_states`.*`rope_max_seq_len` = 32 .*\(40, 4, 6\)"),
        ({"hidden_states": torch.rand(2, 4, 3, 8, 66)}, r"`hidden_states`.*`rope_max_seq_len` = 32 .*\(3, 4, 33\)"),
        ({"return_features": [3]}, "return_features"),
        ({"return_features": [-1]}, "return_features"),
        ({"return_features": [2], "stop_after_block": 1}, "return_features"),
        ({"return_features": [0], "stop_after_block": 3}, "stop_after_block"),
        ({"stop_after_block": 1}, "stop_after_block"),
        ({"attention_kwargs": {"rank": 3}}, "attention_kwargs"),
    ],
)
def test_wrong_input_raises(wrong, match):
    model = make_model()
    with pytest.raises(ValueError, match=match):
        model(**{**make_inputs(), **wrong})


@torch.no_grad()
def test_the_longest_grid_of_the_rope_fits():
    model, longer = make_model(rope_max_seq_len=max(GRID)), make_model()
    longer.load_state_dict(model.state_dict())
    inputs = make_inputs()
    torch.testing.assert_close(model(**inputs).sample, longer(**inputs).sample, atol=1e-6, rtol=1e-5)


def test_source_needs_source_channels():
    model = make_model(source_channels=None)
    with pytest.raises(ValueError, match="source_hidden_states"):
        model(**make_inputs())


def test_block_that_reads_only_visual_tokens_needs_them():
    model = make_model(deep_tokens=("visual",))
    inputs = make_inputs()
    del inputs["visual_hidden_states"]
    with pytest.raises(ValueError, match="visual_hidden_states"):
        model(**inputs)


@pytest.mark.gpu
@torch.no_grad()
def test_a_context_is_made_where_the_weights_are():
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).sample
    context = project(model.to("cuda"), inputs)  # as with a device map, which moves the arguments of `forward` alone
    result = model(**{name: inputs[name].to("cuda") for name in LATENTS}, context=context).sample
    torch.testing.assert_close(result.cpu(), expected, atol=1e-4, rtol=0)
