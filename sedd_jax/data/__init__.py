"""From text to batches: corpora → tokenizers → packing → loader."""
