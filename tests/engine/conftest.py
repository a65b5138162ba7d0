from __future__ import annotations

import pytest

from engine.container import Container
from engine.experts.profile import PathProfile
from engine.quantize import Format
from engine.selftest import selftest_profile, write_random_model

FORMATS = [Format("fp16"), *(Format(p, 32, symmetric=False) for p in ("int8", "int4", "int2"))]


@pytest.fixture(scope="session")
def container(tmp_path_factory: pytest.TempPathFactory) -> Container:
    """A small random Mixtral in four formats, fp16 the primary one: 3 layers of 4 experts, top-2."""
    path = str(tmp_path_factory.mktemp("model") / "tiny.emoe")
    write_random_model(path, FORMATS)
    return Container.open(path)


@pytest.fixture(scope="session")
def profile(container: Container) -> PathProfile:
    return selftest_profile(container)


@pytest.fixture(scope="session")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Container:
    """A small random Switch Transformer in the same formats: 1 MoE layer in the encoder, 3 in the decoder."""
    path = str(tmp_path_factory.mktemp("model") / "switch.emoe")
    write_random_model(path, FORMATS, architecture="switch_transformers")
    return Container.open(path)


@pytest.fixture(scope="session")
def switch_profile(switch: Container) -> PathProfile:
    return selftest_profile(switch)
