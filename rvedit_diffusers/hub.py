"""
To the Hub: what is checked before an upload, the upload, and code that goes along so that a machine without this
package loads the pipeline, too.
"""

import ast
import builtins
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .files import SHARD, forget_names, open_weights, told_in_a_line
from .model_card import ensure_model_card, is_as_written, is_of_ours


PIPELINE_CLASS = "RVEDiTPipeline"
CODE_COMPONENTS = ("distiller", "processor", "transformer")  # whose classes are not diffusers' or transformers'
LORA_FILE = "pytorch_lora_weights.safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")

# The bundle is one module, so that its pipeline and its components share their classes and nothing has to be carried
# along but this text. diffusers looks for a component's class in a file of the component's folder, and has by then
# run the repository's pipeline.py under this name.
COMPONENT_CODE = (
    '"""The class of this component is in the repository\'s pipeline.py, which diffusers has run by now."""\n\n'
    "from diffusers_modules.local.pipeline import RVEDiTProcessor, RVEDiTTokenDistiller, RVEDiTTransformer3DModel\n"
)

# The text of the bundle that this is part of; `None` in the package. It is read while the file is being run: diffusers
# puts the code of the next repository in its place.
CODE = Path(__file__).read_text(encoding="utf-8") if __name__.startswith(DIFFUSERS_DYNAMIC_MODULE_NAME) else None


def write_code(folder: str | Path, code: str) -> None:
    """
    Make the folder of a pipeline load with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` where
    this package is not installed. Where it is, and has been imported, the folder loads as before.

    Args:
        folder (`str` or `Path`): As `save_pretrained` writes it; `model_index.json` is changed.
        code (`str`): What [`bundle`] returns.
    """
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = ["pipeline", PIPELINE_CLASS]
    for name in CODE_COMPONENTS:
        if name in index and index[name][1] is not None:
            index[name] = ["rvedit_diffusers", index[name][1]]
            (folder / name / "rvedit_diffusers.py").write_text(COMPONENT_CODE, encoding="utf-8")
    (folder / "pipeline.py").write_text(code, encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def remove_code(folder: str | Path) -> None:
    """Remove what [`write_code`] wrote beside the `model_index.json` of an earlier save, which names it no more."""
    for name in CODE_COMPONENTS:
        path = Path(folder) / name / "rvedit_diffusers.py"
        if path.is_file() and path.read_text(encoding="utf-8") == COMPONENT_CODE:
            path.unlink()
    path = Path(folder) / "pipeline.py"
    if path.is_file() and path.read_text(encoding="utf-8").startswith(BUNDLE_HEADER):
        path.unlink()


BUNDLE_HEADER = '''"""
RVEDiTPipeline in one file: DiffusionPipeline.from_pretrained(REPOSITORY, trust_remote_code=True)

Made from the modules of the package rvedit_diffusers, by its hub.py. Where that is installed and imported, its own
classes are used instead. Besides diffusers and transformers this needs accelerate, ftfy, imageio-ffmpeg, peft and
torchvision. Licence: Apache-2.0.
"""'''


# How a module reads a text file that lies beside it. One file has nothing beside it, and holds the text itself.
READS_FILE = re.compile(r'Path\(__file__\)\.with_name\("([\w.]+)"\)\.read_text\(encoding="utf-8"\)')


@dataclass
class _Module:
    """What a file of the package binds at its top level."""

    imports: dict[str, tuple[str, list[str]]]  # name -> what it stands for, and the statements that bind it
    relatives: dict[str, tuple[str, str]]  # name -> module of the package, and the name there
    definitions: dict[str, tuple[int, str, set[str]]]  # name -> last line, source, and the names that it uses
    future: list[str]  # statements that change how the whole file is read


def _read_module(path: Path) -> _Module:
    text = path.read_text(encoding="utf-8")
    lines, end = text.splitlines(keepends=True), 0
    module = _Module({}, {}, {}, [])
    for node in ast.parse(text).body:
        source, end = "".join(lines[end : node.end_lineno]), node.end_lineno  # with the comments above it
        source = READS_FILE.sub(lambda found: _literal(path.with_name(found[1]).read_text(encoding="utf-8")), source)
        is_relative = [isinstance(part, ast.ImportFrom) and part.level > 0 for part in ast.walk(node)]
        if isinstance(node, ast.Import):
            for alias in node.names:
                statement = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                package = alias.name.split(".")[0]
                origin = statement if alias.asname else f"import {package}"
                module.imports.setdefault(alias.asname or package, (origin, []))[1].append(statement)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                statement = f"from {node.module} import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                module.imports[alias.asname or alias.name] = (statement, [statement])
                if node.module == "__future__":
                    module.future.append(statement)
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and "." not in node.module:
            for alias in node.names:
                module.relatives[alias.asname or alias.name] = (node.module, alias.name)
                if alias.asname:
                    raise ValueError(f"{path.name}, line {node.lineno}: a relative import cannot be renamed.")
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)) and not any(is_relative):
            parts = list(ast.walk(node))
            used = {part.id for part in parts if isinstance(part, ast.Name)}
            # Annotations that stand in quotes are names, too.
            used |= {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                bound = [node.name]
            else:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                bound = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            for name in bound:
                if name in module.definitions:
                    raise ValueError(f"{path.name}, line {node.lineno}: {name} is defined twice.")
                module.definitions[name] = (node.end_lineno, source, used)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            raise ValueError(f"{path.name}, line {node.lineno}: such a statement cannot be bundled.")
    return module


def _literal(text: str) -> str:
    # A literal a line: diffusers takes lines that begin with "import" for imports, wherever they stand.
    return "(\n" + "".join(f"    {line!r}\n" for line in text.splitlines(keepends=True)) + ")"


def bundle(package: Path = Path(__file__).parent) -> str:
    """
    The pipeline, its components and all that they use of this package as the text of one module.

    What is imported relatively is inlined, from the modules themselves, as are text files that they read; other
    imports are put on top, once. What is not used stays out.

    Args:
        package (`Path`, defaults to this package's folder): Has `pipeline_rvedit.py` and `registration.py`.

    Returns:
        `str`: Python source without relative imports.

    Raises:
        `ValueError`: if a name stands for two things in two modules, or a module has a statement at its top level, or
            a relative import below it, that cannot be moved.
    """
    # 1. Modules, each behind those that it imports
    modules, order = {}, []

    def read(name: str) -> None:
        if name not in modules:
            modules[name] = _read_module(package / f"{name}.py")
            for needed, _ in modules[name].relatives.values():
                read(needed)
            order.append(name)

    # 2. What the pipeline and the registration of its blocks reach
    pending = [("pipeline_rvedit", PIPELINE_CLASS), ("registration", "register_blocks")]
    for name, _ in pending:
        read(name)
    seen, origins, chunks = set(), {}, {}
    imports = {line for module in modules.values() for line in module.future}
    while pending:
        module, name = found = pending.pop()
        if found in seen:
            continue
        seen.add(found)
        if name in modules[module].relatives:
            pending.append(modules[module].relatives[name])
            continue
        if name in modules[module].imports:
            origin, statements = modules[module].imports[name]
            imports.update(statements)
        elif name in modules[module].definitions:
            line, source, used = modules[module].definitions[name]
            origin, chunks[order.index(module), line] = found, source
            pending += [(module, other) for other in used]
        else:
            continue  # a name of Python's own, or of a function's
        first, known = origins.setdefault(name, (module, origin))
        if known != origin or hasattr(builtins, name):
            other = "Python" if hasattr(builtins, name) else f"{first}.py"
            raise ValueError(f"{name} is another thing in {module}.py than in {other}: one file cannot have both.")

    # 3. One module of it
    future = sorted(line for line in imports if line.startswith("from __future__"))
    plain = sorted(line for line in imports if line.startswith("import "))
    named = {}
    for line in sorted(imports - {*future, *plain}, key=str.lower):
        source, _, name = line.partition(" import ")
        named.setdefault(source, []).append(name)
    named = [f"{source} import {', '.join(names)}" for source, names in named.items()]
    parts = [BUNDLE_HEADER, "\n".join(future), "\n".join(plain + named)]
    for number, name in enumerate(order):
        if sources := [source for (module, _), source in sorted(chunks.items()) if module == number]:
            parts.append(f"\n# {name}.py\n\n" + "".join(sources).strip("\n"))
    return "\n\n".join(part for part in parts if part) + "\n\n\nregister_blocks()\n"


def _files(folder: Path, inside: tuple[Path, ...] = ()) -> Iterator[Path]:
    # Follows links, other than Path.rglob. Hidden files are of version control, of caches and of the desktop.
    inside += (folder.resolve(),)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if not path.exists():
            raise ValueError(f"{path} links to {os.readlink(path)}, which does not exist.")
        if not path.is_dir():
            yield path
        elif path.resolve() in inside:
            raise ValueError(f"{path} links to a folder that it is in.")
        else:
            yield from _files(path, inside)


def is_pipeline(index: dict) -> bool:
    """Whether the contents of a `model_index.json` are those of an [`RVEDiTPipeline`], with its code or without."""
    return index.get("_class_name") in (PIPELINE_CLASS, ["pipeline", PIPELINE_CLASS])


def check_folder(folder: str | Path) -> str:
    """
    Whether a folder can be uploaded: all of its files can be read, and no component is missing.

    Args:
        folder (`str` or `Path`): Of a pipeline, or of LoRA weights. Links are followed; hidden files do not count.

    Returns:
        `str`: `"pipeline"` or `"lora"`.

    Raises:
        `ValueError`: naming the file or the component's folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} has to be a folder.")
    files = list(_files(folder))
    if pickles := [path for path in files if path.suffix in PICKLES]:
        raise ValueError(f"{pickles[0]} is a pickle, which can run code when it is loaded: only safetensors go along.")
    for path in files:
        if path.suffix == ".safetensors":
            with open_weights(path):
                pass
        elif ".safetensors.index." in path.name:
            shards = set(_read_json(path).get("weight_map", {}).values())
            if missing := sorted(shard for shard in shards if not (path.parent / shard).is_file()):
                raise ValueError(f"{path.parent / missing[0]} is missing, which {path.name} names.")
    indices = {(path.parent, _weights_family(path.name)) for path in files if ".safetensors.index." in path.name}
    for path in files:
        if SHARD.search(path.name) and (path.parent, _weights_family(path.name)) not in indices:
            raise ValueError(f"{path} is a part of weights, but the index that names their parts is missing.")
    if not (folder / "model_index.json").is_file():
        if not (folder / LORA_FILE).is_file():
            raise ValueError(f"{folder} has to hold model_index.json, of a pipeline, or {LORA_FILE}.")
        return "lora"
    index = _read_json(folder / "model_index.json")
    if not is_pipeline(index):
        raise ValueError(f"{folder / 'model_index.json'} has to be of an {PIPELINE_CLASS}.")
    if isinstance(index["_class_name"], list):
        places = [folder / name / "rvedit_diffusers.py" for name in CODE_COMPONENTS if index.get(name, [None])[-1]]
        if missing := [path for path in (folder / "pipeline.py", *places) if not path.is_file()]:
            raise ValueError(f"{missing[0]} is missing, but model_index.json says that the code goes along.")
    for name, value in index.items():
        if name == "_class_name" or not isinstance(value, list) or value[0] is None:
            continue
        inside = [path.name for path in (folder / name).iterdir()] if (folder / name).is_dir() else []
        if not inside:
            raise ValueError(f"{folder / name} is missing or empty, but model_index.json names that component.")
        # Of the components, models alone have a config.json.
        if "config.json" in inside and not any(file.endswith(".safetensors") for file in inside):
            raise ValueError(f"{folder / name} has no weights: a file {name}/*.safetensors is missing.")
    return "pipeline"


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} has to hold a JSON object.")
    return value


def export_folder(
    folder: str | Path,
    output: str | Path,
    remote_code: bool = False,
    model_id: str | None = None,
    card: str | None = None,
    link: bool = False,
) -> None:
    """
    Write what an upload of `folder` sends: its files, with links replaced by what they lead to, and a model card.

    Args:
        folder (`str` or `Path`): Of a pipeline or of LoRA weights; it is left as it is. See [`check_folder`].
        output (`str` or `Path`): The folder to write. It appears when it is complete.
        remote_code (`bool`, defaults to `False`): Whether the pipeline's code goes along, see [`write_code`].
        model_id (`str`, *optional*): The name on the Hub to be, for the model card.
        card (`str`, *optional*): The `README.md` of the repository, see [`write_card`].
        link (`bool`, defaults to `False`): Whether to link to the weights instead of copying them, where that can be.

    Raises:
        `ValueError`: if `folder` cannot be uploaded, `output` exists or lies in `folder`, or code is to go along with
            LoRA weights.
    """
    folder, output = Path(folder), Path(output)
    kind = check_folder(folder)
    if remote_code and kind == "lora":
        raise ValueError(f"`remote_code` is for pipelines, but {folder} holds LoRA weights.")
    if os.path.lexists(output):
        raise ValueError(f"`output` has to be a folder that does not exist, but there is {output}.")
    if folder.resolve() in output.resolve().parents:
        raise ValueError(f"`output` has to be outside of {folder}, got {output}.")

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for path in _files(folder):
            target = partial / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (link and path.suffix == ".safetensors" and _is_linked(target, path)):
                shutil.copyfile(path, target)
        forget_names(partial)
        if remote_code:
            write_code(partial, bundle())
        try:
            write_card(partial, model_id, card)
        except ValueError as error:
            place = folder if (folder / "README.md").is_file() else model_id
            raise ValueError(str(error).replace(str(partial), str(place))) from error
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_linked(link: Path, path: Path) -> bool:
    # Not every system lets its users make links.
    try:
        link.symlink_to(path.resolve())
    except OSError:
        return False
    return True


def write_card(folder: Path, model_id: str | None = None, card: str | None = None) -> None:
    """
    Give a folder that is to be uploaded a model card; one with our metadata stays as it is.

    Args:
        folder (`Path`): Of a pipeline or of LoRA weights.
        model_id (`str`, *optional*): The name on the Hub to be.
        card (`str`, *optional*): The `README.md` of the repository. One that somebody has written or changed goes on,
            unless that is true of the folder's, too. One as we wrote it does not: it may tell of an earlier state.
    """
    path = folder / "README.md"
    if card is not None and not is_as_written(card):
        if not path.is_file() or is_as_written(path.read_text(encoding="utf-8-sig")):
            path.write_text(card, encoding="utf-8")
    ensure_model_card(folder, model_id)


@dataclass(frozen=True)
class Repository:
    """
    A repository to upload to; see [`open_repository`].

    Args:
        repo_id (`str`): Its full name, `owner/name`.
        files (`tuple[str, ...]`): Paths of the files that it has.
        card (`str`, *optional*): Its `README.md`.
    """

    repo_id: str
    files: tuple[str, ...] = ()
    card: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it holds no more than the Hub itself puts into a new repository."""
        return set(self.files) <= {".gitattributes", "README.md"}


@contextmanager
def _told(api: HfApi, repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the way there, told in one line."""
    try:
        yield
    except Exception as error:  # of the client, of its transfer library and of the network: many, and they change
        cause, causes = error, []
        while cause is not None:
            causes.append(cause)
            cause = cause.__cause__
        answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        if isinstance(causes[-1], OSError) and causes[-1].filename is not None:
            raise  # of this machine's disk
        reason = told_in_a_line(answer or causes[-1])
        status = None if answer is None else answer.response.status_code
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            raise PermissionError(
                f"{api.endpoint} does not let this token write to {repo_id}: {reason} If it is not the right one, log"
                f" in with `hf auth login`, or set HF_TOKEN, as someone who may write there."
            ) from error
        if (
            isinstance(error, ValueError) and error is not answer
        ):  # the client's own words, of README.md's metadata say
            raise ValueError(f"{repo_id}: {' '.join(str(error).split())}") from error
        if status is not None and status < 500:
            raise ValueError(f"{api.endpoint} refused the request for {repo_id}: {reason}") from error
        raise ConnectionError(
            f"{api.endpoint} cannot be reached, or the connection was lost ({reason}): what was uploaded is kept, and"
            f" the same command goes on from there."
        ) from error


def open_repository(
    repo_id: str, kind: str | None, private: bool | None = None, token: str | None = None
) -> Repository:
    """
    Make a repository, or look into the one that there is, before anything is uploaded.

    Args:
        repo_id (`str`): `owner/name`; without `owner/` it is the user's own.
        kind (`str`, *optional*): What is to be uploaded to its root, `"pipeline"` or `"lora"`: a repository that holds
            anything else is refused. `None`, for an upload to a folder of it, takes any.
        private (`bool`, *optional*): Whether it shall be private. `None` leaves that to the Hub.
        token (`str`, *optional*): The stored one by default.

    Raises:
        `ValueError`: if `repo_id` is no such name, there is a repository with other content, or a public one that
            shall be private.
        `PermissionError`: if the token is refused.
        `ConnectionError`: if the Hub cannot be reached.
    """
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    with _told(api, repo_id):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return Repository(api.create_repo(repo_id, private=private).repo_id)
        files = tuple(file.rfilename for file in info.siblings)
        index, card = (
            Path(api.hf_hub_download(repo_id, name)).read_text(encoding="utf-8-sig") if name in files else None
            for name in ("model_index.json", "README.md")
        )
        repository = Repository(repo_id, files, card)
        index = json.loads(index or "{}")
    if private and not info.private:
        raise ValueError(
            f"`private` cannot be had: {repo_id} exists and is public. Its settings on the Hub change that."
        )
    is_lora = LORA_FILE in repository.files and not index and is_of_ours(repository.card or "")
    holds = "pipeline" if is_pipeline(index) else "lora" if is_lora else "other"
    if kind is not None and not repository.is_empty and kind != holds:
        wanted = "RVEDiT pipeline" if kind == "pipeline" else "RVEDiT LoRA weights"
        raise ValueError(f"`repo_id` {repo_id} exists and holds something else than {wanted}: choose another name.")
    return repository


def upload(
    folder: str | Path,
    repository: Repository,
    path_in_repo: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Bring a repository up to date with a folder, in one commit.

    Weights that the Hub has are not sent again, also if they come from an upload that was interrupted. Shards of
    weights that the new ones replace are deleted, since they would be loaded, and so is the code of a pipeline that
    goes without it; nothing else is.

    Args:
        folder (`str` or `Path`): Its files are uploaded, links as what they lead to; see [`check_folder`].
        repository ([`Repository`]): From [`open_repository`].
        path_in_repo (`str`, *optional*): Folder of the repository; its root by default.
        commit_message (`str`, *optional*): `"Upload <class of the pipeline>"` by default.
        token (`str`, *optional*): The stored one by default.
        create_pr (`bool`, defaults to `False`): Whether to open a pull request instead of committing to `main`.

    Raises:
        `ValueError`: if `folder` cannot be uploaded, or the Hub refuses it.
        `PermissionError`: if the token is refused.
        `ConnectionError`: if the Hub cannot be reached, or not any more.
    """
    folder, prefix = Path(folder), f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    kind = check_folder(folder)
    sources = {prefix + path.relative_to(folder).as_posix(): path for path in _files(folder)}
    families = {_weights_family(name) for name in sources} - {None}
    stale = [name for name in repository.files if name not in sources and _weights_family(name) in families]
    code = {prefix + name for name in ("pipeline.py", *(f"{part}/rvedit_diffusers.py" for part in CODE_COMPONENTS))}
    if kind == "pipeline" and len(code.intersection(repository.files)) > 1:
        stale += [name for name in repository.files if name in code and name not in sources]
    api = HfApi(token=token)
    # Not `upload_folder`: it drops folders that are links, and may cut an upload into commits, of which the first ones
    # are no pipeline.
    with _told(api, repository.repo_id):
        return api.create_commit(
            repository.repo_id,
            [CommitOperationAdd(name, str(path.resolve())) for name, path in sources.items()]
            + [CommitOperationDelete(name) for name in stale],
            commit_message=commit_message or ("Upload LoRA weights" if kind == "lora" else f"Upload {PIPELINE_CLASS}"),
            create_pr=create_pr,
        )


def _weights_family(name: str) -> str | None:
    # One file, its shards and their index replace each other. A variant, `x.fp16.safetensors`, is a family of its own.
    if not re.search(r"\.safetensors($|\.index\.)", name):
        return None
    return re.sub(r"-\d{5}-of-\d{5}|\.safetensors|\.index|\.json$", "", name)
