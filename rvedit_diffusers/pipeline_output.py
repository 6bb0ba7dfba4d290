from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class RVEDiTPipelineOutput(BaseOutput):
    """
    Output of [`RVEDiTPipeline`].

    Args:
        frames (`np.ndarray`, `torch.Tensor` or `list[list[PIL.Image.Image]]`):
            The edited clips, `batch * num_videos_per_prompt` of them, by `output_type`:

            - `"np"`: array of shape `(batch, num_frames, height, width, 3)`, float32 in [0, 1];
            - `"pt"`: tensor of shape `(batch, num_frames, 3, height, width)`, float32 in [0, 1];
            - `"pil"`: for each clip its list of `num_frames` RGB images;
            - `"latent"`: tensor of shape `(batch, channels, latent_frames, latent_height, latent_width)`, float32, in
              the normalised space in which the transformer works.
    """

    frames: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]
