"""What memory.py and growth.py count, what plan.py predicts, and the page that is made of all results."""

import dataclasses
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rvedit_diffusers import RVEDiTTokenDistiller
from rvedit_diffusers.training.branches import ConnectingBranches


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import growth  # noqa: E402
import memory  # noqa: E402
import models  # noqa: E402
import plan  # noqa: E402
import report  # noqa: E402
import training  # noqa: E402
from costs import transformer_flops  # noqa: E402


TINY = models.PRESETS["tiny"]


# README's names of the settings of memory.py, without `pipe.` and what the call is given
README_SETTINGS = {
    "all on the GPU": "all on the device",
    "`enable_model_cpu_offload()`": "model offload",
    "the same, `vae.enable_tiling()`, weights in fp8": "model offload, tiled VAE, weights in fp8",
    "`enable_group_offload()`, tiled VAE": "group offload, tiled VAE",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder of results: what the scripts wrote."""
    folder = tmp_path_factory.mktemp("results")
    memory.main(["--preset", "tiny", "--device", "meta", "--output", str(folder / "memory.json")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, "FRAMES", (17, 33))
        patch.setattr(growth, "AREAS", (1.0, 4.0))
        patch.setattr(growth, "BATCHES", (1, 2))
        growth.main(["--preset", "tiny", "--device", "meta", "--output", str(folder / "growth.json")])
    options = ["--preset", "tiny", "--frames", "13", "--size", "128x128", "--gpus", "2"]
    plan.main([*options, "--output", str(folder / "plan.json")])
    return folder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_each_setting_of_memory_keeps_what_it_says(results):
    found = read(results, "memory")["bytes"]
    everything, models_in_turn, tiled, small, groups = found.values()
    assert list(found) == list(memory.SETTINGS)
    weights = {
        name: memory.weights(part)
        for name, part in zip(
            ("text_encoder", "mllm", "vae", "transformer"),
            memory.build_parts(TINY, "text_encoder", "mllm", "vae", "transformer"),
        )
    }
    for stage, part in memory.STAGES.items():
        assert everything["stages"][stage] - models_in_turn["stages"][stage] == sum(weights.values()) - weights[part]
        assert tiled["stages"][stage] <= models_in_turn["stages"][stage]
        assert groups["stages"][stage] <= tiled["stages"][stage]
    for stage in ("text", "denoise"):
        assert small["stages"][stage] < tiled["stages"][stage]
    assert [values["peak"] for values in found.values()] == [max(v["stages"].values()) for v in found.values()]
    assert everything["moved"] == 0 and models_in_turn["moved"] == sum(weights.values()) + weights["vae"]
    assert groups["moved"] - models_in_turn["moved"] == (2 * memory.STEPS - 1) * weights["transformer"]


def test_a_context_is_counted_where_there_is_one():
    whole, streamed = (memory.stage_bytes(TINY, False, with_context) for with_context in (True, False))
    keys = 2 * 2 * TINY.dim * (2 * (64 + TINY.num_visual) + TINY.num_edit)  # and values, bfloat16: two deep blocks
    assert whole["denoise"] - streamed["denoise"] > keys
    assert all(whole[stage] == streamed[stage] for stage in memory.STAGES if stage != "denoise")


def test_the_mllm_is_the_one_that_the_documentation_counts():
    with torch.device("meta"):
        mllm = models.build_mllm(models.PRESETS["wan-1.3b"])
    count = sum(parameter.numel() for parameter in mllm.parameters())
    assert f"| MLLM, Qwen3-VL-4B | {count:,} |" in (ROOT / "docs" / "base_models.md").read_text()


def test_tiles_of_a_large_clip_hold_less():
    large = dataclasses.replace(TINY, latent_size=(1, 64, 64))  # diffusers' tiles are of 256 pixels
    whole, tiled = (memory.stage_bytes(large, each, with_context=True) for each in (False, True))
    for stage in ("encode", "decode"):
        assert tiled[stage] < 0.7 * whole[stage]
    assert all(tiled[stage] == whole[stage] for stage in ("text", "tokens", "denoise"))


def test_two_blocks_of_a_streamed_model_are_on_the_device():
    (transformer,) = memory.build_parts(TINY, "transformer")
    block = memory.weights(transformer.blocks[-1])
    assert memory.streamed_weights(transformer) == memory.weights(transformer) - memory.weights(transformer.blocks[0])
    assert memory.weights(transformer.blocks[1]) == block > memory.weights(transformer.blocks[0])


def test_encoders_are_streamed_by_leaves_and_the_vae_by_blocks():
    text_encoder, mllm, vae = memory.build_parts(TINY, "text_encoder", "mllm", "vae")
    for model in (text_encoder, mllm):
        linears = [memory.weights(module) for module in model.modules() if isinstance(module, torch.nn.Linear)]
        embedding = memory.weights(model.get_input_embeddings())
        assert max(linears) + min(linears) < memory.streamed_weights(model) < memory.weights(model)
        if model is text_encoder:
            assert memory.streamed_weights(model) == embedding + max(linears)
    blocks = memory.streamed_blocks(vae, ("encoder", "decoder"))
    assert blocks == [*vae.encoder.down_blocks, *vae.decoder.up_blocks]
    kept = memory.weights(vae) - sum(map(memory.weights, blocks))
    assert memory.streamed_weights(vae) == kept + sum(sorted(map(memory.weights, blocks))[-2:])


@torch.no_grad()
def test_every_stage_of_an_edit_is_followed(monkeypatch):
    pipe = models.build_pipelines(TINY, ["ours"], torch.device("cpu"), torch.float32)["ours"]
    stubs = {"synchronize": None, "reset_peak_memory_stats": None, "max_memory_allocated": 1}
    for name, value in stubs.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    clip = torch.rand(TINY.clip_size[0], 3, *TINY.clip_size[1:])
    with memory.stage_peaks(pipe, torch.device("cpu")) as peaks:
        pipe(clip, "make it red", num_inference_steps=1)
    assert peaks == dict.fromkeys(memory.STAGES, 1)


def test_what_a_call_holds_grows_with_the_clip(results):
    found = read(results, "growth")
    for axis in ("frames", "area", "batch"):
        assert found["growth"][axis]["bytes"]["ours"][1] > 1.5 * found["growth"][axis]["bytes"]["ours"][0]
    assert found["exponents"]["batch_flops"] == {"ours": pytest.approx(1), "wan": pytest.approx(1)}
    assert 1 < found["exponents"]["area_flops"]["ours"] < 2
    frames, area = (found["growth"][axis]["tokens"] for axis in ("frames", "area"))
    latent, height, width = TINY.latent_size
    assert (
        frames == [5 * height * width // 4, 9 * height * width // 4]
        and area[1] == 4 * area[0] == latent * height * width
    )
    ours, wan = (found["growth"]["batch"]["flops"][name] for name in ("ours", "wan"))
    assert found["ratios"]["batch_flops_vs_wan"] == pytest.approx(ours[0] / wan[0])


def test_an_exponent_is_the_power_of_a_power_law():
    assert growth.exponent([1, 2, 5], [3 * n**1.7 for n in (1, 2, 5)]) == pytest.approx(1.7)


@pytest.mark.parametrize("training_type", ["lora", "full"])
def test_a_plan_counts_the_states_that_a_training_has(training_type):
    args = training.parse_args(["--preset", "tiny", "--device", "meta", "--training_type", training_type])
    branches = training.build_branches(args, torch.device("meta"))["align"]
    found = plan.count_memory(TINY, training_type, checkpointing=True)
    trained = [parameter for parameter in branches.transformer.parameters() if parameter.requires_grad]
    assert found["num_trained"] >= sum(parameter.numel() for parameter in trained)
    assert found["num_weights"] >= sum(parameter.numel() for parameter in branches.transformer.parameters())
    assert found["optimizer"] == 8 * found["num_trained"]
    two, many = (plan.total_memory(found, count, "fsdp2") for count in (2, 64))
    states = found["weights"] + found["gradients"] + found["optimizer"]
    assert two - many == pytest.approx(states * (1 / 2 - 1 / 64))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training_type", ["lora", "full"])
def test_flops_of_a_plan_are_those_of_the_step(training_type, checkpointing):
    """But for what formulas leave out: LoRA's own products."""
    options = ["--preset", "tiny", "--device", "meta", "--training_type", training_type, "--align_tokens", "16"]
    args = training.parse_args(options + ["--gradient_checkpointing"] * checkpointing)
    counted = training.count_flops(args)
    step = partial(plan.step_flops, TINY, training_type, checkpointing)
    plain, aligned = (sum(step(aligned=each).values()) for each in (False, True))
    assert plain == pytest.approx(counted["plain"], rel=0.05 if training_type == "full" else 0.2)
    assert aligned - plain == pytest.approx(counted["align"] - counted["plain"], rel=0.25)
    last = sum(step(aligned=True, align_blocks=[0, TINY.num_layers - 1]).values())
    assert last - plain == pytest.approx(sum(transformer_flops(TINY).values()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_the_first_stage_of_a_plan_are_those_of_its_step(checkpointing):
    preset = dataclasses.replace(TINY, num_layers=30)  # the two at the ends, which get fewer gradients, are few
    sample = training.make_samples(preset, 64)["align"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer = models.build_transformer(preset)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        distiller = RVEDiTTokenDistiller(preset.dim, preset.dim, preset.num_edit)
        branches = ConnectingBranches(transformer, distiller).train()
        batch = training.make_batch(sample, 1, torch.device("cpu"))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), FlopCounterMode(display=False) as counter:
            branches(batch)[1].mean().backward()
    assert sum(plan.connect_flops(preset, checkpointing).values()) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_what_gpus_send_each_other_is_that_of_a_ring():
    gpu = plan.GPUS["h100"]
    assert plan.traffic(5, 3, 1, gpu, "ddp") == 0
    assert plan.traffic(5, 3, 4, gpu, "ddp") == pytest.approx(2 * 4 * 3 * (3 / 4) / gpu.near)
    assert plan.traffic(5, 3, 4, gpu, "fsdp2") == pytest.approx((4 * 3 + 2 * 2 * 5) * (3 / 4) / gpu.near)
    assert plan.traffic(5, 3, 16, gpu, "ddp") == pytest.approx(2 * 4 * 3 * (15 / 16) / gpu.far)


def test_a_plan_is_checked_against_what_was_measured(results, tmp_path, capsys):
    flops = plan.step_flops(TINY, "lora", False, False)
    speed = {"matrix product": 2e9, "attention": 1e9}
    measured_call = {"peak_flops_per_second": speed, "flops": {"ours": {"attainable_share": 0.5}}}
    inference = {"transformer": measured_call, "device": "2 CPU cores"}
    predicted = plan.count_memory(TINY, "lora", checkpointing=False)
    predicted |= {"activations": 4 * predicted["activations"], "mllm": 0}
    seconds = 4 * 3 * (flops["linear"] / 2e9 + flops["attention"] / 1e9) / 0.5
    measured = {
        "settings": {
            "preset": {"name": "tiny"},
            "training_type": "lora",
            "gradient_checkpointing": False,
            "batch_size": 4,
            "align_blocks": None,
        },
        "flops": {"plain": 4 * 2 * sum(flops.values()), "align": 1},
        "memory_bytes": {"plain": 4 * plan.total_memory(predicted, 1, "ddp"), "align": 1},
        "seconds": {"plain": [seconds], "align": [1]},
    }
    for name, content in (("inference", inference), ("training", measured)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    options = ["--preset", "tiny", "--frames", "13", "--size", "128x128", "--gpus", "1"]
    plan.main([*options, f"--measured={tmp_path}/inference.json", f"--check={tmp_path}/training.json"])
    shown = capsys.readouterr().out
    assert (
        "| plain | 0.50 | 0.25 | 0.33 |" in shown
        and "Speeds (measured on 2 CPU cores): matrix product 0.002 TFLOPs/s" in shown
    )
    assert "Fits in 90% of the 75 GiB of one h100: python examples/train.py" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, says",
    [
        (["--preset", "wan-1.3b", "--gpus", "8", "--training_type", "lora"], "examples/accelerate/ddp.yaml"),
        (["--preset", "wan-14b", "--gpus", "64"], "accelerate/fsdp2.yaml --num_processes 64 --num_machines 8 "),
        (
            ["--preset", "wan-14b", "--gpus", "8", "--gpu", "rtx4090"],
            "Does not fit in 90% of the 22 GiB of one rtx",
        ),
    ],
)
def test_a_plan_says_how_to_launch(options, says, capsys):
    plan.main(options)
    assert says in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("training_type", ["lora", "full"])
def test_a_plan_needs_the_memory_of_the_step(training_type):
    options = ["--preset", "wan-1.3b", "--device", "meta", "--training_type", training_type]
    counted = training.count_memory(training.parse_args([*options, "--gradient_checkpointing"]))["align"]
    predicted = plan.count_memory(models.PRESETS["wan-1.3b"], training_type, True)
    planned = plan.total_memory(predicted, 1, "ddp") - predicted["mllm"]  # in training.py tokens come from the cache
    assert planned == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize(
    "script, options, message",
    [
        (plan, ["--size", "480"], "--size has to be HEIGHTxWIDTH in multiples of 32, but is 480"),
        (plan, ["--size", "480x830"], "--size has to be HEIGHTxWIDTH in multiples of 32, but is 480x830"),
        (plan, ["--frames", "80"], "--frames has to be a multiple of 4, and 1, but is 80"),
        (plan, ["--gpus", "0"], "--gpus has to be at least 1, but is 0"),
        (plan, ["--check", "x.json"], "--check needs --measured"),
        (plan, ["--measured", "nowhere.json"], "--measured nowhere.json cannot be read"),
        (memory, ["--device", "cpu"], "--device has to be a CUDA device or meta, but is cpu"),
        (memory, ["--num_inference_steps", "0"], "--num_inference_steps has to be at least 1, but is 0"),
        (growth, ["--repeats", "0"], "--repeats has to be at least 1, but is 0"),
        (report, ["nowhere.json", "--output", "page.md"], "nowhere.json is no result of a benchmark"),
        (report, [__file__, "--output", "page.md"], "is no result of a benchmark"),
        (report, [__file__, "--output", "page.html"], "--output has to end in .md, but is page.html"),
    ],
)
def test_wrong_options_end_with_a_message(script, options, message, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_page_has_all_tables_and_their_commands(results, tmp_path):
    paths = [str(results / f"{name}.json") for name in ("plan", "growth", "memory")]
    page = tmp_path / "docs" / "performance.md"
    report.main([*paths, "--output", str(page)])
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Memory, tiny",
        "## Growth, tiny",
        "## Plan, tiny",
    ]
    for name in ("memory", "growth", "plan"):
        found = read(results, name)
        assert found["text"] in text and f"```bash\n{found['command']}\n```" in text
        assert found["command"].startswith(f"python benchmarks/{name}.py --preset tiny")
    assert "![Cost over frames, area and batch](performance_growth.png)" in text
    assert {path.name for path in page.parent.iterdir()} == {"performance.md", "performance_growth.png"}


@pytest.mark.parametrize("page", ["quality.md"])
def test_a_page_of_the_documentation_is_made_of_the_results_beside_it(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / page).read_text()
    command = re.search(r"^python benchmarks/report.py (.*) --output (\S+)$", text, re.MULTILINE)
    assert command[2] == f"docs/{page}"
    paths = command[1].split()
    assert all(Path(path).parent == Path("docs/benchmarks") for path in paths)
    report.main([*paths, "--output", str(tmp_path / page)])
    assert (tmp_path / page).read_text().replace(str(tmp_path), "docs") == text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {path.name for path in (ROOT / "docs").glob(f"{Path(page).stem}_*.png")}


def test_figures_of_the_readme_are_those_of_the_results():
    def read_result(name):
        return json.loads((ROOT / "docs" / "benchmarks" / f"{name}.json").read_text())

    text = " ".join((ROOT / "README.md").read_text().split())
    sizes = read_result("memory-wan-1.3b")["bytes"]
    table = re.sub(r"pipe\.(\w+)\([^)]*\)", r"\1()", text.replace("pipe.vae", "vae"))
    for words, name in README_SETTINGS.items():
        assert f"| {words} | {sizes[name]['peak'] / 2**30:.1f} | {sizes[name]['moved'] / 2**30:.0f} |" in table
    lora, full = (
        f"{read_result(f'training-wan-1.3b-{kind}-checkpointing')['memory_bytes']['align'] / 2**30:.1f} GiB"
        for kind in ("lora", "full")
    )
    assert f"{lora} of GPU memory for a LoRA of rank 32, {full} for full training" in text
    quality = read_result("quality-tiny")
    num_items = len(quality["settings"]["levels"]) * quality["settings"]["num_samples"]
    share, count = (
        {name: write(values) for name, values in quality["quality"].items()}
        for write in (
            lambda values: f"{values['time_ratio']:.2f}",
            lambda values: f"{num_items * values['union_success']:.0f}",
        )
    )
    fewer, cached, unguided, lora = "4 steps", "MagCache, 0.3", "no LoRA, 4 steps, no guidance", "LoRA, 4 steps"
    assert f"| {share[fewer]} of the time of the embedded checkpoint's 12 steps" in text
    assert (
        f"with {count[fewer]} successes of {num_items} items of L1 and L2, as with these" in text
        and count[fewer] == count["full"]
    )
    assert f"MagCache at 0.3: {share[cached]} of the time, {count[cached]}." in text
    assert f"| {share[unguided]} of the time, {count[unguided]} of {num_items} |" in text
    assert f"they take {share[lora]} of the time and succeed in {count[lora]} of {num_items}" in text
