"""`make gpu`: builds, tests, checks and measures on a CUDA device, and writes one JSON file.

    python -m benchmarks.gpu [--only STEP] [--quick] [--out DIR]     needs torch, pytest, pybind11 and ninja; no make

    __main__.py     the command                         run.py          steps as processes with a time limit
    step.py         a step's own end                    device.py       time and memory on the device
    facts.py        where it ran                        suite.py        tests/gpu, each file and backend by itself
    sanitizer.py    compute-sanitizer over              every_kernel.py small calls of every kernel
    ceilings.py     what the device can do              contest.py      who takes part, in turns
    objectives.py   large logits                        small.py        small ones
    variants.py     forward, gradient and fused apart   plans.py        how kernels are launched, for the tables
    host.py         what a call costs the host          elementwise.py  elementwise objectives
    finetune.py     whole steps of a language model     figures.py      targets
    claims.py       what is claimed                     status.py       docs/gpu-status.md

Nothing here changes a setting of the device: it is measured as it is found.
"""
