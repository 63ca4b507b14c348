"""A small quantized module to export, and what lies in a folder."""

from models import mlp

from lightning_qat import insert_quantizers


def quantized(build=mlp, scheme="w4a8"):
    model = build()
    insert_quantizers(model, scheme)
    return model


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())
