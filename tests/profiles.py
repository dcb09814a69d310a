"""How hard hypothesis tries, by ``HYPOTHESIS_PROFILE``: what a test says is for ``dev`` and ``ci``.

``nightly`` tries 20 times as often. ``sanitized``, for a run under sanitizers after one without, a quarter as often: it
looks for what C does wrong on the way, and every example goes the same way.
"""

from __future__ import annotations

import os

PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")


def tries(count: int) -> int:
    """So many examples instead of ``count``."""
    if PROFILE == "nightly":
        return count * 20
    return max(count // 4, 5) if PROFILE == "sanitized" else count
