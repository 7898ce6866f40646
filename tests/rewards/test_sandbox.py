"""Code that a model might write, in the sandbox: what it may not do, and how each end is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from arriero.rewards import sandbox
from arriero.rewards.sandbox import Limits, NoSandbox, run

FAST = Limits(seconds=1)


def do(code, *expressions, limits=FAST):
    return run({"code": code, "steps": [{"eval": expression} for expression in expressions]}, limits)


def test_values_come_back_as_plain_data():
    result = do("def f(x): return {'a': [x, 1.5, None], (1,): {b'x'}}", "f(2)")
    assert result.end == "done"
    a, b = result.replies[1]["value"][1]
    assert a == [["str", "a"], ["list", [["int", "0x2"], ["float", "0x1.8000000000000p+0"], ["constant", "None"]]]]
    assert b[1] == ["set", [["bytes", "78"]]]


@pytest.mark.parametrize("path", ["/escaped", "/usr/escaped", "/etc/escaped", str(Path(__file__).parent / "escaped")])
def test_nothing_outside_its_own_temporary_directory_can_be_written(path):
    result = do(f"import os\nos.makedirs(os.path.dirname({path!r}), exist_ok=True)\nopen({path!r}, 'w').write('x')")
    if not path.startswith("/tmp/"):  # which is its own there
        assert result.replies[0]["raised"] in ("OSError", "FileNotFoundError", "PermissionError")
    assert not Path(path).exists()


def test_all_that_is_mounted_is_read_only_but_its_own_directory_and_devices():
    mounts = do("", "open('/proc/self/mounts').read()").replies[1]["value"][1]
    writable = [line.split()[1] for line in mounts.splitlines() if "ro" not in line.split()[3].split(",")]
    assert {path for path in writable if not path.startswith("/dev/")} <= {"/tmp", "/proc"}
    assert len(mounts.splitlines()) > len(writable)


def test_its_own_directory_is_new_each_time_and_limited():
    assert do("open('/tmp/a', 'w').write('x')", "len(__import__('os').listdir('/tmp'))").replies[1]["value"][1] == "0x1"
    assert do("", "__import__('os').listdir('/tmp')").replies[1]["value"] == ["list", []]
    assert do("for i in range(9): open(f'/tmp/{i}', 'w').write('x' * 10**7)").replies[0]["raised"] == "OSError"


def test_there_is_no_network_not_even_to_this_machine():
    connect = "import socket; socket.create_connection(('127.0.0.1', 80), 1)"
    assert do(connect).replies[0]["text"].endswith("Network is unreachable")
    assert do("", "[n for _, n in __import__('socket').if_nameindex()]").replies[1]["value"] == [
        "list",
        [["str", "lo"]],
    ]


def test_files_of_the_user_are_not_to_be_seen(tmp_path):
    (tmp_path / "secret").write_text("x")
    assert do(f"open({str(tmp_path / 'secret')!r})").replies[0]["raised"] == "FileNotFoundError"
    assert do("", "dict(__import__('os').environ).get('USER')").replies[1]["value"] == ["constant", "None"]


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time; time.sleep(60)", "input_ = open(0).read()\nwhile 1: 1"]
)
def test_code_without_end_is_a_timeout(code):
    began = time.monotonic()
    assert do(code).end == "timeout"
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    "code",
    ["import os\nwhile True: os.fork()", "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"],
)
def test_a_fork_bomb_ends_and_leaves_no_process(code):
    name = f"bomb-{os.getpid()}"
    do(f"open('/proc/self/comm', 'w').write('{name}')\n{code}", "1")
    assert name not in _names("comm")


def test_grandchildren_that_sleep_end_with_their_job():
    result = do(f"import subprocess; subprocess.Popen(['sleep', '61.{os.getpid()}'], start_new_session=True)", "1")
    assert result.end == "done"
    assert f"sleep\x0061.{os.getpid()}\x00" not in _names("cmdline")


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("import os\nwhile True: os.write(3, b'x' * 1000)", {"output"}),
        ("while True: print('x' * 1000)", {"timeout"}),
        ("import ctypes; ctypes.string_at(0)", {"signal 11"}),
        ("import os; os._exit(3)", {"exit code 3"}),
    ],
)
def test_each_other_end_has_its_name(code, ends):
    assert do(code).end in ends


def test_memory_is_limited_for_a_process_and_for_all_together():
    assert do("x = bytearray(10**9)").replies[0]["raised"] == "MemoryError"
    many = "import os, time\nfor _ in range(6):\n  if os.fork() == 0: break\nx = b'x' * (60 << 20)\ntime.sleep(5)"
    assert do(many, limits=Limits(seconds=4, memory_mb=256)).end == "memory"


def test_the_supervisor_can_be_neither_killed_nor_read():
    assert do("import os; os.kill(1, 9)", "7").replies[1]["value"] == ["int", "0x7"]
    assert do("open('/proc/1/mem', 'rb')").replies[0]["raised"] == "PermissionError"


def test_a_guest_has_no_rights_and_gets_none():
    assert do("", "__import__('os').getuid()").replies[1]["value"] == ["int", hex(1000)]
    status = do("", "open('/proc/self/status').read()").replies[1]["value"][1]
    assert "CapEff:\t0000000000000000" in status
    assert "CapBnd:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    again = "import ctypes; c = ctypes.CDLL(None, use_errno=True)"
    assert do(again, "c.unshare(0x10000000)").replies[1]["value"] == ["int", "-0x1"]


def test_where_namespaces_are_refused_nothing_runs(monkeypatch):
    """Limits of their number make unshare fail as a system without them does."""
    script = (
        "import sys, resource; sys.path.insert(0, sys.argv[1])\n"
        "import arriero.rewards.sandbox as s\n"
        "try: s.run({'code': 'raise SystemError', 'steps': []}, s.Limits())\n"
        "except s.NoSandbox as error: print(error)\n"
    )
    command = ["unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"', "sh"]
    told = subprocess.run(
        [*command, sys.executable, "-c", script, str(Path(sandbox.__file__).parents[2])],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "does not let it be locked up (unshare: No space left on device); allow user namespaces" in told.stdout
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NoSandbox, match=r"namespaces are Linux's, and this is darwin.*never run in the open"):
        do("1")


def _names(kind):
    """What all processes of this machine are called."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                found.append(Path(f"/proc/{entry}/{kind}").read_text().strip("\n"))
    return found
