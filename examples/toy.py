"""A language model small enough for a test, and what the examples beside it share. Put your own model in its place."""

import torch
from torch import Tensor, nn

VOCABULARY, FEATURES, IGNORED = 40, 32, -100


class ToyModel(nn.Module):
    """Hidden states (B, T, D) from tokens (B, T), and a head (V, D) to predict the next token with."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.body = nn.GRU(FEATURES, FEATURES, batch_first=True)
        self.head = nn.Linear(FEATURES, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.embedding(tokens))[0]

    @torch.no_grad()
    def sample(self, prompts: Tensor, length: int) -> Tensor:
        """The prompts and `length` tokens more."""
        tokens = prompts
        for _ in range(length):
            probabilities = self.head(self(tokens)[:, -1]).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], dim=1)
        return tokens


def completions_only(tokens: Tensor, prompt: int) -> Tensor:
    """Labels that leave the prompt out."""
    labels = tokens.clone()
    labels[:, :prompt] = IGNORED
    return labels


def preferences(batch: int, length: int = 12, prompt: int = 4) -> tuple[Tensor, Tensor]:
    """Chosen and rejected completions of the same prompts: each token the last one plus 1, or any token at all."""
    begin = torch.randint(0, VOCABULARY, (batch, 1))
    chosen = (begin + torch.arange(length)) % VOCABULARY
    rejected = chosen.clone()
    rejected[:, prompt:] = torch.randint(0, VOCABULARY, (batch, length - prompt))
    return chosen, rejected


def reward(tokens: Tensor, prompt: int) -> Tensor:
    """(B) the share of even tokens in each completion."""
    return (tokens[:, prompt:] % 2 == 0).double().mean(1).float()
