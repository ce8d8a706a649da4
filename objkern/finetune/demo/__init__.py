"""`make demo`: the same model trained with a fused objective and with the same formula in plain torch.

corpus.py      labelled sentences from the manual that every Python carries;  baseline.py: a table of words
native.py      the objective twice: fused, and as people write it in plain torch
comparison.py  two runs side by side, and what must hold between them
scale.py       the same objective on logits of language-model size
sentences.py   sentences with their entities marked
"""

from .main import main

__all__ = ["main"]
