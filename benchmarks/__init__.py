"""Times and memory of this library and of upstream, side by side: `python -m benchmarks`.

Every row is written once, against the API that both libraries have, and runs in one process per library. The two
take turns; before anything is timed, their outputs are compared.
"""
