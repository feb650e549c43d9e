"""A user's own task, method, probe, engine and tracker: module name -> the text of its one file."""

from __future__ import annotations

FILES = {
    "my_task": """
        from finetrial.heads.classification import METRICS, Classification, ClassificationParams
        from finetrial.plugins import Splits

        class Params(ClassificationParams):
            rows: int = 24
            max_length: int = 16

        class Colours:
            Params = Params
            metric = METRICS["accuracy"]
            head = Classification()

            def files(self, params, base):
                return []

            def splits(self, params, base):
                def rows(split, count):
                    return [
                        {"id": f"{split} {n}", "text": ["red sun", "blue sea"][n % 2], "label": n % 2,
                         "classes": ("warm", "cold")}
                        for n in range(count)
                    ]
                return Splits(rows("train", params.rows), rows("validation", 12), rows("test", 12))

        PLUGIN = Colours()
    """,
    "my_method": """
        from finetrial.frozen import Frozen
        from finetrial.space import Range

        class Params(Frozen):
            layers: str = "all"

        class Biases:
            Params = Params
            space = {"learning_rate": Range(low=1e-3, high=1e-1, log=True)}

            def attach(self, given, settings, params):
                for name, parameter in given.model.named_parameters():
                    in_head = name.startswith(given.head_names)
                    parameter.requires_grad_(in_head or name.endswith(".bias"))
                return given.model

            def group(self, parameter_name, head_names):
                return "head" if parameter_name.startswith(tuple(head_names)) else "body"

            def must_move(self):
                return ("head", "body")

            def read_back(self, model):
                trained = [name for name, p in model.named_parameters() if p.requires_grad]
                return {"trained_biases": sum(name.endswith(".bias") for name in trained)}

            def save(self, model, folder):
                model.save_pretrained(folder)

            def load(self, base, folder):
                return type(base).from_pretrained(folder)

        PLUGIN = Biases()
    """,
    "my_probe": """
        from finetrial.frozen import Frozen

        class Params(Frozen):
            rows: int = 8
            power: float = 2.0

        class Distance:
            Params = Params

            def measure(self, given, params):
                base, tuned = dict(given.base.named_parameters()), dict(given.tuned.named_parameters())
                moved = sum(float(((base[n] - tuned[n]).abs() ** params.power).sum()) for n in base)
                return {"moved": moved, "batches": len(given.batches)}

        PLUGIN = Distance()
    """,
    "my_engine": """
        import os
        from typing import NamedTuple

        from finetrial.plugins import Exit

        class Handle(NamedTuple):
            pid: int
            code: int

        class Counting:
            def start(self, run_folder, spec):
                from finetrial import worker
                from finetrial.store import RunFolder

                with (run_folder.parent.parent / "started.txt").open("a") as started:
                    started.write(f"{spec.run_id}\\n")
                return Handle(os.getpid(), worker.work(RunFolder(run_folder)))

            def poll(self, handle):
                return Exit(handle.code)

            def stop(self, handle, grace_seconds):
                return None

        PLUGIN = Counting()
    """,
    "my_tracker": """
        import json

        class Lines:
            def replay(self, folder, spec, records, result):
                line = {"run": spec.run_id, "records": len(list(records)), "outcome": result and result.outcome}
                with (folder / "lines.jsonl").open("a") as stream:
                    stream.write(json.dumps(line) + "\\n")

        PLUGIN = Lines()
    """,
}
