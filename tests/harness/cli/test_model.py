"""The `model` commands as a user types them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine.container import Container
from harness.cli.model import model
from tests import command_line
from tests.golden.checkpoints import HELD_OUT, RECIPES, SHIPPED, held_out_text

farm = partial(command_line.farm, "model")
refused = partial(command_line.refused, "model")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "mix16.emoe"
    farm("import", SHIPPED, "--to", path, "--precision", "int8", "--origin", "made here", "--licence", "free")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    farm("import", RECIPES[0].write(folder / "hf"), "--to", folder / "tiny.emoe")
    return folder / "tiny.emoe"


def test_info_has_what_programs_rely_on(shipped: Path) -> None:
    facts = json.loads(farm("info", shipped, "--json").stdout)
    assert facts["precisions"] == {"int8": 128}
    assert facts["formats"] == {"int8-g32-zero": 128}
    assert facts["origin"] == {"checkpoint": "mix16", "origin": "made here", "licence": "free"}
    expected = {
        "architecture": "mixtral",
        "layers": 8,
        "moe_layers": 8,
        "experts_per_layer": 16,
        "top_k": 2,
        "vocab_size": 4096,
        "bytes_total": shipped.stat().st_size,
    }
    assert {key: facts[key] for key in expected} == expected
    assert "int8-g32-zero 128" in farm("info", shipped).stdout


def test_import_options_become_formats(tmp_path: Path) -> None:
    folder = RECIPES[0].write(tmp_path / "hf")
    farm("import", folder, "--to", tmp_path / "m.emoe", "--precision", "int2", "--precision", "fp16", "--group", "0",
         "--symmetric")  # fmt: skip
    assert [f.label for f in Container.open(str(tmp_path / "m.emoe")).formats] == ["int2-channel", "fp16"]


def test_import_replaces_a_container_and_nothing_else_unless_told(tmp_path: Path) -> None:
    folder, target = RECIPES[0].write(tmp_path / "hf"), tmp_path / "notes.txt"
    target.write_text("three years of notes")
    assert "is not a container" in refused("import", folder, "--to", target)
    assert target.read_text() == "three years of notes"
    farm("import", folder, "--to", target, "--force")
    farm("import", folder, "--to", target, "--precision", "int8")
    assert [f.label for f in Container.open(str(target)).formats] == ["int8-g32-zero"]


def test_import_names_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    folder = RECIPES[0].write(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 9}))
    line = refused("import", folder, "--to", tmp_path / "m.emoe")
    assert "tensor model.layers.0.block_sparse_moe" in line
    assert "(9, 64)" in line
    assert not (tmp_path / "m.emoe").exists()


def test_verify(tiny: Path, tmp_path: Path) -> None:
    assert json.loads(farm("verify", tiny, "--json").stdout)["sound"] is True
    content = bytearray(tiny.read_bytes())
    content[Container.open(str(tiny)).records[3].offset] ^= 1
    (tmp_path / "damaged.emoe").write_bytes(content)
    assert "layer 0 expert 3 is damaged (checksum)" in refused("verify", tmp_path / "damaged.emoe")


def test_logits(tiny: Path, tmp_path: Path) -> None:
    farm("logits", tiny, "--tokens", "5, 6,7", "--to", tmp_path / "o.npy")
    logits = np.load(tmp_path / "o.npy")
    assert (logits.dtype, logits.shape) == (np.float32, (3, 160))
    assert "0 to 159" in refused("logits", tiny, "--tokens", "5,160", "--to", tmp_path / "x.npy")
    assert "no encoder" in refused("logits", tiny, "--tokens", "5", "--decoder-tokens", "1", "--to", tmp_path / "x.npy")
    for ids in ("5,x", "", "-1", "5,,6"):
        assert "token id" in refused("logits", tiny, f"--tokens={ids}", "--to", tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()


def test_generate_says_what_each_token_cost(tiny: Path) -> None:
    answers = []
    for strategy in ("full-load", "naive-swap"):
        result = json.loads(
            farm("generate", tiny, "--tokens", "5,6,7", "--max-new", 4, "--strategy", strategy, "--json").stdout
        )
        assert result["text"] is None  # it holds no tokenizer
        assert len(result["tokens"]) == len(result["sample"]["steps"]["time_s"]) == 4
        assert result["load"]["strategy"]["residency"] == {"full-load": "all", "naive-swap": "none"}[strategy]
        answers.append(result["tokens"])
    assert answers[0] == answers[1]


def test_generate_with_a_profile_and_a_budget(shipped: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(held_out_text(HELD_OUT[0])[:1500])
    assert "16 experts" in farm("profile", shipped, "--text", text, "--text", text, "--to", tmp_path / "p").stdout
    common = ("generate", shipped, "--prompt", "And the LORD said", "--max-new", 5, "--json")
    plain = json.loads(farm(*common).stdout)
    result = json.loads(
        farm(*common, "--strategy", "edgemoe", "--profile", tmp_path / "p", "--expert-budget", "20-experts").stdout
    )
    assert (result["tokens"], result["text"]) == (plain["tokens"], plain["text"])
    assert result["load"]["expert_budget_bytes"] == 20 * Container.open(str(shipped)).largest_slot_bytes
    shown = farm("generate", shipped, "--prompt", "And the LORD said", "--max-new", 5)
    assert shown.stdout.startswith("And the LORD said" + plain["text"].split("\n")[0])
    assert "ms a token" in shown.stderr


def test_sampling_is_seeded(shipped: Path) -> None:
    def tokens(seed: int) -> list[int]:
        options = ("--tokens", "5,6,7", "--max-new", 12, "--temperature", 1, "--top-p", 0.95, "--seed", seed, "--json")
        return list(json.loads(farm("generate", shipped, *options).stdout)["tokens"])

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize("arguments, words", [
    (["--max-new", 1], "either as text (--prompt) or as token ids (--tokens)"),
    (["--prompt", "x", "--tokens", "5"], "either as text (--prompt) or as token ids (--tokens)"),
    (["--prompt", ""], "the prompt is empty"),
    (["--tokens", "5,4096"], "4095"),
    (["--tokens", "5", "--max-new", 5000], "5001 positions"),
    (["--tokens", "5", "--strategy", "magic"], "full-load, full-load-int8, naive-swap"),
    (["--tokens", "5", "--strategy", "edgemoe"], "model profile"),
    (["--tokens", "5", "--expert-budget", "lots"], "expert budget 'lots' is not a size"),
    (["--tokens", "5", "--expert-budget", "1MB"], "has no expert buffer"),
    (["--tokens", "5", "--temperature", -1], "temperature"),
])  # fmt: skip
def test_generate_refuses_in_one_line(arguments: list[object], words: str, shipped: Path) -> None:
    assert words in refused("generate", shipped, *arguments)


def test_eval(shipped: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(held_out_text(HELD_OUT[0])[:1500])
    result = json.loads(farm("eval", shipped, "--text", text, "--context", 128, "--json").stdout)
    assert 30 < result["perplexity"] < 120
    assert 1.5 < result["bits_per_byte"] < 2.5
    assert result["text_bytes"] == len(text.read_bytes())
    assert "windows of 128" in farm("eval", shipped, "--text", text, "--context", 128).stdout
    text.write_bytes(b"abc\xff")
    assert "not UTF-8 at byte 3" in refused("eval", shipped, "--text", text)
    assert "No such file" in refused("eval", shipped, "--text", tmp_path / "none")


@pytest.mark.parametrize("command", ["info", "verify"])
def test_what_is_no_container(command: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\x03\x04" * 100)
    assert "not an expert container" in refused(command, tmp_path / "x")
    assert "cannot be opened" in refused(command, tmp_path / "nowhere")


@pytest.mark.parametrize("command", sorted(model.commands))
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"edgemoe-farm model {command}" in farm(command, "--help").stdout


def test_eval_under_a_strategy_says_what_it_loses(shipped: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(held_out_text(HELD_OUT[0])[:500])
    exact = json.loads(farm("eval", shipped, "--text", text, "--json").stdout)
    swapped = json.loads(farm("eval", shipped, "--text", text, "--strategy", "naive-swap", "--json").stdout)
    assert swapped["nats_per_token"] == pytest.approx(exact["nats_per_token"], abs=1e-5)
    profile = tmp_path / "profile.json"
    farm("profile", shipped, "--text", text, "--to", profile)
    arguments = ["--strategy", "edgemoe-cacheaware", "--expert-budget", "20-experts", "--profile", profile]
    arguments += ["--against", shipped, "--json"]
    rerouted = json.loads(farm("eval", shipped, "--text", text, *arguments).stdout)
    assert rerouted["divergence_nats"] > 1e-3  # other experts, other answers
    assert rerouted["nats_per_token"] == pytest.approx(exact["nats_per_token"], abs=0.5)
    assert "give --strategy too" in refused("eval", shipped, "--text", text, "--expert-budget", "9-experts")
    assert "needs every expert in int2" in refused("eval", shipped, "--text", text, "--strategy", "naive-swap-int2")


def test_adapt(tmp_path: Path) -> None:
    source, text, profile = tmp_path / "full.emoe", tmp_path / "text", tmp_path / "profile.json"
    farm("import", SHIPPED, "--to", source)
    text.write_text(held_out_text(HELD_OUT[0])[:1500])
    farm("profile", source, "--text", text, "--to", profile)
    arguments = ["--profile", profile, "--text", text, "--tolerance", 0.03]
    plan = json.loads(farm("adapt", source, *arguments, "--to", tmp_path / "a.emoe", "--json").stdout)
    assert plan["loss"] <= 0.03
    assert sum(plan["precisions"].values()) == 128
    assert json.loads(farm("info", tmp_path / "a.emoe", "--json").stdout)["bytes_experts"] == plan["bytes_experts"]
    assert json.loads((tmp_path / "a.emoe.plan.json").read_text())["loss"] == plan["loss"]
    assert "is not a container" in refused("adapt", source, *arguments, "--to", text)


def test_trace_and_replay(shipped: Path, tmp_path: Path) -> None:
    text, profile, trace = tmp_path / "text", tmp_path / "profile.json", tmp_path / "trace"
    text.write_text(held_out_text(HELD_OUT[0])[:800])
    farm("profile", shipped, "--text", text, "--to", profile)
    assert "8 layers of 16 experts" in farm("trace", shipped, "--text", text, "--to", trace).stdout
    result = json.loads(farm("replay", trace, "--profile", profile, "--json").stdout)
    assert len(result["predictors"]["path"]["recall_at_2"]["by_layer"]) == 8
    assert [row["buffer_experts"] for row in result["policies"]["lru"]] == [16, 32, 48, 64, 96]
    table = farm("replay", trace, "--profile", profile, "--buffer-experts", "20", "--by-layer").stdout
    assert "recall at 2" in table.split("by layer")[0]
    assert table.count("\n7 ") == 1
    assert "belady" in table
    assert "20 experts" in table
    assert "write numbers of experts" in refused("replay", trace, "--profile", profile, "--buffer-experts", "many")
    assert "holds nothing" in refused("replay", trace, "--profile", profile, "--buffer-experts", "0")


def test_view_shows_what_it_is_given(tiny: Path, shipped: Path, tmp_path: Path) -> None:
    text = held_out_text(HELD_OUT[0])[:900]
    (tmp_path / "t.txt").write_text(text)
    for what in ("profile", "trace"):
        farm(what, shipped, "--text", tmp_path / "t.txt", "--to", tmp_path / what)
    (tmp_path / "plan").write_text(
        json.dumps({"method": "best", "metric": "m", "loss": 0.01, "experts": {"7/15": {"evidence": 0.5}}})
    )
    given = ("--profile", tmp_path / "profile", "--trace", tmp_path / "trace", "--plan", tmp_path / "plan")
    page = tmp_path / "p.html"
    facts = json.loads(farm("view", shipped, *given, "-o", page, "--json").stdout)
    assert facts["page"] == str(page) and "Importance of each expert" in page.read_text()
    assert facts["importance"][7][15] == 0.5 and facts["importance"][0][0] is None
    assert list(facts["paths"]) == ["1", "2", "3", "8"]
    tokens = sum(facts["paths"]["8"])
    assert sum(facts["paths"]["1"]) == 8 * tokens
    assert sum(sum(row) for row in facts["frequency"]) == pytest.approx(16)  # 8 layers, 2 experts a token
    alone = json.loads(farm("view", shipped, "--trace", tmp_path / "trace", "-o", page, "--json").stdout)
    assert alone["frequency"] and "flatters" in alone["coverage_source"]
    assert "is of a model with 8 layers of 16 experts" in refused("view", tiny, "--trace", tmp_path / "trace")
    assert "the plan is of another model" in refused("view", tiny, "--plan", tmp_path / "plan")
    assert "not a plan" in refused("view", shipped, "--plan", tmp_path / "t.txt")
