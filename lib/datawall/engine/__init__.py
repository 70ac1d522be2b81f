"""How units of work are made once and found again, and where they run: knows nothing of cells, models or studies.

Serves every notebook. Imports nothing of the other packages.
"""
