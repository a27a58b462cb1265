"""Fuzz every reader: `python tests/security/fuzz_readers.py [CASES]` with atheris, guided by coverage; needs the extra `fuzz`.

The first byte of a case chooses the reader, the rest is the file. A third of the cases come from atheris alone, the others are mutants of good
files by `mutants.py`. Ends with the number of cases, those that were read, and the crashes: exceptions that are no `SecateursError`.
"""

from __future__ import annotations

import collections
import json
import os
import random
import sys
import tempfile
import traceback
from pathlib import Path

try:
    import atheris
except ImportError as missing:
    raise ImportError("the fuzzer needs atheris: pip install 'secateurs[fuzz]'") from missing

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["secateurs", "secateurs_adapters", "yaml", "numpy.lib"]):
    from mutants import mutant
    from readers import ROOT, readers


def main(cases: int, seed: int = 1) -> None:
    """Run so many cases and print the figures as JSON; the exit code tells whether there was no crash."""
    found = readers()
    tally: collections.Counter[str] = collections.Counter()
    read: collections.Counter[str] = collections.Counter()
    crashes: dict[str, str] = {}
    os.chdir(ROOT)
    folder = Path(tempfile.mkdtemp())
    (folder / "v.data").write_bytes(bytes(16))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, reader in enumerate(found):
        for version, good in enumerate(reader.good):
            (corpus / f"{number}-{version}").write_bytes(bytes([number]) + good)

    def one(case: bytes) -> None:
        reader = found[case[0] % len(found)] if case else found[0]
        content = case[1:]
        if sum(tally.values()) % 3:
            rng = random.Random(f"{seed} {sum(tally.values())}")
            reader = found[rng.randrange(len(found))]
            content = mutant(rng.choice(reader.good), rng)
        path = folder / f"file{reader.suffix}"
        path.write_bytes(content)
        tally[reader.name] += 1
        try:
            read[reader.name] += reader.survives(path)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{reader.name}: {type(error).__name__} at {where.filename}:{where.lineno}"
            if told not in crashes:
                crashes[told] = content[:4000].hex()

        if sum(tally.values()) >= cases:
            print(json.dumps({"cases": tally, "read": read, "crashes": crashes}), flush=True)
            os._exit(bool(crashes))

    options = [f"-seed={seed}", "-max_len=6000", "-timeout=60", "-verbosity=0", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
