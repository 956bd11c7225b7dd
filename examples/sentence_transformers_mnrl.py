"""sentence-transformers with this package's MultipleNegativesRankingLoss, on a small BERT with random weights.

python examples/sentence_transformers_mnrl.py --steps 100 --batch 64
"""

import argparse
import random
import tempfile

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

import fastntxent
from fastntxent.compat.sentence_transformers import MultipleNegativesRankingLoss  # the only line that changes

WORDS, LENGTH = 40, 4  # words per made-up language, and words per sentence


def tiny_bert() -> SentenceTransformer:
    """Return a model with random weights. In your script, load a pretrained one by name."""
    words = [f"{language}{i}" for language in ("left", "right") for i in range(WORDS)]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        BertTokenizer(vocabulary).save_pretrained(folder)
        transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(config.hidden_size)], device="cpu")


def draw(count: int) -> tuple[list[str], list[str]]:
    """Return sentences in one language and their translations in the other."""
    sentences = [random.choices(range(WORDS), k=LENGTH) for _ in range(count)]
    left, right = ([" ".join(f"{name}{i}" for i in words) for words in sentences] for name in ("left", "right"))
    return left, right


def accuracy(model: SentenceTransformer, left: list[str], right: list[str]) -> float:
    """Return the share of left sentences for which the most similar right sentence is the translation."""
    queries, corpus = (model.encode(texts, convert_to_tensor=True) for texts in (left, right))
    return (fastntxent.retrieve(queries, corpus, k=1).indices[:, 0] == torch.arange(len(left))).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)

    model = tiny_bert()
    loss_fn = MultipleNegativesRankingLoss(model, scale=20.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    held_out = draw(256)
    before, losses = accuracy(model, *held_out), []
    # With the library `datasets` installed, SentenceTransformerTrainer(..., loss=loss_fn) can run these steps instead.
    for _ in range(args.steps):
        model.train()
        loss = loss_fn([model.preprocess(texts) for texts in draw(args.batch)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"retrieval: {before:.3f} -> {accuracy(model, *held_out):.3f}")


if __name__ == "__main__":
    main()
