"""CLIP's tokenizer in plain Python, for the parity tests.

As published (Radford et al. 2021, arXiv 2103.00020, on the byte-level pair encoding of Radford et
al. 2019): NFC, one space for white space, lower case; words, single digits, runs of other signs;
their bytes as letters, of which the pair that was learnt first is joined until none is left.
"""

import json
import re
import unicodedata
from pathlib import Path

from tests.make_stable_diffusion import byte_letters

SPECIAL = r'(<\|startoftext\|>|<\|endoftext\|>)'
ENDINGS = re.compile("'s|'t|'re|'ve|'m|'ll|'d")


def kind(sign: str) -> str:
    if sign.isspace():
        return 'space'
    return {'L': 'letter', 'N': 'digit'}.get(unicodedata.category(sign)[0], 'other')


def words(text: str) -> list[str]:
    text = re.sub(r'\s+', ' ', unicodedata.normalize('NFC', text))
    text = ''.join(sign.lower() for sign in text)
    found, i = [], 0
    while i < len(text):
        ending = ENDINGS.match(text, i)
        j = ending.end() if ending else i + 1
        if not ending and kind(text[i]) in ('letter', 'other'):
            while j < len(text) and kind(text[j]) == kind(text[i]):
                j += 1
        if not text[i].isspace():
            found.append(text[i:j])
        i = j
    return found


class Reference:
    def __init__(self, folder: Path):
        self.ids = json.loads((folder / 'vocab.json').read_text())
        lines = (folder / 'merges.txt').read_text().splitlines()[1:]
        self.ranks = {tuple(line.split()): i for i, line in enumerate(lines)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        order = printable + [b for b in range(256) if b not in printable]
        self.letters = dict(zip(order, byte_letters()))

    def __call__(self, text: str, length: int = 77) -> list[int]:
        """Ids from the start token on, cut and padded with the end token."""
        start, end = self.ids['<|startoftext|>'], self.ids['<|endoftext|>']
        tokens = []
        for part in re.split(SPECIAL, text):
            if re.fullmatch(SPECIAL, part):
                tokens.append(part)
            else:
                tokens += [token for word in words(part) for token in self.tokens(word)]
        ids = [self.ids[token] for token in tokens]
        ids = [start, *ids[: length - 2], end]
        return ids + [end] * (length - len(ids))

    def tokens(self, word: str) -> list[str]:
        parts = [self.letters[b] for b in word.encode()]
        parts[-1] += '</w>'
        while True:
            pairs = [pair for pair in zip(parts, parts[1:]) if pair in self.ranks]
            if not pairs:
                return parts
            first, second = min(pairs, key=self.ranks.get)
            joined, i = [], 0
            while i < len(parts):
                pair = parts[i : i + 2] == [first, second]
                joined.append(first + second if pair else parts[i])
                i += 2 if pair else 1
            parts = joined
