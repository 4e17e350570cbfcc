"""What runs inside the sandbox before a program does: a script of its own, with nothing imported but the standard library.

``python -I -S confine.py SETTINGS`` reads a program on standard input. It enters new namespaces (unless bubblewrap has),
builds a root of read-only mounts and one small writable directory, gives up every privilege, sets limits, forbids the
system calls by which a process could gain any of them back, and becomes the program.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET, _NEWCGROUP = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x2000000,
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH, _PDEATHSIG, _NO_NEW_PRIVS, _SECCOMP, _DUMPABLE, _CAPBSET_DROP = 2, 1, 38, 22, 4, 24
_NOBODY = 65534

_DENIED = {  # by architecture: system calls that a program has no use for and an attacker has
    "x86_64": (0xC000003E, {
        "ptrace": 101, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308,
        "bpf": 321, "perf_event_open": 298, "keyctl": 250, "add_key": 248, "request_key": 249, "io_uring_setup": 425,
        "userfaultfd": 323, "kexec_load": 246, "init_module": 175, "finit_module": 313, "delete_module": 176,
        "process_vm_readv": 310, "process_vm_writev": 311, "open_by_handle_at": 304, "name_to_handle_at": 303,
        "swapon": 167, "reboot": 169, "acct": 163, "quotactl": 179, "mount_setattr": 442, "fsopen": 430,
        "fsmount": 432, "move_mount": 429, "open_tree": 428, "socket": 41, "socketpair": 53, "personality": 135,
        "syslog": 103, "iopl": 172, "ioperm": 173, "pidfd_getfd": 438, "kcmp": 312, "memfd_create": 319,
        "clock_settime": 227, "settimeofday": 164, "sethostname": 170, "landlock_create_ruleset": 444,
    }, 56, 435),
    "aarch64": (0xC00000B7, {
        "ptrace": 117, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268,
        "bpf": 280, "perf_event_open": 241, "keyctl": 219, "add_key": 217, "request_key": 218, "io_uring_setup": 425,
        "userfaultfd": 282, "kexec_load": 104, "init_module": 105, "finit_module": 273, "delete_module": 106,
        "process_vm_readv": 270, "process_vm_writev": 271, "open_by_handle_at": 265, "name_to_handle_at": 264,
        "swapon": 224, "reboot": 142, "acct": 89, "quotactl": 60, "mount_setattr": 442, "fsopen": 430,
        "fsmount": 432, "move_mount": 429, "open_tree": 428, "socket": 198, "socketpair": 199, "personality": 92,
        "syslog": 116, "pidfd_getfd": 438, "kcmp": 272, "memfd_create": 279, "clock_settime": 112,
        "settimeofday": 170, "sethostname": 161, "landlock_create_ruleset": 444,
    }, 220, 435),
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Confine this process and become the program."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    program = sys.stdin.buffer.read()
    if settings["enter"]:
        enter(settings)
    os.chdir("/tmp")
    with open("/tmp/program.py", "wb") as out:
        out.write(program)
    limit(settings)
    give_up()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.closerange(3, 256)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    os.execve(settings["python"], [settings["python"], "-I", "-S", "-B", "/tmp/program.py"], environment)


def checked(result: int, what: str) -> int:
    """The result of a call of the C library; -1 raises `OSError`."""
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def enter(settings: dict[str, Any]) -> None:
    """New namespaces and a new root; the first process waits for the one that goes on."""
    user, group = os.getuid(), os.getgid()
    spaces = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET | _NEWCGROUP
    checked(libc.unshare(spaces | (_NEWUSER if user else 0)), "new namespaces")
    if user:
        for file, line in (("uid_map", f"{user} {user} 1"), ("setgroups", "deny"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w") as out:
                out.write(line)
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) % 256)
    checked(libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "death signal")
    new_root(settings)


def new_root(settings: dict[str, Any]) -> None:
    """A root of its own: system directories read-only, four devices, ``/tmp`` writable and small, no ``/proc``."""
    mount("none", "/", None, _REC | _PRIVATE)
    root = next(p for p in ("/mnt", "/media", "/srv", "/tmp") if os.path.isdir(p) and not shadows(p, settings))
    mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")
    size = f"size={settings['disk']},nr_inodes=4k,mode=777"
    mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV | _NOEXEC, size)
    for path in settings["visible"]:
        place = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.symlink(os.readlink(path), place)
            continue
        make_place(path, place)
        mount(path, place, None, _BIND | _REC)
        held = os.statvfs(place).f_flag & (_NOEXEC | _NODEV | _NOSUID)  # flags that may not be taken off
        mount(path, place, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV | held)
    for device in ("null", "zero", "urandom", "random"):
        make_place(f"/dev/{device}", f"{root}/dev/{device}")
        mount(f"/dev/{device}", f"{root}/dev/{device}", None, _BIND)
    mount("none", root, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(root)
    checked(libc.syscall(_DENIED[platform.machine()][1]["pivot_root"], b".", b"."), "new root")
    checked(libc.umount2(b".", _DETACH), "leaving the old root")
    os.chdir("/")


def shadows(place: str, settings: dict[str, Any]) -> bool:
    """Whether something that shall be visible lies under a directory."""
    return any(path == place or path.startswith(place + "/") for path in settings["visible"])


def make_place(path: str, place: str) -> None:
    """An empty directory or file to mount ``path`` on."""
    os.makedirs(place if os.path.isdir(path) else os.path.dirname(place), exist_ok=True)
    if not os.path.isdir(path) and not os.path.exists(place):
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o600))


def mount(source: str, place: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """``mount(2)``."""
    arguments = [None if x is None else x.encode() for x in (source, place, kind)]
    checked(libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() if data else None), f"mounting {place}")


def limit(settings: dict[str, Any]) -> None:
    """Limits on processor time, memory, files and processes; no core dumps."""
    seconds, memory = int(settings["seconds"]) + 1, int(settings["memory"])
    wanted = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: int(settings["disk"]),
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in wanted.items():
        resource.setrlimit(kind, (value, value))


def give_up() -> None:
    """Become nobody (where it was root), drop every capability, allow none to come back, filter system calls."""
    for capability in range(64):
        if libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0) == -1:
            break
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    checked(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    header, data = struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *[0] * 6)
    checked(libc.capset(header, data), "dropping capabilities")
    checked(libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "death signal")
    filter_calls()


def filter_calls() -> None:
    """Answer denied system calls with EPERM, ``clone3`` with ENOSYS (so that ``clone`` is used, whose flags can be read).

    Raises:
        OSError: an architecture whose calls are not listed.
    """
    machine = platform.machine()
    if machine not in _DENIED:
        raise OSError(f"no system-call filter for {machine}")
    arch, denied, clone, clone3 = _DENIED[machine]
    refuse, missing, kill, allow = 0x00050000 | 1, 0x00050000 | 38, 0x80000000, 0x7FFF0000
    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (end, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":
        code += [(any_bit, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # the x32 calls have other numbers
    for number in denied.values():
        code += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    code += [(equal, 0, 1, clone3), (end, 0, 0, missing), (equal, 0, 3, clone), (load, 0, 0, 16)]
    code += [(any_bit, 0, 1, _NEWUSER), (end, 0, 0, refuse), (end, 0, 0, allow)]
    body = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in code))
    program = struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(body))
    checked(libc.prctl(_SECCOMP, 2, ctypes.c_char_p(program), 0, 0), "filtering system calls")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        print(f"posttrain-sandbox: {error}", file=sys.stderr)
        sys.exit(125)
