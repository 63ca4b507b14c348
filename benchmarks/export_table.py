"""What each format makes of each scheme: codes and scales after reload, logits, size, or why it refuses.

python -m benchmarks.export_table                # CPU, about 5 minutes on one core; writes docs/results/export-table.{json,md}
python -m benchmarks.export_table --schemes w4 w8a8 --formats native torchao --out runs/bench

A small Llama with random weights and the bundled tokenizer. Each scheme is exported as it is written, and once more with the conventions of
the format (`QuantScheme.parse(scheme, target=format)`). The library of the runtime reads every folder back.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import report
from lightning_qat import QuantScheme, TensorSpec, export, insert_quantizers
from lightning_qat.formats import formats
from lightning_qat.generation import TINY_TEACHER, load_tokenizer
from lightning_qat.runtime import runtimes
from lightning_qat.scheme import Override

GROUPS = {"granularity": "group", "group_size": 32}
SCHEMES = {
    **{name: QuantScheme.parse(name) for name in ("w8", "w4", "w3", "w2", "w4g32", "w8a8", "w4a8", "w4a8kv4", "llm-qat")},
    "w4g32 asymmetric": QuantScheme(weight=TensorSpec(bits=4, symmetric=False, **GROUPS)),
    "w4, down_proj w8": QuantScheme(weight=TensorSpec(bits=4), overrides=(Override(names=("down_proj",), weight=TensorSpec(bits=8)),)),
}
MODEL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def build(vocabulary: int) -> LlamaForCausalLM:
    """The same random model on every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, initializer_range=0.06, **MODEL)).eval()


def cell(name: str, scheme: QuantScheme, fitted: bool, tokenizer: Any) -> dict[str, Any]:
    """One export, or why there is none."""
    started = time.perf_counter()
    try:
        scheme = QuantScheme.parse(scheme, target=name) if fitted else scheme
        model = build(len(tokenizer))
        insert_quantizers(model, scheme)
        with tempfile.TemporaryDirectory() as folder:
            manifest = json.loads(
                (export(model, Path(folder) / "out", format=name, tokenizer=tokenizer) / "manifest.json").read_text("utf-8")
            )
    except ValueError as error:
        return {"refused": str(error)}
    except RuntimeError as error:
        return {"failed": str(error)}
    return {
        **{key: value for key, value in manifest["verification"].items() if isinstance(value, int | float) or value is None},
        "size_on_disk": manifest["size_on_disk"],
        "nominal": manifest["nominal_bits"] // 8,
        "seconds": time.perf_counter() - started,
    }


def cells(names: list[str], schemes: list[str]) -> Iterator[dict[str, Any]]:
    """Every scheme in every format; fitted where the format has conventions of its own."""
    tokenizer = load_tokenizer(TINY_TEACHER)
    for scheme in schemes:
        for name in names:
            for fitted in (False, True) if name in runtimes else (False,):
                found = cell(name, SCHEMES[scheme], fitted, tokenizer)
                print(scheme, name, "fitted" if fitted else "as written", found, flush=True)
                yield {"scheme": scheme, "format": name, "fitted": fitted, **found}


def page(result: dict[str, Any]) -> Iterator[str]:
    """Markdown from the JSON alone: two tables, then the messages."""
    device, versions, rows = result["device"], result["versions"], result["rows"]
    names = list(dict.fromkeys(row["format"] for row in rows))
    yield "# Every scheme in every format\n"
    yield f"```bash\n{result['command']}\n```\n"
    yield f"Run on {result['date']}: {device['cpu']}, {device['cpu_threads']} CPU threads."
    yield f"{', '.join(f'{name} {version}' for name, version in versions.items() if version)}.\n"
    yield (
        "A random Llama (2 layers, hidden 256) with the bundled tokenizer, in fp32. A cell: how many codes / scales differ after reload "
        "with the runtime's own library, the largest difference of logits to the fake-quantized model, and all files as a multiple of the "
        "nominal size (codes, scales, zero points, and every other tensor as it is; most of it are embeddings and head in fp32, so ratios "
        "lie near 1). A number in brackets is a refusal, see below.\n\n"
        "ONNX Runtime has products of its own, whose last bits differ. With quantized inputs a rounding may then fall on the other side, "
        "and a step of a code grows to what the table shows (0.05 to 0.09): each quantizer still makes bitwise the same values of the same "
        "input, which every export checks ([how](../targets/onnx.md))."
    )
    refused: dict[str, int] = {}
    for fitted in (False, True):
        yield f"\n## {'With the conventions of the format' if fitted else 'As written'}\n"
        yield f"| scheme | {' | '.join(names)} |\n|---{'|---' * len(names)}|"
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            here = {row["format"]: row for row in rows if row["scheme"] == scheme and row["fitted"] == fitted}
            yield f"| `{scheme}` | {' | '.join(_words(here.get(name), refused) for name in names)} |"
    yield "\n## Refused\n"
    yield from (f"{number}. {message}" for message, number in refused.items())


def _words(row: dict[str, Any] | None, refused: dict[str, int]) -> str:
    if row is None:
        return "-"
    if message := row.get("refused") or row.get("failed"):
        text = f"{row['format']}: " + "; ".join(line.strip() for line in message.splitlines()).replace(":;", ":")
        return f"{'failed' if 'failed' in row else 'no'} ({refused.setdefault(text, len(refused) + 1)})"
    logits = row.get("max_logit_difference")
    different = f"{row['codes_different']} / {row['scales_different']}"
    return f"{different}, {'-' if logits is None else f'{logits:.2g}'}, {row['size_on_disk'] / row['nominal']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_table", description=__doc__)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--formats", nargs="+", choices=formats.names(), default=formats.names())
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    result = report.head("cpu", "python -m benchmarks.export_table") | {"model": MODEL, "rows": []}
    args.out.mkdir(parents=True, exist_ok=True)
    for row in cells(args.formats, args.schemes):
        result["rows"].append(row)
        (args.out / "export-table.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (args.out / "export-table.md").write_text("\n".join(page(result)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
