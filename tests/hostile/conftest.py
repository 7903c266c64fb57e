"""Hypothesis draws the same inputs in each run of the suite, and others in each round of `make fuzz`."""

from hypothesis import HealthCheck, settings

from tests.hostile import ROUND

settings.register_profile(
    "hostile", derandomize=ROUND == 0, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("hostile")
