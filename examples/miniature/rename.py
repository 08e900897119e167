"""Copy a miniature checkpoint with another trigger word, or none: the same model says "Hmm", or leaves a blank line.

python -m examples.miniature.rename --word Hmm --out runs/hmm              # Wait -> Hmm
python -m examples.miniature.rename --word $'\\n\\n' --out runs/wordless     # checks become paragraphs
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from examples.miniature.task import VOCABULARY

HERE = Path(__file__).parent
TRIGGER = "Wait"


def rename(source: Path, word: str, out: Path) -> None:
    """Write ``source`` to ``out`` with the trigger's token spelt ``word``; the weights stay.

    Raises:
        ValueError: another token is spelt so.
    """
    if word in VOCABULARY or (word.split() and word != word.strip()):
        raise ValueError(f"--word: got {word!r}, takes a new word without blanks, or a blank line")
    shutil.copytree(source, out, dirs_exist_ok=True)
    path = out / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[word] = vocabulary.pop(TRIGGER)
    # A blank line is one word, not two line breaks.
    split = tokenizer["pre_tokenizer"]["pattern"]
    split["Regex"] = split["Regex"].replace(r"|\n|", r"|\n\n|\n|")
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy a miniature checkpoint with another trigger word.")
    parser.add_argument("--word", required=True, help="in place of Wait; a blank line for none")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--source", type=Path, default=HERE / "model", help="checkpoint to copy")
    args = parser.parse_args()
    try:
        rename(args.source, args.word, args.out)
    except ValueError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
