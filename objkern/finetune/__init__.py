"""Fine-tuning with any objective: from a file of examples to a saved model and a report.

    data.py         rows from files, folders and hubs;  tasks/: what five kinds of models learn from them
    small.py        a small model from scratch;  strategies.py: what of a model trains
    training.py     the loop: exact windows, schedules.py, early stopping, checkpoints.py
    retention.py    what keeps the starting model in mind
    run.py          one run from start to end;  cli.py: `python -m objkern finetune`
    record.py       what a run writes while it trains;  reports.py, tables.py: what one looks at
    saved.py        models on disk, with adapters.py, card.py, onnx.py;  deploy.py: `predict`, `export`, `report`
    whole.py        files and folders that are there whole or not at all;  lock.py: one process at a time in a folder
    metrics.py      spans and their scores;  memory.py: peak memory
    demo/           `make demo`

`import objkern` doesn't import this package; it needs the packages of the extra `finetune`.
"""
