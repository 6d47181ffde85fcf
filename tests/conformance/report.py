"""The largest deviation of each implementation: `python tests/conformance/report.py`."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "harness"))
from implementations import IMPLEMENTATIONS, NAMES, deviations, read


def main() -> None:
    kinds = ("thresholds", "coefficients", "histories", "gradients")
    print(f"{'largest relative deviation':28}", *(f"{kind:>14}" for kind in kinds))
    for name, run in IMPLEMENTATIONS.items():
        largest: dict[str, float] = defaultdict(float)
        for file in map(read, NAMES):
            for kind, deviation in deviations(file, run(file)):
                largest[kind] = max(largest[kind], deviation)
        cells = (f"{largest[kind]:14.1e}" if kind in largest else f"{'-':>14}" for kind in kinds)
        print(f"{name:28}", *cells, flush=True)


if __name__ == "__main__":
    main()
