import re

import torch
from transformers import UMT5Config, UMT5EncoderModel

from rvedit_diffusers.synthetic import LEVELS, BenchmarkItems
from rvedit_diffusers.synthetic.wording import clauses
from rvedit_diffusers.tiny import build_text_tokenizer, take_over_embeddings


def test_clauses_have_all_words_of_the_instructions():
    known = set(re.findall(r"\w+", " ".join(clauses())))
    items = BenchmarkItems(LEVELS, 11, num_frames=3, height=32, width=32)
    for index in range(6 * len(LEVELS)):
        item = items[index]
        said = {*re.findall(r"\w+", item.instruction), *re.findall(r"\w+", item.twin_instruction or "")}
        assert said <= known, said - known


def test_the_tokenizer_of_clauses_takes_each_word_as_one_token():
    tokenizer = build_text_tokenizer(clauses(), model_max_length=40)
    sentence = "move the circle left of the red square to the top edge, then make it bigger"
    tokens = [token for token in tokenizer.tokenize(sentence) if token not in ("<unk>", ",")]
    assert tokens == [f"▁{word}" for word in re.findall(r"\w+", sentence)]


def test_embeddings_are_taken_over_by_their_words():
    def build(corpus, seed):
        tokenizer = build_text_tokenizer(corpus)
        config = UMT5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        torch.manual_seed(seed)
        return UMT5EncoderModel(config), tokenizer.get_vocab()

    old, old_vocabulary = build(["make the red circle blue"], 0)
    model, vocabulary = build(["an apple, then the red zebra"], 1)
    before = model.get_input_embeddings().weight.clone()
    take_over_embeddings(model, vocabulary, old.state_dict(), old_vocabulary)
    after, theirs = model.get_input_embeddings().weight, old.get_input_embeddings().weight
    for word in ("▁the", "▁red", "</s>", "a"):
        assert torch.equal(after[vocabulary[word]], theirs[old_vocabulary[word]])
    for word in ("▁apple", "▁zebra"):
        assert torch.equal(after[vocabulary[word]], before[vocabulary[word]])
    state, others = model.state_dict(), old.state_dict()
    assert all(torch.equal(state[name], others[name]) for name in state if state[name].shape != after.shape)
