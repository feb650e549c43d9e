"""SST-2, the sentiment of film reviews (Socher et al. 2013), as GLUE has it; judged by accuracy.

The columns are GLUE's; your own files may have others (`columns`). On the Hub GLUE hides its test labels
where it has not published them; the official dev set is then the test split and validation is cut off train.
"""

from __future__ import annotations

from finetrial.data import DataSource
from finetrial.heads.classification_task import ClassificationTask, ClassificationTaskParams


class Params(ClassificationTaskParams):
    """As for `classification`, with GLUE's SST-2 as the default data."""

    data: DataSource = DataSource(hub="nyu-mll/glue", config="sst2")


PLUGIN = ClassificationTask(Params, columns={"text": "sentence"})
