"""A sentence-transformers model trained with symmetric in-batch negatives that hold no matrix.

    pip install 'fastclip-torch[sentence-transformers]'
    python examples/sentence_transformers_training.py

The loss has the interface of sentence-transformers' own: hand it to SentenceTransformerTrainer. The
loop is written out here so that nothing has to be downloaded: the model maps a few words to
vectors.
"""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

from fastclip.losses.sentence_transformers import SymmetricRankingLoss

STEPS, TOLERANCE = 30, 1e-4
TOPICS = ("rain", "trees", "bread", "stone", "music", "trains")
PAIRS = [(f"question {n} about {topic}", f"answer {n}: {topic}") for n, topic in enumerate(TOPICS)]


class Words(nn.Module):
    """Mean of learned word vectors."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.words = {word: n for n, word in enumerate(sorted(set(" ".join(texts).split())))}
        self.vectors = nn.Embedding(len(self.words), 32)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        counts = torch.zeros(len(texts), len(self.words))
        for row, text in zip(counts, texts, strict=True):
            for word in text.split():
                row[self.words[word]] += 1
        return {"counts": counts}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = features["counts"]
        mean = counts @ self.vectors.weight / counts.sum(1, keepdim=True)
        return {**features, "sentence_embedding": mean}


def main() -> None:
    torch.manual_seed(0)
    words = Words([text for pair in PAIRS for text in pair])
    model = SentenceTransformer(modules=[words], device="cpu")
    loss = SymmetricRankingLoss(model)
    theirs = MultipleNegativesRankingLoss(
        model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    columns = [words.tokenize(list(texts)) for texts in zip(*PAIRS, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    values = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss([dict(column) for column in columns], torch.empty(0))
        expected = theirs([dict(column) for column in columns], torch.empty(0))
        if abs(float(value.detach()) - float(expected.detach())) > TOLERANCE:
            raise SystemExit(f"{float(value)} is not {float(expected)}")
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    print(f"loss {values[0]:.4f} -> {values[-1]:.4f}")
    if values[-1] > values[0] / 2:
        raise SystemExit("the loss did not fall")
    print(f"ok: {STEPS} steps, losses equal to {TOLERANCE}")


if __name__ == "__main__":
    main()
