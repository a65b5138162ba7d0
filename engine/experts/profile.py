"""Holds a model's activation profile: which experts tokens activate, and which follow on which (paper, section 3.2).

For each MoE layer, three tables of counts: of every expert (`marginal`), of every expert after the set of experts
that the previous MoE layer activated (`one`), and after the sets of the two previous MoE layers (`two`). The previous
layers of the first two MoE layers are the last ones of the token before, as in the authors' code. With top-k routing
a set is the sorted tuple of its k experts. A fourth table counts every expert by the token itself (`by_token`), which
is known before its first layer runs. Layers of an encoder are not counted: it takes all tokens of a prompt together.

The file is lines of JSON: {"schema": "edgemoe-profile", "version": 3, ...}, then a line for each layer. A device reads
it one layer at a time, and what it keeps is packed, because Python's objects for it would take 24 times the bytes of
the file, in the memory that experts are short of. History of VERSION: 1 first; 2 adds by_token; 3 in lines and columns.
Older files are refused: making one again is one command.
"""

from __future__ import annotations

import json
import os
from typing import Any, Dict, Generic, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, TypeVar

import numpy as np

from engine.dataclass import dataclass
from engine.errors import ContainerError
from engine.files import replacing

SCHEMA = "edgemoe-profile"
VERSION = 3
MAX_FILE_BYTES = 256 << 20

ExpertSet = Tuple[int, ...]  # sorted
Path = Tuple[ExpertSet, ...]  # of the one or two previous MoE layers, the older first
Counts = Dict[int, int]

K = TypeVar("K")


class CountTable(Mapping[K, Counts], Generic[K]):
    """Maps keys to counts; read-only, packed into three columns."""

    def __init__(self, keys: Iterable[K], sizes: Sequence[int], experts: Sequence[int], counts: Sequence[int]) -> None:
        """Makes a table in which each key has its next `sizes` of `experts`, with their `counts`.

        Raises ValueError if they do not fit.
        """
        self._rows = {key: row for row, key in enumerate(keys)}
        self._ends = np.cumsum(np.array(sizes, np.uint32), dtype=np.uint32)
        self._experts, self._counts = np.array(experts, np.uint16), np.array(counts, np.uint32)
        total = int(self._ends[-1]) if len(sizes) else 0
        if len(self._rows) != len(sizes) or not len(experts) == len(counts) == total:
            raise ValueError("the columns of a table differ in length, or it has a key twice")

    @classmethod
    def of(cls, rows: Mapping[K, Counts]) -> CountTable[K]:
        pairs = [pair for counts in rows.values() for pair in _by_count(counts)]
        return cls(rows, [len(c) for c in rows.values()], [e for e, _ in pairs], [c for _, c in pairs])

    def columns(self) -> Tuple[List[int], List[int], List[int]]:
        """Returns sizes, experts and counts, as the constructor takes them."""
        return np.diff(self._ends, prepend=np.uint32(0)).tolist(), self._experts.tolist(), self._counts.tolist()

    def __getitem__(self, key: K) -> Counts:
        row = self._rows[key]
        part = slice(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))
        return dict(zip(self._experts[part].tolist(), self._counts[part].tolist()))

    def __iter__(self) -> Iterator[K]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True)
class PathProfile:
    layers: int
    experts: int
    tokens: int
    marginal: Tuple[Counts, ...]  # by layer
    one: Tuple[Mapping[Path, Counts], ...]
    two: Tuple[Mapping[Path, Counts], ...]
    by_token: Tuple[Mapping[int, Counts], ...] = ()  # by layer, then token id; empty where tokens were not counted

    def frequency(self) -> Dict[Tuple[int, int], float]:
        """Returns, by (layer, expert), the share of tokens that activate it."""
        return {
            (layer, expert): count / max(1, self.tokens)
            for layer, counts in enumerate(self.marginal)
            for expert, count in counts.items()
        }

    def ranking(self, layer: int, previous: Sequence[ExpertSet]) -> List[int]:
        """Returns experts of `layer` by descending probability after `previous` (older first); backs off if unseen."""
        tables = [self.marginal[layer]]
        if previous:
            tables.insert(0, self.one[layer].get((previous[-1],), {}))
        if len(previous) > 1:
            tables.insert(0, self.two[layer].get((previous[-2], previous[-1]), {}))
        return _ranked(tables)

    def ranking_of_token(self, layer: int, token: Optional[int]) -> List[int]:
        """Returns experts of `layer` by descending probability for a token id; backs off to all tokens if unseen."""
        counts = self.by_token[layer].get(token, {}) if self.by_token and token is not None else {}
        return _ranked([counts, self.marginal[layer]])

    def save(self, path: str) -> None:
        """Writes the profile atomically."""
        header = {
            "schema": SCHEMA,
            "version": VERSION,
            "layers": self.layers,
            "experts": self.experts,
            "tokens": self.tokens,
        }
        try:
            with replacing(path) as file:
                file.write(_line(header))
                for layer in range(self.layers):
                    content = {
                        "marginal": _by_count(self.marginal[layer]),
                        "one": _paths_to_json(self.one[layer]),
                        "two": _paths_to_json(self.two[layer]),
                    }
                    if self.by_token:
                        content["by_token"] = _table_to_json(self.by_token[layer])
                    file.write(_line(content))
        except OSError as error:
            raise ContainerError(f"{path}: the profile cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: str) -> PathProfile:
        """Reads a profile. Raises ContainerError, which names the file, unless the profile is sound."""
        try:
            if os.path.getsize(path) > MAX_FILE_BYTES:
                raise ContainerError(f"{path}: larger than a profile can be")
            if not os.path.isfile(path):
                raise ContainerError(f"{path}: not a plain file")
            with open(path, "rb") as file:
                return cls._parse(file)
        except OSError as error:
            raise ContainerError(f"{path}: cannot be opened: {error.strerror}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ContainerError(
                f"{path}: not a sound profile ({type(error).__name__}: {str(error)[:120]}); make it again with "
                "`edgemoe-farm model profile`"
            ) from None

    @classmethod
    def _parse(cls, lines: Iterator[bytes]) -> PathProfile:
        header = json.loads(next(lines, b""))
        if header["schema"] != SCHEMA or header["version"] != VERSION:
            raise ValueError(f"schema {header['schema']!r} version {header['version']!r}, not {SCHEMA} {VERSION}")
        layers, experts = int(header["layers"]), int(header["experts"])
        marginal: List[Counts] = []
        one: List[Mapping[Path, Counts]] = []
        two: List[Mapping[Path, Counts]] = []
        by_token: List[Mapping[int, Counts]] = []
        for line in lines:
            content = json.loads(line)
            marginal.append(dict(content["marginal"]))
            one.append(_paths_from_json(content["one"]))
            two.append(_paths_from_json(content["two"]))
            if "by_token" in content:
                by_token.append(_table_from_json(content["by_token"], map(int, content["by_token"]["keys"])))
            tables: List[Mapping[Any, Counts]] = [{0: marginal[-1]}, one[-1], two[-1], *by_token[-1:]]
            for table in tables:
                _check(table, experts)
        if len(marginal) != layers:
            raise ValueError(f"{len(marginal)} of {layers} layers")
        if len(by_token) not in (0, layers):
            raise ValueError("by_token: a table for each layer, or none, is expected")
        return cls(layers, experts, int(header["tokens"]), tuple(marginal), tuple(one), tuple(two), tuple(by_token))


class PathCounter:
    """Counts activation paths while a model runs, one sequence after another."""

    def __init__(self, layers: int, experts: int, first_layer: int = 0) -> None:
        """Counts in `layers` MoE layers, of which those before `first_layer` are an encoder's."""
        self.layers, self.experts, self.first_layer = layers, experts, first_layer
        self.tokens = 0
        self._marginal: List[Counts] = [{} for _ in range(layers)]
        self._one: List[Dict[Path, Counts]] = [{} for _ in range(layers)]
        self._two: List[Dict[Path, Counts]] = [{} for _ in range(layers)]
        self._by_token: List[Dict[int, Counts]] = [{} for _ in range(layers)]
        self._occurrences: Dict[int, int] = {}  # of token ids

    def observe(self, routing: Sequence[Sequence[ExpertSet]], tokens: Sequence[int] = ()) -> None:
        """Counts one sequence.

        routing[token][i] is the set of experts that it activated in MoE layer `first_layer` + i.

        `tokens`: their ids, if they are to be counted by id too.
        """
        flat = [tuple(sorted(chosen)) for token in routing for chosen in token]
        self.tokens += len(routing)
        for i, chosen in enumerate(flat):
            layer = self.first_layer + i % (self.layers - self.first_layer)
            tables = [self._marginal[layer]]
            if i >= 1:
                tables.append(self._one[layer].setdefault((flat[i - 1],), {}))
            if i >= 2:
                tables.append(self._two[layer].setdefault((flat[i - 2], flat[i - 1]), {}))
            for counts in tables:
                for expert in chosen:
                    counts[expert] = counts.get(expert, 0) + 1
        for token, by_layer in zip(tokens, routing):
            self._occurrences[token] = self._occurrences.get(token, 0) + 1
            for layer, chosen in enumerate(by_layer, self.first_layer):
                counts = self._by_token[layer].setdefault(token, {})
                for expert in chosen:
                    counts[expert] = counts.get(expert, 0) + 1

    def finish(self, least: int = 2) -> PathProfile:
        """Returns the profile. Paths and token ids seen fewer than `least` times are left to the back-off."""
        two = [{p: c for p, c in table.items() if max(c.values()) >= least} for table in self._two]
        seen = [{t: c for t, c in table.items() if self._occurrences[t] >= least} for table in self._by_token]
        return PathProfile(
            self.layers, self.experts, self.tokens, tuple(self._marginal), tuple(map(CountTable.of, self._one)),
            tuple(map(CountTable.of, two)), tuple(map(CountTable.of, seen if self._occurrences else ())),
        )  # fmt: skip


def _ranked(tables: Sequence[Counts]) -> List[int]:
    """Returns experts ranked by the first table, those not in it by the next; ties by number."""
    ranked: Dict[int, None] = {}
    for counts in tables:
        for expert, _ in _by_count(counts):
            ranked.setdefault(expert)
    return list(ranked)


def _by_count(counts: Counts) -> List[Tuple[int, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _line(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _table_to_json(table: Mapping[Any, Counts]) -> Dict[str, Any]:
    ordered = {key: table[key] for key in sorted(table)}
    sizes, experts, counts = CountTable.of(ordered).columns()
    return {"keys": list(ordered), "sizes": sizes, "experts": experts, "counts": counts}


def _table_from_json(content: Any, keys: Iterable[K]) -> CountTable[K]:
    return CountTable(keys, content["sizes"], content["experts"], content["counts"])


def _paths_to_json(table: Mapping[Path, Counts]) -> Dict[str, Any]:
    """Keys read 3.7/0.12: experts 3 and 7, then 0 and 12."""
    content = _table_to_json(table)
    return {**content, "keys": ["/".join(".".join(map(str, s)) for s in path) for path in content["keys"]]}


def _paths_from_json(content: Any) -> CountTable[Path]:
    return _table_from_json(
        content, (tuple(tuple(map(int, s.split("."))) for s in key.split("/")) for key in content["keys"])
    )


def _check(table: Mapping[Any, Counts], experts: int) -> None:
    for counts in table.values():
        if any(not 0 <= expert < experts or count < 0 for expert, count in counts.items()):
            raise ValueError(f"an expert outside 0 .. {experts - 1} or a negative count")
