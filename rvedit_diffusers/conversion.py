"""From a Wan text-to-video model and a Qwen-VL to the folder of an [`RVEDiTPipeline`], a shard at a time."""

import copy
import fnmatch
import hashlib
import inspect
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig

from .distiller_rvedit import RVEDiTTokenDistiller
from .files import SHARD, open_weights, told_in_a_line
from .processing_rvedit import RVEDiTProcessor
from .transformer_rvedit import RVEDiTTransformer3DModel


SUPPORTED_WAN = (
    "supported are text-to-video models of one transformer in diffusers' layout: Wan-AI/Wan2.1-T2V-1.3B-Diffusers,"
    " Wan-AI/Wan2.1-T2V-14B-Diffusers and Wan-AI/Wan2.2-TI2V-5B-Diffusers"
)
SUPPORTED_MLLM = "supported are Qwen2.5-VL (3B, 7B) and Qwen3-VL (2B, 4B, 8B)"
MLLM_CLASSES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
UNCHANGED = ("tokenizer", "text_encoder", "vae", "scheduler")  # of the Wan pipeline
LICENCES = ("LICENSE*", "NOTICE*")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", *LICENCES)
WEIGHTS = "*.safetensors"
DEFAULT_MAX_AREA = {8: 480 * 832, 16: 704 * 1280}  # what the bases were trained at, by the VAE's spatial factor
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 50, 5.0  # Wan's own
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them
TEXT_PROJECTION = ("1.bias", "2.weight", "2.bias")


@dataclass(frozen=True)
class Parameters:
    """
    What becomes of the parameters of a Wan transformer, each with its shape, by name.

    Args:
        mapped (`dict[str, tuple[int, ...]]`): those that the RVEDiT transformer has, too, under the same name.
        new (`dict[str, tuple[int, ...]]`): those that it has besides.
        dropped (`dict[str, tuple[int, ...]]`): those that it has not.
    """

    mapped: dict[str, tuple[int, ...]]
    new: dict[str, tuple[int, ...]]
    dropped: dict[str, tuple[int, ...]]

    def counts(self) -> dict[str, int]:
        """How many numbers `mapped`, `new` and `dropped` hold."""
        return {name: sum(map(math.prod, shapes.values())) for name, shapes in vars(self).items()}


@dataclass(frozen=True)
class Conversion:
    """
    What is known of a conversion from the configurations alone; see [`plan_conversion`].

    Args:
        wan, mllm (`str`): the two models, Hub ids or folders.
        wan_folder, mllm_folder (`Path`): where their small files are.
        wan_index (`dict`): `model_index.json` of the Wan pipeline.
        wan_config (`dict`), config (`dict`): configurations of its transformer and of the RVEDiT transformer.
        vae_config (`dict`): configuration of the VAE.
        mllm_class (`str`): the MLLM's class in transformers.
        distiller_config (`dict`): configuration of the distiller.
        parameters ([`Parameters`]): of the transformer.
    """

    wan: str
    mllm: str
    wan_folder: Path
    mllm_folder: Path
    wan_index: dict
    wan_config: dict
    config: dict
    vae_config: dict
    mllm_class: str
    distiller_config: dict
    parameters: Parameters


def convert_config(wan_config: dict, num_shallow_blocks: int | None = None) -> dict:
    """
    The configuration of an [`RVEDiTTransformer3DModel`] over a Wan base.

    Args:
        wan_config (`dict`): `config.json` of a [`~diffusers.WanTransformer3DModel`].
        num_shallow_blocks (`int`, *optional*): Blocks that read editing tokens in place of text, from 0 to the number
            of layers; a third of them by default.

    Raises:
        ValueError: The base reads more than noisy latents and text, or `num_shallow_blocks` is out of range.
    """
    name = wan_config.get("_class_name", "WanTransformer3DModel")
    if name != "WanTransformer3DModel":
        raise ValueError(f"`wan` has a {name} as transformer; {SUPPORTED_WAN}")
    known = inspect.signature(WanTransformer3DModel.__init__).parameters
    settings = {name: value.default for name, value in known.items() if name != "self"}
    settings |= {name: value for name, value in wan_config.items() if name[0] != "_"}
    carried = settings.keys() & inspect.signature(RVEDiTTransformer3DModel.__init__).parameters.keys()
    for name in sorted(settings.keys() - carried):
        if settings[name] is not None:
            raise ValueError(f"`wan` is no text-to-video model, its transformer has {name}; {SUPPORTED_WAN}")
    channels = settings["in_channels"]
    if settings["out_channels"] != channels:
        raise ValueError(
            f"`wan` is no text-to-video model, its transformer takes {channels} channels and predicts"
            f" {settings['out_channels']}; {SUPPORTED_WAN}"
        )
    num_layers = settings["num_layers"]
    if num_shallow_blocks is not None and not 0 <= num_shallow_blocks <= num_layers:
        raise ValueError(
            f"`num_shallow_blocks` has to be from 0 to the transformer's {num_layers} layers, got {num_shallow_blocks}"
        )
    config = {name: settings[name] for name in sorted(carried)}
    return config | {"source_channels": channels, "num_shallow_blocks": num_shallow_blocks}


def account_for_parameters(wan_config: dict, config: dict) -> Parameters:
    """
    Compare a Wan transformer with the RVEDiT transformer that is made of it, without their weights.

    Args:
        wan_config, config (`dict`): Configurations of both, see [`convert_config`].

    Raises:
        ValueError: A parameter of both has two shapes.
    """
    with torch.device("meta"):
        base, model = WanTransformer3DModel.from_config(wan_config), RVEDiTTransformer3DModel.from_config(config)
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.state_dict().items()} for part in (base, model)]
    for name in shapes[0].keys() & shapes[1].keys():
        if shapes[0][name] != shapes[1][name]:
            raise ValueError(f"`config` does not fit: {name} has the shape {shapes[1][name]}, not {shapes[0][name]}")
    return Parameters(
        mapped={name: shape for name, shape in shapes[1].items() if name in shapes[0]},
        new={name: shape for name, shape in shapes[1].items() if name not in shapes[0]},
        dropped={name: shape for name, shape in shapes[0].items() if name not in shapes[1]},
    )


def describe_parameters(parameters: Parameters) -> str:
    """A table of [`Parameters`]: tensors and numbers of each part of the model, mapped, new and dropped."""
    rows: dict[str, dict[str, list[int]]] = {}
    for kind, shapes in vars(parameters).items():
        for name, shape in shapes.items():
            words = name.split(".")
            part = f"blocks.*.{words[2]}" if words[0] == "blocks" else words[0]
            rows.setdefault(part, {}).setdefault(kind, []).append(math.prod(shape))
    line = "{:28} {:>8} {:>16} {:>14} {:>10}"
    lines = [line.format("part", "tensors", "mapped", "new", "dropped")]
    for part, kinds in rows.items():
        numbers = (f"{sum(kinds.get(kind, [])):,}" for kind in vars(parameters))
        lines.append(line.format(part, sum(map(len, kinds.values())), *numbers))
    tensors = sum(map(len, vars(parameters).values()))
    lines.append(line.format("all", tensors, *(f"{count:,}" for count in parameters.counts().values())))
    return "\n".join(lines)


def plan_conversion(
    wan: str | os.PathLike,
    mllm: str | os.PathLike,
    num_edit_tokens: int = 64,
    num_shallow_blocks: int | None = None,
) -> Conversion:
    """
    Check from their small files that a Wan model and an MLLM can be converted; no weights are read or downloaded.

    Args:
        wan (`str` or `os.PathLike`): Hub id or folder of a Wan text-to-video pipeline in diffusers' layout.
        mllm (`str` or `os.PathLike`): Hub id or folder of a Qwen2.5-VL or Qwen3-VL.
        num_edit_tokens (`int`, defaults to 64): Queries of the distiller, at least 1.
        num_shallow_blocks (`int`, *optional*): See [`convert_config`].

    Raises:
        ValueError: Naming the argument; for a model that is not supported it says which ones are.
    """
    if not isinstance(num_edit_tokens, int) or isinstance(num_edit_tokens, bool) or num_edit_tokens < 1:
        raise ValueError(f"`num_edit_tokens` has to be an integer of at least 1, got {num_edit_tokens!r}")
    wan, mllm = os.fspath(wan), os.fspath(mllm)

    # 1. The Wan pipeline
    wan_folder = _fetch("wan", wan, SMALL_FILES)
    if not (wan_folder / "model_index.json").is_file():
        raise ValueError(f"`wan` {wan} has no model_index.json, so it is not in diffusers' layout; {SUPPORTED_WAN}")
    index = _read_json(wan_folder / "model_index.json")
    name = index.get("_class_name")
    if name != "WanPipeline":
        raise ValueError(f"`wan` {wan} is a {name}, not a WanPipeline; {SUPPORTED_WAN}")
    if index.get("boundary_ratio") is not None or (index.get("transformer_2") or [None, None])[0] is not None:
        raise ValueError(f"`wan` {wan} has two transformers, for high and for low noise, as A14B has; {SUPPORTED_WAN}")
    for name in ("transformer", *UNCHANGED):
        if index.get(name, [None])[0] is None or not (wan_folder / name).is_dir():
            raise ValueError(f"`wan` {wan} has no component {name}; {SUPPORTED_WAN}")
    wan_config = _read_json(wan_folder / "transformer" / "config.json")
    config = convert_config(wan_config, num_shallow_blocks)
    vae_config = _read_json(wan_folder / "vae" / "config.json")
    if vae_config.get("z_dim", 16) != config["in_channels"]:
        raise ValueError(
            f"`wan` {wan} has a VAE of {vae_config.get('z_dim', 16)} channels, but a transformer of"
            f" {config['in_channels']}; {SUPPORTED_WAN}"
        )

    # 2. The MLLM
    mllm_folder = _fetch("mllm", mllm, SMALL_FILES)
    if not (mllm_folder / "config.json").is_file():
        raise ValueError(f"`mllm` {mllm} has no config.json; {SUPPORTED_MLLM}")
    model_type = _read_json(mllm_folder / "config.json").get("model_type")
    if model_type not in MLLM_CLASSES:
        raise ValueError(f"`mllm` {mllm} is of the type {model_type}; {SUPPORTED_MLLM}")
    try:
        RVEDiTProcessor.from_mllm(mllm_folder, num_edit_tokens=num_edit_tokens)
    except (OSError, ValueError) as error:
        raise ValueError(f"`mllm` {mllm} has no processor that can be read: {told_in_a_line(error)}") from error
    width = AutoConfig.from_pretrained(mllm_folder).get_text_config().hidden_size
    dim = config["num_attention_heads"] * config["attention_head_dim"]

    return Conversion(
        wan=wan,
        mllm=mllm,
        wan_folder=wan_folder,
        mllm_folder=mllm_folder,
        wan_index=index,
        wan_config=wan_config,
        config=config,
        vae_config=vae_config,
        mllm_class=MLLM_CLASSES[model_type],
        distiller_config={"mllm_hidden_size": width, "dim": dim, "num_edit_tokens": num_edit_tokens},
        parameters=account_for_parameters(wan_config, config),
    )


def convert_transformer(
    source: str | os.PathLike,
    target: str | os.PathLike,
    config: dict,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    seed: int = 0,
) -> None:
    """
    Write an [`RVEDiTTransformer3DModel`] of the weights of a Wan transformer. No more than a shard is in memory.

    What is new computes nothing at first: the source's embedding and the values of visual tokens are zero, and the
    editing tokens' bias is what the base makes of a zero of its text, the padding of every prompt.

    Args:
        source (`str` or `os.PathLike`): Folder of a [`~diffusers.WanTransformer3DModel`] in safetensors.
        target (`str` or `os.PathLike`): Folder to write to; made if it does not exist.
        config (`dict`): What [`convert_config`] returned.
        dtype (`torch.dtype`, *optional*): Of the weights, but for those that the model keeps in float32. By default
            each keeps its own, and what is new has that of the source's `patch_embedding`.
        max_shard_size (`str` or `int`, defaults to `"5GB"`): Of a file.
        seed (`int`, defaults to 0): Of the new keys' projections.

    Raises:
        ValueError: `source` lacks weights of the base, or has others; or the disk is too small.
    """
    source, target = Path(source), Path(target)
    with torch.device("meta"):
        model = RVEDiTTransformer3DModel.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with ExitStack() as stack:
        weights = {}
        for path in _weight_files(source):
            file = stack.enter_context(open_weights(path))
            weights |= {name: (file.get_tensor, file.get_slice(name)) for name in file.keys()}

        # 1. Nothing is missing, left over, of another shape or of a format that cannot be read
        new = _new_parameters(model)
        for name, (_, part) in weights.items():
            if part.get_dtype() not in DTYPES:
                raise ValueError(
                    f"`source` {source} has to hold weights of {', '.join(DTYPES)}, but {name} is {part.get_dtype()}"
                )
        wrong = [name for name, (_, part) in weights.items() if shapes.get(name) != tuple(part.get_shape())]
        wrong += shapes.keys() - weights.keys() - new
        if wrong:
            raise ValueError(
                f"`source` {source} does not hold the weights that its config.json describes: {len(wrong)} of them"
                f" are missing, left over or of another shape, such as {min(wrong)}"
            )

        # 2. What is new has the dtype of the first layer
        own = weights["patch_embedding.weight"][1].get_dtype()
        dtypes = dict.fromkeys(new, DTYPES[own])
        dtypes |= {name: DTYPES[part.get_dtype()] for name, (_, part) in weights.items()}
        if dtype is not None:
            kept = set(RVEDiTTransformer3DModel._keep_in_fp32_modules)
            dtypes = {name: torch.float32 if kept & set(name.split(".")) else dtype for name in dtypes}

        def value(name: str) -> torch.Tensor:
            if name not in new:
                return weights[name][0](name)
            if name != "edit_bias":
                return _initialise(model, name, seed)
            projection = "condition_embedder.text_embedder.linear_"
            read = {part: weights[projection + part][0](projection + part).float() for part in TEXT_PROJECTION}
            hidden = F.gelu(read["1.bias"], approximate="tanh")
            return F.linear(hidden, read["2.weight"], read["2.bias"])

        # 3. All of it, shard by shard
        target.mkdir(parents=True, exist_ok=True)
        _check_space(sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()), target)
        plan = split_torch_state_dict_into_shards(
            {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()},
            filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        for filename, names in tqdm(plan.filename_to_tensors.items(), desc="transformer", unit="shard"):
            shard = {name: value(name).to(dtypes[name]).contiguous() for name in names}
            save_file(shard, target / filename, metadata={"format": "pt"})
            del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(target / "diffusion_pytorch_model.safetensors.index.json", index)
    model.save_config(target)


def convert(
    conversion: Conversion,
    output: str | os.PathLike,
    dtype: torch.dtype | None = None,
    link: bool = False,
    max_shard_size: str | int = "5GB",
    seed: int = 0,
) -> None:
    """
    Write the pipeline. Downloads the weights of models on the Hub, component by component.

    What is not changed, all but the transformer, the distiller and the processor, is copied as it is. The entry
    `conversion` of `model_index.json` records where everything came from.

    Args:
        conversion ([`Conversion`]): What [`plan_conversion`] returned.
        output (`str` or `os.PathLike`): The pipeline's folder; must not exist, or be empty. It appears when it is
            complete.
        dtype (`torch.dtype`, *optional*): Of transformer and distiller; see [`convert_transformer`].
        link (`bool`, defaults to `False`): Link to the weights of unchanged components instead of copying them. The
            pipeline then needs the base models where they are.
        max_shard_size (`str` or `int`, defaults to `"5GB"`): Of the transformer's files.
        seed (`int`, defaults to 0): Of what begins at random: the queries, the connectors, the new keys.

    Raises:
        ValueError: `output` is taken, a component has no safetensors, or the disk is too small.
        OSError: A file cannot be read or written.
    """
    # 1. What can be known before anything is downloaded or written
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output` has to be a folder that does not exist or is empty, but {output} is taken")
    if os.path.ismount(output):  # which no other folder can take the place of
        raise ValueError(f"`output` has to be a folder inside of {output}, which is a mount point")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"`seed` has to be an integer from 0 to 2**63 - 1, got {seed!r}")
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(
            f"`max_shard_size` has to be a size such as '5GB', got {max_shard_size!r}: {error}"
        ) from error
    known = []  # weights that need no download
    if Path(conversion.wan).is_dir():
        known += [(name, _weight_files(Path(conversion.wan, name))) for name in ("transformer", "text_encoder", "vae")]
    if Path(conversion.mllm).is_dir():
        known += [("mllm", _weight_files(Path(conversion.mllm)))]
    for _, files in known:
        _check_weights(files)

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        counts = conversion.parameters.counts()
        least = dtype or torch.float16  # before anything is downloaded; what its own dtypes take is known after that
        size = (counts["mapped"] + counts["new"]) * least.itemsize
        if not link:
            size += sum(path.stat().st_size for name, files in known if name != "transformer" for path in files)
        _check_space(size, partial)

        # 2. The parts that are made
        folder = _fetch_weights("wan", conversion.wan, conversion.wan_folder, "transformer/")
        arguments = (conversion.config, dtype, max_shard_size, seed)
        convert_transformer(folder / "transformer", partial / "transformer", *arguments)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            distiller = RVEDiTTokenDistiller(**conversion.distiller_config)
        torch.nn.Module.to(distiller, dtype or torch.float32)  # diffusers' own warns of modules kept in float32: none
        distiller.save_pretrained(partial / "distiller")
        del distiller
        num_edit_tokens = conversion.distiller_config["num_edit_tokens"]
        processor = RVEDiTProcessor.from_mllm(conversion.mllm_folder, num_edit_tokens=num_edit_tokens)
        processor.save_pretrained(partial / "processor")

        # 3. The parts that stay as they are
        for name in UNCHANGED:
            folder = _fetch_weights("wan", conversion.wan, conversion.wan_folder, f"{name}/")
            files = _unchanged_files(folder / name, is_model=name in ("text_encoder", "vae"))
            _carry_over(files, partial / name, link)
        _carry_over(_unchanged_files(conversion.wan_folder, False, LICENCES), partial / "transformer", False)
        folder = _fetch_weights("mllm", conversion.mllm, conversion.mllm_folder)
        only = ("config.json", "generation_config.json", *LICENCES)
        _carry_over(_unchanged_files(folder, True, only), partial / "mllm", link)

        # 4. What they are together
        record = {
            "wan": _origin(conversion.wan, conversion.wan_folder),
            "mllm": _origin(conversion.mllm, conversion.mllm_folder),
            "parameters": counts,
        }
        _write_json(partial / "model_index.json", _model_index(conversion) | {"conversion": record})
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def record_stage(folder: str | os.PathLike, stage: str) -> None:
    """
    Add a stage of training to what `model_index.json` tells of a conversion; any other folder stays as it is.

    Args:
        folder (`str` or `os.PathLike`): Of the pipeline.
        stage (`str`): Name of the stage.
    """
    path = Path(folder) / "model_index.json"
    index = _read_json(path) if path.is_file() else {}
    if index.get("conversion") is not None:
        record = index["conversion"]
        partial = path.with_name(path.name + ".partial")
        _write_json(partial, index | {"conversion": record | {"stages": [*record.get("stages", []), stage]}})
        partial.replace(path)


def _model_index(conversion: Conversion) -> dict:
    own = "rvedit_diffusers"
    index = {name: conversion.wan_index[name] for name in UNCHANGED}
    index |= {
        "_class_name": "RVEDiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "default_guidance_scale": GUIDANCE_SCALE,
        "default_keep_detail": None,
        "default_max_area": DEFAULT_MAX_AREA.get(conversion.vae_config.get("scale_factor_spatial", 8)),
        "default_num_inference_steps": NUM_INFERENCE_STEPS,
        "default_source_guidance_scale": 1.0,
        "distiller": [own, "RVEDiTTokenDistiller"],
        "mllm": ["transformers", conversion.mllm_class],
        "processor": [own, "RVEDiTProcessor"],
        "transformer": [own, "RVEDiTTransformer3DModel"],
    }
    return dict(sorted(index.items()))


def _fetch(argument: str, model: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    # The folder of a model: the one that was named, or the Hub's snapshot with the files that fit the patterns.
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the network, the Hub and its client fail in many ways
        reason = told_in_a_line(error)
        raise ValueError(f"`{argument}` {model} is no folder, and from the Hub it cannot be had: {reason}") from error


def _fetch_weights(argument: str, model: str, folder: Path, inside: str = "") -> Path:
    # At the commit of the configurations that were planned with, whatever has been pushed since.
    return _fetch(argument, model, [inside + pattern for pattern in (*SMALL_FILES, WEIGHTS)], revision=folder.name)


def _origin(model: str, folder: Path) -> dict:
    # The cache names a snapshot by its repository and commit. Of any other folder the name has to do: where it lies is
    # nobody's business.
    snapshot = re.search(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$", folder.absolute().as_posix())
    if snapshot is None:
        return {"source": model if not Path(model).is_dir() else folder.resolve().name, "revision": None}
    return {"source": f"{snapshot[1]}/{snapshot[2]}", "revision": snapshot[3]}


def _index_file(folder: Path) -> Path | None:
    # That of the weights themselves: one of a variant has the variant's name in it.
    return next((path for path in folder.glob("*.safetensors.index.json") if path.name.count(".") == 3), None)


def _weight_files(folder: Path) -> list[Path]:
    if (index := _index_file(folder)) is not None:
        files = sorted({folder / name for name in _read_json(index)["weight_map"].values()})
    else:
        files = [path for path in sorted(folder.glob(WEIGHTS)) if path.name.count(".") == 1]
    if not files:
        variants = [path.name for path in sorted(folder.glob(WEIGHTS))]
        found = f": {variants[0]} is of a variant" if variants else ", the only format that is read"
        raise ValueError(f"{folder} holds no weights in safetensors{found}")
    if shard := next((path for path in files if SHARD.search(path.name) and _index_file(folder) is None), None):
        raise ValueError(f"{folder} is not complete: it has {shard.name}, but not the index of such files")
    for path in files:
        if not path.is_file():
            raise ValueError(f"{folder} is not complete: its index names {path.name}, which is not there")
    return files


def _check_weights(files: list[Path]) -> None:
    for path in files:
        if path.suffix == ".safetensors":
            with open_weights(path):
                pass


def _unchanged_files(folder: Path, is_model: bool, patterns: Iterable[str] = SMALL_FILES) -> list[Path]:
    files = {path for path in folder.iterdir() if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)}
    if is_model:
        files = {path for path in files if ".safetensors" not in path.name}  # variants stay behind
        files |= {*_weight_files(folder), _index_file(folder)} - {None}
    return sorted(files)


def _carry_over(files: list[Path], target: Path, link: bool) -> None:
    target.mkdir(exist_ok=True)
    _check_weights(files)
    size = 0 if link else sum(path.stat().st_size for path in files)
    _check_space(size, target)
    for path in tqdm(files, desc=target.name, unit="file"):
        if (
            link and path.suffix == ".safetensors"
        ):  # saving changes configurations where they lie, and replaces weights
            (target / path.name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, target / path.name)


def _check_space(size: int, folder: Path) -> None:
    if size > (free := shutil.disk_usage(folder).free):
        raise ValueError(
            f"`output` needs {size / 2**30:.1f} GiB for {folder.name.removesuffix('.partial')}, but"
            f" {free / 2**30:.1f} GiB are free there"
        )


def _new_parameters(model: RVEDiTTransformer3DModel) -> set[str]:
    return {
        name
        for name in model.state_dict()
        if name.split(".")[0] in ("source_embedding", "edit_bias")
        or set(name.split(".")) & {"add_k_proj", "add_v_proj", "norm_added_k"}
    }


def _initialise(model: RVEDiTTransformer3DModel, name: str, seed: int) -> torch.Tensor:
    # As the model's own constructor does, but for one layer, from a seed of its own: the others are not in memory.
    path, _, attribute = name.rpartition(".")
    layer = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {path}".encode()).digest()[:7], "big"))
        layer.reset_parameters()
        if path.split(".")[-1] in ("source_embedding", "add_v_proj"):
            for parameter in layer.parameters():
                parameter.zero_()
    return getattr(layer, attribute).detach()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
