"""The folder of an export and what goes along with the weights: whole or not there, manifest, model card, tokenizer, upload."""
