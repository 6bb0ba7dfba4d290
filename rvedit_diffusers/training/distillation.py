"""Few steps without guidance: what a LoRA learns from the model that it is put on."""

import torch

from ..transformer_rvedit import RVEDiTTransformer3DModel


class FewStepTeacher:
    """The model without its LoRA, which says where one step of the few has to lead.

    A sample's noise level is raised to that of the step in which it lies. From there the teacher takes `substeps`
    guided Euler steps to the level of the next; the target is the velocity that leads there in one. So many steps
    become one, as in [progressive distillation](https://arxiv.org/abs/2202.00512), at once instead of by halves, and
    with [guidance in the target](https://arxiv.org/abs/2210.03142).

    Args:
        transformer ([`RVEDiTTransformer3DModel`]): With LoRA layers.
        scheduler: The pipeline's, whose shift counts.
        num_steps (`int`): That the LoRA learns to take.
        substeps (`int`): Of the teacher for each.
        guidance_scale (`float`): Of the teacher, by the instruction; 1 is none.
        null_text (`torch.Tensor` of shape `(length, text_dim)`): The embedded empty instruction, on the device of the
            batches: a copy in each step would wait for it.
    """

    def __init__(
        self,
        transformer: RVEDiTTransformer3DModel,
        scheduler,
        num_steps: int,
        substeps: int,
        guidance_scale: float,
        null_text: torch.Tensor,
    ):
        count = num_steps * substeps
        scheduler.set_timesteps(sigmas=[1 - step / count for step in range(count)])
        self.levels = scheduler.sigmas.float().to(null_text.device)  # (count + 1,), falling to 0
        self.transformer, self.substeps, self.guidance_scale = transformer, substeps, guidance_scale
        self.null_text = null_text

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add a target to a batch.

        Args:
            batch (`dict[str, torch.Tensor]`): As for [`~rvedit_diffusers.training.branches.EditingBranches`], with
                tokens and `prompt_embeds`, and nothing dropped.

        Returns:
            `dict[str, torch.Tensor]`: The batch with `sigmas` `(batch,)` at the beginning of a step, and the target,
            `velocity` `(batch, channels, frames, height, width)` in float32.
        """
        levels = self.levels
        starts = levels[: -1 : self.substeps]
        step = (starts[:, None] >= batch["sigmas"]).sum(0).clamp(min=1) - 1  # the last that starts at or above it
        sigmas = levels[self.substeps * step[:, None] + torch.arange(self.substeps + 1, device=levels.device)]
        first = sigmas[:, 0].view(-1, 1, 1, 1, 1)
        latents = start = (1 - first) * batch["latents"] + first * batch["noise"]
        self.transformer.disable_adapters()
        try:
            for now, then in zip(sigmas.unbind(1), sigmas[:, 1:].unbind(1)):
                latents = latents + (then - now).view(-1, 1, 1, 1, 1) * self._velocity(batch, latents, now)
        finally:
            self.transformer.enable_adapters()
        change = (sigmas[:, -1] - sigmas[:, 0]).view(-1, 1, 1, 1, 1)
        return batch | {"sigmas": sigmas[:, 0], "velocity": (latents - start) / change}

    def _velocity(self, batch: dict[str, torch.Tensor], latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """The guided velocity, in float32; both branches of guidance in one call."""
        text = batch["prompt_embeds"]
        condition = {
            "hidden_states": latents,
            "timestep": 1000 * sigmas,
            "encoder_hidden_states": text,
            "edit_hidden_states": batch["edit_tokens"],
            "visual_hidden_states": batch["visual_tokens"],
            "visual_positions": batch["visual_positions"],
            "source_hidden_states": batch["source_latents"],
        }
        if self.guidance_scale == 1:
            return self.transformer(**condition).sample.float()
        null = {
            "encoder_hidden_states": self.null_text.to(text).expand_as(text),
            "edit_hidden_states": torch.zeros_like(batch["edit_tokens"]),
            "visual_hidden_states": torch.zeros_like(batch["visual_tokens"]),
        }
        both = {name: torch.cat([value, null.get(name, value)]) for name, value in condition.items()}
        guided, plain = self.transformer(**both).sample.float().chunk(2)
        return plain + self.guidance_scale * (guided - plain)
