"""The matrix file: what it says, and that every mistake in it is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import Settle
from harness.errors import UsageError
from harness.sweep.matrix import Matrix, Wanted, parse_matrix, read_matrix

SMALL = """
name = "m"
strategies = ["full-load", "edgemoe"]
[[containers]]
name = "c"
path = "c.emoe"
[[workloads]]
name = "w"
tokens = [[1, 2, 3]]
"""


def parse(text: str, folder: Path = Path("/nowhere")) -> Matrix:
    return parse_matrix(text, source="m.toml", folder=folder)


def test_what_is_not_said_has_a_default() -> None:
    matrix = parse(SMALL)
    assert matrix.baseline == "full-load"
    assert matrix.devices == ("all",)
    assert matrix.expert_budgets == ("default",)
    assert matrix.page_caches == ("cold",)
    assert matrix.workloads[0].tokens == ((1, 2, 3),)
    assert matrix.containers[0].path == Path("/nowhere/c.emoe")
    assert matrix.toml == SMALL


def test_limits_and_conditions() -> None:
    matrix = parse(SMALL)
    assert (matrix.memory_limit_bytes, matrix.conditions) == (None, Wanted())
    text = (
        'memory_limit = "512 MiB"\n'
        + SMALL
        + '[conditions]\nmax_wait_s = 5\nmax_load = 0.5\ngovernor = "performance"\n'
    )
    matrix = parse(text)
    assert matrix.memory_limit_bytes == 512 << 20
    settle = matrix.conditions.settle(baseline_c=40.0)
    assert settle == Settle(5.0, 50.0, max_load=0.5, max_memory_pressure=0.2, governor="performance")
    assert matrix.conditions.settle(None).temperature_c is None


def test_budgets_have_one_spelling() -> None:
    matrix = parse('expert_budgets = ["16 MiB", "8-experts", "default"]\n' + SMALL)
    assert matrix.expert_budgets == ("16777216", "8-experts", "default")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", ["not TOML"]),
        ('memory_limit = "much"\n' + SMALL, ["memory_limit 'much'", "512MiB"]),
        ('memory_limit = "4 KiB"\n' + SMALL, ["at least 1 MiB"]),
        (SMALL + "[conditions]\nmax_wait = 5\n", ["conditions: unknown key 'max_wait'", "max_wait_s"]),
        (SMALL + "[conditions]\nmax_wait_s = -1\n", ["conditions: max_wait_s is -1"]),
        ("block = 3\n" + SMALL, ["unknown key 'block'", "known:", "blocks"]),
        (SMALL + 'slices = 2\n', ["workloads[0]", "unknown key 'slices'"]),
        (SMALL.replace('name = "m"', 'name = "a/b"'), ["name", "'a/b'"]),
        (SMALL.replace('name = "m"', ""), ["name is missing"]),
        (SMALL.replace('["full-load", "edgemoe"]', "[]"), ["strategies", "not empty"]),
        (SMALL.replace('"full-load", "edgemoe"', '"edgemoe", "edgemoe"'), ["'edgemoe' is given twice"]),
        ('baseline = "naive"\n' + SMALL, ["baseline", "'naive'", "full-load, edgemoe"]),
        ('reader = "aio"\n' + SMALL, ["reader", "'aio'", "auto, pread, direct, mmap"]),
        ("lanes = 3\n" + SMALL, ["lanes is 3", "to 2"]),
        ('page_caches = ["lukewarm"]\n' + SMALL, ["page_caches", "'lukewarm'", "cold, warm"]),
        ('expert_budgets = ["some"]\n' + SMALL, ["expert_budgets", "'some'", "8-experts"]),
        ('expert_budgets = ["1MiB", "1048576"]\n' + SMALL, ["'1048576' is given twice"]),
        ("blocks = 0\n" + SMALL, ["blocks is 0", "from 1"]),
        ("blocks = true\n" + SMALL, ["blocks must be a whole number"]),
        ("deadline_s = nan\n" + SMALL, ["deadline_s is nan"]),
        (SMALL.replace("[[1, 2, 3]]", "[[]]"), ["tokens", "none of them empty"]),
        (SMALL.replace("[[1, 2, 3]]", "[[-1]]"), ["'-1' is not a token id"]),
        (SMALL.replace("tokens = [[1, 2, 3]]", ""), ["prompts, text_file or tokens", "none"]),
        (SMALL + 'prompts = ["x"]\n', ["prompts, text_file or tokens", "prompts, tokens"]),
        (SMALL.replace("tokens = [[1, 2, 3]]", 'text_file = "x.txt"'), ["text_file /nowhere/x.txt", "No such file"]),
        ("accuracy = {tokens = 9}\n" + SMALL, ["accuracy", "text_file is missing"]),
        ('accuracy = {text_file = "x.txt"}\n' + SMALL, ["accuracy", "text_file /nowhere/x.txt", "No such file"]),
        ('accuracy = {text_file = "x.txt", context = 1}\n' + SMALL, ["accuracy", "context is 1", "from 2"]),
        (SMALL + '[[workloads]]\nname = "w"\ntokens = [[1]]\n', ["workloads", "'w' is given twice"]),
        (SMALL.replace("[[containers]]", "[[container]]"), ["containers", "[[containers]]"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        parse(text)
    message = str(error.value)
    assert message.startswith("m.toml")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_slices_are_spread_over_the_file_and_begin_with_a_line(tmp_path: Path) -> None:
    lines = [f"line {i} of the text\n" for i in range(100)]
    (tmp_path / "t.txt").write_text("".join(lines))
    workload = 'text_file = "t.txt"\nslices = 4\nslice_characters = 50'
    texts = parse(SMALL.replace("tokens = [[1, 2, 3]]", workload), tmp_path).workloads[0].texts
    assert len(set(texts)) == 4
    assert all(text.startswith("line ") and len(text) == 50 for text in texts)
    assert texts[0].startswith("line 0 ")
    assert int(texts[3].split()[1]) > 90


def test_a_text_that_is_too_short_says_so(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("short")
    workload = 'text_file = "t.txt"\nslices = 2'
    with pytest.raises(UsageError, match=r"has 5 characters.*lower slices"):
        parse(SMALL.replace("tokens = [[1, 2, 3]]", workload), tmp_path)


def test_the_text_of_the_accuracy_is_read_as_far_as_its_tokens_may_reach(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("word " * 1000)
    accuracy = parse('accuracy = {text_file = "t.txt", tokens = 8}\n' + SMALL, tmp_path).accuracy
    assert accuracy is not None
    assert (accuracy.tokens, accuracy.context) == (8, 128)
    assert accuracy.text == ("word " * 1000)[:256]
    assert parse(SMALL).accuracy is None


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml: the matrix cannot be read: No such file"):
        read_matrix(tmp_path / "absent.toml")


VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-5, 1 << 70), st.floats(), st.sampled_from(["", "all", "cold", "8-experts"])),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
KEYS = ("name", "baseline", "devices", "strategies", "expert_budgets", "page_caches", "reader", "lanes", "threads",
        "blocks", "deadline_s", "seed", "surprise")  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_anything_else_is_a_usage_error_too(changes: dict[str, object]) -> None:
    """Whatever TOML a stranger writes, the answer is a Matrix or a UsageError."""
    rest = SMALL[SMALL.index("[[") :]
    given_keys = {"name": "m", "strategies": ["full-load"], **changes}
    text = "".join(f"{key} = {toml(value)}\n" for key, value in given_keys.items()) + rest
    try:
        matrix = parse(text)
    except UsageError as error:
        assert str(error).startswith("m.toml")
    else:
        assert "surprise" not in changes
        assert matrix.blocks >= 1


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)
