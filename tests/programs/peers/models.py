"""The models of the comparison: the same weights as our containers and as GGUF files, made once and kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.container import Container
from engine.kernels import make_kernels
from engine.offline.accuracy.model import OfflineModel
from engine.offline.importing.importer import import_checkpoint
from engine.offline.routing.activations import profile_texts
from engine.offline.tokenizer import Tokenizer
from engine.quantize import Format
from tests.golden.checkpoints import DEMO, Recipe
from tests.programs.peers.gguf_files import bytes_per_token, quantize, write_gguf

# 2.2 billion parameters, of which a token uses 0.37: experts as large as those that edge devices meet.
RANDOM = Recipe(
    "random-2.2b", seed=22, vocab=32000, hidden=1024, width=3584, layers=12, heads=16, kv_heads=8, experts=16,
    dtype="bfloat16", shards=8, spread=0.03,
)  # fmt: skip

FORMATS = {"int8": Format("int8", 32), "int4": Format("int4", 32)}  # of experts: 8.5 and 4.5 bits, as Q8_0 and Q4_0

TRAINING = sorted((DEMO / "texts").glob("*.train.txt"))
PROFILE_CHARACTERS, PROFILE_CONTEXT = 8_000, 512  # of each text, and the tokens of a window


@dataclass(frozen=True)
class Pair:
    """A container's precision and the GGUF file that it is compared with."""

    ours: str  # of the experts; the large matrices beside them are INT8, 8.5 bits
    theirs: str

    @property
    def name(self) -> str:
        return f"{self.ours}:{self.theirs}"


# q4_0 is what llama.cpp makes of a model that is asked for in Q4_0: nearly all of it in 4.5 bits. q4_0+q8_0 has our
# bits: experts in 4.5; attention, embedding and head in 8.5.
PAIRS = {pair.name: pair for pair in (Pair("int8", "q8_0"), Pair("int4", "q4_0"), Pair("int4", "q4_0+q8_0"))}


@dataclass(frozen=True)
class PeerModel:
    """A Mixtral checkpoint, and what is made of it in `folder`."""

    name: str
    checkpoint: Path
    folder: Path

    @classmethod
    def random(cls, folder: Path) -> PeerModel:
        """RANDOM, written unless it is there."""
        model = cls(RANDOM.name, folder / RANDOM.name / "checkpoint", folder / RANDOM.name)
        model._made("checkpoint", RANDOM.write)
        return model

    @classmethod
    def of(cls, checkpoint: Path, folder: Path) -> PeerModel:
        name = checkpoint.resolve().name
        return cls(name, checkpoint, folder / name)

    def container(self, precision: str) -> str:
        """Its path."""

        def make(to: Path) -> None:
            import_checkpoint(self.checkpoint, to, [FORMATS[precision]], int8_non_experts=True)

        return str(self._made(f"{precision}.emoe", make))

    def gguf(self, kind: str) -> str:
        """Its path; `kind` as in PAIRS."""

        def make(to: Path) -> None:
            quantize(self._made("stored.gguf", lambda stored: write_gguf(self.checkpoint, stored)), to, kind)

        return str(self._made(f"{kind}.gguf", make))

    def tokens(self, text: Path, most: int | None) -> tuple[int, ...]:
        """The first tokens of a text; of a model without a tokenizer, its recipe's prompt."""
        tokenizer = Tokenizer.find(self.container("int8"))
        return (RANDOM.prompt if tokenizer is None else tokenizer.encode(text.read_text(encoding="utf-8")))[:most]

    def profile(self) -> str:
        """Its path; of the texts that ship for that."""

        def make(to: Path) -> None:
            tokenizer = Tokenizer.from_container(self.container("int8"))
            texts = [path.read_text(encoding="utf-8")[:PROFILE_CHARACTERS] for path in TRAINING]
            kernels, _ = make_kernels("auto", 1)
            model = OfflineModel.open(self.container("int8"), kernels)
            profile_texts(model, [tokenizer.encode(text) for text in texts], PROFILE_CONTEXT).save(str(to))
            kernels.close()

        return str(self._made("profile.json", make))

    def sizes(self, pair: Pair) -> dict[str, int]:
        """Bytes of the files, and of the weights that a token needs of them."""
        ours, theirs = self.container(pair.ours), self.gguf(pair.theirs)
        return {
            "ours_file_bytes": os.path.getsize(ours),
            "theirs_file_bytes": os.path.getsize(theirs),
            "ours_bytes_per_token": _bytes_per_token(Container.open(ours)),
            "theirs_bytes_per_token": bytes_per_token(theirs),
        }

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            print(f"{path}: making it", file=sys.stderr, flush=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{name}.{os.getpid()}")
            make(aside)
            aside.replace(path)
        return path


def _bytes_per_token(container: Container) -> int:
    experts = container.expert_bytes * container.config["top_k"] // container.config["experts"]
    row_wise = 0 if container.config["tied_head"] else container.tensors["embed"].bytes
    return experts + container.non_expert_bytes - row_wise
