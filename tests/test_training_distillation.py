"""What the teacher of few steps says, and that a LoRA learns it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from components import build_pipeline, make_clip
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import nn


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train  # noqa: E402

from rvedit_diffusers import RVEDiTPipeline  # noqa: E402
from rvedit_diffusers.training.adapters import add_lora  # noqa: E402
from rvedit_diffusers.training.distillation import FewStepTeacher  # noqa: E402


@pytest.fixture
def pipe():
    return build_pipeline()


@pytest.fixture
def batch(pipe):
    """A clip and its instruction, encoded as for a call."""
    clip, prompt = make_clip(), "make the square blue"
    with torch.no_grad():
        edit, visual, positions, _ = pipe.encode_tokens([clip], [prompt])
        text, null_text = pipe.encode_prompt(prompt)
    generator = torch.Generator().manual_seed(0)
    latents, source, noise = torch.randn(3, 1, 16, 2, 4, 4, generator=generator)
    batch = {
        "latents": latents,
        "source_latents": source,
        "noise": noise,
        "sigmas": torch.tensor([0.999]),
        "prompt_embeds": text,
        "edit_tokens": edit,
        "visual_tokens": visual,
        "visual_positions": positions,
    }
    return batch, null_text[0]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_teacher_of_one_step_leads_where_the_pipeline_leads(pipe, batch, scale):
    batch, null_text = batch
    clip = make_clip()

    def take(pipe, step, timestep, kwargs):
        batch["source_latents"] = kwargs["source_latents"]
        return {}

    names = ["source_latents"]
    expected = pipe(
        clip,
        "make the square blue",
        num_inference_steps=4,
        guidance_scale=scale,
        latents=batch["noise"],
        output_type="latent",
        callback_on_step_end=take,
        callback_on_step_end_tensor_inputs=names,
    ).frames
    add_lora(pipe.transformer, rank=2)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # what the LoRA does has no part in it
    found = FewStepTeacher(pipe.transformer, pipe.scheduler, 1, 4, scale, null_text)(batch)
    assert found["sigmas"].item() == 1
    torch.testing.assert_close(batch["noise"] - found["velocity"], expected, atol=1e-4, rtol=1e-4)


def test_samples_begin_where_a_step_of_the_lora_begins(pipe, batch):
    batch, null_text = batch
    add_lora(pipe.transformer, rank=2)
    trained = [name for name, parameter in pipe.transformer.named_parameters() if parameter.requires_grad]
    teacher = FewStepTeacher(pipe.transformer, pipe.scheduler, 4, 3, 1.0, null_text)
    levels = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    levels = 3 * levels / (1 + 2 * levels)  # the scheduler's shift
    torch.testing.assert_close(teacher.levels[::3], levels)
    middles = (levels[1:] + levels[:-1]) / 2
    rows = {name: value.expand(8, *value.shape[1:]) for name, value in batch.items()}
    rows["sigmas"] = torch.cat([middles, levels[:-1]])
    torch.testing.assert_close(teacher(rows)["sigmas"], torch.cat([levels[:-1], levels[:-1]]))
    assert [name for name, p in pipe.transformer.named_parameters() if p.requires_grad] == trained


def test_with_as_many_steps_the_target_is_the_models_own_velocity(pipe, batch):
    batch, null_text = batch
    add_lora(pipe.transformer, rank=2)
    found = FewStepTeacher(pipe.transformer, pipe.scheduler, 4, 1, 1.0, null_text)(batch)
    own = pipe.transformer(
        batch["noise"],
        torch.tensor([1000.0]),
        batch["prompt_embeds"],
        batch["edit_tokens"],
        batch["visual_tokens"],
        batch["visual_positions"],
        source_hidden_states=batch["source_latents"],
    ).sample
    torch.testing.assert_close(found["velocity"], own, atol=1e-5, rtol=1e-5)


# The script


def test_a_scheduler_with_other_steps_is_refused(pipe, arguments, tmp_path, capsys):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe.register_modules(scheduler=scheduler)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        train.main([*arguments, "--distill_steps=2"])
    assert "but the pipeline has a UniPCMultistepScheduler" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)  # as README has it
    pipe.save_pretrained(tmp_path / "model")
    train.main([*arguments, "--distill_steps=2", "--max_train_steps=1"])
    assert (tmp_path / "run" / "lora").is_dir()


@pytest.fixture
def arguments(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    options = {"model": tmp_path / "model", "output": tmp_path / "run", "buckets": "5x32x32", "num_pairs": 8}
    options |= {"train_batch_size": 4, "num_workers": 0, "logging_steps": 1, "report_to": "none", "lora_rank": 4}
    options |= {"num_validation_pairs": 1, "num_validation_edits": 1, "lr_warmup_steps": 1, "learning_rate": 0.02}
    yield [f"--{name}={value}" for name, value in options.items()]
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_lora_learns_few_steps(arguments, tmp_path):
    train.main([*arguments, "--distill_steps=2", "--distill_substeps=2", "--max_train_steps=12", "--seed=1"])
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    flow = [entry["flow"] for entry in entries if "flow" in entry]
    assert sum(flow[-4:]) < 0.9 * sum(flow[:4]) and all("align" not in entry for entry in entries)
    assert not any("validation_flow" in entry for entry in entries), "its targets are not the edited clips"
    assert list((tmp_path / "run" / "validation").glob("*/*.mp4"))
    card = (tmp_path / "run" / "lora" / "README.md").read_text()
    assert "`pipe(..., num_inference_steps=2, guidance_scale=1.0)`; from 2 times as many, guidance 3" in card
    pipe = RVEDiTPipeline.from_pretrained(tmp_path / "model")
    pipe.load_lora_weights(tmp_path / "run" / "lora")
    assert pipe(make_clip(), "make it red", num_inference_steps=2, guidance_scale=1.0).frames.shape[1] == 5
    assert pipe.config.default_guidance_scale == 3.0


def test_guidance_by_the_source_is_refused(pipe, arguments, tmp_path, capsys):
    pipe.register_to_config(default_source_guidance_scale=1.5)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        train.main([*arguments, "--distill_steps=2"])
    assert "default_source_guidance_scale 1.5: save it with 1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--distill_steps=0"], "--distill_steps has to be at least 1, but is 0"),
        (["--distill_steps=4", "--training_type=full"], "--distill_steps is for a LoRA alone"),
        (["--distill_steps=4", "--train_distiller"], "--distill_steps is for a LoRA alone"),
        (["--distill_steps=4", "--align_weight=0.1"], "--distill_steps and --align_weight do not go together"),
        (["--distill_substeps=2"], "--distill_substeps needs --distill_steps"),
        (["--distill_guidance_scale=2"], "--distill_guidance_scale needs --distill_steps"),
        (["--distill_steps=4", "--stage=connect"], "--distill_steps is for --stage edit"),
    ],
)
def test_what_has_no_place_beside_a_teacher_is_refused(arguments, options, message, capsys):
    with pytest.raises(SystemExit) as error:
        train.main([*arguments, *options])
    assert error.value.code == 2 and message in capsys.readouterr().err
