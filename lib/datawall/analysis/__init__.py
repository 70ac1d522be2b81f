"""What results say: tables, saturation points, curves, effects and their power, of a study and of the published one.

Serves notebooks 3 to 9. May import `tasks`, `models`, `cells` and `engine`.

Throughout, `results` are tidy results (`read_results`) of one study, and `metric` is any of its metrics, turned to an
error (1 - score) where one is needed; `margin` is a difference that does not matter, in the metric's units;
`confidence` is that of intervals and tests, which come as `low` and `high`, `p` and `p_adjusted`; `n_resamples` is the
bootstrap's. What cannot be compared raises ValueError: a value that is NaN, a metric without rows, several studies.
"""
