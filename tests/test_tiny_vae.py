"""The embedded checkpoint's autoencoder begins with the best linear code of clips, and its training can be stopped."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from rvedit_diffusers.synthetic import TRAIN_LEVELS, BenchmarkItems
from rvedit_diffusers.training.checkpoint import checkpoints


SCRIPT = Path(__file__).parent.parent / "examples" / "tiny" / "train_vae.py"
SMALL = {"z_dim": 4, "base_dim": 8, "decoder_base_dim": 8, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_vae", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in SMALL.items():
        monkeypatch.setitem(module.VAE_CONFIG, name, value)
    monkeypatch.setattr(module, "NUM_FITTED_CLIPS", 8)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield module
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def clips(script):
    return script.to_range(script.Batches(BenchmarkItems(TRAIN_LEVELS, 3, "train", 5), 16)[0][0])


def test_cells_hold_each_pixel_once(script):
    clips = torch.arange(2 * 3 * 9 * 16 * 24).float().view(2, 3, 9, 16, 24)
    first, others = script.split_cells(clips)
    assert first.shape == (2, 1, 2, 3, 3 * 64) and others.shape == (2, 2, 2, 3, 3 * 256)
    assert set(others[1, 1, 0, 2].tolist()) == set(clips[1, :, 5:9, :8, 16:].flatten().tolist())
    assert torch.equal(script.join_cells(first, others), clips)


def test_components_lose_what_the_discarded_variance_is(script, clips):
    components = script.PrincipalComponents(12)
    components.fit(clips)
    codes = components.encode(clips)
    assert codes.shape == (16, 12, 2, 8, 8)
    for index, cells in enumerate(script.split_cells(clips)):
        own = codes[:, :, index].movedim(1, -1).reshape(-1, 12)
        torch.testing.assert_close(own.T.cov(), torch.eye(12), atol=2e-3, rtol=0)
        lost = script.split_cells(components.decode(codes) - clips)[index].flatten(0, -2)
        spectrum = torch.linalg.eigvalsh(cells.flatten(0, -2).double().T.cov())
        assert lost.square().sum(-1).mean().item() == pytest.approx(spectrum[:-12].sum().item(), rel=0.01)


def test_a_channel_means_the_same_in_the_first_frame_and_in_others(script, clips):
    components = script.PrincipalComponents(12)
    components.fit(clips)
    codes = components.encode(clips[:, :, :1].expand(-1, -1, 5, -1, -1))  # nothing moves
    first, others = codes.unbind(2)
    likeness = [
        torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        for a, b in zip(first.unbind(1), others.unbind(1), strict=True)
    ]
    assert sum(value > 0.9 for value in likeness[:6]) == 6, likeness
    costs = components.weights(3)[..., 0, 0]
    assert torch.equal(costs[:, 1], costs[:, 2]) and torch.equal(
        costs[:, 1].argsort(), components.others_std.argsort()
    )


def test_both_halves_learn_the_components_apart(script, clips):
    torch.manual_seed(0)
    vae, components = AutoencoderKLWan.from_config(script.VAE_CONFIG), script.PrincipalComponents(4)
    components.fit(clips)
    model = script.Reconstruction(vae, components, edit_weight=1.0, kl_weight=1.0)
    losses = model(clips[:2], torch.zeros(2, 1, 5, 64, 64, dtype=torch.bool), is_apart=True)
    losses["loss"].backward()
    assert all(p.grad is not None for p in vae.parameters()) and not any(
        p.requires_grad for p in components.parameters()
    )
    encoder = [p.grad.clone() for p in vae.encoder.parameters()]
    vae.zero_grad()
    error = (vae.encode(clips[:2]).latent_dist.mean - components.encode(clips[:2])).square()
    (error * components.weights(2)).mean().backward()
    for ours, expected in zip(encoder, vae.encoder.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.grad, atol=1e-5, rtol=1e-3)


def test_ordered_latents_decode_to_the_same_and_begin_with_what_changes_most(script, clips):
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_config(script.VAE_CONFIG | {"latents_mean": [1.0] * 4}).requires_grad_(False)
    torch.nn.init.normal_(vae.quant_conv.bias)
    before = vae.decode(vae.encode(clips).latent_dist.mode()).sample
    script.order_latents(vae, clips)
    posterior = vae.encode(clips).latent_dist
    torch.testing.assert_close(vae.decode(posterior.mode()).sample, before, atol=2e-4, rtol=1e-3)
    latents = posterior.mode().movedim(1, -1).flatten(0, -2)
    assert latents.mean(0).abs().max() < 1e-3 and posterior.logvar.unique().tolist() == [-6.0]
    covariance, std = latents.T.cov(), latents.std(0)
    torch.testing.assert_close(covariance, torch.diag(std.square()), atol=2e-3, rtol=0)
    assert std.square().mean().item() == pytest.approx(1.0, abs=0.01)
    assert std.tolist() == sorted(std.tolist(), reverse=True)
    pixels = script.split_cells(clips)[1].flatten(0, -2)
    moved = posterior.mode()[:, :, 1:].movedim(1, -1).flatten(0, -2)
    moved = torch.cat([moved, torch.ones_like(moved[:, :1])], dim=1)
    impact = torch.linalg.lstsq(moved, pixels).solution[:4].norm(dim=1) * std
    torch.testing.assert_close(impact.pow(0.75) / std, (impact.pow(0.75) / std).mean().expand(4), rtol=0.02, atol=0)
    assert (vae.config.latents_mean, vae.config.latents_std) == ([0.0] * 4, [1.0] * 4)


def test_items_come_again_flipped_and_are_rendered_once(script):
    batches = script.Batches(BenchmarkItems(TRAIN_LEVELS, 3, "train", 5), 4, num_items=4)
    plain, edited = batches[1]
    changed = (plain[0] != plain[1]).any(0)
    assert edited.shape == (4, 1, 5, 64, 64) and edited[0, 0][changed].float().mean() > 0.9
    assert torch.equal(batches[3][0], plain.flip(-2)) and torch.equal(batches[5][0], plain.flip(-1))
    assert torch.equal(batches[7][1], edited.flip(-2, -1)) and torch.equal(batches[9][0], plain)
    assert len(batches.kept) == 2


def test_it_learns_and_goes_on_where_it_was_stopped(script, tmp_path, monkeypatch, stopped_at_the_first_checkpoint):
    def train(folder, *others):
        options = ["--steps", 12, "--batch_size", 2, "--save_every", 4, "--num_frames", 5, "--num_items", 2, *others]
        monkeypatch.setattr(sys, "argv", ["train_vae.py", "--output", str(folder), *map(str, options)])
        script.main()
        return load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")

    whole = train(tmp_path / "whole")
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert "code" in log[0] and "kl" in log[-2] and log[-1]["psnr_unseen_photos"] > log[0]["psnr_unseen_photos"]
    assert whole["quant_conv.bias"][4:].tolist() == [-6.0] * 4  # ordered

    with stopped_at_the_first_checkpoint():
        train(tmp_path / "stopped")
    assert [folder.name for folder in checkpoints(tmp_path / "stopped")] == ["checkpoint-4"]
    resumed = train(tmp_path / "stopped")
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, msg=name)

    better = train(tmp_path / "on", "--start", tmp_path / "whole" / "vae")
    first = json.loads((tmp_path / "on" / "log.jsonl").read_text().splitlines()[0])
    assert "kl" in first and "code" not in first and better.keys() == whole.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "3"], "--batch_size 3 has to be even"),
        (["--num_frames", "8"], "--num_frames 8 has to be 4 k + 1"),
        (["--num_frames", "1"], "--num_frames 1 has to be 4 k + 1"),
        (["--apart", "1.5"], "--apart 1.5 has to be a share"),
    ],
)
def test_wrong_options_are_refused(script, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_vae.py", "--output", str(tmp_path / "run"), *options])
    with pytest.raises(SystemExit):
        script.main()
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
