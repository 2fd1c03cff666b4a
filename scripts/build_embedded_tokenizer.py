"""Train the tokenizer that ships with hivetrain: a byte-level BPE of 4,096 ids on the training units of its corpus.

python scripts/build_embedded_tokenizer.py
"""

from hivetrain.data.bpe import train_bpe
from hivetrain.data.corpus import ASSETS, EmbeddedCorpus

if __name__ == "__main__":
    train_bpe(EmbeddedCorpus(), 4096, ASSETS / "tokenizers" / "embedded" / "tokenizer.json", show_progress=True)
