"""Starts, follows and ends engines on the device.

The engine runs detached, in a process group of its own, under a supervisor that holds its deadline, reaps it and
writes down how it ended. Both keep a lock on RUN_FOLDER/alive for as long as they live: unlike a process number, a lock
cannot be mistaken for another's after a reboot.

Only who holds the device's lease starts an engine, and none beside another. A run belongs to a holder, who alone may
end and remove it; what a former holder left is ended, and marked so, before the next one measures.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional, Tuple

from harness.agent import lease, place, stores
from harness.agent.files import boot_id, create, read, since_boot_s, write

POLL_S, LAST_POLL_S = 0.05, 0.005
SIGN_OF_LIFE_S = 5.0
END_S = 15.0  # for an engine of a former holder to be gone
KILL_AFTER_S = 2.0  # between SIGTERM and SIGKILL
LOG_TAIL_BYTES = 16384
FILE_LIMIT_BYTES = 1 << 30  # of what an engine run wild may write before SIGXFSZ stops it


# --- attend ---------------------------------------------------------------------------------------------------------


def attend(run: str, offset: str, holder: str, token: str, ttl_s: str) -> int:
    text = sys.stdin.buffer.read()
    plan = json.loads(text) if text else None
    root, me = os.path.dirname(os.path.dirname(run)), (holder, int(token), float(ttl_s))
    damaged = stores.unproven(plan.get("files", {})) if plan is not None else None
    if damaged is not None:
        return report({"state": "damaged", "damaged": damaged})
    if plan is not None and lease.renew(root, *me, since_boot_s, boot_id())["granted"] and end_others(root, run):
        return report({"state": "occupied"})
    with lease.locked(root) as lock:
        held = lease.LeaseFiles(root, since_boot_s, boot_id())
        if not held.renewed(*me):
            return report({"state": "fenced", "fenced_by": held.owner})
        if plan is not None and is_fenced(run):  # cut off under a former holder: it is measured anew
            remove(run)
        if os.path.lexists(run) and not is_a_run(run):  # a link, or what a power cut left: follow no such thing
            stores.put_aside(run)
        if plan is not None and not os.path.isdir(run):
            start(run, plan, holder, lock)
        elif os.path.isdir(run):
            own(run, holder)
    return follow(run, int(offset), me)


def start(run: str, plan: Dict[str, Any], holder: str, lease_lock: int) -> None:
    """Starts a run. Its folder appears by rename, complete and locked: no run is neither alive nor ended."""
    unfinished = f"{run}.{os.getpid()}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.mkdir(unfinished, 0o700)
    with create(os.path.join(unfinished, "request.json")) as file:
        file.write(plan["request"].encode())
    for name in ("events.jsonl", "log", "alive"):
        create(os.path.join(unfinished, name)).close()
    own(unfinished, holder)
    stores.sync_all(unfinished)
    lock = os.open(os.path.join(unfinished, "alive"), os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(unfinished, run)
    place.sync(os.path.dirname(run))
    if os.fork():
        os.close(lock)  # the child has its own handle on the same lock
        return
    os.close(lease_lock)
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
    if watcher is not None:
        watcher.follow(engine.pid)
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
    end = {"status": status, "timed_out": timed_out, "oom_kills": kills, **end_equipment(watcher, limit)}
    for name in ("events.jsonl", "log", "watched.json"):  # or an end could outlive a power cut without what led to it
        with contextlib.suppress(FileNotFoundError):
            place.sync(os.path.join(run, name))
    write(run, "exit.json", end)


# The watcher and the memory limit are the deployed engine's own code: it knows the device's sensors and groups.


def engine_module(name: str) -> Any:
    """Returns a module of the deployed engine, which may be the older one that a baseline was pinned with.

    Engines from before December 2026 keep their modules about the device directly in `engine`.
    """
    try:
        return importlib.import_module("engine.device." + name)
    except ModuleNotFoundError as error:
        if error.name != "engine.device":
            raise
        return importlib.import_module("engine." + name)


def watch(run: str, plan: Dict[str, Any], lock: int, kills_before: Optional[int], events: Any, say: Any) -> Any:
    """Lets the device settle; returns what watches it from then on, or None. Raises InterruptedError after `kill`."""
    if plan.get("settle") is None:
        return None
    sys.path.insert(0, plan["cwd"])
    try:
        Watcher = engine_module("watch").Watcher
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
        return engine_module("limits").MemoryLimit(plan["memory_limit_bytes"], f"edgemoe-farm-{os.path.basename(run)}")
    except Exception as error:  # noqa: BLE001 - the same
        say(f"memory is not limited: {type(error).__name__}: {error}")
        return None


def end_equipment(watcher: Any, limit: Any) -> Dict[str, Any]:
    """Ends the watcher and the limit; returns what they have seen."""
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


def follow(run: str, offset: int, me: Tuple[str, int, float]) -> int:
    root, (holder, _, ttl_s) = os.path.dirname(os.path.dirname(run)), me
    try:
        events = open(os.path.join(run, "events.jsonl"), "rb")  # noqa: SIM115 - the `with` stands below
    except OSError:
        return report({"state": "absent"})
    out, said, pause_s = sys.stdout.buffer, time.monotonic(), POLL_S
    renewed = said
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
            if time.monotonic() - renewed > ttl_s / 4:  # its controller listens: it lives
                renewed = time.monotonic()
                with contextlib.suppress(OSError):  # a full disk shall not end this
                    lease.renew(root, *me, since_boot_s, boot_id())
            time.sleep(pause_s)
    if is_fenced(run) or not is_own(run, holder):
        return report({"state": "fenced", "fenced_by": lease.look(root, since_boot_s, boot_id())["owner"]})
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


# --- kill, discard, and who may ---------------------------------------------------------------------------------------


def kill(run: str, holder: str) -> int:
    if is_own(run, holder):
        end_run(run)
    return 0


def discard(run: str, holder: str) -> int:
    if is_own(run, holder):
        end_run(run)
        remove(run)
    return 0


def remove(run: str) -> None:
    """Removes a run's folder by a rename first: nobody can find a run of which a part is left."""
    going = f"{run}.{os.getpid()}.part"
    if not is_a_run(run):
        return
    try:
        os.rename(run, going)
    except OSError:  # it is gone, or the storage is read-only
        return
    shutil.rmtree(going, ignore_errors=True)


def end_run(run: str) -> None:
    engine = read(run, "engine.json")
    group = (engine or {}).get("group")
    if engine is not None and engine.get("boot_id") == boot_id() and type(group) is int and group > 1 and is_alive(run):
        end_group(group)
    end = time.monotonic() + KILL_AFTER_S  # for the supervisor to write down how it ended
    while is_alive(run) and time.monotonic() < end:
        time.sleep(POLL_S)


def own(run: str, holder: str) -> None:
    write(run, "holder.json", {"holder": holder}, synced=False)


def is_own(run: str, holder: str) -> bool:
    return (read(run, "holder.json") or {}).get("holder") == holder


def is_fenced(run: str) -> bool:
    """Tells whether a run was ended because somebody else came to hold the device."""
    return os.path.exists(os.path.join(run, "fenced.json"))


def inherit(root: str, holder: str, sweep: str) -> None:
    """Gives a sweep's runs to the holder that continues it, however many controllers were killed between.

    By the name of a run, which begins with its sweep's: what a holder should have written may have been cut off.
    """
    for run in all_runs(root):
        if sweep and os.path.basename(run).startswith(sweep + "-") and not run.endswith(".part"):
            own(run, holder)


def end_others(root: str, spared: Optional[str] = None, owned_by: Optional[str] = None) -> bool:
    """Ends all engines but one run's, or one holder's; tells whether one is left that would not end."""
    living = [run for run in all_runs(root) if run != spared and is_alive(run)]
    living = [run for run in living if owned_by is None or not is_own(run, owned_by)]
    for run in living:
        write(run, "fenced.json", {})
    end = time.monotonic() + END_S
    while living and time.monotonic() < end:
        for run in living:  # more than once: one that has just been made has no engine yet
            end_run(run)
        living = [run for run in living if is_alive(run)]
    return bool(living)


def all_runs(root: str) -> List[str]:
    folder = os.path.join(root, "runs")
    return [run for run in (os.path.join(folder, name) for name in os.listdir(folder)) if is_a_run(run)]


def is_a_run(run: str) -> bool:
    """Tells whether the farm made a folder of this name: nothing else is followed, marked or removed."""
    folder, name = os.path.split(run)
    return place.is_own(os.path.dirname(folder), "runs", name)


# --- what they share ------------------------------------------------------------------------------------------------


def is_alive(run: str) -> bool:
    """Tells by their lock whether the supervisor or the engine lives."""
    try:
        lock = os.open(os.path.join(run, "alive"), os.O_RDWR | os.O_NOFOLLOW)
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
    """Returns how often this kernel has killed for want of memory, control groups included (Linux >= 4.13)."""
    try:
        with open("/proc/vmstat") as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None
