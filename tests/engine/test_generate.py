from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine.codec import to_json
from engine.container import Container
from engine.device import meters
from engine.device.facts import device_facts
from engine.errors import DeadlineError, RequestError
from engine.experts.profile import PathProfile
from engine.generate import Engine, run
from engine.models.mixtral import PREFILL_CHUNK
from engine.protocol import Passage, RunRequest, Sampling, decode_event
from engine.sampling import Sampler
from engine.strategies import STRATEGIES

ENGINE_FOLDER = Path(engine.__file__).parent


@pytest.fixture
def full(container: Container) -> Any:
    made = Engine(container, STRATEGIES["full-load"])
    yield made
    made.close()


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(full: Engine) -> None:
    tokens = np.random.default_rng(0).integers(0, 96, 40)
    whole = full.model.forward(tokens, full.model.start(40), full.supply, every_position=True)
    state = full.model.start(40)
    pieces = [
        full.model.forward(tokens[a:b], state, full.supply, every_position=True) for a, b in ((0, 7), (7, 8), (8, 40))
    ]
    assert np.abs(np.concatenate(pieces) - whole).max() < 2e-5 * np.abs(whole).max()
    assert PREFILL_CHUNK > 40


def test_a_long_prompt_goes_through_in_chunks(full: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 96, 50)
    whole = full.model.forward(tokens, full.model.start(50), full.supply, every_position=True)
    monkeypatch.setattr("engine.models.mixtral.PREFILL_CHUNK", 16)
    chunked = full.model.forward(tokens, full.model.start(50), full.supply, every_position=True)
    assert np.abs(chunked - whole).max() < 2e-5 * np.abs(whole).max()


def test_positions_and_tokens_out_of_range_are_refused(full: Engine) -> None:
    with pytest.raises(RequestError, match="shorten the prompt"):
        full.generate((1,) * 60, 5, Sampling())
    for token in (96, -1):
        with pytest.raises(RequestError, match="between 0 and 95"):
            full.model.forward(np.array([token]), full.model.start(4), full.supply)


def test_one_seed_gives_one_text_and_another_seed_another(full: Engine) -> None:
    def text(**sampling: Any) -> tuple[int, ...]:
        return full.generate((1, 2, 3), 24, Sampling(**sampling))[0]

    assert text(temperature=1.0, seed=5) == text(temperature=1.0, seed=5)
    assert text(temperature=1.0, seed=5) != text(temperature=1.0, seed=6)
    assert text(temperature=1.0, top_p=1e-9, seed=5) == text()


def test_sampling_follows_the_distribution() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    sampler = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=1))
    drawn = np.bincount([sampler.choose(np.log(probabilities)) for _ in range(20000)], minlength=4) / 20000
    assert np.abs(drawn - probabilities).max() < 0.02
    nucleus = Sampler(Sampling(temperature=1.0, top_p=0.7, seed=1))
    drawn = np.bincount([nucleus.choose(np.log(probabilities)) for _ in range(20000)], minlength=4) / 20000
    assert np.abs(drawn - [2 / 3, 1 / 3, 0, 0]).max() < 0.02
    assert Sampler(Sampling()).choose(np.array([0.0, 3.0, 3.0])) == 1


def test_the_deadline_ends_a_generation(full: Engine) -> None:
    with pytest.raises(DeadlineError, match="deadline"):
        full.generate((1, 2), 40, Sampling(), deadline=full.clock())


# --- as a process ---------------------------------------------------------------------------------------------------


def start(
    *arguments: str, python: str = sys.executable, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        [python, "-m", "engine", *arguments], cwd=folder or ENGINE_FOLDER.parent, env=environment,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def request(model: Container, tmp_path: Path, **changes: Any) -> Path:
    made = RunRequest(
        run_id="test", container=model.path, strategy="full-load", prompts=((1, 2, 3), (4, 5)), max_new_tokens=6,
        warmups=1, repetitions=2,
    )  # fmt: skip
    path = tmp_path / "request.json"
    path.write_text(json.dumps({**to_json(made), **changes}))
    return path


def test_a_run_emits_its_events(container: Container, profile: PathProfile, tmp_path: Path) -> None:
    profile.save(str(tmp_path / "profile.json"))
    tokens = set()
    for strategy in STRATEGIES.values():
        changes = {"strategy": strategy.name, "profile": str(tmp_path / "profile.json")}
        result = start("run", "--request", str(request(container, tmp_path, **changes)))
        assert result.returncode == 0, result.stderr
        events = [decode_event(line) for line in result.stdout.splitlines()]
        assert [e for e, _ in events] == ["started", "loaded"] + ["sample"] * 6 + ["finished"]
        samples = [content["sample"] for event, content in events if event == "sample"]
        assert [(s.warmup, s.repetition, s.prompt) for s in samples] == [
            (True, 0, 0), (True, 0, 1), (False, 0, 0), (False, 0, 1), (False, 1, 0), (False, 1, 1),
        ]  # fmt: skip
        if strategy.lossless:
            tokens.add(tuple(s.tokens for s in samples))
        load = events[1][1]["load"]
        assert load.strategy == strategy.parts()
        assert load.page_cache_resident_fraction is not None
        assert load.page_cache_resident_fraction < 0.01  # cold was asked for
        assert load.expert_bytes == (12 * 16384 if strategy.residency == "all" else 0)
        assert events[-1][1]["totals"].peak_resident_bytes > 10 << 20
        assert all(0 <= s <= t for x in samples for s, t in zip(x.steps.stall_s, x.steps.time_s, strict=True))
    assert len(tokens) == 1


def test_passages_are_predicted_after_all_that_is_timed(container: Container, profile: PathProfile) -> None:
    """Nats are as decoding would see them: the sum over a text's tokens, however experts are had."""
    passages = (Passage((1, 2, 3), (4, 5, 6, 7)), Passage((9,), (8,)))
    made = RunRequest("r", container.path, "full-load", ((1, 2),), 2, passages=passages)
    found = {}
    for name in ("full-load", "edgemoe", "edgemoe-oracle"):
        events = []
        path = profile_file(profile, container)
        run(replace(made, strategy=name, profile=path), lambda event, **content: events.append((event, content)))  # noqa: B023
        assert [event for event, _ in events] == ["loaded", "sample", "finished"]
        found[name] = events[-1][1]["totals"].passage_nats
    whole = Engine(container, STRATEGIES["full-load"])
    tokens = np.array(passages[0].prompt + passages[0].continuation[:-1])
    logits = whole.model.forward(tokens, whole.model.start(9), whole.supply, every_position=True)[2:].astype(np.float64)
    whole.close()
    expected = sum(np.log(np.exp(row).sum()) - row[token] for row, token in zip(logits, (4, 5, 6, 7), strict=True))
    assert found["full-load"][0] == pytest.approx(expected, rel=1e-5)
    assert len(found["full-load"]) == 2
    for nats in found.values():
        assert nats == pytest.approx(found["full-load"], rel=1e-5)


def profile_file(profile: PathProfile, container: Container) -> str:
    path = Path(container.path).with_name("profile.json")
    profile.save(str(path))
    return str(path)


def test_a_warm_page_cache_is_warm(container: Container, tmp_path: Path) -> None:
    result = start("run", "--request", str(request(container, tmp_path, page_cache="warm", strategy="naive-swap")))
    loaded = decode_event(result.stdout.splitlines()[1])[1]["load"]
    assert loaded.page_cache_resident_fraction == 1.0


@pytest.mark.parametrize(
    ("changes", "kind", "status", "words"),
    [
        ({"strategy": "magic"}, "request", 2, "full-load"),
        ({"container": "/nowhere.emoe"}, "container", 3, "/nowhere.emoe"),
        ({"prompts": [[95, 96]]}, "request", 2, "between 0 and 95"),
        ({"prompts": []}, "protocol", 2, "prompts"),
        ({"surprise": 1}, "protocol", 2, "surprise"),
        ({"max_new_tokens": 1000}, "request", 2, "positions"),
        ({"passages": [{"prompt": [1], "continuation": [96]}]}, "request", 2, "between 0 and 95"),
        ({"passages": [{"prompt": [1], "continuation": []}]}, "protocol", 2, "continuation is empty"),
        ({"strategy": "edgemoe"}, "request", 2, "profile"),
        ({"deadline_s": 1e-6}, "deadline", 6, "deadline"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_bad_request_is_one_line(
    container: Container, tmp_path: Path, changes: dict[str, Any], kind: str, status: int, words: str
) -> None:
    result = start("run", "--request", str(request(container, tmp_path, **changes)))
    assert result.returncode == status
    event, content = decode_event(result.stdout.splitlines()[-1])
    assert (event, content["kind"]) == ("failed", kind)
    assert words in content["message"]
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_a_request_that_is_no_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{")
    assert start("run", "--request", str(tmp_path / "r.json")).returncode == 2
    result = start("run", "--request", str(tmp_path / "none.json"))
    assert (result.returncode, "none.json" in result.stderr) == (2, True)


def test_generate_and_probe_and_strategies_on_the_command_line(container: Container) -> None:
    result = start("generate", container.path, "--tokens", "1,2,3", "--max-new", "4", "--strategy", "naive-swap")
    answer = json.loads(result.stdout)
    assert len(answer["tokens"]) == len(answer["sample"]["steps"]["time_s"]) == 4
    assert start("generate", container.path, "--tokens", "1,x").returncode == 2
    facts = json.loads(start("probe").stdout)
    assert facts["machine"] == os.uname().machine
    assert facts["numpy"] == np.__version__
    assert [s["name"] for s in json.loads(start("strategies").stdout)] == list(STRATEGIES)


def interpreters() -> list[tuple[str, str]]:
    """Pythons on this machine that an edge device may have, with the name of each."""
    found = {}
    for minor in range(8, 16):
        candidates = [shutil.which(f"python3.{minor}")]
        candidates += [str(p) for p in sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))]
        for candidate in candidates:
            if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
                found[f"3.{minor}"] = candidate
    return list(found.items())


@pytest.fixture(scope="module")
def engine_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine as it is deployed: its folder, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("device")
    shutil.copytree(ENGINE_FOLDER, folder / "engine", ignore=shutil.ignore_patterns("offline", "__pycache__"))
    return folder


def test_the_engine_alone_passes_its_self_test(engine_alone: Path) -> None:
    result = start("selftest", folder=engine_alone)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [json.loads(line)["ok"] for line in result.stdout.splitlines()] == [True] * 3


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_engine_runs_on_old_and_new_pythons(
    engine_alone: Path, tmp_path_factory: pytest.TempPathFactory, which: str
) -> None:
    """With the numpy of its time: 3.8 gets 1.24, the newest gets the newest."""
    known = interpreters()
    if which == "oldest" and (not known or known[0][0] != "3.8"):
        pytest.skip("no Python 3.8 on this machine: the engine's oldest Python is not tested here")
    if which == "newest" and (not known or tuple(map(int, known[-1][0].split("."))) <= sys.version_info[:2]):
        pytest.skip("no Python newer than the one that runs the tests is on this machine")
    version, python = known[0 if which == "oldest" else -1]
    folder = tmp_path_factory.mktemp(f"python{version}")
    subprocess.run([python, "-m", "venv", str(folder)], check=True, timeout=120)
    pip = subprocess.run(
        [folder / "bin/pip", "install", "-q", "--only-binary", ":all:", "numpy"],
        capture_output=True,
        timeout=280,
        check=False,
    )
    if pip.returncode:
        pytest.skip(f"no numpy wheel for Python {version} can be installed here")
    result = start("selftest", python=str(folder / "bin/python"), folder=engine_alone)
    assert result.returncode == 0, result.stdout + result.stderr
    assert start("--version", python=str(folder / "bin/python"), folder=engine_alone).returncode == 0


def test_meters_know_this_machine(tmp_path: Path) -> None:
    facts = device_facts()
    assert facts.blas is not None
    assert (facts.memory_bytes or 0) > 1 << 28
    assert meters.peak_resident_bytes() is not None
    assert meters.major_faults() is not None
    path = tmp_path / "file"
    path.write_bytes(b"x" * (64 * facts.page_bytes))
    meters.evict_from_page_cache(str(path))
    cold = meters.page_cache_resident_fraction(str(path))
    meters.read_into_page_cache(str(path))
    warm = meters.page_cache_resident_fraction(str(path))
    assert (cold, warm) == (0.0, 1.0)
    assert meters.page_cache_resident_fraction(str(tmp_path / "none")) is None
