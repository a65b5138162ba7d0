"""The plan: which cells, in which order, and what is asked of the engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from device_inventory import Device
from engine.protocol import ExpertBudget, Passage
from harness.errors import UsageError
from harness.sweep.plan import emulated_conditions, make_request, memory_limit_bytes
from reports.records import run_id


def test_every_cell_is_measured_once_in_each_block(bench) -> None:
    plan = bench.plan(devices=("pi4", "pi5"))
    counts = Counter(m.key for m in plan.measurements)
    # full-load and naive-swap have no buffer, so budgets do not multiply them
    assert len(plan.measurements) == 2 * 2 * (1 + 1 + 2)
    assert set(counts.values()) == {1}
    budgets = {(m.cell.strategy, m.cell.expert_budget) for m in plan.measurements}
    assert budgets == {
        ("full-load", "default"), ("naive-swap", "default"), ("edgemoe", "4-experts"), ("edgemoe", "8-experts"),
    }  # fmt: skip


def test_blocks_are_interleaved_and_each_arm_takes_each_place(bench) -> None:
    text = bench.plan().matrix.toml.replace("blocks = 2", "blocks = 4")
    plan = bench.plan(text)
    blocks = [m.block for m in plan.measurements]
    assert blocks == sorted(blocks)
    order = [[(m.cell.strategy, m.cell.expert_budget) for m in plan.measurements if m.block == b] for b in range(4)]
    for place in range(4):
        assert len({arms[place] for arms in order}) == 4


def test_the_order_is_that_of_the_seed(bench) -> None:
    def order(seed: int) -> list[str]:
        return [m.cell.key for m in bench.plan(f"seed = {seed}\n" + bench.plan().matrix.toml).measurements]

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [('["all"]', ["pi4", "pi5", "orin"]), ('["tag:pi"]', ["pi4", "pi5"]), ('["orin", "pi4"]', ["pi4", "orin"])],
)
def test_devices_are_chosen_by_name_or_tag(bench, selectors: str, expected: list[str]) -> None:
    plan = bench.plan(f"devices = {selectors}\n" + bench.plan().matrix.toml, ("pi4", "pi5", "orin"))
    assert [d.name for d in plan.devices] == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('devices = ["phone"]', ["unknown device 'phone'", "known: pi,"]),
        ('devices = ["tag:phone"]', ["no device has the tag 'phone'", "known tags: pi"]),
        ('device_expert_budgets = {phone = ["8-experts"]}', ["device_expert_budgets", "'phone'", "(pi)"]),
    ],
)
def test_what_the_inventory_does_not_have_is_named(bench, line: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        bench.plan(f"{line}\n" + bench.plan().matrix.toml)
    for word in words:
        assert word in str(error.value)


def test_a_strategy_must_be_known_and_have_its_profile(bench) -> None:
    toml = bench.plan().matrix.toml
    with pytest.raises(
        UsageError, match=r"unknown strategy 'edgemoe2' \(known: full-load, .*edgemoe, .*edgemoe-cacheaware\)"
    ):
        bench.plan(toml.replace('"edgemoe"', '"edgemoe2"'))
    with pytest.raises(UsageError, match=r"edgemoe needs a profile for container c.*model profile"):
        bench.plan(toml.replace('profile = "c.profile"\n', ""))


def test_a_device_may_have_budgets_of_its_own(bench) -> None:
    line = 'device_expert_budgets = {pi4 = ["2-experts"]}\n'
    plan = bench.plan(line + bench.plan().matrix.toml, ("pi4", "pi5"))
    budgets = {(m.cell.device, m.cell.expert_budget) for m in plan.measurements if m.cell.strategy == "edgemoe"}
    assert budgets == {("pi4", "2-experts"), ("pi5", "4-experts"), ("pi5", "8-experts")}


def test_answers_are_compared_by_tokens_and_sampling(bench) -> None:
    toml = bench.plan().matrix.toml
    same = bench.plan(toml).measurements[0].cell.workload_sha256
    assert bench.plan(toml.replace('"w"', '"v"')).measurements[0].cell.workload_sha256 == same
    assert bench.plan(toml.replace("a text", "a test")).measurements[0].cell.workload_sha256 != same
    assert bench.plan(toml + "temperature = 1.0\n").measurements[0].cell.workload_sha256 != same


def test_a_text_without_tokens_is_refused(bench) -> None:
    with pytest.raises(UsageError, match="workload w: prompt 0 gives no token in container c"):
        bench.plan(tokenise=lambda path, text: ())


def test_what_is_done_is_left_out(bench) -> None:
    plan = bench.plan(devices=("pi4", "pi5"))
    done = {m.key for m in plan.of_device("pi4")} | {plan.of_device("pi5")[0].key}
    left = plan.without(done)
    assert [d.name for d in left.devices] == ["pi5"]
    assert left.measurements == plan.of_device("pi5")[1:]


def test_the_request_says_all_that_the_matrix_says(bench) -> None:
    lines = 'reader = "mmap"\nlanes = 2\nthreads = 2\ndeadline_s = 9\nbackend = "numpy"\npage_caches = ["warm"]\n'
    plan = bench.plan(lines + bench.plan().matrix.toml + "stop_at_eos = true\ntemperature = 0.5\nseed = 7\n")
    measurement = next(m for m in plan.measurements if m.cell.expert_budget == "8-experts")
    device = Device("pi", "h", emulated_read_bytes_per_s=43e6)
    request = make_request(measurement, plan.matrix, device, identity="i", container="store/c", profile="store/p")
    assert (request.run_id, request.container, request.profile) == ("i", "store/c", "store/p")
    assert (request.reader, request.lanes, request.threads, request.deadline_s, request.backend) == (
        "mmap",
        2,
        2,
        9.0,
        "numpy",
    )
    assert (request.page_cache, request.warmups, request.repetitions, request.max_new_tokens) == ("warm", 0, 2, 3)
    assert request.expert_budget == ExpertBudget(experts=8)
    assert request.prompts == (tuple(b"a text"), tuple(b"another"))
    assert request.stop_at_eos
    assert (request.sampling.temperature, request.sampling.seed) == (0.5, 7)
    assert request.emulated_read_bytes_per_s == 43e6
    assert emulated_conditions(device) == ("storage limited to 43 MB/s by the engine",)
    assert emulated_conditions(Device("pi", "h")) == ()


def test_passages_go_to_every_run_of_their_container(bench) -> None:
    passages = (Passage((1,), (2, 3)),)
    plan = bench.plan(passages={"c": passages})
    for measurement in plan.measurements:
        request = make_request(measurement, plan.matrix, Device("pi", "h"), identity="i", container="c", profile=None)
        assert request.passages == passages


def test_run_ids_are_stable_and_distinct() -> None:
    ids = {run_id("s", cell, block, attempt) for cell in "ab" for block in (0, 1) for attempt in (0, 1)}
    assert len(ids) == 8
    assert run_id("s", "a", 0, 0) in ids
    assert all(Path(i).name == i and len(i) < 100 for i in ids)


@pytest.mark.parametrize(
    ("matrix", "device", "limit"),
    [(None, None, None), ("64MiB", None, 64 << 20), ("64MiB", "32 MiB", 32 << 20), ("64MiB", "none", None)],
)
def test_a_device_may_have_a_memory_limit_of_its_own(bench, matrix, device, limit) -> None:
    plan = bench.plan((f'memory_limit = "{matrix}"\n' if matrix else "") + bench.plan().matrix.toml)
    assert memory_limit_bytes(plan.matrix, Device("pi", "h", memory_limit=device)) == limit


def test_a_memory_limit_of_nothing_is_refused(bench) -> None:
    with pytest.raises(UsageError, match="device pi: memory_limit '5' must be at least 1 MiB"):
        memory_limit_bytes(bench.plan().matrix, Device("pi", "h", memory_limit="5"))
