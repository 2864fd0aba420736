"""How well does comatch-nano answer? Greedy answers to questions about held-out scenes, exact match, by kind.

python benchmarks/nano_answers.py [--model comatch-nano] [--n 2000] [--out benchmarks/results/nano_answers.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from comatch.analysis.answers import accuracy, answer
from comatch.backbones.base import Backbone
from comatch.content import as_message
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.recipes import load_recipe

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Ask, count, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="comatch-nano")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "nano_answers.json")
    args = parser.parse_args()
    recipe = load_recipe("vlm")
    encoder = Encoder(Backbone.load(args.model, recipe).eval(), recipe)
    stage = recipe.stage("rehearse")
    scenes = [scene(0, i, args.split) for i in range(args.n)]
    asked = [s.question(i) for i, s in enumerate(scenes)]
    pictures = [as_message(s.draw()) for s in scenes]
    said = answer(encoder, [(p, q) for p, (q, _, _) in zip(pictures, asked, strict=True)], stage)
    result = accuracy(said, [a for _, a, _ in asked], [kind for _, _, kind in asked])
    captions = answer(encoder, [(p, s.describe(0)[0]) for p, s in zip(pictures[: args.captions], scenes, strict=False)], stage, longest=100)
    told = sum(c == s.dense_caption() for c, s in zip(captions, scenes, strict=False)) / len(captions)
    record = {
        "model": args.model,
        "split": args.split,
        "questions": args.n,
        "exact_match": {kind: {"accuracy": round(share, 4), "n": n} for kind, (share, n) in result.items()},
        "whole dense caption right": {"accuracy": round(told, 4), "n": len(captions)},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
