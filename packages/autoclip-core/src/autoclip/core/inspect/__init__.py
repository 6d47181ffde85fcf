"""Looking at histories: reading them from files, summaries, plots, and the command `autoclip`.

Everything here imports the core, and nothing in the core imports it.

>>> from autoclip.core import History, Quantile
>>> from autoclip.core.inspect import summarize
>>> history = History(rows=1, rule=Quantile(0.5))
>>> for norm in (1.0, 2.0, 3.0, 12.0):
...     report = history.record([norm])
>>> summarize(history).rows[0].threshold
2.5
"""

from autoclip.core.inspect._reading import read_states
from autoclip.core.inspect._summary import RowSummary, Summary, summarize
from autoclip.core.inspect._text import printable

__all__ = ["RowSummary", "Summary", "printable", "read_states", "summarize"]
