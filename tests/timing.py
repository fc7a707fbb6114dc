"""Seconds that do not depend on what else the machine does."""

import resource


def children_seconds() -> float:
    """Processor seconds, user and system, of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
