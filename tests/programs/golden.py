"""Makes the golden values with torch and transformers, or checks that they still come out the same.

    python -m tests.programs.golden            writes tests/golden/golden.json and golden.npz
    python -m tests.programs.golden --check    makes them afresh and compares

Run it through ci/oracle, which has torch and transformers; the tests need only what this has written.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.golden.checkpoints import CONTEXT, HELD_OUT, RECIPES, SHIPPED, Recipe, held_out_text
from tests.golden.switch import SWITCH_RECIPES, SwitchRecipe

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
GREEDY_TOKENS = 64
# Were two logits or two router scores closer than this, the choice between them would be a matter of rounding, and
# the golden value no test of anything: take another seed.
LEAST_MARGIN = 2e-4


def load(folder: Path) -> Any:
    """The model in float32, whatever the checkpoint stores; attention and experts written out, no fused kernels."""
    model = transformers.MixtralForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
    )
    return model.eval()


@torch.no_grad()
def golden(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(greedy tokens and margins, logits and routing of the prompt)."""
    model = load(recipe.write(folder))
    out = model(torch.tensor([recipe.prompt]), output_router_logits=True, use_cache=False)
    logits = out.logits[0].numpy()  # (positions, vocab)

    tokens, margins = list(recipe.prompt), []
    for _ in range(GREEDY_TOKENS):
        # The whole sequence afresh at each step: this says what the model means, without a cache's help.
        step = model(torch.tensor([tokens]), output_router_logits=True, use_cache=False)
        best, second = torch.topk(step.logits[0, -1], 2).values.tolist()
        margins.append(best - second)
        tokens.append(int(step.logits[0, -1].argmax()))
    for scores in step.router_logits:  # (positions, experts), of every layer
        ranked = torch.sort(scores, descending=True).values
        if recipe.top_k < recipe.experts:
            margins.append(float((ranked[:, recipe.top_k - 1] - ranked[:, recipe.top_k]).min()))
    if min(margins) < LEAST_MARGIN:
        sys.exit(f"{recipe.name}: a choice hangs on {min(margins):.1e}: give the recipe another seed")

    routing = np.stack(
        [np.sort(torch.topk(scores, recipe.top_k).indices.numpy(), axis=-1) for scores in out.router_logits]
    ).astype(np.int16)  # (layers, positions, top_k), ascending
    facts = {"sha256": recipe.sha256(), "least_margin": min(margins), "greedy": tokens[len(recipe.prompt) :]}
    return facts, {f"{recipe.name}.logits": logits, f"{recipe.name}.routing": routing}


def load_switch(folder: Path) -> Any:
    model = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@torch.no_grad()
def golden_switch(recipe: SwitchRecipe, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(greedy tokens and margins, encoder output, logits and routing of the prompt and the decoder's tokens)."""
    model = load_switch(recipe.write(folder))
    prompt = torch.tensor([recipe.prompt])
    out = model(
        input_ids=prompt, decoder_input_ids=torch.tensor([recipe.decoder_tokens]), use_cache=False,
        output_router_logits=True,
    )  # fmt: skip
    encoded = model.get_encoder()(prompt)

    # With a cache: an expert's capacity is that of what is processed together, and decoding goes token by token.
    tokens, margins, cache = [0], [], None
    for _ in range(GREEDY_TOKENS):
        step = model(
            encoder_outputs=encoded, decoder_input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        cache = step.past_key_values
        best, second = torch.topk(step.logits[0, -1], 2).values.tolist()
        margins.append(best - second)
        tokens.append(int(step.logits[0, -1].argmax()))
    arrays = {
        f"{recipe.name}.encoded": encoded.last_hidden_state[0].numpy(),
        f"{recipe.name}.logits": out.logits[0].numpy(),
    }
    for stack, router_logits in (("encoder", out.encoder_router_logits), ("decoder", out.decoder_router_logits)):
        scores = np.stack([layer[0].numpy() for layer in router_logits])  # (layers, positions, experts)
        ranked = np.sort(scores, axis=-1)
        margins.append(float((ranked[..., -1] - ranked[..., -2]).min()))
        arrays[f"{recipe.name}.{stack}_routing"] = scores.argmax(axis=-1).astype(np.int16)
    if min(margins) < LEAST_MARGIN:
        sys.exit(f"{recipe.name}: a choice hangs on {min(margins):.1e}: give the recipe another seed")
    return {"sha256": recipe.sha256(), "least_margin": min(margins), "greedy": tokens[1:]}, arrays


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text: str) -> dict[str, Any]:
    """Windows of CONTEXT tokens without overlap, the first token of each not scored."""
    ids = tokenizer.encode(text)
    nats, scored = 0.0, 0
    for start in range(0, len(ids), CONTEXT):
        window = torch.tensor([ids[start : start + CONTEXT]])
        if window.shape[1] < 2:
            break
        scores = torch.log_softmax(model(window, use_cache=False).logits[0, :-1].double(), dim=-1)
        nats -= float(scores.gather(1, window[0, 1:, None]).sum())
        scored += window.shape[1] - 1
    return {"tokens": len(ids), "scored": scored, "nats_per_token": nats / scored}


def held_out() -> dict[str, Any]:
    """Returns the values of the shipped model on each of HELD_OUT."""
    model = load(SHIPPED)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(SHIPPED / "tokenizer.json"))
    return {path.name: perplexity(model, tokenizer, held_out_text(path)) for path in HELD_OUT}


def compare(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[str]:
    """Returns what is no longer as it was committed."""
    committed = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    committed_arrays = np.load(GOLDEN / "golden.npz")
    problems = []
    for name, fresh in facts["recipes"].items():
        old = committed["recipes"].get(name, {})
        for key in ("sha256", "greedy"):
            if old.get(key) != fresh[key]:
                problems.append(f"{name}: {key} differs")
    for name, fresh in arrays.items():
        if name not in committed_arrays or committed_arrays[name].shape != fresh.shape:
            problems.append(f"{name}: is not there in this shape")
        elif (off := float(np.abs(committed_arrays[name].astype(np.float64) - fresh).max())) > 2e-5:
            problems.append(f"{name}: differs by up to {off:.1e}")
    for name, fresh in facts["held_out"].items():
        for key, value in fresh.items():
            old = committed["held_out"].get(name, {}).get(key, 0)
            if abs(old - value) > 1e-5 * value:
                problems.append(f"{name}: {key} {old} was committed, {value} comes out")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is committed, write nothing")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    recipes, arrays = {}, {}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            recipes[recipe.name], values = golden(recipe, Path(folder))
        arrays.update(values)
        print(f"{recipe.name}: least margin {recipes[recipe.name]['least_margin']:.1e}")
    for switch_recipe in SWITCH_RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            recipes[switch_recipe.name], values = golden_switch(switch_recipe, Path(folder))
        arrays.update(values)
        print(f"{switch_recipe.name}: least margin {recipes[switch_recipe.name]['least_margin']:.1e}")
    held_out_facts = held_out()
    for name, fact in held_out_facts.items():
        print(f"{name}: {fact['nats_per_token']:.6f} nats a token over {fact['scored']} tokens")
    facts = {
        "made_with": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "machine": platform.machine(),
        },
        "recipes": recipes,
        "held_out": held_out_facts,
    }
    if options.check:
        problems = compare(facts, arrays)
        for problem in problems:
            print(f"DIFFERS: {problem}", file=sys.stderr)
        print("golden values: " + ("DIFFER" if problems else "as committed"))
        return 1 if problems else 0
    (GOLDEN / "golden.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(GOLDEN / "golden.npz", **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
