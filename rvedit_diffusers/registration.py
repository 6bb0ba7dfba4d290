"""
Makes diffusers know this package, so that `DiffusionPipeline.from_pretrained` loads an RVEDiT pipeline and diffusers'
hooks accept its blocks. Besides lora.py, only this file may touch what diffusers keeps private (diffusers 0.42.1).
"""

import sys

import diffusers
from diffusers.configuration_utils import ConfigMixin
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry  # hooks/_helpers.py:20, :81
from diffusers.pipelines import pipeline_loading_utils

from .distiller_rvedit import RVEDiTTokenDistiller
from .hub import PIPELINE_CLASS, is_pipeline
from .pipeline_rvedit import RVEDiTPipeline
from .processing_rvedit import RVEDiTProcessor
from .transformer_rvedit import RVEDiTTransformer3DModel, RVEDiTTransformerBlock


def register_blocks() -> None:
    """Make the first-block cache and its kin, which accept registered blocks only, accept the transformer's."""
    # The block returns its hidden states alone, or first (hooks/_helpers.py:343, as Wan's).
    TransformerBlockRegistry.register(
        RVEDiTTransformerBlock,
        TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
    )


def _read_config(cls, json_file) -> dict:
    config = ConfigMixin._dict_from_json_file.__func__(cls, json_file)
    return config | {"_class_name": PIPELINE_CLASS} if is_pipeline(config) else config


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

    # 4. Such a repository names its pipeline as ["pipeline", class] (hub.py): for diffusers, code that runs with the
    # flag and fails without (configuration_utils.py:465, :584, pipeline_utils.py:1663, :1691). But the class is here.
    diffusers.DiffusionPipeline._dict_from_json_file = classmethod(_read_config)

    # 5. Caches
    register_blocks()
