"""Pretrain the small Qwen2.5-VL of the embedded checkpoint on questions about scenes with exact answers, resumably.

A released MLLM understands clips and instructions before it is ever used for editing; a tiny one made from its
configuration has to be taught. The questions: what is in each cell; which cells each operation changes; which
operations these are, in order, on which objects and with which values. The heads that answer them are thrown away;
the model, the queries in its editing slots and the processor are kept.

    python examples/tiny/train_mllm.py --output runs/mllm
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration

from rvedit_diffusers import RVEDiTProcessor, RVEDiTTokenDistiller
from rvedit_diffusers.synthetic import COLOURS, GRADES, SHAPES, BenchmarkItem, BenchmarkItems, Scene
from rvedit_diffusers.synthetic.operations import GLOBAL, LOCAL, PLACES, RESIZES, VALUES, Operation
from rvedit_diffusers.synthetic.scenes import SIZES, STYLES, coverage
from rvedit_diffusers.synthetic.wording import clauses
from rvedit_diffusers.tiny import save_tiny_mllm, take_over_embeddings
from rvedit_diffusers.training.checkpoint import checkpoints, keep_latest, load_checkpoint, open_log
from rvedit_diffusers.training.optimizers import MuonAdamW, block_matrices, warmup_cosine
from rvedit_diffusers.training.options import computes_in_bfloat16
from rvedit_diffusers.training.pairs import draw_pair


LEVELS = ("L0", "L1", "L2", "L2", "L3", "L4", "L5", "L6")  # in turns: hard distractors twice
NUM_FRAMES = 4  # what the MLLM sees of a clip
MLLM_CONFIG = {
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 2,
    "intermediate_size": 384,
    "vision_hidden_size": 128,
    "vision_depth": 2,
    "vision_num_heads": 4,
    "vision_intermediate_size": 256,
    "patch_size": 4,
    "initializer_range": 0.04,
}
PROCESSOR_CONFIG = {"num_edit_tokens": 16, "max_frames": NUM_FRAMES, "max_pixels": 64 * 64, "min_pixels": 32 * 32}
# instruction and clip alone: at this size every other token dilutes the attention to the words that matter
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for content in message['content'] %}"
    "{% if content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
TOKEN_WIDTH = 256  # of the editor that the connectors are made for
SLOTS = 3  # operations of an instruction, at most
KINDS = LOCAL + GLOBAL
# asked of each operation, the answers in the order of these words
QUESTIONS = {
    "operation": (*KINDS, "none"),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": (*SIZES, *RESIZES),
    "place": tuple(PLACES),
    "wall": VALUES["background"],
    "look": (*GRADES, *STYLES),
    "object_colour": tuple(COLOURS),
    "object_shape": SHAPES,
}
VALUE_QUESTIONS = {  # what the words of an operation's value answer
    "recolour": ("colour",),
    "remove": (),
    "add": ("colour", "shape", "size", "place"),
    "replace": ("colour", "shape"),
    "resize": ("size",),
    "move": ("place",),
    "background": ("wall",),
    "grade": ("look",),
    "stylise": ("look",),
}
CELL = 8  # pixels that a visual token covers
# these are asked of the vision tower's own output too: shapes are learned many times sooner from there
SIGHT_QUESTIONS = {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "coverage": CELL * CELL, "centre": 2}
NO_ANSWER = -100


class AnswerHeads(nn.Module):
    """Reads the answers off the MLLM's states: of operations from the editing slots, of cells from visual tokens."""

    def __init__(self, hidden_size: int, num_edit_tokens: int):
        super().__init__()
        width = hidden_size * num_edit_tokens
        self.clip = nn.ModuleDict({name: nn.Linear(width, SLOTS * len(words)) for name, words in QUESTIONS.items()})
        self.place = nn.Linear(width, SLOTS * NUM_FRAMES // 2 * 2)
        self.cell = nn.Linear(hidden_size, SLOTS)
        self.sight = nn.ModuleList(nn.Linear(hidden_size, sum(SIGHT_QUESTIONS.values())) for _ in range(2))

    def forward(self, edit_states: torch.Tensor, visual_states: torch.Tensor, vision: torch.Tensor):
        """`vision` are the tower's outputs, `(visual tokens of the batch, hidden_size)`."""
        flat = edit_states.flatten(1)
        sight = [head(states.flatten(0, -2)) for head, states in zip(self.sight, (vision, visual_states), strict=True)]
        answers = {name: head(flat).unflatten(1, (SLOTS, -1)) for name, head in self.clip.items()}
        return answers, self.place(flat).unflatten(1, (SLOTS, -1)), self.cell(visual_states), sight


def answers(item: BenchmarkItem, operation: Operation | None, shows_result: bool) -> dict[str, int]:
    """Class index of every question about an operation, `NO_ANSWER` where it does not apply."""
    given = dict.fromkeys(QUESTIONS, NO_ANSWER) | {"operation": len(KINDS)}
    if operation is None:
        return given
    value = (operation.value,) if operation.kind == "background" else operation.value
    words = {"operation": operation.kind} | dict(zip(VALUE_QUESTIONS[operation.kind], value, strict=True))
    if operation.target is not None and operation.target < len(item.scene.objects) and not shows_result:
        thing = item.scene.objects[operation.target]
        words |= {"object_colour": thing.colour, "object_shape": thing.shape}
    return given | {name: QUESTIONS[name].index(word) for name, word in words.items()}


def sight(scene: Scene) -> dict[str, np.ndarray]:
    """What each cell shows: arrays of `(cells, ...)` for `SIGHT_QUESTIONS`, cells in order of frame pair, row, column.

    `colour` and `shape` are those of the object that covers most of it, the last class standing for none; `coverage`
    is the share of each of its pixels that objects cover; `centre` is the way to that object's centre in cells.
    """
    pairs, rows, columns = NUM_FRAMES // 2, scene.height // CELL, scene.width // CELL
    covers = [np.zeros((scene.num_frames, scene.height, scene.width), np.float32)]  # the background has number 0
    for index in range(len(scene.objects)):
        alpha = coverage(scene, index)
        covers = [cover * (1 - alpha) for cover in covers] + [alpha]
    covers = np.stack(covers).reshape(-1, pairs, 2, rows, CELL, columns, CELL).mean(2).transpose(0, 1, 2, 4, 3, 5)
    covers = covers.reshape(len(covers), -1, CELL * CELL)  # (objects, cells, pixels)
    winner = np.where(covers.mean(2).max(0) < 0.25, 0, covers.mean(2).argmax(0))
    colours = np.array([len(COLOURS), *(list(COLOURS).index(thing.colour) for thing in scene.objects)])
    shapes = np.array([len(SHAPES), *(SHAPES.index(thing.shape) for thing in scene.objects)])
    centres = np.zeros((1 + len(scene.objects), pairs, 2))
    for index, thing in enumerate(scene.objects, 1):
        centres[index] = np.array(thing.path).reshape(pairs, 2, 2).mean(1) * (columns, rows)
    centres = np.repeat(centres, rows * columns, 1)[winner, np.arange(len(winner))]
    y, x = np.divmod(np.arange(len(winner)) % (rows * columns), columns)
    return {
        "colour": colours[winner],
        "shape": shapes[winner],
        "coverage": covers.sum(0).astype(np.float32),
        "centre": (centres - np.stack([x, y], 1) - 0.5).astype(np.float32),
    }


def make_batch(items: BenchmarkItems, indices: range, references: bool) -> dict[str, object]:
    """Clips, instructions and answers. With `references`, every fourth clip shows the result of its edit."""
    chosen = [draw_pair(items, index) for index in indices]
    results = [references and index % 4 == 1 + index // 4 % 2 for index in indices]
    pairs = list(zip(chosen, results, strict=True))
    count = len(chosen)
    cells = torch.zeros(count, SLOTS, NUM_FRAMES // 2, *(side // CELL for side in chosen[0].mask.shape[1:]))
    places = torch.zeros(count, SLOTS, NUM_FRAMES // 2 * 2)
    knowable, has_place = torch.zeros(count, SLOTS), torch.zeros(count, SLOTS)
    given = []
    for row, (item, shows_result) in enumerate(pairs):
        operations = [*item.operations, *[None] * (SLOTS - len(item.operations))]
        given.append([answers(item, operation, shows_result) for operation in operations])
        for slot, operation in enumerate(item.operations):
            masks = torch.from_numpy(item.masks[slot]).float()
            cells[row, slot] = F.avg_pool3d(masks[None], (2, CELL, CELL))[0]
            # the result does not show what was there before
            knowable[row, slot] = not (shows_result and operation.kind in ("remove", "move"))
            if operation.target is not None and operation.target < len(item.scene.objects):
                path = np.array(item.scene.objects[operation.target].path)
                places[row, slot] = torch.from_numpy(path).float().unflatten(0, (-1, 2)).mean(1).flatten()
                has_place[row, slot] = knowable[row, slot]
    seen = [sight(item.edited if shows_result else item.scene) for item, shows_result in pairs]
    return {
        "sight": {name: torch.from_numpy(np.concatenate([s[name] for s in seen])) for name in SIGHT_QUESTIONS},
        "clips": [item.target_frames if shows_result else item.source_frames for item, shows_result in pairs],
        "text": [item.instruction for item in chosen],
        "cells": cells.flatten(2).transpose(1, 2),  # (batch, cells, slots)
        "places": places,
        "has_place": has_place,
        "knowable": knowable,
        "answers": {name: torch.tensor([[one[name] for one in row] for row in given]) for name in QUESTIONS},
    }


class Batches(torch.utils.data.Dataset):
    """Batch number `index` and the MLLM's inputs for it."""

    def __init__(self, items: BenchmarkItems, processor: RVEDiTProcessor, batch_size: int):
        self.items, self.processor, self.batch_size = items, processor, batch_size

    def __getitem__(self, index: int):
        batch = make_batch(self.items, range(index * self.batch_size, (index + 1) * self.batch_size), references=True)
        return batch, dict(self.processor(batch.pop("clips"), batch["text"]))


def sight_losses(predicted: torch.Tensor, truth: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    guess = dict(zip(SIGHT_QUESTIONS, predicted.float().split(list(SIGHT_QUESTIONS.values()), -1), strict=True))
    shown = truth["shape"] < len(SHAPES)
    # most cells show no object
    weights = 1.0 + 4.0 * shown
    terms = {
        name: (F.cross_entropy(guess[name], truth[name], reduction="none") * weights).mean()
        for name in ("colour", "shape")
    }
    terms["coverage"] = 10 * F.binary_cross_entropy_with_logits(guess["coverage"], truth["coverage"].clamp(0, 1))
    terms["centre"] = F.l1_loss(guess["centre"][shown], truth["centre"][shown])
    return terms


def losses(predicted, batch) -> dict[str, torch.Tensor]:
    answered, places, changes, sights = predicted
    cells, knowable, given = batch["cells"], batch["knowable"], batch["answers"]
    bce = F.binary_cross_entropy_with_logits(changes.float(), cells, reduction="none")  # (batch, cells, slots)
    # which of the objects it is, is the hard part
    weights = 1.0 + 4.0 * (batch["sight"]["shape"].view(cells.shape[:2]) < len(SHAPES))
    terms = {"mask": 4 * ((bce * weights.unsqueeze(-1)).mean(1) * knowable).sum() / knowable.sum()}
    for prefix, weight, answer in zip(("vision", "seen"), (1.0, 0.5), sights, strict=True):
        terms |= {f"{prefix}_{k}": weight * v for k, v in sight_losses(answer, batch["sight"]).items()}
    for name, logits in answered.items():
        # a batch may have no operation that the question applies to
        valid = (given[name] != NO_ANSWER).sum().clamp(min=1)
        error = F.cross_entropy(
            logits.flatten(0, 1).float(), given[name].flatten(), ignore_index=NO_ANSWER, reduction="sum"
        )
        terms[name] = 0.3 * error / valid
    error = (places.float() - batch["places"]).abs().mean(2)
    terms["centre"] = 2 * (error * batch["has_place"]).sum() / batch["has_place"].sum().clamp(min=1)
    return terms


def ask(mllm, distiller, heads, inputs):
    """The heads' answers to one batch of the processor's outputs."""
    vision = []
    tower = mllm.base_model.visual
    handle = tower.register_forward_hook(lambda module, args, output: vision.append(output.pooler_output))
    edit_states, visual_states, _, _ = distiller.harvest(mllm, inputs)
    handle.remove()
    return heads(edit_states, visual_states, vision[0])


@torch.no_grad()
def evaluate(mllm, distiller, heads, processor, items: BenchmarkItems, num_clips: int = 128) -> dict[str, float]:
    heads.eval()
    union = overlap = 0.0
    right = {name: [] for name in (*QUESTIONS, "all_operations", "seen_colour", "seen_shape")}
    for start in range(0, num_clips, 32):
        batch = make_batch(items, range(start, start + 32), references=False)
        answered, _, changes, sights = ask(mllm, distiller, heads, processor(batch["clips"], batch["text"]))
        local = batch["has_place"].bool()
        guess, truth = (changes > 0).transpose(1, 2)[local], (batch["cells"] > 0.5).transpose(1, 2)[local]
        overlap, union = overlap + (guess & truth).sum().item(), union + (guess | truth).sum().item()
        for name, logits in answered.items():
            known = batch["answers"][name] != NO_ANSWER
            hits = logits.argmax(2) == batch["answers"][name]
            right[name] += hits[known].tolist()
            if name == "operation":
                right["all_operations"] += hits.all(1).tolist()
        guesses = sights[1].split(list(SIGHT_QUESTIONS.values()), -1)
        for name, guess in zip(("colour", "shape"), guesses, strict=False):
            truth = batch["sight"][name]
            right[f"seen_{name}"] += (guess.argmax(1) == truth)[truth < SIGHT_QUESTIONS[name] - 1].tolist()
    heads.train()
    return {"mask_iou": overlap / union} | {name: float(np.mean(hits)) for name, hits in right.items() if hits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for model, processor, queries and log")
    parser.add_argument("--start", type=Path, help="folder of a pipeline whose MLLM and queries to begin with")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, help="end the schedule after this long instead of after --steps")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--num_workers", type=int, default=1, help="processes that render scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=200)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    items = BenchmarkItems(LEVELS, args.seed + 10, split="train", num_frames=NUM_FRAMES)
    unseen = BenchmarkItems(LEVELS, 1_000_000, num_frames=NUM_FRAMES)
    with tempfile.TemporaryDirectory() as folder:
        mllm, _ = save_tiny_mllm(folder, corpus=clauses(), vocab_size=1024, seed=args.seed, **MLLM_CONFIG)
        processor = RVEDiTProcessor.from_mllm(folder, **PROCESSOR_CONFIG)
    processor.chat_template = CHAT_TEMPLATE
    distiller = RVEDiTTokenDistiller(
        mllm_hidden_size=MLLM_CONFIG["hidden_size"], dim=TOKEN_WIDTH, num_edit_tokens=processor.num_edit_tokens
    )
    if args.start is not None:
        weights = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.start / "mllm").state_dict()
        vocabulary = RVEDiTProcessor.from_pretrained(args.start / "processor").tokenizer.get_vocab()
        take_over_embeddings(mllm, processor.tokenizer.get_vocab(), weights, vocabulary)
        queries = RVEDiTTokenDistiller.from_pretrained(args.start / "distiller").queries
        distiller.queries.data.copy_(queries)
    heads = AnswerHeads(MLLM_CONFIG["hidden_size"], processor.num_edit_tokens)
    mllm.train().set_attn_implementation("eager")  # at this size the fused kernels' backward pass is the slower one

    learned = nn.ModuleDict({"mllm": mllm.base_model, "distiller": distiller, "heads": heads})
    parameters = [*mllm.base_model.parameters(), distiller.queries, *heads.parameters()]
    optimizer = MuonAdamW(block_matrices(mllm.base_model), parameters, lr=args.learning_rate)
    step, spent = 0, 0.0
    if checkpoints(args.output):
        state = load_checkpoint(checkpoints(args.output)[-1], {}, learned, optimizer)
        step, spent = state["step"], state["seconds"]
    started = time.monotonic() - spent

    def progress() -> float:
        return (time.monotonic() - started) / (60 * args.minutes) if args.minutes else step / args.steps

    bar = tqdm(total=None if args.minutes else args.steps, initial=step, unit="step")
    log = open_log(args.output / "log.jsonl", step)
    batches = iter(
        torch.utils.data.DataLoader(
            Batches(items, processor, args.batch_size),
            batch_size=None,
            sampler=range(step, 10_000_000),
            num_workers=args.num_workers,
        )
    )
    in_bfloat16 = computes_in_bfloat16(torch.device("cpu"))
    while progress() < 1.0:
        rate = args.learning_rate * warmup_cosine(step, 100, progress())
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch, inputs = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            terms = losses(ask(mllm, distiller, heads, inputs), batch)
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        if step % 20 == 0 or step % args.save_every == 0:
            entry = {"step": step, "lr": rate} | {name: term.item() for name, term in terms.items()}
            bar.set_postfix(mask=f"{entry['mask']:.3f}", operation=f"{entry['operation']:.3f}")
            if step % args.save_every == 0:
                entry |= evaluate(mllm, distiller, heads, processor, unseen)
                state = {"step": step, "seconds": time.monotonic() - started}
                keep_latest(args.output, learned, optimizer, state)
            log.write(json.dumps(entry) + "\n")
            log.flush()

    mllm.eval()
    scores = evaluate(mllm, distiller, heads, processor, unseen, 256)
    log.write(json.dumps({"step": step, "seconds": time.monotonic() - started} | scores) + "\n")
    mllm.save_pretrained(args.output / "mllm")
    processor.save_pretrained(args.output / "processor")
    distiller.save_pretrained(args.output / "distiller")
    print(f"{args.output}: " + ", ".join(f"{name} {score:.2f}" for name, score in scores.items()))


if __name__ == "__main__":
    main()
