"""RTE, does one text follow from another (Dagan et al. 2006), as GLUE has it; judged by accuracy.

The columns are GLUE's; your own files may have others (`columns`). On the Hub GLUE hides its test labels
where it has not published them; the official dev set is then the test split and validation is cut off train.
"""

from __future__ import annotations

from finetrial.data import DataSource
from finetrial.heads.classification_task import ClassificationTask, ClassificationTaskParams


class Params(ClassificationTaskParams):
    """As for `classification`, with GLUE's RTE as the default data."""

    data: DataSource = DataSource(hub="nyu-mll/glue", config="rte")


PLUGIN = ClassificationTask(Params, columns={"text": "sentence1", "text_pair": "sentence2"})
