"""The farm's hand on a device: standard library only, Python >= 3.8. Nothing of it is installed there.

The controller sends this file over standard input, followed by the verb's own input, and runs

    python3 -I -S -c BOOT VERB ARGUMENT...      (-S: site-packages would take longer than all the rest)

attend  RUN_FOLDER OFFSET  starts the engine unless the folder exists, then follows it: the bytes of its events from
                           OFFSET on stdout; blank lines as a sign of life, and at the end one JSON object, on stderr.
                           Input: JSON {"arguments": [...], "cwd": ..., "request": ..., "deadline_s": ...,
                           "settle": ..., "memory_limit_bytes": ...}; without input it never starts anything.
kill    RUN_FOLDER         ends the engine's process group
discard RUN_FOLDER         the same, and removes the folder
install FOLDER [ZIP]       unpacks a zip from its input, or a file there; the folder appears when it is complete

The engine runs detached, in a process group of its own, under a supervisor that holds its deadline, reaps it and
writes down how it ended. Both keep a lock on RUN_FOLDER/alive for as long as they live: unlike a process number, a lock
cannot be mistaken for another's after a reboot.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Optional

POLL_S, LAST_POLL_S = 0.05, 0.005
SIGN_OF_LIFE_S = 5.0
KILL_AFTER_S = 2.0  # between SIGTERM and SIGKILL
LOG_TAIL_BYTES = 16384
FILE_LIMIT_BYTES = 1 << 30  # of what an engine run wild may write before SIGXFSZ stops it


# --- attend ---------------------------------------------------------------------------------------------------------


def attend(run: str, offset: str) -> int:
    plan = sys.stdin.buffer.read()
    if plan and not os.path.isdir(run):
        start(run, json.loads(plan))
    return follow(run, int(offset))


def start(run: str, plan: Dict[str, Any]) -> None:
    """The folder appears by rename, complete and locked: nobody can find a run that is neither alive nor ended."""
    unfinished = f"{run}.{os.getpid()}.part"
    os.makedirs(unfinished)
    with open(os.path.join(unfinished, "request.json"), "w") as file:
        file.write(plan["request"])
    for name in ("events.jsonl", "log", "alive"):
        open(os.path.join(unfinished, name), "wb").close()
    lock = os.open(os.path.join(unfinished, "alive"), os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        os.rename(unfinished, run)
    except OSError:  # another controller was faster by a hair: follow its run
        os.close(lock)
        shutil.rmtree(unfinished, ignore_errors=True)
        return
    if os.fork():
        os.close(lock)  # the child has its own handle on the same lock
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    try:
        supervise(run, plan, lock)
    finally:
        os._exit(0)


def supervise(run: str, plan: Dict[str, Any], lock: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, FILE_LIMIT_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # a lower limit is set already, or none can be
    kills_before = oom_kills()
    with open(os.path.join(run, "events.jsonl"), "ab") as events, open(os.path.join(run, "log"), "ab") as log:

        def say(text: str) -> None:
            log.write(text.encode("utf-8", "replace") + b"\n")
            log.flush()

        try:
            watcher = watch(run, plan, lock, kills_before, events, say)
        except InterruptedError:
            write(run, "exit.json", {"status": -signal.SIGTERM})
            return
        limit = memory_limit(run, plan, say)
        began = time.monotonic()
        try:
            engine = subprocess.Popen(
                limit.command(plan["arguments"]) if limit else plan["arguments"],
                cwd=plan["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=events,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=limit.enter if limit else None,
            )
        except (OSError, subprocess.SubprocessError) as error:
            say(f"the engine could not be started: {error}")
            end_equipment(watcher, limit)
            write(run, "exit.json", {"status": 127, "timed_out": False, "oom_kills": 0})
            return
        write(run, "engine.json", {"group": engine.pid, "boot_id": boot_id(), "oom_kills": kills_before})
    try:
        # Where memory runs out the engine shall go, not the supervisor that can tell of it.
        with open(f"/proc/{engine.pid}/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        pass

    def too_late(number: int, frame: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, plan["deadline_s"] - (time.monotonic() - began)))
    timed_out = False
    try:
        status = engine.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        timed_out = True
        signal_group(engine.pid, signal.SIGTERM)
        try:
            status = engine.wait(timeout=KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            signal_group(engine.pid, signal.SIGKILL)
            status = engine.wait()
    signal_group(engine.pid, signal.SIGKILL)  # whatever it left behind
    kills_after = oom_kills()
    known = kills_before is not None and kills_after is not None
    kills = kills_after - kills_before if known else None  # type: ignore[operator]
    end = {"status": status, "timed_out": timed_out, "oom_kills": kills}
    write(run, "exit.json", {**end, **end_equipment(watcher, limit)})


# The watcher and the memory limit are the deployed engine's own code: it knows the device's sensors and groups.


def watch(run: str, plan: Dict[str, Any], lock: int, kills_before: Optional[int], events: Any, say: Any) -> Any:
    """Lets the device settle; returns what watches it from then on, or None. Raises InterruptedError after `kill`."""
    if plan.get("settle") is None:
        return None
    sys.path.insert(0, plan["cwd"])
    try:
        from engine.watch import Watcher

        watcher = Watcher(plan["settle"], os.path.join(run, "watched.json"), not_for_it=(lock,))
    except Exception as error:  # noqa: BLE001 - without it the run is suspect, and not lost
        say(f"the device is not watched: {type(error).__name__}: {error}")
        return None
    write(run, "engine.json", {"group": watcher.pid, "boot_id": boot_id(), "oom_kills": kills_before})

    def relay(line: bytes) -> None:
        events.write(line)
        events.flush()

    failure = watcher.wait_until_ready(relay)
    if failure is not None:
        say(f"the device is not watched: {failure}")
        return None
    return watcher


def memory_limit(run: str, plan: Dict[str, Any], say: Any) -> Any:
    if plan.get("memory_limit_bytes") is None:
        return None
    sys.path.insert(0, plan["cwd"])
    try:
        from engine.limits import MemoryLimit

        return MemoryLimit(plan["memory_limit_bytes"], f"edgemoe-farm-{os.path.basename(run)}")
    except Exception as error:  # noqa: BLE001 - the same
        say(f"memory is not limited: {type(error).__name__}: {error}")
        return None


def end_equipment(watcher: Any, limit: Any) -> Dict[str, Any]:
    """What they have seen."""
    told = {}
    if limit is not None:
        peak, source = limit.peak()
        told["limit"] = {"method": limit.method, "peak_bytes": peak, "peak_source": source}
        kills = limit.kills()
        if kills is not None:
            told["oom_kills"] = kills  # of this run alone, where the kernel's count is of the whole device
        limit.close()
    if watcher is not None:
        watcher.stop()
    return told


def follow(run: str, offset: int) -> int:
    try:
        events = open(os.path.join(run, "events.jsonl"), "rb")  # noqa: SIM115 - the `with` stands below
    except OSError:
        return report({"state": "absent"})
    out, said, pause_s = sys.stdout.buffer, time.monotonic(), POLL_S
    with events:
        events.seek(offset)
        while True:
            alive = is_alive(run)  # asked before the read: what it wrote before it died is then read too
            piece = events.read(1 << 16)
            if piece:
                out.write(piece)
                out.flush()
                if b'"event":"finished"' in piece:
                    pause_s = LAST_POLL_S  # it ends in a moment, and there is nothing left to disturb
                continue
            if not alive:
                break
            if time.monotonic() - said > SIGN_OF_LIFE_S:
                said = time.monotonic()
                sys.stderr.write("\n")  # fails when nobody listens any more, and so ends this process
                sys.stderr.flush()
            time.sleep(pause_s)
    ended, engine = read(run, "exit.json"), read(run, "engine.json") or {}
    seen = {"watched": read(run, "watched.json"), "free_bytes": free_bytes(run), "log_tail": log_tail(run)}
    if ended is not None:
        return report({**ended, **seen, "state": "exited"})
    before, now = engine.get("oom_kills"), oom_kills()
    rebooted = engine.get("boot_id") != boot_id()
    kills = now - before if before is not None and now is not None and not rebooted else None
    return report({"state": "died", "rebooted": rebooted, "oom_kills": kills, **seen})


def report(state: Dict[str, Any]) -> int:
    sys.stdout.flush()
    sys.stderr.write(json.dumps(state) + "\n")
    sys.stderr.flush()
    return 0


# --- kill, discard, install -------------------------------------------------------------------------------------------


def kill(run: str) -> int:
    engine = read(run, "engine.json")
    if engine is not None and engine.get("boot_id") == boot_id() and is_alive(run):
        end_group(engine["group"])
    end = time.monotonic() + KILL_AFTER_S  # for the supervisor to write down how it ended
    while is_alive(run) and time.monotonic() < end:
        time.sleep(POLL_S)
    return 0


def discard(run: str) -> int:
    kill(run)
    shutil.rmtree(run, ignore_errors=True)
    return 0


def install(folder: str, source: Optional[str] = None) -> int:
    import io
    import zipfile  # here only: `attend` should start quickly

    if os.path.isdir(folder):
        return 0
    unfinished = f"{folder}.{os.getpid()}.part"
    os.makedirs(unfinished)
    with zipfile.ZipFile(source or io.BytesIO(sys.stdin.buffer.read())) as archive:
        archive.extractall(unfinished)
    try:
        os.rename(unfinished, folder)
    except OSError:  # another controller was faster
        shutil.rmtree(unfinished, ignore_errors=True)
        return 0 if os.path.isdir(folder) else 1
    return 0


# --- what they share ------------------------------------------------------------------------------------------------


def is_alive(run: str) -> bool:
    """Whether the supervisor or the engine lives, by their lock."""
    try:
        lock = os.open(os.path.join(run, "alive"), os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def end_group(group: int) -> None:
    signal_group(group, signal.SIGTERM)
    end = time.monotonic() + KILL_AFTER_S
    while time.monotonic() < end and signal_group(group, 0):
        time.sleep(POLL_S)
    signal_group(group, signal.SIGKILL)


def signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except OSError:
        return False
    return True


def write(run: str, name: str, value: Any) -> None:
    path = os.path.join(run, name)
    with open(path + ".part", "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".part", path)


def read(run: str, name: str) -> Optional[Dict[str, Any]]:
    try:
        with open(os.path.join(run, name)) as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def log_tail(run: str) -> str:
    try:
        with open(os.path.join(run, "log"), "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def free_bytes(folder: str) -> Optional[int]:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def oom_kills() -> Optional[int]:
    """How often this kernel has killed for want of memory, control groups included (Linux >= 4.13)."""
    try:
        with open("/proc/vmstat") as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def boot_id() -> Optional[str]:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return None


VERBS: Dict[str, Callable[..., int]] = {"attend": attend, "kill": kill, "discard": discard, "install": install}


def main(arguments: List[str]) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a lost link must not end what has been started
    return VERBS[arguments[0]](*arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
