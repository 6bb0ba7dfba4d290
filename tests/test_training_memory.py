import copy
import gc

import pytest
import torch
from components import TEXT_DIM, build_pipeline, build_transformer
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from rvedit_diffusers.synthetic import SyntheticEdits
from rvedit_diffusers.training.branches import EditingBranches
from rvedit_diffusers.training.cache import TEXTS, TOKENS, fill_cache
from rvedit_diffusers.training.checkpoint import save_checkpoint
from rvedit_diffusers.training.data import Bucket
from rvedit_diffusers.training.memory import (
    _rms_norm,
    checkpoint_bytes,
    describe_memory,
    estimate_memory,
    num_bytes,
    pair_tensors,
    state_bytes,
    step_bytes,
)
from rvedit_diffusers.training.options import computes_in_bfloat16
from rvedit_diffusers.training.pairs import SyntheticPairs
from rvedit_diffusers.training.samples import Draws


HEADS, HEAD_DIM, FFN_DIM = 4, 16, 224
DIM = HEADS * HEAD_DIM
LORA = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"])


def build_branches(training_type, checkpointing=False, num_layers=6):
    transformer = build_transformer(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, ffn_dim=FFN_DIM, num_layers=num_layers
    )
    if training_type == "lora":
        transformer.requires_grad_(False)
        transformer.to(torch.bfloat16).add_adapter(LORA)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return EditingBranches(transformer).train()


def build_sample(num_frames=3, height=32, width=32):
    latents = torch.randn(16, num_frames, height, width)
    sample = {"latents": latents, "source_latents": latents.clone(), "visual_positions": torch.rand(8, 3)}
    for prefix in ("", "reference_"):
        sample |= {f"{prefix}edit_tokens": torch.randn(4, DIM), f"{prefix}visual_tokens": torch.randn(8, DIM)}
    sample["prompt_embeds"] = torch.randn(16, TEXT_DIM)
    return sample | Draws(seed=0, num_positions=64)(0, latents.shape)


def run_step(branches, sample, batch_size=1, autocast_dtype=torch.bfloat16):
    batch = {name: value.expand(batch_size, *value.shape).clone() for name, value in sample.items()}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
            velocity, align_loss = branches(batch)
        (velocity.float().square().mean() + align_loss.mean()).backward()


def data_bytes(path):
    """Size of a safetensors file without its header."""
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize(
    "training_type, checkpointing, batch_size, accumulation, autocast_dtype",
    [
        pytest.param(*("full", False, 1, 1, torch.bfloat16), marks=pytest.mark.slow),
        ("full", False, 1, 1, None),
        pytest.param(*("full", True, 2, 1, torch.bfloat16), marks=pytest.mark.slow),
        ("full", True, 1, 3, torch.bfloat16),
        pytest.param(*("lora", False, 2, 1, torch.bfloat16), marks=pytest.mark.slow),
        ("lora", True, 1, 1, torch.bfloat16),
    ],
)
def test_a_step_takes_what_the_allocator_hands_out(
    training_type, checkpointing, batch_size, accumulation, autocast_dtype
):
    if autocast_dtype is not None and not computes_in_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU's kernels make copies in float32")
    branches, sample = build_branches(training_type, checkpointing), build_sample()
    estimate = step_bytes(branches, sample, batch_size, accumulation, autocast_dtype)
    for layer in branches.modules():
        if isinstance(layer, nn.RMSNorm):
            layer.forward = _rms_norm.__get__(layer)  # as on CUDA: see the test below
    gc.collect()  # memory of other tests that is freed during this one would count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(accumulation):
            run_step(branches, sample, batch_size, autocast_dtype)
    allocations = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert estimate == pytest.approx(peak, rel=0.01)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="asks PyTorch's CUDA kernels what they keep")
def test_norms_keep_what_cuda_keeps():
    def kept(norm, hidden_states):
        storages = {}
        own = {tensor.untyped_storage() for tensor in norm.parameters()}

        def pack(tensor):
            if tensor.untyped_storage() not in own:
                storages[id(tensor.untyped_storage())] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            norm(hidden_states)
        return sum(storage.nbytes() for storage in storages.values())

    rows = 50
    with FakeTensorMode():
        norms = [nn.RMSNorm(DIM, device=device) for device in ("cpu", "cuda")]
        norms[0].forward = _rms_norm.__get__(norms[0])
        states = [torch.empty(rows, DIM, dtype=torch.bfloat16, device=device) for device in ("cpu", "cuda")]
        torch.set_autocast_enabled("cuda", True)  # torch.autocast refuses without a device
        try:
            on_cpu, on_cuda = (kept(norm, x.requires_grad_()) for norm, x in zip(norms, states))
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert on_cpu == on_cuda + 4 * rows  # the mean of each row


def test_a_step_is_linear_in_the_tokens():
    branches = build_branches("lora")
    one, two, three = (step_bytes(branches, build_sample(num_frames)) for num_frames in (6, 8, 10))
    assert three - two == two - one > 0


def test_a_checkpointed_block_keeps_its_input_alone():
    sample = build_sample()
    few, many = (step_bytes(build_branches("lora", True, num_layers), sample) for num_layers in (3, 6))
    num_tokens = sample["latents"][0].numel() // 4
    assert many - few == pytest.approx(3 * num_tokens * DIM * torch.bfloat16.itemsize, rel=0.02)


def test_the_estimate_needs_no_data_and_changes_nothing():
    branches, sample = build_branches("lora", checkpointing=True), build_sample()
    before = {name: tensor.clone() for name, tensor in branches.state_dict().items()}
    estimate = estimate_memory(branches, sample)
    for name, tensor in branches.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in branches.parameters())
    assert not any("forward" in vars(module) for module in branches.modules())
    meta_sample = {name: value.to("meta") for name, value in sample.items()}
    assert estimate_memory(copy.deepcopy(branches).to("meta"), meta_sample) == estimate


@pytest.mark.parametrize("training_type", ["full", "lora"])
@pytest.mark.parametrize(
    "optimizer_class, settings, optimizer_bytes", [("AdamW", {}, 8), ("SGD", {"momentum": 0.9}, 4)]
)
def test_parameters_take_what_they_take(training_type, optimizer_class, settings, optimizer_bytes):
    branches, sample = build_branches(training_type), build_sample()
    trained = [parameter for parameter in branches.parameters() if parameter.requires_grad]
    optimizer, ema = getattr(torch.optim, optimizer_class)(trained, lr=1e-3, **settings), EMAModel(trained)
    run_step(branches, sample)
    optimizer.step()
    memory = estimate_memory(branches, sample, optimizer_bytes=optimizer_bytes, ema=True)
    tensors = [*branches.parameters(), *branches.buffers()]
    assert memory["weights"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    states = [value for entry in optimizer.state.values() for key, value in entry.items() if key != "step"]
    assert memory["optimizer"] == sum(tensor.numel() * tensor.element_size() for tensor in states)
    assert memory["ema"] == sum(tensor.numel() * tensor.element_size() for tensor in ema.shadow_params)
    parts = ("weights", "optimizer", "ema", "activations_and_gradients")
    assert memory["total"] == sum(memory[name] for name in parts)


@pytest.mark.parametrize(
    "name, settings, wanted",
    [("adamw", {}, 8), ("adamw8bit", {}, 2), ("muon", {}, 4), ("SGD", {}, 0), ("SGD", {"momentum": 0.9}, 4)],
)
def test_states_are_counted_by_optimizer(name, settings, wanted):
    assert state_bytes(name, **settings) == wanted
    assert state_bytes("Adafactor") < 0.1  # a row and a column


@pytest.mark.parametrize("with_ema", [False, True])
@pytest.mark.parametrize("training_type", ["full", "lora"])
def test_a_checkpoint_takes_what_it_takes_on_disk(tmp_path, training_type, with_ema):
    branches = build_branches(training_type)
    transformer = branches.transformer
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer, ema = torch.optim.AdamW(trained), EMAModel(trained) if with_ema else None
    run_step(branches, build_sample())
    optimizer.step()
    modules, heads = {"transformer": transformer}, nn.ModuleList()
    assert save_checkpoint(tmp_path / "checkpoint-1", modules, heads, optimizer, {"step": 1}, ema, trained) is None
    on_disk = sum(map(data_bytes, (tmp_path / "checkpoint-1").rglob("*.safetensors")))
    counters = 4 * len(trained)  # AdamW counts the steps of each parameter
    assert on_disk == checkpoint_bytes(transformer, ema=with_ema) + counters


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_pair_takes_what_its_file_takes(tmp_path, tokens, text):
    pipe = build_pipeline()
    pipe.tokenizer.model_max_length = 4  # every instruction is longer
    pairs = SyntheticPairs(SyntheticEdits(20, 5, 32, 48), 1, 16.0)
    path = fill_cache(pipe, pairs, tmp_path, tokens, text)[0]
    pair = pair_tensors(pipe, Bucket(5, 32, 48), tokens, text)
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in pair.items()}
    assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(path).items()}
    assert num_bytes(pair.values()) == data_bytes(path)


def test_a_pair_of_the_cache_and_its_draws_are_a_sample_of_the_branches(pipe):
    pair = pair_tensors(pipe, Bucket(5, 32, 32))
    sample = pair | Draws(seed=0)(0, pair["latents"].shape)
    assert step_bytes(EditingBranches(pipe.transformer), sample) > num_bytes(pipe.transformer.parameters())


def test_memory_in_words():
    assert describe_memory({"weights": 3 * 2**29, "activations_and_gradients": 12 * 2**30}) == (
        "weights                        1.50 GiB\nactivations and gradients     12.00 GiB"
    )
