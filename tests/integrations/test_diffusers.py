"""Schedules and steps against diffusers' own numbers; its models behind the loop."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from prefkern import diffusion as d

diffusers = pytest.importorskip("diffusers")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
B = 5
KINDS = ("epsilon", "sample", "v_prediction")
kinds = pytest.mark.parametrize("kind", KINDS)


def draw():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, 2, 4, 4, generator=g) for _ in range(3)]


def close(ours, theirs):
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-4, atol=2e-4)


@kinds
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noising_and_targets(kind, betas):
    theirs = diffusers.DDPMScheduler(beta_schedule=betas, prediction_type=kind)
    ours = d.Schedule.of(theirs)
    clean, noise, _ = draw()
    level = torch.tensor([0, 10, 400, 800, 998])
    close(ours.add_noise(clean, noise, level), theirs.add_noise(clean, noise, level))
    assert torch.equal(ours.time(level), level)
    want = {"epsilon": noise, "sample": clean}.get(kind)
    want = theirs.get_velocity(clean, noise, level) if want is None else want
    close(ours.target(clean, noise, level), want)


def test_the_named_schedules_are_theirs():
    for name, ours in (
        ("linear", d.Schedule.linear(1000, 1e-4, 0.02)),
        ("scaled_linear", d.Schedule.scaled_linear(1000, 0.00085, 0.012)),
    ):
        start, end = (1e-4, 0.02) if name == "linear" else (0.00085, 0.012)
        theirs = diffusers.DDPMScheduler(beta_schedule=name, beta_start=start, beta_end=end)
        torch.testing.assert_close(
            (ours.signal**2).float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7
        )


@kinds
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_steps(kind, eta):
    """Means and sigmas of every step of a walk, noise fixed by us."""
    theirs = diffusers.DDIMScheduler(
        prediction_type=kind, clip_sample=False, timestep_spacing="trailing"
    )
    theirs.set_timesteps(5)
    ours = d.Schedule.of(theirs)
    ladder = d.ladder(ours, 5)
    assert ladder[:-1].tolist() == theirs.timesteps.tolist()
    x, pred, noise = draw()
    for at, to in itertools.pairwise(ladder):
        mean, sigma = ours.step(pred, x, at.expand(B), to.expand(B), eta=eta)
        got = theirs.step(pred, int(at), x, eta=eta, variance_noise=noise if eta else None)
        close(mean + sigma[0].float() * noise, got.prev_sample)
        close(ours.clean(pred, x, at.expand(B)), got.pred_original_sample)


@kinds
def test_ancestral_steps(kind):
    theirs = diffusers.DDPMScheduler(
        prediction_type=kind, clip_sample=False, timestep_spacing="trailing"
    )
    theirs.set_timesteps(10)
    ours, (x, pred, _) = d.Schedule.of(theirs), draw()
    for at, to in ((999, 899), (499, 399)):
        mean, sigma = ours.step(pred, x, *(torch.full((B,), v) for v in (at, to)), eta=1.0)
        g = torch.Generator().manual_seed(4)
        got = theirs.step(pred, at, x, generator=g).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
        close(mean + sigma[0].float() * noise, got)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inversion(kind):
    """DDIMInverseScheduler over the same levels, with a denoiser that is one fixed field."""
    theirs = diffusers.DDIMInverseScheduler(prediction_type=kind, clip_sample=False)
    ours, (clean, field, _) = d.Schedule.of(theirs), draw()
    theirs.initial_alpha_cumprod = torch.tensor(1.0)  # from the clean sample, as here
    x, told = clean, []
    for at in (199, 399, 599, 799, 999):
        theirs.num_inference_steps = 5
        x = theirs.step(torch.sin(x + field) + at / 1000, at, x).prev_sample

    def denoiser(x, time, cond):
        told.append(int(time[0]))
        return torch.sin(x + field) + time[0] / 1000

    got = d.invert(denoiser, clean, None, ours, torch.full((B,), 999), steps=5)
    assert told == [199, 399, 599, 799, 999]
    close(got, x)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow(shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = d.Schedule.of(theirs)
    clean, noise, pred = draw()
    level = torch.tensor([0, 10, 400, 800, 999])
    told = ours.time(level)
    torch.testing.assert_close(told, theirs.timesteps.flip(0)[level], rtol=1e-6, atol=1e-3)
    exact = theirs.timesteps.flip(0)[level]
    close(ours.add_noise(clean, noise, level), theirs.scale_noise(clean, exact, noise))
    close(ours.target(clean, noise, level), noise - clean)
    theirs.set_timesteps(sigmas=[1.0, 0.5], num_inference_steps=2)
    assert d.Schedule.of(theirs).signal.equal(ours.signal)
    # an Euler step between two levels
    at, to = (torch.full((B,), value) for value in (800, 300))
    gap = (ours.coefficients(to)[1] - ours.coefficients(at)[1]).float().reshape(-1, 1, 1, 1)
    close(ours.step(pred, clean, at, to).mean, clean + gap * pred)


def test_schedulers_that_cannot_be_read():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        d.Schedule.of(diffusers.DDIMScheduler(rescale_betas_zero_snr=True))
    good = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert d.Schedule.of(good).signal[-1] < 1e-3
    with pytest.raises(ValueError, match="depend on the resolution"):
        d.Schedule.of(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match="neither alphas_cumprod nor a rectified flow"):
        d.Schedule.of(diffusers.EDMEulerScheduler())


def test_adapters_of_the_model_itself():
    """add_adapter of a diffusers model, which has no context manager to switch it off."""
    peft = pytest.importorskip("peft")
    net = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(4,), norm_num_groups=2,
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=4,
    )  # fmt: skip
    caption = torch.ones(1, 1, 4)
    denoiser = torch.nn.ModuleDict({"net": net})
    denoiser.forward = lambda x, time, cond: net(x, time, caption.expand(len(x), 1, 4)).sample
    schedule = d.Schedule.linear()
    with pytest.raises(ValueError, match="has no adapter to switch off"):
        d.DiffusionPreference(denoiser, schedule)
    clean, other, _ = draw()
    time = torch.full((B,), 5)
    with torch.no_grad():
        before = denoiser(clean, time, None)
    net.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    module = d.DiffusionPreference(denoiser, schedule, kappa=1.0)
    out = module(d.Pairs(clean, other))
    out.loss.backward()
    assert all(("lora" in n) == (p.grad is not None) for n, p in net.named_parameters())
    torch.testing.assert_close(module._reference(clean, time, None), before)
    with torch.no_grad():
        assert not torch.allclose(denoiser(clean, time, None), before)  # switched on again


@pytest.mark.parametrize(("kind", "least"), [("unet", 0.2), ("flow", 0.2)])
def test_the_example_raises_the_share_of_the_liked(kind, least):
    pytest.importorskip("peft")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import diffusion_lora
    finally:
        sys.path.remove(str(EXAMPLES))
    torch.manual_seed(0)
    before, after = diffusion_lora.run(kind)
    assert before > 0.1 and after > before + least
