"""Builders of tiny, randomly initialised Qwen-VL checkpoints: real transformers classes, no download.

`save_tiny_mllm(folder, family)` writes weights, configuration, tokenizer and processor as a Hub repository holds them,
so that `from_pretrained(folder)` of the model and `RVEDiTProcessor.from_mllm(folder)` read it as they read the
released checkpoints.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    T5Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.processing_utils import ProcessorMixin


FAMILIES = ("qwen2_5_vl", "qwen3_vl")

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CORPUS = (
    "You are a helpful assistant. system user assistant seconds",
    "make the red ball blue, remove the green square, replace the yellow circle with a purple triangle",
    "make the whole video darker and brighter, black and white, on the left of the large small object",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_tokenizer(
    corpus: Iterable[str] = CORPUS, vocab_size: int = 512, padding_side: str = "right"
) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of Qwen's class with Qwen's special tokens, its merges learned from `corpus`.

    Args:
        corpus: Sentences. Their words become single tokens as far as `vocab_size` allows; any other text falls back to
            bytes.
        vocab_size: Upper bound of the number of tokens without the special ones, at least 256 (the bytes).
        padding_side: `"right"` or `"left"`.

    Returns:
        The tokenizer. Its special tokens have the last ids: `len(tokenizer)` rows of embedding are enough.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in learned["merges"]]

    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side=padding_side,
        model_max_length=32768,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny_mllm_processor(
    family: str = "qwen2_5_vl",
    tokenizer: Qwen2Tokenizer | None = None,
    patch_size: int = 8,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
) -> ProcessorMixin:
    """The MLLM's own processor, `Qwen2_5_VLProcessor` or `Qwen3VLProcessor`, of `tokenizer` and these patch sizes."""
    _check_family(family)
    tokenizer = build_tiny_tokenizer() if tokenizer is None else tokenizer
    patches = {"patch_size": patch_size, "temporal_patch_size": temporal_patch_size, "merge_size": merge_size}
    processor_class, video_class = {
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }[family]
    return processor_class(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=video_class(**patches),
        chat_template=tokenizer.chat_template,
    )


def build_tiny_mllm(
    family: str = "qwen2_5_vl",
    tokenizer: Qwen2Tokenizer | None = None,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    intermediate_size: int | None = None,
    vision_hidden_size: int = 32,
    vision_depth: int = 2,
    vision_num_heads: int = 2,
    vision_intermediate_size: int | None = None,
    num_position_embeddings: int = 256,
    deepstack_visual_indexes: Sequence[int] = (0,),
    patch_size: int = 8,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    tokens_per_second: int = 2,
    initializer_range: float | None = None,
    tie_word_embeddings: bool = True,
    seed: int = 0,
) -> PreTrainedModel:
    """A randomly initialised `Qwen2_5_VLForConditionalGeneration` or `Qwen3VLForConditionalGeneration`: float32, eval.

    Args:
        family: `"qwen2_5_vl"` or `"qwen3_vl"`.
        tokenizer: Gives the size of the vocabulary and the ids of the vision tokens. Default:
            `build_tiny_tokenizer()`.
        hidden_size, num_layers, num_heads, num_key_value_heads, head_dim, intermediate_size: Of the language model.
            The head size must be a multiple of 4, and for Qwen2.5-VL the default. Defaults: `num_heads` key-value
            heads, `hidden_size // num_heads`, 3 * `hidden_size`.
        vision_hidden_size, vision_depth, vision_num_heads, vision_intermediate_size: Of the vision tower. In
            Qwen2.5-VL the last vision block attends to the whole frame, the others to windows.
        num_position_embeddings, deepstack_visual_indexes: Of Qwen3-VL's vision tower: patches of its square of learned
            positions, and blocks that feed the first layers of the language model (DeepStack).
        patch_size, temporal_patch_size, merge_size: One visual token covers `patch_size * merge_size` pixels squared
            and `temporal_patch_size` frames.
        tokens_per_second: Scale of the temporal positions (Qwen2.5-VL only).
        initializer_range: Standard deviation of the weights. Default: transformers' own, 0.02.
        tie_word_embeddings: Whether the head shares the embedding, which keeps it out of the saved file.
        seed: Of the weights; the global random state is left as it was.
    """
    _check_family(family)
    tokenizer = build_tiny_tokenizer() if tokenizer is None else tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    head_dim = hidden_size // num_heads if head_dim is None else head_dim
    half = head_dim // 2
    spatial = half * 3 // 8
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [half - 2 * spatial, spatial, spatial]}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size if intermediate_size is None else intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads if num_key_value_heads is None else num_key_value_heads,
        "max_position_embeddings": 32768,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "tie_word_embeddings": tie_word_embeddings,
    }
    vision = {
        "depth": vision_depth,
        "hidden_size": vision_hidden_size,
        "intermediate_size": 3 * vision_hidden_size if vision_intermediate_size is None else vision_intermediate_size,
        "num_heads": vision_num_heads,
        "out_hidden_size": hidden_size,
        "patch_size": patch_size,
        "temporal_patch_size": temporal_patch_size,
        "spatial_merge_size": merge_size,
    }
    if family == "qwen2_5_vl":
        config_class, model_class = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
        text["rope_parameters"] = rope
        vision |= {
            "tokens_per_second": tokens_per_second,
            "window_size": 4 * patch_size * merge_size,
            "fullatt_block_indexes": [vision_depth - 1],
        }
    else:
        config_class, model_class = Qwen3VLConfig, Qwen3VLForConditionalGeneration
        text |= {"rope_parameters": rope | {"mrope_interleaved": True}, "head_dim": head_dim}
        vision |= {
            "num_position_embeddings": num_position_embeddings,
            "deepstack_visual_indexes": list(deepstack_visual_indexes),
        }
    if initializer_range is not None:
        text["initializer_range"] = vision["initializer_range"] = initializer_range
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def save_tiny_mllm(
    folder: str | os.PathLike,
    family: str = "qwen2_5_vl",
    corpus: Iterable[str] = CORPUS,
    vocab_size: int = 512,
    **kwargs,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a tiny model and its processor and save both in `folder`, laid out as a Hub repository.

    Args:
        folder: Made if absent.
        family: `"qwen2_5_vl"` or `"qwen3_vl"`.
        corpus, vocab_size: See [`build_tiny_tokenizer`].
        kwargs: See [`build_tiny_mllm`].

    Returns:
        The model and the MLLM's own processor, in memory.
    """
    tokenizer = build_tiny_tokenizer(corpus, vocab_size)
    patch_names = ("patch_size", "temporal_patch_size", "merge_size")
    processor = build_tiny_mllm_processor(
        family, tokenizer, **{name: kwargs[name] for name in patch_names if name in kwargs}
    )
    mllm = build_tiny_mllm(family, tokenizer, **kwargs)
    mllm.save_pretrained(folder)
    processor.save_pretrained(folder)
    return mllm, processor


def build_text_tokenizer(corpus: Iterable[str] = CORPUS, model_max_length: int = 16) -> T5Tokenizer:
    """A unigram tokenizer of T5's class: the words of `corpus`, lower case, and letters for any other text.

    Args:
        corpus: Sentences.
        model_max_length: Texts are cut to this many tokens.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -1.0) for word in sorted(set(re.findall(r"\w+", " ".join(corpus).lower())))]
    letters = [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    vocab = list(dict(special + words + letters).items())
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=model_max_length)


@torch.no_grad()
def take_over_embeddings(
    model: PreTrainedModel,
    vocabulary: dict[str, int],
    weights: dict[str, torch.Tensor],
    other_vocabulary: dict[str, int],
) -> None:
    """Load the weights of a model of the same configuration but another vocabulary: embeddings go by the words.

    Args:
        model (`PreTrainedModel`): Gets the weights. Words that the other vocabulary lacks keep their embeddings.
        vocabulary (`dict[str, int]`): Rows by word, as `tokenizer.get_vocab()` gives them.
        weights (`dict[str, torch.Tensor]`): The other model's state dict.
        other_vocabulary (`dict[str, int]`): The other tokenizer's.

    Raises:
        KeyError, RuntimeError: The other model has another configuration.
    """
    known = [(row, other_vocabulary[word]) for word, row in vocabulary.items() if word in other_vocabulary]
    rows, other_rows = torch.tensor(known).unbind(1)
    embedding_shape = model.get_input_embeddings().weight.shape
    for name, weight in model.state_dict().items():
        if weight.shape == embedding_shape:
            weight[rows] = weights[name][other_rows].to(weight)
        else:
            weight.copy_(weights[name])


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(f"`family` must be one of {FAMILIES}, got {family!r}.")
