"""A slip in an argument is one message that says what was expected, before torch is imported."""

import json
import re
import subprocess
import sys

import pytest

RUN = """
import contextlib, io, json, os, sys
from bc_plugin.cli import main
os.environ["HF_HUB_OFFLINE"] = "1"
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["bc-plugin", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(out):
            try:
                main()
                code = 0
            except SystemExit as exit:
                code = exit.code or 0
    print(json.dumps([code, out.getvalue(), sorted({"torch", "transformers"} & set(sys.modules))]))
"""
TEXT = ("--dataset", "text.txt")
QUANTIZE = ("quantize", "float", "new", *TEXT)
COMPENSATE = ("compensate", "quantized", "float", "new", *TEXT)
REFINE = ("refine", "compensated", "float", "new", *TEXT)
EVALUATE = ("evaluate", "float", *TEXT)
OF_FILE = ("compensate", "text.gguf", "float")
PLAN = ("plan", "float")
EXPORT = ("export", "quantized", "new")


def _data(file):
    return ("evaluate", "float", "--dataset", file)


SAID = [
    # Models.
    (("quantize", "./none", "new", *TEXT), r"FLOAT \./none does not exist; name a folder that"),
    (("quantize", "no/such/folder", "new", *TEXT), r"FLOAT no/such/folder does not exist"),
    (("quantize", "nobody/none", "new", *TEXT), r"FLOAT nobody/none is no folder, and the hub"),
    (("evaluate", "none", *TEXT), r"MODEL none is no folder, and the hub gives no model of that"),
    (("quantize", "empty", "new", *TEXT), r"FLOAT empty is no checkpoint: it has no config.json"),
    (("quantize", "text.txt", "new", *TEXT), r"FLOAT text.txt is a file; name a folder"),
    (("quantize", "broken", "new", *TEXT), r"FLOAT broken/config.json is damaged \(Expecting"),
    (("quantize", "list", "new", *TEXT), r"FLOAT list/config.json is damaged \(expected an object"),
    (("quantize", "binary", "new", *TEXT), r"FLOAT binary/config.json is damaged \(.*utf-8"),
    (("quantize", "quantized", "new", *TEXT), r"FLOAT quantized is quantized \(gptq\); expected"),
    (("compensate", "float", "quantized", "new", *TEXT), r"FLOAT .*arguments in the order"),
    (("refine", "float", "quantized", "new", *TEXT), r"FLOAT .*arguments in the order"),
    (("refine", "quantized", "float", "new", *TEXT), r"quantized is not compensated.* entry"),
    (("compensate", "quantized", "compensated", "new", *TEXT), r"FLOAT compensated is compensated"),
    (("compensate", "none/", "float", "new", *TEXT), r"QUANTIZED none/ does not exist"),
    (("refine", "./none", "float", "new", *TEXT), r"COMPENSATED \./none does not exist"),
    (("evaluate", "./none", *TEXT), r"MODEL \./none does not exist"),
    ((*EVALUATE, "--reference", "./none"), r"--reference \./none does not exist"),
    (("export", "none", "new"), r"COMPENSATED none does not exist"),
    (("export", "empty", "new"), r"COMPENSATED empty is no checkpoint"),
    (("inspect", "none"), r"MODEL none does not exist"),
    (("inspect", "text.txt"), r"MODEL text.txt is a file"),
    # Data.
    (_data("none.txt"), r"dataset 'none.txt' is neither a file nor one of \['c4', 'wikitext2'\]"),
    (_data("."), r"dataset '.' is neither a file nor"),
    (_data("self"), r"dataset 'self' is neither a file nor"),
    (_data("table.csv"), r"dataset 'table.csv' is a .csv; expected .txt .* or .jsonl"),
    (_data("empty.txt"), r"dataset 'empty.txt' has no text"),
    (_data("empty.jsonl"), r"dataset 'empty.jsonl' has no text"),
    (_data("utf-16.txt"), r"dataset 'utf-16.txt' is not text in UTF-8 \(byte 0 is 0xff\)"),
    (_data("utf-16-le.txt"), r"dataset 'utf-16-le.txt' is not text in UTF-8 \(character 1"),
    (_data("latin-1.txt"), r"dataset 'latin-1.txt' is not text in UTF-8 \(byte 3 is 0xe9\)"),
    (_data("field.jsonl"), r"'field.jsonl', line 2 has no text in a field \"text\" .*\['x'\]"),
    (_data("number.jsonl"), r"'number.jsonl', line 1 has no text in a field"),
    (_data("list.jsonl"), r"'list.jsonl', line 1 has no text .*\(list\)"),
    (_data("cut.jsonl"), r"'cut.jsonl', line 1 is not JSON .*expected one object a line"),
    (("quantize", "float", "new", "--dataset", "table.csv"), r"dataset 'table.csv' is a .csv"),
    (("compensate", "quantized", "float", "new", "--dataset", "none"), r"'none' is neither a"),
    (("refine", "compensated", "float", "new", "--dataset", "none"), r"'none' is neither a file"),
    # Settings.
    ((*QUANTIZE, "--bits", "5"), r"--bits 5: expected one of 2, 3, 4, 8\."),
    ((*QUANTIZE, "--group-size", "100"), r"--group-size 100: expected one of -1, 16, 32, 64, 128"),
    ((*QUANTIZE, "--group-size", "0"), r"--group-size 0: expected one of"),
    ((*QUANTIZE, "--damp", "0"), r"--damp 0.0: expected a share above 0 and below 1"),
    ((*QUANTIZE, "--damp", "nan"), r"--damp nan: expected a share"),
    ((*QUANTIZE, "--desc-act", "--act-group-aware"), r"--desc-act and --act-group-aware are two"),
    ((*QUANTIZE, "--refine-steps", "-1"), r"refine_steps=-1; expected a whole number from 0"),
    ((*QUANTIZE, "--dtype", "foo"), r"--dtype foo: expected one of auto, float16"),
    ((*EVALUATE, "--dtype", "foo"), r"--dtype foo: expected one of auto, float16"),
    ((*QUANTIZE, "--device-map", "gpu"), r"--device-map gpu: expected one of auto, .*cuda"),
    ((*QUANTIZE, "--device-map", "cuda:x"), r"--device-map cuda:x: expected one of"),
    ((*QUANTIZE, "--device-map", "auto:1"), r"--device-map auto:1: expected one of"),
    ((*QUANTIZE, "--positions", "-1"), r"positions='-1'; expected a whole number from 0 up, or"),
    ((*COMPENSATE, "--positions", "1.5"), r"positions='1.5'; expected a whole number from 0 up"),
    ((*COMPENSATE, "--sites", "linear,linear"), r"sites=\('linear', 'linear'\); expected any of"),
    ((*COMPENSATE, "--batch-tokens", "0"), r"batch_tokens=0; expected a whole number above 0"),
    ((*PLAN, "--batch-tokens", "0"), r"batch_tokens=0; expected a whole number above 0"),
    ((*REFINE, "--batch-tokens", "0"), r"batch_tokens=0; expected a whole number above 0"),
    ((*COMPENSATE, "--sites", "heads"), r"sites=\('heads',\); expected any of"),
    ((*COMPENSATE, "--sites", ""), r"sites=\(\); expected any of"),
    ((*REFINE, "--by", "layer"), r"by='layer'; expected one of \('model', 'block'\)"),
    ((*REFINE, "--steps", "0"), r"steps=0; expected a whole number above 0"),
    ((*REFINE, "--learning-rate", "-1"), r"learning_rate=-1.0; expected above 0"),
    ((*REFINE, "--mixed-precision", "fp8"), r"mixed_precision='fp8'; expected one of"),
    ((*EXPORT, "--for", "nonsense"), r"--for nonsense: expected one of transformers, vllm, llama"),
    ((*EXPORT, "--device-map", "gpu"), r"--device-map gpu: expected one of"),
    ((*PLAN, "--bits", "5"), r"--bits 5: expected one of 2, 3, 4, 8\."),
    ((*PLAN, "--dtype", "foo"), r"--dtype foo: expected one of auto, float16"),
    ((*PLAN, "--tflops", "0"), r"--tflops 0.0: expected a number above 0"),
    ((*PLAN, "--refine-steps", "-1"), r"steps=-1; expected a whole number above 0"),
    ((*PLAN, "--positions", "-1"), r"positions='-1'; expected a whole number from 0 up, or"),
    (("plan", "quantized"), r"FLOAT quantized is quantized \(gptq\)"),
    # OUT.
    (("quantize", "float", "float", *TEXT), r"float exists already; name one that does not"),
    (("quantize", "float", "float", "--dataset", "none"), r"float exists already"),
    (("compensate", "quantized", "float", "empty", *TEXT), r"empty exists already"),
    (("refine", "compensated", "float", ".", *TEXT), r"\. exists already"),
    (("export", "quantized", "text.txt"), r"text.txt exists already"),
    (("refine", "compensated", "float", "old", *TEXT), r"old.refining is for progress, and is a f"),
    (("quantize", "float", "text.txt/new", *TEXT), r"text.txt/new cannot be made: .*may write to"),
    # GGUF files.
    ((*OF_FILE, "new", *TEXT), r"new: what is written is a GGUF file; name one"),
    ((*OF_FILE, "text.gguf", *TEXT), r"text.gguf exists already; name one that does not"),
    ((*OF_FILE, "new.gguf", *TEXT), r"text.gguf is no GGUF file, or is damaged or incomplete"),
    (("compensate", "no.gguf", "float", "new.gguf", *TEXT), r"there is no file no.gguf"),
    ((*OF_FILE, "new.gguf", *TEXT, "--positions", "1"), r"--positions 1: a GGUF file has one bias"),
    ((*OF_FILE, "new.gguf", *TEXT, "--scales"), r"--scales: the scales of a GGUF file stay"),
    (("refine", *OF_FILE[1:], "new.gguf", *TEXT, "--train", "norms"), r"`vectors` are trained"),
    (("evaluate", "text.gguf", *TEXT), r"text.gguf is no GGUF file"),
    (("inspect", "no.gguf"), r"there is no file no.gguf"),
]
USAGE = [
    ((*QUANTIZE, "--samples", "0"), "--samples"),
    ((*COMPENSATE, "--length", "-1"), "--length"),
    ((*EVALUATE, "--tokens", "0"), "--tokens"),
    ((*EVALUATE, "--length", "1"), "--length"),
    ((*QUANTIZE, "--bits", "three"), "--bits"),
    (("quantize", "float"), "OUT"),
    ((*PLAN, "--devices", "0"), "--devices"),
    (("quantise",), "quantise"),
]


def _cases(rows):
    return [pytest.param(*row, id=" ".join(row[0])) for row in rows]


FINE = [(), ("--help",), ("--version",), ("quantize", "--help"), ("run", "--help")]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the commands answer, one after another in one process: code, text, what is imported."""
    folder = tmp_path_factory.mktemp("arguments")
    configs = {
        "float": "{}",
        "broken": "{",
        "list": "[]",
        "quantized": '{"quantization_config": {"quant_method": "gptq"}}',
        "compensated": '{"bias_compensation": {}}',
    }
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    (folder / "empty").mkdir()
    (folder / "binary").mkdir()
    (folder / "binary" / "config.json").write_bytes(b"\xff\xfe")
    files = {
        "text.txt": "text",
        "text.gguf": "no model",
        "old.refining": "",
        "table.csv": "a,b",
        "empty.txt": " \n",
        "empty.jsonl": "\n",
        "field.jsonl": '{"text": "a"}\n{"x": "b"}\n',
        "number.jsonl": '{"text": 1}\n',
        "list.jsonl": "[1]\n",
        "cut.jsonl": '{"text": \n',
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    for encoding, text in {
        "utf-16": "caf\u00e9",
        "utf-16-le": "cafe",
        "latin-1": "caf\u00e9",
    }.items():
        (folder / f"{encoding}.txt").write_text(text, encoding=encoding)
    before = sorted(folder.rglob("*"))
    asked = [list(arguments) for arguments in (*dict(SAID), *dict(USAGE), *FINE)]
    command = [sys.executable, "-c", RUN, json.dumps(asked)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before, "something was written"
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {tuple(arguments): line for arguments, line in zip(asked, lines, strict=True)}


@pytest.mark.parametrize(("arguments", "said"), _cases(SAID))
def test_an_error_of_ours(answers, arguments, said):
    code, text, heavy = answers[arguments]
    assert re.match(f"error: .*{said}", text), text
    assert (code, heavy) == (1, [])
    assert text.count("\n") == 1


@pytest.mark.parametrize(("arguments", "said"), _cases(USAGE))
def test_a_usage_error(answers, arguments, said):
    code, text, heavy = answers[arguments]
    assert said in text
    assert (code, heavy) == (2, [])


@pytest.mark.parametrize("arguments", FINE, ids=" ".join)
def test_help_and_version_import_nothing_heavy(answers, arguments):
    code, text, heavy = answers[arguments]
    assert text
    assert (code, heavy) == (0 if arguments else 2, [])
