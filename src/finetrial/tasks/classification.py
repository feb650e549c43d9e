"""Classification of your own texts or pairs of texts: columns `text`, `text_pair` (optional) and `label`."""

from __future__ import annotations

from finetrial.heads.classification_task import ClassificationTask, ClassificationTaskParams

PLUGIN = ClassificationTask(ClassificationTaskParams)
