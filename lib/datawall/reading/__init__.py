"""What people see: figures and their titles, the report, notebooks as pages, and what a run folder holds.

Serves notebooks 1 to 8. May import every other package; none imports it.
"""
