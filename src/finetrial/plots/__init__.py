"""Tidy rows in, figures out; the only part that imports matplotlib.

Not for choosing what is shown (`report_figures.py`) nor for its colours (`palette.py`).
"""

from matplotlib.figure import Figure

from finetrial.plots.arms import cost_figure, score_figure, search_figure, tuning_figure
from finetrial.plots.canvas import SETTING, save
from finetrial.plots.claims import claims_figure
from finetrial.plots.measured import drift_figure, forgetting_figure, spectrum_figure

__all__ = [
    "SETTING",
    "Figure",
    "claims_figure",
    "cost_figure",
    "drift_figure",
    "forgetting_figure",
    "save",
    "score_figure",
    "search_figure",
    "spectrum_figure",
    "tuning_figure",
]
