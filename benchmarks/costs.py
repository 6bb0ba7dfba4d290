"""FLOPs of Wan's transformer and of the routed one by formula."""

from models import Preset


TIME_DIM = 256  # of the sinusoids that embed the timestep
PATCH = 4  # latent cells in a token


def context_flops(preset: Preset, is_wan: bool = False) -> int:
    """FLOPs of what does not depend on the timestep: embedded text and source, keys and values of all tokens."""
    dim, layers = preset.dim, preset.num_layers
    text = 2 * preset.num_text * (preset.text_dim * dim + dim * dim)
    if is_wan:
        return text + layers * 4 * preset.num_text * dim * dim
    shallow = layers // 3
    num_keys = shallow * preset.num_edit + (layers - shallow) * (preset.num_text + preset.num_visual)
    return text + 4 * num_keys * dim * dim + 2 * preset.num_tokens * PATCH * preset.channels * dim


def transformer_flops(preset: Preset, is_wan: bool = False, with_context: bool = False) -> dict[str, int]:
    """FLOPs of a transformer's call on one clip.

    Args:
        preset ([`Preset`]): Its sizes; routed as by default, with editing tokens in the first third of the blocks.
        is_wan (`bool`): Wan's transformer, which reads text alone and has no source.
        with_context (`bool`): Without what `project_context` computes.

    Returns:
        `dict[str, int]`: `linear`, with convolutions, and `attention`.
    """
    dim, layers, tokens = preset.dim, preset.num_layers, preset.num_tokens
    block = (8 + 4) * tokens * dim * dim + 4 * tokens * dim * preset.ffn_dim  # self- and cross-attention, feed-forward
    ends = 2 * 2 * tokens * PATCH * preset.channels * dim  # into patches and out of them
    time = 2 * (TIME_DIM * dim + dim * dim) + 2 * dim * 6 * dim
    one_token = 2 * (preset.text_dim * dim + dim * dim)  # goes through the text's embedder where there is no text
    linear = layers * block + ends + time + (one_token if with_context else context_flops(preset, is_wan))
    num_keys = layers * preset.num_text
    if not is_wan:
        shallow = layers // 3
        num_keys = shallow * preset.num_edit + (layers - shallow) * (preset.num_text + preset.num_visual)
    return {"linear": linear, "attention": 4 * tokens * dim * (layers * tokens + num_keys)}
