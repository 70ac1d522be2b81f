"""What results say: tables, saturation points, curves, effects and their power, of a study and of the published one.

Serves notebooks 3 to 8. May import `tasks`, `models`, `cells` and `engine`.
"""
