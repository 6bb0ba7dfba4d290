"""
Makes diffusers know this package, so that `DiffusionPipeline.from_pretrained` loads an RVEDiT pipeline and diffusers'
hooks accept its blocks. Besides lora.py, only this file may touch what diffusers keeps private (diffusers 0.42.1).
"""

import sys

import diffusers
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry  # hooks/_helpers.py:20, :81
from diffusers.pipelines import pipeline_loading_utils

from .distiller_rvedit import RVEDiTTokenDistiller
from .pipeline_rvedit import RVEDiTPipeline
from .processing_rvedit import RVEDiTProcessor
from .transformer_rvedit import RVEDiTTransformer3DModel, RVEDiTTransformerBlock


def register() -> None:
    """Enter the classes in diffusers' tables. Called once, when the package is imported; again is harmless."""
    package_name = __name__.rpartition(".")[0]
    components = (RVEDiTTransformer3DModel, RVEDiTTokenDistiller, RVEDiTProcessor)

    # 1. Classes are looked up by name: the pipeline as `diffusers.<_class_name>` (pipeline_loading_utils.py:552, the
    # one way in for DiffusionPipeline.from_pretrained), its source in `diffusers.pipelines`
    # (source_code_parsing_utils.py:47).
    for cls in (*components[:2], RVEDiTPipeline):
        setattr(diffusers, cls.__name__, cls)
    diffusers.pipelines.RVEDiTPipeline = RVEDiTPipeline

    # 2. How components are saved and loaded (pipeline_loading_utils.py:71, :92). With the entry, model_index.json
    # names ["rvedit_diffusers", class]; without it the dotted module path, which a Hub download rejects.
    methods = {cls.__name__: ["save_pretrained", "from_pretrained"] for cls in components}
    pipeline_loading_utils.LOADABLE_CLASSES[package_name] = methods
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(methods)

    # 3. A repository that also carries its own code, `transformer/rvedit_diffusers.py`, then loads these classes
    # instead and needs no `trust_remote_code` (pipeline_loading_utils.py:449).
    setattr(diffusers.pipelines, package_name, sys.modules[package_name])

    # 4. The first-block cache and its kin accept registered blocks only. The block returns its hidden states alone, or
    # first (hooks/_helpers.py:343, as Wan's).
    TransformerBlockRegistry.register(
        RVEDiTTransformerBlock,
        TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
    )
