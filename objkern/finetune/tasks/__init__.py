"""The five tasks: what data they read, what models they train, and how good an answer is.

task.py                      what the loop asks of each
sequence_classification.py   a class, several labels or a number for a text or a pair
token_classification.py      a tag for every word
question_answering.py        the span that answers a question
causal_lm.py                 what comes next: texts, prompts and completions, chats
seq2seq.py                   a text from a text
"""

from .causal_lm import CausalLM
from .question_answering import QuestionAnswering
from .seq2seq import Seq2Seq
from .sequence_classification import SequenceClassification
from .task import Batch, Evaluation, Example, Task
from .token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (SequenceClassification, TokenClassification, QuestionAnswering, CausalLM, Seq2Seq)
}

__all__ = [
    "TASKS",
    "Batch",
    "CausalLM",
    "Evaluation",
    "Example",
    "QuestionAnswering",
    "Seq2Seq",
    "SequenceClassification",
    "Task",
    "TokenClassification",
]
