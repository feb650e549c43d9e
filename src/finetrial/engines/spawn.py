"""A fresh Python for every run, on this machine: nothing shared with any other, and its imports paid each time.

`local` is the same without the imports where that is safe; this is for where one would rather not rely on that.
"""

from __future__ import annotations

from finetrial.processes import FreshPython


class Spawn(FreshPython):
    """`python -m finetrial.worker` in a new session, output to the run's log."""


PLUGIN = Spawn()
