"""Progress bars of other libraries stay away while an export is written or read, and come back afterwards."""

import io

import pytest
from byte_tokenizers import ROWS, byte_tokenizer
from models import llama
from tqdm.auto import tqdm

from lightning_qat import export, insert_quantizers, load_quantized
from lightning_qat.formats.folder.quiet import no_progress_bars


def shown(**options):
    file = io.StringIO()
    list(tqdm(range(2), file=file, **options))
    return file.getvalue()


def test_bars_are_silent_in_the_block_only():
    assert "2/2" in shown()
    with no_progress_bars():
        assert shown() == shown(disable=False) == ""
    assert "2/2" in shown()
    with pytest.raises(ZeroDivisionError), no_progress_bars():
        raise ZeroDivisionError
    assert "2/2" in shown()


@pytest.mark.parametrize(("format", "scheme"), [("gguf", "gguf-q8_0"), ("compressed-tensors", "ct-w4a8")])
def test_an_export_is_silent(format, scheme, tmp_path, capfd):
    pytest.importorskip(format.replace("-", "_"))
    model = llama(vocab_size=ROWS, intermediate_size=64)
    insert_quantizers(model, scheme)
    load_quantized(export(model, tmp_path / "out", format=format, tokenizer=byte_tokenizer()))
    assert "it/s" not in capfd.readouterr().err
