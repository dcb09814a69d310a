"""What all tests share: how many examples hypothesis tries, chosen by ``HYPOTHESIS_PROFILE``.

``dev`` is the default, ``ci`` where ``CI`` is set, ``nightly`` is for campaigns. No profile has a deadline: two
busy cores say nothing about one example.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

SLOW_MACHINE = [HealthCheck.too_slow]

settings.register_profile("dev", deadline=None, max_examples=50, suppress_health_check=SLOW_MACHINE)
settings.register_profile(
    "ci", deadline=None, max_examples=100, print_blob=True, suppress_health_check=SLOW_MACHINE
)
settings.register_profile(
    "nightly", deadline=None, max_examples=5000, print_blob=True, suppress_health_check=SLOW_MACHINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))
