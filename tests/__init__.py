"""The tests lie as the rooms of `src/peft` do: what `peft/<room>/<file>.py` does is tested in `tests/<room>/test_<file>.py`.

Besides the rooms: `laws` (every method on every kind of layer), `promises` (what may not happen, by number), `clients`
(libraries that build on this one), `live` (both libraries side by side), `benchmarks`, `golden` (files that upstream
made) and `helpers` (models and data that several files share).

The repository's root is on the path (`pythonpath` in pyproject.toml) and this folder is a package, so that everything
here is imported by its whole name: `from tests.helpers.cells import Cell`. The rooms themselves must not come onto the
path: a folder `kernels` there is taken for a package of that name by libraries that look for one.
"""
