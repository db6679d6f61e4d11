"""Which processes a process has started, told by Linux's /proc."""

from pathlib import Path


def session(leader: int) -> list[int]:
    """Process numbers of the session that `leader` has begun, itself included, that have not ended: it and all that it has started,
    and that these have, but for those that began a session of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(number) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found
