"""Whole machines, emulated by qemu: a kernel, memory, storage and network of their own, and Debian's arm64 userland.

The root file system is an image that is made once; what is written to it is forgotten with the machine. The keys and
settings of its SSH server come with the initial RAM disk, which is made anew for each start.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.devices.userland import FOLDER, debian, need, packages

HOME = "/home/pi"
LABEL = "edgemoe"
_IMAGE_BYTES = 1 << 30  # a power of two: qemu's SD cards have no other sizes

# What mounts the root file system: busybox, and nothing else.
_INITIAL = f"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
for module in /modules/*.ko; do $b insmod $module; done
n=0
until root=$($b findfs LABEL={LABEL} 2>/dev/null) && [ -e /sys/class/net/eth0 -o -e /sys/class/net/usb0 ]; do
    n=$((n + 1))
    [ $n -lt 300 ] || exec $b poweroff -f
    $b sleep 0.2
done
for name in eth0 usb0; do $b ip link set $name up 2>/dev/null && $b ip address add 10.0.2.15/24 dev $name; done
$b ip link set lo up
$b mount -t ext4 -o noatime $root /root
for folder in dev proc sys; do $b mount --move /$folder /root/$folder; done
$b mount -t tmpfs -o mode=755 tmpfs /root/run
$b cp -r /device /root/run/device
exec $b switch_root /root /run/device/start
"""
# Then: mounts, a control group with a memory limit for all sessions, and the SSH server.
_START = f"""#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
busybox mkdir -p /dev/pts /dev/shm /run/sshd
busybox mount -t devpts devpts /dev/pts
busybox mount -t tmpfs tmpfs /dev/shm
busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
busybox hostname stand-in
cp -r /run/device/home/. {HOME}
chown -R 1000:1000 {HOME}
if [ -n "$memory" ]; then
    echo +memory >/sys/fs/cgroup/cgroup.subtree_control
    mkdir /sys/fs/cgroup/sessions
    echo "$memory" >/sys/fs/cgroup/sessions/memory.max
    sh -c 'echo $$ >/sys/fs/cgroup/sessions/cgroup.procs && exec /usr/sbin/sshd -D -e -f {HOME}/sshd_config' &
else
    /usr/sbin/sshd -D -e -f {HOME}/sshd_config &
fi
while :; do
    wait
    sleep 1
done
"""


@dataclass(frozen=True)
class Machine:
    """A kind of machine, as qemu knows it."""

    options: tuple[str, ...]
    modules: tuple[str, ...]  # of the kernel, that its storage and network need
    memory_limit_bytes: int | None = None  # of all sessions together, in a control group of version 2

    def within(self, port: int, folder: Path) -> tuple[str, ...]:
        """A command that starts the machine, whatever follows it; `port` of 127.0.0.1 is its own."""
        need("qemu-system-aarch64")
        kernel, image = _kernel(), _image()
        (version,) = (kernel / "lib/modules").iterdir()
        values = {"image": str(image), "dtb": str(next(kernel.rglob("bcm2837-rpi-3-b.dtb")))}
        command = [
            *("qemu-system-aarch64", "-nographic", "-no-reboot", *(option.format(**values) for option in self.options)),
            *("-kernel", str(kernel / f"boot/vmlinuz-{version.name}"), "-initrd", str(folder / "initrd")),
            *("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{port}"),
        ]
        return ("sh", "-c", f"exec {shlex.join(command)}", "qemu")

    def prepare(self, folder: Path) -> None:
        """Writes the initial RAM disk for a machine whose SSH server has its keys and settings in `folder`."""
        kernel = _kernel()
        (version,) = (kernel / "lib/modules").iterdir()
        tree = folder / "initial"
        for name in ("bin", "dev", "proc", "sys", "root", "modules", "device/home"):
            (tree / name).mkdir(parents=True)
        shutil.copy(kernel / "bin/busybox", tree / "bin")
        for number, module in enumerate(self._module_files(kernel, version.name)):
            shutil.copy(module, tree / f"modules/{number:03}.ko")
        for name in ("host_key", "authorized_keys", "sshd_config"):
            shutil.copy(folder / name, tree / "device/home")
        _script(tree / "init", _INITIAL)
        limit = "" if self.memory_limit_bytes is None else str(self.memory_limit_bytes)
        _script(tree / "device/start", _START.replace("export", f"memory={limit}\nexport", 1))
        names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        with (folder / "initrd").open("wb") as file:
            made = subprocess.run(
                ["busybox", "cpio", "-o", "-H", "newc"], cwd=tree, input=names.encode(), stdout=file,
                stderr=subprocess.PIPE, timeout=60, check=False,
            )  # fmt: skip
        assert made.returncode == 0, made.stderr

    def _module_files(self, kernel: Path, version: str) -> list[str]:
        """In the order in which they can be loaded."""
        files: dict[str, None] = {}
        for module in self.modules:
            wanted = ["modprobe", "-d", str(kernel), "-S", version, "--show-depends", module]
            lines = subprocess.run(wanted, capture_output=True, text=True, timeout=20, check=False).stdout.splitlines()
            files.update(dict.fromkeys(line.split()[1] for line in lines if line.startswith("insmod ")))
        return list(files)


VIRT = Machine(
    options=(
        *("-machine", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", "1024", "-accel", "tcg,thread=multi"),
        *("-append", "console=ttyAMA0 quiet panic=1"),
        *("-drive", "file={image},if=none,id=disk,format=raw,snapshot=on", "-device", "virtio-blk-device,drive=disk"),
        *("-device", "virtio-net-device,netdev=net", "-device", "virtio-rng-device"),
    ),
    modules=("ext4", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng"),
    memory_limit_bytes=96 << 20,
)
RASPI3B = Machine(
    options=(
        *("-machine", "raspi3b", "-dtb", "{dtb}"),
        *("-append", "console=ttyAMA0,115200 console=ttyS1,115200 panic=1 dwc_otg.fiq_fsm_enable=0 cma=32M"),
        *("-drive", "file={image},if=sd,format=raw,snapshot=on", "-device", "usb-net,netdev=net"),
    ),
    modules=(
        *("ext4", "sdhci-iproc", "bcm2835", "bcm2835-sdhost", "bcm2835-mmc", "bcm2835-dma", "bcm2835_thermal"),
        *(
            "phy-generic",
            "dwc2",
            "usbnet",
            "rndis_host",
            "cdc_ether",
            "cdc_subset",
            "bcm2835-rng",
            "raspberrypi-cpufreq",
        ),
    ),
)


def _kernel() -> Path:
    """Debian's own for arm64, with its modules."""
    need("depmod")

    def finish(root: Path) -> None:
        (version,) = (root / "lib/modules").iterdir()
        subprocess.run(["depmod", "-b", str(root), version.name], check=True, timeout=100)

    return packages("arm64", "linux-image-arm64,busybox-static", finish)


def _image() -> Path:
    need("mke2fs")
    root = debian("arm64").root
    image = FOLDER / f"{root.name}.img"
    if not image.exists():
        unfinished = image.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        with unfinished.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        subprocess.run(
            ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", LABEL, "-d", str(root), str(unfinished)],
            check=True, timeout=200,
        )  # fmt: skip
        unfinished.rename(image)
    return image


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
