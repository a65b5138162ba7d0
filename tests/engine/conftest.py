from __future__ import annotations

import pytest

from engine.container import Container
from engine.experts.profile import PathProfile
from engine.quantize import Format
from engine.selftest import profile_of, write_random_model


@pytest.fixture(scope="session")
def container(tmp_path_factory: pytest.TempPathFactory) -> Container:
    """A small random Mixtral in four formats, fp16 the primary one: 3 layers of 4 experts, top-2."""
    path = str(tmp_path_factory.mktemp("model") / "tiny.emoe")
    write_random_model(path, [Format("fp16"), *(Format(p, 32, symmetric=False) for p in ("int8", "int4", "int2"))])
    return Container.open(path)


@pytest.fixture(scope="session")
def profile(container: Container) -> PathProfile:
    return profile_of(container)
