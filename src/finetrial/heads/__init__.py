"""How a kind of task meets a model: encoding, loss, predictions, scores. Tasks pick one."""
