"""Takes rights away from the calling process, for good. Standard library and Linux system calls only.

Every function says whether it could do its part, so that a sandbox can tell what it enforces. Nothing here needs
root; as root all capabilities are dropped first, so that limits bind and file permissions hold.

Sources: landlock(7), seccomp(2), capset(2), prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

__all__ = ["Filters", "confine", "drop_capabilities", "landlock", "support"]

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE, _READ, _LIST = 1, 2, 4, 8
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_OWN = _EXECUTE | _WRITE | _READ | _LIST | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 12 | 1 << 13 | _TRUNCATE
"""In the run's own folder everything but device nodes and sockets."""

_DENIED = {
    "x86_64": {
        "socket": 41, "connect": 42, "bind": 49, "accept": 43, "accept4": 288, "ptrace": 101,
        "process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440, "kcmp": 312, "unshare": 272, "setns": 308,
        "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "bpf": 321, "perf_event_open": 298,
        "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "keyctl": 250,
        "add_key": 248, "request_key": 249, "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240,
        "open_by_handle_at": 304, "name_to_handle_at": 303, "pidfd_open": 434, "pidfd_send_signal": 424,
        "pidfd_getfd": 438, "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246,
        "reboot": 169, "swapon": 167, "swapoff": 168, "acct": 163, "settimeofday": 164, "clock_settime": 227,
        "setpriority": 141, "sched_setscheduler": 144, "ioprio_set": 251, "setuid": 105, "setgid": 106,
        "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "setpgid": 109, "setsid": 112,
    },
    "aarch64": {
        "socket": 198, "connect": 203, "bind": 200, "accept": 202, "accept4": 242, "ptrace": 117,
        "process_vm_readv": 270, "process_vm_writev": 271, "process_madvise": 440, "kcmp": 272, "unshare": 97, "setns": 268,
        "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "bpf": 280, "perf_event_open": 241,
        "userfaultfd": 282, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "keyctl": 219,
        "add_key": 217, "request_key": 218, "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180,
        "open_by_handle_at": 265, "name_to_handle_at": 264, "pidfd_open": 434, "pidfd_send_signal": 424,
        "pidfd_getfd": 438, "init_module": 105, "finit_module": 273, "delete_module": 106, "kexec_load": 104,
        "reboot": 142, "swapon": 224, "swapoff": 225, "acct": 89, "settimeofday": 170, "clock_settime": 112,
        "setpriority": 140, "sched_setscheduler": 119, "ioprio_set": 30, "setuid": 146, "setgid": 144,
        "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "setpgid": 154, "setsid": 157,
    },
}  # fmt: skip
_SPAWN = {
    "x86_64": {"fork": 57, "vfork": 58, "execve": 59, "execveat": 322},
    "aarch64": {"execve": 221, "execveat": 281},
}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_KILL = {"x86_64": (62, 200, 234), "aarch64": (129, 130, 131)}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def support() -> dict[str, bool]:
    """What this machine can enforce, without enforcing it."""
    linux = sys.platform == "linux"
    known = platform.machine() in _ARCH
    return {
        "limits": os.name == "posix",
        "files": linux and _libc().syscall(_CREATE, None, 0, 1) > 0,
        "system_calls": linux and known and _libc().prctl(21, 0, 0, 0, 0) == 0,
    }


def confine(
    ruleset: int | None,
    filters: Filters,
    *,
    cpu_s: float,
    memory: int,
    file_bytes: int,
    open_files: int,
    processes: int,
) -> None:
    """Set limits, then give up files, network, other processes and every privilege.

    Args:
        ruleset: from :func:`landlock`, made before the fork.
        filters: likewise.
        cpu_s: CPU seconds.
        memory: address space in bytes.
        file_bytes: size of a file.
        open_files: descriptors.
        processes: 0 forbids further ones.
    """
    whole = max(1, int(-(-cpu_s // 1)))
    for what, soft, hard in (
        (resource.RLIMIT_CPU, whole, whole + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, open_files, open_files),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))
    if processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (processes + 1, processes + 1) if os.getuid() else (4096, 4096))
    if sys.platform != "linux":
        return
    libc = _libc()
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges: what follows needs it, and set-uid programs lose their power
    if ruleset is not None and libc.syscall(_RESTRICT, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel refused the file rules")
    drop_capabilities(libc)
    filters.apply(libc, spawn=processes > 0)


def landlock(folder: str, readable: list[str]) -> int | None:
    """A set of rules (a descriptor): write below ``folder`` only, read ``readable`` only. None without Landlock."""
    if sys.platform != "linux":
        return None
    libc = _libc()
    abi = libc.syscall(_CREATE, None, 0, 1)
    if abi <= 0:
        return None
    handled = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    attributes = struct.pack("=QQQ", handled, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = libc.syscall(_CREATE, ctypes.c_char_p(attributes), size, 0)
    if ruleset < 0:
        return None

    def allow(path: str, rights: int) -> None:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return  # what is not there need not be allowed
        try:
            if not os.path.isdir(path):
                rights &= _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL
            rule = struct.pack("=Qi", rights & handled, handle)
            libc.syscall(_ADD, ruleset, 1, ctypes.c_char_p(rule), 0)
        finally:
            os.close(handle)

    for path in readable:
        allow(path, _EXECUTE | _READ | _LIST)
    allow("/dev/null", _READ | _WRITE)
    for path in ("/dev/zero", "/dev/urandom", "/dev/random"):
        allow(path, _READ)
    allow(folder, _OWN)
    return int(ruleset)


def drop_capabilities(libc: ctypes.CDLL) -> bool:
    """Give up every capability; root without them owns its files and nothing else."""
    header = struct.pack("=Ii", 0x20080522, 0)
    return (
        libc.syscall(126 if platform.machine() == "x86_64" else 91, ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))
        == 0
    )


class Filters:
    """Refuses system calls for networks, other processes, mounts and kernel services.

    Threads are allowed. Signals may be sent to the process itself only. The programs are written once; a child puts
    its own number in.
    """

    def __init__(self) -> None:
        known = sys.platform == "linux" and platform.machine() in _ARCH
        self._programs = {spawn: _program(spawn) for spawn in (False, True)} if known else {}

    def apply(self, libc: ctypes.CDLL, *, spawn: bool) -> bool:
        """Bind the calling process; False where it is not possible."""
        if spawn not in self._programs:
            return False
        code = self._programs[spawn].replace(_PLACE, struct.pack("=I", os.getpid()))
        buffer = ctypes.create_string_buffer(code, len(code))
        filter_program = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
        return libc.prctl(22, 2, ctypes.c_char_p(filter_program), 0, 0) == 0


_PLACE = b"\x5a\xa5\x5a\xa5"


def _program(spawn: bool) -> bytes:
    machine = platform.machine()
    pid = struct.unpack("=I", _PLACE)[0]
    program: list[tuple[int, int, int, int]] = [
        (_LD, 0, 0, 4),
        (_JEQ, 1, 0, _ARCH[machine]),
        (_RET, 0, 0, _KILL_PROCESS),
        (_LD, 0, 0, 0),
    ]
    if machine == "x86_64":
        program += [(_JGE, 0, 1, 0x40000000), (_RET, 0, 0, _EPERM)]

    def refuse(number: int, answer: int = _EPERM) -> None:
        program.extend([(_JEQ, 0, 1, number), (_RET, 0, 0, answer)])

    def only_self(number: int, *allowed: int) -> None:
        tests = [(_JEQ, len(allowed) - k, 0, value) for k, value in enumerate(allowed)]
        program.extend(
            [(_JEQ, 0, len(tests) + 3, number), (_LD, 0, 0, 16), *tests, (_RET, 0, 0, _EPERM), (_RET, 0, 0, _ALLOW)]
        )

    denied = dict(_DENIED[machine])
    if spawn:
        for name in ("setpgid", "setsid"):
            denied.pop(name)
    for number in denied.values():
        refuse(number)
    if not spawn:
        for number in _SPAWN[machine].values():
            refuse(number)
        # glibc falls back from clone3, whose flags a filter cannot read, to clone.
        refuse(_CLONE3, _ENOSYS)
        clone = _CLONE[machine]
        program.extend(
            [(_JEQ, 0, 4, clone), (_LD, 0, 0, 16), (_JSET, 1, 0, 0x10000), (_RET, 0, 0, _EPERM), (_RET, 0, 0, _ALLOW)]
        )
        for number in _KILL[machine]:
            # tkill names a thread, whose number is not known here; the main thread's is the process's.
            only_self(number, pid)
    only_self(_PRLIMIT[machine], 0, pid)
    program.append((_RET, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in program)
