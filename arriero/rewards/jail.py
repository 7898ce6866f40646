"""The process that locks up code under test: `python -I -S jail.py`; a job in JSON comes in, the result goes out.

Three processes. The first (0) writes the maps of users for the second (1), which moves into namespaces of its own
for users, mounts, processes, network, System V IPC and the host's name, and starts the third (2): number 1 of its
process namespace, which builds a file system of
- Python, its packages, and the system's libraries, read-only; /dev/null, zero and urandom; /proc of its own processes;
- /tmp, in memory, of limited size: the only place that can be written, and gone with the processes;
pivots into it, becomes an unprivileged user without capabilities, and starts the runner, which has limits of memory,
CPU time, processes, file sizes and open files. When it ends, or the time is over, the kernel ends whatever is left of
the process namespace. There is no network, not even to this machine.

Only the standard library is imported, and nothing is run in the open: whatever is refused on the way is an error.
Needs Linux 5.14 (mount_setattr; limits per user namespace) with namespaces allowed for the user.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from contextlib import suppress

NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
MOUNT_SETATTR, AT_RECURSIVE, ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 442, 0x8000, 1, 2, 4
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "loongarch64": 41}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
ROOT, GUEST = 0, 1000  # users inside
OUTSIDE = 61184  # and up: unprivileged users outside that a guest of root is, for limits of its own (systemd's range)
POLL = 0.02  # seconds between looks at memory and number of processes

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The system does not give what the jail is built of."""


def checked(result: int, doing: str) -> int:
    """The result of a call of the C library; raises `Refused` where it failed."""
    if result < 0:
        raise Refused(f"{doing}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    text = None if kind is None else kind.encode()
    done = libc.mount(source.encode(), target.encode(), text, ctypes.c_ulong(flags), data.encode())
    checked(done, f"mount on {target}")


def main() -> None:
    """Process 0."""
    job = json.loads(sys.stdin.buffer.read())
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    ready, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        guarded(lambda: apart(job, ready[1], mapped[0]))
    os.close(ready[1])
    os.close(mapped[0])
    if os.read(ready[0], 1):
        guarded(lambda: write_maps(child), leave=False)
        os.write(mapped[1], b"m")
    _, status = os.waitpid(child, 0)
    os._exit(0 if status == 0 else 1)


def guarded(work: object, leave: bool = True) -> None:
    """Do what a process is for, say on the output what was refused, and leave."""
    try:
        work()  # type: ignore[operator]
    except (Refused, OSError) as error:
        say({"refused": str(error)})
        os._exit(0)
    if leave:
        os._exit(0)


def say(result: dict[str, object]) -> None:
    """Write the result, the only thing on the output."""
    data = json.dumps(result).encode()
    while data:
        data = data[os.write(1, data) :]


def content(file: str) -> str:
    """What is in a file of /proc."""
    with open(file) as opened:
        return opened.read()


def write(file: str, text: str) -> None:
    """Write to a file of /proc."""
    with open(file, "w") as opened:
        opened.write(text)


def write_maps(child: int) -> None:
    """Whom the users inside are outside: root its caller, the guest a user without rights.

    Root alone may map two. Another user maps the guest to itself.
    """
    if os.geteuid() == 0:
        guest = OUTSIDE + child % 4000
        with suppress(OSError):
            for name in ("uid_map", "gid_map"):
                write(f"/proc/{child}/{name}", f"{ROOT} {os.geteuid()} 1\n{GUEST} {guest} 1\n")
            return
    write(f"/proc/{child}/setgroups", "deny")
    write(f"/proc/{child}/uid_map", f"{GUEST} {os.geteuid()} 1\n")
    write(f"/proc/{child}/gid_map", f"{GUEST} {os.getegid()} 1\n")


def apart(job: dict[str, object], ready: int, mapped: int) -> None:
    """Process 1: into the namespaces, then the process that becomes number 1."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    checked(libc.unshare(NEW_USER | NEW_NS | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS), "unshare")
    os.write(ready, b"r")
    if not os.read(mapped, 1):
        os._exit(1)
    child = os.fork()
    if child == 0:
        guarded(lambda: inside(job))
    os.waitpid(child, 0)


def inside(job: dict[str, object]) -> None:
    """Process 2: the file system, the user, the limits, the runner."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    is_root = "\n" in content("/proc/self/uid_map").strip()
    if is_root:
        os.setresgid(ROOT, ROOT, ROOT)
        os.setresuid(ROOT, ROOT, ROOT)
    build(job)
    with suppress(OSError):  # else guests could be root again in a user namespace of their own
        write("/proc/sys/user/max_user_namespaces", "0")
    if is_root:
        os.setgroups([])
        os.setresgid(GUEST, GUEST, GUEST)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability)
    if is_root:
        os.setresuid(GUEST, GUEST, GUEST)
    checked(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "dropping capabilities")
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # which a change of users clears
    libc.prctl(PR_SET_DUMPABLE, 0)  # so that no guest reads this process's memory
    if os.getuid() == ROOT or os.geteuid() == ROOT:
        raise Refused("still root inside")
    say(supervise(job))


def build(job: dict[str, object]) -> None:
    """Make the directory `root` a small file system, and move into it."""
    root, megabytes = str(job["root"]), int(job["file_mb"])  # type: ignore[call-overload]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in job["paths"]:  # type: ignore[attr-defined]
        if os.path.islink(path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path) and not os.path.exists(root + path):
            show(path, root + path)
    os.makedirs(root + "/dev", exist_ok=True)
    for name in ("null", "zero", "urandom"):
        place(root + "/dev/" + name)
        mount("/dev/" + name, root + "/dev/" + name, None, MS_BIND)
    for name in ("tmp", "proc"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    with suppress(Refused):  # not within a container that hides parts of /proc
        mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("none", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={megabytes}m,nr_inodes=4096,mode=1777")
    os.chdir(root)
    number = PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise Refused(f"pivot_root on {platform.machine()} is not known")
    checked(libc.syscall(number, b".", b"."), "pivot_root")
    checked(libc.umount2(b".", 2), "leaving the old root")  # 2: detached, for what still uses it
    os.chdir("/")
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/tmp")


def show(path: str, target: str) -> None:
    """Let a file or directory be seen at `target`, read-only with all that is mounted below it."""
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        place(target)
    mount(path, target, None, MS_BIND | MS_REC)
    attributes = struct.pack("QQQQ", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, 0, 0, 0)
    done = libc.syscall(MOUNT_SETATTR, -100, target.encode(), AT_RECURSIVE, attributes, len(attributes))
    checked(done, f"read-only mount of {path}")


def place(file: str) -> None:
    """An empty file to mount on."""
    os.makedirs(os.path.dirname(file), exist_ok=True)
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o644))


def supervise(job: dict[str, object]) -> dict[str, object]:
    """Start the runner, watch time, memory and processes, and gather what it says, up to a limit."""
    deadline = time.monotonic() + float(job["seconds"]) * 2  # type: ignore[arg-type]  # as limits of CPU time bind first
    task_in, said_in = os.pipe(), os.pipe()
    runner = os.fork()
    if runner == 0:
        start(job, task_in[0], said_in[1])
    os.close(task_in[0])
    os.close(said_in[1])
    task, said = json.dumps(job["task"]).encode(), b""
    os.set_blocking(task_in[1], False)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    most, end = int(job["output_kb"]) * 1024, ""  # type: ignore[call-overload]
    while not end:
        if time.monotonic() > deadline:
            end = "timeout"
        readable, writable, _ = select.select([said_in[0]], [task_in[1]] if task else [], [], POLL)
        if writable:
            try:
                task = task[os.write(task_in[1], task) :]
            except OSError:
                task = b""
            if not task:
                os.close(task_in[1])
        if readable:
            said += os.read(said_in[0], 1 << 16)
            if len(said) > most:
                end = "output"
        over = too_much(job)
        end = end or over
        done, status = os.waitpid(runner, os.WNOHANG)
        if done and not end:
            end = how(status)
    os.set_blocking(said_in[0], False)
    with suppress(BlockingIOError):
        while len(said) <= most and (more := os.read(said_in[0], 1 << 16)):
            said += more
    return {"end": end, "said": said[:most].decode("utf-8", "replace")}


def too_much(job: dict[str, object]) -> str:
    """Which limit all processes together exceed: "memory", "processes", or "" for none."""
    pages, count = 0, 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            with suppress(OSError):
                count += 1
                pages += int(content(f"/proc/{name}/statm").split()[1])
    if pages * resource.getpagesize() > int(job["memory_mb"]) << 20:  # type: ignore[call-overload]
        return "memory"
    return "processes" if count > int(job["processes"]) else ""  # type: ignore[call-overload]


def how(status: int) -> str:
    """How the runner ended: "done", "timeout" by its CPU limit, or the signal or code it died with."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "timeout" if number == signal.SIGXCPU else f"signal {number}"
    code = os.WEXITSTATUS(status)
    return "done" if code == 0 else f"exit code {code}"


def start(job: dict[str, object], task: int, said: int) -> None:
    """Become the runner: its task is its input; descriptor 3 is where it answers."""
    with suppress(BaseException):
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(said, 50)
        os.dup2(task, 0)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.dup2(50, 3, inheritable=True)
        os.closerange(4, 1024)
        os.setsid()
        megabyte, seconds = 1 << 20, int(float(job["seconds"]) + 0.999)  # type: ignore[arg-type]
        memory, files = int(job["memory_mb"]) * megabyte, int(job["file_mb"]) * megabyte  # type: ignore[call-overload]
        processes = int(job["processes"])  # type: ignore[call-overload]
        for what, limit in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, files),
            (resource.RLIMIT_NPROC, processes + 2),  # with the supervisor, where it is the same user
            (resource.RLIMIT_NOFILE, 128),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(what, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        environment = {
            "PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        }  # fmt: skip
        python = str(job["python"])
        os.execve(python, [python, "-I", "-S", "-B", "-c", str(job["runner"])], environment)
    os._exit(127)


if __name__ == "__main__":
    main()
