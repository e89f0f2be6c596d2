"""Diffusion-DPO of a diffusers model with LoRA, which switched off is the reference.

    accelerate launch examples/diffusion_lora.py [unet] [flow]

Adapters by peft, the loop by accelerate. Both models are made from a small config and first learn
the pictures of diffusion_pictures.py; in earnest, take from_pretrained, your scheduler, latents of
your VAE for pictures and text embeddings for the caption, and leave `pretrained` out. Printed is
the share of liked samples before and after.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusion_pictures import LIKED, PAIRS, pictures, random_sides, seen
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from prefkern import diffusion as d


class UNet(nn.Module):
    """A UNet of diffusers as denoiser(x, time, cond); cond: caption [B, L, 8]."""

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")

    def __init__(self) -> None:
        super().__init__()
        self.model = UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 16),
            layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8,
            attention_head_dim=4, norm_num_groups=4,
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.model(x, time, encoder_hidden_states=cond["caption"]).sample


class Flow(nn.Module):
    """The transformer of Stable Diffusion 3 as denoiser(x, time, cond)."""

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def __init__(self) -> None:
        super().__init__()
        self.model = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=2,
            attention_head_dim=8, num_attention_heads=4, joint_attention_dim=8,
            caption_projection_dim=32, pooled_projection_dim=8, pos_embed_max_size=4,
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.model(
            x, encoder_hidden_states=cond["caption"], pooled_projections=cond["caption"][:, 0],
            timestep=time,
        ).sample  # fmt: skip


def said(count: int) -> dict[str, Tensor]:
    """The one caption, as a text encoder would give it."""
    return {"caption": torch.ones(count, 2, 8)}


def pretrained(net: nn.Module, schedule: d.Schedule, steps: int, batch: int = 32) -> None:
    optimizer = torch.optim.Adam(net.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        clean = pictures(random_sides(batch))
        level, noise = torch.randint(len(schedule), (batch,)), torch.randn_like(clean)
        pred = net(schedule.add_noise(clean, noise, level), schedule.time(level), said(batch))
        optimizer.zero_grad()
        (pred - schedule.target(clean, noise, level)).square().mean().backward()
        optimizer.step()
        rate.step()


def share(net: d.Denoiser, schedule: d.Schedule, count: int = 128) -> float:
    noise, ladder = torch.randn(count, 1, 8, 8), d.ladder(schedule, 20)
    found = seen(d.sample(net, noise, said(count), schedule, ladder))
    return (found == LIKED).all(1).float().mean().item()


def run(kind: str, steps: int = 80) -> tuple[float, float]:
    """Shares before and after."""
    net = {"unet": UNet, "flow": Flow}[kind]()
    schedule = d.Schedule.of(net.scheduler)
    pretrained(net, schedule, {"unet": 250, "flow": 450}[kind])
    before = share(net, schedule)
    adapted = r".*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2|conv1|conv2|proj_in|proj_out)"
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=adapted)
    net.model = get_peft_model(net.model, lora)
    accelerator = Accelerator(cpu=True)
    module = d.DiffusionPreference(net, schedule, "diff_dpo", kappa=4.0, levels=(500, 1000))
    trained = [p for p in net.parameters() if p.requires_grad]
    module, optimizer = accelerator.prepare(module, torch.optim.Adam(trained, lr=3e-3))
    liked = LIKED.expand(PAIRS, 2)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = d.Pairs(pictures(liked), pictures(1 - liked), said(PAIRS))
        accelerator.backward(module(batch).loss)
        optimizer.step()
    return before, share(net.eval(), schedule)


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or ("unet", "flow"):
        print(name, *(f"{value:.2f}" for value in run(name)))
