"""Texts that ship with Python: words of its language reference, expressions and docstrings of its library."""

from __future__ import annotations

import ast
import io
import keyword
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from pyroelbo.data.dataset import Dataset
from pyroelbo.data.own import held_out
from pyroelbo.data.text import strings

__all__ = ["docstrings", "expressions", "words"]

_LONGEST = 14  # letters of a word
_TOKENS = 10  # of an expression
_FILES = (
    "argparse calendar configparser csv decimal difflib fractions gettext heapq imaplib inspect ipaddress "
    "locale mailbox optparse pdb pickle platform random shutil statistics subprocess tarfile typing zipfile"
)
_SUBJECTS = {
    "numbers": "statistics random fractions _pydecimal datetime _pydatetime",
    "files": "os shutil pathlib tempfile zipfile tarfile fileinput",
    "network": "socket http/client http/server ftplib smtplib urllib/request imaplib poplib",
}
_VOCABULARY, _DOCUMENT = 300, 40  # words known, and of a document


def words(root: Path | None) -> Dataset:
    """The words of up to 14 letters a … z in the language reference that ships inside Python, each once."""
    from pydoc_data.topics import topics

    known = set(re.findall("[a-z]+", " ".join(topics.values()).lower()))
    y, alphabet = strings(sorted(word for word in known if len(word) <= _LONGEST), _LONGEST)
    return Dataset("words", "strings", (), held_out(y), len(alphabet), _LONGEST, tuple(map(str, alphabet)))


def expressions(root: Path | None) -> Dataset:
    """Right-hand sides of 3 … 10 tokens in modules of Python's standard library, each once; names, numbers
    and strings lose their spelling."""
    found: set[tuple[str, ...]] = set()
    for module in _FILES.split():
        path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
        if path.is_file():
            found |= _expressions(path.read_text(encoding="utf-8"))
    if not found:
        raise FileNotFoundError(f"{sysconfig.get_paths()['stdlib']}: no sources of Python's library")
    sentences = sorted(found)
    names = tuple(sorted({token for sentence in sentences for token in sentence}))
    number = {token: i for i, token in enumerate(names)}
    y = torch.tensor([[number[t] for t in s] + [-1] * (_TOKENS - len(s)) for s in sentences])
    return Dataset("expressions", "sentences", (), held_out(y), len(names), _TOKENS, names)


def docstrings(root: Path | None) -> Dataset:
    """Docstrings of Python's standard library on numbers, files and networks (the labels): 5 … 40 words each,
    of the 300 commonest words of four letters or more that are in less than a tenth of them."""
    found: dict[tuple[str, ...], int] = {}
    for label, files in enumerate(_SUBJECTS.values()):
        for module in files.split():
            path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
            for text in _docstrings(path.read_text(encoding="utf-8")) if path.is_file() else ():
                found.setdefault(tuple(re.findall("[a-z]{4,}", text.lower())), label)
    if not found:
        raise FileNotFoundError(f"{sysconfig.get_paths()['stdlib']}: no sources of Python's library")
    documents = sorted(found)
    spread = Counter(w for document in documents for w in set(document))
    total = Counter(w for document in documents for w in document if spread[w] < len(documents) / 10)
    names = tuple(w for w, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:_VOCABULARY])
    number = {word: i for i, word in enumerate(names)}
    kept = [([number[w] for w in d if w in number][:_DOCUMENT], found[d]) for d in documents]
    kept = [(row, label) for row, label in kept if len(row) >= 5]
    y = torch.tensor([row + [-1] * (_DOCUMENT - len(row)) for row, _ in kept])
    labels = held_out(torch.tensor([label for _, label in kept]))
    return Dataset("docstrings", "sentences", (), held_out(y), len(names), _DOCUMENT, names, labels)


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield ast.get_docstring(node) or ""


def _expressions(source: str) -> set[tuple[str, ...]]:
    lines, found = source.splitlines(), set()
    for statement in ast.walk(ast.parse(source)):
        node = getattr(statement, "value", None)
        if not isinstance(statement, (ast.Assign, ast.Return)) or not isinstance(node, ast.expr):
            continue
        text = lines[node.lineno - 1]
        if node.lineno != node.end_lineno or not text.isascii():
            continue
        text = text[node.col_offset : node.end_col_offset]
        tokens = tokenize.generate_tokens(io.StringIO(f"({text})").readline)  # brackets: no line may be cut
        sentence = [_spelling(token) for token in tokens if token.string.strip()][1:-1]
        if 3 <= len(sentence) <= _TOKENS:
            found.add(tuple(sentence))
    return found


def _spelling(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME:
        return token.string if keyword.iskeyword(token.string) else "name"
    return {tokenize.NUMBER: "number", tokenize.STRING: "string"}.get(token.type, token.string)
