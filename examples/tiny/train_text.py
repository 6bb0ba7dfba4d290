"""Pretrain the small UMT5 of the embedded checkpoint on instructions with exact parses, resumably.

A released text encoder has read much before it conditions an editor; the flow loss alone hardly teaches a tiny one
which words belong together. The questions, asked of each word: what is its part in its clause; and, of all that is
said about the same object, which operations, with which values, on what object. The heads that answer are thrown away.

    python examples/tiny/train_text.py --output runs/text
    python examples/tiny/train_text.py --probe PIPELINE --steps 600 --output runs/probe
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from rvedit_diffusers.synthetic import COLOURS, SHAPES
from rvedit_diffusers.synthetic.levels import CATEGORY_WEIGHTS, NUM_WORDINGS, TRAIN_LEVELS, draw_plan
from rvedit_diffusers.synthetic.operations import GLOBAL, LOCAL, VALUES, Operation
from rvedit_diffusers.synthetic.stage import HELD_OUT_LOOKS
from rvedit_diffusers.synthetic.wording import COMPARISONS, SIDES, clause, clauses, sentence
from rvedit_diffusers.tiny import build_text_tokenizer
from rvedit_diffusers.training.checkpoint import checkpoints, keep_latest, load_checkpoint, open_log
from rvedit_diffusers.training.optimizers import MuonAdamW, block_matrices, warmup_cosine


MAX_LENGTH = 40  # three operations take 31 tokens
TEXT_CONFIG = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 4, "num_heads": 4, "dropout_rate": 0.0}
KINDS = LOCAL + GLOBAL
VALUE_WORDS = sorted({word for values in VALUES.values() for value in values for word in value})
LOOKS = [look for look in ((c, s) for c in COLOURS for s in SHAPES) if look not in HELD_OUT_LOOKS]
SIDE_WORDS = [side for pair in SIDES for side in pair]
# what phrases say of an object: colour, shape, comparison; of the one that it is named by: side, colour, shape
NAME_WORDS = [*COLOURS, *SHAPES, *COMPARISONS, *SIDE_WORDS, *(f"of {word}" for word in (*COLOURS, *SHAPES))]
PARTS = ("object", "anchor", "rest")
# asked of each token, the answers in the order of these words: one of the parts, any of the others
ANSWERS = {"operation": KINDS, "value": VALUE_WORDS, "name": NAME_WORDS}
QUESTIONS = {"part": PARTS} | ANSWERS


def draw_name(rng: np.random.Generator) -> tuple[str, int, list[str]]:
    """A phrase for an object, where in it its anchor begins, and its words among `NAME_WORDS`."""
    colour, shape = LOOKS[rng.integers(len(LOOKS))]
    category = rng.choice(len(CATEGORY_WEIGHTS), p=CATEGORY_WEIGHTS)
    if category == 0:
        phrase, words = f"the {colour} {shape}", [colour, shape]
    elif category == 1:
        word = (*COMPARISONS, *COLOURS)[rng.integers(len(COMPARISONS) + len(COLOURS))]
        phrase, words = f"the {word} object", [word]
    else:
        own, side = SHAPES[rng.integers(len(SHAPES))], SIDE_WORDS[rng.integers(len(SIDE_WORDS))]
        phrase = f"the {own} {side} the {colour} {shape}"
        return phrase, phrase.index(f"the {colour}"), [own, side, f"of {colour}", f"of {shape}"]
    return phrase, len(phrase), words


Instruction = tuple[str, list[list[tuple[int, int, int]]], list[dict[str, list[str]]]]


def draw_instruction(rng: np.random.Generator) -> Instruction:
    """An instruction as the levels of training have them, though of no scene.

    Returns:
        `tuple`: The instruction; for each clause its own span as `(begin, end, part)`, and then those of what it calls
        its object; and for each clause the `ANSWERS` about its object.
    """
    plan = draw_plan(rng, TRAIN_LEVELS[rng.integers(len(TRAIN_LEVELS))])
    said, targets, facts = [], [], {}
    for step, kind in enumerate(plan.kinds):
        value = VALUES[kind][rng.integers(len(VALUES[kind]))]
        while kind in ("add", "replace") and value[:2] in HELD_OUT_LOOKS:
            value = VALUES[kind][rng.integers(len(VALUES[kind]))]
        is_same = plan.same and step > 0
        target = targets[0] if is_same else step
        phrase, anchor, words = draw_name(rng)
        if is_same:
            phrase, anchor, words = "it", len("it"), []
        elif kind == "add" or kind in GLOBAL:
            phrase, anchor, words = None, 0, []
        said.append((clause(Operation(kind, target, value), phrase, int(rng.integers(NUM_WORDINGS))), phrase, anchor))
        targets.append(target)
        fact = facts.setdefault(target, {"operation": [], "value": [], "name": []})
        fact["operation"].append(kind)
        fact["value"] += value
        fact["name"] += words
    last = ", then " if plan.dependent else (" and ", ", and ")[rng.integers(2)] if len(said) > 2 else " and "
    text = sentence([words for words, _, _ in said], last)
    spans, start = [], 0
    for words, phrase, anchor in said:
        start = text.index(words, start)
        parts = [(start, start + len(words), PARTS.index("rest"))]
        called = phrase and re.search(rf"\b{phrase}\b", words)  # "its color" calls it nothing
        if called:
            begin = start + called.start()
            parts.append((begin, begin + anchor, PARTS.index("object")))
            parts.append((begin + anchor, begin + len(phrase), PARTS.index("anchor")))
        spans.append(parts)
        start += len(words)
    return text, spans, [facts[target] for target in targets]


def make_batch(drawn: Sequence[Instruction], tokenizer: T5Tokenizer) -> dict[str, torch.Tensor]:
    """Token ids, mask, and for each token its `part`, -100 between clauses, and the other answers as 0 and 1."""
    inputs = tokenizer(
        [text for text, _, _ in drawn],
        padding="max_length",
        max_length=MAX_LENGTH,
        truncation=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    # a word's token begins at the space before it, and the padding nowhere
    ends = inputs.pop("offset_mapping")[:, :, 1]
    part = torch.full((len(drawn), MAX_LENGTH), -100)
    given = {name: torch.zeros(len(drawn), MAX_LENGTH, len(known)) for name, known in ANSWERS.items()}
    for row, (_, spans, facts) in enumerate(drawn):
        for parts, fact in zip(spans, facts, strict=True):
            for begin, end, number in parts:
                part[row, (ends[row] > begin) & (ends[row] <= end)] = number
            inside = ((ends[row] > parts[0][0]) & (ends[row] <= parts[0][1])).float()
            for name, known in ANSWERS.items():
                answer = torch.zeros(len(known))
                answer[[known.index(word) for word in fact[name]]] = 1.0
                given[name][row] += inside[:, None] * answer
    return {**inputs, "part": part, **given}


def ask(text_encoder: UMT5EncoderModel, heads: nn.ModuleDict, batch: dict[str, torch.Tensor]):
    states = text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    said = batch["part"] >= 0
    return {name: head(states[said]) for name, head in heads.items()}, {n: batch[n][said] for n in heads}


@torch.no_grad()
def evaluate(text_encoder: UMT5EncoderModel, heads: nn.ModuleDict, tokenizer: T5Tokenizer) -> dict[str, float]:
    """Shares of the tokens whose answers are right in all classes, of 512 instructions of a seed of their own."""
    rng = np.random.default_rng(1_000_000)
    logits, truth = ask(text_encoder, heads, make_batch([draw_instruction(rng) for _ in range(512)], tokenizer))
    right = {name: (logits[name] > 0) == truth[name].bool() for name in logits if name != "part"}
    scores = {f"{name}_right": hits.all(1).float().mean().item() for name, hits in right.items()}
    return scores | {"part_right": (logits["part"].argmax(1) == truth["part"]).float().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for model, tokenizer and log")
    parser.add_argument(
        "--probe", type=Path, help="folder of a pipeline: the heads alone learn, from the states of its text encoder"
    )
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=500)
    args = parser.parse_args()
    if args.probe and not (args.probe / "text_encoder").is_dir():
        parser.error(f"--probe {args.probe} has to be the folder of a pipeline, but it has no text_encoder")

    torch.manual_seed(args.seed)
    if args.probe:
        tokenizer = T5Tokenizer.from_pretrained(args.probe / "tokenizer")
        text_encoder = UMT5EncoderModel.from_pretrained(args.probe / "text_encoder", dtype=torch.float32)
        text_encoder.eval().requires_grad_(False)
    else:
        tokenizer = build_text_tokenizer(clauses(), model_max_length=MAX_LENGTH)
        text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TEXT_CONFIG))
    heads = nn.ModuleDict(
        {name: nn.Linear(text_encoder.config.d_model, len(known)) for name, known in QUESTIONS.items()}
    )
    learned = nn.ModuleDict({"text_encoder": text_encoder, "heads": heads})
    optimizer = MuonAdamW(block_matrices(text_encoder), learned.parameters(), lr=args.learning_rate)
    step, spent = 0, 0.0
    if checkpoints(args.output):
        state = load_checkpoint(checkpoints(args.output)[-1], {}, learned, optimizer)
        step, spent = state["step"], state["seconds"]
    begun = time.monotonic() - spent

    log = open_log(args.output / "log.jsonl", step)
    bar = tqdm(total=args.steps, initial=step, unit="step")
    while step < args.steps:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warmup_cosine(step, 100, step / args.steps)
        rng = np.random.default_rng([args.seed, step])
        batch = make_batch([draw_instruction(rng) for _ in range(args.batch_size)], tokenizer)
        logits, truth = ask(text_encoder, heads, batch)
        terms = {"part": F.cross_entropy(logits["part"], truth["part"])}
        for name in ANSWERS:
            terms[name] = F.binary_cross_entropy_with_logits(logits[name], truth[name], reduction="none").sum(1).mean()
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        if step % 20 == 0 or step % args.save_every == 0:
            entry = {"step": step} | {name: term.item() for name, term in terms.items()}
            bar.set_postfix({name: f"{entry[name]:.3f}" for name in terms})
            if step % args.save_every == 0:
                entry |= evaluate(text_encoder, heads, tokenizer)
                state = {"step": step, "seconds": time.monotonic() - begun}
                keep_latest(args.output, learned, optimizer, state)
            log.write(json.dumps(entry) + "\n")
            log.flush()

    scores = evaluate(text_encoder, heads, tokenizer)
    log.write(json.dumps({"step": step, "seconds": time.monotonic() - begun} | scores) + "\n")
    if not args.probe:
        text_encoder.save_pretrained(args.output / "text_encoder")
        # one that was used would be saved with its padding
        build_text_tokenizer(clauses(), model_max_length=MAX_LENGTH).save_pretrained(args.output / "tokenizer")
    print(f"{args.output}: " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))


if __name__ == "__main__":
    main()
