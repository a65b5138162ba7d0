"""A Mixtral checkpoint as a GGUF file, and that quantised by llama.cpp itself."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

from engine.offline.importing.checkpoint import BFLOAT16, Checkpoint
from engine.offline.importing.mixtral import EXPERT_MATRICES, MixtralLayout
from tests.programs.peers.llama import library

Q8_0 = int(gguf.GGMLQuantizationType.Q8_0)
STORED = {
    BFLOAT16: gguf.GGMLQuantizationType.BF16,
    np.dtype(np.float16): gguf.GGMLQuantizationType.F16,
    np.dtype(np.float32): gguf.GGMLQuantizationType.F32,
}
PRECISIONS = {"bf16": BFLOAT16, "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
NAMES = {
    "embed": "token_embd", "norm": "output_norm", "head": "output", "attention_norm": "attn_norm",
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "moe_norm": "ffn_norm", "router": "ffn_gate_inp",
}  # fmt: skip
IN_FLOATS = ("norm", "attention_norm", "moe_norm", "router")

Named = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]  # name, shape, type in the file, its values


def write_gguf(folder: Path, to: Path) -> None:
    """In the precision of the checkpoint, but norms and routers in FP32; without a tokenizer."""
    checkpoint = Checkpoint.open(folder)
    layout = MixtralLayout.of(checkpoint)
    c = layout.config
    writer = gguf.GGUFWriter(str(to), "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(c["vocab_size"])
    writer.add_context_length(c["max_positions"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["expert_size"])
    writer.add_block_count(c["layers"])
    writer.add_head_count(c["heads"])
    writer.add_head_count_kv(c["kv_heads"])
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["norm_eps"])
    writer.add_expert_count(c["experts"])
    writer.add_expert_used_count(c["top_k"])
    tensors = list(_tensors(checkpoint, layout))
    for name, shape, dtype, _ in tensors:
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=STORED[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, dtype, values in tensors:
        writer.write_tensor_data(np.ascontiguousarray(values(), dtype))
    writer.close()


def quantize(source: Path, to: Path, kind: str) -> None:
    """`kind`: q8_0 or q4_0, as llama.cpp does it; q4_0+q8_0: experts in the first, all other matrices in the second."""
    llama = library()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = {"q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0}.get(kind, llama.LLAMA_FTYPE_MOSTLY_Q4_0)
    if kind.endswith("+q8_0"):
        parameters.token_embedding_type = parameters.output_tensor_type = Q8_0
        overrides = (llama.llama_model_tensor_override * 2)((b"attn_", Q8_0), (None, 0))
        parameters.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(llama.llama_model_tensor_override))
    status = llama.llama_model_quantize(str(source).encode(), str(to).encode(), ctypes.byref(parameters))
    if status:
        raise RuntimeError(f"{source}: llama.cpp cannot quantise it to {kind}: status {status}")


def bytes_per_token(path: str) -> int:
    """Returns the bytes of the weights that decoding one token needs."""
    reader = gguf.GGUFReader(path)
    total, experts = 0, reader.fields["llama.expert_count"].contents()
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    for tensor in reader.tensors:
        if "_exps" in tensor.name:
            total += int(tensor.n_bytes) * reader.fields["llama.expert_used_count"].contents() // experts
        elif tied or tensor.name != "token_embd.weight":
            total += int(tensor.n_bytes)
    return total


def _tensors(checkpoint: Checkpoint, layout: MixtralLayout) -> Iterator[Named]:
    c = layout.config
    for theirs, ours, shape in layout.non_experts():
        layer, _, name = ours.removeprefix("layers.").rpartition(".")
        heads = {"q": c["heads"], "k": c["kv_heads"]}.get(name)

        def values(theirs: str = theirs, heads: int | None = heads) -> np.ndarray:
            array = checkpoint.read(theirs)
            return array if heads is None else _interleaved(array, heads)

        prefix = f"blk.{layer}." if layer else ""
        dtype = np.dtype(np.float32) if name in IN_FLOATS else PRECISIONS[checkpoint.tensors[theirs].precision]
        yield f"{prefix}{NAMES[name]}.weight", shape, dtype, values
    for layer in range(c["layers"]):
        for matrix in EXPERT_MATRICES:
            sources = [layout.expert(layer, expert)[matrix] for expert in range(c["experts"])]

            def experts(sources: list[str] = sources) -> np.ndarray:
                return np.stack([checkpoint.read(source) for source in sources])  # (experts, rows, columns)

            dtype = PRECISIONS[checkpoint.tensors[sources[0]].precision]
            shape = (len(sources), *layout.matrices()[matrix])
            yield f"blk.{layer}.ffn_{matrix}_exps.weight", shape, dtype, experts


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head against each other, Mixtral's checkpoints its halves."""
    count, columns = rows.shape
    return rows.reshape(heads, 2, count // heads // 2, columns).swapaxes(1, 2).reshape(count, columns)
