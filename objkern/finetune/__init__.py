"""Fine-tuning with an objkern objective: today token classification, from real text to a saved model.

    config.py                what a run needs to know, its command-line options and their checks
    corpus.py                labelled sentences from the manual that every Python carries
    token_classification.py  tokenizer, batches, model, predictions
    loop.py                  the training loop, early stopping;  schedules.py: coefficients that change
    metrics.py               span precision, recall, F1;  baseline.py: the most frequent tag of a word
    run.py                   one run from start to end, with its files
    comparison.py            what must hold between the two runs;  summary.py: everything as JSON
    memory.py                peak memory of a process or of a call
    native.py                the demo's objective in plain torch
    demo.py                  `make demo`: fused against native, on the task and (scale.py) at language-model size
    report.py, curves.py     tables and predictions for the terminal, a picture
    cli.py                   `python -m objkern finetune`

`import objkern` doesn't import this package; it needs `pip install objkern[finetune]`.
"""
