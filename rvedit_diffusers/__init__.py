"""RVEDiT: instruction-based video editing in diffusers. Importing the package registers its classes with diffusers."""

from pathlib import Path

from .distiller_rvedit import RVEDiTTokenDistiller, RVEDiTTokenDistillerOutput
from .lora import RVEDiTLoraLoaderMixin
from .pipeline_output import RVEDiTPipelineOutput
from .pipeline_rvedit import RVEDiTPipeline
from .processing_rvedit import RVEDiTProcessor
from .registration import register
from .transformer_rvedit import RVEDiTTransformer3DModel, RVEDiTTransformer3DModelOutput
from .video import Video, read_video, write_video


TINY_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "tiny")
"""Folder of the embedded checkpoint, a small trained pipeline: `RVEDiTPipeline.from_pretrained(TINY_CHECKPOINT)`."""

__all__ = [
    "TINY_CHECKPOINT",
    "RVEDiTLoraLoaderMixin",
    "RVEDiTPipeline",
    "RVEDiTPipelineOutput",
    "RVEDiTProcessor",
    "RVEDiTTokenDistiller",
    "RVEDiTTokenDistillerOutput",
    "RVEDiTTransformer3DModel",
    "RVEDiTTransformer3DModelOutput",
    "Video",
    "read_video",
    "write_video",
]

register()
