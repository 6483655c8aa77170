"""Data: sources of documents and images, what ids and classes mean, records, and the feed to devices."""

from sparse_experts.data.feed import Feed, eval_batches, in_time
from sparse_experts.data.images.classes import Classes
from sparse_experts.data.kinds import (
    as_source,
    example,
    has_images,
    has_pairs,
    hold_out,
    make_dataset,
    make_vocabulary,
    open_source,
    read_vocabulary,
    row_lengths,
)
from sparse_experts.data.sources import Source
from sparse_experts.data.text.datasets import Dataset, lengths
from sparse_experts.data.text.statistics import bigram_entropy, bytes_per_target, unigram_entropy
from sparse_experts.data.text.tokenizers import Tokenizer, make_tokenizer

__all__ = [
    "Classes", "Dataset", "Feed", "Source", "Tokenizer", "as_source", "bigram_entropy", "bytes_per_target",
    "eval_batches", "example", "has_images", "has_pairs", "hold_out", "in_time", "lengths", "make_dataset",
    "make_tokenizer", "make_vocabulary", "open_source", "read_vocabulary", "row_lengths", "unigram_entropy"]
