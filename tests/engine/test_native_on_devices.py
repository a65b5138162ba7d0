"""Every native library for ARM, on the C libraries that devices have, under qemu's user emulation.

musl has no Python that could be had here: there a program of ours does what ctypes does elsewhere.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.kernels import Kernels, native
from engine.quantize import Format, MatrixShape, Packed, RecordLayout
from engine.selftest import all_formats
from tests.devices import userland
from tests.devices.userland import EMULATORS, HIDDEN_BY_ANDROID, emulated, need, packages, show

DRIVER = Path(__file__).parent / "native_cases.c"
ENGINE = Path(native.__file__).parents[1]
LIBRARIES = {  # and a processor that has what it needs, and no more
    "aarch64-neon": ("arm64", "cortex-a72"),
    "aarch64-dotprod": ("arm64", "cortex-a76"),
    "armv7-neon": ("armhf", "cortex-a7"),
}
AT_LEISURE = (pytest.mark.devices, pytest.mark.timeout(1000))
IN_A_HURRY = {("aarch64-neon", "arithmetic"), ("termux", "arithmetic")}
MUSL = {"arm64": ("aarch64-linux-musl", "ld-musl-aarch64"), "armhf": ("arm-linux-musleabihf", "ld-musl-armhf")}


def test_no_library_for_arm_is_forgotten() -> None:
    built = {path.stem for path in Path(native.FOLDER).glob("*.so") if not path.stem.startswith("x86_64")}
    assert built == set(LIBRARIES)


# --- musl -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices and experts in every format, inputs, and what numpy makes of them; see native_cases.c."""
    random, count, content = np.random.default_rng(0), 0, bytearray()

    def add(names: tuple[str, ...], fmt: Format, rows: int, columns: int, n: int) -> None:
        nonlocal count
        shapes = [MatrixShape(name, rows, columns) for name in names[:-1] or names]
        shapes += [MatrixShape(names[-1], columns, rows)] if names[1:] else []
        layout = RecordLayout.of(fmt, shapes)
        weights = {s.name: random.standard_normal((s.rows, s.columns)).astype(np.float32) for s in shapes}
        packed = layout.unpack(layout.pack(weights))
        x = random.standard_normal((n, columns)).astype(np.float32)
        kernels = Kernels()
        given = {1: lambda: kernels.product(packed["w"], x), 2: lambda: kernels.relu_ffn(packed, x),
                 3: lambda: kernels.swiglu(packed, x)}[len(names)]()  # fmt: skip
        content.extend(np.array([len(names), n], "<i4").tobytes())
        for name in names:
            content.extend(_as_in_c(packed[name]))
        content.extend(x.tobytes() + np.ascontiguousarray(given, np.float32).tobytes())
        count += 1

    for fmt in all_formats():
        add(("w",), fmt, 45, 100, 1)
        add(("gate", "up", "down"), fmt, 45, 70, 2)
        add(("wi", "wo"), fmt, 45, 70, 1)
    add(("gate", "up", "down"), Format("int4", 32), 512, 256, 2)  # large enough to be shared between threads
    path = tmp_path_factory.mktemp("cases") / "cases"
    path.write_bytes(np.array([count], "<i4").tobytes() + content)
    return path


def _as_in_c(view: Packed) -> bytes:
    matrix, content = native._matrix(view), b""
    for array in (view.codes, view.high, view.scales, view.offsets):
        part = b"" if array is None else array.tobytes()
        content += np.array([len(part)], "<i4").tobytes() + part
    return np.array([matrix.precision, matrix.rows, matrix.columns, matrix.group], "<i4").tobytes() + content


@pytest.mark.parametrize("library", LIBRARIES)
def test_musl_s_own_loader_loads_it_and_results_are_numpy_s(library: str, cases: Path, tmp_path: Path) -> None:
    architecture, processor = LIBRARIES[library]
    target, loader = MUSL[architecture]
    need(EMULATORS[architecture])
    root, driver = packages(architecture, "musl"), tmp_path / "native_cases"
    # -dynamic: zig links musl into the program unless it is told not to.
    compiler = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-target",
        target,
        "-dynamic",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    built = subprocess.run([*compiler, "-o", driver, DRIVER], capture_output=True, text=True, timeout=200, check=False)
    assert built.returncode == 0, built.stderr
    assert f"/lib/{loader}.so.1".encode() in driver.read_bytes()
    for threads in (1, 3):
        ended = subprocess.run(
            [EMULATORS[architecture], "-cpu", processor, "-L", root, driver, f"{native.FOLDER}/{library}.so", cases,
             str(threads)], capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        count, error = ended.stdout.split()
        assert int(count) == 3 * len(all_formats()) + 1
        assert float(error) < 1e-4


# --- glibc ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with emulated(tmp_path_factory.mktemp("emulation") / "binfmt"):
        yield


# Of these ci/test has the two cheapest, and with musl every library; ci/foreign has them all.
@pytest.mark.parametrize(
    ("where", "check"),
    [
        pytest.param(where, check, marks=() if (where, check) in IN_A_HURRY else AT_LEISURE)
        for where in (*LIBRARIES, "termux")
        for check in ("arithmetic", "strategies", "damage")
    ],
)
def test_the_self_test_passes_in_a_device_s_userland(emulation: None, where: str, check: str, tmp_path: Path) -> None:
    library = "aarch64-dotprod" if where == "termux" else where
    architecture, processor = LIBRARIES[library]
    lived_in = userland.termux() if where == "termux" else userland.debian(architecture)
    face = show(tmp_path / "face", processor, denied=HIDDEN_BY_ANDROID if where == "termux" else ())
    home = tmp_path / "home"
    shutil.copytree(ENGINE, home / "engine", ignore=shutil.ignore_patterns("offline", "__pycache__"))
    lived_in.own(home)
    inside = ["env", f"QEMU_CPU={processor}", "python3", "-m", "engine", "selftest", check]
    ended = subprocess.run(
        lived_in.command(face, home, *inside), capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (said,) = [json.loads(line) for line in ended.stdout.splitlines()]
    assert (said["check"], said["ok"]) == (check, True)
    assert check != "arithmetic" or f"native {library} " in said["detail"]
