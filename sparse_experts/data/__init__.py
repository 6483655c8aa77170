"""Data: sources of documents, tokenizers, records of both objectives, and the feed to devices."""

from sparse_experts.data.datasets import Dataset, example, lengths, make_dataset
from sparse_experts.data.feed import Feed, eval_batches, in_time
from sparse_experts.data.sources import Source, as_source, open_source
from sparse_experts.data.statistics import bigram_entropy, bytes_per_target, unigram_entropy
from sparse_experts.data.tokenizers import Tokenizer, make_tokenizer

__all__ = [
    "Dataset", "Feed", "Source", "Tokenizer", "as_source", "bigram_entropy", "bytes_per_target",
    "eval_batches", "example", "in_time", "lengths", "make_dataset", "make_tokenizer", "open_source",
    "unigram_entropy"]
