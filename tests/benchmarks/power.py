"""Power and false alarms of each saturation rule at 3, 5 and 10 seeds, on learning curves with a known truth.

python tests/benchmarks/power.py [curves of each truth, 250]    under five minutes
"""

import sys

from datawall import power

table = power.rates(int(sys.argv[1]) if len(sys.argv) > 1 else 250)
print(table.round(2).to_string(index=False))
