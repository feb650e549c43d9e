"""MRPC, do two sentences say the same (Dolan and Brockett 2005), as GLUE has it; judged by F1.

The columns are GLUE's; your own files may have others (`columns`). On the Hub GLUE hides its test labels
where it has not published them; the official dev set is then the test split and validation is cut off train.
"""

from __future__ import annotations

from finetrial.data import DataSource
from finetrial.heads.classification_task import ClassificationTask, ClassificationTaskParams, MetricName


class Params(ClassificationTaskParams):
    """As for `classification`, with GLUE's MRPC as the default data."""

    data: DataSource = DataSource(hub="nyu-mll/glue", config="mrpc")
    metric: MetricName = "f1"


PLUGIN = ClassificationTask(Params, columns={"text": "sentence1", "text_pair": "sentence2"})
