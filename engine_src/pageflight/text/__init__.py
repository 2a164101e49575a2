"""Tokenizer, incremental detokenizer, stop strings, chat template."""
