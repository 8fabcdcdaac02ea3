"""What a group of processes has used: CPU and memory, on Linux from the kernel's files and clocks, elsewhere from `ps`."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

PROC = Path("/proc")
HAS_PROC = (PROC / "self" / "stat").exists()


def cpu_seconds(group: int) -> float:
    """User and system time of all processes of the process group that live, their ended threads included."""
    if HAS_PROC:
        return sum(map(_cpu_clock, _members(group)))
    return sum(_clock(row[1]) for row in _ps(group, "time"))


def memory_mib(group: int) -> float:
    """Resident memory, shared pages divided among those who share them; where that is not told, whole."""
    if HAS_PROC:
        return sum(map(_pss_kib, _members(group))) / 1024
    return sum(int(row[1]) for row in _ps(group, "rss")) / 1024


def _members(group: int) -> list[int]:
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            found.append(int(entry.name))
    return found


def _cpu_clock(pid: int) -> float:
    """The CPU clock of another process; its number is the one that `clock_getcpuclockid(3)` gives on Linux."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def _pss_kib(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return _rss_kib(pid)


def _rss_kib(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except OSError:
        return 0


def _ps(group: int, field: str) -> list[list[str]]:
    listed = subprocess.run(["ps", "-A", "-o", "pgid=", "-o", f"{field}="], capture_output=True, text=True, check=True, timeout=10)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [row for row in rows if len(row) == 2 and row[0] == str(group)]


def _clock(text: str) -> float:
    """`[[days-]hours:]minutes:seconds`, as `ps` tells a time."""
    days, _, rest = text.rpartition("-")
    seconds = 0.0
    for part in rest.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds + int(days or 0) * 86_400
