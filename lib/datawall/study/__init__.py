"""What a study is: its file, its units of work (their keys, how each is made and read) and what notebooks ask of it.

Serves notebooks 1 to 7. May import `analysis`, `tasks`, `models`, `cells` and `engine`.
"""
