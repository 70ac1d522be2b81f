"""A wall whose place is known: what PretrainedPCA learns of a simulated atlas, and what each rule says of it.

python tests/benchmarks/known_answer.py [seeds, 100]    three minutes; with all 100, it writes the packaged table
"""

import sys

from datawall.analysis import known_answer

print("% of a corpus that it takes, as planted:", known_answer.percentage_needed().round(1).to_dict())
if len(sys.argv) > 1 and (n_seeds := int(sys.argv[1])) < len(known_answer.SEEDS):
    learned = known_answer.learn(range(n_seeds))
    print(learned.pivot_table(index="dataset", columns="percentage", values="value").round(3).to_string())
    sys.exit()
# Without a time in the archive, the same numbers make the same file.
compression = {"method": "gzip", "mtime": 0}
learned = known_answer.learn(known_answer.SEEDS)
learned.to_csv(known_answer.TABLE, index=False, float_format="%.6f", compression=compression)
results = known_answer.results()
for statistic in ("mean", "std"):
    table = results.pivot_table(index="dataset", columns="percentage", values="value", aggfunc=statistic)
    print(f"\nmicro-F1, {statistic} over seeds\n{table.round(3).to_string()}")
print("\nplateaus begin at", known_answer.plateaus(results).to_dict())
rates = known_answer.rates(results)
rates.to_csv(known_answer.RATES, index=False, float_format="%.3f")
print(rates.round(2).to_string(index=False, na_rep=""))
