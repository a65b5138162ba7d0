"""Reads a Hugging Face checkpoint directory: config.json and safetensors, single or sharded.

Read tensor by tensor, so that a checkpoint of any size needs the memory of its largest tensor only. The directory
is a stranger's: names in the index may not leave it, and every size is checked before it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from engine.errors import RequestError
from engine.files import read_bounded

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # importing ml_dtypes is what lets safetensors return it to numpy
MAX_JSON_BYTES = 64 << 20
MAX_TOKENIZER_BYTES = 256 << 20  # the largest published ones have 35 MB
_POINTER = b"version https://git-lfs.github.com/spec/"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


class CheckpointError(RequestError):
    """Reports that a checkpoint cannot be imported; names the tensor or key and the file."""

    kind = "checkpoint"


@dataclass(frozen=True)
class StoredTensor:
    """Says where a tensor lies and what its file's header says of it."""

    file: Path
    precision: str  # fp32, fp16 or bf16
    shape: tuple[int, ...]
    name: str  # in the file
    part: tuple[int | slice, ...] = ()  # of what has that name there, if it is not all of it


@dataclass(frozen=True)
class Checkpoint:
    """Holds an open checkpoint: its headers are checked, its weights are not yet read."""

    folder: Path
    config: dict[str, Any]  # config.json, with all the tokens at which generation_config.json stops
    tensors: Mapping[str, StoredTensor]
    _open: Mapping[Path, Any] = field(repr=False)  # the library's handles: they map the files, and go with this object

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Opens a checkpoint. Raises CheckpointError, which names the file, unless the directory is whole."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a directory: give the folder that holds config.json and {SINGLE}")
        config = _read_json(folder / "config.json")
        if (folder / GENERATION).exists():
            _add_stop_tokens(config, _read_json(folder / GENERATION))
        tensors: dict[str, StoredTensor] = {}
        handles: dict[Path, Any] = {}
        if (folder / INDEX).exists():
            weight_map = _read_index(folder / INDEX)
            if (folder / SINGLE).exists() and set(weight_map.values()) != {folder / SINGLE}:
                raise CheckpointError(
                    f"{folder}: both {SINGLE} and {INDEX}, which places tensors elsewhere, are there: one is of an "
                    "earlier save; remove it"
                )
            for file in sorted(set(weight_map.values())):
                handles[file] = _open(file)
                for name, tensor in _read_header(file, handles[file]).items():
                    if weight_map.get(name) != file:
                        raise CheckpointError(
                            f"{file}: tensor {_short(name)} is not placed there by {INDEX}: download both again"
                        )
                    tensors[name] = tensor
            for name, file in weight_map.items():
                if name not in tensors:
                    raise CheckpointError(
                        f"{file}: tensor {_short(name)}, placed there by {INDEX}, is missing: download both again"
                    )
        elif (folder / SINGLE).exists():
            handles[folder / SINGLE] = _open(folder / SINGLE)
            tensors = _read_header(folder / SINGLE, handles[folder / SINGLE])
        else:
            raise CheckpointError(
                f"{folder}: neither {SINGLE} nor {INDEX} is there: only safetensors checkpoints can be imported"
            )
        return cls(folder, config, tensors, handles)

    def check_shapes(self, expected: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Raises CheckpointError, naming the tensor, unless exactly the expected tensors and shapes are there.

        Stops at the first that is missing, so that a config.json of a trillion layers costs nothing.
        """
        known = set()
        for name, shape in expected:
            known.add(name)
            tensor = self.tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{self.folder}: tensor {name} is missing: the checkpoint is not whole, or config.json is another's"
                )
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} has shape {tensor.shape} where config.json implies {shape}"
                )
        for name, tensor in self.tensors.items():
            if name not in known:
                raise CheckpointError(
                    f"{tensor.file}: tensor {_short(name)} is surplus: this architecture, as config.json describes it,"
                    " has no such tensor, and leaving it out would change the model"
                )

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as stored: float32, float16 or bfloat16 (of ml_dtypes). Refuses NaN and infinity."""
        tensor = self.tensors[name]
        file = self._open[tensor.file]
        array: np.ndarray = file.get_slice(tensor.name)[tensor.part] if tensor.part else file.get_tensor(tensor.name)
        array = array.reshape(tensor.shape)
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{tensor.file}: tensor {name} holds NaN or infinity: the checkpoint is damaged or was never trained"
            )
        return array

    def tokenizer_json(self) -> bytes | None:
        """Returns the content of tokenizer.json, or None without one. Raises CheckpointError."""
        path = self.folder / "tokenizer.json"
        try:
            content = read_bounded(str(path), MAX_TOKENIZER_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        _refuse_pointer(path, content)
        return content

    def spelled(self, names: Mapping[str, StoredTensor], *, without: Collection[str] = ()) -> Checkpoint:
        """Returns this checkpoint with tensors by other names as well, and without those that they are parts of."""
        own = {name: tensor for name, tensor in self.tensors.items() if name not in without}
        return replace(self, tensors={**own, **names})

    def read_float32(self, name: str) -> np.ndarray:
        return self.read(name).astype(np.float32, copy=False)


def _read_index(path: Path) -> dict[str, Path]:
    """Returns each tensor's file from model.safetensors.index.json, none of them outside the folder."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: it has no weight_map: download it again")
    files = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _FILE_NAME.fullmatch(file_name):
            raise CheckpointError(
                f"{path}: tensor {_short(name)} lies in {_short(file_name)}, which is not a plain NAME.safetensors"
                " beside the index: refused"
            )
        files[name] = path.parent / file_name
    return files


def _open(path: Path) -> Any:
    """Opens a file. The library checks bounds, overlaps, gaps, sizes against shapes, and the file's length."""
    try:
        with path.open("rb") as start:
            _refuse_pointer(path, start.read(len(_POINTER)))
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cut off or damaged ({error}): download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_header(path: Path, file: Any) -> dict[str, StoredTensor]:
    tensors = {}
    for name in file.keys():  # noqa: SIM118 - a safe_open is not a mapping
        view = file.get_slice(name)
        dtype = view.get_dtype()
        if dtype not in PRECISIONS:
            raise CheckpointError(
                f"{path}: tensor {_short(name)} is {dtype}: only {', '.join(PRECISIONS)} can be imported;"
                " import the original, not a quantised copy"
            )
        tensors[name] = StoredTensor(path, PRECISIONS[dtype], tuple(view.get_shape()), name)
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_bounded(str(path), MAX_JSON_BYTES)
        _refuse_pointer(path, content)
        value = json.loads(content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _refuse_pointer(path: Path, content: bytes) -> None:
    """Raises CheckpointError for what git leaves where a large file was not fetched."""
    if content.startswith(_POINTER):
        raise CheckpointError(f"{path}: only git-lfs's pointer to the file: run `git lfs pull` in {path.parent}")


def _add_stop_tokens(config: dict[str, Any], generation: dict[str, Any]) -> None:
    """Adds the tokens at which transformers stops by generation_config.json to those of config.json."""
    both = []
    for found in (config.get("eos_token_id"), generation.get("eos_token_id")):
        for token in found if isinstance(found, list) else [] if found is None else [found]:
            both += [token] if token not in both else []
    if both:
        config["eos_token_id"] = both


def _short(text: object) -> str:
    """Returns a stranger's text for one line of an error: control characters escaped, length bounded."""
    return repr(text if isinstance(text, (str, int, float, bool, type(None))) else type(text).__name__)[:120]
