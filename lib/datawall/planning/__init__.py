"""Before a run: a look into data, a new study file, its check, its plan, and what its units cost on this machine.

Serves `run_all.py` with `--new`, `--check`, `--plan` and `--calibrate`; no notebook. May import all but `reading`.
"""
