"""Data: sources, what ids and classes stand for, records by number, and the feed to devices.

What is of text, labelled texts, images or pairs stands in a folder of that name; a task
(`sparse_experts/tasks`) chooses. Of all this only the feed and the testbeds import jax.
"""

from sparse_experts.data.dataset import Dataset, Record
from sparse_experts.data.images.classes import Classes
from sparse_experts.data.sources import Source
from sparse_experts.data.text.tokenizer import Tokenizer
from sparse_experts.data.text.tokenizers import make_tokenizer

Vocabulary = Tokenizer | Classes
