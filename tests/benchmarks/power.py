"""How often each saturation rule sees a plateau, on learning curves with a known truth, with its Monte-Carlo error.

python tests/benchmarks/power.py [curves of each truth, 100]    five minutes; with 100, it writes the packaged table
"""

import sys

from datawall.analysis import power

n_curves = int(sys.argv[1]) if len(sys.argv) > 1 else 100
table = power.rates(n_curves)
if n_curves == 100:
    table.to_csv(power.TABLE, index=False, float_format="%.3f")
print(table.round(2).to_string(index=False, na_rep=""))
