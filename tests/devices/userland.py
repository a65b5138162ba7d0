"""The userlands of devices, on this machine: their file systems and programs, under qemu's user emulation.

What they are true to: the processor's instructions, packages, paths, users, and what /proc and /sys show or hide. What
they are not: speed, and the kernel, which is this machine's. They are made of Debian's packages, which are extracted
and never configured, once, in build/userlands; each use enters one in namespaces of its own and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "build" / "userlands"
ENTER = Path(__file__).parent / "enter.sh"
EMULATORS = {"arm64": "qemu-aarch64-static", "armhf": "qemu-arm-static"}
PACKAGES = (
    "base-files,base-passwd,bash,busybox-static,coreutils,dash,findutils,grep,hostname,libc-bin,libgfortran5,"
    "openssh-server,procps,python3,python3-numpy,sed,util-linux"
)
# Of the start of an ELF file: class, order of bytes and version; then that it is a program, and for which machine.
_ELF = {"arm64": (b"\x02\x01\x01", b"\x02\x00\xb7\x00"), "armhf": (b"\x01\x01\x01", b"\x02\x00\x28\x00")}


def need(*programs: str) -> None:
    """Skips the test where it cannot be run, saying why."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to enter a root file system and to mount what belongs there")
    if platform.system() != "Linux":
        pytest.skip("needs Linux")
    for program in programs:
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            pytest.skip(f"{program} is not installed: apt install {PROVIDERS.get(program, program)}")


PROVIDERS = {
    "depmod": "kmod",
    "ip": "iproute2",
    "losetup": "mount",
    "qemu-aarch64-static": "qemu-user-static",
    "qemu-arm-static": "qemu-user-static",
    "qemu-system-aarch64": "qemu-system-arm",
    "sshd": "openssh-server",
    "mke2fs": "e2fsprogs",
    "mkfs.ext4": "e2fsprogs",
}


@dataclass(frozen=True)
class Userland:
    """A root file system, and how a user of it lives there."""

    root: Path
    home: str
    uid: int
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, face: Path, home: Path, *arguments: str, as_root: bool = False) -> list[str]:
        """The command line that runs `arguments` in there; with it ends whatever they started.

        face: what the device shows, with folders proc and sys; home: the folder out here that is the home in there.
        """
        scratch = face / "scratch"
        scratch.mkdir(exist_ok=True)
        uid = 0 if as_root else self.uid
        return [
            *("/usr/bin/env", "-i", *(f"{name}={value}" for name, value in self.environment.items())),
            *("/usr/bin/unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "/bin/sh"),
            *(str(ENTER), str(self.root), str(scratch), str(face), f"{self.home}={home}", f"{uid}:{uid}"),
            *("sh", "-c", 'cd -- "$0" && exec "$@"', self.home, *arguments),
        ]

    def own(self, folder: Path) -> None:
        """Hands a folder over to the user in there."""
        for path in (folder, *folder.rglob("*")):
            os.chown(path, self.uid, self.uid, follow_symlinks=False)


def packages(architecture: str, names: str, finish: Callable[[Path], None] = lambda root: None) -> Path:
    """The folder with the contents of Debian packages, and of what they depend on, once `finish` has been at it."""
    need("mmdebstrap")
    recipe = f"2 bookworm {architecture} {names}"
    root = FOLDER / f"{architecture}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not root.exists():
        targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
        archives = subprocess.run(targets, capture_output=True, text=True, timeout=60, check=True).stdout.split()
        archive = next((name for name in archives if "security" not in name), "http://deb.debian.org/debian")
        with _unfinished(root) as folder:
            made = subprocess.run(
                ["mmdebstrap", "--quiet", f"--architectures={architecture}", "--variant=extract", f"--include={names}",
                 "bookworm", str(folder), archive], capture_output=True, text=True, timeout=280, check=False,
            )  # fmt: skip
            if made.returncode != 0:
                reason = (made.stderr.strip().splitlines() or ["no reason given"])[-1]
                pytest.skip(f"Debian's {architecture} packages cannot be had here: {reason}")
            finish(folder)
    return root


def debian(architecture: str) -> Userland:
    """Debian 12 with Python, numpy and OpenSSH, and a user `pi`."""
    need(EMULATORS[architecture])
    root = packages(architecture, PACKAGES, _configure)
    return Userland(root, "/home/pi", 1000, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"})


def _configure(root: Path) -> None:
    """What the packages' own scripts would have done, as far as it is needed: none of them was run."""
    (libraries,) = (root / "usr/lib").glob("*-linux-gnu*")
    for name in ("blas", "lapack"):
        (libraries / f"lib{name}.so.3").symlink_to(f"{name}/lib{name}.so.3")
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/bash\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\npi:x:1000:1000::/home/pi:/bin/bash\n"
    )
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\npi:x:1000:\n")
    (root / "etc/shadow").write_text("root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\npi:*:19000:0:99999:7:::\n")
    for name in ("proc", "sys", "dev", "tmp", "run/sshd", "root", "home/pi"):
        (root / name).mkdir(mode=0o755, parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)


# --- Termux ---------------------------------------------------------------------------------------------------------

PREFIX = "/data/data/com.termux/files/usr"
TERMUX_HOME = "/data/data/com.termux/files/home"
TERMUX_UID = 10234
TERMUX_PORT = 8022
_TERMUX_PROGRAMS = """
    [ basename bash cat chmod cp cut date dd df dirname du echo env expr false find free grep head id kill ln ls mkdir
    mktemp mv nohup nproc printenv printf ps pwd readlink realpath rm rmdir sed seq setsid sha256sum sleep sort
    ssh-keygen stat sync tail taskset tee test timeout touch tr true uname uniq wc whoami xargs
"""
_SCRIPTS = {  # of Android and of the Termux:API package
    "/system/bin/getprop": """#!/system/bin/sh
case "$1" in
ro.product.model) echo "Pixel 6a" ;;
ro.build.version.release) echo 14 ;;
ro.soc.model) echo GS101 ;;
ro.product.cpu.abi) echo arm64-v8a ;;
*) echo ;;
esac
""",
    f"{PREFIX}/bin/termux-battery-status": f"""#!{PREFIX}/bin/sh
echo '{{"health": "GOOD", "percentage": 83, "plugged": "UNPLUGGED", "status": "DISCHARGING", "temperature": 31.2}}'
""",
    f"{PREFIX}/bin/termux-wake-lock": f"#!{PREFIX}/bin/sh\n",
}


def termux() -> Userland:
    """A look-alike of Termux on Android: its paths and its user, and no /usr, /lib or /tmp; glibc all the same."""
    need("patchelf")
    debian_root = debian("arm64").root
    root = debian_root.with_name(f"termux-2-{debian_root.name}")
    if not root.exists():
        with _unfinished(root) as folder:
            _make_termux(debian_root, folder)
    environment = {
        "PATH": f"{PREFIX}/bin",
        "PREFIX": PREFIX,
        "TMPDIR": f"{PREFIX}/tmp",
        "HOME": TERMUX_HOME,
        "LANG": "en_US.UTF-8",
        "TERMUX_VERSION": "0.118.0",
        "ANDROID_ROOT": "/system",
        "ANDROID_DATA": "/data",
    }
    return Userland(root, TERMUX_HOME, TERMUX_UID, environment)


def _make_termux(debian_root: Path, root: Path) -> None:
    prefix = root / PREFIX[1:]
    for name in ("bin", "lib", "libexec", "tmp", "etc"):
        (prefix / name).mkdir(parents=True)
    for name in ("system/bin", "system/etc", TERMUX_HOME[1:], "proc", "sys", "dev", "sdcard"):
        (root / name).mkdir(parents=True)
    (root / "bin").symlink_to("/system/bin")  # as on Android from 10 on
    (root / "etc").symlink_to("/system/etc")
    libraries = [*debian_root.glob("lib/*-linux-gnu"), *debian_root.glob("usr/lib/*-linux-gnu")]
    libraries += [folder / name for folder in libraries for name in ("blas", "lapack")]
    for library in (path for folder in libraries for path in folder.glob("*.so*") if path.is_file()):
        shutil.copy(library, prefix / "lib")
    for name in ("python3", "python3.11"):
        shutil.copytree(debian_root / "usr/lib" / name, prefix / "lib" / name, symlinks=True)
    for name in ("python3.11", "dash", *_TERMUX_PROGRAMS.split()):
        folder = "bin" if (debian_root / "bin" / name).exists() else "usr/bin"
        shutil.copy(debian_root / folder / name, prefix / "bin")
    shutil.copy(debian_root / "usr/sbin/sshd", prefix / "bin")
    for name, target in (("python3", "python3.11"), ("python", "python3.11"), ("sh", "dash")):
        (prefix / "bin" / name).symlink_to(target)
    shutil.copy(next((prefix / "lib").glob("ld-linux*")), root / "system/bin/linker64")
    shutil.copy(prefix / "bin/dash", root / "system/bin/sh")
    programs = [path for path in [*prefix.glob("bin/*"), root / "system/bin/sh"] if _is_elf(path)]
    modules = [
        path for path in prefix.glob("lib/**/*.so*") if _is_elf(path) and not path.name.startswith(("ld-", "libc.so"))
    ]
    patch = ["patchelf", "--force-rpath", "--set-rpath", f"{PREFIX}/lib"]
    subprocess.run([*patch, "--set-interpreter", "/system/bin/linker64", *programs], check=True, timeout=100)
    subprocess.run([*patch, *modules], check=True, timeout=200)
    (root / "system/etc/passwd").write_text(f"u0_a234:x:{TERMUX_UID}:{TERMUX_UID}::{TERMUX_HOME}:{PREFIX}/bin/bash\n")
    (root / "system/etc/group").write_text(f"u0_a234:x:{TERMUX_UID}:\n")
    for name, text in _SCRIPTS.items():
        (root / name[1:]).write_text(text)
        (root / name[1:]).chmod(0o755)
    Userland(root, TERMUX_HOME, TERMUX_UID).own(root / "data/data/com.termux")


def _is_elf(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


# --- making them ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f"{target.name}.{os.getpid()}.part")
    folder.mkdir()
    try:
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- what a device shows --------------------------------------------------------------------------------------------

CPU_FEATURES = {
    "cortex-a72": "fp asimd evtstrm crc32 cpuid",
    "cortex-a76": "fp asimd evtstrm crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc asimddp",
    "cortex-a7": "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt",
}


def show(face: Path, processor: str, model: str = "", denied: tuple[str, ...] = ()) -> Path:
    """The folder for what a device with this processor shows: the emulator alone would show this machine's.

    denied: files of /proc that the user may not read.
    """
    (face / "proc").mkdir(parents=True)
    (face / "sys").mkdir()
    text = "".join(f"processor\t: {n}\nFeatures\t: {CPU_FEATURES[processor]}\n\n" for n in range(2))
    (face / "proc/cpuinfo").write_text(text + (f"Model\t\t: {model}\n" if model else ""))
    for name in denied:
        (face / "proc" / name).touch(mode=0)
    return face


HIDDEN_BY_ANDROID = ("stat", "loadavg", "vmstat")  # of /proc, by its SELinux rules for apps


# --- emulation ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def emulated(mount_point: Path) -> Iterator[None]:
    """Lets this machine run programs of other processors, wherever something starts one, for as long as this lasts."""
    need(*EMULATORS.values())
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "binfmt_misc", "binfmt_misc", str(mount_point)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"this kernel cannot be told to run programs of other processors: {mounted.stderr.strip()}")
    entries = [
        entry for entry in mount_point.glob("edgemoe-farm-*") if not Path("/proc", entry.name.split("-")[-1]).exists()
    ]
    try:  # also to remove those that somebody left who was killed
        for architecture, emulator in EMULATORS.items():
            name = f"edgemoe-farm-{architecture}-{os.getpid()}"
            (mount_point / "register").write_bytes(_registration(name, architecture, f"/usr/bin/{emulator}"))
            entries.append(mount_point / name)
        yield
    finally:
        for entry in entries:
            entry.write_text("-1")
        subprocess.run(["umount", "-l", str(mount_point)], check=True)


def _registration(name: str, architecture: str, emulator: str) -> bytes:
    """See Documentation/admin-guide/binfmt-misc.rst; F: the emulator is opened now, and works in any root."""
    start, kind = _ELF[architecture]
    magic = b"\x7fELF" + start + bytes(9) + kind
    mask = b"\xff" * 7 + b"\x00" + b"\xff" * 8 + b"\xfe" + b"\xff" * 3
    escaped = ("".join(f"\\x{byte:02x}" for byte in part) for part in (magic, mask))
    return f":{name}:M::{':'.join(escaped)}:{emulator}:F".encode()
