"""Two nights of the model that ships with the farm, over SSH; in the second a strategy is slower on one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import harness.demo
from engine.offline.accuracy.model import counting_model
from engine.offline.importing.importer import import_checkpoint
from engine.offline.routing.activations import profile_texts
from engine.offline.tokenizer import Tokenizer
from harness.demo.loopback import Emulated, LoopbackFarm
from harness.device.trust import trust
from tests import command_line

SHIPPED = Path(harness.demo.__file__).parent
DEVICES = [Emulated("pi4b-emulated", 43e6), Emulated("jetson-tx2-emulated", 200e6)]
MATRIX = """
name = "real"
baseline = "naive-swap"
strategies = ["naive-swap", "edgemoe"]
expert_budgets = ["32-experts"]
reader = "pread"
warmups = 0
repetitions = 1
blocks = 3
[[containers]]
name = "mix16"
path = "mix16.emoe"
profile = "mix16.profile.json"
[[workloads]]
name = "novel"
text_file = "prompts.txt"
slices = 2
slice_characters = 300
max_new_tokens = 24
"""


@pytest.fixture
def user(tmp_path: Path) -> Path:
    import_checkpoint(SHIPPED / "mix16", tmp_path / "mix16.emoe")
    text = (SHIPPED / "texts" / "novel.train.txt").read_text(encoding="utf-8")[:20_000]
    with counting_model(str(tmp_path / "mix16.emoe")) as model:
        tokens = Tokenizer.from_container(str(tmp_path / "mix16.emoe")).encode(text)
        profile_texts(model, [tokens]).save(str(tmp_path / "mix16.profile.json"))
    (tmp_path / "prompts.txt").write_bytes((SHIPPED / "texts" / "novel.val.txt").read_bytes())
    (tmp_path / "matrix.toml").write_text(MATRIX)
    (tmp_path / "nightly.toml").write_text('name = "real"\nmatrix = "matrix.toml"\nbaseline = "main"\n')
    return tmp_path


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_a_tenth_slower_is_found_the_first_night(user: Path) -> None:
    with LoopbackFarm(user / "devices", DEVICES) as inventory:
        text = "version = 1\n"
        for device in inventory.devices.values():
            list(trust(device, user / "known_hosts", lambda key: True))
            text += (
                f'[devices.{device.name}]\nhost = "{device.host}"\nport = {device.port}\nuser = "{device.user}"\n'
                f'identity_file = "{device.identity_file}"\npython = "{device.python}"\n'
                f"emulated_read_bytes_per_s = {device.emulated_read_bytes_per_s}\n"
            )
        (user / "devices.toml").write_text(text)
        assert farm(user, "run", "matrix.toml")[0] == 0
        assert farm(user, "baseline", "pin", "main")[0] == 0
        slower = "edgemoe@pi4b-emulated=0.10"
        code, out, err = farm(user, "nightly", "nightly.toml", "--json", EDGEMOE_TEST_DELAY=slower)
    print(err)  # what was measured again, and why
    night: dict[str, Any] = json.loads(out.splitlines()[-1])
    print(json.dumps(night["findings"], indent=2))
    assert code == night["exit_code"] == 1
    regressions = [f for f in night["findings"] if f["kind"] == "regression"]
    assert {(f["device"], f["strategy"]) for f in regressions} == {("pi4b-emulated", "edgemoe")}
    assert "tpot_s" in {f["metric"] for f in regressions}


def farm(user: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    hosts = str(user / "known_hosts")
    process = command_line.start(user, *arguments, EDGEMOE_FARM_KNOWN_HOSTS=hosts, **environment)
    return command_line.finish(process, timeout_s=1000)
